#!/usr/bin/env bash
# Keras: with gradient_accumulation_steps the moving average of the weights (use_ema=True) is much shorter than
# ema_momentum says. The weights change once in gradient_accumulation_steps batches, but the average takes the
# unchanged weights in again with each batch. So a momentum of 0.99 is one of 0.99 ** 8 = 0.92 with 8 steps, and the
# average holds about the last 13 weights in place of 100.
#
# The documentation of ema_momentum: "new_average = ema_momentum * old_average + (1 - ema_momentum) *
# current_variable_value". Of gradient accumulation it says: "model & optimizer variables will not be updated at every
# step; instead they will be updated every gradient_accumulation_steps steps", and "EMA frequency will look at
# "accumulated" iterations value", which is so for ema_overwrite_frequency alone.
#
# Seen with keras 3.15.1 on torch 2.13.0 (on JAX 0.10.2 it is likewise): the average, which starts from the first
# weight, after 200 updates that each add 1 to a weight, with ema_momentum=0.99, and as the formula has it
#     steps   iterations   weight   average   formula
#         1          200    200.0     114.4     114.4
#         2          200    200.0     151.2     114.4
#         8          200    200.0     187.2     114.4
#
# For people who train small transformers: whoever halves the batch and doubles gradient_accumulation_steps to save
# memory, which should change nothing, gets the same weights and another average, and it is the average that fit() puts
# into the model at the end. Take the root: ema_momentum=0.99 ** (1 / 8). We found no report of this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile keras==3.15.1 torch==2.13.0 numpy
cd "$folder"
KERAS_HOME="$folder" KERAS_BACKEND=torch "$folder/venv/bin/python" -W ignore - <<'P'
import keras
import numpy as np

UPDATES, MOMENTUM = 200, 0.99


def train(steps):
    weight = keras.Variable(np.zeros(1, 'float32'))
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=MOMENTUM,
                                     gradient_accumulation_steps=None if steps == 1 else steps)
    optimizer.build([weight])
    for _ in range(UPDATES * steps):
        optimizer.apply([keras.ops.convert_to_tensor(np.full(1, -1, 'float32'))])
    iterations, value = int(optimizer.iterations), weight.value.item()
    optimizer.finalize_variable_values([weight])  # puts the average into the weight
    return iterations, value, weight.value.item()


formula = 1.0
for weight in range(2, UPDATES + 1):
    formula = MOMENTUM * formula + (1 - MOMENTUM) * weight
print('steps   iterations   weight   average   formula')
for steps in (1, 2, 8):
    iterations, value, average = train(steps)
    print(f'{steps:5} {iterations:12} {value:8.1f} {average:9.1f} {formula:9.1f}')
    assert iterations == UPDATES == value, 'the weights are not updated as described'
    if steps == 1:
        assert abs(average - formula) < 0.1, 'the average is wrong without accumulation, too'
    else:
        assert average > formula + 10, 'the average takes the steps into account'
page = ' '.join(keras.optimizers.SGD.__doc__.split())
for sentence in ('new_average = ema_momentum * old_average + (1 - ema_momentum) * current_variable_value',
                 'model & optimizer variables will not be updated at every step',
                 'EMA frequency will look at "accumulated" iterations value'):
    assert sentence in page, 'the documentation has changed'
print(f'keras {keras.__version__} on {keras.backend.backend()}: as described')
P

#!/usr/bin/env bash
# PyTorch's exponential moving average changes integers that never change. AveragedModel with use_buffers=True and
# get_ema_avg_fn or get_ema_multi_avg_fn computes decay * average + (1 - decay) * value of integer buffers, too, in
# float32, and cuts the result off to an integer. So 3 may become 2.9999998, and then 2. In a model with a buffer of
# positions, torch.arange(n), hundreds of tokens get the position of their neighbour. The average of a model with itself
# is a worse model. Lightning's callback EMAWeightAveraging sets use_buffers=True by default, and after training it puts
# the average into the model.
#
# The documentation of use_buffers: "if True, it will compute running averages for both the parameters and the buffers
# of the model", and its example of an exponential average has use_buffers=True. It names no type.
#
# Seen with torch 2.13.0 (and 2.14.1) and lightning 2.6.6: a model of last token and position is averaged with itself in
# three updates, or trained by Lightning for five steps with a learning rate of 0; then how many of 1024 positions are
# wrong, and the loss
#     decay      use_buffers=False    use_buffers=True    Lightning, default
#     0.99              0  0.586            0  0.586            0  0.586
#     0.999             0  0.586            0  0.586            0  0.586
#     0.9995            0  0.586          311  1.792          311  1.792
#     0.9999            0  0.586          205  1.397          205  1.397
#
# For people who train small transformers: whether it happens depends on the digits of the decay, and the default of
# 0.999 is spared. The training loss is right and the average's is not, so one takes averaging for harmful. Leave
# use_buffers out, or pass use_buffers=False to Lightning; the buffers are then copied. Many models of transformers have
# such a buffer, position_ids, BERT among them. We found no report of this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 lightning==2.6.6 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import logging

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
LENGTH = 1024


class Model(lightning.LightningModule):
    """A language model that knows the last token and its position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places, self.head = nn.Embedding(13, 32), nn.Embedding(LENGTH, 32), nn.Linear(32, 13)
        self.register_buffer('positions', torch.arange(LENGTH))

    def forward(self, x):
        return self.head(self.tokens(x) + self.places(self.positions[: x.shape[1]]))

    def training_step(self, batch, _=None):
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.0)


def texts(n, seed):
    """They all have one form, but one token in ten is another."""
    form = torch.randint(13, (LENGTH + 1,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(13, (n, LENGTH + 1), generator=generator)
    return torch.where(torch.rand(n, LENGTH + 1, generator=generator) < 0.9, form, others)


@torch.no_grad()
def measure(model):
    return (model.positions != torch.arange(LENGTH)).sum().item(), model.training_step(texts(16, seed=1)).item()


def averaged_with_itself(**options):
    average = AveragedModel(model, **options)
    for _ in range(3):
        average.update_parameters(model)
    return measure(average.module)


def averaged_by_lightning(decay):
    copy = Model()
    copy.load_state_dict(model.state_dict())
    quiet = dict.fromkeys(('logger', 'enable_checkpointing', 'enable_progress_bar', 'enable_model_summary'), False)
    trainer = lightning.Trainer(accelerator='cpu', max_steps=5, callbacks=[EMAWeightAveraging(decay=decay)], **quiet)
    trainer.fit(copy, torch.utils.data.DataLoader(texts(16, seed=2), batch_size=2))
    return measure(copy)


model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for step in range(100):
    loss = model.training_step(texts(8, seed=3 + step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
_, own = measure(model)
print('decay      use_buffers=False    use_buffers=True    Lightning, default')
for decay in (0.99, 0.999, 0.9995, 0.9999):
    without = averaged_with_itself(multi_avg_fn=get_ema_multi_avg_fn(decay))
    average = averaged_with_itself(multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    single = averaged_with_itself(avg_fn=get_ema_avg_fn(decay), use_buffers=True)
    callback = averaged_by_lightning(decay)
    print(f'{decay:<6}' + ''.join(f'{wrong:13}  {loss:.3f}' for wrong, loss in (without, average, callback)))
    assert without[0] == 0 and abs(without[1] - own) < 1e-4, 'the average of the weights is wrong'
    for wrong, loss in (average, single, callback):
        if decay > 0.999:
            assert wrong > 100 and loss > 1.5 * own, 'integers are averaged rightly'
        else:
            assert wrong == 0 and abs(loss - own) < 1e-4, 'more is wrong than described'
print(f'torch {torch.__version__}, lightning {lightning.__version__}: as described')
P

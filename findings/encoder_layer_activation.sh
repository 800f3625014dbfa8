#!/usr/bin/env bash
# nn.TransformerEncoderLayer in evaluation computes another activation than in training, where the activation is nn.GELU
# with approximate='tanh', GPT-2's, or a subclass of nn.GELU or nn.ReLU. Under eval() and no_grad() the layer takes a
# fast path that has two activations, the exact GELU and ReLU, and picks one by isinstance(activation, nn.GELU) and
# isinstance(activation, nn.ReLU): the argument approximate, and what a subclass does, are not looked at.
#
# The documentation allows any "unary callable". It says that the fast path is taken where, among other conditions,
# "activation is one of: "relu", "gelu", torch.functional.relu, or torch.functional.gelu", and nothing of modules.
#
# Seen with torch 2.9.1, 2.13.0 and 2.14.1: the largest difference between a layer's outputs in evaluation and in
# training without dropout. LayerNorm scales the outputs to a mean square of 1.
#     nn.GELU(approximate='tanh')            1.4e-04   without the fast path 0.0e+00
#     a squared ReLU, subclass of nn.ReLU    3.6e-01   without the fast path 0.0e+00
#     nn.GELU()                              9.5e-07   without the fast path 0.0e+00
#     nn.ReLU()                              7.2e-07   without the fast path 0.0e+00
#     partial(F.gelu, approximate='tanh')    7.2e-07   without the fast path 0.0e+00
#
# For people who train small transformers of PyTorch's layers: each validation loss is that of another model than the
# one that is trained. With GPT-2's GELU the error is small, yet a hundred times that of rounding; with a squared ReLU
# written as a subclass nothing is right. A function as activation is computed as it is in both. The fast path is
# switched off by torch.backends.mha.set_fastpath_enabled(False). We found no report of this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'P'
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class SquaredReLU(nn.ReLU):
    def forward(self, x):
        return F.relu(x).square()


def difference(activation, fast=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, activation=activation, batch_first=True)
    x = torch.randn(8, 16, 64)
    torch.backends.mha.set_fastpath_enabled(fast)
    with torch.no_grad():
        return (layer.train()(x) - layer.eval()(x)).abs().max().item()


wrong = {"nn.GELU(approximate='tanh')": nn.GELU(approximate='tanh'),
         'a squared ReLU, subclass of nn.ReLU': SquaredReLU()}
right = {'nn.GELU()': nn.GELU(), 'nn.ReLU()': nn.ReLU(),
         "partial(F.gelu, approximate='tanh')": partial(F.gelu, approximate='tanh')}
for name, activation in (wrong | right).items():
    fast, slow = difference(activation), difference(activation, fast=False)
    print(f'{name:38} {fast:.1e}   without the fast path {slow:.1e}')
    assert slow < 5e-6, 'something else differs between training and evaluation'
    assert fast > 5e-5 if name in wrong else fast < 5e-6, f'{name} is not as described'
condition = 'activation is one of: ``"relu"``, ``"gelu"``, ``torch.functional.relu``, or ``torch.functional.gelu``'
assert condition in nn.TransformerEncoderLayer.__doc__, 'the documentation has changed'
print(f'torch {torch.__version__}: as described')
P

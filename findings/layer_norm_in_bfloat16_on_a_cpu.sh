#!/usr/bin/env bash
# nn.LayerNorm on a CPU: if its input is bfloat16, the gradients of its weight and bias are wrong, by more the more
# tokens there are. Each is a sum over all tokens, and it is added up in bfloat16, which has 8 bits: a sum of 256 does
# not grow by 1. It is so under autocast, too, where the weight is float32 and mixed precision should be safe. nn.Linear
# and F.rms_norm add up such sums in float32. The gradient of nn.Embedding, in a model that is all bfloat16, is a sum of
# this kind as well: that of a token seen 40000 times stops at 256. index_select from the same weight is right.
#
# In a usual model under autocast nothing is wrong, for the embedding is float32 and with it all that the blocks read. A
# norm of queries and keys (QK-norm) reads what a linear layer computed, hence bfloat16, and has a row for each head.
#
# Seen with torch 2.13.0 and 2.14.1 and one thread (several threads each add up a part): the error, as a share of the
# gradient, in a block of a language model with QK-norm, 64 texts of 128 tokens, against float64
#                               autocast   norm of q.float()
#     q_norm.weight                0.191               0.005
#     q_norm.bias                  0.344               0.003
#     k_norm.weight                0.203               0.005
#     worst of all others          0.003               0.003
# and gradients that are a sum of 40000 ones, in bfloat16:
#     LayerNorm's bias 256, autocast 256, Linear's bias 39936, RMSNorm's weight 39936, Embedding 256, index_select 39936
#
# For people who train small transformers with QK-norm, or wholly in bfloat16, on a CPU: nothing says that a part of the
# model learns from noise. Norm x.float(). We found no report of this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'P'
import torch
import torch.nn.functional as F
from torch import nn

torch.set_num_threads(1)
VOCABULARY, WIDTH, HEADS, TEXTS, LENGTH, MANY = 13, 64, 4, 64, 128, 40000


class Model(nn.Module):
    """Token and position, a block of attention with a norm of queries and keys, and an output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x, mended):
        h = self.tokens(x) + self.places
        q, k, v = self.qkv(self.norm(h)).view(*x.shape, 3, HEADS, -1).transpose(1, 3).unbind(2)
        q, k = (norm(y.float() if mended else y).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h + self.out(y.transpose(1, 2).flatten(2)))


def gradients(dtype, autocast, mended=False):
    model, texts = Model().to(dtype), torch.randint(VOCABULARY, (TEXTS, 2), generator=torch.Generator().manual_seed(1))
    while texts.shape[1] <= LENGTH:  # each token is the sum of the last two modulo 13
        texts = torch.cat((texts, texts[:, -2:].sum(1, keepdim=True) % VOCABULARY), dim=1)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        logits = model(texts[:, :-1], mended)
    F.cross_entropy(logits.to(dtype).flatten(0, 1), texts[:, 1:].flatten()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if name != 'k_norm.bias'}  # whose is 0


def errors(found):
    share = {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}
    return [share.pop(name) for name in NORMS] + [max(share.values())]


def sum_of_ones(compute, parameter):
    y = compute()
    y.backward(torch.ones_like(y))
    return parameter.grad.flatten()[0].item()


def in_autocast(norm, x):
    with torch.autocast('cpu', torch.bfloat16):
        return norm(x)


NORMS = ('q_norm.weight', 'q_norm.bias', 'k_norm.weight')
exact = gradients(torch.float64, False)
full = errors(gradients(torch.float32, False))
plain, mended = errors(gradients(torch.float32, True)), errors(gradients(torch.float32, True, mended=True))
print(f'{"":25} autocast   norm of q.float()')
for name, a, b in zip((*NORMS, 'worst of all others'), plain, mended, strict=True):
    print(f'{name:25} {a:8.3f} {b:19.3f}')
assert max(full) < 1e-4 and max(mended) < 0.02 and plain[-1] < 0.02, 'more is wrong than described'
assert min(plain[:-1]) > 0.1, 'the norms of queries and keys are right'

half, x, token = torch.bfloat16, torch.ones(MANY, 4, dtype=torch.bfloat16), torch.zeros(MANY, dtype=torch.int64)
norm, full_norm, linear = nn.LayerNorm(4).to(half), nn.LayerNorm(4), nn.Linear(4, 4).to(half)
rms, embedding, other = nn.RMSNorm(4).to(half), nn.Embedding(1, 4).to(half), nn.Embedding(1, 4).to(half)
sums = {
    "LayerNorm's bias": sum_of_ones(lambda: norm(x), norm.bias),
    "LayerNorm's bias under autocast": sum_of_ones(lambda: in_autocast(full_norm, x), full_norm.bias),
    'Embedding': sum_of_ones(lambda: embedding(token), embedding.weight),
    "Linear's bias": sum_of_ones(lambda: linear(x), linear.bias),
    "RMSNorm's weight": sum_of_ones(lambda: rms(x), rms.weight),
    'index_select': sum_of_ones(lambda: other.weight.index_select(0, token), other.weight),
}
for name, number in sums.items():
    print(f'{name:32} {number:6.0f}')
*wrong, a, b, c = sums.values()
assert wrong == [256.0] * 3 and min(a, b, c) > 39000, 'a sum of ones is not as described'
print(f'torch {torch.__version__}: as described')
P

"""What turns gradients into a better model: parameter groups, optimizers, the learning-rate schedule, the EMA.

Needs torch alone; the optimizers and the averaging are torch.optim's own.
"""

import functools
import math

import torch
from torch.optim.swa_utils import AveragedModel

SCHEDULES = ('constant', 'cosine')
BLOCKS = ('blocks.', 'encoder.')  # what the names of the blocks' parameters begin with, in either model


def parameter_groups(model, weight_decay):
    """Three groups that hold every trainable parameter once: the blocks' matrices and the tables outside of them
    (embeddings, positions, head), which decay, and vectors, which do not.

    Shrinking a matrix limits what it can memorise; a bias or a LayerNorm's scale near 0 only harms.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in params.items() if p.dim() == 2 and name.startswith(BLOCKS)}
    tables = {name: p for name, p in params.items() if p.dim() == 2 and name not in matrices}
    vectors = {name: p for name, p in params.items() if p.dim() == 1}
    strays = params.keys() - matrices.keys() - tables.keys() - vectors.keys()
    assert not strays, f'neither matrix nor vector, so in no group: {sorted(strays)}'
    decays = ((matrices, weight_decay), (tables, weight_decay), (vectors, 0.0))
    return [{'params': list(group.values()), 'weight_decay': decay} for group, decay in decays]


class MuonAdamW:
    """Muon for the blocks' matrices, AdamW for the rest, with the methods of one torch optimizer.

    Muon steps by the momentum with all its singular values set to about 1: its authors' idea is that Adam's step is
    mostly a few loud directions, and the rare ones matter too (Jordan et al., 2024). A table is looked up by row, so it
    is left to AdamW. 'match_rms_adamw' makes the step as large as AdamW's, for one learning rate (Liu et al., 2025).
    """

    def __init__(self, groups, lr):
        matrices, *rest = groups
        self.parts = (
            torch.optim.Muon([matrices], lr=lr, adjust_lr_fn='match_rms_adamw'),
            torch.optim.AdamW(rest, lr=lr, fused=True),
        )

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


OPTIMIZERS = {  # fused: one kernel updates all tensors
    'sgd': functools.partial(torch.optim.SGD, fused=True),
    'adam': functools.partial(torch.optim.Adam, fused=True),
    'adamw': functools.partial(torch.optim.AdamW, fused=True),
    'muon': MuonAdamW,
}


def create_optimizer(model, optimizer, learning_rate, weight_decay):
    """One of OPTIMIZERS over the model's parameter groups. Decay is decoupled from the gradient in 'adamw'
    (Loshchilov and Hutter, 2017) and 'muon', and added to it in 'adam' and 'sgd'."""
    return OPTIMIZERS[optimizer](parameter_groups(model, weight_decay), lr=learning_rate)


def learning_rate_at(step, *, peak, schedule, warmup_iters, total, min_lr):
    """The learning rate of a step, counted from 0: a straight rise to `peak` over warmup_iters steps, then `peak`
    ('constant') or half a cosine down to min_lr at step `total` ('cosine': Loshchilov and Hutter, 2016)."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return peak
    progress = min(1.0, (step - warmup_iters) / max(1, total - warmup_iters))
    return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def create_ema(model, decay):
    """An exponential moving average of the weights: after each step, call `.update_parameters(model)`.

    average <- d average + (1 - d) weights, where d = min(decay, (1 + n) / (10 + n)) after n updates: the average of
    a short run then looks back over a part of it, not at its first weights.
    """

    def update(averages, weights, _):
        n = int(average.n_averaged)  # on the CPU; the copy that is handed over may be on a GPU, and would be waited for
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=update)
    return average

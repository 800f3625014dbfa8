"""What turns gradients into a better model: parameter groups, optimizers, the learning-rate schedule, the EMA.

Needs torch alone; the optimizers and the averaging are torch.optim's own.
"""

import math

import torch
from torch.optim.swa_utils import AveragedModel

OPTIMIZERS = {'sgd': torch.optim.SGD, 'adam': torch.optim.Adam, 'adamw': torch.optim.AdamW}
SCHEDULES = ('constant', 'cosine')


def parameter_groups(model, weight_decay):
    """Two groups that hold every trainable parameter once: matrices, which decay, and vectors, which do not.

    Shrinking a matrix limits what it can memorise; a bias or a LayerNorm's scale near 0 only harms.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in params.items() if p.dim() == 2}
    vectors = {name: p for name, p in params.items() if p.dim() == 1}
    strays = params.keys() - matrices.keys() - vectors.keys()
    assert not strays, f'neither matrix nor vector, so in no group: {sorted(strays)}'
    return [
        {'params': list(matrices.values()), 'weight_decay': weight_decay},
        {'params': list(vectors.values()), 'weight_decay': 0.0},
    ]


def create_optimizer(model, optimizer, learning_rate, weight_decay):
    """One of OPTIMIZERS over the model's parameter groups. Decay is decoupled from the gradient in 'adamw'
    (Loshchilov and Hutter, 2017) and added to it in 'adam' and 'sgd'. fused: one kernel updates all tensors."""
    return OPTIMIZERS[optimizer](parameter_groups(model, weight_decay), lr=learning_rate, fused=True)


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

    def update(averages, weights, n):
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return AveragedModel(model, multi_avg_fn=update)

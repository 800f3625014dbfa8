"""What turns gradients into a better model: parameter groups, optimizers, the learning-rate schedule, the EMA.

Needs torch alone; the optimizers but Muon, and the averaging, are torch.optim's own.
"""

import collections
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


def orthogonalize(m):
    """Each matrix of m (N, rows, columns) with all its singular values set to about 1, in bfloat16.

    Five steps of a polynomial: X <- a X + b (X X') X + c (X X')^2 X turns each singular value s into
    a s + b s^3 + c s^5, and its three numbers are chosen to bring any s from 0.002 to 1 to about 0.7 to 1.2 in so few.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.bfloat16()
    tall = x.size(1) > x.size(2)
    x = x.mT.contiguous() if tall else x  # the smaller X X'
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(5):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps by the momentum with all its singular values set to about 1: its authors' idea is that Adam's step is
    mostly a few loud directions, and the rare ones matter too (Jordan et al., 2024).

    The step is made as large as AdamW's, so that one learning rate does for both (Liu et al., 2025). The same as
    torch.optim.Muon with adjust_lr_fn='match_rms_adamw', which goes matrix by matrix and takes no learning rate from
    memory; here all matrices of a shape go together: 14 ms against 20 (swiglu, two CPU cores).
    """

    def __init__(self, groups, lr, momentum=0.95):
        super().__init__(groups, {'lr': lr, 'momentum': momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group['lr'], group['momentum']
            same_shape = collections.defaultdict(list)
            for p in group['params']:
                same_shape[p.shape].append(p)
            for shape, weights in same_shape.items():
                for p in weights:
                    if not self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                buffers = [self.state[p]['momentum_buffer'] for p in weights]
                gradients = [p.grad for p in weights]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov's: where the momentum leads to
                size = 0.2 * math.sqrt(max(shape))  # a root mean square of 0.2, as AdamW's steps have
                step = orthogonalize(torch.stack(ahead)) * (lr * size)
                torch._foreach_mul_(weights, 1 - lr * group['weight_decay'])
                torch._foreach_sub_(weights, step.unbind())


class MuonAdamW:
    """Muon for the blocks' matrices, AdamW for the rest, with the methods of one torch optimizer. A table is looked up
    by row, so it is left to AdamW."""

    def __init__(self, groups, lr):
        matrices, *rest = groups
        self.parts = Muon([matrices], lr), torch.optim.AdamW(rest, lr=lr, fused=True)

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

"""What turns gradients into a better model: parameter groups, optimizers, the learning rate, an average of the weights.

It needs torch alone. SGD and AdamW are torch.optim's own; Muon is spelled out.
"""

import collections
import math

import torch

LAYERS = ('blocks.', 'encoder.')  # the parameters of the layers have names that begin with this, in either model


def parameter_groups(model, weight_decay):
    """Three groups that hold every trainable parameter once: the matrices of the layers; the tables outside of them
    (embeddings, positions, head); the vectors (biases, the norms' scales).

    Matrices and tables decay: a smaller matrix memorises less. A vector near 0 only harms.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in params.items() if p.dim() == 2 and name.startswith(LAYERS)}
    tables = {name: p for name, p in params.items() if p.dim() == 2 and name not in matrices}
    vectors = {name: p for name, p in params.items() if p.dim() == 1}
    strays = params.keys() - matrices.keys() - tables.keys() - vectors.keys()
    assert not strays, f'neither matrix nor vector, so in no group: {sorted(strays)}'
    decays = ((matrices, weight_decay), (tables, weight_decay), (vectors, 0.0))
    return [{'params': list(group.values()), 'weight_decay': decay} for group, decay in decays]


POLYNOMIALS = {  # (a, b, c) of each step of orthogonalize
    5: [(3.4445, -4.7750, 2.0315)] * 5,  # brings any singular value from 0.002 to 1 to about 0.7 to 1.2 (Jordan et al.)
    3: [(8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978)],  # from 0.005: 0.5 to 1.5
}


def orthogonalize(m, steps=5, dtype=torch.bfloat16):
    """Each matrix of m (N, rows, columns) with all its singular values set to about 1. A GPU multiplies fastest in
    bfloat16; a CPU without instructions for it took thirty times as long as in float32.

    A step is X <- a X + b (X X') X + c (X X')^2 X, which turns each singular value s into a s + b s^3 + c s^5. Five
    steps take Muon's own polynomial each time. Three take a polynomial each: the one with the smallest largest error
    on the range of s that the step before leaves, at first 0.005 to 1 (Polar Express: Amsel et al., 2025).
    """
    x = m.to(dtype)
    tall = x.size(1) > x.size(2)
    x = x.mT.contiguous() if tall else x  # X X' is then the smaller one
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for a, b, c in POLYNOMIALS[steps]:
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps by the momentum with all its singular values set to about 1 (Jordan et al., 2024). Its authors' idea:
    Adam's step is mostly a few loud directions, and the rare ones matter, too.

    The step is as large as AdamW's, so that one learning rate does for both (Liu et al., 2025). torch.optim.Muon with
    adjust_lr_fn='match_rms_adamw' is the same matrix by matrix; here all matrices of a shape go together, 14 ms per
    step against 20 (swiglu, two CPU cores).

    rms is the root mean square of a step at a learning rate of 1; steps and dtype are orthogonalize's.
    """

    def __init__(self, groups, lr, momentum=0.95, rms=0.2, steps=5, dtype=torch.bfloat16):
        super().__init__(groups, {'lr': lr, 'momentum': momentum})
        self.rms, self.steps, self.dtype = rms, steps, dtype

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
                size = self.rms * math.sqrt(max(shape))  # with singular values of 1 the rms is 1 / sqrt(max(shape))
                update = orthogonalize(torch.stack(ahead), self.steps, self.dtype) * (lr * size)
                torch._foreach_mul_(weights, 1 - lr * group['weight_decay'])
                torch._foreach_sub_(weights, update.unbind())


def create_optimizers(model, optimizer, learning_rate, weight_decay, **muon):
    """The optimizers that share the model's parameters: one, or for 'muon' two, since a table is looked up row by row
    and so is left to AdamW. AdamW decays the weights themselves, not through the gradient (Loshchilov and Hutter,
    2017); with a weight_decay of 0 it is Adam (Kingma and Ba, 2014).

    muon holds the other arguments of Muon."""
    groups = parameter_groups(model, weight_decay)
    if optimizer == 'sgd':
        return [torch.optim.SGD(groups, lr=learning_rate, fused=True)]  # fused: one kernel updates all tensors
    if optimizer == 'adamw':
        return [torch.optim.AdamW(groups, lr=learning_rate, fused=True)]
    matrices, *others = groups
    return [Muon([matrices], lr=learning_rate, **muon), torch.optim.AdamW(others, lr=learning_rate, fused=True)]


def learning_rate_at(step, peak, floor, warmup_iters, total, schedule):
    """The learning rate of a step, counted from 0: a straight rise to `peak` over warmup_iters steps, then `peak`
    ('constant') or half a cosine down to `floor` at step `total` ('cosine': Loshchilov and Hutter, 2016)."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return peak
    progress = min(1.0, (step - warmup_iters) / max(1, total - warmup_iters))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average, model, decay, n):
    """Move the exponential moving average of the weights, a copy of the model that n updates have moved so far.

    average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)): until d has grown to decay, the
    average looks back over about the last ninth of the run. The first update copies the weights.
    """
    d = min(decay, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - d)

"""What turns gradients into a better model: parameter groups, Muon, the learning rate, an average of the weights.

Needs torch alone. SGD and AdamW are those of torch.optim, Muon is written out.
"""

import collections
import math

import torch

LAYERS = ('blocks.', 'encoder.')  # in either model, the names of the layers' parameters begin with one of these


def parameter_groups(model, weight_decay):
    """Three groups, {'params': [...], 'weight_decay': ...}, that hold every trainable parameter once: hidden weight
    matrices; embeddings and output head (and learned positions); biases and norm gains. Raises AssertionError with the
    names of parameters that fit none.

    The first two decay. Biases and gains do not, by convention."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = {name: p for name, p in params.items() if p.dim() == 2 and name.startswith(LAYERS)}
    embeddings = {name: p for name, p in params.items() if p.dim() == 2 and name not in hidden}
    biases_and_gains = {name: p for name, p in params.items() if p.dim() == 1}
    ungrouped = params.keys() - hidden.keys() - embeddings.keys() - biases_and_gains.keys()
    assert not ungrouped, f'neither matrix nor vector, so in no group: {sorted(ungrouped)}'
    decays = ((hidden, weight_decay), (embeddings, weight_decay), (biases_and_gains, 0.0))
    return [{'params': list(group.values()), 'weight_decay': decay} for group, decay in decays]


# (a, b, c) of each step of orthogonalize. Five map singular values in [0.002, 1] into about [0.7, 1.2] (Jordan et al.,
# 2024), three those in [0.005, 1] into [0.5, 1.5]
POLYNOMIALS = {
    5: [(3.4445, -4.7750, 2.0315)] * 5,
    3: [(8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978)],
}


def orthogonalize(m, steps=5, dtype=torch.bfloat16):
    """Replaces each matrix U S V' of m (N, rows, columns) by about U V': all singular values become about 1.

    A step is X <- a X + b (X X') X + c (X X')^2 X, which maps each singular value s to a s + b s^3 + c s^5. Five steps
    use Muon's own polynomial each time. Three steps use a polynomial each: the one whose largest error is smallest on
    the range of s that the step before leaves, at first 0.005 to 1 (Polar Express: Amsel et al., 2025).

    A GPU multiplies fastest in bfloat16. A CPU without instructions for it takes many times as long as in float32.
    """
    x = m.to(dtype)
    tall = x.size(1) > x.size(2)
    x = x.mT.contiguous() if tall else x  # X X' is then the smaller of the two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for a, b, c in POLYNOMIALS[steps]:
        square = x @ x.mT  # (N, rows, rows), or (N, columns, columns) if tall
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Replaces the momentum U S V' of each hidden weight matrix by about U V' (Jordan et al., 2024). Their reason: a
    few directions with large singular values dominate Adam's update, and the others matter for learning, too.

    The update is scaled to the size of AdamW's, so that both can use one learning rate (Liu et al., 2025): rms is its
    root mean square at a learning rate of 1. steps and dtype are those of orthogonalize. torch.optim.Muon with
    adjust_lr_fn='match_rms_adamw' computes the same matrix by matrix. Here all matrices of one shape are stacked, which
    takes fewer and larger products.
    """

    def __init__(self, groups, lr, momentum=0.95, rms=0.2, steps=5, dtype=torch.bfloat16):
        super().__init__(groups, {'lr': lr, 'momentum': momentum})
        self.rms = rms
        self.steps = steps
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same_shape = collections.defaultdict(list)
            for p in group['params']:
                same_shape[p.shape].append(p)
                if not self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p)
            for shape, weights in same_shape.items():
                # torch._foreach_f is f, tensor by tensor: here m <- 0.95 m + 0.05 g, then the update 0.05 g + 0.95 m
                buffers = [self.state[p]['momentum_buffer'] for p in weights]
                gradients = [p.grad for p in weights]
                torch._foreach_lerp_(buffers, gradients, 1 - group['momentum'])
                nesterov_update = torch._foreach_lerp(gradients, buffers, group['momentum'])  # looks one step ahead
                update = orthogonalize(torch.stack(nesterov_update), self.steps, self.dtype)
                size = self.rms * math.sqrt(max(shape))  # the rms of U V' is 1 / sqrt(max(shape))
                torch._foreach_mul_(weights, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_sub_(weights, (update * (group['lr'] * size)).unbind())


def create_optimizers(model, optimizer, learning_rate, weight_decay, **muon):
    """The optimizers that share the model's parameters: one, or two for 'muon'. Muon is meant for hidden weight
    matrices; embeddings, output head, biases and gains stay with AdamW, as its authors advise (Jordan et al., 2024).

    AdamW decays the weights themselves, not through the gradient (Loshchilov and Hutter, 2017); with a weight_decay of
    0 it is Adam (Kingma and Ba, 2014). muon holds the other arguments of Muon."""
    groups = parameter_groups(model, weight_decay)
    if optimizer == 'sgd':
        return [torch.optim.SGD(groups, lr=learning_rate, fused=True)]  # fused: one kernel updates all tensors
    if optimizer == 'adamw':
        return [torch.optim.AdamW(groups, lr=learning_rate, fused=True)]
    hidden, *others = groups
    return [Muon([hidden], lr=learning_rate, **muon), torch.optim.AdamW(others, lr=learning_rate, fused=True)]


def learning_rate_at(step, peak, floor, warmup_iters, total_steps, schedule):
    """The learning rate of a step, counted from 0: a linear rise to peak over warmup_iters steps, then peak
    ('constant') or half a cosine down to floor at step total_steps, where it stays ('cosine': Loshchilov and Hutter,
    2016)."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == 'constant':
        return peak
    progress = min(1.0, (step - warmup_iters) / max(1, total_steps - warmup_iters))
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(average, model, decay, n):
    """Move the exponential moving average of the weights, a copy of the model that n updates have moved so far.

    average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)): until d has grown to decay, the
    average has a time constant of about n/9 updates. The first update, n = 0, copies the weights.
    """
    d = min(decay, (1 + n) / (10 + n)) if n else 0.0
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - d)

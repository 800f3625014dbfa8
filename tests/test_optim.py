"""optim.py against formulas worked out by hand, torch's own Muon and its averaging.

python -m pytest tests/test_optim.py -x -k learning_rate   one idea: groups, orthogonalize, muon, learning_rate, average
"""

import collections
import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import optim
from model import build_model
from optim import Muon, create_optimizers, learning_rate_at, orthogonalize, parameter_groups, update_average
from test_model import configure, exercise


def net():
    torch.manual_seed(0)
    layers = {'embedding': nn.Embedding(7, 4), 'norm': nn.LayerNorm(4), 'blocks': nn.Linear(4, 3)}
    return nn.Sequential(collections.OrderedDict(layers))


def rate(step, **changes):
    knobs = dict(peak=1.0, floor=0.0, warmup_iters=0, total_steps=100, schedule='cosine')
    return learning_rate_at(step, **(knobs | changes))


@exercise
def test_parameter_groups_decay_weights_but_not_biases_and_gains():
    """There should be three groups, {'params': [...], 'weight_decay': ...}: hidden weight matrices (their names begin
    with one of LAYERS), other matrices, biases with norm gains. Only the last should not decay."""
    model = net()
    names = {p: name for name, p in model.named_parameters()}
    groups = [sorted(names[p] for p in group['params']) for group in parameter_groups(model, 0.1)]
    expected = [['blocks.weight'], ['embedding.weight'], ['blocks.bias', 'norm.bias', 'norm.weight']]
    assert groups == expected, f'the groups are {groups}, expected {expected}'
    decays = [group['weight_decay'] for group in parameter_groups(model, 0.1)]
    assert decays == [0.1, 0.1, 0.0], f'the groups decay by {decays}, expected 0.1, 0.1 and 0'


@pytest.mark.parametrize('kind', ['flash', 'torch'])
@exercise
def test_parameter_groups_of_both_models(kind):
    """The first group should hold all matrices whose names begin with one of LAYERS, in either model. The second should
    hold the others: embedding, learned positions, the PyTorch model's output head."""
    model = build_model(configure(model=kind, position='learned', n_layer=2, n_embd=8, n_head=2), 9)
    hidden, others, _ = ([list(p.shape) for p in group['params']] for group in parameter_groups(model, 0.1))
    assert len(hidden) == 2 * 4, f'the first group has matrices {hidden}, expected 4 of each of 2 layers'
    expected = [[16, 8], [16, 8]] if kind == 'flash' else [[9, 8], [9, 8]]
    assert others == expected, f'the second group has matrices {others}, expected {expected}'


@exercise
def test_parameter_groups_name_a_parameter_that_fits_none():
    """A parameter that is neither a matrix nor a vector should be named in an AssertionError."""
    model = net()
    model.register_parameter('cube', nn.Parameter(torch.zeros(2, 2, 2)))
    with pytest.raises(AssertionError, match='cube'):
        parameter_groups(model, 0.1)


@exercise
def test_parameter_groups_leave_frozen_parameters_out():
    """A parameter that is not trained (requires_grad is False) should be in no group."""
    model = net()
    model[0].weight.requires_grad_(False)
    sizes = [len(group['params']) for group in parameter_groups(model, 0.1)]
    assert sizes == [1, 0, 3], f'without the embedding the groups hold {sizes} parameters, expected 1, 0 and 3'


@pytest.mark.parametrize(('name', 'decay'), [('sgd', 0.0), ('adamw', 0.0), ('adamw', 0.1)])
def test_first_update_is_the_textbooks(name, decay):
    """One step from known gradients, in float64: w - lr g; Adam's first step is lr g / |g|; AdamW shrinks w first."""
    model = net().double()
    before = copy.deepcopy(model.state_dict())
    gradients = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    for key, p in model.named_parameters():
        p.grad = gradients[key].clone()
    [optimizer] = create_optimizers(model, name, 0.01, decay)
    optimizer.step()
    for key, p in model.named_parameters():
        w, g = before[key], gradients[key]
        expected = w - 0.01 * (g if name == 'sgd' else g / (g.abs() + 1e-8))
        if p.dim() == 2:
            expected = expected - 0.01 * decay * w
        torch.testing.assert_close(p.data, expected)


def test_adamw_without_decay_is_adam():
    """Runs 2 to 4 of the notebook use Adam: ten steps of torch.optim.Adam, bit for bit."""
    ours, peer = net(), net()
    [optimizer] = create_optimizers(ours, 'adamw', 0.01, 0.0)
    adam = torch.optim.Adam(peer.parameters(), 0.01, fused=True)
    for _ in range(10):
        for p, q in zip(ours.parameters(), peer.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        adam.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), peer.parameters(), strict=True))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_muons_first_update_is_the_gradient_with_equal_singular_values(dtype):
    """Against torch's SVD: Muon's five iterations bring every singular value near 1; the rest is AdamW's."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in create_optimizers(model, 'muon', 0.01, 0.1, dtype=dtype):
        optimizer.step()
    blocks = model[2].weight
    update = before['blocks.weight'] * (1 - 0.01 * 0.1) - blocks.detach()
    u, s, v = torch.linalg.svd(blocks.grad, full_matrices=False)
    assert s[0] > 2 * s[-1]
    values = u.T @ update @ v.T / (0.01 * 0.2 * math.sqrt(4))
    assert ((values.diag() > 0.6) & (values.diag() < 1.3)).all()
    assert (values - values.diag().diag()).abs().max() < 0.05
    for key, decay in (('embedding.weight', 0.1), ('norm.weight', 0.0), ('blocks.bias', 0.0)):
        p = model.get_parameter(key)
        expected = before[key] * (1 - 0.01 * decay) - 0.01 * p.grad.sign()
        torch.testing.assert_close(p.data, expected)


def test_muon_is_torchs():
    """Ours takes all matrices of a shape together; ten steps of torch.optim.Muon lead to the same place, but for the
    rounding of bfloat16."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((6, 4), (4, 4), (6, 4), (5, 9), (4, 6))]
    ours, torchs = ([nn.Parameter(m.clone()) for m in start] for _ in range(2))
    optimizers = [
        Muon([{'params': ours, 'weight_decay': 0.1}], lr=0.02),
        torch.optim.Muon(torchs, lr=0.02, weight_decay=0.1, adjust_lr_fn='match_rms_adamw'),
    ]
    for _ in range(10):
        for p, q in zip(ours, torchs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, m in zip(ours, torchs, start, strict=True):
        assert (p - q).norm() < 0.01 * (q - m).norm() > 0


@pytest.mark.parametrize(('steps', 'low', 'high'), [(5, 0.6, 1.3), (3, 0.5, 1.5)])
@pytest.mark.parametrize('shape', [(30, 50), (50, 30)])
@exercise
def test_orthogonalize_brings_singular_values_near_1(steps, low, high, shape):
    """Each matrix U S V' should become about U V', be its numbers large or small: singular values become about 1, the
    singular vectors stay. (They are torch's. The smallest value is 0.006 of the matrix's norm.)"""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(7, *shape), full_matrices=False)
    s = torch.logspace(-1.9, 0, 30) * torch.logspace(-3, 3, 7)[:, None, None]
    x = orthogonalize(u * s @ v, steps, torch.float32)
    assert x.shape == (7, *shape), f'the result has the shape {tuple(x.shape)}, expected {(7, *shape)}'
    found = u.mT @ x @ v.mT
    values = found.diagonal(dim1=1, dim2=2)
    lowest, highest = values.min().item(), values.max().item()
    message = f'singular values become {lowest:.2f} to {highest:.2f}, expected {low} to {high}'
    assert low < lowest and highest < high, message
    rest = (found - values.diag_embed()).abs().max().item()
    assert rest < 1e-3, f"U' X V has entries of {rest:.2g} off its diagonal, expected 0: the singular vectors change"


@pytest.mark.parametrize('shape', [(20, 80), (80, 20)])
@exercise
def test_orthogonalize_multiplies_small_matrices(shape):
    """A step should cost a few products with a matrix of 20 x 20, X X'. For that, X must have 20 rows and 80 columns: a
    tall m is transposed first, and the result transposed back."""
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(1, *shape), dtype=torch.float32)
    found, limit = counter.get_total_flops(), 5 * 4 * (2 * 20 * 20 * 80)  # 5 steps of 4 products
    assert found <= limit, f'{found:,} operations for a matrix of {shape}, expected at most {limit:,}'


def test_each_of_the_three_polynomials_is_the_best_of_its_kind():
    """Chebyshev's theorem: with three numbers to choose, the largest error is as small as it can be where it is reached
    four times, with signs in turn."""
    low, high = 0.005, 1.0
    for a, b, c in optim.POLYNOMIALS[3]:
        s = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * s + b * s**3 + c * s**5 - 1
        worst = error.abs().max().item()
        signs = error[error.abs() > worst - 0.003].sign()
        assert (signs[1:] != signs[:-1]).sum() == 3
        low, high = 1 - worst, 1 + worst
    assert worst < 0.5


@exercise
def test_learning_rate_falls_by_half_a_cosine_to_the_floor():
    """After the warmup the learning rate should fall from peak to floor in half a cosine: floor is reached at step
    total_steps, and stays."""
    for warmup_iters, floor in ((0, 0.0), (10, 0.2)):
        for step in range(warmup_iters, 120):
            share = min(1, (step - warmup_iters) / (100 - warmup_iters))
            expected = floor + (1 - floor) * math.cos(math.pi / 2 * share) ** 2
            found = rate(step, warmup_iters=warmup_iters, floor=floor)
            message = f'step {step} of 100: {found:.7f}, expected {expected:.7f} ({warmup_iters=}, peak=1, {floor=})'
            assert found == pytest.approx(expected, abs=1e-9), message
    assert rate(100) == rate(1000) == 0.0


@pytest.mark.parametrize('schedule', ['cosine', 'constant'])
@exercise
def test_learning_rate_rises_in_equal_steps_and_meets_the_peak(schedule):
    """A warmup of 4 steps should be 1/5, 2/5, 3/5 and 4/5 of peak. Then comes peak itself, for good if the schedule is
    'constant'."""
    found, expected = [rate(step, warmup_iters=4, schedule=schedule) for step in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0]
    assert found == pytest.approx(expected), f'steps 0 to 4 have {found}, expected {expected}'
    later = rate(10**6, warmup_iters=4, schedule=schedule)
    assert schedule == 'cosine' or later == 1.0, f'step 1,000,000 has {later}, expected 1'


@pytest.mark.parametrize('total_steps', [0, 1, 3, 4])
@exercise
def test_learning_rate_of_runs_shorter_than_their_warmup(total_steps):
    """A run may end before its warmup of 4 steps does. All learning rates should be between 0 and peak (here 1)."""
    rates = [rate(step, warmup_iters=4, total_steps=total_steps) for step in range(8)]
    assert min(rates) >= 0 and max(rates) <= 1, f'a run of {total_steps} steps has {rates}'


@exercise
def test_average_is_the_closed_form():
    """The average should be d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)), and after the first
    update, n = 0, a copy of the weights. (Each weight's share in it is multiplied by all the d that follow.)"""
    model = nn.Linear(1, 1, bias=False)
    average = copy.deepcopy(model)
    shares = []  # of each value in the average
    for n in range(12):
        model.weight.data.fill_(n + 1)
        update_average(average, model, 0.5, n)
        d = [0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5, 0.5][n]
        shares = [d * share for share in shares] + [1 - d]
        found, expected = average.weight.item(), sum(share * (i + 1) for i, share in enumerate(shares))
        message = f'after the weights 1 to {n + 1} the average is {found:.4f}, expected {expected:.4f} (d = {d:.3f})'
        assert found == pytest.approx(expected), message


@exercise
def test_average_equals_torchs_own_once_its_decay_is_constant():
    """All parameters should be averaged, as torch.optim.swa_utils does it, and the model itself stay as it is."""
    torch.manual_seed(0)
    model = net()
    ours = copy.deepcopy(model)
    peer = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.05))
    for n in range(5):
        for p in model.parameters():
            p.data += torch.randn_like(p)
        update_average(ours, model, 0.05, n)  # below (1 + n) / (10 + n) from the start
        peer.update_parameters(model)
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(ours[0].weight, model[0].weight)

"""optim.py against formulas worked out by hand, torch's own Muon and its averaging."""

import collections
import copy
import math

import pytest
import torch
from torch import nn

import optim
from model import Config, TorchTransformer, Transformer
from optim import Muon, create_optimizers, learning_rate_at, orthogonalize, parameter_groups, update_average


def net():
    torch.manual_seed(0)
    layers = {'embedding': nn.Embedding(7, 4), 'norm': nn.LayerNorm(4), 'blocks': nn.Linear(4, 3)}
    return nn.Sequential(collections.OrderedDict(layers))


def rate(step, **changes):
    knobs = dict(peak=1.0, floor=0.0, warmup_iters=0, total=100, schedule='cosine')
    return learning_rate_at(step, **(knobs | changes))


def test_matrices_decay_and_vectors_do_not():
    model = net()
    matrices, tables, keep = parameter_groups(model, 0.1)
    assert [group['weight_decay'] for group in (matrices, tables, keep)] == [0.1, 0.1, 0.0]
    assert [id(p) for p in matrices['params'] + tables['params']] == [id(model[2].weight), id(model[0].weight)]
    assert {id(p) for p in keep['params']} == {id(model[1].weight), id(model[1].bias), id(model[2].bias)}


def test_a_parameter_of_neither_kind_is_named():
    model = net()
    model.register_parameter('cube', nn.Parameter(torch.zeros(2, 2, 2)))
    with pytest.raises(AssertionError, match='cube'):
        parameter_groups(model, 0.1)


def test_frozen_parameters_are_left_out():
    model = net()
    model[0].weight.requires_grad_(False)
    assert sum(len(group['params']) for group in parameter_groups(model, 0.1)) == 4


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
    """Rows 2 to 4 of the log take Adam: ten steps of torch.optim.Adam, bit for bit."""
    ours, peer = net(), net()
    [optimizer], adam = (
        create_optimizers(ours, 'adamw', 0.01, 0.0),
        torch.optim.Adam(peer.parameters(), 0.01, fused=True),
    )
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


def test_three_polynomials_bring_singular_values_near_1():
    """Against torch's SVD, on singular values from 0.005 of the norm up."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(7, 30, 50), full_matrices=False)
    s = torch.logspace(-1.9, 0, 30)  # the least is 0.006 of the norm of all
    found = u.mT @ orthogonalize(u * s @ v, 3, torch.float32) @ v.mT
    assert ((found.diagonal(dim1=1, dim2=2) > 0.5) & (found.diagonal(dim1=1, dim2=2) < 1.5)).all()
    assert (found - found.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < 1e-3


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


@pytest.mark.parametrize('model', [Transformer, TorchTransformer])
def test_muon_takes_the_blocks_matrices_and_nothing_else(model):
    shape = Config(9, 8, 2, 2, 8, 12, 0.0, 'swiglu', 'learned', 'sdpa', True, False, False)
    muon, adamw = create_optimizers(model(shape), 'muon', 0.01, 0.1)
    assert len(muon.param_groups[0]['params']) == 2 * 4
    assert {p.size(0) for p in adamw.param_groups[0]['params']} <= {8, 9, 16}  # positions, head, embedding


def test_cosine_goes_from_the_peak_to_the_floor():
    assert rate(0) == 1.0
    assert rate(50) == pytest.approx(0.5)
    assert rate(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert 0 < rate(99) < 0.001
    assert rate(100) == rate(1000) == 0.0
    assert rate(50, floor=0.2) == pytest.approx(0.6)
    assert rate(100, floor=0.2) == 0.2
    rates = [rate(step, warmup_iters=10) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


def test_warmup_rises_in_equal_steps_and_meets_the_peak():
    rates = [rate(step, warmup_iters=4) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rate(4, warmup_iters=4, schedule='constant') == 1.0
    assert rate(10**6, warmup_iters=4, schedule='constant') == 1.0


@pytest.mark.parametrize('total', [0, 1, 3, 4])
def test_runs_shorter_than_their_warmup(total):
    assert all(0 <= rate(step, warmup_iters=4, total=total) <= 1 for step in range(8))


def test_ema_is_the_closed_form():
    """Scalars 1, 2, 3, ...: the average is the sum of each weight times the product of the decays that follow it."""
    model = nn.Linear(1, 1, bias=False)
    average = copy.deepcopy(model)
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    for n, value in enumerate(values):
        model.weight.data.fill_(value)
        update_average(average, model, 0.5, n)
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(1, len(values))]
    assert decays[0] < 0.2 and decays[-1] == 0.5
    shares = [math.prod(decays)]  # of the first value, which the average starts as
    shares += [(1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    assert average.weight.item() == pytest.approx(expected)


def test_ema_equals_torchs_own_once_its_decay_is_constant():
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

"""optim.py against formulas worked out by hand, and torch's own averaging."""

import copy
import math

import pytest
import torch
from torch import nn

from optim import create_ema, create_optimizer, learning_rate_at, parameter_groups


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def rate(step, **changes):
    knobs = dict(peak=1.0, schedule='cosine', warmup_iters=0, total=100, min_lr=0.0)
    return learning_rate_at(step, **(knobs | changes))


def test_matrices_decay_and_vectors_do_not():
    model = net()
    decay, keep = parameter_groups(model, 0.1)
    assert (decay['weight_decay'], keep['weight_decay']) == (0.1, 0.0)
    assert {id(p) for p in decay['params']} == {id(model[0].weight), id(model[2].weight)}
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


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw'])
def test_first_update_is_the_textbooks(name):
    """One step from known gradients, in float64: w - lr g; Adam's first step is lr g / |g|; AdamW shrinks w first."""
    model = net().double()
    before = copy.deepcopy(model.state_dict())
    gradients = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    for key, p in model.named_parameters():
        p.grad = gradients[key].clone()
    create_optimizer(model, name, 0.01, 0.1 if name == 'adamw' else 0.0).step()
    for key, p in model.named_parameters():
        w, g = before[key], gradients[key]
        expected = w - 0.01 * (g if name == 'sgd' else g / (g.abs() + 1e-8))
        if name == 'adamw' and p.dim() == 2:
            expected = expected - 0.01 * 0.1 * w
        torch.testing.assert_close(p.data, expected)


def test_cosine_goes_from_the_peak_to_the_floor():
    assert rate(0) == 1.0
    assert rate(50) == pytest.approx(0.5)
    assert rate(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert 0 < rate(99) < 0.001
    assert rate(100) == rate(1000) == 0.0
    assert rate(50, min_lr=0.2) == pytest.approx(0.6)
    assert rate(100, min_lr=0.2) == 0.2
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
    ema = create_ema(model, decay=0.5)
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]
    for value in values:
        model.weight.data.fill_(value)
        ema.update_parameters(model)
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(1, len(values))]
    assert decays[0] < 0.2 and decays[-1] == 0.5
    shares = [math.prod(decays)]  # of the first value, which the average starts as
    shares += [(1 - d) * math.prod(decays[n + 1 :]) for n, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * value for share, value in zip(shares, values, strict=True))
    assert ema.module.weight.item() == pytest.approx(expected)


def test_ema_equals_torchs_own_once_its_decay_is_constant():
    torch.manual_seed(0)
    model = net()
    ours = create_ema(model, decay=0.05)  # below (1 + n) / (10 + n) from the start
    peer = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.05))
    for _ in range(5):
        for p in model.parameters():
            p.data += torch.randn_like(p)
        ours.update_parameters(model)
        peer.update_parameters(model)
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(ours.module[0].weight, model[0].weight)

"""The models, tested against PyTorch's own layers, formulas and each other. Reads like a tour of model.py.

python -m pytest test_model.py                all
python -m pytest test_model.py -x -k rotary   one idea, up to the first failure: naive, rotary, swiglu, dropout, ...
"""

import functools
import importlib.abc
import inspect
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model
from machine import choose_attention
from model import ATTENTION, FeedForward, apply_rotary, build_model, rotary_table, swiglu

V, T, C, H = 19, 16, 32, 4
KERNELS = ['naive', 'chunked', 'sdpa']
BUILDS = ['rotary', 'learned', 'gated', 'torch']  # the flash model in three ways, and PyTorch's


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(model, 'CHUNK', 5)  # of the T queries


def configure(**changes):
    sizes = dict(model='flash', seed=0, block_size=T, n_layer=2, n_head=H, n_embd=C, d_ff=48, dropout=0.0)
    words = dict(activation='gelu', position='rotary', attention='sdpa')
    switches = dict(embedding_norm=False, head_gate=False, value_residual=False, exclude_self=False,
                    induction_heads=0)  # fmt: skip
    return SimpleNamespace(**(sizes | words | switches | changes))


def build(kind, **changes):
    gated = dict(embedding_norm=True, head_gate=True, value_residual=True, exclude_self=True, induction_heads=1)
    switches = {'torch': dict(model='torch'), 'gated': gated}.get(kind, dict(position=kind))
    net = build_model(configure(**switches | changes), V).double()
    for name, p in net.named_parameters():
        if name.endswith(('attn.gate.weight', 'attn.value_mix')):  # gates of 0 have no effect
            nn.init.normal_(p)
    return net


def tokens(length=T, batch=3):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def exercise(test):
    """Marks a test that judges a function which the course asks you to write again. Whatever is wrong, be it that the
    function is empty, the failure begins with the test's docstring: what is expected. Then comes what was found."""

    @functools.wraps(test)
    def judge(**arguments):
        __tracebackhide__ = True
        try:
            test(**arguments)
        except (Exception, pytest.fail.Exception) as error:
            found = error if isinstance(error, AssertionError) else f'Found: {error!r}'
            message = f'{inspect.cleandoc(test.__doc__)}\n{found}'
            raise AssertionError(message).with_traceback(error.__traceback__) from None

    return judge


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('past', [0, 5])
@pytest.mark.parametrize('kernel', KERNELS)
@exercise
def test_attention_reaches_the_token_itself_and_all_before_it(kernel, past):
    """The T queries are those of the last T of S tokens. Each should attend to the keys of its own token and of all
    before it, and to no later one. A query of 0 should give these n keys the weight 1/n each. (Value s is row s of the
    identity, so the output is the weights.)"""
    S = past + T
    q, k, v = torch.zeros(1, T, 1, S), torch.randn(1, S, 1, S), torch.eye(S).view(1, S, 1, S)
    for t, weights in enumerate(ATTENTION[kernel](q, k, v)[0, :, 0]):  # (S,) for each query
        seen = past + t + 1
        found, expected = (weights > 0).nonzero().flatten().tolist(), list(range(seen))
        assert found == expected, f'query {t} after {past} earlier tokens attends to keys {found}, expected {expected}'
        torch.testing.assert_close(weights[:seen], torch.full((seen,), 1 / seen))


@pytest.mark.parametrize(('length', 'past'), [(T, 0), (1, 5), (7, 5)])
@pytest.mark.parametrize('kernel', KERNELS)
@exercise
def test_attention_is_the_formula(kernel, length, past):
    """Attention should be softmax(q k' / sqrt(D)) v over the keys that a query sees. (Here it is computed for one query
    at a time, in float64, forward and backward.)"""
    g = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, n, H, 8, generator=g, dtype=torch.float64, requires_grad=True)
        for n in (length, past + length, past + length)
    )
    expected = torch.zeros_like(q)
    for b in range(2):
        for h in range(H):
            for t in range(length):
                seen = past + t + 1
                weights = torch.softmax(k[b, :seen, h] @ q[b, t, h] / math.sqrt(8), dim=0)
                expected[b, t, h] = weights @ v[b, :seen, h]
    y = ATTENTION[kernel](q, k, v)
    torch.testing.assert_close(y, expected)
    direction = torch.randn_like(y)
    gradients = torch.autograd.grad((y * direction).sum(), (q, k, v))
    references = torch.autograd.grad((expected * direction).sum(), (q, k, v))
    torch.testing.assert_close(gradients, references)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('kernel', ['sdpa', 'flash'])
@pytest.mark.parametrize('width', [40, 64, 128])
def test_attention_on_the_gpu_against_float64(kernel, width):
    if kernel == 'flash':
        pytest.importorskip('flash_attn')
    x = torch.randn(3, 2, 256, 4, width, device='cuda', dtype=torch.bfloat16)
    fast, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    y, reference = ATTENTION[kernel](*fast), ATTENTION['naive'](*exact)
    direction = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * direction).sum(), fast)
    (expected,) = torch.autograd.grad((reference * direction).sum(), exact)
    torch.testing.assert_close(y.double(), reference, atol=0.02, rtol=0.02)
    torch.testing.assert_close(gradient.double(), expected, atol=0.1, rtol=0.05)


def test_flash_attn_is_called_causal_and_without_dropout_in_evaluation(monkeypatch):
    """By a stand-in for flash-attn, which needs a GPU: the same layout and arguments, and it notes how it is called."""
    calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, causal=False):
        calls.append((dropout_p, causal))
        return model.naive_attention(q, k, v, dropout_p)

    monkeypatch.setitem(sys.modules, 'flash_attn', SimpleNamespace(flash_attn_func=flash_attn_func))
    net = build('rotary', attention='flash', dropout=0.5)
    torch.testing.assert_close(net.eval()(tokens()), build('rotary').eval()(tokens()))
    assert calls == [(0.0, True)] * 2
    net.train()(tokens())
    assert calls[2:] == [(0.5, True)] * 2


def test_choice_of_attention(monkeypatch):
    """flash-attn on GPUs of capability 8 alone; a broken one is as good as none."""
    cpu, cuda, half = torch.device('cpu'), torch.device('cuda'), torch.bfloat16

    def choose(capability, attention='auto', dtype=half):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
        return choose_attention(attention, cuda, dtype)

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == 'flash_attn':
                looked_for.append(name)
                raise OSError('undefined symbol: _ZN3c10\nand more')

    finder, looked_for = Broken(), []
    monkeypatch.setattr(sys, 'meta_path', [finder, *sys.meta_path])
    assert choose_attention('auto', cpu, half)[0] == 'chunked' and not looked_for
    assert choose((8, 0)) == ('sdpa', 'no flash-attn: undefined symbol: _ZN3c10')
    with pytest.raises(SystemExit, match='--attention=flash cannot run here: no flash-attn: undefined symbol'):
        choose((8, 6), 'flash')
    assert 'capability' in choose((7, 5))[1] and 'bfloat16' in choose((8, 0), dtype=torch.float32)[1]
    monkeypatch.setitem(sys.modules, 'flash_attn', SimpleNamespace(flash_attn_func=None))
    assert choose((8, 0))[0] == choose((8, 9))[0] == choose((9, 0), 'flash')[0] == 'flash'
    assert choose((9, 0))[0] == choose((10, 0))[0] == 'sdpa'
    assert choose_attention('auto', cpu, torch.float32)[0] == 'sdpa'
    assert choose_attention('auto', cpu, torch.float32, 0.2)[0] == 'chunked'
    assert choose_attention('naive', cpu, half) == ('naive', 'as asked')


# ---- positions and feed-forward ------------------------------------------------------------------------------------


@exercise
def test_rotary_turns_pairs_by_the_position_times_a_frequency():
    """Position t should turn the pair x[i], x[i + D/2] by the angle t / 10000^(2i/D), counterclockwise: multiply the
    complex number x[i] + j x[i + D/2] by exp(j angle), where j^2 = -1."""
    f = torch.tensor([10000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    pairs = torch.cat((torch.ones(4), torch.zeros(4))).expand(1, T, 2, H, 8)  # each (x[i], x[i + D/2]) is (1, 0)
    y = apply_rotary(pairs, *rotary_table(T, 8))[0, :, 0, 0]
    angles = torch.atan2(y[:, 4:], y[:, :4])  # (T, D/2)
    for t in range(4):
        for i in range(4):
            message = f'position {t} turns the pair x[{i}], x[{i} + D/2] by {angles[t, i]:.4f}, expected {t * f[i]:.4f}'
            assert angles[t, i].item() == pytest.approx(t * f[i].item(), abs=1e-6), message
    x = torch.randn(2, T, 2, H, 8, dtype=torch.float64)  # B, T, (q, k), H, D
    turn = torch.polar(torch.ones(T, 4, dtype=torch.float64), torch.arange(T)[:, None] * f)
    z = torch.complex(x[..., :4], x[..., 4:]) * turn[:, None, None]
    expected = torch.cat((z.real, z.imag), dim=-1)
    torch.testing.assert_close(apply_rotary(x, *rotary_table(T, 8)), expected, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = rotary_table(T, 8)
    at = lambda x, t: apply_rotary(x.view(1, 1, 1, 1, 8), cos[t : t + 1], sin[t : t + 1]).flatten()  # noqa: E731
    near, far = at(q, 5) @ at(k, 3), at(q, 12) @ at(k, 10)
    torch.testing.assert_close(near, far, atol=1e-6, rtol=1e-6)
    assert not torch.isclose(near, at(q, 12) @ at(k, 3), atol=1e-3)


@exercise
def test_rotary_angles_stay_exact_in_bfloat16():
    """The result should have the type of x, and be rounded to it at the end."""
    cos, sin = rotary_table(1024, 40)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 1024, 1, H, 40).bfloat16()
    y = apply_rotary(x, cos, sin)
    found, expected = y.dtype, x.dtype
    assert found == expected, f'the result is {found}, expected {expected}'
    torch.testing.assert_close(y.double(), apply_rotary(x.double(), cos, sin).double(), atol=0.02, rtol=0.01)


@exercise
def test_swiglu_is_its_formula():
    """The result should be SiLU(gate) * value, where SiLU(z) = z sigmoid(z), the first half of the channels is the gate
    and the second half the value. (A gate is shut at -30 and open at 30.)"""
    gate, value = torch.tensor([-30.0, 1.0, 30.0]), torch.tensor([2.0, 3.0, 4.0])
    x = torch.cat((gate, value)).view(1, 1, 6)
    found, expected = swiglu(x).flatten().tolist(), [0, 3 / (1 + math.exp(-1)), 120]
    message = f'gates {gate.tolist()} and values {value.tolist()} give {found}, expected {expected}'
    assert found == pytest.approx(expected, abs=1e-6), message
    mlp, x = FeedForward(configure(activation='swiglu')).double(), torch.randn(2, 5, C, dtype=torch.float64)
    gate, value = (x @ mlp.fc.weight[half].T + mlp.fc.bias[half] for half in (slice(48), slice(48, 96)))
    expected = (gate / (1 + torch.exp(-gate)) * value) @ mlp.proj.weight.T + mlp.proj.bias
    torch.testing.assert_close(mlp(x), expected)


# ---- the models ----------------------------------------------------------------------------------------------------


def test_flash_model_equals_torch_layers():
    """With learned positions and GELU, a block is nn.TransformerEncoderLayer with norm_first: give it our weights."""
    net = build('learned')
    nn.init.normal_(net.norm.weight)
    layer = nn.TransformerEncoderLayer(C, H, 48, 0.0, 'gelu', batch_first=True, norm_first=True)
    peer = nn.TransformerEncoder(layer, 2, nn.LayerNorm(C), enable_nested_tensor=False).double()
    for ours, theirs in zip(net.blocks, peer.layers, strict=True):
        for source, target in [
            (ours.attn_norm, theirs.norm1),
            (ours.attn.proj, theirs.self_attn.out_proj),
            (ours.mlp_norm, theirs.norm2),
            (ours.mlp.fc, theirs.linear1),
            (ours.mlp.proj, theirs.linear2),
        ]:
            nn.init.normal_(source.bias)
            target.load_state_dict(source.state_dict())
        theirs.self_attn.in_proj_weight.data = ours.attn.qkv.weight.data
        theirs.self_attn.in_proj_bias.data = nn.init.normal_(ours.attn.qkv.bias).data
    peer.norm.load_state_dict(net.norm.state_dict())
    x, y = tokens(), tokens().roll(-1, dims=1)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    stream = peer(F.embedding(x, net.embedding.weight) + net.positions, mask=mask, is_causal=True)
    logits = stream @ net.embedding.weight.T
    torch.testing.assert_close(net(x), logits[..., :V])
    torch.testing.assert_close(net(x, y), F.cross_entropy(logits.flatten(0, 1), y.flatten()))


def test_gates_norm_and_value_residual_against_the_plain_model():
    """The plain model gives the same once hooks scale its embedding's rows and its heads' outputs, and mix its values
    with the first block's."""
    net, plain = build('gated', exclude_self=False, induction_heads=0), build('rotary')
    plain.load_state_dict(net.state_dict(), strict=False)
    plain.embedding.register_forward_hook(lambda m, i, out: out / out.square().mean(-1, keepdim=True).sqrt())
    for ours, theirs in zip(net.blocks, plain.blocks, strict=True):
        seen = []
        theirs.attn.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))

        def scale(m, args, gate=ours.attn.gate, seen=seen):
            share = 2 / (1 + torch.exp(-(seen[-1] @ gate.weight.T + gate.bias)))
            return (args[0] * share.repeat_interleave(C // H, dim=-1),)

        theirs.attn.proj.register_forward_pre_hook(scale)
    values = []  # of every block, as it computes them

    def mix(m, args, out):
        qk, v = out.split((2 * C, C), dim=-1)
        values.append(v)
        a, b = net.blocks[len(values) - 1].attn.value_mix if len(values) > 1 else (1, 0)
        return torch.cat((qk, a * v + b * values[0]), dim=-1)

    for block in plain.blocks:
        block.attn.qkv.register_forward_hook(mix)
    torch.testing.assert_close(net(tokens()), plain(tokens()))


def test_a_token_that_excludes_itself_attends_to_earlier_ones_and_to_an_empty_one():
    seen = []
    attn = build('rotary', exclude_self=True).blocks[0].attn
    kernel = attn.attention_fn
    attn.attention_fn = lambda q, k, v, dropout: seen.append((q, k, v)) or kernel(q, k, v, dropout)
    whole = build('rotary').blocks[0].attn  # the same weights
    whole.attention_fn = lambda q, k, v, dropout: seen.append((q, k, v)) or kernel(q, k, v, dropout)
    x = torch.randn(2, T, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shared = model.Shared(model.rotary_table(T, C // H).double(), None)
    attn.proj = whole.proj = nn.Identity()
    y, _ = attn(x, shared), whole(x, shared)
    q, k, v = (each.transpose(1, 2) for each in seen[1])  # (B, H, T, D)
    score = torch.exp(q @ k.mT / math.sqrt(C // H)).tril(-1)
    expected = score @ v / (1 + score.sum(-1, keepdim=True))  # exp(0) = 1 is the empty key's, whose value is 0
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2))


def test_induction_heads_find_a_value_by_the_key_before():
    seen = []
    whole, moved = (build('rotary', induction_heads=n).blocks[0].attn for n in (0, 3))  # the same weights
    for attn in (whole, moved):
        attn.attention_fn = lambda q, k, v, dropout: seen.append((q, k, v)) or q
        attn(torch.randn(2, T, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
             model.Shared(model.rotary_table(T, C // H).double(), None))  # fmt: skip
    (q, k, v), ours = seen
    expected = k.clone()
    for t in range(T):
        expected[:, t, :3] = k[:, t - 1, :3] if t else 0
    for found, wanted in zip(ours, (q, expected, v), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gates_are_open_at_first():
    net, plain = build_model(configure(head_gate=True), V), build('rotary').float()
    plain.load_state_dict(net.state_dict(), strict=False)
    torch.testing.assert_close(net(tokens()), plain(tokens()))


@pytest.mark.parametrize('kind', BUILDS)
def test_norms_read_float32_under_autocast(kind):
    """In bfloat16 a CPU adds up the gradients of their weights in bfloat16, where a sum of 256 does not grow by 1."""
    net, seen = build(kind).float(), []
    for layer in net.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with torch.autocast('cpu', torch.bfloat16):
        net(tokens())
    assert seen == [torch.float32] * (4 if kind == 'torch' else 5)


def test_the_model_compiles_once_as_one_graph():
    net, graphs = build('gated', dropout=0.1), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=False)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = compiled(tokens(), tokens())
        torch.manual_seed(seed)
        torch.testing.assert_close(loss, net(tokens(), tokens()))
    assert len(graphs) == 1


@pytest.mark.parametrize('kind', BUILDS)
@pytest.mark.parametrize('mode', ['train', 'eval'])
def test_no_position_sees_its_future(kind, mode):
    net, x = getattr(build(kind), mode)(), tokens()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % V
    with torch.no_grad():
        before, after = net(x), net(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(dim=-1).any()


@pytest.mark.parametrize('kind', BUILDS)
@pytest.mark.parametrize('kernel', KERNELS)
@exercise
def test_dropout_is_on_in_training_and_off_in_evaluation(kind, kernel):
    """Dropout of the attention weights should change the result in training, and not in evaluation: the notebook
    suspects that it stays on in validation. (Here it alone is on, then all is off.)"""
    net, x = build(kind, dropout=0.5, attention=kernel), tokens()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net.train()
    assert not torch.allclose(net(x), net(x)), 'in training, two passes give the same'
    net.eval()
    assert torch.equal(net(x), net(x)), 'in evaluation, two passes differ'
    torch.testing.assert_close(net(x), build(kind).eval()(x))


@pytest.mark.parametrize('kind', BUILDS)
def test_every_dropout_module_is_on_in_training(kind):
    net, x = build(kind, dropout=0.5).train(), tokens()
    ratios = []
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, i, out: ratios.append((out == 0).double().mean().item()))
    net(x)
    assert len(ratios) >= 5 and all(0.3 < ratio < 0.9 for ratio in ratios)  # ReLU adds zeros of its own


def test_torch_model_scales_embeddings_and_adds_sinusoids():
    net = build('torch')
    seen = []
    net.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(tokens())
    t, i = torch.arange(T, dtype=torch.float64)[:, None], torch.arange(0, C, 2, dtype=torch.float64)
    angle = t / 10000 ** (i / C)
    expected = net.embedding.weight[tokens()] * math.sqrt(C)
    expected[..., 0::2] += angle.sin()
    expected[..., 1::2] += angle.cos()
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-6)


def test_initial_weights_and_loss():
    """GPT-2's scales, and a first loss near that of a uniform guess."""
    net = build_model(configure(n_layer=8, n_embd=256, d_ff=512, block_size=64), 1025)
    assert net.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert net.blocks[0].mlp.proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 x 8) = 4
    x = torch.randint(1025, (4, 64))
    assert net(x, x.roll(-1, dims=1)).item() == pytest.approx(math.log(1032), rel=0.03)


def test_a_parameter_that_no_rule_initialises_is_named():
    net = build('rotary')
    net.blocks[1].attn.scale = nn.Parameter(torch.empty(H))
    with pytest.raises(ValueError, match='blocks.1.attn.scale is initialised by no rule'):
        net.initialise(2)


def test_targets_of_minus_one_do_not_count():
    net, x, y = build('rotary'), tokens(), tokens().roll(-1, dims=1)
    y[:, T // 2 :] = -1
    logits = net(x)[:, : T // 2]
    assert net.embedding.num_embeddings == 24  # 19, padded to the next multiple of 8
    stream = []
    net.norm.register_forward_hook(lambda m, i, out: stream.append(out))
    loss = net(x, y)
    padding = stream[0][:, : T // 2] @ net.embedding.weight[V:].T
    log_p = torch.cat((logits, padding), dim=-1).log_softmax(dim=-1)
    expected = -log_p.gather(-1, y[:, : T // 2, None]).mean()
    torch.testing.assert_close(loss, expected)


def test_one_batch_can_be_memorised():
    net = build_model(configure(activation='swiglu'), V)
    x, y = tokens(), tokens().roll(-1, dims=1)
    y[:, -1] = -1
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = net(x, y)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', BUILDS)
def test_generation_equals_recomputing_the_whole_prefix(kind):
    """With the cache, logits and the greedy continuation are those of a full forward over everything so far."""
    net, idx, cache = build(kind).eval(), tokens(5), {}
    for name, p in net.named_parameters():
        if name.startswith(('blocks', 'encoder')) and p.dim() == 2:
            p.data *= 20  # or the likeliest token would be the last one again, whatever was before
    for token in net.generate(idx, T - 5, temperature=0):
        logits = net(idx)[:, -1]
        torch.testing.assert_close(net(idx, cache=cache)[:, -1], logits)
        assert torch.equal(token, logits.argmax(dim=-1, keepdim=True))
        idx = torch.cat((idx, token), dim=1)


@pytest.mark.parametrize('kind', BUILDS)
def test_generation_continues_past_the_block(kind):
    net, read = build(kind).eval(), []
    net.embedding.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    out = torch.cat(list(net.generate(tokens(T + 3), 3 * T, temperature=0)), dim=1)
    assert out.shape == (3, 3 * T)
    first = net(tokens(T + 3)[:, -T:])[:, -1].argmax(dim=-1)  # the prompt is cut to its last block
    assert torch.equal(out[:, 0], first)
    again = T // 2 + 1  # of a text that is too long, the newer half is read again
    grown = list(range(again + 1, T + 1)) if kind == 'torch' else [1] * (T - again)  # there is no cache, or there is
    lengths = [T, *[again, *grown] * 3 * T]
    assert [x.size(1) for x in read[: 3 * T]] == lengths[: 3 * T]
    assert torch.equal(read[1], torch.cat((tokens(T + 3), out[:, :1]), dim=1)[:, -again:])


def test_padding_is_never_sampled():
    """The embedding has 24 rows for 19 tokens; make the padding's logits huge, and sample at random."""
    net = build('rotary').eval()
    net.embedding.weight.data[V:] = 100 * net.embedding.weight.data[:1].sign()
    out = torch.cat(list(net.generate(tokens(), 200, temperature=5.0)), dim=1)
    assert out.max().item() < V


def test_the_same_seed_gives_the_same_sample():
    net, idx = build('rotary').eval(), tokens(4, batch=1)
    draw = lambda seed, **o: torch.cat(list(net.generate(idx, 30, generator=torch.Generator().manual_seed(seed), **o)))  # noqa: E731
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1, top_k=1), draw(2, temperature=0))


@pytest.mark.parametrize('top_k', [None, 3])
def test_samples_follow_temperature_and_top_k(top_k):
    """The frequencies of 20,000 first tokens are softmax(logits / temperature), over the top_k likeliest."""
    net, idx = build('rotary').eval(), tokens(4, batch=1)
    net.embedding.weight.data *= 10
    logits = net(idx)[0, -1].sort(descending=True)
    (drawn,) = net.generate(idx.expand(20_000, -1), 1, 2.0, top_k, torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn.flatten(), minlength=V)[logits.indices] / 20_000
    expected = torch.zeros(V).index_copy(0, torch.arange(top_k or V), (logits.values[:top_k] / 2).softmax(0).float())
    torch.testing.assert_close(frequency, expected, atol=0.015, rtol=0)
    assert frequency[1] > 0.05


def test_the_smallest_and_the_largest_temperature():
    """The likeliest token, and each of three; float32 holds neither number."""
    net, idx = build('rotary').eval().float(), tokens(4, batch=1).repeat(50, 1)
    net.embedding.weight.data *= 10
    best = net(idx)[0, -1].topk(3).indices.tolist()
    draw = lambda temperature: set(next(net.generate(idx, 1, temperature, top_k=3)).flatten().tolist())  # noqa: E731
    assert draw(1e-300) == {best[0]} and draw(1e300) == set(best)


def test_impossible_shapes_are_refused():
    with pytest.raises(SystemExit, match='n_embd=32 is not divisible by n_head=5'):
        build('rotary', n_head=5)
    with pytest.raises(SystemExit, match='an odd number: change n_embd or n_head'):
        build('rotary', n_embd=36)  # heads of 9 channels: rotary positions turn pairs of them
    build('torch', n_embd=36)  # whose positions are as wide as the residual stream

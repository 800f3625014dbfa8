"""plot.py: curves against numpy, comparisons against Student's t, attention against PyTorch; and what it refuses."""

import contextlib
import io
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import plot
import results.pictures
import train
from configurator import configure
from machine import run_program
from results.curves import curves, load_run, published
from results.paired import settings_of, verdict
from results.runs import config_path
from sample import load_model


@pytest.fixture
def show(run, monkeypatch, capsys):
    """show('--compare', 'out/a', 'out/b') runs plot.py; returns what it printed."""

    def main(*words):
        monkeypatch.setattr(sys, 'argv', ['plot.py', *words])
        run_program(plot.main)
        return capsys.readouterr().out

    return main


def refusal(show, *words):
    with pytest.raises(SystemExit) as refused:
        show(*words)
    assert '\n' not in refused.value.code
    return refused.value.code


def png_size(path):
    data = Path(path).read_bytes()
    assert data.startswith(b'\x89PNG') and len(data) > 10_000
    return struct.unpack('>II', data[16:24])


def evaluation(step, val_loss, ema_loss=None):
    return {'step': step, 'val_loss': val_loss, 'ema_loss': ema_loss}


# ---- curves --------------------------------------------------------------------------------------------------------


def test_a_training_loss_is_the_mean_of_a_25th_of_the_curve():
    losses = np.random.default_rng(0).normal(size=120)
    run = {'curve': [*zip(range(20, 2401, 20), losses.tolist(), strict=True)], 'evaluations': [evaluation(500, 3.0)]}
    training, validation = curves(run, 768)
    assert [*training] == [step * 768 for step in range(60, 2361, 20)] and validation == {500 * 768: 3.0}
    np.testing.assert_allclose([*training.values()], np.convolve(losses, np.ones(5) / 5, 'valid'))
    short = {'curve': [(100, 5.0), (200, 4.0)], 'evaluations': [evaluation(200, 3.5, 3.25)]}
    assert curves(short) == ({100: 5.0, 200: 4.0}, {200: 3.25})  # as they are; and the averaged weights count


def test_published_runs_are_those_with_the_same_settings(tmp_path):
    def found(name, *flags):
        knobs, _ = configure([train.__file__], [config_path(name), config_path('cpu'), *flags])
        return published(settings_of(vars(knobs)))

    scale, elsewhere = '--learning_rate_scale=3', ['--seed=7', '--dtype=bfloat16', '--out_dir=x', '--attention=naive']
    assert [*found('swiglu', scale, *elsewhere)] == ['swiglu'] and not found('swiglu') and not found('swiglu_18', scale)
    assert not any(found('best', flag) for flag in ('--n_layer=3', '--dataset=tiny', '--block_size=64'))
    [(name, runs)] = found('best', *elsewhere).items()
    assert name == 'best' and all(len(curves(run)[0]) == 20 for run in runs)
    [(name, runs)] = found('three_steps', *elsewhere).items()
    assert name == 'three_steps' and not any('curve' in run for run in runs)  # their training curves are lost
    results.pictures.draw_curves({}, {name: [curves(run, 768) for run in runs]}, tmp_path / 'plot.png')
    assert png_size(tmp_path / 'plot.png') == (1170, 650)


def test_seeds_form_a_band_and_a_folder_counts_once(run, show):
    for folder, *knobs in (['1'], ['2', '--seed=2'], ['wide', '--d_ff=32']):
        run(f'--out_dir=out/band_{folder}', '--eval_interval=5', *knobs)
    folders, drawn = ('out/band_1', 'out/band_2/', 'out/band_1', './out/band_wide'), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('results.pictures.draw_curves', lambda *arguments: drawn.append(arguments))
        assert show(*folders) == 'out/band_1/plot.png\n'
    [(series, behind, _)] = drawn
    assert {label: len(seeds) for label, seeds in series.items()} == {'out/band_1': 2, 'out/band_wide': 1}
    assert not behind and [[*curve] for curve in series['out/band_1'][1]] == [[5 * 64, 10 * 64]] * 2
    show(*folders)
    assert png_size('out/band_1/plot.png') == (1170, 650) and not Path('out/band_wide/plot.png').exists()


@pytest.mark.parametrize('same', [True, False])
def test_ours_behind_another_text_are_said_to_be_so(run, show, monkeypatch, capsys, same):
    run('--out_dir=out/text', '--overwrite')
    ours = load_run('out/text') | {'python': '3.11.7'} | ({} if same else {'corpus': 'of 3.11.7'})
    monkeypatch.setattr(plot, 'published', lambda settings: {'best': [ours]})
    monkeypatch.setattr(sys, 'argv', ['plot.py', 'out/text'])
    capsys.readouterr()
    plot.main()
    words = 'ours, in grey, read the library of Python 3.11.7, but out/text a different text: compare the shapes'
    assert capsys.readouterr().err.startswith(words) != same


@pytest.mark.parametrize('log_interval', [5, 1000])  # with the second there are evaluations only
def test_a_damaged_last_line_is_left_out_and_without_matplotlib_there_is_a_table(
    run, show, monkeypatch, capsys, log_interval
):
    folder = f'out/killed_{log_interval}'
    knobs = [f'--out_dir={folder}', f'--log_interval={log_interval}', '--eval_interval=5']
    run(*knobs, stop_at=7)
    run(*knobs, '--init_from=resume')
    with open(f'{folder}/metrics.jsonl', 'a') as file:
        file.write('{"step": 15, "lo')
    show(folder)
    assert png_size(f'{folder}/plot.png') == (1170, 650)
    monkeypatch.delattr(results, 'pictures')
    monkeypatch.delitem(sys.modules, 'results.pictures')
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(SystemExit, match='0'):
        show(folder)
    out, err = capsys.readouterr()
    assert err.startswith('pictures need matplotlib: pip install matplotlib (') and err.count('\n') == 1
    lines = [json.loads(line) for line in Path(f'{folder}/metrics.jsonl').read_text().splitlines()[:-1]]
    for step, row in zip((5, 10), out.splitlines()[-2:], strict=True):
        losses = [
            line[name] for name in ('loss', 'val_loss') for line in lines if line['step'] == step and name in line
        ]
        assert row.split() == [str(step), *(f'{loss:.3f}' for loss in losses)]
    with pytest.raises(SystemExit, match='1'):
        show('--attention', folder)


def test_runs_without_losses_are_refused(run, show):
    run('--out_dir=out/early', stop_at=3)
    words = 'out/early holds no losses: it was stopped before its first log line; --init_from=resume trains on.'
    assert refusal(show, 'out/early') == refusal(show, '--compare', 'out/early') == words
    assert 'out/nowhere/ckpt.pt cannot be read: No such file' in refusal(show, 'out/nowhere')
    assert '--compare and --attention' in refusal(show, '--compare', '--attention')


# ---- a comparison --------------------------------------------------------------------------------------------------


def seeds(losses):
    return [{'seed': seed, 'evaluations': [evaluation(9, loss)]} for seed, loss in losses.items()]


@pytest.mark.parametrize(('differences', 'words'), [
    # Student's t with 2 degrees of freedom, 4.3027, times 0.01 / sqrt(3) is 0.0248
    ([-0.04, -0.05, -0.06], 'b is lower than a by 0.050 [0.025, 0.075]: decided'),
    ([0.04, 0.05, 0.06], 'b is higher than a by 0.050 [0.025, 0.075]: decided'),
    # with 2 degrees, times 0.03 / sqrt(3), it is 0.0745; with 3, 3.1824 times 0.03 / sqrt(4) is 0.0477, below 0.05
    ([-0.02, -0.05, -0.08], 'not decided: b is lower than a by 0.050 [-0.025, 0.125], about one more seed'),
    # with 4 degrees, 2.7764 times 0.03 / sqrt(5) is 0.0372; with 5, 2.5706 times 0.03 / sqrt(6) is 0.0315, below 0.035
    ([-0.005, -0.035, -0.065], 'not decided: b is lower than a by 0.035 [-0.040, 0.110], about 3 more seeds'),
    ([-0.01, 0.0, 0.01], 'not decided: b is higher than a by 0.000 [-0.025, 0.025], more than 100 more seeds'),
    ([-0.05], 'not decided: b is lower than a by 0.050; train seeds 2 and 3 of both'),
    ([-0.05, -0.05], 'not decided: b is lower than a by 0.050; train seed 3 of both'),
])  # fmt: skip
def test_the_verdict(differences, words):
    losses = {seed: 3.0 + difference for seed, difference in enumerate(differences, 1)}
    assert verdict({'a': seeds(dict.fromkeys(losses, 3.0)), 'b': seeds(losses)}, 'a', 'b') == words


def test_half_a_pair_is_completed_first():
    words = 'not decided: no seed is in both; train seeds 9 of a, 4 and 5 of b'
    assert verdict({'a': seeds({4: 3.0, 5: 3.0}), 'b': seeds({9: 3.0})}, 'a', 'b') == words


def test_a_comparison_pairs_by_seed_and_refuses_what_cannot_be_compared(run, show):
    folders, losses = [], {}
    for seed, d_ff in ((1, 24), (2, 24), (3, 24), (3, 48), (1, 48), (2, 48)):
        folders.append(f'out/pair_{d_ff}_{seed}')
        run(f'--out_dir={folders[-1]}', f'--seed={seed}', f'--d_ff={d_ff}', f'--eval_interval={seed + 2}')
        losses[seed, d_ff] = json.loads(Path(folders[-1], 'metrics.jsonl').read_text().splitlines()[-1])['val_loss']
    lines = show('--compare', *folders).splitlines()
    assert lines[0] == 'a: out/pair_24_1 out/pair_24_2 out/pair_24_3, with d_ff=24'
    assert lines[1] == 'b: out/pair_48_3 out/pair_48_1 out/pair_48_2, with d_ff=48'
    for seed, line in enumerate(lines[4:7], 1):
        a, b = losses[seed, 24], losses[seed, 48]
        assert line.split() == [str(seed), f'{a:.3f}', f'{b:.3f}', f'{b - a:+.3f}']
    assert lines[-1].endswith('decided') or lines[-1].startswith('not decided: b is ')
    assert show('--compare', *folders[:4]).splitlines()[4] == f'   1 {losses[1, 24]:8.3f}        -        -'

    def refused(*others):
        return refusal(show, '--compare', folders[0], *others)

    assert 'found one: name runs of another' in refused(*folders[:3])
    run('--out_dir=out/pair_third', '--d_ff=32')
    assert refused(*folders, 'out/pair_third').endswith('found 3: they differ in d_ff.')
    shutil.copytree(folders[0], 'out/pair_copy', dirs_exist_ok=True)
    assert 'out/pair_24_1 and out/pair_copy are the same run, seed 1' in refused(folders[3], 'out/pair_copy')
    run('--out_dir=out/pair_path', '--dataset=data/tiny', '--seed=4')  # the same corpus, spelled as a path
    assert 'found one: name runs of another' in refused('out/pair_path')
    run('--out_dir=out/pair_part', '--d_ff=32', '--eval_iters=2')
    assert 'on the same validation tokens, found out/pair_24_1: all, out/pair_part: 128' in refused('out/pair_part')
    run('--out_dir=out/pair_short', '--d_ff=32', '--max_iters=5')
    assert 'out/pair_24_1: 640, out/pair_short: 320;' in refused('out/pair_short')
    run('--out_dir=out/pair_stopped', '--d_ff=32', stop_at=5)  # before its first evaluation
    assert 'out/pair_24_1: 640, out/pair_stopped: 0;' in refused('out/pair_stopped')
    saved = torch.load('out/pair_third/ckpt.pt', weights_only=True)
    torch.save(saved | {'corpus': 'another'}, 'out/pair_third/ckpt.pt')
    words = 'expected runs with the same corpus, found several (out/pair_24_1: tiny, out/pair_third: tiny).'
    assert refused('out/pair_third') == words
    with contextlib.redirect_stderr(io.StringIO()) as err:
        show(folders[0], 'out/pair_third')
    assert err.getvalue() == 'these runs read different corpora: their losses cannot be compared\n'


# ---- attention -----------------------------------------------------------------------------------------------------


def test_the_attention_weights_are_those_of_pytorch(run):
    """nn.MultiheadAttention with our weights and inputs returns its own attention weights."""
    run('--out_dir=out/weights', '--position=learned', '--max_iters=30', '--log_interval=1000')
    net, _, knobs = load_model('out/weights', 'cpu', 'float32')
    ids, inputs, attn = list(range(9)), [], net.blocks[1].attn
    attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    weights = plot.attention_weights(net, ids, layer=2)  # (H, T, T)
    theirs = torch.nn.MultiheadAttention(knobs.n_embd, knobs.n_head, batch_first=True)
    theirs.load_state_dict({
        'in_proj_weight': attn.qkv.weight, 'in_proj_bias': attn.qkv.bias,
        'out_proj.weight': attn.proj.weight, 'out_proj.bias': attn.proj.bias,
    })  # fmt: skip
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    _, expected = theirs(*[inputs[0]] * 3, attn_mask=future, average_attn_weights=False)
    torch.testing.assert_close(weights, expected[0].detach())
    torch.testing.assert_close(weights.sum(-1), torch.ones(knobs.n_head, len(ids)))
    assert not weights[:, future].any() and weights.std() > 0.05


def test_the_attention_picture(run, show):
    run('--out_dir=out/heads', '--n_head=4', '--ema_decay=0.5', '--head_gate', '--value_residual')
    assert show('--attention', 'out/heads', '--start=$a $b\t\n', '--layer=2') == 'out/heads/attention.png\n'
    width, height = png_size('out/heads/attention.png')
    assert width == 1170 and height > 700  # two rows, of three heads and one
    assert refusal(show, '--attention', 'out/heads', '--layer=3') == 'layer is 3, expected 1 <= layer <= 2.'
    words = refusal(show, '--attention', 'out/heads', f'--start={"return " * 40}')
    assert words.startswith('start has ') and words.endswith(' tokens, expected fewer than 16: shorten --start.')
    run('--out_dir=out/heads_torch', '--model=torch')
    assert "has model='torch'" in refusal(show, '--attention', 'out/heads_torch')

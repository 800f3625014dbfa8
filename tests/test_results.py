"""results/: runs are trained once and their numbers kept, stopped ones resume, and the pages say what the JSON files
hold. Models have two tiny layers. A process is started only where that is the point: importing torch takes seconds."""

import importlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

import checkpoint
import machine
import train
from bench import OVERLAYS
from results import baselines, bench, ladder, nanogpt, paired, pictures, report, runs

FLAGS = [*SMALL, '--dataset=tiny', '--max_iters=12', '--eval_interval', '4']


@pytest.fixture
def climb(workplace, tmp_path, monkeypatch, capfd):
    """climb('swiglu', '--knob=value') runs results.ladder; returns its exit status, results and output."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(runs, 'RESULTS', tmp_path)
    monkeypatch.setattr(ladder, 'RESULTS', tmp_path)

    def main(*arguments):
        words = [a if a.startswith('-') or a.endswith('.py') else runs.config_path(a) for a in arguments]
        monkeypatch.setattr(sys, 'argv', ['ladder.py', '--publish', *FLAGS, *words])
        status = 0
        try:
            ladder.main()
        except SystemExit as ended:
            status = ended.code
        return status, runs.read(tmp_path / 'ladder_tiny_cpu.json'), ''.join(capfd.readouterr())

    return main


@pytest.fixture
def here(monkeypatch):
    """Runs are trained by train.main in this process, which is fast, and end with a short sample."""
    write_text = train.write_text
    monkeypatch.setattr(
        train, 'write_text', lambda net, encoding, text, n, config, **o: write_text(net, encoding, text, 3, config, **o)
    )

    def run_train(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', ['train.py', *words])
            try:
                train.main()
            except SystemExit as ended:
                print(ended.code)
                return 1
        return 0

    monkeypatch.setattr(ladder, 'run_train', run_train)


def names_and_seeds(results):
    return [(run['config'], run['seed']) for run in results['runs']]


def knobs_of(run):
    return checkpoint.load(f'out/ladder_tiny_cpu/{run}')['knobs']


def evaluations_of(run):
    path = Path(f'out/ladder_tiny_cpu/{run}/metrics.jsonl')
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}') and 'val_loss' in line]


def test_runs_are_trained_once_and_their_numbers_kept(climb, here, tmp_path):
    status, results, printed = climb('swiglu', 'ema', '--seeds=1,2')
    assert status == 0 and names_and_seeds(results) == [('swiglu', 1), ('ema', 1), ('swiglu', 2), ('ema', 2)]
    for run in results['runs']:
        assert run['evaluations'] == evaluations_of(f'{run["config"]}_{run["seed"]}')
        assert [e['step'] for e in run['evaluations']] == [4, 8, 12] and run['ms_per_batch'] > 0
        assert [step for step, _ in run['curve']] == [5, 10] and all(2 < loss < 8 for _, loss in run['curve'])
        assert run['sample'].startswith(ladder.prompt) and len(run['sample'].splitlines()) == 1
        assert run['device'] == f'cpu, {torch.get_num_threads()} threads'
        assert all(run[key] for key in ('torch', 'python', 'date')) and 'commit' in run
    status, again, printed = climb('swiglu', 'ema', '--seeds=1,2')
    assert status == 0 and again == results and '4 runs done, 0 to go' in printed
    status, _, _ = climb('swiglu', '--n_layer=1')
    assert 'move it and out/ladder_tiny_cpu away' in status and '--n_layer=1' in status
    (tmp_path / 'ladder_tiny_cpu.json').unlink()
    _, again, printed = climb('swiglu', '--seeds=1')  # it was finished, and is not trained again
    assert 'resumed at step 12 of 12' in printed and names_and_seeds(again) == [('swiglu', 1)]
    (tmp_path / 'ladder_tiny_cpu.json').unlink()
    status, results, printed = climb('swiglu', '--learning_rate=0.5')  # the run of before is not taken for one of these
    assert 'failed: swiglu' in status and not results['runs']
    assert 'swiglu_1 holds a run with other settings: learning_rate was 0.01, now 0.5.' in printed


def test_your_runs_go_to_out_and_are_printed_beside_the_published(climb, here, tmp_path):
    """Although the same runs are published already, they are trained; the published ones are left as they are, and so
    is every other file of the repository."""
    files = [path for pattern in ('*.*', 'config/*.*', 'results/*.*') for path in runs.ROOT.glob(pattern)]
    before = {path: path.stat().st_mtime_ns for path in files if path.is_file()}
    published = {'knobs': FLAGS, 'dtype': 'float32'}
    published['runs'] = [run_of('swiglu', 1, [(1, 3.5)]), run_of('swiglu', 2, [(1, 4.5)])]
    runs.write(tmp_path / 'ladder_tiny_cpu.json', published)
    status, unchanged, printed = climb('swiglu', '--publish=False')
    own = runs.read(Path('out/ladder_tiny_cpu.json'))
    assert status == 0 and names_and_seeds(own) == [('swiglu', 1)] and unchanged == published
    loss = evaluations_of('swiglu_1')[-1]['val_loss']
    assert f'| `swiglu` | {loss:.3f} | 4.000 ± 0.707 |' in printed
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert f'| `swiglu` | {loss:.3f} | not measured |' in ladder.compare_with_published(own, {})
    published['knobs'] = [*FLAGS, '--n_layer=1', '--learning_rate_scale=3']  # then nothing comparable is published
    assert (f'| `swiglu` | {loss:.3f} | none with these knobs: n_layer was 1, now 2, learning_rate_scale was 3.0, '
            'now 1.0 |') in ladder.compare_with_published(own, published)  # fmt: skip
    published['runs'][0]['knobs'] = own['runs'][0]['knobs']  # newer runs record theirs
    assert '4.000 ± 0.707 |' in ladder.compare_with_published(own, published)
    published['corpus'] = {'train': 1, 'val': 1}
    assert '4.000 ± 0.707, on another text |' in ladder.compare_with_published(own, published)


def test_a_factor_that_is_not_for_a_run_makes_it_no_other():
    best = run_of('best', 1, [(1, 3.0)], knobs=ladder.settings_of(runs.config_path('best'), FLAGS)[1])
    published = {'knobs': [*FLAGS, '--learning_rate_scale=3'], 'dtype': 'float32'}
    published['runs'] = [run_of('best', 1, [(1, 3.1)])]
    assert '| `best` | 3.000 | 3.100 |' in ladder.compare_with_published({'runs': [best]}, published)


def test_ladders_at_the_same_time_lose_no_run_and_agree_on_the_dtype(climb, tmp_path, monkeypatch):
    """Two processes finish their runs in step, six each, as one that finds bfloat16 slow and one that finds it fast."""
    context, trained = multiprocessing.get_context('fork'), []
    barrier = context.Barrier(2)
    monkeypatch.setattr(ladder, 'train_one', lambda _, flags, *more: trained.append(flags[-1]) or 0 * barrier.wait(60))
    monkeypatch.setattr(ladder, 'numbers_of', lambda folder: {'evaluations': [], 'trained in': trained[-1]})
    monkeypatch.setattr(ladder, 'write_sample', lambda *_: '')
    monkeypatch.setattr(ladder, 'check_complete', lambda *_: None)
    ladders = []
    for name, speedup in (('swiglu', 0.9), ('ema', 1.1)):
        monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c, speedup=speedup: speedup)
        words = [*FLAGS, '--dtype=auto', '--seeds=1,2,3,4,5,6', runs.config_path(name)]
        monkeypatch.setattr(sys, 'argv', ['ladder.py', '--publish', *words])
        ladders.append(context.Process(target=ladder.main))
        ladders[-1].start()
    for process in ladders:
        process.join()
    results = runs.read(tmp_path / 'ladder_tiny_cpu.json')
    assert sorted(names_and_seeds(results)) == sorted((name, i) for name in ('swiglu', 'ema') for i in range(1, 7))
    assert {run['trained in'] for run in results['runs']} == {f'--dtype={results["dtype"]}'}


def test_a_run_without_its_last_evaluation_is_refused(climb, here, tmp_path):
    climb('swiglu', '--seeds=70')
    (tmp_path / 'ladder_tiny_cpu.json').unlink()
    metrics = Path('out/ladder_tiny_cpu/swiglu_70/metrics.jsonl')
    metrics.write_text(''.join(metrics.read_text().splitlines(keepends=True)[:-1]))
    _, results, printed = climb('swiglu', '--seeds=70')
    assert 'swiglu_70/metrics.jsonl lacks the last evaluation' in printed and names_and_seeds(results) == []


def test_a_run_that_another_program_trains_is_left_to_it(climb, here):
    with checkpoint.lock_folder(Path('out/ladder_tiny_cpu/swiglu_8'), is_new=True):
        status, results, printed = climb('swiglu', 'ema', '--seeds=8')
    assert 'failed: swiglu (seed 8' in status and names_and_seeds(results) == [('ema', 8)] and 'still alive' in printed


def test_a_run_is_known_by_its_settings(climb, here, tmp_path, monkeypatch):
    """And not by its config's name: otherwise the mean over seeds would be of two models."""
    mine = tmp_path / 'mine.py'
    mine.write_text('dropout = 0.1')
    climb(str(mine), '--seeds=11')
    (tmp_path / 'elsewhere').mkdir()
    for seed, path in ((11, mine), (12, mine), (12, tmp_path / 'elsewhere/mine.py')):
        path.write_text('dropout = 0.2\nwarmup_iters = 1')
        status, results, _ = climb(str(path), f'--seeds={seed}')
        assert names_and_seeds(results) == [('mine', 11)] and 'Rename the config, or move the file' in status
        assert 'cpu.json holds mine with other settings: dropout was 0.1, now 0.2, warmup_iters was 0, now 1.' in status
    mine.rename(tmp_path / 'mine2.py')
    status, results, _ = climb(str(tmp_path / 'mine2.py'), '--seeds=12')
    assert status == 0 and names_and_seeds(results) == [('mine', 11), ('mine2', 12)]
    for run in results['runs']:
        run.pop('knobs')  # as in what was published before they were recorded
    runs.write(tmp_path / 'ladder_tiny_cpu.json', results)
    status, results, _ = climb(str(path), '--seeds=13')
    assert status == 0 and results['runs'][-1]['knobs']['dropout'] == 0.2


def test_a_config_that_changes_while_the_ladder_runs(climb, here, tmp_path, monkeypatch):
    mine, run_train = tmp_path / 'mine.py', ladder.run_train
    mine.write_text('dropout = 0.1')
    monkeypatch.setattr(ladder, 'run_train', lambda *words: run_train(*words) + 0 * mine.write_text('dropout = 0.2'))
    status, results, printed = climb(str(mine), '--seeds=14,15')
    assert 'failed: mine (seed 15, ' in status and names_and_seeds(results) == [('mine', 14)]
    assert 'dropout was 0.1, now 0.2' in printed


def test_all_runs_are_in_one_dtype(climb, here, monkeypatch):
    """Whatever a busy computer finds fast when the next run starts."""
    for speedup, name in ((0.9, 'swiglu'), (1.1, 'ema')):
        monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c, speedup=speedup: speedup)
        status, results, _ = climb(name, '--dtype=auto', '--seeds=7')
        assert status == 0 and results['dtype'] == knobs_of(f'{name}_7')['dtype'] == 'float32'


def test_a_ladder_that_was_stopped_in_its_first_run_goes_on_in_its_dtype(climb, here, monkeypatch):
    monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c: 1.1)
    with monkeypatch.context() as patch:
        patch.setattr(ladder, 'train_one', lambda *args: 130)
        status, results, _ = climb('swiglu', '--dtype=auto', '--seeds=6')
    assert status == 130 and not results['runs']
    monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c: 0.9)
    status, _, _ = climb('swiglu', '--dtype=auto', '--seeds=6')
    assert status == 0 and knobs_of('swiglu_6')['dtype'] == 'bfloat16'


def test_what_cannot_be_written_is_found_before_the_first_run(climb, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(runs, 'RESULTS', tmp_path / 'file')
    monkeypatch.setattr(ladder, 'train_one', None)  # no run is started
    status, _, _ = climb('swiglu')
    assert status.endswith('ladder_tiny_cpu.json cannot be written: File exists.')


def test_a_run_that_fails_stops_no_other(climb, here, tmp_path):
    bad = tmp_path / 'bad.py'
    bad.write_text('min_lr = 1.0')
    status, results, printed = climb(str(bad), 'warmup')
    assert status.splitlines()[-1] == 'failed: bad (seed 1, exit status 1)' and 'min_lr is 1.0' in printed
    bad.write_text('min_lr = 0.0')
    _, results, printed = climb(str(bad), 'warmup')
    assert names_and_seeds(results) == [('warmup', 1), ('bad', 1)]


def test_overlays_follow_the_runs_and_only_adamws_runs_are_scaled(climb, here, tmp_path):
    overlay = tmp_path / 'cpu.py'
    overlay.write_text('warmup_iters = 7')
    for name, parent in (('mine', 'best'), ('my_adam', 'adam')):  # a reader's copies
        shutil.copy(runs.config_path(parent), tmp_path / f'{name}.py')
    copies = [str(tmp_path / 'mine.py'), str(tmp_path / 'my_adam.py')]
    _, _, printed = climb('sgd', str(overlay), 'adam', 'best', *copies, '--learning_rate_scale=3', '--seeds=3')
    scales = [knobs_of(f'{run}_3')['learning_rate_scale'] for run in ('sgd', 'adam', 'best', 'mine', 'my_adam')]
    assert scales == [1.0, 3.0, 1.0, 1.0, 3.0]
    assert 'without --learning_rate_scale, which is for AdamW: sgd, best, mine\n' in printed
    assert [knobs_of(run)['warmup_iters'] for run in ('sgd_3', 'adam_3')] == [7, 7]
    every_run = [runs.config_path(name) for name in runs.RUNS]
    assert ladder.runs_and_overlays(['config/cpu.py']) == (every_run, ['config/cpu.py'])
    assert ladder.runs_and_overlays([os.path.abspath('cpu.py')])[1] == ['cpu.py']  # a record names no one's home


@pytest.mark.parametrize('name, flags, epochs', [('swiglu_18', [], 1), ('swiglu', [], None),
                                                 ('swiglu_23', ['--max_iters=5'], None)])  # fmt: skip
def test_the_two_large_runs_stop_after_an_epoch_of_three(name, flags, epochs, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ladder, 'run_train', lambda *words: said.extend(words) or 0)
    ladder.train_one(runs.config_path(name), flags, 1, tmp_path)
    assert [word for word in said if 'epoch' in word] == [f'--stop_epoch={epochs}'] * bool(epochs)


def test_a_run_that_was_stopped_or_killed_resumes(climb, monkeypatch):
    """Each in a process of its own, and each told when it has evaluated later than the one before."""
    children, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, **k: children.append(popen(*a, **k)) or children[-1])

    def climb_until(deed, step):
        def wait():
            while not any(e['step'] > step for e in evaluations_of('deep_5')):
                time.sleep(0.02)
            child = children[-1]
            deed()
            time.sleep(60)
            child.kill()  # if it did not heed its signal

        threading.Thread(target=wait, daemon=True).start()
        return climb('deep', '--seeds=5', '--max_iters=1000000')

    def press_ctrl_c():  # a terminal tells all of its processes
        children[-1].send_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    status, results, printed = climb_until(press_ctrl_c, 0)
    assert status == 128 + signal.SIGINT and not results['runs'] and 'stopped, 1 to go' in printed
    first = checkpoint.load('out/ladder_tiny_cpu/deep_5')['step']
    status, _, printed = climb_until(lambda: os.kill(os.getpid(), signal.SIGUSR1), first)
    assert status == 128 + signal.SIGUSR1 and f'resumed at step {first}' in printed
    second = checkpoint.load('out/ladder_tiny_cpu/deep_5')['step']
    status, _, printed = climb_until(lambda: children[-1].kill(), second)
    assert 'deep (seed 5, exit status 137)' in status and f'resumed at step {second}' in printed
    steps = [e['step'] for e in evaluations_of('deep_5')]
    assert steps == sorted(set(steps)) and steps[-1] > second > first > 0


@pytest.mark.parametrize('flag, words', [
    ('--seeds=1,x', "seeds is '1,x'"), ('--seeds=²', "seeds is '²'"), ('--dtype=foo', "dtype is 'foo', expected"),
    ('--max_iters=0', 'max_iters=0 is not for results.ladder'), ('--seed=3', '--seed=3 is not for results.ladder'),
])  # fmt: skip
def test_bad_knobs_are_refused(climb, flag, words):
    status, _, _ = climb(flag)
    assert words in status


@pytest.mark.parametrize('text', [b'seeds = "1,2"', b'prompt = "a"', b'n_layer = 1\0', b'# \xff'])
def test_a_config_that_is_none_of_train_pys_is_refused(climb, tmp_path, text):
    (tmp_path / 'mine.py').write_bytes(text)
    status, _, _ = climb(str(tmp_path / 'mine.py'))
    assert status.startswith(f'{tmp_path}/mine.py:1: ') and '\n' not in status


@pytest.mark.parametrize('text', ['', '{"runs": [', '[1]'])
def test_damaged_results_are_refused(tmp_path, text):
    (tmp_path / 'ladder.json').write_text(text)
    with pytest.raises(SystemExit, match='ladder.json is damaged: .*Move it away'):
        runs.read(tmp_path / 'ladder.json')


# ---- tables --------------------------------------------------------------------------------------------------------


def run_of(config, seed, losses, ema=None, **others):
    """A run whose evaluations have these (epoch, validation loss)."""
    evaluations = [
        {'epoch': epoch, 'val_loss': loss, 'ema_loss': ema, 'train_loss': loss - 1, 'bits_per_byte': loss / 4}
        for epoch, loss in losses
    ]
    return {'config': config, 'seed': seed, 'ms_per_batch': 10.0 * seed, 'evaluations': evaluations, **others}


def grouped(*some):
    return paired.runs_by_config({'runs': some})


def test_runs_are_compared_seed_by_seed():
    """A seed that one of them lacks does not count, and the average's loss counts where there is one."""
    ends = {'weight_decay': {1: 4.0, 2: 5.0, 3: 6.0, 4: 9.0}, 'swiglu': {3: 5.7, 1: 3.9, 2: 4.8}}
    some = [run_of(name, seed, [(1, 9.0), (2, loss)]) for name, losses in ends.items() for seed, loss in losses.items()]
    by_config = grouped(*some, run_of('ema', 1, [(2, 1.0)], ema=4.1), run_of('ema', 2, [(2, 1.0)], ema=4.9))
    assert paired.paired(by_config, 'swiglu', 'weight_decay') == pytest.approx([-0.1, -0.2, -0.3])
    assert paired.paired(by_config, 'ema', 'weight_decay') == pytest.approx([0.1, -0.1])
    low, high = paired.interval([-0.1, -0.2, -0.3])
    assert (low, high) == pytest.approx((-0.2 - 4.303 * 0.1 / 3**0.5, -0.2 + 4.303 * 0.1 / 3**0.5))
    assert report.signed([-0.1, -0.2, -0.3]) == '-0.20 [-0.45, +0.05]' and report.signed([-0.1, 0.1]) == '+0.00'
    low, high = paired.interval([0.0, 1.0] * 10)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low > 2 * 2.093 * 0.513 / 20**0.5  # never too narrow


@pytest.mark.parametrize('freedom', [2, 5, 9])
def test_students_t_leaves_five_per_cent_outside(freedom):
    """By the sum of its density (1 + x²/n)^(-(n+1)/2) up to t, and to infinity, where x = tan(angle)."""
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)[:-1] + math.pi / 800_000
    x = angles.tan()
    mass = (1 + x**2 / freedom) ** (-(freedom + 1) / 2) / angles.cos() ** 2
    assert float(mass[x < paired.T95[freedom - 2]].sum() / mass.sum()) == pytest.approx(0.95, abs=1e-4)


def test_every_run_has_a_config_and_names_the_run_that_it_changes():
    assert all(Path(runs.ROOT, 'config', f'{name}.py').exists() for name in (*runs.RUNS, 'best_97m', *OVERLAYS))
    assert [*map(runs.parent_of, ('sgd', 'adam', 'wide', 'learned', 'muon', 'best', 'best_97m', 'cpu'))] == [
        None, 'sgd', 'weight_decay', 'learning_rate', 'learning_rate', 'exclude_self', 'swiglu_23', None]  # fmt: skip


def test_the_main_table_has_notebook_full_size_and_short_run():
    full = grouped(run_of('warmup', 1, [(0.5, 9.0), (1, 3.77), (2, 3.57), (2.5, 3.56)]))
    losses = {'swiglu': 3.1, 'warmup': 3.0}
    short = grouped(*(run_of(name, seed, [(0.35, losses[name] + seed / 100)]) for name in losses for seed in (1, 2, 3)))
    lines = report.runs_table(full, short, [*runs.RUNS][:15]).splitlines()
    assert len(lines) == 17
    assert lines[13] == ('| 12 | [`warmup`](config/warmup.py) | run 8 with warmup | 2,102,272 | 2.59, 2.57, 2.56 | '
                         '3.77, 3.57, – | 3.02 ± 0.01 | -0.10 [-0.10, -0.10] |')  # fmt: skip
    assert lines[14].endswith('| 2.59, 2.57, 2.54 | not measured | not measured |  |')
    assert 'notebook' not in report.runs_table(full, short, [*runs.RUNS][15:])


def test_a_conclusion_holds_where_the_numbers_say_so():
    times = (('flash', 70, 80, 90), ('cosine', 91, 99, 110), ('swiglu', 8, 10, 12), ('deep', 11, 14, 15))
    bench_rows = {'rows': [dict(zip(('config', 'ms_p10', 'ms_median', 'ms_p90'), row, strict=True)) for row in times]}

    def verdicts(full, short):
        lines = report.conclusions_table(grouped(*full), grouped(*short), bench_rows).splitlines()[2:]
        return {line.split(' | ')[1]: line.split(' | ')[4:] for line in lines}

    seeds = lambda name, loss: [run_of(name, seed, [(0.3, loss + 0.001 * seed**2)]) for seed in (1, 2, 3)]  # noqa: E731
    full = [run_of('sgd', 1, [(1, 4.0), (2, 3.0)])]
    ends = {'adam': 3.9, 'swiglu': 3.0, 'deep': 3.01, 'wide': 3.1, 'warmup': 3.02}
    full += [run_of(name, 1, [(1, loss)]) for name, loss in ends.items()]
    found = verdicts(full, [*seeds('wide', 2.0), *seeds('swiglu', 2.5), *seeds('warmup', 2.4)])  # fmt: skip
    assert found['Adam beats SGD'] == ['-0.10', 'not measured', 'holds |']
    assert found['SwiGLU beats more layers'] == ['-0.01', 'not measured', 'not decided |']
    assert found['SwiGLU beats a wider feed-forward'] == ['-0.10', '+0.50 [+0.50, +0.50]', 'holds in one of the two |']
    assert found['warmup changes little'] == ['+0.02', '-0.10 [-0.10, -0.10]', 'holds in one of the two |']
    assert found["the flash model is faster than PyTorch's"] == ['80, 99 ms', '', 'holds |']
    assert found['SwiGLU is faster than more layers'][-1] == 'not decided |'
    assert found['18 layers help'] == ['not measured', 'not measured', 'not decided |']


def test_models_without_a_network_against_a_count_by_hand():
    train_ids, val_ids = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 1, 0])
    share = np.array([4, 3, 2, 1]) / 10  # each token once more than it occurs, of four
    after = {0: (np.array([0, 2, 1, 0]) + 2 * share) / 5, 1: (np.array([2, 0, 0, 0]) + share) / 3}
    unigram, bigram = baselines.unigram_and_bigram(train_ids, val_ids, 4)
    assert unigram == pytest.approx(-np.log(share[[1, 1, 0]]).mean())
    assert bigram == pytest.approx(-np.log([after[0][1], after[1][1], after[1][0]]).mean())


def test_the_pages_say_what_the_results_hold():
    """Every table that is made from results/*.json stands in its page as it would be made now."""
    tables = report.all_tables()
    assert len(tables) >= 12
    for (path, name), table in tables.items():
        inside = path.read_text(encoding='utf-8').split(f'<!-- {name} -->\n')[1].split(f'\n<!-- /{name} -->\n')[0]
        assert inside == table, f'{path.name}, {name}: run python -m results.report'


def test_a_page_without_its_marks_is_left_alone(tmp_path):
    page = tmp_path / 'README.md'
    page.write_text('before\n<!-- a -->\nold\n<!-- /a -->\nafter\n')
    report.replace_between(page, 'a', 'new')
    assert page.read_text() == 'before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n'
    with pytest.raises(SystemExit, match='README.md has no line <!-- b -->'):
        report.replace_between(page, 'b', 'new')
    assert 'new' in page.read_text()


def test_matplotlib_is_needed_for_the_pictures_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    for name in [name for name in sys.modules if name.split('.')[0] == 'results']:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module('results.ladder')
    unpainted = importlib.import_module('results.report')
    monkeypatch.setattr(unpainted, 'replace_between', None)  # no page is touched
    with pytest.raises(SystemExit, match='^the pictures need matplotlib: pip install matplotlib .*$'):
        unpainted.main()


def test_pictures_need_no_screen(tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'TkAgg')
    for name, draw in pictures.PICTURES.items():
        draw(tmp_path / f'{name}.png')
        assert (tmp_path / f'{name}.png').stat().st_size > 10_000
    assert pictures.spread([3.0, 1.0, 1.01, 1.02, 2.0], 0.1) == pytest.approx([3.0, 1.0, 1.1, 1.2, 2.0])


def test_a_commit_is_lost_without_git_and_nothing_else(tmp_path, monkeypatch):
    assert runs.commit(tmp_path) is None
    monkeypatch.setenv('PATH', str(tmp_path))
    found = runs.provenance()
    assert found['commit'] is None and found['torch'] and found['python'] and found['date']


# ---- times ---------------------------------------------------------------------------------------------------------

PEER = """
import dataclasses, torch
@dataclasses.dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        print('a word that is no number of ours')
    def forward(self, x, y):
        logits = self.table(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


def test_the_step_is_timed_beside_nanogpts(tmp_path, monkeypatch, capsys):
    """With a stand-in for nanoGPT's model.py, which is not ours to keep here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, 'RESULTS', tmp_path)
    monkeypatch.setattr(torch, 'compile', lambda net, **options: net)

    def compare(*flags):
        monkeypatch.setattr(
            sys, 'argv', ['nanogpt.py', '--publish', *SMALL, '--nanogpt=nanoGPT', '--seconds=0.01', *flags]
        )
        nanogpt.main()
        return runs.read(tmp_path / 'nanogpt_cpu.json')['rows']

    shape = ['--d_ff=64', '--position=learned']
    with pytest.raises(SystemExit, match='git clone https://github.com/karpathy/nanoGPT nanoGPT'):
        compare(*shape)
    Path('nanoGPT').mkdir()
    Path('nanoGPT/model.py').write_text(PEER)
    for _ in range(2):  # the second takes the first's place
        [row] = compare(*shape)
    assert list(row['ms_median']) == ['nanoGPT, float32', 'nanoGPT, bfloat16', 'this', 'this, compiled']
    assert min(row['ms_median'].values()) > 0 and row['n_embd'] == 16 and row['date'] and row['command']
    gains = iter([2.0])  # measured once: the two of ours are in one dtype
    monkeypatch.setattr(machine, 'bfloat16_speedup', lambda c: next(gains))
    assert [row['dtype'] for row in compare(*shape, '--batch_size=2', '--dtype=auto')] == ['float32', 'bfloat16']
    out = capsys.readouterr().out
    assert '| 2 layers, 16 wide, 4 x 16 |' in out and 'no number of ours' not in out
    with pytest.raises(SystemExit, match='add --activation=gelu --position=learned --d_ff=64$'):
        compare('--activation=swiglu')


def test_times_are_recorded(tmp_path, monkeypatch, capfd):
    """A config that cannot run costs the others nothing but the exit status; a bench.py that is stopped, all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, 'RESULTS', tmp_path)
    (tmp_path / 'uneven.py').write_text('n_embd = 15')
    files = [runs.config_path('swiglu'), runs.config_path('cpu'), 'uneven.py', runs.config_path('warmup')]
    flags = [flag for flag in SMALL if 'n_embd' not in flag]
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--publish', 'True', *files, *flags, '--seconds', '0.01'])
    with pytest.raises(SystemExit, match='^1$'):
        bench.main()
    results = runs.read(tmp_path / 'bench_cpu.json')
    assert [row['config'] for row in results['rows']] == ['swiglu', 'warmup'] and 'date' in results['rows'][1]
    assert results['command'] == shlex.join(['python', '-m', 'results.bench', *sys.argv[1:]])
    out, err = capfd.readouterr()
    assert report.bench_table(results).count('\n') == 3 and 'swiglu' in out and 'uneven is left out: n_embd' in err
    monkeypatch.setattr(bench, 'ROOT', tmp_path)
    (tmp_path / 'bench.py').write_text('import sys; sys.exit(3)')
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 3 and runs.read(tmp_path / 'bench_cpu.json') == results

"""results/: rows are trained once and their numbers kept, stopped rows go on, and both READMEs say what the JSON files
hold. Rows have two tiny layers. A process is started only where that is the point: it takes seconds to import torch."""

import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL

import checkpoint
import machine
import train
from bench import OVERLAYS
from configurator import configure
from model import build_model
from optim import create_optimizers
from results import bench, ladder, nanogpt, paired, pictures, positions, puzzle, record, report, rows

FLAGS = [*SMALL, '--dataset=tiny', '--max_iters=12', '--eval_interval=4']


@pytest.fixture
def climb(workplace, tmp_path, monkeypatch, capfd):
    """climb('row', '--knob=value') runs the ladder; returns its exit status or message, the results and the output."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(record, 'RESULTS', tmp_path)

    def main(*arguments):
        words = [a if a.startswith('-') or a.endswith('.py') else rows.config_of(a) for a in arguments]
        monkeypatch.setattr(sys, 'argv', ['ladder.py', '--publish', *FLAGS, *words])
        status = 0
        try:
            ladder.main()
        except SystemExit as ended:
            status = ended.code
        return status, record.read(tmp_path / 'ladder_tiny_cpu.json'), ''.join(capfd.readouterr())

    return main


@pytest.fixture
def here(monkeypatch):
    """Rows are trained by train.main in this process, which is fast, and end with a short sample."""
    write_text = train.write_text
    monkeypatch.setattr(
        train, 'write_text', lambda net, encoding, text, n, c, **o: write_text(net, encoding, text, 3, c, **o)
    )

    def run_program(program, *words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, 'argv', [program, *words])
            try:
                train.main()
            except SystemExit as ended:
                print(ended.code)
                return 1
        return 0

    monkeypatch.setattr(rows, 'run_program', run_program)


def rows_of(results):
    return [(run['row'], run['seed']) for run in results['rows']]


def knobs_of(row):
    return checkpoint.load(f'out/ladder_tiny_cpu/{row}')['knobs']


def evaluations_of(row):
    path = Path(f'out/ladder_tiny_cpu/{row}/metrics.jsonl')
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}') and 'val_loss' in line]


def test_rows_are_trained_once_and_their_numbers_kept(climb, here, tmp_path):
    status, results, printed = climb('swiglu', 'ema', '--seeds=1,2')
    assert status == 0 and rows_of(results) == [('swiglu', 1), ('ema', 1), ('swiglu', 2), ('ema', 2)]
    for run in results['rows']:
        assert run['evaluations'] == evaluations_of(f'{run["row"]}_{run["seed"]}')
        assert [e['step'] for e in run['evaluations']] == [4, 8, 12] and run['ms_per_batch'] > 0
        assert run['sample'].startswith(ladder.prompt) and len(run['sample'].splitlines()) == 1
        assert run['device'] == f'cpu, {torch.get_num_threads()} threads'
        assert all(run[key] for key in ('torch', 'python', 'date')) and 'commit' in run
    status, again, printed = climb('swiglu', 'ema', '--seeds=1,2')
    assert status == 0 and again == results and '4 rows done, 0 to go' in printed
    status, _, _ = climb('swiglu', '--n_layer=1')
    assert 'move it away' in status and '--n_layer=1' in status
    (tmp_path / 'ladder_tiny_cpu.json').unlink()
    _, again, printed = climb('swiglu', '--seeds=1')  # it was finished, and is not trained again
    assert 'resumed at step 12 of 12' in printed and rows_of(again) == [('swiglu', 1)]
    (tmp_path / 'ladder_tiny_cpu.json').unlink()
    status, results, printed = climb('swiglu', '--learning_rate=0.5')  # the run of before is not taken for one of these
    assert 'failed: swiglu' in status and not results and 'swiglu_1 holds a run of other knobs' in printed


def test_a_readers_rows_go_to_out_and_stand_beside_the_published(climb, here, tmp_path, capfd, monkeypatch):
    """Although the same rows are published already, they are trained; the published ones are left as they are."""
    published = {'rows': [run_of('swiglu', 1, [(1, 3.5)]), run_of('swiglu', 2, [(1, 4.5)])]}
    record.write(tmp_path / 'ladder_tiny_cpu.json', published)
    status, unchanged, _ = climb('swiglu', '--publish=False')
    own = record.read(Path('out/ladder_tiny_cpu.json'))
    assert status == 0 and rows_of(own) == [('swiglu', 1)] and unchanged == published
    loss = evaluations_of('swiglu_1')[-1]['val_loss']
    assert f'| `swiglu` | {loss:.3f} | 4.000 ± 0.707 |' in report.beside(own, published)
    assert f'| `swiglu` | {loss:.3f} |  |' in report.beside(own, {})


def test_a_ladder_is_in_one_dtype(climb, here, monkeypatch):
    """Whatever a busy computer finds fast when the next row begins."""
    for gain, row in ((0.9, 'swiglu'), (1.1, 'ema')):
        monkeypatch.setattr(machine, 'gain_of_bfloat16', lambda c, gain=gain: gain)
        status, results, _ = climb(row, '--dtype=auto', '--seeds=7')
        assert status == 0 and results['dtype'] == knobs_of(f'{row}_7')['dtype'] == 'float32'


def test_a_ladder_that_was_stopped_before_its_first_row_leaves_no_results(climb, here, tmp_path, monkeypatch):
    """An empty file of results would stop the report."""
    monkeypatch.setattr(ladder, 'train_row', lambda *args: 130)
    status, results, _ = climb('swiglu')
    assert status == 130 and not results and not list(tmp_path.glob('ladder_*'))


def test_what_cannot_be_written_is_found_before_the_first_row(climb, here, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(record, 'RESULTS', tmp_path / 'file')
    monkeypatch.setattr(ladder, 'train_row', None)  # no row is begun
    status, _, _ = climb('swiglu')
    assert status.endswith('ladder_tiny_cpu.json cannot be written: File exists.')


def test_a_row_that_fails_stops_no_other(climb, here, tmp_path, monkeypatch):
    bad, train_step = tmp_path / 'bad.py', train.Run.train_step
    bad.write_text('min_lr = -1.0')
    crash = lambda run: sys.exit('it crashed') if run.step == 6 and run.c.n_head == 4 else train_step(run)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, 'train_step', crash)
        status, results, printed = climb(str(bad), 'warmup', '--n_head=4')
        assert status.splitlines()[-1] == 'failed: bad (seed 1, exit status 1), warmup (seed 1, exit status 1)'
        assert 'min_lr is -1.0' in printed and 'it crashed' in printed and not results
    bad.write_text('min_lr = 0.0')
    _, results, printed = climb(str(bad), 'warmup', '--n_head=4')
    assert rows_of(results) == [('bad', 1), ('warmup', 1)] and printed.count('resumed at step 4 of 12') == 1
    assert [e['step'] for e in results['rows'][1]['evaluations']] == [4, 8, 12]


def test_overlays_follow_the_rows_and_sgd_and_the_rungs_keep_their_rates(climb, here, tmp_path):
    overlay = tmp_path / 'cpu.py'
    overlay.write_text('warmup_iters = 7')
    climb('sgd', str(overlay), 'adam', 'best', '--learning_rate_scale=10', '--seeds=3')
    assert [knobs_of(row)['learning_rate_scale'] for row in ('sgd_3', 'adam_3', 'best_3')] == [1.0, 10.0, 1.0]
    assert [knobs_of(row)['warmup_iters'] for row in ('sgd_3', 'adam_3')] == [7, 7]
    every_row = [rows.config_of(row) for row in rows.NUMBERS]
    assert rows.rows_and_overlays(['config/cpu.py']) == (every_row, ['config/cpu.py'])
    assert rows.rows_and_overlays([os.path.abspath('cpu.py')])[1] == ['cpu.py']  # a record names no one's home
    there = {file.stem for file in Path(rows.ROOT, 'config').glob('*.py')}
    assert there == {*rows.NUMBERS, *OVERLAYS}


def test_a_row_that_was_stopped_or_killed_goes_on(climb, monkeypatch):
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
    assert status == 128 + signal.SIGINT and not results and 'stopped, 1 to go' in printed
    first = checkpoint.load('out/ladder_tiny_cpu/deep_5')['step']
    status, _, printed = climb_until(lambda: os.kill(os.getpid(), signal.SIGTERM), first)
    assert status == 128 + signal.SIGTERM and f'resumed at step {first}' in printed
    second = checkpoint.load('out/ladder_tiny_cpu/deep_5')['step']
    status, _, printed = climb_until(lambda: children[-1].kill(), second)
    assert 'deep (seed 5, exit status 137)' in status and f'resumed at step {second}' in printed
    steps = [e['step'] for e in evaluations_of('deep_5')]
    assert steps == sorted(set(steps)) and steps[-1] > second > first > 0


def test_the_puzzle_leaves_dropout_on_where_it_says(climb, here, tmp_path):
    status, _, _ = climb('--puzzle', '--seeds=5')
    assert status == 0
    found = record.read(tmp_path / 'dropout_tiny_cpu.json')
    assert found['command'].startswith('python -m results.ladder') and found['device'] and found['date']
    cases = found['cases']
    assert len(cases) == 9 and len({case['val'] for case in cases}) == 9
    assert knobs_of('dropout_0.2_twice_5')['dropout'] == 0.36 and knobs_of('no_dropout_5')['dropout'] == 0
    for case in cases[::3]:  # with dropout off it is what train.py found
        assert case['evaluated'] == 'off'
        val = evaluations_of(f'{case["trained"].replace(" ", "_")}_5')[-1]['val_loss']
        assert case['val'] == pytest.approx(val, abs=1e-5)
    net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(1, 1))
    puzzle.leave_on(net, torch.nn.Dropout).eval()
    assert [module.training for module in net] == [True, False]


@pytest.fixture
def tiny(workplace, monkeypatch):
    """tiny('row') is a row's model with one layer, at its start."""
    monkeypatch.chdir(workplace)

    def build(row):
        c, _ = configure([train.__file__], [rows.config_of(row), *FLAGS, '--n_layer=1', '--attention=naive'])
        return build_model(c, 100)

    return build


def test_what_the_suspects_of_the_positions_change(tiny):
    """Without positions the order of the tokens before does not count, in one layer; a table of zeros adds nothing;
    Adam's first step is as long as the rate."""
    idx, mixed = torch.tensor([[1, 2, 3, 4, 5], [3, 1, 4, 2, 5]])[:, None]
    for change, same in ((lambda model: None, False), (positions.stop_turning, True)):
        model = tiny('learning_rate')
        change(model)
        assert torch.allclose(model(idx)[:, -1], model(mixed)[:, -1], rtol=0, atol=1e-6) == same
    model = tiny('learning_rate')
    before = model(idx)
    positions.add_table(model)
    assert not torch.allclose(model(idx), before, atol=1e-3)
    torch.nn.init.zeros_(model.table)
    assert torch.equal(model(idx), before)
    for change, step in ((lambda model: None, 1e-3), (positions.quicken_table, 1e-2)):
        model = tiny('learned')
        before = model.positions.clone()
        change(model)
        assert torch.allclose(model.positions, before)
        [optimizer] = create_optimizers(model, 'adamw', 1e-3, 0.0)
        model(idx, idx).backward()
        optimizer.step()
        assert float((model.positions - before)[:5].abs().median().detach()) == pytest.approx(step, rel=1e-2)
    for change, factor in ((positions.empty_table, 0), (positions.enlarge_table, 10)):
        model, start = tiny('learned'), tiny('learned').positions.clone()
        change(model)
        assert torch.equal(model.positions, factor * start)


def test_a_suspect_of_the_positions_is_tried_once(here, workplace, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(record, 'RESULTS', tmp_path)
    suspects = ('rotary and a learned table', 'no weight decay')
    monkeypatch.setattr(positions, 'CASES', {name: positions.CASES[name] for name in suspects})
    monkeypatch.setattr(sys, 'argv', ['positions.py', '--publish', *FLAGS])
    positions.main()
    found = record.read(tmp_path / 'positions_tiny_cpu.json')
    assert [case['case'] for case in found['cases']] == [*suspects] and found['cases'][0]['date']
    saved = [checkpoint.load(f'out/positions_tiny_cpu/{name.replace(" ", "_")}') for name in suspects]
    assert 'table' in saved[0]['model'] and saved[1]['knobs']['weight_decay'] == 0.0
    capfd.readouterr()
    positions.main()
    assert record.read(tmp_path / 'positions_tiny_cpu.json') == found and not capfd.readouterr().out
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--seed=2'])
    with pytest.raises(SystemExit, match='positions_tiny_cpu.json holds cases of python -m results.positions'):
        positions.main()
    assert f'`learned` | {paired.last_loss(found["cases"][1]):.2f} |' in report.positions_table(found)


@pytest.mark.parametrize('flag, words', [
    ('--seeds=1,x', "seeds is '1,x'"), ('--seeds=²', "seeds is '²'"), ('--dtype=foo', "dtype is 'foo', expected"),
    ('--max_iters=0', 'max_iters=0 is not for the ladder'), ('--seed=3', '--seed=3 is not for the ladder'),
])  # fmt: skip
@pytest.mark.parametrize('mode', ['--puzzle', '--report', '--report=False'])
def test_bad_knobs_are_refused(climb, mode, flag, words):
    status, _, _ = climb(mode, flag)
    assert words in status


@pytest.mark.parametrize('text', ['', '{"rows": [', '[1]'])
def test_damaged_results_are_refused(tmp_path, text):
    (tmp_path / 'ladder.json').write_text(text)
    with pytest.raises(SystemExit, match='ladder.json is damaged: .*Move it away'):
        record.read(tmp_path / 'ladder.json')


def run_of(row, seed, losses, ema=None, **others):
    evaluations = [
        {'epoch': epoch, 'val_loss': loss, 'ema_loss': ema, 'train_loss': loss - 1, 'bits_per_byte': loss / 4}
        for epoch, loss in losses
    ]
    return {'row': row, 'seed': seed, 'ms_per_batch': 10.0 * seed, 'evaluations': evaluations, **others}


TIMES = {'flash': (70, 80, 90), 'cosine': (91, 99, 1100), 'swiglu': (8, 10, 12), 'deep': (11, 14, 15)}
BENCH = {'rows': [{'config': row, 'ms_p10': low, 'ms_median': ms, 'ms_p90': high, 'tokens_per_s': 1e6 / ms}
                  for row, (low, ms, high) in TIMES.items()]}  # fmt: skip


def test_tables_say_mean_and_spread():
    results = {'rows': [run_of('mine', 1, [(1, 3.0)], ms_per_batch=None, sample='said "Yes"'),
                        run_of('learned', 1, [(0.5, 9.0), (1, 3.0), (2, 2.0)]),
                        run_of('learned', 3, [(0.5, 9.0), (1, 4.0), (2, 2.5)]),
                        run_of('best_2_muon', 1, [(0.25, 9.0), (0.5, 3.0)]),
                        run_of('ema', 1, [(1, 3.0)], ema=2.9)]}  # fmt: skip
    sd = statistics.stdev([2.0, 2.5])
    lines = report.ladder_table(results).splitlines()
    assert lines[2:6] == [
        '| 7 | `ema` | 2.66, 2.63, 2.62 | 3.00 (average: 2.90) |  | 2.00 | 0.750 | 10 |',
        f'| 15 | `learned` | 2.58, 2.55, 2.53 | 3.50 ± 0.71, 2.25 ± {sd:.2f} |  | 1.25 ± {sd:.2f} '
        '| 0.562 ± 0.088 | 20 |',
        '| rung 2 | `best_2_muon` |  | 3.00 |  | 2.00 | 0.750 | 10 |',
        '|  | `mine` |  | 3.00 |  | 2.00 | 0.750 |  |',
    ]
    assert lines[-1].split(maxsplit=1) == ['mine', 'said "Yes"']
    front = report.front_page_table(results).splitlines()
    assert len(front) == 17 and front[-1] == (
        '| 15 | [`learned`](config/learned.py) | row 13 with learned positions | 2,102,272 | 2.58, 2.55, 2.53 | '
        f'2.25 ± {sd:.2f} |  |'
    )
    assert front[12].endswith('15,669,248 | 2.32 | not measured yet |  |')


def test_rows_are_compared_seed_by_seed():
    """One seed more or less is no matter; the average's loss counts where there is one; an interval decides."""
    ends = {'weight_decay': {1: 4.0, 2: 5.0, 3: 6.0, 4: 9.0}, 'swiglu': {3: 5.7, 1: 3.9, 2: 4.8}, 'deep': {2: 5.1}}
    results = {'rows': [run_of(row, seed, [(1, 9.0), (2, loss)]) for row, losses in ends.items()
                        for seed, loss in losses.items()]}  # fmt: skip
    results['rows'] += [run_of('ema', seed, [(2, 1.0)], ema=loss) for seed, loss in ((1, 4.1), (2, 4.9))]
    runs = paired.runs_by_row(results)
    assert paired.paired(runs, 'swiglu', 'weight_decay') == pytest.approx([-0.1, -0.2, -0.3])
    low, high = paired.interval([-0.1, -0.2, -0.3])
    assert (low, high) == pytest.approx((-0.2 - 4.303 * 0.1 / 3**0.5, -0.2 + 4.303 * 0.1 / 3**0.5)) and high > 0
    lines = {line.split(' | ')[1]: line for line in report.ladder_table(results).splitlines()}
    assert ' | -0.20 [-0.45, +0.05] | ' in lines['`swiglu`'] and ' | +0.10 | ' in lines['`deep`']
    assert ' | +0.00 | ' in lines['`ema`']
    low, high = paired.interval([0.0, 1.0] * 10)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low > 2 * 2.093 * 0.513 / 20**0.5  # never too narrow
    verdicts = {
        'holds': [-1.0, -1.01, -1.02],
        'does not hold here': [1.0, 1.01, 1.02],
        'not decided': [-0.1, -0.2, -0.3],
    }
    assert all(paired.verdict(differences) == text for text, differences in verdicts.items())
    assert paired.verdict([-5.0, -5.0]) == 'not decided'
    claims = report.claims_table(results, BENCH)
    assert '| 3 | the flash model is faster | `flash`, `cosine` |  | 80, 99 ms | holds |' in claims
    assert '| `swiglu`, `deep` | 38, 48.5 ms | 10, 14 ms | not decided |' in claims
    assert '| 6 | SwiGLU beats more layers | `swiglu`, `deep` | 2.58, 2.59 | -0.30 | not decided |' in claims
    assert claims.count(f'| {report.LONG} |') == 1 and '| 2.86, 2.96 |  | not measured yet |' in claims


@pytest.mark.parametrize('freedom', [2, 5, 9])
def test_students_t_leaves_five_per_cent_outside(freedom):
    """By the sum of its density (1 + x²/n)^(-(n+1)/2) up to t, and to infinity, where x = tan(angle)."""
    angles = torch.linspace(0, math.pi / 2, 200_001, dtype=torch.float64)[:-1] + math.pi / 800_000
    x = angles.tan()
    mass = (1 + x**2 / freedom) ** (-(freedom + 1) / 2) / angles.cos() ** 2
    assert float(mass[x < paired.T95[freedom - 2]].sum() / mass.sum()) == pytest.approx(0.95, abs=1e-4)


def test_a_rows_parent_is_the_one_that_its_config_names():
    assert [rows.parent_of(row) for row in ('sgd', 'adam', 'wide', 'learned', 'best_1_rate', 'best', 'best_97m')] == [
        None, 'sgd', 'weight_decay', 'learning_rate', 'learned', 'best_8_three_steps', 'swiglu_23']  # fmt: skip


def block(path, name):
    """What stands between a README's markers."""
    return path.read_text(encoding='utf-8').split(f'<!-- {name} -->\n')[1].split(f'\n<!-- /{name} -->\n')[0]


def test_the_report_rewrites_both_readmes(tmp_path, monkeypatch):
    results = {'rows': [run_of(row, 1, [(1, 5.9 - i), (2, 3.9 - i / 50)]) for i, row in enumerate(rows.LOG)]}
    folder, front = tmp_path / 'results', tmp_path / 'README.md'
    folder.mkdir()
    monkeypatch.setattr(report, 'RESULTS', folder)
    monkeypatch.setattr(report, 'ROOT', tmp_path)
    monkeypatch.delitem(report.PICTURES, 'bench')  # one picture shows that they are drawn
    name = Path(report.LADDER).stem
    record.write(folder / report.LADDER, results)
    record.write(folder / report.SPEED, BENCH)
    around = 'before\n<!-- {0} -->\nwhat was\n<!-- /{0} -->\nafter\n'
    notebook = around.format(name) + around.format('claims') + around.format('bench_cpu')
    (folder / 'README.md').write_text(notebook)
    front.write_text(around.format('ladder'))
    (folder / 'stray.json').write_text('[]')
    report.make_report()
    assert front.read_text() == around.format('ladder').replace('what was', report.front_page_table(results))
    tables = report.ladder_table(results), report.claims_table(results, BENCH), report.bench_table(BENCH)
    for table in tables:
        notebook = notebook.replace('what was', table, 1)
    assert (folder / 'README.md').read_text() == notebook
    assert (folder / f'{name}.png').stat().st_size > 10_000
    for path, text, marker in ((front, front.read_text(), 'ladder'), (folder / 'README.md', notebook, 'claims')):
        path.write_text('nothing\n')
        with pytest.raises(SystemExit, match=f'README.md has no line <!-- {marker} -->'):
            report.make_report()
        assert path.read_text() == 'nothing\n'
        path.write_text(text)


def test_the_readmes_say_what_the_results_hold():
    paths = sorted(record.RESULTS.glob('*.json'))
    assert len(paths) >= 10
    for path in paths:
        table = report.TABLES[path.stem.split('_')[0]](record.read(path))
        assert block(record.RESULTS / 'README.md', path.stem) == table
    results = record.read(record.RESULTS / report.LADDER)
    assert block(record.ROOT / 'README.md', 'ladder') == report.front_page_table(results)
    claims = report.claims_table(results, record.read(record.RESULTS / report.SPEED))
    assert block(record.RESULTS / 'README.md', 'claims') == claims


def test_labels_keep_their_distance():
    placed = pictures.spread([3.0, 1.0, 1.01, 1.02, 2.0], 0.1)
    assert placed == pytest.approx([3.0, 1.0, 1.1, 1.2, 2.0])


def test_pictures_need_no_screen(tmp_path, monkeypatch):
    monkeypatch.setenv('MPLBACKEND', 'TkAgg')
    losses = {'rows': [run_of('sgd', 1, [(1, 9.0), (2, 4.0)]), run_of('adam', 1, [(1, 3.0), (2, 2.0)])]}
    pictures.draw_losses(losses, tmp_path / 'losses.png')
    pictures.draw_ends(losses, tmp_path / 'ends.png')
    speed = {'rows': [{'config': 'swiglu', 'ms_median': 38.0, 'ms_p10': 37.0, 'ms_p90': 41.0}]}
    pictures.draw_speed(speed, tmp_path / 'speed.png')
    assert all((tmp_path / f'{name}.png').stat().st_size > 5_000 for name in ('losses', 'ends', 'speed'))


def test_a_commit_is_lost_without_git_and_nothing_else(tmp_path, monkeypatch):
    assert record.commit(tmp_path) is None
    monkeypatch.setenv('PATH', str(tmp_path))
    found = record.provenance()
    assert found['commit'] is None and found['torch'] and found['python'] and found['date']


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
    monkeypatch.setattr(record, 'RESULTS', tmp_path)
    monkeypatch.setattr(torch, 'compile', lambda net, **options: net)

    def compare(*flags):
        monkeypatch.setattr(
            sys, 'argv', ['nanogpt.py', '--publish', *SMALL, '--nanogpt=nanoGPT', '--seconds=0.01', *flags]
        )
        nanogpt.main()
        return record.read(tmp_path / 'nanogpt_cpu.json')['rows']

    shape = ['--d_ff=64', '--position=learned']
    with pytest.raises(SystemExit, match='git clone https://github.com/karpathy/nanoGPT nanoGPT'):
        compare(*shape)
    Path('nanoGPT').mkdir()
    Path('nanoGPT/model.py').write_text(PEER)
    for _ in range(2):  # the second takes the first's place
        [row] = compare(*shape)
    assert list(row['ms_median']) == ['nanoGPT, float32', 'nanoGPT, bfloat16', 'this', 'this, compiled']
    assert min(row['ms_median'].values()) > 0 and row['n_embd'] == 16 and row['date'] and row['command']
    assert len(compare(*shape, '--batch_size=2')) == 2
    out = capsys.readouterr().out
    assert '| 2 layers, 16 wide, 4 x 16 |' in out and 'no number of ours' not in out
    with pytest.raises(SystemExit, match='add --activation=gelu --position=learned --d_ff=64$'):
        compare('--activation=swiglu')


def test_bench_rows_are_recorded(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(record, 'RESULTS', tmp_path)
    setting = {'device': f'cpu, {torch.get_num_threads()} threads', 'torch': torch.__version__, 'dtype': 'float32'}
    knobs = [rows.config_of('cpu'), *SMALL, '--seconds=0.01']
    others = [{'config': 'ema', 'knobs': shlex.join(knobs), **setting}, {'config': 'deep', 'knobs': '', **setting}]
    record.write(tmp_path / 'bench_cpu.json', {'besides': {'by hand': 1}, 'rows': others})
    files = [rows.config_of(row) for row in ('swiglu', 'cpu', 'warmup')]
    monkeypatch.setattr(sys, 'argv', ['bench.py', '--publish', *files, *SMALL, '--seconds=0.01'])
    bench.main()
    results = record.read(tmp_path / 'bench_cpu.json')
    assert [row['config'] for row in results['rows']] == ['ema', 'swiglu', 'warmup']  # 'deep' had other knobs
    files = map(rows.config_of, ('ema', 'swiglu', 'warmup', 'cpu'))
    assert results['command'] == shlex.join(['python', 'bench.py', *files, *SMALL, '--seconds=0.01', '--json'])
    assert results['besides'] == {'by hand': 1} and 'date' in results['rows'][1]
    del results['rows'][0]
    assert report.bench_table(results).count('\n') == 3 and 'swiglu' in capfd.readouterr().out
    record.write(tmp_path / 'bench_cpu.json', results)
    monkeypatch.setattr(bench, 'ROOT', tmp_path)
    (tmp_path / 'bench.py').write_text('import sys; sys.exit(3)')
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 3 and record.read(tmp_path / 'bench_cpu.json') == results
    (tmp_path / 'bench_cpu.json').write_text('{')
    with pytest.raises(SystemExit, match='is damaged'):  # before the rows are timed
        bench.main()

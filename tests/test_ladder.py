"""The ladder on two rows of two layers: finished rows are skipped, a stopped one goes on, a failing one stops none."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, SMALL

import ladder
import train

FLAGS = [*SMALL, '--dataset=tiny', '--max_iters=12', '--eval_interval=4']


@pytest.fixture
def climb(workplace, tmp_path, monkeypatch, capsys):
    """climb('row', '--knob=value') runs the ladder; returns its exit code, the results and what was printed."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(ladder, 'RESULTS', tmp_path)
    monkeypatch.setattr(train, 'catch_signals', list)  # pytest's own handlers stay

    def main(*arguments):
        rows = [a if a.endswith('.py') or a.startswith('-') else f'{REPO}/config/{a}.py' for a in arguments]
        monkeypatch.setattr(sys, 'argv', ['ladder.py', *rows, *FLAGS])
        with pytest.raises(SystemExit) as ended:
            ladder.main()
        path = tmp_path / 'ladder_tiny_cpu.json'
        out, err = capsys.readouterr()
        return ended.value.code, json.loads(path.read_text()) if path.exists() else None, out + err

    return main


def rows_of(results):
    return [(run['row'], run['seed']) for run in results['rows']]


def test_rows_are_trained_once_and_their_numbers_kept(climb, tmp_path):
    results_file = tmp_path / 'ladder_tiny_cpu.json'
    code, results, _ = climb('swiglu', 'ema', '--seeds=1,2')
    assert code == 0 and rows_of(results) == [('swiglu', 1), ('ema', 1), ('swiglu', 2), ('ema', 2)]
    for run in results['rows']:
        lines = Path(f'out/ladder_tiny_cpu/{run["row"]}_{run["seed"]}/metrics.jsonl').read_text().splitlines()
        assert run['evaluations'] == [json.loads(line) for line in lines if 'val_loss' in line]
        assert [e['step'] for e in run['evaluations']] == [4, 8, 12]
        assert run['ms_per_batch'] > 0 and run['torch'] and run['device']
        assert run['sample'].startswith('The old man')
    code, again, printed = climb('swiglu', 'ema', '--seeds=1,2')
    assert code == 0 and again == results and '====' not in printed
    code, _, printed = climb('swiglu', '--n_layer=1')
    assert 'move it away' in code and '--n_layer=1' in code
    os.remove(results_file)
    code, results, printed = climb('swiglu', '--weight_decay=0.5')  # the run of before is not taken for one of these
    assert code == 1 and results is None and 'holds a run with another weight_decay: move it away' in printed


def test_a_row_that_fails_stops_no_other(climb, tmp_path):
    bad = tmp_path / 'bad.py'
    bad.write_text('min_lr = -1.0')
    code, results, printed = climb(str(bad), 'warmup')
    assert code == 1 and rows_of(results) == [('warmup', 1)]
    assert 'min_lr is -1.0' in printed and 'failed: bad (seed 1)' in printed
    assert "seeds is '1,x'" in climb('swiglu', '--seeds=1,x')[0]


def test_a_row_that_crashes_stops_no_other(climb, monkeypatch):
    trains = train.main
    crash = lambda: 1 / 0 if 'wide.py' in sys.argv[1] else trains()  # noqa: E731
    monkeypatch.setattr(train, 'main', crash)
    code, results, printed = climb('wide', 'warmup', '--seeds=7')
    assert code == 1 and rows_of(results) == [('warmup', 7)]
    assert 'ZeroDivisionError' in printed and 'failed: wide (seed 7)' in printed


def test_a_row_that_was_stopped_goes_on(climb, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, 'signal', lambda run, caught: signal.SIGINT * (run.step == 6))
        code, results, _ = climb('deep')
        assert code == 128 + signal.SIGINT and results is None
    code, results, printed = climb('deep')
    assert code == 0 and rows_of(results) == [('deep', 1)] and 'resumed at step 6 of 12' in printed
    assert [e['step'] for e in results['rows'][0]['evaluations']] == [4, 8, 12]


def test_killed_it_goes_on(workplace, tmp_path):
    program = f'import pathlib, ladder; ladder.RESULTS = pathlib.Path({str(tmp_path)!r}); ladder.main()'
    command = [sys.executable, '-c', program, f'{REPO}/config/warmup.py', *FLAGS, '--max_iters=200', '--seeds=6']
    options = dict(cwd=workplace, env={**os.environ, 'PYTHONPATH': REPO}, text=True)
    first = subprocess.Popen(command, **options)
    saved = workplace / 'out/ladder_tiny_cpu/warmup_6/ckpt.pt'
    while not saved.exists():
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    first.wait()
    assert not (tmp_path / 'ladder_tiny_cpu.json').exists()
    again = subprocess.run(command, capture_output=True, **options)
    results = json.loads((tmp_path / 'ladder_tiny_cpu.json').read_text())
    assert again.returncode == 0 and 'resumed at step' in again.stdout and rows_of(results) == [('warmup', 6)]
    steps = [e['step'] for e in results['rows'][0]['evaluations']]
    assert steps == sorted(set(steps)) and set(steps) >= set(range(4, 201, 4))


def test_learning_rates_are_scaled_but_for_sgd(climb):
    climb('adam', 'sgd', '--learning_rate_scale=10', '--seeds=4')
    rates = [train.load_checkpoint(Path(f'out/ladder_tiny_cpu/{row}_4'))['knobs'] for row in ('adam', 'sgd')]
    assert [knobs['learning_rate'] for knobs in rates] == [0.1, 0.01]  # the test's own 0.01 holds for both rows
    climb('rate', '--learning_rate_scale=10', '--seeds=8')
    assert train.load_checkpoint('out/ladder_tiny_cpu/rate_8')['knobs']['min_lr'] == pytest.approx(3e-3)


def test_the_puzzle_leaves_dropout_on_where_it_says(climb, tmp_path, monkeypatch):
    _, results, _ = climb('flash', 'weight_decay', '--seeds=5')
    monkeypatch.setattr(sys, 'argv', ['ladder.py', '--puzzle', '--seeds=5', *FLAGS])
    ladder.main()
    found = json.loads((tmp_path / 'dropout_tiny_cpu.json').read_text())
    cases = found['cases']
    assert len(cases) == 9 and len({case['val'] for case in cases}) == 9 and found['commit'] and found['command']
    assert train.load_checkpoint('out/ladder_tiny_cpu/dropout_0.2_twice_5')['knobs']['dropout'] == 0.36
    for run, case in zip(results['rows'], cases[::6], strict=True):  # trained once more, to the same bits
        assert case['trained'] == {'flash': 'dropout 0.2', 'weight_decay': 'no dropout'}[run['row']]
        assert case['evaluated'] == 'off'
        assert case['val'] == pytest.approx(run['evaluations'][-1]['val_loss'], abs=1e-5)
    assert ladder.dropout_table(found).count('\n') == 10


def run_of(row, seed, losses, ema=None):
    evaluations = [
        {'epoch': epoch, 'val_loss': loss, 'ema_loss': ema, 'train_loss': loss - 1, 'bits_per_byte': loss / 4}
        for epoch, loss in losses
    ]
    return {'row': row, 'seed': seed, 'ms_per_batch': 10.0 * seed, 'evaluations': evaluations}


def test_the_table_says_mean_and_spread():
    results = {'rows': [run_of('learned', 1, [(0.5, 9.0), (1, 3.0), (2, 2.0)]),
                        run_of('learned', 3, [(0.5, 9.0), (1, 4.0), (2, 2.5)]),
                        run_of('ema', 1, [(1, 3.0)], ema=2.9)]}  # fmt: skip
    last = statistics.stdev([2.0, 2.5])
    ema, learned = ladder.table(results).splitlines()[2:]
    assert ema == '| 7 | `ema` | 2.66, 2.63, 2.62 | 3.00 (average: 2.90) | 2.00 | 0.750 | 10 |'
    assert learned == ('| 15 | `learned` | 2.58, 2.55, 2.53 | 3.50 ± 0.71, 2.25 ± '
                       f'{last:.2f} | 1.25 ± {last:.2f} | 0.562 ± 0.088 | 20 |')  # fmt: skip


def test_the_report_rewrites_the_readme(tmp_path, monkeypatch):
    results = {'rows': [run_of(row, 1, [(1, 3.0 - i / 50), (2, 2.9 - i / 50)]) for i, row in enumerate(ladder.LOG)]}
    monkeypatch.setattr(ladder, 'RESULTS', tmp_path)
    monkeypatch.setattr(ladder, 'README', tmp_path / 'README.md')
    (tmp_path / 'ladder_x_cpu.json').write_text(json.dumps(results))
    (tmp_path / 'README.md').write_text('before\n<!-- ladder_x_cpu -->\nold\n<!-- /ladder_x_cpu -->\nafter\n')
    ladder.make_report()
    assert (tmp_path / 'README.md').read_text() == (
        f'before\n<!-- ladder_x_cpu -->\n{ladder.table(results)}\n<!-- /ladder_x_cpu -->\nafter\n'
    )
    assert (tmp_path / 'ladder_x_cpu.png').stat().st_size > 10_000
    (tmp_path / 'README.md').write_text('nothing\n')
    with pytest.raises(SystemExit, match='has no <!-- ladder_x_cpu -->'):
        ladder.make_report()


def test_labels_keep_their_distance():
    placed = ladder.spread([3.0, 1.0, 1.01, 1.02, 2.0], 0.1)
    assert placed == pytest.approx([3.0, 1.0, 1.1, 1.2, 2.0])


def test_the_readme_says_what_the_results_hold():
    readme = (Path(REPO) / 'README.md').read_text()
    paths = list(Path(REPO).glob('results/*.json'))
    assert len(paths) >= 3
    for path in paths:
        block = ladder.README_BLOCKS[path.stem.split('_')[0]](json.loads(path.read_text()))
        assert f'<!-- {path.stem} -->\n{block}\n<!-- /{path.stem} -->' in readme


def test_speed_is_drawn(tmp_path):
    ladder.draw_speed({'rows': [{'config': 'swiglu', 'ms_median': 38.0}]}, tmp_path / 'speed.png')
    assert (tmp_path / 'speed.png').stat().st_size > 5_000


def test_a_row_too_short_for_a_time_has_none():
    results = {'rows': [{**run_of('swiglu', 1, [(1, 3.0)]), 'ms_per_batch': None}]}
    assert ladder.table(results).endswith('|  |')


def test_a_row_of_ones_own_comes_after_the_ladders():
    results = {'rows': [run_of(row, 1, [(1, 3.0)]) for row in ('mine', 'ema')]}
    assert [line.split(' | ')[:2] for line in ladder.table(results).splitlines()[2:]] == [
        ['| 7', '`ema`'],
        ['| ', '`mine`'],
    ]


@pytest.mark.parametrize('flag, words', [
    ('--seeds=x', "seeds is 'x'"), ('--dtype=foo', "dtype is 'foo', expected"),
    ('--max_iters=0', 'max_iters=0 is not for the ladder'), ('--seed=3', '--seed=3 is not for the ladder'),
])  # fmt: skip
@pytest.mark.parametrize('mode', ['--puzzle', '--report=False'])
def test_bad_knobs_are_refused(monkeypatch, flag, words, mode):
    monkeypatch.setattr(sys, 'argv', ['ladder.py', mode, flag])
    with pytest.raises(SystemExit, match=words):
        ladder.main()


def test_samples_follow_the_table():
    results = {'rows': [{**run_of('swiglu', 1, [(1, 3.0)]), 'sample': 'said "Yes"'}, run_of('ema', 1, [(1, 3.0)])]}
    assert ladder.samples(results).splitlines()[-1].split(maxsplit=1) == ['swiglu', 'said "Yes"']
    assert len(ladder.samples(results).splitlines()) == 5

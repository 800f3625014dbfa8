"""What README.md promises of a run: kill it anywhere, damage what it wrote, change its knobs; nothing is lost.

Children are forked from a server that has imported torch already, so that one starts in a fraction of a second.
"""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, assert_same, same
from torch.distributed.run import get_args_parser

import machine
import sources
import train
from checkpoint import FIXED, SIGNALS, load, save
from machine import run_program

pytestmark = pytest.mark.skipif(sys.platform == 'win32', reason='signals and locks of Unix')
LIMIT = 600  # seconds after which a process is taken to hang
HARD = ['--dropout=0.2', '--gradient_accumulation_steps=2', '--ema_decay=0.9']  # all the state that a run can have


# ---- children ------------------------------------------------------------------------------------------------------


def child(folder, arguments, log, prepare, environ):
    """train.py's main in a process of its own, its output in a file; `prepare` is called before."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ |= environ
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may have been started by nohup
    train.write_text = lambda *args, **options: ''  # the closing sample takes longer than the run
    machine.onednn_speedup = lambda: 1.0  # as in conftest
    sys.argv = ['train.py', *SMALL, '--dataset=tiny', *arguments]
    if prepare:
        prepare[0](*prepare[1:])
    run_program(train.main)


@pytest.fixture
def start(workplace, tmp_path, monkeypatch):
    """start('--knob=value', ...) starts a child; .log is the file of its output."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv('PYTHONPATH', f'{REPO}:{REPO}/tests')  # without it, Python 3.11's server preloads nothing
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['train', 'torch._dynamo'])  # optimizers import the latter
    children = []

    def launch(*arguments, prepare=None, environ=None):
        log = tmp_path / f'log_{len(children)}'
        process = context.Process(target=child, args=(str(workplace), arguments, str(log), prepare, environ or {}))
        process.start()
        process.log = log
        children.append(process)
        return process

    yield launch
    for process in children:
        process.kill()


def finish(process, code=0):
    """Wait for a child; returns its output, which holds no traceback."""
    process.join(LIMIT)
    text = process.log.read_text()
    assert process.exitcode == code, text
    assert 'Traceback' not in text
    return text


def wait_for(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(text):
    """The one line that an error prints."""
    lines = [line for line in text.splitlines() if line]
    assert lines and 'Traceback' not in text
    return lines[-1]


# ---- 1: kill -9 ----------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_and_resumed(start):
    """Killed 4 times or more at random moments of its training, the run ends with the bits of the uninterrupted one."""
    knobs = [*HARD, '--dtype=bfloat16', '--optimizer=muon', '--max_iters=25', '--eval_interval=8']

    def trains(process):
        return process.exitcode is not None or process.log.exists() and 'batches per epoch' in process.log.read_text()

    steady = start(*knobs, '--out_dir=out/steady')
    wait_for(lambda: trains(steady))
    began = time.monotonic()
    finish(steady)
    whole = time.monotonic() - began  # how long this computer takes from the first step to the end
    moment, kills, resumed, out_dir = random.Random(0), 0, False, Path('out/killed')
    while kills < 4 or not resumed:
        kills = min(kills, 4)
        shutil.rmtree(out_dir, ignore_errors=True)
        while True:
            init_from = 'resume' if (out_dir / 'ckpt.pt').exists() else 'scratch'
            process = start(*knobs, f'--out_dir={out_dir}', f'--init_from={init_from}')
            wait_for(lambda process=process: trains(process))
            process.join(moment.uniform(0, whole))
            if process.exitcode is not None or kills > 20:
                break
            process.kill()
            process.join()
            kills += 1
        text = finish(process)
        resumed = resumed or 'resumed at step' in text and 'resumed at step 25' not in text
        assert_same(load(out_dir), load('out/steady'))
        steps = [json.loads(line)['step'] for line in (out_dir / 'metrics.jsonl').read_text().splitlines()]
        assert steps == sorted(steps) and steps.count(25) == 2  # the log line and the evaluation


# ---- 2: a crash inside a save --------------------------------------------------------------------------------------


def crash(owner, name, call, after):
    """Make the process die without a word at the call-th call of a function, before or after it."""
    module = getattr(train.checkpoint, owner)
    function, calls = getattr(module, name), []

    def deadly(*arguments):
        calls.append(arguments)
        if len(calls) == call and not after:
            os._exit(9)
        result = function(*arguments)
        if len(calls) == call:
            os._exit(9)
        return result

    setattr(module, name, deadly)


@pytest.mark.parametrize('owner, name, after', [
    ('torch', 'save', False), ('os', 'fsync', False), ('os', 'replace', False), ('os', 'replace', True),
])  # fmt: skip
def test_a_crash_inside_a_save_leaves_a_whole_checkpoint(start, owner, name, after, run):
    knobs = [*HARD, '--eval_interval=2', '--out_dir=out/crash']
    shutil.rmtree('out/crash', ignore_errors=True)
    process = start(*knobs, prepare=(crash, owner, name, 3, after))
    process.join(LIMIT)
    assert process.exitcode == 9
    assert load('out/crash')['step'] == (6 if (name, after) == ('replace', True) else 4)
    run(*knobs, '--init_from=resume')
    if not Path('out/uncrashed').exists():
        run(*HARD, '--out_dir=out/uncrashed')
    assert_same(load('out/crash'), load('out/uncrashed'))


# ---- 3: a full disk ------------------------------------------------------------------------------------------------


def limit_files(size):
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_the_old_checkpoint(start, run):
    run('--out_dir=out/full', stop_at=5)
    before = Path('out/full/ckpt.pt').read_bytes()
    process = start('--out_dir=out/full', '--init_from=resume', prepare=(limit_files, 20_000))
    line = refused(finish(process, code=1))
    assert 'out/full/ckpt.pt could not be saved' in line and 'File too large' in line
    assert Path('out/full/ckpt.pt').read_bytes() == before
    assert not Path('out/full/ckpt.pt.new').exists()


def test_a_run_whose_folder_has_vanished_says_so(tmp_path):
    with pytest.raises(
        SystemExit, match='gone/ckpt.pt could not be saved: .*No such file.*directory: [^(]*An earlier one'
    ):
        save(tmp_path / 'gone', {})


def test_a_full_file_system(start, run, tmp_path):
    """The same on a real one, where even metrics.jsonl finds no room."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('this machine lets nobody mount a tmpfs')
    try:
        run(f'--out_dir={disk}/run', stop_at=5)
        before = (disk / 'run/ckpt.pt').read_bytes()
        (disk / 'ballast').write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
        process = start(f'--out_dir={disk}/run', '--init_from=resume')
        line = refused(finish(process, code=1))
        assert 'metrics.jsonl could not be written' in line or '(0.0 MB are free)' in line
        assert (disk / 'run/ckpt.pt').read_bytes() == before
    finally:
        subprocess.run(['umount', disk], check=True)


# ---- 4: signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('signum', [getattr(signal, name) for name in SIGNALS])
def test_a_signal_finishes_the_step_saves_and_says_how_to_continue(start, run, signum):
    out_dir, knobs = f'out/signal_{signum}', [*HARD, '--max_iters=100']
    process = start(*knobs, f'--out_dir={out_dir}')
    wait_for(lambda: Path(out_dir, 'metrics.jsonl').exists() and Path(out_dir, 'metrics.jsonl').read_text())
    os.kill(process.pid, signum)
    text = finish(process, code=128 + signum)
    assert 0 < load(out_dir)['step'] < 100
    assert f'--out_dir={out_dir} --init_from=resume' in refused(text)
    if signum == signal.SIGINT:  # the others stop alike
        run(*knobs, f'--out_dir={out_dir}', '--init_from=resume')
        run(*knobs, '--out_dir=out/unsignalled')
        assert_same(load(out_dir), load('out/unsignalled'))


@pytest.mark.parametrize('is_told', [True, False])
def test_a_closed_terminal_stops_a_run_that_is_saved(run, monkeypatch, is_told):
    """Nothing can be written to it any more. Most shells send SIGHUP as well."""

    def gone(*text):
        raise OSError(5, 'Input/output error')

    def train_step(run, step=train.Run.train_step):
        if run.step == 2:
            monkeypatch.setattr(os, 'write', gone)
            monkeypatch.setattr(machine.tqdm, 'write', gone)
            if is_told:
                signal.raise_signal(signal.SIGHUP)
        return step(run)

    monkeypatch.setattr(train.Run, 'train_step', train_step)
    with pytest.raises(SystemExit, match='Input/output error'):  # of the line that says how to continue
        run('--out_dir=out/terminal', '--overwrite', '--log_interval=1')
    lines = [json.loads(line) for line in open('out/terminal/metrics.jsonl')]
    assert load('out/terminal')['step'] == lines[-1]['step'] == 3


def metrics_without_times(out_dir):
    lines = [json.loads(line) for line in open(f'{out_dir}/metrics.jsonl')]
    return [{k: v for k, v in line.items() if k not in ('ms_per_batch', 'tokens_per_s')} for line in lines]


@pytest.mark.parametrize('stop_at', [3, 8, 10])  # between two log lines; after one, too; before an evaluation
def test_the_metrics_of_a_stopped_run_are_those_of_an_uninterrupted_one(run, stop_at):
    knobs = ['--max_iters=20', '--eval_interval=10', '--ema_decay=0.9']
    out_dir = f'out/stopped_at_{stop_at}'
    run(*knobs, f'--out_dir={out_dir}', stop_at=stop_at)
    run(*knobs, f'--out_dir={out_dir}', '--init_from=resume')
    if not Path('out/not_stopped').exists():
        run(*knobs, '--out_dir=out/not_stopped')
    assert metrics_without_times(out_dir) == metrics_without_times('out/not_stopped')
    assert_same(load(out_dir), load('out/not_stopped'))


def test_a_signal_in_an_evaluation_saves_at_once_and_the_resumed_run_evaluates(run, monkeypatch):
    """Of the two evaluations of step 10, the model's and its average's, the second is cut short after a batch."""
    knobs, calls = ['--max_iters=20', '--eval_interval=10', '--ema_decay=0.9', '--eval_iters=50'], []
    run(*knobs, '--out_dir=out/heard')
    batches = train.validation_batches

    def interrupted(*arguments):
        for i, batch in enumerate(batches(*arguments)):
            calls.append(i)
            if len(calls) == 1 + len(list(batches(*arguments))):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'validation_batches', interrupted)
        patch.setattr('conftest.signal.SIGINT', signal.SIGTERM)  # the end that stop_at expects
        run(*knobs, '--out_dir=out/hears', stop_at=10_000)
    assert load('out/hears')['step'] == 10 and calls[-1] <= 1
    assert [line['step'] for line in metrics_without_times('out/hears')] == [5, 10]
    run(*knobs, '--out_dir=out/hears', '--init_from=resume')
    assert metrics_without_times('out/hears') == metrics_without_times('out/heard')
    assert_same(load('out/hears'), load('out/heard'))


def test_a_checkpoint_is_written_every_minute(run, monkeypatch):
    """Whatever the evaluations; and where a checkpoint takes long, it takes a twentieth of the time at most."""
    clock, saved, save, train_step = [0.0], [], train.checkpoint.save, train.Run.train_step

    def slow_save(out_dir, state):
        saved.append(state['step'])
        clock[0] += 5 if len(saved) == 2 else 0
        save(out_dir, state)

    def slow_step(run):
        clock[0] += 13
        return train_step(run)

    monkeypatch.setattr(train.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(train.checkpoint, 'save', slow_save)
    monkeypatch.setattr(train.Run, 'train_step', slow_step)
    run('--out_dir=out/minutes', '--max_iters=30')
    assert saved == [5, 10, 18, 23, 28, 30]


def ignore_hangup():
    """As nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_signal_that_nohup_ignores_stays_ignored(start):
    process = start('--out_dir=out/nohup', '--max_iters=100', prepare=(ignore_hangup,))
    wait_for(lambda: Path('out/nohup/metrics.jsonl').exists() and Path('out/nohup/metrics.jsonl').read_text())
    os.kill(process.pid, signal.SIGHUP)
    assert 'finishing this step' not in finish(process) and load('out/nohup')['step'] == 100


def test_a_second_signal_quits_at_once(start):
    """A step of several seconds is not waited for."""
    process = start('--out_dir=out/twice', '--n_embd=2048', '--d_ff=8192', '--block_size=64', '--batch_size=64')
    wait_for(Path('out/twice/metrics.jsonl').exists)  # opened once signals are caught
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: 'once more to quit at once' in process.log.read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(LIMIT)
    assert process.exitcode == -signal.SIGINT and 'epoch  1' not in process.log.read_text()


# ---- 5: numbers that are none --------------------------------------------------------------------------------------


def overflow(monkeypatch, steps):
    """Let the gradient of a gain overflow in these steps of a run, the first of which is 1."""
    build = train.build_model

    def build_bad(c, vocab_size):
        net = build(c, vocab_size)
        backwards = itertools.count(1)
        net.norm.weight.register_hook(lambda grad: grad * (float('inf') if next(backwards) in steps else 1))
        return net

    monkeypatch.setattr(train, 'build_model', build_bad)


def test_a_loss_that_is_not_finite_never_reaches_a_checkpoint(start, run):
    """It is found at the next log line or save, and the step where it began is named: the seventh, whose weights the
    sixth has ruined. When that is the last, its evaluation tells."""
    run('--out_dir=out/nan', '--optimizer=sgd', stop_at=5)
    before = Path('out/nan/ckpt.pt').read_bytes()
    for words, *knobs in (['at step 7'], ['at step 7', '--log_interval=1000', '--eval_interval=8'],
                          ['at step 7', '--log_interval=1000', '--dtype=float16'],
                          ['validation loss nan after step 6', '--max_iters=6']):  # fmt: skip
        again = start('--out_dir=out/nan', '--optimizer=sgd', '--learning_rate=1e30', '--init_from=resume', *knobs)
        assert f'{words}: likely float16, too short a warmup, or' in refused(finish(again, code=1))
        assert Path('out/nan/ckpt.pt').read_bytes() == before


def test_a_scaler_skips_a_few_steps_and_not_all(run):
    """Float16 at a rate that leaves no number finite: it ends, and what was saved before is kept."""
    knobs = ['--out_dir=out/skips', '--dtype=float16', '--grad_clip=0', '--max_iters=200']
    run(*knobs, stop_at=5)
    before = Path('out/skips/ckpt.pt').read_bytes()
    with pytest.raises(SystemExit, match='loss .* at step .* What was saved is kept') as end:
        run(*knobs, '--init_from=resume', '--learning_rate=1e6')
    assert '\n' not in end.value.code and Path('out/skips/ckpt.pt').read_bytes() == before


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'muon'])
def test_an_overflow_anywhere_skips_the_whole_update(run, monkeypatch, optimizer):
    """One gradient overflows in the third step. It is a gain's, which AdamW updates: Muon beside it must skip, too."""
    overflow(monkeypatch, [3])
    knobs = ['--dtype=float16', '--grad_clip=0', f'--optimizer={optimizer}', '--log_interval=1']
    out_dir = f'out/overflow_{optimizer}'
    run(*knobs, f'--out_dir={out_dir}', stop_at=2)
    before = load(out_dir)
    run(*knobs, f'--out_dir={out_dir}_3', stop_at=3)
    skipped = load(f'{out_dir}_3')
    assert same(before['model'], skipped['model']) and skipped['step'] == 3
    assert same([each['state'] for each in before['optimizers']], [each['state'] for each in skipped['optimizers']])
    assert skipped['scaler']['scale'] == before['scaler']['scale'] / 2
    run(*knobs, f'--out_dir={out_dir}_4', stop_at=4)
    assert not same(before['model'], load(f'{out_dir}_4')['model'])


def test_an_update_that_is_not_finite_is_not_saved_by_a_signal(run, monkeypatch):
    """The loss of the step that made it was finite, and no next one has told yet."""
    train_step = train.Run.train_step
    for part in ('model', 'ema'):

        def ruin(run, part=part):
            numbers = train_step(run)
            if run.step == 4:
                getattr(run, part).norm.bias.data[3] = float('nan')
            return numbers

        monkeypatch.setattr(train.Run, 'train_step', ruin)
        with pytest.raises(SystemExit, match='weights that are not finite after step 4: '):
            run('--out_dir=out/ruined', '--ema_decay=0.9', stop_at=4)
    assert not Path('out/ruined/ckpt.pt').exists()


def test_a_scaler_does_not_skip_for_ever(run, monkeypatch):
    """Each loss is finite, no gradient is; the losses and norms on the way are JSON."""
    overflow(monkeypatch, range(1, 200))
    with pytest.raises(SystemExit, match='gradient norm (inf|nan) at step 16: '):
        run('--out_dir=out/for_ever', '--dtype=float16', '--max_iters=200')
    lines = [json.loads(line, parse_constant=pytest.fail) for line in open('out/for_ever/metrics.jsonl')]
    assert [line['step'] for line in lines] == [5, 10, 15] and lines[0]['grad_norm'] is None


def test_no_number_that_is_only_printed_stops_a_run(run):
    """A loss of thousands has no perplexity that a float could hold."""
    out = run(f'{REPO}/config/sgd.py', '--n_head=2', '--learning_rate=1000', '--out_dir=out/huge')
    assert float(re.search(r'loss: (\d+)', out).group(1)) > 800 and load('out/huge')['step'] == 10


def test_an_infinite_gradient_never_reaches_a_checkpoint(run, monkeypatch):
    """Not even where the save comes before the next loss, which would tell: at the end, or at a signal."""
    overflow(monkeypatch, [3])
    for max_iters, stop_at in ((3, None), (10, 3)):
        with pytest.raises(SystemExit, match='gradient norm (inf|nan) at step 3: '):
            run('--out_dir=out/inf', f'--max_iters={max_iters}', '--log_interval=1000', stop_at=stop_at)
    assert not Path('out/inf/ckpt.pt').exists()
    run('--out_dir=out/skipped', '--max_iters=3', '--log_interval=1000', '--dtype=float16')  # by the scaler
    assert all(p.isfinite().all() for p in load('out/skipped')['model'].values())


# ---- 6, 7: damaged and hostile checkpoints -------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_found(run):
    """Whatever byte is cut or flipped: it is refused in one line, or was of no consequence, such as a date."""
    run('--out_dir=out/damage', '--eval_interval=5')
    path, generator, found = Path('out/damage/ckpt.pt'), random.Random(0), 0
    whole, state = path.read_bytes(), load('out/damage')
    damages = [whole[: generator.randrange(len(whole))] for _ in range(50)] + [b'', b'junk']
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        damages.append(bytes(flipped))
    for damage in damages:
        path.write_bytes(damage)
        try:
            assert same(load('out/damage'), state)
        except SystemExit as refusal:
            assert re.match(r'out/damage/ckpt.pt is damaged[^\n]*\Z', refusal.code)
            found += 1
    assert found > 200


def test_a_file_that_is_no_checkpoint_is_refused(run):
    run('--out_dir=out/foreign')
    pickled = io.BytesIO()
    torch.save([1], pickled, _use_new_zipfile_serialization=False)
    nanogpts = io.BytesIO()
    torch.save({'model': {}, 'optimizer': {}, 'model_args': {}, 'iter_num': 1}, nanogpts)
    for data in (b'junk', b'', pickle.dumps({'step': 1}, protocol=2), pickled.getvalue(), nanogpts.getvalue()):
        Path('out/foreign/ckpt.pt').write_bytes(data)
        with pytest.raises(SystemExit, match='is damaged or no checkpoint of this program'):
            load('out/foreign')


class Hostile:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_a_hostile_checkpoint_executes_nothing(run):
    run('--out_dir=out/hostile', '--overwrite')
    torch.save({'model': Hostile()}, 'out/hostile/ckpt.pt')
    with pytest.raises(SystemExit, match='no checkpoint of this program: Weights only load failed'):
        load('out/hostile')
    assert not Path('executed').exists()


# ---- 12, 13: one run a folder, and the same run --------------------------------------------------------------------


def test_two_runs_in_one_folder(start, run):
    process = start('--out_dir=out/locked', '--max_iters=100000')
    wait_for(lambda: process.log.exists() and 'batches per epoch' in process.log.read_text())
    for knobs in ([], ['--overwrite'], ['--init_from=resume']):
        with pytest.raises(SystemExit, match='out/locked is in use by a run that is still alive'):
            run('--out_dir=out/locked', *knobs)
    process.kill()
    process.join()
    run('--out_dir=out/locked', '--overwrite')


def test_a_finished_run_is_not_overwritten(run, monkeypatch):
    run('--out_dir=out/kept')
    before = Path('out/kept/ckpt.pt').read_bytes()
    with pytest.raises(SystemExit, match='out/kept holds a run.*--overwrite'):
        run('--out_dir=out/kept')
    assert Path('out/kept/ckpt.pt').read_bytes() == before
    run('--out_dir=out/kept', '--overwrite', '--seed=3')
    assert load('out/kept')['knobs']['seed'] == 3
    steps = [json.loads(line)['step'] for line in open('out/kept/metrics.jsonl')]
    assert steps == [5, 10, 10]  # the old run's are gone
    before = Path('out/kept/ckpt.pt').read_bytes()
    metrics = Path('out/kept/metrics.jsonl').read_bytes()
    Path('out/kept/mine.old').touch()

    def end_early(run, signals):
        Path('out/kept/metrics.jsonl').write_text('{"step": 1}\n')
        sys.exit('before the first save')

    with monkeypatch.context() as patch:
        patch.setattr(train, 'train', end_early)
        for _ in range(2):
            with pytest.raises(SystemExit, match='before the first save'):
                run('--out_dir=out/kept', '--overwrite')
    assert not Path('out/kept/ckpt.pt').exists()  # nobody resumes the old run by mistake
    assert Path('out/kept/ckpt.pt.replaced').read_bytes() == before
    assert Path('out/kept/metrics.jsonl.replaced').read_bytes() == metrics
    run('--out_dir=out/kept', '--overwrite')
    assert sorted(path.name for path in Path('out/kept').iterdir()) == ['ckpt.pt', 'lock', 'metrics.jsonl', 'mine.old']


def test_auto_resumes_where_there_is_a_run(run):
    knobs = ['--out_dir=out/requeued', '--init_from=auto']
    assert 'resumed' not in run(*knobs, stop_at=5)
    assert 'resumed at step 5 of 10' in run(*knobs)
    assert 'resumed' not in run(*knobs, '--overwrite')
    run('--out_dir=out/requeued_not')
    assert_same(load('out/requeued'), load('out/requeued_not'))
    with pytest.raises(SystemExit, match='leave one of them out'):
        run('--out_dir=out/requeued', '--init_from=resume', '--overwrite')


def test_a_damaged_line_of_the_metrics_is_cut_off(run, monkeypatch):
    run('--out_dir=out/cut_off', stop_at=5)
    path = Path('out/cut_off/metrics.jsonl')
    [whole] = path.read_bytes().splitlines()
    path.write_bytes(b'{"step": 1}\n\0\0\xff}\n[3]\n{"epoch": 1}\n7\n' + whole + b'\n{"step": 5, "lo')
    damaged = path.read_bytes()
    with monkeypatch.context() as patch:  # killed while it cuts
        patch.setattr(train.checkpoint.os, 'replace', lambda old, new: sys.exit('killed'))
        with pytest.raises(SystemExit, match='killed'):
            run('--out_dir=out/cut_off', '--init_from=resume')
    assert path.read_bytes() == damaged
    run('--out_dir=out/cut_off', '--init_from=resume')
    assert [json.loads(line)['step'] for line in open(path)] == [1, 5, 10, 10]


def test_a_file_system_without_locks(run, monkeypatch):
    import fcntl

    def flock(file, how):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr(fcntl, 'flock', flock)
    run('--out_dir=out/unlocked')
    assert load('out/unlocked')['step'] == 10


def test_a_folder_that_cannot_be_is_refused(run):
    with pytest.raises(SystemExit, match=r"Not a directory: 'tiny.txt/run'"):
        run('--out_dir=tiny.txt/run')


def test_overwrite_deletes_nothing_before_all_is_checked(run):
    run('--out_dir=out/late')
    before = Path('out/late/ckpt.pt').read_bytes()
    for knob in ('--dataset=smal', '--n_head=3', '--gradient_accumulation_steps=3', '--block_size=100000'):
        with pytest.raises(SystemExit):
            run('--out_dir=out/late', '--overwrite', knob)
        assert Path('out/late/ckpt.pt').read_bytes() == before


CHANGES = {
    'n_layer': (2, 3), 'n_head': (2, 4), 'n_embd': (16, 32), 'd_ff': (24, 32), 'block_size': (16, 8),
    'activation': ('gelu', 'swiglu'), 'position': ('rotary', 'learned'), 'model': ('flash', 'torch'),
    'embedding_norm': (False, True), 'head_gate': (False, True), 'value_residual': (False, True),
    'exclude_self': (False, True), 'induction_heads': (0, 1),
    'optimizer': ('adamw', 'sgd'), 'muon_steps': (5, 3), 'seed': (1, 2), 'batch_size': (4, 8), 'ema_decay': (0.0, 0.9),
    'weight_decay': (0.1, 0.2),
}  # fmt: skip


def test_resuming_another_run_is_refused(run):
    assert CHANGES.keys() == set(FIXED)
    run('--out_dir=out/fixed', stop_at=5)
    Path('other.txt').write_text('another corpus, with other words: ' + 'lorem ipsum dolor sit amet\n' * 500)
    before = Path('out/fixed/ckpt.pt').read_bytes()
    refusals = {f'--{knob}={new}': f'{knob} was {old!r}, now {new!r}' for knob, (old, new) in CHANGES.items()}
    refusals['--dataset=other.txt'] = 'a different corpus; a different validation text; a different vocabulary'
    for flag, words in refusals.items():
        with pytest.raises(SystemExit, match=f'cannot resume: .*{words}'):
            run('--out_dir=out/fixed', '--init_from=resume', flag)
    assert Path('out/fixed/ckpt.pt').read_bytes() == before


def test_resuming_with_another_validation_text_alone_is_refused(run):
    for name in ('train', 'val'):
        Path('sides', name).mkdir(parents=True)
        Path('sides', name, 'a.txt').write_text(Path('tiny.txt').read_text())
    run('--out_dir=out/sides', '--dataset=sides', stop_at=5)
    Path('sides/val/a.txt').write_text(Path('tiny.txt').read_text()[::2])
    train.open_corpus('./sides')
    resume = ['--out_dir=out/sides', '--dataset=sides', '--init_from=resume']
    with pytest.raises(SystemExit, match='cannot resume: a different validation text. Use'):
        run(*resume)
    saved = load('out/sides')
    del saved['validation text']  # as in checkpoints before it was recorded
    save(Path('out/sides'), saved)
    assert 'resumed at step 5' in run(*resume)


def test_resuming_with_other_schedule_and_intervals_is_allowed_and_said(run):
    run('--out_dir=out/allowed', stop_at=5)
    changes = ['--learning_rate=2e-3', '--max_iters=12', '--eval_interval=3', '--log_interval=2',
               '--dropout=0.1', '--grad_clip=0.5', '--min_lr=1e-5', '--warmup_iters=2', '--epochs=4']  # fmt: skip
    out = run('--out_dir=out/allowed', '--init_from=resume', *changes)
    for change in changes:
        assert f'resume: {change[2:].partition("=")[0]} was ' in out
    assert 'resume: learning_rate was 0.01, now 0.002' in out and load('out/allowed')['step'] == 12


@pytest.mark.parametrize('knobs, jumps', [
    (['--max_iters=20'], True), (['--learning_rate=2e-2'], True), (['--learning_rate_scale=0.5'], True),
    (['--warmup_iters=15', '--max_iters=20'], True), (['--lr_schedule=constant'], True),
    (['--max_iters=10'], False), (['--weight_decay=0.1', '--grad_clip=0.5'], False),
])  # fmt: skip
def test_a_learning_rate_that_jumps_at_a_resume_is_said(run, knobs, jumps):
    """By the lines of the log: the rate that the next step would have had is on none, the new one is on the next."""
    out_dir = '--out_dir=out/jumps'
    before = run(out_dir, '--log_interval=1', '--overwrite')
    run(out_dir, '--log_interval=1', '--overwrite', stop_at=5)
    after = run(out_dir, '--log_interval=1', '--init_from=resume', *knobs)
    rates = [re.findall(r'lr (\S+)', text) for text in (before, after)]
    said = re.findall('the learning rate jumps from (.*) to (.*), since', after)
    assert said == ([(rates[0][5], rates[1][0])] if jumps else [])


def test_the_command_to_train_on_says_that_the_learning_rate_rises(run):
    for schedule, warned in (('cosine', True), ('constant', False)):
        out = run('--out_dir=out/on', f'--lr_schedule={schedule}', '--overwrite')
        assert out.endswith('--max_iters=20  # a longer cosine: the learning rate rises again\n') == warned


def test_the_command_to_continue_is_the_one_that_was_given_but_for_how_it_started(run):
    out = run('--out_dir=out/go on', '--overwrite', '--init_from=scratch', stop_at=5)
    command = out.splitlines()[-1]
    assert command.startswith('stopped at step 5 and saved; continue with: python train.py --n_layer=2 ')
    assert command.endswith(" --dataset=tiny '--out_dir=out/go on' --init_from=resume")


def test_resuming_keeps_the_corpus_of_before_although_its_source_has_changed(run):
    Path('mine.txt').write_text('my own notes, a few lines of them\n' * 500)
    run('--dataset=mine.txt', '--out_dir=out/mine', stop_at=5)
    Path('mine.txt').write_text('other words, in a file of the same name\n' * 500)
    run('--dataset=mine.txt', '--out_dir=out/mine', '--init_from=resume')
    assert load('out/mine')['step'] == 10


def test_resuming_before_the_first_checkpoint_says_so(run):
    Path('out/too_early').mkdir(parents=True)
    Path('out/too_early/metrics.jsonl').write_text('{"step": 5, "loss": 6.0}\n')
    with pytest.raises(SystemExit, match='^out/too_early has no checkpoint yet: .* without --init_from=resume.$'):
        run('--out_dir=out/too_early', '--init_from=resume')
    Path('out/too_early/ckpt.pt.replaced').touch()  # of the run that --overwrite gave up
    with pytest.raises(
        SystemExit, match='out/too_early/ckpt.pt.replaced and metrics.jsonl.replaced are the run before'
    ):
        run('--out_dir=out/too_early', '--init_from=resume')


def test_resuming_nothing_is_refused(run):
    with pytest.raises(SystemExit, match='out/none/ckpt.pt cannot be read'):
        run('--out_dir=out/none', '--init_from=resume')


# ---- 14: several processes -----------------------------------------------------------------------------------------


@pytest.fixture
def together(start):
    """together(2, '--knob=value', ...) trains with so many processes, as torchrun starts them; returns the first's
    output, and fails if another prints anything."""

    def run_all(world, *arguments, prepare=None, code=0):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        group = {'WORLD_SIZE': str(world), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
        processes = [start(*arguments, prepare=prepare, environ=group | {'RANK': str(rank), 'LOCAL_RANK': str(rank)})
                     for rank in range(world)]  # fmt: skip
        texts = [finish(process, code) for process in processes]
        assert not any('epoch' in text or 'device' in text for text in texts[1:])
        return texts[0]

    return run_all


def test_a_signal_after_the_last_step_quits(run, monkeypatch):
    """The handlers of before are back when the closing sample is written."""
    seen = []
    monkeypatch.setattr(train, 'write_text', lambda *_, **__: str(seen.append(signal.getsignal(signal.SIGTERM))))
    run('--out_dir=out/after')
    assert seen == [signal.SIG_DFL]


def signal_the_second_process(step):
    """Let process 1 of the group receive a SIGTERM after so many steps."""
    train_step = train.Run.train_step

    def step_and_signal(run):
        numbers = train_step(run)
        if run.step == step and os.environ['RANK'] == '1':
            signal.raise_signal(signal.SIGTERM)
        return numbers

    train.Run.train_step = step_and_signal


def test_processes_agree_on_a_signal_that_one_of_them_caught(together):
    text = together(2, '--out_dir=out/agreed', prepare=(signal_the_second_process, 4), code=128 + signal.SIGTERM)
    assert 'stopped at step 4 and saved' in text and load('out/agreed')['step'] == 4


def look_whether_the_sample_is_there():
    """Let the second process fail if it leaves the group before the first has written its sample."""
    destroy = train.dist.destroy_process_group

    def write_text(*args, **options):
        time.sleep(1)  # the second would be gone by then
        Path('out/sampled').touch()
        return ''

    def destroy_late():
        assert Path('out/sampled').exists()
        destroy()

    train.write_text, train.dist.destroy_process_group = write_text, destroy_late


def test_no_process_leaves_before_the_others(together):
    """gloo's threads free what a reduction was handed. Where Python was at its end by then, one run in fifty died."""
    together(2, '--out_dir=out/last', prepare=(look_whether_the_sample_is_there,))


def save_at_every_step_of_the_second_process():
    """It alone finds that a minute has passed. Each save of the first is a line of a file."""
    save = train.checkpoint.save

    def save_and_tell(*arguments):
        with open('out/saves', 'a') as file:
            file.write('saved\n')
        save(*arguments)

    train.checkpoint.save = save_and_tell
    train.SAVE_EVERY = -1 if os.environ['RANK'] == '1' else 3600


def test_the_process_that_saves_says_when(together):
    """It alone knows how long that takes, of which it makes 5 % of the time at most."""
    together(2, '--out_dir=out/says_when', prepare=(save_at_every_step_of_the_second_process,))
    assert Path('out/saves').read_text() == 'saved\n'


def test_resuming_with_one_two_and_one_process(run, together):
    """Four steps alone, three by two processes, the rest alone: the weights of ten steps alone."""
    constant = '--lr_schedule=constant'  # so that max_iters may change on the way
    run('--out_dir=out/alone', constant)
    run('--out_dir=out/ranks', constant, '--max_iters=4')
    micro = '--gradient_accumulation_steps=2'  # the gradients are exchanged after the second alone
    text = together(2, '--out_dir=out/ranks', constant, micro, '--max_iters=7', '--init_from=resume')
    assert 'resumed at step 4 of 7' in text
    assert 'resumed at step 7 of 10' in run('--out_dir=out/ranks', constant, '--init_from=resume')
    torch.testing.assert_close(load('out/ranks')['model'], load('out/alone')['model'], atol=1e-4, rtol=1e-3)


def find_bfloat16_fast_in_the_second_process():
    machine.bfloat16_speedup = lambda c: 3.0 if os.environ['RANK'] == '1' else 0.1


def test_four_processes_equal_one(run, together):
    """They agree on the dtype, too, of which each measures whether it is fast."""
    run('--out_dir=out/one_of_four')
    text = together(4, '--out_dir=out/four', '--dtype=auto', prepare=(find_bfloat16_fast_in_the_second_process,))
    assert text.count('float32 (1.2 times as fast as bfloat16 here), 4 processes') == 1 and text.count('2 layer') == 1
    ours, theirs = (
        [json.loads(line) for line in open(f'out/{name}/metrics.jsonl')] for name in ('one_of_four', 'four')
    )
    assert len(ours) == len(theirs) == 3
    for alone, shared in zip(ours, theirs, strict=True):
        key = 'loss' if 'loss' in alone else 'val_loss'
        assert alone[key] == pytest.approx(shared[key], abs=1e-5)
    models = (load(f'out/{name}')['model'] for name in ('one_of_four', 'four'))
    torch.testing.assert_close(*models, atol=1e-4, rtol=1e-3)


def go_where_the_corpus_is_another(folder):
    """Let the second process run where data/tiny was prepared from another text, as on another machine."""
    if os.environ['RANK'] == '1':
        os.chdir(folder)
        Path('tiny.txt').write_text('another text\n' * 2000)
        sources.prepare('tiny.txt')


def test_processes_whose_corpora_differ_are_refused(together, tmp_path):
    text = together(2, '--out_dir=out/differs', prepare=(go_where_the_corpus_is_another, str(tmp_path)), code=1)
    assert refused(text) == 'data/tiny is not the same on all machines: copy it from one of them to the others.'
    assert not Path('out/differs/ckpt.pt').exists()


def go_where_the_run_is_not(folder):
    """Let the second process run where data/ is the same, but not out/."""
    if os.environ['RANK'] == '1':
        Path(folder, 'data').symlink_to(Path('data').resolve())
        os.chdir(folder)


def test_processes_of_which_one_has_no_run_to_resume_are_refused(run, together, tmp_path):
    """With --init_from=auto it would start over, beside one that goes on."""
    run('--out_dir=out/elsewhere', '--max_iters=5')
    prepare = go_where_the_run_is_not, str(tmp_path)
    text = together(2, '--out_dir=out/elsewhere', '--init_from=auto', prepare=prepare, code=1)
    assert refused(text).startswith('out/elsewhere does not hold the same run on all machines: ')


def test_the_command_to_continue_on_several_machines(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', 'config/swiglu.py'])
    for name, value in {'RANK': 0, 'WORLD_SIZE': 8, 'LOCAL_WORLD_SIZE': 4, 'MASTER_ADDR': 'first.example'}.items():
        monkeypatch.setenv(name, str(value))
    parser = get_args_parser()
    parsed = parser.parse_args(train.checkpoint.resume_command().split()[1:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ('2', '4', 'c10d')
    assert parsed.rdzv_endpoint == 'first.example'
    assert parsed.training_script_args == ['config/swiglu.py', '--init_from=resume']


def test_a_batch_that_the_processes_cannot_share_is_refused(run, monkeypatch):
    monkeypatch.setattr(train, 'rank_and_world_size', lambda: (0, 2))
    monkeypatch.setattr(train.dist, 'barrier', lambda: None)
    with pytest.raises(SystemExit, match='batch_size is 5, expected a multiple of 2'):
        run('--out_dir=out/uneven', '--batch_size=5')


def test_a_dying_process_stops_them_all(workplace, monkeypatch):
    """torchrun ends with an error and the checkpoint loads."""
    monkeypatch.chdir(workplace)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', f'{REPO}/train.py']
    knobs = [*SMALL, '--dataset=tiny', '--out_dir=out/dying', '--max_iters=100000', '--eval_interval=20']
    with subprocess.Popen([*command, *knobs], stderr=subprocess.PIPE, stdout=subprocess.PIPE) as group:
        wait_for(lambda: Path('out/dying/ckpt.pt').exists())
        children = subprocess.run(['pgrep', '-P', str(group.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), signal.SIGKILL)
        group.communicate(timeout=LIMIT)
        assert group.returncode not in (0, None)
    assert load('out/dying')['step'] % 20 == 0


# ---- 16: the GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_resumed_run_on_the_gpu_equals_the_uninterrupted_one(run):
    knobs = [*HARD, '--device=cuda', '--dtype=bfloat16']
    run('--out_dir=out/gpu_whole', *knobs)
    run('--out_dir=out/gpu_half', *knobs, stop_at=5)
    run('--out_dir=out/gpu_half', *knobs, '--init_from=resume')
    torch.testing.assert_close(load('out/gpu_half')['model'], load('out/gpu_whole')['model'], atol=1e-3, rtol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_a_recorded_step_on_the_gpu_trains_as_an_unrecorded_one(run, monkeypatch):
    """The learning rate of a recorded step is a tensor in float32, which may change the last bits."""
    for optimizer in ('adamw', 'muon', 'sgd'):
        knobs = ['--device=cuda', '--dtype=float32', f'--optimizer={optimizer}', '--gradient_accumulation_steps=2']
        run(*knobs, f'--out_dir=out/recorded_{optimizer}')
        with monkeypatch.context() as patch:
            patch.setattr(machine, 'Recorded', lambda function: function)
            run(*knobs, f'--out_dir=out/unrecorded_{optimizer}')
        models = [load(f'out/{how}_{optimizer}')['model'] for how in ('recorded', 'unrecorded')]
        torch.testing.assert_close(*models, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory'), MemoryError(), RuntimeError('MPS backend out of memory (MPS ...)'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError('Storage size calculation overflowed with sizes=[...]'),
], ids=['cuda', 'python', 'mps', 'cpu', 'size'])  # fmt: skip
def test_out_of_memory_names_the_knobs(run, monkeypatch, error):
    def no_memory(*args, **options):
        raise error

    monkeypatch.setattr(train.Run, 'train_step', no_memory)
    with pytest.raises(SystemExit, match='out of memory: .* lower --batch_size .* --gradient_accumulation_steps'):
        run('--out_dir=out/memory', '--overwrite')

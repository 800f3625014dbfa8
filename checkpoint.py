"""What makes a run safe to stop: its folder, its checkpoint, its metrics, and the signals that stop it.

A run's folder holds ckpt.pt (all that is needed to resume), metrics.jsonl (a JSON object per log line and evaluation)
and lock.
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import configure
from machine import check_same, print0, rank_and_world_size

# knobs that a resumed run must keep, or it would be a different run
FIXED = ('model n_layer n_head n_embd d_ff block_size activation position embedding_norm head_gate '
         'value_residual exclude_self induction_heads optimizer muon_steps weight_decay ema_decay seed '
         'batch_size').split()  # fmt: skip
# Ctrl-C; kill; a closed terminal; what SLURM sends before a job's time is up. Windows has the first two only
SIGNALS = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU')
STOP_SIGNALS = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
RUN = ('metrics.jsonl', 'ckpt.pt')  # a run's files; without the last there is no run, so it is moved last


def capture_state(run):
    """All that is needed to resume, as tensors and plain Python values."""
    return {
        'model': run.model.state_dict(),
        'optimizers': [optimizer.state_dict() for optimizer in run.optimizers],
        'ema': run.ema and run.ema.state_dict(),
        'scaler': run.scaler.state_dict(),
        'step': run.step,
        'since_log': run.since_log,
        'since_evaluation': run.since_evaluation,
        'lowest': run.lowest,
        'knobs': vars(run.config),
        **identity(run.corpus),
    }


def identity(corpus):
    """What a resumed run, and each process of a run, must have in common with the others."""
    sha256 = corpus.meta['sha256']
    return {'corpus': sha256['train.bin'], 'validation text': sha256['val.bin'], 'vocabulary': corpus.vocabulary}


def compare_corpora(corpus):
    """Exit if the processes, which may run on several machines, have different corpora."""
    digest = int(hashlib.sha256(repr(identity(corpus)).encode()).hexdigest()[:15], 16)
    check_same(digest, f'{corpus.folder} is not the same on all machines: copy it from one of them to the others.')


def is_finite(run):
    """Whether all numbers are finite that a checkpoint of the run would hold."""
    tensors = [*run.model.parameters(), *(run.ema.parameters() if run.ema else ())]
    tensors += [value for each in run.optimizers for state in each.state.values() for value in state.values()]
    return all(tensor.isfinite().all() for tensor in tensors if torch.is_tensor(tensor))


def restore(run, saved):
    """Load a saved state into a run, and print which knobs differ. Exits if that makes it a different run."""
    old, new = saved['knobs'], vars(run.config)  # knobs
    current = identity(run.corpus)
    changed = {knob: f'{knob} was {old[knob]!r}, now {new.get(knob)!r}' for knob in old if old[knob] != new.get(knob)}
    refused = [change for knob, change in changed.items() if knob in FIXED]
    # checkpoints of older versions lack the validation text
    refused += [f'a different {name}' for name in current if saved.get(name, current[name]) != current[name]]
    if refused:
        sys.exit(f'cannot resume: {"; ".join(refused)}. Use the command of the first run, or another --out_dir.')
    run.model.load_state_dict(saved['model'])
    for optimizer, state in zip(run.optimizers, saved['optimizers'], strict=True):
        optimizer.load_state_dict(state)
    if run.ema:
        run.ema.load_state_dict(saved['ema'])
    if saved['scaler']:  # empty where the scaler was off
        run.scaler.load_state_dict(saved['scaler'])
    run.step = saved['step']
    run.since_log, run.since_evaluation = saved.get('since_log', []), saved.get('since_evaluation', [])
    run.lowest = saved.get('lowest', run.lowest)
    for knob, change in changed.items():
        if knob not in ('out_dir', 'init_from', 'overwrite'):
            print0(f'resume: {change}')
    before, now = run.learning_rate(SimpleNamespace(**old)), run.learning_rate(run.config)
    if run.step < run.last_step and not math.isclose(before, now, rel_tol=0.01):
        print0(f'resume: the learning rate jumps from {before:.2e} to {now:.2e}, since its schedule has changed')
    done = ': nothing is left to train' if run.step >= run.last_step else ''
    print0(f'resumed at step {run.step} of {run.last_step}{done}')


def save(out_dir, state):
    """Write out_dir/ckpt.pt. It is on the disk before it takes the old file's name, so a whole one always exists."""
    path, new = out_dir / 'ckpt.pt', out_dir / 'ckpt.pt.new'
    try:
        with open(new, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        for name in RUN:
            (out_dir / f'{name}.replaced').unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch answers a full disk with a RuntimeError about its OSError
        free = ''
        with contextlib.suppress(OSError):  # the folder itself may be gone
            free = f' ({shutil.disk_usage(out_dir).free / 1e6:,.1f} MB are free)'
            new.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or 'the disk is full, or a limit is reached'
        sys.exit(f'{path} could not be saved: {reason}{free}. An earlier one, if any, is whole.')


def load(out_dir):
    """The state that save wrote, on the CPU. Exits if there is none or a checksum differs; executes nothing in it."""
    path = Path(os.path.expanduser(out_dir), 'ckpt.pt')
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # compares the checksum of each record
                raise ValueError(f'the checksum of {damaged} differs')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if 'vocabulary' not in state:  # nanoGPT's checkpoints have the same name
            raise ValueError('it holds no vocabulary')
        defaults, _ = configure([Path(__file__).with_name('train.py')], [])  # of knobs newer than the checkpoint
        return state | {'knobs': vars(defaults) | state['knobs']}
    except OSError as error:
        if not path.exists() and (path.parent / 'metrics.jsonl').exists():
            old = path.with_name('ckpt.pt.replaced')  # of move_aside
            rename = f' {old} and metrics.jsonl.replaced are the run before: rename both to keep it.'
            kept = rename if old.exists() else ''
            sys.exit(f'{path.parent} has no checkpoint yet: a run writes its first after a minute. If it was stopped '
                     f'before that, start it anew, without --init_from=resume.{kept}')  # fmt: skip
        found = {*path.parent.glob('*/ckpt.pt'), *path.parent.parent.glob('*/ckpt.pt')}
        runs = ', '.join(sorted(str(file.parent) for file in found)) or 'none'
        sys.exit(f'{path} cannot be read: {error.strerror}. Existing runs: {runs}.')
    except Exception as error:  # whatever zipfile, pickle and torch raise on arbitrary bytes
        reason = (str(error) or repr(error)).splitlines()[0]
        sys.exit(f'{path} is damaged or no checkpoint of this program: {reason}. train.py --overwrite starts over.')


def lock_folder(out_dir, is_new):
    """Make the folder and lock it until the file that is returned is closed, or the process ends, even by kill -9.
    Exits if another process holds the lock, or if a new run would lose the run in this folder."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = open(out_dir / 'lock', 'a', encoding='utf-8')
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f'{out_dir} is in use by a run that is still alive: wait for it, or choose another --out_dir.')
    except (ImportError, OSError) as error:  # Windows, some network file systems
        print(f'{out_dir} cannot be locked ({error}): make sure that no other run uses it', file=sys.stderr)
    if is_new and (out_dir / 'ckpt.pt').exists():
        sys.exit(f'{out_dir} holds a run: --init_from=resume continues, --overwrite deletes it, '
                 'a new --out_dir keeps it.')  # fmt: skip
    return lock


def move_aside(out_dir):
    """Rename the run that --overwrite gives up; save deletes it after the new run's first checkpoint."""
    for name in RUN if (out_dir / 'ckpt.pt').exists() else ():
        with contextlib.suppress(FileNotFoundError):
            os.replace(out_dir / name, out_dir / f'{name}.replaced')


def read_metrics(out_dir):
    """The JSON objects in metrics.jsonl, [] if there is none; a line that a kill or a crash damaged is left out."""
    path = out_dir / 'metrics.jsonl'
    lines = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            numbers = json.loads(line)
            lines += [numbers] if numbers['step'] >= 0 else []
    return lines


def open_metrics(out_dir, step):
    """metrics.jsonl, opened to append JSON objects, one a line, after what was recorded up to this step."""
    path = out_dir / 'metrics.jsonl'
    kept = ''.join(f'{json.dumps(line)}\n' for line in read_metrics(out_dir) if line['step'] <= step)
    if path.exists() and kept != path.read_text(encoding='utf-8', errors='replace'):
        new = out_dir / 'metrics.jsonl.new'
        new.write_text(kept, encoding='utf-8')
        os.replace(new, path)  # atomic: a kill loses no line
    return open(path, 'a', buffering=1, encoding='utf-8')


def record(metrics, **numbers):
    """Append a line; a number that is not finite becomes null, since JSON has neither NaN nor infinity."""
    finite = {name: n if n is None or math.isfinite(n) else None for name, n in numbers.items()}
    try:
        metrics.write(json.dumps(finite) + '\n')
    except OSError as error:
        sys.exit(f'{metrics.name} could not be written: {error.strerror}. The last checkpoint is whole.')


@contextlib.contextmanager
def signals_caught():
    """A list that receives the first of STOP_SIGNALS; the next one quits at once."""
    signals = []

    def remember(signum, frame):
        signals.append(signum)
        with contextlib.suppress(OSError):  # a closed terminal, or a tee that the same Ctrl-C has ended
            os.write(2, b'\nfinishing this step, then saving; once more to quit at once\n')  # print is unsafe here
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    # an ignored signal stays ignored: nohup's SIGHUP
    caught = [each for each in STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]
    handlers = {each: signal.signal(each, remember) for each in caught}
    try:
        yield signals
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def lost_output_stops(signals):
    """Output that cannot be written, as after a terminal is closed, stops the run as SIGPIPE would: it is saved."""
    try:
        yield
    except OSError:
        signals.append(13)  # SIGPIPE, a name that Windows lacks


def resume_command(*changes):
    """This run's command with --init_from=resume and changed knobs, ready to paste."""
    _, world_size = rank_and_world_size()
    per_node = int(os.environ.get('LOCAL_WORLD_SIZE', world_size))
    launcher = ['torchrun', f'--nproc_per_node={per_node}'] if world_size > 1 else ['python']
    if per_node < world_size:  # to be started on each of several machines
        launcher += [f'--nnodes={world_size // per_node}', '--rdzv_backend=c10d', '--rdzv_id=resume',
                     f'--rdzv_endpoint={os.environ["MASTER_ADDR"]}']  # fmt: skip
    replaced = {'--init_from', '--overwrite', *(change.partition('=')[0] for change in changes)}
    words = [word for word in sys.argv[1:] if word.partition('=')[0] not in replaced]
    return shlex.join([*launcher, sys.argv[0], *words, '--init_from=resume', *changes])


def next_commands(config, step):
    """What can be done with a finished run, a command a line: sample from it, see its curve, or train on."""
    program = Path(sys.argv[0])
    sample = shlex.join(['python', str(program.with_name('sample.py')), f'--out_dir={config.out_dir}'])
    plot = shlex.join(['python', str(program.with_name('plot.py')), config.out_dir])
    rises = config.lr_schedule == 'cosine' and not (config.stop_epoch and config.stop_epoch < config.epochs)
    if config.max_iters is not None:
        changes = [f'--max_iters={2 * step}']
    elif config.stop_epoch and config.stop_epoch < config.epochs:
        changes = [f'--stop_epoch={config.stop_epoch + 1}']
    else:
        changes = [f'--epochs={config.epochs + 1}', *(['--stop_epoch=None'] if config.stop_epoch else [])]
    warning = '  # a longer cosine: the learning rate rises again' if rises else ''
    return f'sample more:   {sample}\nsee its curve: {plot}\ntrain on:      {resume_command(*changes)}{warning}'

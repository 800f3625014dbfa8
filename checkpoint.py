"""What makes a run safe to stop: its folder, its checkpoint, its metrics, and the signals that end it.

A run's folder holds ckpt.pt (all that it takes to go on), metrics.jsonl (a line per log line and evaluation) and lock.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import torch

# a resumed run must have these as they were, or it would be another run
FIXED = ('model n_layer n_head n_embd d_ff block_size activation position embedding_norm head_gate '
         'value_residual optimizer muon_steps weight_decay ema_decay seed batch_size').split()  # fmt: skip
RUN = ('metrics.jsonl', 'ckpt.pt')  # a run's files; without the last there is none, so it is moved last


def lock_folder(out_dir, fresh):
    """Make the folder and lock it: until the process ends, even by kill -9, or closes the file that is returned. Exits
    if another process has the lock; exits if fresh and the folder holds a run."""
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = open(out_dir / 'lock', 'w', encoding='utf-8')
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f'{out_dir} is in use by a run that is still alive: wait for it, or choose another --out_dir.')
    except (ImportError, OSError) as error:  # Windows, some network file systems
        print(f'{out_dir} cannot be locked ({error}): take care that no other run uses it', file=sys.stderr)
    if fresh and (out_dir / 'ckpt.pt').exists():
        sys.exit(f'{out_dir} holds a run: --init_from=resume goes on, --overwrite loses it, a new --out_dir keeps it.')
    return lock


def move_aside(out_dir):
    """Keep a run that is to be lost until another's first checkpoint is whole; what never had one is no run."""
    for name in RUN if (out_dir / 'ckpt.pt').exists() else ():
        with contextlib.suppress(FileNotFoundError):
            os.replace(out_dir / name, out_dir / f'{name}.old')


def save(out_dir, state):
    """Write out_dir/ckpt.pt by torch.save. Whatever happens, the old file or the new one is whole: the new one is
    written beside the old one, flushed to the disk, and takes its name."""
    path, new = out_dir / 'ckpt.pt', out_dir / 'ckpt.pt.new'
    try:
        with open(new, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        for name in RUN:
            (out_dir / f'{name}.old').unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch answers a full disk with a RuntimeError about its OSError
        reason, free = error.__context__ or error, ''
        with contextlib.suppress(OSError):  # the folder itself may be gone
            free = f' ({shutil.disk_usage(out_dir).free / 1e6:,.1f} MB are free)'
            new.unlink(missing_ok=True)
        sys.exit(f'{path} could not be saved: {reason}{free}. One from before, if any, is whole.')


def load(out_dir):
    """The state that save wrote, on the CPU. Exits if there is none or a checksum differs; executes nothing in it."""
    path = Path(os.path.expanduser(out_dir), 'ckpt.pt')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares the checksum of each record
        if damaged:
            raise ValueError(f'the checksum of {damaged} differs')
        state = torch.load(path, map_location='cpu', weights_only=True)
        if 'vocabulary' not in state:  # nanoGPT's has the same name
            raise ValueError('it holds no vocabulary')
        return state
    except OSError as error:
        runs = ', '.join(sorted(str(file.parent) for file in path.parent.parent.glob('*/ckpt.pt'))) or 'none'
        sys.exit(f'{path} cannot be read: {error.strerror}. Runs that are there: {runs}.')
    except Exception as error:  # whatever zipfile, pickle and torch say of any bytes
        reason = (str(error) or repr(error)).splitlines()[0]
        sys.exit(f'{path} is damaged or no checkpoint of this program: {reason}. train.py --overwrite begins anew.')


def state_of(run):
    """All that it takes to go on, as tensors and plain Python values."""
    return {
        'model': run.model.state_dict(),
        'optimizers': [optimizer.state_dict() for optimizer in run.optimizers],
        'ema': run.ema and run.ema.state_dict(),
        'scaler': run.scaler.state_dict(),
        'step': run.step,
        'knobs': vars(run.c),
        'vocabulary': run.corpus.vocabulary,
        'corpus': run.corpus.meta['sha256']['train.bin'],
    }


def restore(run, saved):
    """Take up a saved state; returns what differs in the knobs, a text each. Exits if that makes it another run."""
    was, now, state = saved['knobs'], vars(run.c), state_of(run)
    changed = {knob: f'{knob} was {was[knob]!r}, now {now.get(knob)!r}' for knob in was if was[knob] != now.get(knob)}
    refused = [change for knob, change in changed.items() if knob in FIXED]
    refused += [f'another {name}' for name in ('corpus', 'vocabulary') if saved[name] != state[name]]
    if refused:
        sys.exit(f'cannot resume: {"; ".join(refused)}. Use the command of the first run, or another --out_dir.')
    run.model.load_state_dict(saved['model'])
    for optimizer, its_state in zip(run.optimizers, saved['optimizers'], strict=True):
        optimizer.load_state_dict(its_state)
    if run.ema:
        run.ema.load_state_dict(saved['ema'])
    if saved['scaler']:  # one that was off has no state
        run.scaler.load_state_dict(saved['scaler'])
    run.step = saved['step']
    return [change for knob, change in changed.items() if knob not in ('out_dir', 'init_from', 'overwrite')]


def open_metrics(out_dir, step):
    """metrics.jsonl to append to: a JSON object per line, cut back to the step from which the run goes on."""
    path, kept = out_dir / 'metrics.jsonl', ''
    lines = path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a damaged line is cut off
            kept += (line + '\n') * (json.loads(line)['step'] <= step)
    if kept != lines:
        new = out_dir / 'metrics.jsonl.new'
        new.write_text(kept, encoding='utf-8')
        os.replace(new, path)  # all at once: a kill loses no line
    return open(path, 'a', buffering=1, encoding='utf-8')


def record(metrics, **numbers):
    """Add a line; a number that is not finite is null, since JSON has no other word for it."""
    finite = {name: n if n is None or math.isfinite(n) else None for name, n in numbers.items()}
    try:
        metrics.write(json.dumps(finite) + '\n')
    except OSError as error:
        sys.exit(f'{metrics.name} could not be written: {error.strerror}. The last checkpoint is whole.')


@contextlib.contextmanager
def signals_caught():
    """A list to which the first SIGINT, SIGTERM or SIGHUP inside is added; the next one quits at once."""
    signals = []

    def remember(signum, frame):
        signals.append(signum)
        os.write(2, b'\nfinishing this step, then saving; once more to quit at once\n')  # print is not for handlers
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)

    signums = {signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', signal.SIGTERM)}  # Windows has no SIGHUP
    # one that is ignored stays so: nohup's SIGHUP
    handlers = {each: signal.signal(each, remember) for each in signums if signal.getsignal(each) != signal.SIG_IGN}
    try:
        yield signals
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)

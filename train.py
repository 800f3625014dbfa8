"""Train one row of the log, or a model of your own.

    python train.py config/swiglu.py                       on any machine
    python train.py config/swiglu.py config/cpu.py         a coffee break on a laptop
    python train.py config/swiglu.py --init_from=resume    go on where it was stopped
    torchrun --nproc_per_node=4 train.py config/swiglu.py  one process a GPU

Knobs, set-up, the training step, evaluation, checkpoints, then the loop. Needs model, optim, data, configurator.
"""

import atexit
import codecs
import contextlib
import ctypes
import gc
import hashlib
import io
import json
import math
import os
import pickle
import shlex
import signal
import struct
import sys
import time
import timeit
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import configure
from data import Batches, open_corpus, validation_batches, vocab_size_of
from model import ACTIVATION, ATTENTION, MODELS, Config, choose_attention
from optim import OPTIMIZERS, SCHEDULES, create_ema, create_optimizer, learning_rate_at

# ---- knobs: the log's row 5; a config file or --name=value changes them --------------------------------------------

# the run
out_dir: str | None = None  # where the run is kept; None: out/ + the name of the config
init_from = 'scratch'  # 'scratch', or 'resume': go on from out_dir's checkpoint
overwrite = False  # start over although out_dir holds a run: that run is lost
seed = 1  # of the initial weights, the order of the data and dropout
eval_interval = 500  # steps between evaluations, each followed by a checkpoint; epochs end with one anyway
log_interval = 20  # steps between log lines
# data
dataset = 'stdlib'  # a name that data.py prepared, a known name, or a path, which is prepared first
batch_size = 20  # sequences a step, over all processes and micro-steps
block_size = 1024  # tokens a sequence: the context length
gradient_accumulation_steps = 1  # micro-steps that share the batch: the same update in less memory
# model
model = 'flash'  # 'flash', or 'torch': PyTorch's tutorial model
n_layer = 6  # blocks
n_head = 5  # attention heads
n_embd = 200  # width of the stream
d_ff = 200  # width of the feed-forward: the log's "model width"
activation = 'gelu'  # 'gelu' or 'swiglu'
position = 'rotary'  # 'rotary' or 'learned'
dropout = 0.0  # share of activations set to 0 in training
embedding_norm = False  # scale every token's embedding to a mean square of 1
head_gate = False  # let every token turn each attention head up or down
attention = 'auto'  # 'flash' (flash-attn), 'sdpa', 'chunked', 'naive' (see model.py), or 'auto': the fastest here
# optimizer
optimizer = 'adamw'  # 'sgd', 'adam', 'adamw', or 'muon' with AdamW for what is no matrix of a block
learning_rate = 1e-4  # the peak, after warmup
lr_schedule = 'cosine'  # 'constant' or 'cosine'
warmup_iters = 0  # steps of linear warmup
min_lr = 0.0  # where the cosine ends
weight_decay = 0.1  # on matrices and tables, not on vectors
grad_clip = 1.0  # largest norm of the whole gradient; 0: no clipping
ema_decay = 0.0  # of the moving average of the weights; 0: none
epochs = 3  # passes over the data
max_iters: int | None = None  # stop after so many steps instead of epochs; 0: print the headline only
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', or 'auto': cuda, else mps, else cpu
dtype = 'auto'  # 'float32', 'bfloat16', 'float16', or 'auto': bfloat16 where it is fast
compile: bool | None = None  # torch.compile the model; None: on CUDA only
cuda_graph = False  # CUDA: record the step once, then replay it

# --------------------------------------------------------------------------------------------------------------------

CHOICES = {
    'init_from': ('scratch', 'resume'),
    'model': MODELS,
    'activation': ACTIVATION,
    'position': ('rotary', 'learned'),
    'attention': ('auto', *ATTENTION),
    'optimizer': OPTIMIZERS,
    'lr_schedule': SCHEDULES,
    'dtype': ('auto', 'float32', 'bfloat16', 'float16'),
}
AT_LEAST_1 = ('eval_interval log_interval batch_size block_size gradient_accumulation_steps n_layer n_head n_embd '
              'd_ff epochs').split()  # fmt: skip
AT_LEAST_0 = 'seed dropout learning_rate warmup_iters min_lr weight_decay grad_clip ema_decay max_iters'.split()
BELOW_1 = ('dropout', 'ema_decay')
OPTIMIZER_NAMES = {'sgd': 'SGD', 'muon': 'Muon'}  # in the headline; the log calls AdamW Adam
# a resumed run must have these as they were, or it would be another run
FIXED = ('model n_layer n_head n_embd d_ff block_size activation position embedding_norm head_gate optimizer seed '
         'batch_size').split()  # fmt: skip


def check_knobs(c):
    """Exit with one line if a knob's value makes no sense."""
    for name, value in vars(c).items():
        if name in CHOICES and value not in CHOICES[name]:
            sys.exit(f'{name} is {value!r}, expected one of: {", ".join(CHOICES[name])}.')
        low = 1 if name in AT_LEAST_1 else 0
        if name in AT_LEAST_1 + AT_LEAST_0 and value is not None and value < low:
            sys.exit(f'{name} is {value}, expected at least {low}.')
        if name in BELOW_1 and value >= 1:
            sys.exit(f'{name} is {value}, expected less than 1.')


class Machine(namedtuple('Machine', 'device dtype compile cuda_graph attention reason')):
    """What a run computes with, printed at its start; the knobs of these names override it. reason: why this
    attention."""

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def choose_machine(c):
    """The Machine that the knobs ask for; exits with one line if this computer has no such thing."""
    name = c.device
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    kind, _, index = name.partition(':')
    if kind not in ('cpu', 'cuda', 'mps') or index and not index.isdigit():
        sys.exit(f"device is {name!r}, expected 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'.")
    device = torch.device(name)
    if kind == 'cuda':
        device = torch.device('cuda', int(index or os.environ.get('LOCAL_RANK', 0)))
        if device.index >= (n := torch.cuda.device_count()):
            sys.exit(f'device is {name!r}, but PyTorch sees {n} CUDA devices; try --device=cpu.')
        torch.cuda.set_device(device)
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            torch.cuda.set_stream(torch.cuda.Stream())  # nothing can be recorded on the default one
        torch.set_float32_matmul_precision('high')  # TF32 where a matmul is in float32
    if kind == 'mps' and not torch.backends.mps.is_available():
        sys.exit("device is 'mps', but this computer has none; try --device=cpu.")
    if kind == 'cpu':
        keep_freed_memory()
    dtype = c.dtype
    if dtype == 'auto':
        dtype = 'bfloat16' if has_fast_bfloat16(device) else 'float32'
    dtype = getattr(torch, dtype)
    attention, reason = 'sdpa', "nn.MultiheadAttention's own choice"
    if c.model == 'flash':
        attention, reason = choose_attention(c.attention, device, dtype, c.dropout)
    if c.cuda_graph and (kind != 'cuda' or dtype == torch.float16 or 'RANK' in os.environ):
        sys.exit('cuda_graph needs a CUDA device, bfloat16 or float32, and one process: leave it off here.')
    compile = kind == 'cuda' if c.compile is None else c.compile
    return Machine(device, dtype, compile, c.cuda_graph, attention, reason)


def has_fast_bfloat16(device):
    """Whether a step takes less time in bfloat16. A CPU is asked for a matrix product in both: only where bfloat16 is
    three times as fast (AMX, or AVX-512 on a recent AMD) does that pay for converting to and fro."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != 'cpu':
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=10))
    return seconds[torch.float32] > 3 * seconds[torch.bfloat16]


def keep_freed_memory():
    """glibc gives large blocks back to the system when they are freed, and the system clears them when they are asked
    for anew, in every step: a sixth of its time (swiglu, 4 x 1024, two cores of an AMD EPYC)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc has no such setting, Windows no libc
        for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: its largest
            ctypes.CDLL(None).mallopt(option, value)


def build_model(c, vocab_size, attention='sdpa'):
    """The model that the knobs describe, its initial weights a pure function of them and of the seed."""
    torch.manual_seed(c.seed)
    shape = {name: getattr(c, name) for name in Config.__dataclass_fields__ if hasattr(c, name)}
    return MODELS[c.model](Config(**{**shape, 'vocab_size': vocab_size, 'attention': attention}))


def headline(c, vocab_size):
    """What this run is, in the log's words."""
    with torch.device('meta'):  # counted, not allocated
        n_params = build_model(c, vocab_size).num_params()
    flash = c.model == 'flash'
    rate = c.learning_rate
    rate = str(rate) if rate >= 0.01 else np.format_float_scientific(rate, trim='-', exp_digits=1)
    parts = [
        f'{c.n_layer} layer {"(flash attention) " if flash else ""}transformer ({n_params} parameters)',
        'swiglu activation' if flash and c.activation == 'swiglu' else '',
        f'model width {c.d_ff}' if c.d_ff >= 2 * c.n_embd else '',  # the log names it where it is the news
        f'{c.position} position embeddings' if flash else '',
        'embedding norm' if flash and c.embedding_norm else '',
        'head gates' if flash and c.head_gate else '',
        f'batch size {c.batch_size}',
        f'{OPTIMIZER_NAMES.get(c.optimizer, "Adam")} learning rate {rate}',
        f'dropout {c.dropout}',
        f'weight decay {c.weight_decay}' if c.weight_decay else '',
        'cosine learning rate schedule' if c.lr_schedule == 'cosine' else '',
    ]
    line = ', '.join(part for part in parts if part) + (' with warmup' if c.warmup_iters else '')
    return line + (', ema' if c.ema_decay else '')


class Recorded:
    """A function without arguments, for CUDA: its third call is recorded, and replayed then and ever after. One launch
    takes the place of hundreds, which a small model's GPU ends sooner than Python starts them. The two calls before it
    compile, allocate and create the optimizer's state. What changes between calls has to change in place."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self):
        self.calls += 1
        if self.calls < 3:
            return self.function()
        if self.calls == 3:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.results = self.function()
        self.graph.replay()
        return [result.clone() for result in self.results]  # the next replay writes over them


class Run:
    """All that a training step touches: model, optimizer, EMA, data, and this process's place among the others."""

    def __init__(self, c, corpus, machine):
        self.c, self.corpus, self.device = c, corpus, machine.device
        self.dtype = str(machine.dtype).removeprefix('torch.')
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.parts = self.world * c.gradient_accumulation_steps
        if c.batch_size % self.parts:
            sys.exit(f'batch_size={c.batch_size} cannot be shared evenly by {self.world} processes times '
                     f'{c.gradient_accumulation_steps} micro-steps: make it a multiple of {self.parts}.')  # fmt: skip
        self.raw = build_model(c, corpus.meta['vocab_size'], machine.attention).to(self.device)
        self.optimizer = create_optimizer(self.raw, c.optimizer, c.learning_rate, c.weight_decay)
        self.ema = create_ema(self.raw, c.ema_decay) if c.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=machine.dtype == torch.float16)
        self.autocast = machine.autocast()
        self.stateful = {'model': self.raw, 'optimizer': self.optimizer, 'ema': self.ema, 'scaler': self.scaler}
        self.model = torch.compile(self.raw, dynamic=False) if machine.compile else self.raw
        self.replica = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.batches = Batches(corpus.train, c.batch_size, c.block_size, c.seed, self.device)
        self.total = self.batches.end_of_epoch(c.epochs) if c.max_iters is None else c.max_iters
        self.step = self.evaluated = 0  # updates done; the step that was evaluated last
        self.epoch_loss = torch.zeros(2, device=self.device)  # sum over this epoch's steps so far, their number
        self.starts = self.batches.starts(0, self.rank, self.world).to(self.device)  # of this step's sequences
        self.rate = None  # the learning rate, where a recorded update reads it from memory
        if machine.cuda_graph:
            self.gradient, self.update = Recorded(self.gradient), Recorded(self.update)
            self.rate = torch.zeros((), device=self.device)

    def train_step(self):
        """One update of the weights. Returns the batch's mean loss (of this process's share) and its gradient's norm;
        raises FloatingPointError before the update if either is not finite."""
        c = self.c
        rate = learning_rate_at(self.step, peak=c.learning_rate, schedule=c.lr_schedule, warmup_iters=c.warmup_iters,
                                total=self.total, min_lr=c.min_lr)  # fmt: skip
        rate = rate if self.rate is None else self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group.update(lr=rate, capturable=self.rate is not None)
        # dropout, too, is a pure function of (seed, step): no generator's state has to be saved to repeat it
        torch.manual_seed(int(np.random.SeedSequence((c.seed, self.step, self.rank)).generate_state(1)[0]))
        self.starts.copy_(self.batches.starts(self.step, self.rank, self.world))
        self.replica.train()
        loss, norm = self.gradient()
        if not norm.isfinite() and not self.scaler.is_enabled():  # a scaler skips such a step by itself
            raise FloatingPointError(f'loss {loss:.4g} and gradient norm {norm:.4g} at step {self.step + 1}')
        self.update()
        if self.ema:
            self.ema.update_parameters(self.raw)
        self.step += 1
        return loss, norm

    def gradient(self):
        """Leave the clipped gradient of the batch at self.starts in the weights' .grad; returns its loss and norm."""
        c, parts = self.c, self.c.gradient_accumulation_steps
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part, starts in enumerate(self.starts.chunk(parts)):
            x, y = self.batches.read(starts)
            waits = self.world > 1 and part < parts - 1  # the processes exchange gradients once a step
            with self.replica.no_sync() if waits else contextlib.nullcontext(), self.autocast:
                loss = self.replica(x, y) / parts
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), c.grad_clip or math.inf)
        self.epoch_loss += torch.stack((total, torch.ones_like(total)))
        return total, norm

    def update(self):
        """Change the weights by their .grad."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return ()

    @torch.no_grad()
    def evaluate(self, model):
        """The model's loss in nats per token over every validation token once; the processes share the work."""
        model.eval()
        total = torch.zeros(1)
        rows = self.c.batch_size // self.parts
        for i, (x, y) in enumerate(validation_batches(self.corpus.val, rows, self.c.block_size)):
            if i % self.world == self.rank:
                with self.autocast:
                    loss = model(x.to(self.device), y.to(self.device))
                total += loss.cpu() * (y >= 0).sum()
        return self.sum_over_processes(total).item() / (len(self.corpus.val) - 1)

    def sum_over_processes(self, tensor):
        tensor = tensor.to(self.device)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def signal(self, caught):
        """The signal caught, or 0; the processes agree on it, as they must stop at the same step."""
        signum = torch.tensor(caught[0] if caught else 0)
        if self.world > 1:
            signum = signum.to(self.device)
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)

    def state(self):
        """All that it takes to go on, as tensors and plain Python values."""
        return {
            **{name: part and part.state_dict() for name, part in self.stateful.items()},
            'step': self.step,
            'evaluated': self.evaluated,
            'epoch_loss': self.epoch_loss,
            'knobs': {**vars(self.c), 'dtype': self.dtype},  # what 'auto' chose here: elsewhere it may be another
            'vocabulary': self.corpus.vocabulary,
            'corpus': self.corpus.meta['train']['sha256'],
        }

    def restore(self, saved):
        """Take up a state; exits if the knobs, corpus or vocabulary make this another run, prints what else differs."""
        now, changed = self.state(), {}
        for knob, was in saved['knobs'].items():
            if was != now['knobs'].get(knob):
                changed[knob] = f'{knob} was {was!r}, now {now["knobs"].get(knob)!r}'
        refused = [change for knob, change in changed.items() if knob in FIXED]
        refused += [f'another {k}' for k in ('corpus', 'vocabulary') if saved[k] != now[k]]
        if (saved['ema'] is None) != (now['ema'] is None):
            refused.append('ema_decay turned on or off')
        if refused:
            sys.exit(f'cannot resume: {"; ".join(refused)}. Use the command of the first run, or another --out_dir.')
        for knob, change in changed.items():
            if knob not in ('out_dir', 'init_from', 'overwrite'):
                say(f'resume: {change}')
        decays = [group['weight_decay'] for group in self.optimizer.param_groups]
        for name, part in self.stateful.items():
            if part and saved[name]:  # a scaler that was off has no state
                part.load_state_dict(saved[name])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group['weight_decay'] = decay  # the knob's, which may have changed, not the saved one
        self.step, self.evaluated = saved['step'], saved['evaluated']
        self.epoch_loss = saved['epoch_loss'].to(self.device)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def save_checkpoint(out_dir, state):
    """Write out_dir/ckpt.pt: a torch.save file, followed by its SHA-256. Whatever happens, an old or a new one is
    whole: it is written beside the old one, flushed to the disk, and renamed; the old one stays as ckpt_prev.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    path, new = out_dir / 'ckpt.pt', out_dir / 'ckpt.pt.new'
    try:
        with open(new, 'wb') as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, out_dir / 'ckpt_prev.pt')
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        sys.exit(f'{path} could not be saved, it needs {len(data):,} bytes: {error.strerror}. The one before is whole.')


def load_checkpoint(out_dir):
    """The state that save_checkpoint wrote, on the CPU. Exits if there is none or its checksum does not fit; nothing
    in it is executed."""
    path, previous = Path(out_dir) / 'ckpt.pt', Path(out_dir) / 'ckpt_prev.pt'
    if not path.exists() and previous.exists():
        path = previous  # the process died between the two renames
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            back = f'go back to the one before it: mv {previous} {path}'
            remedy = back if path != previous and previous.exists() else 'start over: --overwrite'
            sys.exit(f'{path} is damaged: its checksum does not fit its {len(data):,} bytes; {remedy}')
        return torch.load(io.BytesIO(data[:-32]), map_location='cpu', weights_only=True)
    except OSError as error:
        sys.exit(f'{path} cannot be read: {error.strerror}. '
                 'Without --init_from=resume, train.py starts a new run there.')  # fmt: skip
    except (pickle.UnpicklingError, RuntimeError, EOFError, struct.error) as error:
        sys.exit(f'{path} is not a checkpoint of this program: {(str(error) or "it ends early").splitlines()[0]}')


def claim(c, out_dir):
    """Make out_dir this process's own until it closes the locked file that is returned, or ends, however it ends;
    exits if a run is there that could be lost."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / 'lock', 'w')
    except OSError as error:
        sys.exit(f'{out_dir} cannot be used as a folder for the run: {error.strerror}. Choose another --out_dir.')
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows has no flock: two runs in one out_dir are not told apart there
    except BlockingIOError:
        sys.exit(f'{out_dir} is in use by a run that is still alive: wait for it, or choose another --out_dir.')
    files = [out_dir / name for name in ('ckpt.pt', 'ckpt_prev.pt', 'metrics.jsonl')]
    if c.init_from == 'scratch':
        if any(file.exists() for file in files[:2]) and not c.overwrite:
            sys.exit(f'{out_dir} holds a run already: add --init_from=resume to go on, --overwrite to lose it, '
                     'or choose another --out_dir.')  # fmt: skip
        for file in files:
            file.unlink(missing_ok=True)
    return lock


# ---- the loop ------------------------------------------------------------------------------------------------------


def say(line):
    """Print a line above the progress bar, from the first process only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(line)


def open_metrics(path, step):
    """metrics.jsonl to append to: one JSON object a log line or evaluation, cut back to where a resumed run starts."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith('}') and json.loads(line)['step'] <= step]
    path.write_text(''.join(line + '\n' for line in kept))
    return open(path, 'a', buffering=1)


def record(metrics, **numbers):
    if metrics:  # the first process has it open
        metrics.write(json.dumps(numbers) + '\n')


def train(run, out_dir, caught):
    """Train until run.total steps are done or a signal is caught; returns the signal's number, or 0."""
    c, batches = run.c, run.batches
    metrics = open_metrics(out_dir / 'metrics.jsonl', run.step) if run.rank == 0 else None
    bar = tqdm(total=run.total, initial=run.step, unit='batch', disable=None if run.rank == 0 else True)
    losses, seconds, epoch_steps, epoch_seconds = [], 0.0, 0, 0.0
    while True:
        # chores come before the step, so that the last update is evaluated and saved like every other
        epoch = batches.epochs_after(run.step)
        epoch_ended = int(epoch) > int(batches.epochs_after(run.step - 1))
        finished = run.step >= run.total
        signum = run.signal(caught)
        due = run.evaluated < run.step and (epoch_ended or finished or run.step % c.eval_interval == 0)
        if due and not signum:
            steps = epoch_steps + len(losses)  # logged, and since
            speed = steps * c.batch_size * c.block_size / max(epoch_seconds + seconds, 1e-9)  # tokens a second
            report(run, metrics, int(epoch) if epoch_ended else epoch, speed)
            if epoch_ended:
                run.epoch_loss.zero_()
                epoch_steps, epoch_seconds = 0, 0.0
        if run.rank == 0 and (due or signum):
            save_checkpoint(out_dir, run.state())
        if finished or signum:
            break

        start = time.perf_counter()
        loss, norm = run.train_step()
        losses.append(loss)
        seconds += time.perf_counter() - start

        bar.update()
        if run.step % c.log_interval == 0:
            loss = (run.sum_over_processes(torch.stack(losses).mean()) / run.world).item()
            epoch = int(batches.epochs_after(run.step - 1)) + 1
            begin, end = batches.end_of_epoch(epoch - 1), batches.end_of_epoch(epoch)
            lr, ms = float(run.optimizer.param_groups[0]['lr']), seconds / len(losses) * 1e3
            say(f'epoch {epoch:2d} | {run.step - begin:5d}/{end - begin} batches | lr {lr:.2e} | ms/batch {ms:6.1f} | '
                f'loss {loss:6.3f} | gradient norm {norm.item():5.2f}')  # fmt: skip
            bar.set_postfix(epoch=epoch, loss=f'{loss:.2f}', refresh=False)
            record(metrics, step=run.step, epoch=epoch, lr=lr, ms_per_batch=ms, loss=loss, grad_norm=norm.item())
            epoch_steps, epoch_seconds = epoch_steps + len(losses), epoch_seconds + seconds
            losses, seconds = [], 0.0
    bar.close()
    return signum


def report(run, metrics, epoch, tokens_per_second):
    """Evaluate; print the log's line and the details, and write them to metrics.jsonl."""
    val = run.evaluate(run.model)
    ema = run.evaluate(run.ema.module) if run.ema else None
    loss_sum, steps = run.sum_over_processes(run.epoch_loss.clone()).tolist()
    facts = run.corpus.meta['val']
    per_byte = val * facts['tokens'] / facts['bytes'] / math.log(2)
    say(f'epoch {epoch:.3g} loss: {val:.2f}' + (f' ema_loss: {ema:.2f}' if run.ema else ''))
    say(f'    training loss {loss_sum / steps:.3f} | perplexity {math.exp(val):.2f} | {per_byte:.3f} bits per byte | '
        f'{tokens_per_second:,.0f} tokens/s')  # fmt: skip
    record(metrics, step=run.step, epoch=epoch, val_loss=val, ema_loss=ema, train_loss=loss_sum / steps,
           bits_per_byte=per_byte, tokens_per_s=tokens_per_second)  # fmt: skip
    run.evaluated = run.step


def stream_text(model, encoding, prompt, max_new_tokens, **options):
    """Yields the model's continuation of a prompt as text, as it comes; it stops at <|endoftext|>.
    options: temperature, top_k and generator of model.generate."""
    model.eval()
    device = next(model.parameters()).device
    ids = torch.tensor([[encoding.eot_token, *encoding.encode_ordinary(prompt)]], device=device)  # a document's start
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character may be spread over several tokens
    for token in model.generate(ids, max_new_tokens, **options):
        if token.item() == encoding.eot_token:
            break
        yield decoder.decode(encoding.decode_single_token_bytes(token.item()))
    yield decoder.decode(b'', final=True)


def catch_signals():
    """A list that the first SIGINT or SIGTERM is added to; the next one quits at once."""
    caught = []

    def remember(signum, frame):
        caught.append(signum)
        os.write(2, b'\nfinishing this step, then saving; once more to quit at once\n')  # print is not for handlers
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, remember)
    return caught


def open_run(c, out_dir, machine):
    """The corpus, and out_dir's lock. Under torchrun the processes are joined here, and the first of them prepares the
    corpus and holds the lock while the others wait."""
    if 'RANK' in os.environ:
        dist.init_process_group('nccl' if machine.device.type == 'cuda' else 'gloo')
        atexit.register(dist.destroy_process_group)
        atexit.register(gc.collect)  # runs first: gloo may abort while a DistributedDataParallel, a cycle, is there
    first = not dist.is_initialized() or dist.get_rank() == 0
    lock = claim(c, out_dir) if first else None
    corpus = open_corpus(c.dataset) if first else None
    if dist.is_initialized():
        dist.barrier()
    return corpus or open_corpus(c.dataset), lock


def train_or_exit(run, out_dir, machine, resume):
    """train(), with what can stop it said in one line; a caught signal exits with 128 + its number."""
    try:
        signum = train(run, out_dir, catch_signals())
    except FloatingPointError as error:
        sys.exit(f'{error}: stopped before the update; likely too high a learning_rate, too short a warmup, or '
                 'float16. The last checkpoint is whole: '
                 f'{resume} --learning_rate={run.c.learning_rate / 2}')  # fmt: skip
    except torch.OutOfMemoryError:
        sys.exit(out_of_memory(run.c, machine))
    except OSError as error:  # a full disk may strike metrics.jsonl before a checkpoint
        sys.exit(f'{out_dir} could not be written: {error.strerror}. The last checkpoint is whole: {resume}')
    finally:  # nothing is left to save: a signal quits
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signum:
        say(f'stopped at step {run.step} and saved; go on with: {resume}')
        leave(run, 128 + signum)


def leave(run, code):
    """Exit, all being written. Several processes do it at once: gloo now and then aborts while it is taken down."""
    if run.world > 1:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def out_of_memory(c, machine):
    more, less = 2 * c.gradient_accumulation_steps, max(1, c.batch_size // 2)
    return (f'{machine.device} is out of memory: --gradient_accumulation_steps={more} gives the same update in about '
            f'half of it, --batch_size={less} a smaller one.'
            + (' --cuda_graph=False takes less, too.' if c.cuda_graph else ''))  # fmt: skip


def end(run, out_dir, resume, files):
    """Print what the model writes now, and how to go on."""
    generator = torch.Generator(run.device).manual_seed(run.c.seed)
    best = run.ema.module if run.ema else run.raw
    text = stream_text(best, run.corpus.encoding, '', 200, temperature=0.8, top_k=50, generator=generator)
    with run.autocast:
        print('\n', *text, '\n', sep='')
    print(f'sample more: python sample.py --out_dir={out_dir}')
    longer = f'--epochs={run.c.epochs + 1}' if run.c.max_iters is None else f'--max_iters={2 * run.c.max_iters}'
    print(f'train on:    {resume} {longer}')
    print(f'time it:     python bench.py {" ".join(files[:1])}')


def main():
    c, files = configure([__file__], sys.argv[1:])
    check_knobs(c)
    if c.max_iters == 0:
        print(headline(c, vocab_size_of(c.dataset)))
        return
    machine = choose_machine(c)
    out_dir = Path(c.out_dir or 'out/' + ('_'.join(Path(file).stem for file in files) or 'default'))
    corpus, lock = open_run(c, out_dir, machine)
    if dist.is_initialized() and machine.device.type == 'cpu':  # each has measured whether bfloat16 is fast: they agree
        machines = [machine]
        dist.broadcast_object_list(machines)
        [machine] = machines
    with lock or contextlib.nullcontext():
        run = Run(c, corpus, machine)
        say(headline(c, corpus.meta['vocab_size']))
        say(f'device: {machine.device}' + (f', {run.world} processes' if run.world > 1 else ''))
        say(f'dtype: {run.dtype}' + ', compiled' * machine.compile + ', recorded' * machine.cuda_graph)
        say(f'attention: {machine.attention} ({machine.reason})')
        say(f'corpus: {c.dataset}, {len(corpus.train):,} tokens, {run.batches.end_of_epoch(1):,} batches an epoch')
        if c.init_from == 'resume':
            run.restore(load_checkpoint(out_dir))
            say(f'resumed at step {run.step} of {run.total}')
        words = [word for word in sys.argv[1:] if not word.startswith(('--init_from', '--overwrite'))]
        launcher = ['torchrun', f'--nproc_per_node={run.world}'] if run.world > 1 else ['python']
        resume = shlex.join([*launcher, 'train.py', *words, '--init_from=resume'])
        train_or_exit(run, out_dir, machine, resume)
        if run.rank == 0:
            end(run, out_dir, resume, files)
    if run.world > 1:
        leave(run, 0)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:  # before the loop, which saves on Ctrl-C, or after it
        sys.exit(130)

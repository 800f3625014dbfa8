"""Train one row of the log, or a model of your own.

    python train.py config/best.py config/cpu.py           a coffee break on a laptop
    python train.py config/swiglu.py                       a row of the log
    python train.py config/swiglu.py --init_from=resume    go on where it was stopped
    torchrun --nproc_per_node=4 train.py config/swiglu.py  one process per GPU

Read it from top to bottom: knobs, checks, headline, step, loop, program. It needs all but sample.py and bench.py.
"""

import contextlib
import copy
import itertools
import math
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from configurator import configure, run_program
from data import Batches, open_corpus, validation_batches, vocab_size_of
from machine import autocast, choose_machine, compile_model, over_processes, processes, say
from model import build_model
from optim import create_optimizers, learning_rate_at, update_average

# ---- knobs: the log's row 5; a config file or --name=value changes them --------------------------------------------

# the run
out_dir: str | None = None  # where the run is kept; None: out/ + the name of the config
init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'  # 'resume': go on in out_dir; 'auto': if there is a run
overwrite = False  # start over although out_dir holds a run, which is lost when the new one's first checkpoint is whole
seed = 1  # of the initial weights, the order of the data and dropout
eval_interval = 500  # steps between evaluations, each followed by a checkpoint; epochs end with one anyway
log_interval = 20  # steps between log lines
# data
dataset = 'stdlib'  # a name that data.py prepared, a known name, or a path, which is prepared first
batch_size = 20  # sequences per step, over all processes and micro-steps
block_size = 1024  # tokens per sequence: the context length
gradient_accumulation_steps = 1  # micro-steps that share the batch: the same update in less memory
# model
model: Literal['flash', 'torch'] = 'flash'  # 'torch': PyTorch's tutorial model
n_layer = 6  # blocks
n_head = 5  # attention heads
n_embd = 200  # width of the stream
d_ff = 200  # width of the feed-forward: the log's "model width"
activation: Literal['gelu', 'swiglu'] = 'gelu'  # of the feed-forward
position: Literal['rotary', 'learned'] = 'rotary'  # how a token's place enters
dropout = 0.0  # share of activations set to 0 in training
embedding_norm = False  # scale each token's embedding to a mean square of 1
head_gate = False  # let each token turn each attention head up or down
value_residual = False  # mix the first block's attention values into those of all others
attention: Literal['auto', 'flash', 'sdpa', 'chunked', 'naive'] = 'auto'  # see model.py; 'auto': see machine.py
# optimizer
optimizer: Literal['sgd', 'adamw', 'muon'] = 'adamw'  # 'muon' leaves what is no matrix of a layer to AdamW
muon_steps: Literal[3, 5] = 5  # of its orthogonalisation
muon_rms = 0.2  # root mean square of its step at a learning rate of 1; AdamW's is about 0.2
learning_rate = 1e-4  # the peak, after warmup
min_lr = 0.0  # where the cosine ends
learning_rate_scale = 1.0  # multiplies both: a short run of the log's rows needs about 10
lr_schedule: Literal['constant', 'cosine'] = 'cosine'  # what follows the warmup
warmup_iters = 0  # steps of linear warmup
weight_decay = 0.1  # on matrices and tables, not on vectors
grad_clip = 1.0  # largest norm of the whole gradient; 0: no clipping
ema_decay = 0.0  # of the moving average of the weights; 0: none
epochs = 3  # passes over the data
max_iters: int | None = None  # stop after so many steps instead of epochs; 0: print the headline only
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', or 'auto': cuda, else mps, else cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # 'auto': the faster; a resumed run keeps its own
compile: bool | None = None  # torch.compile the model; None: on CUDA only

# ---- checks --------------------------------------------------------------------------------------------------------

MAY_BE_0 = ('seed', 'warmup_iters', 'max_iters')  # every other whole number is at least 1
BELOW_1 = ('dropout', 'ema_decay')
FLASH_ONLY = ('activation', 'position', 'attention', 'embedding_norm', 'head_gate', 'value_residual')


def check_knobs(c):
    """Exit with one line if a number makes no sense, or if the chosen model would ignore a knob."""
    for name, value in vars(c).items():
        low = type(value) is int and name not in MAY_BE_0
        high = 1 if name in BELOW_1 else 2**63 if type(value) is int else math.inf
        if isinstance(value, (int, float)) and not low <= value < high:
            sys.exit(f'{name} is {value}, expected {low:d} <= {name} < {high:.3g}.')
        if name in FLASH_ONLY and getattr(c, 'model', '') == 'torch' and value != globals()[name]:
            sys.exit(f"{name} is {value!r}, which model='torch' ignores: leave it out, or add --model=flash.")
    if getattr(c, 'min_lr', 0) > getattr(c, 'learning_rate', 1):
        sys.exit(f'min_lr is {c.min_lr}, expected at most the learning_rate, {c.learning_rate}.')


def headline(c, vocab_size):
    """What this run is, in the log's words."""
    with torch.device('meta'):  # counted, not allocated
        n_params = build_model(SimpleNamespace(**{**vars(c), 'attention': 'naive'}), vocab_size).num_params()
    flash, rate = c.model == 'flash', float(f'{c.learning_rate * c.learning_rate_scale:.6g}')
    rate = str(rate) if rate >= 0.01 else np.format_float_scientific(rate, trim='-', exp_digits=1)
    words = [
        f'{c.n_layer} layer {"(flash attention) " if flash else ""}transformer ({n_params} parameters)',
        'swiglu activation' if c.activation == 'swiglu' else '',
        f'model width {c.d_ff}' if c.d_ff >= 2 * c.n_embd else '',  # the log names it where it is the news
        f'{c.position} position embeddings' if flash else '',
        'embedding norm' if c.embedding_norm else '',
        'head gates' if c.head_gate else '',
        'value residual' if c.value_residual else '',
        f'batch size {c.batch_size}',
        f'{ {"sgd": "SGD", "adamw": "Adam", "muon": "Muon"}[c.optimizer] } learning rate {rate}',
        f'dropout {c.dropout}',
        f'weight decay {c.weight_decay}' if c.weight_decay else '',
        'cosine learning rate schedule' * (c.lr_schedule == 'cosine') + ' with warmup' * (c.warmup_iters > 0),
        'ema' if c.ema_decay else '',
    ]
    return ', '.join(word for word in words if word)


# ---- the training step ---------------------------------------------------------------------------------------------


class Run:
    """All that a training step touches."""

    def __init__(self, c, corpus):
        shares = processes()[1] * c.gradient_accumulation_steps
        if c.batch_size % shares:
            sys.exit(f'batch_size is {c.batch_size}, expected a multiple of {shares}: of processes times micro-steps.')
        self.c, self.corpus, self.device = c, corpus, torch.device(c.device)
        self.batches = Batches(corpus.train, c.batch_size, c.block_size, c.seed, self.device)
        self.total = c.epochs * self.batches.per_epoch if c.max_iters is None else c.max_iters
        self.step = 0  # updates done
        self.model = build_model(c, corpus.encoding.n_vocab).to(self.device)
        dtype = torch.bfloat16 if c.dtype == 'bfloat16' else torch.float32
        muon = {'rms': c.muon_rms, 'steps': c.muon_steps, 'dtype': dtype}
        self.optimizers = create_optimizers(self.model, c.optimizer, c.learning_rate, c.weight_decay, **muon)
        self.ema = copy.deepcopy(self.model) if c.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=c.dtype == 'float16')
        x, y = self.micro_batches()
        compile_model(self.model, x[0], y[0], c)
        self.replica = DistributedDataParallel(self.model) if processes()[1] > 1 else self.model

    def micro_batches(self):
        """This process's share of the step's inputs and targets, each in micro-batches."""
        rank, world = processes()
        micro_steps = self.c.gradient_accumulation_steps
        return (tokens.chunk(world)[rank].chunk(micro_steps) for tokens in self.batches.at(self.step))

    def train_step(self):
        """One update of the weights. Returns the batch's mean loss (of this process's share) and its gradient's norm,
        as tensors: a step does not wait for the device."""
        c, (rank, world) = self.c, processes()
        lr = learning_rate_at(self.step, c.learning_rate, c.min_lr, c.warmup_iters, self.total, c.lr_schedule)
        if c.dropout:  # a pure function of (seed, step, rank): no generator's state has to be saved to repeat it
            torch.manual_seed(int(np.random.SeedSequence((c.seed, self.step, rank)).generate_state(1)[0]))
        x, y = self.micro_batches()
        if c.compile:  # a recorded step may write over what the step before returned
            torch.compiler.cudagraph_mark_step_begin()
        batch_loss = 0.0
        for i in range(c.gradient_accumulation_steps):
            if world > 1:  # the processes exchange gradients once per step
                self.replica.require_backward_grad_sync = i == c.gradient_accumulation_steps - 1
            with autocast(c):
                loss = self.replica(x[i], y[i]) / c.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
            batch_loss = batch_loss + loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or math.inf)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr * c.learning_rate_scale
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        if self.ema:
            update_average(self.ema, self.model, c.ema_decay, self.step)
        self.step += 1
        return batch_loss, norm

    @torch.no_grad()
    def evaluate(self, model):
        """The model's loss in nats per token over every validation token once; the processes share the work."""
        (rank, world), total = processes(), torch.zeros((), device=self.device)
        # more than a step's in a coffee break: small batches take 1.4 times as long
        rows = max(self.c.batch_size // world // self.c.gradient_accumulation_steps, 4096 // self.c.block_size)
        model.eval()
        for i, (x, y) in enumerate(validation_batches(self.corpus.val.to(self.device), rows, self.c.block_size)):
            if i % world == rank:
                if self.c.compile:
                    torch.compiler.cudagraph_mark_step_begin()
                with autocast(self.c):
                    total += model(x, y) * (y >= 0).sum()
        model.train()
        return over_processes(total).item() / (len(self.corpus.val) - 1)


# ---- the loop ------------------------------------------------------------------------------------------------------


def train(run, signals):
    """Train until run.total steps are done or there is a signal; returns the signal's number, or 0."""
    c, out_dir, per_epoch, is_first = run.c, Path(run.c.out_dir), run.batches.per_epoch, processes()[0] == 0
    metrics = checkpoint.open_metrics(out_dir, run.step) if is_first else open(os.devnull, 'w', encoding='utf-8')
    bar = tqdm(total=run.total, initial=run.step, unit='batch', disable=None if is_first else True)
    losses, seconds = [], []  # of each step since the last evaluation: (loss, gradient norm), and its time
    while True:
        # chores come before the step, so that the last update is evaluated and saved like every other
        finished = run.step >= run.total
        signum = int(over_processes(signals[0] if signals else 0, dist.ReduceOp.MAX))  # all stop at the same step
        evaluates = losses and (finished or run.step % c.eval_interval == 0 or run.step % per_epoch == 0)
        if losses and (evaluates or signum):
            numbers = read_losses(run, losses)  # exits if it has diverged; an evaluation judges the last update, too
        if evaluates:
            report(run, metrics, numbers, seconds)
            losses, seconds = [], []
        if is_first and (evaluates or signum):
            checkpoint.save(out_dir, checkpoint.state_of(run))
        if finished or signum:
            bar.close()
            return signum

        start = time.perf_counter()
        losses.append(run.train_step())
        logs = run.step % c.log_interval == 0
        numbers = read_losses(run, losses[-c.log_interval :]) if logs else None  # the only wait for a GPU that is timed
        seconds.append(time.perf_counter() - start)
        bar.update()
        if logs:
            log(run, metrics, numbers, seconds[-c.log_interval :])


def read_losses(run, losses):
    """The losses and gradient norms of the steps up to this one, means over the processes: (steps, 2), on the CPU.
    Exits at the first that is not finite; but a scaler may skip a few gradients that are not."""
    numbers = over_processes(torch.stack([torch.stack(pair) for pair in losses])).cpu() / processes()[1]
    skips = run.scaler.is_enabled() and run.scaler.get_scale() >= 1  # below, it has skipped one step after the other
    finite = (numbers[:, :1] if skips else numbers).isfinite().all(dim=1).tolist()
    if not all(finite):
        i = finite.index(False)
        (loss, norm), step = numbers[i].tolist(), run.step - len(losses) + i + 1
        diverged(run, f'loss {loss:.4g} and gradient norm {norm:.4g} at step {step}')
    return numbers


def diverged(run, what):
    """Exit: the weights are worth nothing any more."""
    sys.exit(f'{what}: likely float16, too short a warmup, or too high a learning_rate; '
             f'try {run.c.learning_rate / 2}. What was saved is kept.')  # fmt: skip


def log(run, metrics, numbers, seconds):
    """Print and record a line about the last steps: their losses and norms, their times."""
    loss, norm = numbers[:, 0].mean().item(), numbers[-1, 1].item()
    epoch, i = divmod(run.step - 1, run.batches.per_epoch)
    lr, ms = run.optimizers[0].param_groups[0]['lr'], statistics.mean(seconds) * 1e3
    say(f'epoch {epoch + 1:2d} | {i + 1:5d}/{run.batches.per_epoch} batches | lr {lr:.2e} | ms/batch {ms:6.1f} | '
        f'loss {loss:6.3f} | gradient norm {norm:5.2f}')  # fmt: skip
    checkpoint.record(metrics, step=run.step, epoch=epoch + 1, lr=lr, ms_per_batch=ms, loss=loss, grad_norm=norm)
    minutes = (run.total - run.step) * statistics.median(seconds) / 60
    if run.device.type == 'cpu' and run.step == run.c.log_interval and minutes > 15:
        say(f'    about {minutes:.0f} minutes left; config/cpu.py after the config makes it a coffee break')


def report(run, metrics, numbers, seconds):
    """Evaluate the model and its average; print the log's line and the details, and record them. Exits if the last
    step left weights that give no finite loss."""
    train_loss, val = numbers[:, 0].mean().item(), run.evaluate(run.model)
    if not math.isfinite(val):
        diverged(run, f'validation loss {val} after step {run.step}')
    ema = run.evaluate(run.ema) if run.ema else None
    epoch, speed = run.step / run.batches.per_epoch, run.c.batch_size * run.c.block_size / statistics.mean(seconds)
    per_byte = val * len(run.corpus.val) / run.corpus.val_bytes / math.log(2)
    say(f'epoch {epoch:.3g} loss: {val:.2f}' + (f' ema_loss: {ema:.2f}' if run.ema else ''))
    say(f'    training loss {train_loss:.3f} | {per_byte:.3f} bits per byte | {speed:,.0f} tokens/s')
    checkpoint.record(metrics, step=run.step, epoch=epoch, val_loss=val, ema_loss=ema, train_loss=train_loss,
                      bits_per_byte=per_byte, tokens_per_s=speed)  # fmt: skip


# ---- the program ---------------------------------------------------------------------------------------------------


def write_text(net, encoding, prompt, max_new_tokens, c, **options):
    """The continuation of a prompt by a model of the knobs c, up to <|endoftext|>. options: those of model.generate."""
    net.eval()
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)]  # the start of a document
    with autocast(c):
        tokens = map(torch.Tensor.item, net.generate(torch.tensor([ids], device=c.device), max_new_tokens, **options))
        return encoding.decode(list(itertools.takewhile(lambda token: token != encoding.eot_token, tokens)))


def set_up(c):
    """The Run that the knobs ask for, new or restored; prints what it is."""
    rank, world = processes()
    saved = checkpoint.load(c.out_dir) if c.init_from == 'resume' else None
    why_dtype, attention = choose_machine(c, saved)
    corpus = open_corpus(c.dataset, saved is not None) if rank == 0 else None  # it may prepare it; the others wait
    if world > 1:
        dist.barrier()
    run = Run(c, corpus or open_corpus(c.dataset, as_it_is=True))
    say(headline(c, run.corpus.encoding.n_vocab))
    say(f'device: {c.device}, {c.dtype}{why_dtype}' + ', compiled' * c.compile + f', {world} processes' * (world > 1))
    say(f'attention: {attention}')
    say(f'corpus: {c.dataset}, {len(run.corpus.train):,} tokens, {run.batches.per_epoch:,} batches per epoch, '
        f'{run.total:,} in all' + ' (by max_iters, not by epochs)' * (c.max_iters is not None))  # fmt: skip
    if run.total < 100 and c.max_iters is None:
        say('    few steps to learn in: lower --batch_size and --block_size, or more --epochs')
    if saved:
        for change in checkpoint.restore(run, saved):
            say(f'resume: {change}')
        say(f'resumed at step {run.step} of {run.total}')
    elif rank == 0:
        checkpoint.move_aside(Path(c.out_dir))  # --overwrite, now that nothing can be refused any more
    return run


def resume_command(*more):
    """The command of this run with --init_from=resume, to be pasted where this one was."""
    launcher = ['torchrun', f'--nproc_per_node={processes()[1]}'] if processes()[1] > 1 else ['python']
    words = [word for word in sys.argv[1:] if not word.startswith(('--init_from', '--overwrite'))]
    return shlex.join([*launcher, sys.argv[0], *words, '--init_from=resume', *more])


def show(run):
    """Print a sample of what a finished run writes, and what can be done with it."""
    c, generator = run.c, torch.Generator(run.device).manual_seed(run.c.seed)
    options = dict(c=c, temperature=0.8, top_k=50, generator=generator)
    print(f'\n{write_text(run.ema or run.model, run.corpus.encoding, "", 200, **options)}\n')
    sample = shlex.join(['python', str(Path(sys.argv[0]).with_name('sample.py')), f'--out_dir={c.out_dir}'])
    print(f'sample more: {sample}')
    longer = f'--epochs={c.epochs + 1}' if c.max_iters is None else f'--max_iters={2 * run.step}'
    print(f'train on:    {resume_command(longer)}')


def main():
    c, files = configure([__file__], sys.argv[1:])
    check_knobs(c)
    if c.max_iters == 0:
        say(headline(c, vocab_size_of(c.dataset)))
        return
    c.out_dir = os.path.expanduser(c.out_dir or 'out/' + ('_'.join(Path(file).stem for file in files) or 'default'))
    if c.init_from == 'resume' and c.overwrite:
        sys.exit('--init_from=resume goes on with a run, --overwrite loses it: leave one of them out.')
    if c.init_from == 'auto':
        c.init_from = 'resume' if os.path.exists(f'{c.out_dir}/ckpt.pt') and not c.overwrite else 'scratch'
    (rank, world), fresh = processes(), c.init_from == 'scratch' and not c.overwrite
    with checkpoint.lock_folder(Path(c.out_dir), fresh) if rank == 0 else contextlib.nullcontext():
        run = set_up(c)
        with checkpoint.signals_caught() as signals:
            signum = train(run, signals)
        if rank == 0 and not signum:
            show(run)
        if world > 1:  # one that left at once could die while gloo still frees what it was handed
            dist.barrier()
            dist.destroy_process_group()
    if signum:
        say(f'stopped at step {run.step} and saved; go on with: {resume_command()}')
        sys.exit(128 + signum)


if __name__ == '__main__':
    run_program(main)

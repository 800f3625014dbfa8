"""Train one of the notebook's runs, or a model of your own.

    python train.py config/best.py config/cpu.py           a short run on a laptop
    python train.py config/swiglu.py                       run 8 of the notebook
    python train.py config/swiglu.py --init_from=resume    continue where it was stopped
    torchrun --nproc_per_node=4 train.py config/swiglu.py  one process per GPU

Read it from top to bottom: settings, the training step, evaluation, the loop. What surrounds them stands last.
"""

import contextlib
import copy
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import machine
from configurator import configure, describe
from data import Batches, open_corpus, validation_batches, vocab_size_of
from machine import all_reduce, autocast, print0, rank_and_world_size, run_program
from model import build_model
from optim import create_optimizers, learning_rate_at, update_average
from sample import write_text
from sources import corpus_name

# ---- settings: the defaults are run 5; a config file or --name=value changes them ----------------------------------

# the run
out_dir: str | None = None  # folder of the run; None: out/ + the configs' names, and the corpus unless it is stdlib
init_from: Literal['scratch', 'resume', 'auto'] = 'scratch'  # 'resume': continue out_dir's run; 'auto': if there is one
overwrite = False  # start over although out_dir holds a run, which is deleted after the new run's first checkpoint
seed = 1  # of the initial weights, the order of the data and dropout
eval_interval = 500  # steps between evaluations, each followed by a checkpoint; every epoch ends with one, too
eval_iters: int | None = None  # evaluate on this many batches of the validation text, the first; None: on all
log_interval = 20  # steps between log lines
# data
dataset = 'stdlib'  # a corpus that data.py prepared, a known name, or a path, which is prepared first
batch_size = 20  # sequences per step, in all: over all processes and micro-batches (nanoGPT's is per micro-batch)
block_size = 1024  # tokens per sequence: the context length
gradient_accumulation_steps = 1  # micro-batches into which batch_size is divided: the same update in less memory
# model
model: Literal['flash', 'torch'] = 'flash'  # the notebook's own, from run 4 on; 'torch': PyTorch's tutorial model
n_layer = 6  # blocks
n_head = 5  # attention heads
n_embd = 200  # width of the residual stream
d_ff = 200  # width of the feed-forward: the notebook's "model width"
activation: Literal['gelu', 'swiglu'] = 'gelu'  # of the feed-forward
position: Literal['rotary', 'learned'] = 'rotary'  # position encoding
dropout = 0.0  # probability with which an activation is zeroed in training; the rest is scaled by 1/(1-p)
embedding_norm = False  # scale each token's embedding to a mean square of 1
head_gate = False  # each token scales the output of each attention head by 0 to 2
value_residual = False  # mix the first block's attention values into those of all later blocks
exclude_self = False  # a token attends to earlier tokens only, not to itself
induction_heads = 0  # attention heads that find each token's value by the key of the token before it
attention: Literal['auto', 'flash', 'sdpa', 'chunked', 'naive'] = 'auto'  # see model.py; 'auto': see machine.py
# optimizer
optimizer: Literal['sgd', 'adamw', 'muon'] = 'adamw'  # 'muon': for the layers' 2-D weights, AdamW for the rest
muon_steps: Literal[3, 5] = 5  # iterations of Muon's orthogonalization
muon_rms = 0.2  # root mean square of Muon's update at a learning rate of 1; AdamW's is about 0.2
learning_rate = 1e-4  # the peak, after warmup
min_lr = 0.0  # final learning rate of the cosine
learning_rate_scale = 1.0  # multiplies learning_rate and min_lr; short runs need more than the notebook's
lr_schedule: Literal['constant', 'cosine'] = 'cosine'  # what follows the warmup
warmup_iters = 0  # steps of linear warmup
weight_decay = 0.1  # of embeddings and weight matrices, not of biases and norm gains
grad_clip = 1.0  # largest norm of the whole gradient; 0: no clipping
ema_decay = 0.0  # of the exponential moving average of the weights; 0: no average
epochs = 3  # passes over the data
stop_epoch: int | None = None  # stop after this epoch; the schedule still spans all epochs
max_iters: int | None = None  # stop after this many steps, not after epochs; 0: only print what the run would be
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps', or 'auto': cuda, else mps, else cpu
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # 'auto': the faster; a resumed run keeps its own
threads: int | None = None  # of a CPU; None: OMP_NUM_THREADS, or else as many as are fastest
compile: bool | None = None  # torch.compile the model; None: on CUDA only

SAVE_EVERY = 60  # seconds between checkpoints at most, unless saving would take more than 5 % of the time

# ---- the training step ---------------------------------------------------------------------------------------------


class Run:
    """The model, its optimizers and its data: everything that a training step changes or reads."""

    def __init__(self, config, corpus):
        self.rank, self.world_size = rank_and_world_size()
        micro_batches = self.world_size * config.gradient_accumulation_steps
        if config.batch_size % micro_batches:
            sys.exit(f'batch_size is {config.batch_size}, expected a multiple of {micro_batches}, the processes times '
                     'gradient_accumulation_steps.')  # fmt: skip
        self.config = config
        self.corpus = corpus
        self.device = torch.device(config.device)
        self.batches = Batches(corpus.train, config.batch_size, config.block_size, config.seed, self.device)
        self.step = 0  # updates done
        self.last_step = config.stop_epoch * self.batches.per_epoch if config.stop_epoch else self.total_steps(config)
        # (loss, gradient norm) of each step. New ones are on the device and unread. read_losses adds them to the other
        # two lists, whose means the next log line and the next evaluation print
        self.unread, self.since_log, self.since_evaluation = [], [], []
        self.lowest = math.inf, 0  # the lowest validation loss, and its step
        self.model = build_model(config, corpus.encoding.n_vocab).to(self.device)
        dtype = torch.bfloat16 if config.dtype == 'bfloat16' else torch.float32
        self.optimizers = create_optimizers(self.model, config.optimizer, config.learning_rate, config.weight_decay,
                                            rms=config.muon_rms, steps=config.muon_steps, dtype=dtype)  # fmt: skip
        self.ema = copy.deepcopy(self.model) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == 'float16')
        x, y = (tokens.chunk(config.gradient_accumulation_steps)[0] for tokens in self.share_of_batch())
        machine.compile_model(self.model, x, y, config)
        if config.compile and self.device.type == 'cuda' and self.world_size == 1 and config.dtype != 'float16':
            self.update = machine.Recorded(self.update)
        self.ddp_model = DistributedDataParallel(self.model) if self.world_size > 1 else self.model

    def total_steps(self, config):
        """The length of a config's learning-rate schedule."""
        return config.epochs * self.batches.per_epoch if config.max_iters is None else config.max_iters

    def learning_rate(self, config):
        """The learning rate of the next step by a config's schedule."""
        return config.learning_rate_scale * learning_rate_at(
            self.step, config.learning_rate, config.min_lr, config.warmup_iters, self.total_steps(config),
            config.lr_schedule)  # fmt: skip

    def share_of_batch(self):
        """This process's share of the step's inputs and targets, (B, T) each."""
        return [tokens.chunk(self.world_size)[self.rank] for tokens in self.batches.get_batch(self.step)]

    def train_step(self):
        """One update of the weights. Returns the mean loss of this process's share of the batch and the gradient's
        norm, as tensors: a step does not wait for the device."""
        config, self.lr = self.config, self.learning_rate(self.config)
        if config.dropout:  # seeded by (seed, step, rank), so that a resumed run repeats it without a saved state
            torch.manual_seed(int(np.random.SeedSequence((config.seed, self.step, self.rank)).generate_state(1)[0]))
        loss, norm = self.update(*self.share_of_batch(), self.lr)
        if self.ema:
            update_average(self.ema, self.model, config.ema_decay, self.step)
        self.step += 1
        return loss, norm

    def update(self, x, y, lr):
        """Forward, backward, clipping, optimizers. Where machine.Recorded replays this on a GPU, lr is a tensor."""
        config, n = self.config, self.config.gradient_accumulation_steps
        batch_loss = 0.0
        for i, micro_batch in enumerate(zip(x.chunk(n), y.chunk(n), strict=True)):
            if self.world_size > 1:  # the processes exchange gradients once per step, after the last micro-batch
                self.ddp_model.require_backward_grad_sync = i == n - 1
            with autocast(config):
                loss = self.ddp_model(*micro_batch) / n
            self.scaler.scale(loss).backward()
            batch_loss = batch_loss + loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        # float16 may overflow: then the whole update is left out. scaler.step would leave out one optimizer's part only
        should_skip = self.scaler.is_enabled() and not norm.isfinite()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
                if 'capturable' in group:  # AdamW's word for: may be recorded
                    group['capturable'] = torch.is_tensor(lr)
            if not should_skip:
                optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        return batch_loss, norm

    @torch.no_grad()
    def evaluate(self, model, signals=()):
        """The model's loss in nats per token over the validation tokens, or over eval_iters batches of them; the
        processes share the work. Once `signals` holds a signal that was caught, it stops and returns None."""
        config = self.config
        # at least 4096 tokens at a time: in a short run's batches of 768 it would take 1.4 times as long
        micro_batch = config.batch_size // self.world_size // config.gradient_accumulation_steps
        sequences = max(micro_batch, 4096 // config.block_size)
        n_targets = len(self.corpus.val) - 1
        if config.eval_iters:
            n_targets = min(n_targets, config.eval_iters * config.batch_size * config.block_size)
        tokens = self.corpus.val[: n_targets + 1].to(self.device)
        loss_sum = torch.zeros((), device=self.device)
        was_stopped = False
        model.eval()
        for i, (x, y) in enumerate(validation_batches(tokens, sequences, config.block_size)):
            if i % self.world_size == 0 and (was_stopped := bool(all_reduce(len(signals), dist.ReduceOp.MAX))):
                break
            if i % self.world_size == self.rank:
                with autocast(config):
                    loss_sum += model(x, y) * (y >= 0).sum()
        model.train()
        return None if was_stopped else all_reduce(loss_sum).item() / n_targets


# ---- the loop ------------------------------------------------------------------------------------------------------


def train(run, signals):
    """Train until run.last_step or until a signal is caught; returns the signal's number, or 0."""
    config = run.config
    out_dir = Path(config.out_dir)
    is_master = run.rank == 0
    metrics = checkpoint.open_metrics(out_dir, run.step) if is_master else open(os.devnull, 'w', encoding='utf-8')
    bar = tqdm(total=run.last_step, initial=run.step, unit='batch', disable=None if is_master else True)
    seconds = []  # the duration of each step
    next_save = time.monotonic() + SAVE_EVERY
    while True:
        # evaluate, save and stop at the top of the loop, so that this is done after the last update as well
        finished = run.step >= run.last_step
        is_due = run.step % config.eval_interval == 0 or run.step % run.batches.per_epoch == 0
        should_evaluate = bool(run.unread or run.since_evaluation) and (finished or is_due)
        if should_evaluate:
            with checkpoint.lost_output_stops(signals):
                evaluate_and_log(run, metrics, seconds, signals)
        # all processes agree on the step at which they stop, and on those at which they save
        should_save = should_evaluate or is_master and time.monotonic() > next_save
        signum, should_save = map(int, all_reduce([signals[0] if signals else 0, should_save], dist.ReduceOp.MAX))
        if should_save or signum:
            read_losses(run)
            if not checkpoint.is_finite(run):
                exit_diverged(run, f'weights that are not finite after step {run.step}')
            start = time.monotonic()
            if is_master:
                checkpoint.save(out_dir, checkpoint.capture_state(run))
            next_save = time.monotonic() + max(SAVE_EVERY, 20 * (time.monotonic() - start))  # at most 5 % of the time
        if finished or signum:
            bar.close()
            metrics.close()
            return signum

        start = time.perf_counter()
        run.unread.append(run.train_step())
        if should_log := run.step % config.log_interval == 0:
            read_losses(run)  # waits for the GPU, so it is timed
        seconds.append(time.perf_counter() - start)
        bar.update()
        if should_log:
            with checkpoint.lost_output_stops(signals):
                log_step(run, metrics, seconds)


def read_losses(run):
    """Fetch the losses and gradient norms of the unread steps, as means over the processes. Exits at the first that is
    not finite. In float16 a few gradients may overflow, since their updates were left out."""
    if not run.unread:
        return
    rows = all_reduce(torch.stack([torch.stack(pair) for pair in run.unread])).cpu() / run.world_size
    may_skip = run.scaler.is_enabled() and run.scaler.get_scale() >= 1  # below, it has skipped one step after another
    for step, (loss, norm) in enumerate(rows.tolist(), run.step - len(rows) + 1):
        if not math.isfinite(loss) or not (may_skip or math.isfinite(norm)):
            exit_diverged(run, f'loss {loss:.4g} and gradient norm {norm:.4g} at step {step}')
    run.unread = []
    run.since_log += rows.tolist()
    run.since_evaluation += rows.tolist()


def exit_diverged(run, reason):
    """Exit before weights that are not finite are saved."""
    sys.exit(f'{reason}: likely float16, too short a warmup, or too high a learning_rate; '
             f'try --learning_rate_scale={run.config.learning_rate_scale / 2}. What was saved is kept.')  # fmt: skip


def log_step(run, metrics, seconds):
    """Print and record one line about the steps since the last: their mean loss, the gradient's norm, their time."""
    loss, norm = statistics.fmean(loss for loss, _ in run.since_log), run.since_log[-1][1]
    epoch, i = divmod(run.step - 1, run.batches.per_epoch)
    ms = statistics.fmean(seconds[-run.config.log_interval :]) * 1e3
    checkpoint.record(metrics, step=run.step, epoch=epoch + 1, lr=run.lr, ms_per_batch=ms, loss=loss, grad_norm=norm)
    run.since_log = []
    print0(f'epoch {epoch + 1:2d} | {i + 1:5d}/{run.batches.per_epoch} batches | lr {run.lr:.2e} | ms/batch {ms:6.1f} '
           f'| loss {loss:6.3f} | gradient norm {norm:5.2f}')  # fmt: skip
    if run.device.type == 'cpu':
        hint_at_time(run, seconds)


def evaluate_and_log(run, metrics, seconds, signals):
    """Evaluate the model and its average; print and record the results. Exits if the loss is not finite. Where a signal
    comes in between, nothing is recorded: the resumed run evaluates again."""
    read_losses(run)
    start = time.perf_counter()
    val = run.evaluate(run.model, signals)
    ema = run.evaluate(run.ema, signals) if run.ema else None
    if val is None or run.ema and ema is None:
        return
    took = time.perf_counter() - start
    if not math.isfinite(val):
        exit_diverged(run, f'validation loss {val} after step {run.step}')
    train_loss = statistics.fmean(loss for loss, _ in run.since_evaluation)
    tokens_per_step = run.config.batch_size * run.config.block_size
    speed = tokens_per_step / statistics.fmean(seconds[-len(run.since_evaluation) :]) if seconds else None
    run.since_evaluation = []
    epoch = run.step / run.batches.per_epoch
    per_byte = val * len(run.corpus.val) / run.corpus.val_bytes / math.log(2)
    checkpoint.record(metrics, step=run.step, epoch=epoch, val_loss=val, ema_loss=ema, train_loss=train_loss,
                      bits_per_byte=per_byte, tokens_per_s=speed)  # fmt: skip
    run.lowest = min(run.lowest, (val, run.step))
    losses = f'loss: {val:.2f}' + (f' ema_loss: {ema:.2f}' if run.ema else '')
    print0(f'epoch {epoch:.0f} {losses}' if epoch % 1 == 0 else f'step {run.step} {losses} ({epoch:.3g} epochs)')
    details = [f'training loss {train_loss:.3f}', f'{per_byte:.3f} bits per byte']
    details += [f'{speed:,.0f} tokens/s'] if speed else []
    details += [f'evaluated in {took:.0f} s; --eval_iters takes fewer batches'] if took > 5 else []
    print0(f'    {" | ".join(details)}')
    hint_at_memorising(run)


# ---- hints: what a reader of the log may want to know --------------------------------------------------------------


def hint_at_length(run):
    """Say at the start that a run is very short or very long for its text."""
    config = run.config
    if run.last_step < 100 and config.max_iters is None:
        print0('    these are few steps: config/cpu.py after the config sets sizes that suit a small text')
    if (passes := run.last_step / run.batches.per_epoch) > 10:
        five = '--stop_epoch=5' if config.stop_epoch else f'--max_iters={5 * run.batches.per_epoch}'
        print0(f'    {passes:.0f} passes over a small text, which the model will memorise; {five} makes five')
    if config.warmup_iters >= run.last_step:
        print0(f'    warmup_iters is {config.warmup_iters}: the learning rate does not reach its peak; '
               f'--warmup_iters={run.last_step // 10} would do')  # fmt: skip


def hint_at_time(run, seconds):
    """On a CPU: say at the first log line how long a long run takes, and later if steps have become much slower."""
    n = run.config.log_interval
    minutes = (run.last_step - run.step) * statistics.median(seconds) / 60
    if run.step == n and minutes > 15 and run.config.batch_size * run.config.block_size > 768:
        print0(f'    about {minutes:.0f} minutes left; config/cpu.py after the config makes it a short run')
    now, before = sum(seconds[-n:]), sum(seconds[-2 * n : -n])
    if torch.get_num_threads() > 1 and len(seconds) >= 2 * n and now > max(1.0, 3 * before):
        # threads wait for each other: one that has to share its core holds up all of them
        print0(f'    {now / before:.0f} times as slow as before: if other programs use the CPU, one thread is faster. '
               f'Ctrl-C, then {checkpoint.resume_command("--threads=1")}')  # fmt: skip


def hint_at_memorising(run):
    """Say after an evaluation that the validation loss has stopped falling."""
    interval = min(run.config.eval_interval, run.batches.per_epoch)  # evaluations are at most as far apart
    if 3 * interval <= run.step - run.lowest[1] < 4 * interval:  # not at every later one
        print0(f'    the validation loss has not fallen below {run.lowest[0]:.2f} since step {run.lowest[1]}: if the '
               'training loss still falls, the model is memorising the training text')  # fmt: skip


# ---- the program ---------------------------------------------------------------------------------------------------


def check_knobs(config):
    """Exit with one line if knobs contradict each other or if one has no effect."""
    if config.min_lr > config.learning_rate:
        sys.exit(f'min_lr is {config.min_lr}, expected at most the learning_rate, {config.learning_rate}.')
    if config.stop_epoch and config.max_iters:
        sys.exit(f'stop_epoch is {config.stop_epoch} and max_iters is {config.max_iters}: leave one of them out.')
    if config.stop_epoch and config.stop_epoch > config.epochs:
        sys.exit(f'stop_epoch is {config.stop_epoch}, expected at most the epochs, {config.epochs}.')
    if config.induction_heads > config.n_head:
        sys.exit(f'induction_heads is {config.induction_heads}, expected at most the n_head, {config.n_head}.')
    for name in ('activation', 'position', 'attention', 'embedding_norm', 'head_gate', 'value_residual',
                 'exclude_self', 'induction_heads'):  # fmt: skip
        value = getattr(config, name)
        if config.model == 'torch' and value != globals()[name]:
            sys.exit(f"{name} is {value!r}, which model='torch' ignores: leave it out, or add --model=flash.")


def set_up(config):
    """The Run that the knobs ask for, new or restored; prints what it is."""
    rank, world_size = rank_and_world_size()
    saved = checkpoint.load(config.out_dir) if config.init_from == 'resume' else None
    how, attention = machine.choose_machine(config, saved)
    # the first process may have to prepare the corpus, for which the others wait
    corpus = open_corpus(config.dataset, allow_stale=saved is not None) if rank == 0 else None
    if world_size > 1:
        dist.barrier()
    corpus = corpus or open_corpus(config.dataset, allow_stale=True)
    checkpoint.compare_corpora(corpus)
    run = Run(config, corpus)
    print0(f'run: {describe(config, run.model.num_params())}')
    compiled = ', compiled' if config.compile else ''
    processes = f', {world_size} processes' if world_size > 1 else ''
    print0(f'device: {config.device}, {how}{compiled}{processes}')
    print0(f'attention: {attention}')
    limit = f', stops after epoch {config.stop_epoch}' if config.stop_epoch else ''
    limit = ' (by max_iters, not by epochs)' if config.max_iters else limit
    print0(f'corpus: {run.corpus.description}, {len(run.corpus.train):,} tokens, {run.batches.per_epoch:,} batches per '
           f'epoch, {run.total_steps(config):,} in all{limit}')  # fmt: skip
    if saved:
        checkpoint.restore(run, saved)
    elif rank == 0:
        checkpoint.move_aside(Path(config.out_dir))  # --overwrite, now that nothing can be refused any more
    hint_at_length(run)
    return run


def main():
    config, files = configure([__file__])
    check_knobs(config)
    if config.max_iters == 0:
        n_params = machine.count_params(config, vocab_size_of(config.dataset))
        print0(f'run: {describe(config, n_params)}')
        return
    name = '_'.join(Path(file).stem for file in files) or 'default'
    name += f'_{corpus_name(config.dataset)}' if config.dataset != dataset else ''
    config.out_dir = os.path.expanduser(config.out_dir or f'out/{name}')
    if config.init_from == 'resume' and config.overwrite:
        sys.exit('--init_from=resume continues a run, --overwrite deletes it: leave one of them out.')
    if config.init_from == 'auto':
        resumes = os.path.exists(f'{config.out_dir}/ckpt.pt') and not config.overwrite
        config.init_from = 'resume' if resumes else 'scratch'
    is_new = config.init_from == 'scratch' and not config.overwrite
    is_master = rank_and_world_size()[0] == 0
    with checkpoint.lock_folder(Path(config.out_dir), is_new) if is_master else contextlib.nullcontext():
        run = set_up(config)
        with checkpoint.signals_caught() as signals:
            signum = train(run, signals)
        if is_master and not signum:
            generator = torch.Generator(run.device).manual_seed(config.seed)
            options = {'temperature': 0.8, 'top_k': 50, 'generator': generator}
            print(f'\n{write_text(run.ema or run.model, run.corpus.encoding, "", 200, config, **options)}\n')
            print(checkpoint.next_commands(config, run.step))
        if dist.is_initialized():  # one process that left at once could die while gloo still frees what it was handed
            dist.barrier()
            dist.destroy_process_group()
    if signum:
        print0(f'stopped at step {run.step} and saved; continue with: {checkpoint.resume_command()}')
        sys.exit(128 + signum)


if __name__ == '__main__':
    run_program(main)

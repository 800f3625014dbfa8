"""Time nanoGPT's own training step beside ours, interleaved in one process, at a shape that nanoGPT has.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python -m results.nanogpt --position=learned --d_ff=800 --batch_size=4     any of train.py's knobs

The medians are kept in out/nanogpt_DEVICE.json, one line per shape.
"""

import contextlib
import importlib.util
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import bench
import train
from configurator import configure
from machine import autocast, run_program
from results.report import nanogpt_table
from results.runs import commit, provenance, read, results_file, write

nanogpt = '../nanoGPT'  # a clone of nanoGPT, of which only model.py is executed
publish = False  # keep the numbers in results/, to be committed, not in out/
seconds = 10.0  # how long each of the four is timed, after the warm-up; at least 5 steps

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
SHAPE = ('n_layer', 'n_head', 'n_embd', 'batch_size', 'block_size')  # what tells one line of the table from another
FIXED = {'model': 'flash', 'activation': 'gelu', 'position': 'learned', 'embedding_norm': False, 'head_gate': False,
         'value_residual': False, 'exclude_self': False, 'induction_heads': 0, 'optimizer': 'adamw',
         'gradient_accumulation_steps': 1, 'ema_decay': 0.0}  # fmt: skip  # as nanoGPT has it


def check_shape(c):
    """Exit unless nanoGPT is there and has this shape."""
    wanted = {**FIXED, 'd_ff': 4 * c.n_embd}
    missing = [f'--{knob}={value}' for knob, value in wanted.items() if getattr(c, knob) != value]
    if missing:
        sys.exit(f'nanoGPT has no such shape: add {" ".join(missing)}')
    if not Path(c.nanogpt, 'model.py').exists():
        sys.exit(f'{c.nanogpt}/model.py is not there: git clone https://github.com/karpathy/nanoGPT {c.nanogpt}')


class NanoGPT:
    """nanoGPT's training step as its train.py runs it: compiled, and the next batch is read from a file between forward
    and backward. It has AdamW with nanoGPT's own decay and betas, at a clip of 1."""

    def __init__(self, c, corpus):
        spec = importlib.util.spec_from_file_location('nanogpt', Path(c.nanogpt, 'model.py'))
        module = importlib.util.module_from_spec(spec)
        shape = {name: getattr(c, name) for name in ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout')}
        self.c, self.device = c, torch.device(c.device)
        with contextlib.redirect_stdout(None):  # it prints what it is
            spec.loader.exec_module(module)
            vocab_size = -(-corpus.encoding.n_vocab // 8) * 8
            net = module.GPT(module.GPTConfig(**shape, vocab_size=vocab_size, bias=True)).to(self.device)
            self.optimizer = net.configure_optimizers(0.1, 1e-4, (0.9, 0.95), self.device.type)
        self.model = torch.compile(net)
        self.file = tempfile.NamedTemporaryFile()
        corpus.train.numpy().astype(np.uint16).tofile(self.file.name)
        self.batch = self.read()

    def read(self):
        """A batch at random places of the file."""
        tokens, length = np.memmap(self.file.name, np.uint16, 'r'), self.c.block_size
        starts = torch.randint(len(tokens) - length, (self.c.batch_size,))
        x, y = (torch.stack([torch.from_numpy(tokens[i + shift :][:length].astype(np.int64)) for i in starts])
                for shift in (0, 1))  # fmt: skip
        if self.device.type == 'cuda':
            x, y = (side.pin_memory().to(self.device, non_blocking=True) for side in (x, y))
        return x, y

    def train_step(self):
        """One update of the weights."""
        with autocast(self.c):
            _, loss = self.model(*self.batch)
        self.batch = self.read()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_runs(c):
    """The four that are compared, warmed up: {name: what has a train_step}."""
    plain = bench.build_run(SimpleNamespace(**vars(c) | {'compile': False}))
    chosen, corpus = plain.config, plain.corpus
    ours = {'this': plain, 'this, compiled': bench.build_run(SimpleNamespace(**vars(chosen) | {'compile': True}))}
    peers = {f'nanoGPT, {dtype}': NanoGPT(SimpleNamespace(**vars(chosen) | {'dtype': dtype}), corpus)
             for dtype in ('float32', 'bfloat16')}  # fmt: skip
    for peer in peers.values():
        for _ in range(bench.WARM_UP):
            peer.train_step()
    return peers | ours


def main():
    c, _ = configure(PROGRAMS)
    train.check_knobs(c)
    check_shape(c)
    runs = build_runs(c)
    device = runs['this'].device
    path = results_file(f'nanogpt_{device.type}', c.publish)
    times = bench.time_in_turns([run.train_step for run in runs.values()], device, c.seconds)
    row = {
        'command': shlex.join(['python', '-m', 'results.nanogpt', *sys.argv[1:]]),
        **{knob: getattr(c, knob) for knob in SHAPE},
        'dtype': runs['this'].config.dtype,
        'steps': len(times[0]) * bench.IN_A_ROW.get(device.type, 1),
        'ms_median': dict(zip(runs, map(statistics.median, times), strict=True)),
        'nanogpt': commit(Path(c.nanogpt)),
        **provenance(device),
    }
    print(nanogpt_table({'rows': [row]}))
    results = {'rows': [], **read(path)}
    others = [other for other in results['rows'] if any(other[knob] != row[knob] for knob in SHAPE)]
    write(path, results | {'rows': [*others, row]})


if __name__ == '__main__':
    run_program(main)

"""What the tests share: a small corpus of their own, train.py run on it in this process, and the list of configs."""

import os
import random
import signal
import sys

os.environ['OMP_NUM_THREADS'] = '1'  # before torch: several processes share the cores, and the models are tiny

import pytest
import torch

import machine
import sources
import train
from machine import run_program
from model import LanguageModel

MEASURED_SPEEDUP = machine.onednn_speedup.__wrapped__
machine.onednn_speedup = lambda: 1.0  # two runs that are compared bit for bit take the same library
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in a script's background was told to ignore it
REPO = train.__file__.removesuffix('/train.py')
# by name: a config of your own beside them does not concern the tests
RUNS = ('sgd adam cosine flash weight_decay dropout_weight_decay ema swiglu deep wide swiglu_18 warmup learning_rate '
        'swiglu_23 learned muon embedding_norm head_gate embedding_rate three_steps '
        'value_residual exclude_self best').split()  # fmt: skip
CONFIGS = [*RUNS, 'best_97m', 'cpu']
WORDS = 'the a ladder log row model token learns reads writes and or not flash small large def return if else'.split()
SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=16', '--d_ff=24', '--block_size=16', '--batch_size=4', '--device=cpu',
         '--eval_interval=1000', '--log_interval=5', '--max_iters=10', '--learning_rate=1e-2',
         '--dtype=float32']  # fmt: skip


def make_text(path, size=30_000):
    generator = random.Random(0)
    path.write_text(''.join(generator.choice(WORDS) + generator.choice(' \n') for _ in range(size // 5)))


@pytest.fixture(scope='session')
def workplace(tmp_path_factory):
    """A folder with a prepared corpus data/tiny."""
    folder = tmp_path_factory.mktemp('work')
    make_text(folder / 'tiny.txt')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sources.prepare('tiny.txt')
    return folder


@pytest.fixture
def run(workplace, monkeypatch, capsys):
    """run('--knob=value', ...) trains a small model with train.py's main and returns what it printed. With stop_at=n
    it is stopped as by Ctrl-C after n steps."""
    monkeypatch.chdir(workplace)

    def main(*arguments, stop_at=None):
        generate, train_step = LanguageModel.generate, train.Run.train_step

        def step(run):
            numbers = train_step(run)
            if run.step == stop_at:
                signal.raise_signal(signal.SIGINT)
            return numbers

        monkeypatch.setattr(sys, 'argv', ['train.py', *SMALL, '--dataset=tiny', *arguments])
        with pytest.MonkeyPatch.context() as patch:  # the closing sample is short: it takes longer than the run
            patch.setattr(LanguageModel, 'generate', lambda net, ids, n, **options: generate(net, ids, 5, **options))
            patch.setattr(train.Run, 'train_step', step)
            try:
                run_program(train.main)
            except SystemExit as stopped:
                if stopped.code != 128 + signal.SIGINT or stop_at is None:
                    raise
        return capsys.readouterr().out

    return main


def same(a, b):
    """Whether two nests of dicts and lists hold the same values, tensors bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same(a, b):
    """Two checkpoints are the same, but for the knobs."""
    different = [key for key in a if key != 'knobs' and not same(a[key], b[key])]
    assert a['step'] > 0 and not different

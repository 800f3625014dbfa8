"""The other puzzle: learned positions end 0.01 below rotary ones in the log, and far above them here. What explains it?
Each suspect is row 12 or 13 (rotary) or row 15 (learned) with a change:

    python -m results.positions config/cpu.py --learning_rate_scale=10 --dtype=float32

It keeps what comes out in out/positions_CORPUS_DEVICE.json; --publish: in results/. The same command again goes on.
"""

import shlex
import sys
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import train
from configurator import configure, run_program
from model import build_model
from results.ladder import numbers_of
from results.record import device_name, provenance, read, results_file, write
from results.rows import config_of, place

publish = False  # keep the results in results/, to be committed, not in out/


class Tenfold(nn.Module):
    """A parameter that is ten times what the optimizer sees of it: it moves as if its rate were tenfold."""

    def forward(self, x):
        return 10 * x

    def right_inverse(self, x):
        return x / 10


def empty_table(model):
    """The learned table begins at 0."""
    nn.init.zeros_(model.positions)


def enlarge_table(model):
    """The learned table begins ten times as large as the embedding, N(0, 0.2²)."""
    model.positions.data *= 10


def quicken_table(model):
    """The learned table has ten times the rate."""
    register_parametrization(model, 'positions', Tenfold())


def add_table(model):
    """A rotary model has a learned table as well, added to its embedding as row 15 does."""
    model.table = nn.Parameter(0.02 * torch.randn(model.block_size, model.embedding.embedding_dim))
    model.embedding.register_forward_hook(lambda module, args, x: x + model.table[: x.size(1)])


def stop_turning(model):
    """A rotary model that turns nothing: it has no positions but what the causal mask tells."""
    model.rotary[0], model.rotary[1] = 1, 0


# what is tried: (its row, knobs, what is done to the new model)
CASES = {
    'rotary and a learned table': ('learning_rate', [], add_table),
    'neither': ('learning_rate', [], stop_turning),
    'the table begins at 0': ('learned', [], empty_table),
    'the table begins ten times as large': ('learned', [], enlarge_table),
    'ten times the rate for the table': ('learned', [], quicken_table),
    'a third of the rate for all': ('learned', ['--learning_rate=1e-4'], None),
    'a third of the rate for all, the table begins at 0': ('learned', ['--learning_rate=1e-4'], empty_table),
    'no weight decay': ('learned', ['--weight_decay=0.0'], None),
    '24 x 32 tokens, learned': ('learned', ['--batch_size=24', '--block_size=32'], None),
    '24 x 32 tokens, rotary': ('learning_rate', ['--batch_size=24', '--block_size=32'], None),
    '1 x 768 tokens, learned': ('learned', ['--batch_size=1', '--block_size=768'], None),
    '1 x 768 tokens, rotary': ('learning_rate', ['--batch_size=1', '--block_size=768'], None),
    'a third of the rate, 500 steps, learned': ('learned', ['--learning_rate=1e-4', '--max_iters=500'], None),
    'a third of the rate, 500 steps, rotary': ('warmup', ['--max_iters=500'], None),
    'a third of the rate, 4,000 steps, learned': ('learned', ['--learning_rate=1e-4', '--max_iters=4000'], None),
    'a third of the rate, 4,000 steps, rotary': ('warmup', ['--max_iters=4000'], None),
}


def train_case(name, words, folder):
    """Train a case, from its last checkpoint on if it has one; returns its numbers."""
    row, knobs, change = CASES[name]

    def build(c, vocab_size):
        model = build_model(c, vocab_size)
        if change:
            change(model)
        return model

    argv = ['train.py', config_of(row), *words, *knobs, f'--out_dir={folder}', '--init_from=auto']
    print(f'\n==== {name}', flush=True)
    with mock.patch.object(train, 'build_model', build), mock.patch.object(sys, 'argv', argv):
        train.main()
    return {'case': name, 'row': row, **numbers_of(folder)}


def main():
    """Try the cases that the results do not hold yet, and keep each as soon as it is done."""
    c, _ = configure([__file__, train.__file__], sys.argv[1:])
    train.check_knobs(c)
    _, device, name = place(c)
    path = results_file(f'positions_{name}', c.publish)
    words = [word for word in sys.argv[1:] if not word.startswith('--publish')]
    command = shlex.join(['python', '-m', 'results.positions', *words])
    results = read(path) or {'command': command, 'cases': []}
    if results['command'] != command:
        sys.exit(f'{path} holds cases of {results["command"]}: move it and out/{path.stem} away first.')
    done = {case['case'] for case in results['cases']}
    for case in CASES:
        if case not in done:
            numbers = train_case(case, words, Path('out', path.stem, case.replace(' ', '_').replace(',', '')))
            results['cases'].append({**numbers, 'device': device_name(device), **provenance()})
            write(path, results)


if __name__ == '__main__':
    run_program(main)

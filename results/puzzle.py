"""The log's puzzle: row 4 trains better than row 3 (2.79 against 2.91) and validates far worse (3.14 against 2.85), "my
guess is that the dropout is broken". Which break would look like this? `python -m results.ladder --puzzle` tries some.
"""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import checkpoint
import train
from machine import choose_machine
from model import Attention
from results.record import device_name, provenance, results_file, write
from results.rows import config_of, place, train_row

TRAINED = {  # how a model is trained: (its row, what differs from it)
    'dropout 0.2': ('flash', []),
    'dropout 0.2 twice': ('flash', ['--dropout=0.36']),  # of what the first leaves, 0.8, the second takes a fifth
    'no dropout': ('weight_decay', []),
}
EVALUATED = {  # what dropout does in evaluation: in which layers it is left on
    'off': (),
    'left on in attention': (Attention,),
    'left on': (Attention, nn.Dropout),
}


def leave_on(model, kinds):
    """The model, of which the modules of some kinds now stay in training mode when it is told to evaluate: the bug."""

    def evaluate():
        for module in model.modules():
            module.training = isinstance(module, kinds)

    model.eval = evaluate
    return model


def restored_run(folder, corpus):
    """The Run of a finished row, with a dropout of 0.2 in evaluation if it is left on."""
    saved = checkpoint.load(folder)
    c = SimpleNamespace(**saved['knobs'] | {'dropout': 0.2, 'attention': 'auto'})
    choose_machine(c)
    run = train.Run(c, corpus)
    run.model.load_state_dict(saved['model'])
    return run


def solve_puzzle(c, flags):
    """Train row 4 (dropout 0.2), row 4 with each dropout twice, and row 5 (none). Then evaluate each on training and on
    validation text, with dropout off, or left on in places."""
    corpus, device, name = place(c)
    path = results_file(f'dropout_{name}', c.publish)
    beginning = SimpleNamespace(val=corpus.train[: len(corpus.val)])
    command = shlex.join(['python', '-m', 'results.ladder', *sys.argv[1:]])
    results = {'command': command, 'device': device_name(device), **provenance(), 'cases': []}
    seed = int(c.seeds.split(',')[0])
    for trained, (row, change) in TRAINED.items():
        folder = Path('out', f'ladder_{name}', f'{trained.replace(" ", "_")}_{seed}')
        status = train_row(config_of(row), [*flags, *change], seed, folder)
        if status:
            sys.exit(status)
        run = restored_run(folder, corpus)
        for evaluated, kinds in EVALUATED.items():
            losses = {}
            for side, run.corpus in (('train', beginning), ('val', corpus)):
                torch.manual_seed(c.seed)
                losses[side] = run.evaluate(leave_on(run.model, kinds))
            results['cases'].append({'trained': trained, 'evaluated': evaluated, **losses})
            print(results['cases'][-1], flush=True)
    write(path, results)

"""The rows of the ladder, what the log says of each, and how one of them is trained: by train.py, in a process and in a
folder of its own. It needs train."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import torch

import train
from bench import OVERLAYS
from configurator import configure
from data import open_corpus
from machine import choose_machine
from results.record import ROOT, read

# the log's rows, in its order: (what changes, the log's validation losses after epochs 1, 2, 3)
LOG = {
    'sgd': ("PyTorch's tutorial model, SGD at 5.0, dropout 0.2", '3.03, 3.02, 2.96'),
    'adam': ('row 1 with Adam at 1e-4', '2.87, 2.87, 2.86'),
    'cosine': ('row 2 with a cosine schedule', '2.87, 2.86, 2.85'),
    'flash': ('row 3 with the flash model: pre-norm, GELU, rotary positions', '3.18, 3.18, 3.14'),
    'weight_decay': ('row 4 with weight decay 0.1 in place of dropout', '2.69, 2.66, 2.64'),
    'dropout_weight_decay': ('row 5 with dropout 0.2 as well', 'between rows 4 and 5'),
    'ema': ('row 5 with a moving average of the weights', '2.66, 2.63, 2.62'),
    'swiglu': ('row 5 with SwiGLU, d_ff 256', '2.60, 2.58, 2.56'),
    'deep': ('row 5 with 8 layers', '2.62, 2.59'),
    'wide': ('row 5 with 5 layers, d_ff 512', '2.61'),
    'swiglu_18': ('row 8 with 18 layers, 256 wide, d_ff 768', '2.32'),
    'warmup': ('row 8 with warmup', '2.59, 2.57, 2.56'),
    'learning_rate': ('row 12 at 3e-4', '2.59, 2.57, 2.54'),
    'swiglu_23': ('row 13 with 23 layers, 512 wide, d_ff 2048', '2.23'),
    'learned': ('row 13 with learned positions', '2.58, 2.55, 2.53'),
}
RUNGS = ('best_1_rate', 'best_2_muon', 'best_3_rotary', 'best_4_faster', 'best_5_embedding_norm', 'best_6_head_gate',
         'best_7_rates', 'best_8_three_steps', 'best')  # fmt: skip
# every row's number; best_97m is no rung, but row 14 with the first six of them
NUMBERS = {
    **{row: f'{i}' for i, row in enumerate(LOG, 1)},
    **{row: f'rung {i}' for i, row in enumerate(RUNGS, 1)},
    'best_97m': '',
}


def config_of(row):
    """The path of a row's config."""
    return os.path.relpath(ROOT / 'config' / f'{row}.py')


def parent_of(row):
    """The row that a row's config says it changes; None for the first."""
    headline = (ROOT / 'config' / f'{row}.py').read_text(encoding='utf-8').splitlines()[0]
    named = re.search(r': (row|rung) (\d+) ', headline)
    return named and (list(LOG) if named[1] == 'row' else RUNGS)[int(named[2]) - 1]


def rows_and_overlays(files):
    """The config files that are rows, all of the ladder's if none is named; and those that follow each row."""
    rows = [file for file in files if Path(file).stem not in OVERLAYS]
    return rows or [config_of(row) for row in NUMBERS], [os.path.relpath(file) for file in files if file not in rows]


def place(c):
    """The corpus, the device, and the name of what is measured with both. Prepares the corpus if it has to."""
    corpus = open_corpus(c.dataset)
    choose_machine(c)
    device = torch.device(c.device)
    return corpus, device, f'{corpus.folder.name}_{device.type}'


def run_program(program, *words):
    """Run one of the repository's programs; returns its exit status, as a shell counts it. A terminal's Ctrl-C reaches
    the program too, so this process only waits until it has saved; SIGTERM is handed on."""
    child = subprocess.Popen([sys.executable, ROOT / program, *words])
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda signum, _: child.send_signal(signum)}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        status = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return status if status >= 0 else 128 - status


def train_row(config, flags, seed, folder):
    """Train one row in its folder, from its last checkpoint on if it has one; returns train.py's exit status. The
    overlays and knobs in flags hold for every row, but SGD and the rungs past the log keep their learning rates."""
    words = [config, *flags, f'--seed={seed}', f'--out_dir={folder}']
    if Path(config).stem in ('sgd', *RUNGS, 'best_97m'):
        words = [word for word in words if not word.startswith('--learning_rate_scale')]
    knobs, kept = vars(configure([train.__file__], words)[0]), folder / 'knobs.json'
    if (folder / 'ckpt.pt').exists():
        if read(kept) != knobs:
            print(f'{folder} holds a run of other knobs: move it away', file=sys.stderr)
            return 1
        words.append('--init_from=resume')
    folder.mkdir(parents=True, exist_ok=True)
    new = kept.with_suffix('.new')
    new.write_text(json.dumps(knobs), encoding='utf-8')
    os.replace(new, kept)
    return run_program('train.py', *words)

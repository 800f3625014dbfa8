"""See how runs went: their curves, whether one setting is better than another, and where attention goes.

    python plot.py out/best_cpu                                    losses against tokens: out/best_cpu/plot.png
    python plot.py out/mine_1 out/mine_2 out/best_cpu              several runs; the seeds of one setting form a band
    python plot.py --compare out/a_1 out/a_2 out/b_1 out/b_2       is b better than a? three seeds of each can decide
    python plot.py --attention out/best_cpu --start="def f(x):"    which tokens the heads attend to: attention.png

If a run has the settings of one of our short runs, ours are drawn behind it, in grey. Pictures need matplotlib.
"""

import os
import sys
from pathlib import Path

import torch

from configurator import configure, join_flags, read_knobs
from machine import run_program
from model import naive_attention
from results.curves import curves, load_run, published
from results.paired import compare_seeds, group_seeds
from sample import load_model

compare = False  # compare the final losses of two settings, seed by seed, instead of drawing curves
attention = False  # draw the attention weights of one layer's heads, instead of curves
start = 'def forward(self, x):'  # the text whose attention is drawn
layer: int | None = None  # the layer whose attention is drawn, counted from 1; None: the middle one


def draw_curves(runs, pictures):
    """Draw the losses of runs, and behind them, in grey, those in results/ with the same settings."""
    series, behind, elsewhere = {}, {}, []
    for group in group_seeds(runs):
        tokens_per_step = group[0]['tokens_per_step']
        series[group[0]['folder']] = [curves(run, tokens_per_step) for run in group]
        for name, ours in published(group[0]['settings']).items():
            behind[f'{name} in results/'] = [curves(run, tokens_per_step) for run in ours]
            version = ours[0]['python']
            if group[0]['corpus'] != ours[0]['corpus']:
                elsewhere.append(group[0]['folder'])
    if elsewhere:
        print(f'ours, in grey, read the library of Python {version}, but {", ".join(elsewhere)} a different text: '
              'compare the shapes of the curves, not the losses', file=sys.stderr)  # fmt: skip
    if len({run['corpus'] for run in runs}) > 1:
        print('these runs read different corpora: their losses cannot be compared', file=sys.stderr)
    path = Path(runs[0]['folder'], 'plot.png')
    pictures.draw_curves(series, behind, path)
    print(path)


def print_curves(run):
    """A table of a run's losses: at each evaluation, and at about 20 of the log lines."""
    training, validation = curves(run)
    print(f'\n{run["folder"]}\n    step   training loss   validation loss')
    for step in sorted({*list(training)[:: max(1, len(training) // 20)], *validation}):
        cells = [f'{losses[step]:.3f}' if step in losses else '' for losses in (training, validation)]
        print(f'{step:8} {cells[0]:>15} {cells[1]:>17}'.rstrip())


def attention_weights(net, ids, layer):
    """A layer's attention weights on a text, (H, T, T): row t says how much token t attends to each key."""
    recorded = []

    def recording_attention(q, k, v, dropout=0.0):
        identity = torch.eye(k.size(1))[None, :, None].expand(-1, -1, k.size(2), -1)  # (1, S, H, S), as values
        recorded.append(naive_attention(q, k, identity).detach())  # weights times the identity are the weights
        return naive_attention(q, k, v)

    net.blocks[layer - 1].attn.attention_fn = recording_attention
    net.eval()(torch.tensor([ids]))
    return recorded[0][0].transpose(0, 1)  # of (1, T, H, S)


def draw_attention(folder, config, pictures):
    """Draw a run's attention weights in one layer, on config.start as the start of a document."""
    net, encoding, knobs = load_model(folder, 'cpu', 'float32')
    if knobs.model == 'torch':
        sys.exit(f"{folder} has model='torch', whose weights nn.MultiheadAttention keeps to itself: name another run.")
    layer = (knobs.n_layer + 1) // 2 if config.layer is None else config.layer
    if layer > knobs.n_layer:
        sys.exit(f'layer is {layer}, expected 1 <= layer <= {knobs.n_layer}.')
    ids = [encoding.eot_token, *encoding.encode_ordinary(config.start)]
    if len(ids) > (most := min(pictures.MOST_TOKENS, knobs.block_size)):
        sys.exit(f'start has {len(ids) - 1} tokens, expected fewer than {most}: shorten --start.')
    tokens = ['<start>', *(repr(encoding.decode([i]))[1:-1].replace(' ', '·') for i in ids[1:])]
    title = f'{folder}, layer {layer} of {knobs.n_layer}: how much each token (row) attends to each (column)'
    path = Path(folder, 'attention.png')
    columns = ['<none>', *tokens[:-1]] if knobs.exclude_self else tokens
    pictures.draw_attention(attention_weights(net, ids, layer).numpy(), tokens, columns, title, path)
    print(path)


def main():
    join_flags(sys.argv, read_knobs(__file__))
    words = sys.argv[1:]
    config, _ = configure([__file__], [word for word in words if word.startswith('-')], '[RUN ...]')
    named = [os.path.normpath(os.path.expanduser(word)) for word in words if not word.startswith('-')]
    folders = [*dict.fromkeys(named)] or ['out/best_cpu']
    if config.compare and config.attention:
        sys.exit('--compare and --attention: leave one of them out.')
    if config.compare:
        compare_seeds([load_run(folder) for folder in folders])
        return
    try:
        from results import pictures
    except ImportError as error:
        print(f'pictures need matplotlib: pip install matplotlib ({error})', file=sys.stderr)
        for folder in () if config.attention else folders:
            print_curves(load_run(folder))
        sys.exit(1 if config.attention else 0)
    if config.attention:
        for folder in folders:
            draw_attention(folder, config, pictures)
    else:
        draw_curves([load_run(folder) for folder in folders], pictures)


if __name__ == '__main__':
    run_program(main)

"""The pictures of the pages, drawn by matplotlib from results/*.json, and those of plot.py. A Figure of one's own,
without pyplot, needs no screen."""

import itertools
import math
import statistics

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from results.paired import final_loss, runs_by_config
from results.report import CLOSE, FULL_SIZE, SHORT, epoch_ends
from results.runs import RESULTS, RUNS, parent_of, read

MOST_TOKENS = 24  # the labels of more, in draw_attention, would not be legible
BLUE, ORANGE, GREEN, GREY, BLACK = '#0072b2 #d55e00 #009e73 #808080 #000000'.split()  # Okabe and Ito's
MILESTONES = {  # the curves of the first picture, with their labels
    'cosine': ('3  Adam, cosine', GREY),
    'weight_decay': ('5  flash model, weight decay', ORANGE),
    'sgd': ("1  PyTorch's tutorial, SGD", BLACK),
    'learning_rate': ('13  SwiGLU, warmup, 3e-4', GREEN),
    'value_residual': ('21  Muon, value residual', BLUE),
}


def new_figure(width, height, columns=1):
    """A figure and its axes, without the frames' upper and right sides."""
    figure = Figure(figsize=(width, height), layout='constrained', facecolor='white')
    axes = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    for one in axes:
        one.spines[['top', 'right']].set_visible(False)
        one.grid(alpha=0.25)
    return figure, axes


def spread(values, gap):
    """The values moved up, in their order, until neighbours are at least a gap apart: for labels."""
    order, placed = sorted(range(len(values)), key=values.__getitem__), list(values)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed


def draw_milestones(path):
    """Validation loss against tokens at full size, five runs; and where run 21 passes the last loss of run 13."""
    runs = runs_by_config(read(RESULTS / f'{FULL_SIZE}.json'))
    figure, [axes] = new_figure(9, 5)
    curves = {}
    for name in MILESTONES:
        curves[name] = [(e['step'] * 20 * 1024 / 1e6, e['val_loss']) for e in runs[name][0]['evaluations']]
    heights = spread([curve[-1][1] for curve in curves.values()], 0.085)
    for (name, curve), height in zip(curves.items(), heights, strict=True):
        label, color = MILESTONES[name]
        tokens, loss = curve[-1]
        axes.plot(*zip(*curve, strict=True), color=color, linewidth=2.2)
        axes.annotate(f'{label}: {loss:.2f}', (tokens + 1, height), color=color, va='center', fontsize=11)
    target = curves['learning_rate'][-1][1]
    tokens, loss = next(point for point in curves['value_residual'] if point[1] < target)  # the first evaluation
    axes.plot(tokens, loss, 'o', color=BLUE, markersize=8)
    axes.plot([tokens, 105], [target, target], ':', color=GREEN, linewidth=1.5)
    axes.text(tokens + 2, loss + 0.01, f'below {target:.2f} after {tokens:.0f} million', color=BLUE, fontsize=11)
    axes.set(xlabel='million tokens of training (three epochs of 210 books)', xlim=(0, 156),
             ylabel='validation loss (nats per token)', ylim=(2.65, 4.75))  # fmt: skip
    axes.set_xticks(range(0, 101, 20))
    figure.savefig(path, dpi=130)


def draw_staircase(path):
    """Each run's loss in the notebook, at full size and in the short run, joined to that of the run it changes."""
    full, short = (runs_by_config(read(RESULTS / f'{stem}.json')) for stem in (FULL_SIZE, SHORT))
    notebook = {name: run['losses'].split(', ') for name, run in RUNS.items() if run.get('losses', '-')[0].isdigit()}
    panels = {  # {run: {epoch: loss}}; the short run's one number has no epoch
        'notebook': {name: {i: float(loss) for i, loss in enumerate(losses, 1)} for name, losses in notebook.items()},
        'full size': {name: epoch_ends(runs[0]) for name, runs in full.items()},
        'short run, each seed': {name: {0: statistics.mean(map(final_loss, runs))} for name, runs in short.items()},
    }
    figure, all_axes = new_figure(11, 6.2, 3)
    for axes, (title, losses) in zip(all_axes, panels.items(), strict=True):
        is_short = title.startswith('short')
        last = {name: epochs[max(epochs)] for name, epochs in losses.items()}
        within = [loss for name, loss in last.items() if not (is_short and name == 'sgd')]
        margin = (max(within) - min(within)) / 12
        axes.set(title=title, xlabel='validation loss', xlim=(min(within) - margin, max(within) + 3.5 * margin))
        for i, name in enumerate(RUNS):
            if name not in losses:
                continue
            ancestor = parent_of(name)
            while ancestor and ancestor not in losses:  # where the parent was not run at this size
                ancestor = parent_of(ancestor)
            parent = losses[ancestor or name]
            epoch = max(losses[name].keys() & parent.keys())  # runs that were stopped are compared where they stopped
            before, loss = parent[epoch], losses[name][epoch]
            color = GREY if round(abs(loss - before), 4) <= CLOSE else GREEN if loss < before else ORANGE
            axes.plot([before, loss], [i, i], color=color, linewidth=3, alpha=0.5, solid_capstyle='butt')
            axes.plot(loss, i, 'o', color=BLACK, markersize=5)
            seeds = [*map(final_loss, short[name])] if is_short else []
            axes.plot(seeds, [i] * len(seeds), '|', color=BLACK, markersize=7)
            place = axes.get_yaxis_transform()  # x: a share of the frame; y: the run
            outside = ', '.join(f'{seed:.2f}' for seed in sorted(seeds) if seed > axes.get_xlim()[1])
            if outside:
                axes.text(1, i - 0.3, f'and {outside} →', transform=place, ha='right', fontsize=8, color=color)
            behind = {'facecolor': 'white', 'edgecolor': 'none', 'pad': 1}
            text = f'{last[name]:.2f}'
            axes.text(1, i, text, transform=place, va='center', ha='right', fontsize=9, color=color, bbox=behind)
    all_axes[0].set_yticks(range(len(RUNS)), [f'{run["number"]}  {name}' for name, run in RUNS.items()])
    all_axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def draw_learning_rates(path):
    """Final loss against the peak learning rate, a curve per optimizer."""
    runs = read(RESULTS / 'learning_rates_stdlib_cpu.json')['runs']
    figure, [axes] = new_figure(9, 4.5)
    for color, series in zip((BLACK, ORANGE, GREEN, BLUE), dict.fromkeys(run['series'] for run in runs), strict=False):
        curve = sorted((run['learning_rate'], final_loss(run)) for run in runs if run['series'] == series)
        axes.plot(*zip(*curve, strict=True), 'o-', color=color, linewidth=2)
        text = axes.annotate(
            series, curve[-1], (8, 0), textcoords='offset points', color=color, va='center', fontsize=11
        )
        text.set_bbox({'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})  # where another curve passes
    axes.set(xscale='log', xlabel='peak learning rate', ylabel='validation loss after 2,000 steps')
    axes.margins(x=0.15)
    figure.savefig(path, dpi=130)


# ---- those of plot.py ----------------------------------------------------------------------------------------------


def draw_curves(series, behind, path):
    """Losses against tokens. Each {label: seeds} holds a pair of curves per seed, {tokens: training loss} and {tokens:
    validation loss}. It becomes the seeds' mean, in a band from the lowest to the highest. What is behind is grey."""
    figure, [axes] = new_figure(9, 5)
    colors = itertools.cycle((BLUE, ORANGE, GREEN, BLACK))
    styles = {'linewidth': 1}, {'linewidth': 2.2, 'marker': 'o'}
    for label, seeds in [*behind.items(), *series.items()]:
        color = GREY if label in behind else next(colors)
        label += f' ({len(seeds)} seeds)' if len(seeds) > 1 else ''
        for kind, style in enumerate(styles):  # training, validation
            curves = [pair[kind] for pair in seeds if pair[kind]]
            x = sorted(set.intersection(*map(set, curves))) if curves else []
            y = [[curve[tokens] for curve in curves] for tokens in x]
            [line] = axes.plot(x, [*map(statistics.mean, y)], color=color, **style)
            axes.fill_between(x, [*map(min, y)], [*map(max, y)], color=color, alpha=0.25, linewidth=0)
        line.set_label(f'{label}: {statistics.mean(y[-1]):.2f}' if y else label)
    axes.set(xlabel='tokens of training', xlim=(0, None), ylabel='loss (nats per token)')
    axes.set_title('lines with dots: validation loss; thin lines: training loss', fontsize=10)
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def draw_attention(weights, tokens, keys, title, path):
    """The weights (H, T, T) of attention heads side by side: row t says how much token t attends to each key. Its
    future, to which it cannot attend, is grey."""
    columns = min(3, len(weights))
    rows = -(-len(weights) // columns)
    figure = Figure(figsize=(9, 9 / columns * rows + 0.8), layout='constrained', facecolor='white')
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    future = np.triu(np.full(weights[0].shape, math.nan), 1)
    for head, (axes, one) in enumerate(itertools.zip_longest(panels, weights), 1):
        if one is None:
            axes.remove()
            continue
        image = axes.imshow(one + future, cmap='Blues', vmin=0, vmax=1)
        axes.set_title(f'head {head}', fontsize=10)
        axes.set_facecolor('#eeeeee')
        axes.tick_params(labelbottom=True, length=0, labelsize=8)
        for set_ticks, labels, rotation in ((axes.set_xticks, keys, 90), (axes.set_yticks, tokens, 0)):
            set_ticks(range(len(tokens)), labels, rotation=rotation, parse_math=False)  # '$' is a token, too
    figure.colorbar(image, ax=figure.axes, shrink=0.5, label='attention weight')
    figure.savefig(path, dpi=130)


PICTURES = {
    'milestones': draw_milestones,
    'staircase': draw_staircase,
    'learning_rates_stdlib_cpu': draw_learning_rates,
}

"""The pictures of results/README.md, drawn by matplotlib, which is imported only here and only when something is drawn.
A Figure of one's own, without pyplot, needs no screen: it is saved by matplotlib's Agg."""

import itertools
import math
import os
import statistics

from results.paired import interval, last_loss, runs_by_row
from results.rows import NUMBERS

PALETTE = '#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000'.split()  # Okabe and Ito's, for all eyes
SLOW = 'sgd'  # its losses can be far above all others', and are then left out of the frame


def new_figure(width, height):
    """A figure and its axes, without the frame's upper and right side."""
    os.environ['MPLBACKEND'] = 'agg'  # a notebook's, say, may not be there
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained', facecolor='white')
    axes = figure.subplots()
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def spread(values, gap):
    """The values moved up, in their order, until neighbours are at least a gap apart: for labels."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for below, above in itertools.pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed


def draw_losses(results, path):
    """Validation loss by epoch, the mean over the seeds, a line per row with its name at the line's end."""
    figure, axes = new_figure(9, 5.5)
    curves = {}
    for row in dict.fromkeys(run['row'] for run in results['rows']):
        evaluations = zip(*(run['evaluations'] for run in results['rows'] if run['row'] == row), strict=True)
        curves[row] = [(e[0]['epoch'], statistics.mean(one['val_loss'] for one in e)) for e in evaluations]
    highest = {row: max(loss for _, loss in curve) for row, curve in curves.items()}
    low, high = min(curve[-1][1] for curve in curves.values()), max(highest.values())
    if highest.get(SLOW) == high and len(curves) > 1:
        del highest[SLOW]
        axes.set_title(f'above the frame: {SLOW}, which begins at {high:.1f}', loc='left', fontsize=10)
        high = max(highest.values())
    margin = (high - low) / 30
    axes.set(xlabel='epoch', ylabel='validation loss (nats per token)', ylim=(low - margin, high + margin))
    begin, end = min(curve[0][0] for curve in curves.values()), max(curve[-1][0] for curve in curves.values())
    axes.set_xlim(begin - 0.02 * (end - begin), end + 0.01 * (end - begin))
    label_heights = spread([curve[-1][1] for curve in curves.values()], 1.05 * margin)
    for i, ((row, curve), height) in enumerate(zip(curves.items(), label_heights, strict=True)):
        style = {'color': PALETTE[i % len(PALETTE)], 'linestyle': ('-', '--', ':', '-.')[i // len(PALETTE)]}
        axes.plot(*zip(*curve, strict=True), marker='o', markersize=3, **style)
        axes.annotate(f'{row} {curve[-1][1]:.2f}', curve[-1], (1.03, height), textcoords=('axes fraction', 'data'),
                      color=style['color'], va='center', annotation_clip=False,
                      arrowprops={'arrowstyle': '-', 'color': style['color'], 'relpos': (0, 0.5)})  # fmt: skip
    figure.savefig(path, dpi=150)


def draw_ends(results, path):
    """Each row's last validation loss: a dot per seed, their mean, and its 95 % interval. Rows stand in their order."""
    runs = runs_by_row(results)
    figure, axes = new_figure(9, 0.3 * len(runs) + 1)
    ends = {row: [*map(last_loss, mine)] for row, mine in runs.items()}
    others = [losses for row, losses in ends.items() if row != SLOW or len(ends) == 1]
    low, high = min(map(min, others)), max(map(max, others))
    if max(map(max, ends.values())) > high:
        axes.set_title(f'{SLOW} reaches beyond the frame', loc='left', fontsize=10)
    for i, losses in enumerate(ends.values()):
        mean, (lower, upper) = statistics.mean(losses), interval(losses)
        if math.isfinite(lower):
            axes.plot([lower, upper], [i, i], color=PALETTE[0], linewidth=2, alpha=0.5)
        axes.plot(losses, [i] * len(losses), '|', color=PALETTE[0], markersize=7)
        axes.plot(mean, i, 'o', color=PALETTE[0])
        axes.annotate(f'{mean:.2f}', (1.01, i), xycoords=('axes fraction', 'data'), va='center')
    margin = (high - low) / 30 or 1
    axes.set_xlim(low - margin, high + margin)  # few seeds can have intervals many times as wide
    axes.set_xlabel('last validation loss (nats per token): each seed, their mean and its 95 % interval')
    axes.set_yticks(range(len(ends)), [f'{NUMBERS.get(row, "")}  {row}' for row in ends])
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def draw_ladder(results, path):
    """Curves of few rows, ends of many."""
    (draw_losses if len(runs_by_row(results)) <= len(PALETTE) else draw_ends)(results, path)


def milliseconds(ms):
    """With tenths below 100."""
    return f'{ms:,.0f}' if ms >= 100 else f'{ms:.1f}'


def draw_speed(results, path):
    """The time of a step, a dot per row of bench.py on a line from its 10th to its 90th percentile."""
    rows = results['rows']
    figure, axes = new_figure(9, 0.3 * len(rows) + 1)
    for i, row in enumerate(rows):
        axes.plot([row['ms_p10'], row['ms_p90']], [i, i], color=PALETTE[0], linewidth=2, alpha=0.5)
        axes.plot(row['ms_median'], i, 'o', color=PALETTE[0])
        axes.annotate(
            milliseconds(row['ms_median']), (row['ms_p90'], i), (7, 0), textcoords='offset points', va='center'
        )
    axes.set(xscale='log', xlabel='ms per batch: median, and 10th to 90th percentile (each grid line doubles the time)')
    axes.set_yticks(range(len(rows)), [row['config'] for row in rows])
    axes.invert_yaxis()
    low, high = min(row['ms_p10'] for row in rows), max(row['ms_p90'] for row in rows)
    powers = [100 * 2.0**i for i in range(-9, 20)]
    ticks = [tick for tick in powers if low / 2 < tick < high * 2]
    axes.set_xticks(ticks, [f'{tick:,.4g}' for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low / 1.2, high * 1.4)
    figure.savefig(path, dpi=150)


PICTURES = {'ladder': draw_ladder, 'bench': draw_speed}

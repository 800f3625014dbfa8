"""Rows of a ladder compared seed by seed. The same seed gives two rows the same order of the data, so their difference
spreads less than they do."""

import math
import statistics

from results.rows import NUMBERS

# Student's t of 95 % for 2, 3, ... degrees of freedom; more than nine have at most the last
T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def runs_by_row(results):
    """{row: its runs, one per seed}, the ladder's rows in its order, then any others."""
    names = [*NUMBERS, *(run['row'] for run in results['rows'])]
    runs = {name: [run for run in results['rows'] if run['row'] == name] for name in names}
    return {name: mine for name, mine in runs.items() if mine}


def last_loss(run, key='val_loss'):
    """A run's last loss; the validation loss is that of the moving average of the weights where the run kept one."""
    last = run['evaluations'][-1]
    return last['ema_loss'] if key == 'val_loss' and last['ema_loss'] is not None else last[key]


def paired(runs, row, other, key='val_loss'):
    """The last losses of a row less those of another, for each seed that both have."""
    a, b = ({run['seed']: last_loss(run, key) for run in runs.get(name, ())} for name in (row, other))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def interval(values):
    """The 95 % interval of the mean, by Student's t: (low, high). Fewer than three values tell too little of it."""
    if len(values) < 3:
        return -math.inf, math.inf
    t = T95[min(len(values), len(T95) + 2) - 3]
    mean, half = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def verdict(differences):
    """What paired differences say of the claim that they are below 0: their interval decides."""
    low, high = interval(differences)
    return 'holds' if high < 0 else 'does not hold here' if low > 0 else 'not decided'

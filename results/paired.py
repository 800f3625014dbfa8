"""Is run B better than run A? Compare them seed by seed.

The same seed gives both runs the same batches in the same order. Their difference therefore varies less than either
loss does, and a few seeds decide what many unpaired runs could not.
"""

import math
import statistics

# Student's t for a 95 % interval with 2, 3, ... degrees of freedom; for more than nine the last is slightly wide
T95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def runs_by_config(results):
    """{config: its runs, one per seed}, in the order in which the file names them first."""
    runs = {}
    for run in results.get('runs', ()):
        runs.setdefault(run['config'], []).append(run)
    return runs


def final_loss(run, key='val_loss'):
    """A run's last loss. Its validation loss is that of the averaged weights where it kept an average."""
    last = run['evaluations'][-1]
    return last['ema_loss'] if key == 'val_loss' and last['ema_loss'] is not None else last[key]


def paired(runs, config, other, key='val_loss'):
    """The final losses of one config less those of another, for each seed that both have."""
    a, b = ({run['seed']: final_loss(run, key) for run in runs.get(name, ())} for name in (config, other))
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def interval(values):
    """The 95 % confidence interval of the mean, by Student's t: (low, high). It is infinite for fewer than three."""
    if len(values) < 3:
        return -math.inf, math.inf
    t = T95[min(len(values), len(T95) + 2) - 3]
    mean, half = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half

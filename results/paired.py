"""Is run B better than run A? Compare them seed by seed.

The same seed gives both runs the same batches in the same order. Their difference therefore varies less than either
loss does, and a few seeds decide what many unpaired runs could not.
"""

import itertools
import math
import statistics
import sys

# knobs in which two seeds of one setting may differ
NOT_SETTINGS = ('seed out_dir init_from overwrite eval_interval log_interval attention device compile threads '
                'products').split()  # fmt: skip
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


def t95(n):
    """Student's t for the 95 % interval of a mean of n values, at least three."""
    return T95[min(n, len(T95) + 2) - 3]


def interval(values):
    """The 95 % confidence interval of the mean, by Student's t: (low, high). It is infinite for fewer than three."""
    if len(values) < 3:
        return -math.inf, math.inf
    mean, half = statistics.mean(values), t95(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def settings_of(knobs):
    """The knobs that two seeds of one setting share."""
    return {name: value for name, value in knobs.items() if name not in NOT_SETTINGS}


def group_seeds(runs):
    """The runs as lists of seeds, one for each setting and corpus."""
    groups = {}
    for run in runs:
        groups.setdefault((*run['settings'].items(), run['corpus']), []).append(run)
    return [*groups.values()]


def check_comparable(runs):
    """Exit with one line unless these are runs of two settings whose final losses can be compared."""
    for text in ('corpus', 'validation text'):
        if len({run[text] for run in runs} - {None}) > 1:  # older checkpoints lack one
            found = ', '.join(f'{run["folder"]}: {run["settings"]["dataset"]}' for run in runs)
            sys.exit(f'expected runs with the same {text}, found several ({found}).')
    parts = {run['folder']: run['evaluated'] for run in runs}
    if len({*parts.values()}) > 1:
        found = ', '.join(f'{folder}: {n or "all"}' for folder, n in parts.items())
        sys.exit(f'expected losses on the same validation tokens, found {found}: train without --eval_iters.')
    ends = [run['evaluations'][-1]['step'] * run['tokens_per_step'] if run['evaluations'] else 0 for run in runs]
    if len({*ends}) > 1 or not ends[0]:
        found = ', '.join(f'{run["folder"]}: {end:,}' for run, end in zip(runs, ends, strict=True))
        sys.exit(f'expected final losses after the same number of tokens, found {found}; --init_from=resume trains on.')
    groups = group_seeds(runs)
    if len(groups) == 1:
        sys.exit('expected runs of two settings, found one: name runs of another as well.')
    if len(groups) > 2:
        changes = [name for name in runs[0]['settings'] if len({run['settings'].get(name) for run in runs}) > 1]
        sys.exit(f'expected runs of two settings, found {len(groups)}: they differ in {", ".join(changes)}.')
    for group in groups:
        for one, other in itertools.combinations(group, 2):
            if one['seed'] == other['seed']:
                sys.exit(f'{one["folder"]} and {other["folder"]} are the same run, seed {one["seed"]}: leave one out.')


def compare_seeds(runs):
    """Print the final losses of runs of two settings, a and b, seed by seed, and what they say."""
    check_comparable(runs)
    groups = dict(zip('ab', group_seeds(runs), strict=True))
    settings = {name: group[0]['settings'] for name, group in groups.items()}
    losses = {name: {run['seed']: final_loss(run) for run in group} for name, group in groups.items()}
    for name, other in (('a', 'b'), ('b', 'a')):
        changes = [f'{knob}={value}' for knob, value in settings[name].items() if settings[other].get(knob) != value]
        print(f'{name}: {" ".join(run["folder"] for run in groups[name])}, with {", ".join(changes)}')
    print('\nseed        a        b    b - a')
    for seed in sorted({*losses['a'], *losses['b']}):
        a, b = (losses[name].get(seed, math.nan) for name in 'ab')
        print(f'{seed:4} {a:8.3f} {b:8.3f} {b - a:+8.3f}'.replace('+nan', '   -').replace('nan', '  -'))
    print(f'\n{verdict(groups, "a", "b")}')


def verdict(runs, a, b):
    """What the seeds say of b against a, in a sentence: the difference, its interval, whether that decides it."""
    differences = paired(runs, b, a)
    mean, n = statistics.mean(differences or [0]), len(differences)
    found = f'{b} is {"lower" if mean < 0 else "higher"} than {a} by {abs(mean):.3f}' if n else 'no seed is in both'
    if n < 3:
        return f'not decided: {found}; {seeds_to_train(runs, a, b)}'
    low, high = sorted(-bound if mean < 0 else bound for bound in interval(differences))
    found += f' [{low:.3f}, {high:.3f}]'
    if low > 0:
        return f'{found}: decided'
    sd = statistics.stdev(differences)
    enough = (more for more in range(1, 101) if t95(n + more) * sd / math.sqrt(n + more) < abs(mean))
    more = next(enough, None)  # if the mean and the standard deviation stay as they are
    seeds = {1: 'about one more seed', None: 'more than 100 more seeds'}.get(more, f'about {more} more seeds')
    return f'not decided: {found}, {seeds}'


def seeds_to_train(runs, a, b):
    """'train seeds 2 and 3 of both': what three pairs lack. A seed that one side has already comes first."""
    have = {name: {run['seed'] for run in runs[name]} for name in (a, b)}
    pairs, halves = have[a] & have[b], have[a] ^ have[b]
    new = (seed for seed in itertools.count(1) if seed not in pairs | halves)
    wanted = sorted(itertools.islice(itertools.chain(sorted(halves), new), 3 - len(pairs)))
    missing = {name: [str(seed) for seed in wanted if seed not in have[name]] for name in (a, b)}
    if missing[a] == missing[b]:
        missing = {'both': missing[a]}
    words = [f'{" and ".join(seeds)} of {name}' for name, seeds in missing.items() if seeds]
    return f'train {"seeds" if len(wanted) > 1 else "seed"} {", ".join(words)}'

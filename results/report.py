"""The tables of README.md and results/README.md, made from results/*.json.

    python -m results.report

It writes each table between its marks, <!-- NAME --> and <!-- /NAME -->, and draws the pictures with matplotlib.
"""

import math
import os
import statistics
import sys

import numpy as np

import train
from bpe import MERGES
from configurator import configure, describe
from machine import count_params, run_program
from results.paired import final_loss, interval, paired, runs_by_config
from results.runs import NOTEBOOK, RESULTS, ROOT, RUNS, config_path, parent_of, read

FULL_SIZE, SHORT, SPEED = 'ladder_books_cuda', 'ladder_stdlib_cpu', 'bench_cpu'
CLOSE = 0.02  # nats: a smaller difference of two single runs at full size decides nothing
NOT_MEASURED = 'not measured'
VOCAB_SIZE = 256 + MERGES + 1


def markdown(columns, rows):
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def mean_sd(values, digits=2):
    """The mean, and the standard deviation if there are several values; NOT_MEASURED if there is none."""
    if not values:
        return NOT_MEASURED
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) < 2 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def signed(differences):
    """The mean of paired differences and its interval, as text."""
    if not differences:
        return ''
    mean, (low, high) = statistics.mean(differences), interval(differences)
    return f'{round(mean, 2) + 0.0:+.2f}' + (f' [{low:+.2f}, {high:+.2f}]' if math.isfinite(low) else '')


# ---- runs ----------------------------------------------------------------------------------------------------------


def epoch_ends(run, key='val_loss'):
    """{1: loss, 2: loss, 3: loss} at the ends of the epochs that a run reached."""
    whole = [e for e in run['evaluations'] if e['epoch'] == int(e['epoch'])]
    key = 'ema_loss' if key == 'val_loss' and any(e['ema_loss'] is not None for e in whole) else key
    return {int(e['epoch']): e[key] for e in whole}


def full_size_losses(runs):
    """'3.76, 3.56, 3.53': the validation losses after epochs 1, 2, 3, with a dash for an epoch that was not reached."""
    if not runs:
        return NOT_MEASURED
    ends = epoch_ends(runs[0])
    return ', '.join(f'{ends[epoch]:.2f}' if epoch in ends else '–' for epoch in (1, 2, 3))


def full_size_difference(full, config, other, key='val_loss'):
    """A config's loss less another's, one seed each, at the last epoch whose end both reached; None without one."""
    a, b = ({} if name not in full else epoch_ends(full[name][0], key) for name in (config, other))
    last = max(a.keys() & b.keys(), default=None)
    return None if last is None else a[last] - b[last]


def parameters(name):
    """How many parameters a config's model has, as the notebook counts them."""
    c, _ = configure([train.__file__], [config_path(name)])
    return count_params(c, VOCAB_SIZE)


def runs_table(full, short, names):
    """The main table: what each run changes, the notebook's losses, ours at full size, and the short run."""
    columns = ['#', 'config', 'what changes', 'parameters', 'notebook', 'full size', 'short run', 'difference']
    lines = []
    for name in names:
        run, ends = RUNS[name], [*map(final_loss, short.get(name, ()))]
        cells = [run['number'], f'[`{name}`](config/{name}.py)', run['changes'], f'{parameters(name):,}']
        cells += [run.get('losses'), full_size_losses(full.get(name)), mean_sd(ends)]
        lines.append([*cells, signed(paired(short, name, parent_of(name)))])
    kept = [i for i in range(len(columns)) if any(line[i] is not None for line in lines)]
    return markdown([columns[i] for i in kept], [[line[i] for i in kept] for line in lines])


def verdict(low, high, small):
    """What the interval of a difference says of the claim that it is below 0, or small: True, False or None."""
    if small:
        return True if -2 * CLOSE < low and high < 2 * CLOSE else False if low > CLOSE or high < -CLOSE else None
    return True if high < 0 else False if low > 0 else None


def conclusions_table(full, short, bench):
    """The notebook's conclusions, and what ours say of them: at full size by one run each, within CLOSE; in short runs
    by the interval of paired differences; of speed by whether the middle 80 % of the steps' times are apart."""
    lines, times = [], {row['config']: row for row in bench['rows']}
    for claim in NOTEBOOK['conclusions']:
        config, other, small = claim['lower'], claim['than'], claim['in'] == 'small'
        if claim['in'] == 'ms':
            a, b = times[config], times[other]
            cells = [f'{a["ms_median"]:,.0f}, {b["ms_median"]:,.0f} ms', '']
            found = [verdict(a['ms_p10'] - b['ms_p90'], a['ms_p90'] - b['ms_p10'], False)]
        else:
            key, margin = 'val_loss' if small else claim['in'], 0 if small else CLOSE
            gap, differences = full_size_difference(full, config, other, key), paired(short, config, other, key)
            cells = [
                NOT_MEASURED if gap is None else f'{round(gap, 2) + 0.0:+.2f}',
                signed(differences) or NOT_MEASURED,
            ]
            found = [verdict(*interval(differences), small)]
            found += [] if gap is None else [verdict(gap - margin, gap + margin, small)]
        answers = {answer for answer in found if answer is not None}
        decided = 'not decided' if not answers else 'holds' if answers == {True} else 'does not hold here'
        decided = 'holds in one of the two' if len(answers) == 2 else decided
        lines.append(
            [claim['number'], claim['conclusion'], f'`{config}`, `{other}`', claim['notebook'], *cells, decided]
        )
    return markdown(['#', 'the notebook concludes', 'configs', 'notebook', 'full size', 'short run', 'verdict'], lines)


def notebook_table():
    """The notebook's runs in its figures: the line by which train.py describes each, its losses and its time."""
    lines = []
    for name, run in RUNS.items():
        if 'losses' in run:
            c, _ = configure([train.__file__], [config_path(name)])
            lines.append([run['number'], describe(c, parameters(name)), run['losses'], run['ms_per_batch']])
    return markdown(['#', 'run', 'losses after epochs 1, 2, 3', 'ms/batch'], lines)


def details_table(results):
    """Each config of a results file at the end of its runs: mean ± standard deviation over the seeds."""
    lines = []
    for name, runs in runs_by_config(results).items():
        last = [run['evaluations'][-1] for run in runs]
        times = [run['ms_per_batch'] for run in runs if run['ms_per_batch']]
        losses = [[*map(final_loss, runs)], *([e[key] for e in last] for key in ('train_loss', 'bits_per_byte'))]
        seeds = ', '.join(str(run['seed']) for run in runs)
        ms = f'{statistics.median(times):.0f}' if times else ''
        number = RUNS.get(name, {}).get('number', '')
        lines.append([number, f'`{name}`', seeds, last[0]['step'], *(mean_sd(each, 3) for each in losses), ms])
    columns = ['#', 'config', 'seeds', 'steps', 'validation loss', 'training loss', 'bits per byte', 'ms/batch']
    return markdown(columns, lines)


def learning_rates_table(results):
    """Final validation losses, a line per optimizer and a column per learning rate."""
    losses = {(run['series'], run['learning_rate']): f'{final_loss(run):.2f}' for run in results['runs']}
    series, rates = dict.fromkeys(s for s, _ in losses), sorted({rate for _, rate in losses})
    lines = [[one, *(losses.get((one, rate), '') for rate in rates)] for one in series]
    names = [f'{rate:g}' if rate >= 0.1 else np.format_float_scientific(rate, trim='-', exp_digits=1) for rate in rates]
    return markdown(['learning rate', *names], lines)


# ---- times, and tables that their file holds as they are ----------------------------------------------------------


def milliseconds(ms):
    """With tenths below 100."""
    return f'{ms:,.0f}' if ms >= 100 else f'{ms:.1f}'


def bench_table(results):
    lines = []
    for row in results['rows']:
        median, low, high = (milliseconds(row[name]) for name in ('ms_median', 'ms_p10', 'ms_p90'))
        memory = f'{row["peak_memory_gb"]:.1f}' if row.get('peak_memory_gb') and 'cpu' not in row['device'] else ''
        lines.append([f'`{row["config"]}`', median, f'{low} to {high}', f'{row["tokens_per_s"]:,.0f}', memory])
    return markdown(['config', 'ms/batch', 'p10 to p90', 'tokens/s', 'memory in GB'], lines)


def nanogpt_table(results):
    """A step beside nanoGPT's, a line per shape, medians in ms."""
    shape = '{n_layer} layers, {n_embd} wide, {batch_size} x {block_size}'
    lines = [[shape.format(**row), *map(milliseconds, row['ms_median'].values())] for row in results['rows']]
    return markdown(['shape', *results['rows'][0]['ms_median']], lines)


def plain_table(results):
    lines = [[f'{cell:.2f}' if isinstance(cell, float) else cell for cell in row.values()] for row in results['rows']]
    return markdown(results['rows'][0], lines)


TABLES = {'ladder': details_table, 'learning': learning_rates_table, 'bench': bench_table, 'nanogpt': nanogpt_table}


def all_tables():
    """{(page, mark): table} of every table that is made from the results."""
    front, page = ROOT / 'README.md', RESULTS / 'README.md'
    files = {path.stem: read(path) for path in sorted(RESULTS.glob('*.json')) if path.stem != 'notebook'}
    full, short = runs_by_config(files[FULL_SIZE]), runs_by_config(files[SHORT])
    files_with_table = {stem: results for stem, results in files.items() if 'cases' not in results}
    tables = {(page, stem): TABLES.get(stem.split('_')[0], plain_table)(results)
              for stem, results in files_with_table.items()}  # fmt: skip
    return tables | {
        (front, 'notebook'): runs_table(full, short, [name for name in RUNS if 'losses' in RUNS[name]]),
        (front, 'past'): runs_table(full, short, [name for name in RUNS if 'losses' not in RUNS[name]]),
        (page, 'conclusions'): conclusions_table(full, short, files[SPEED]),
        (RESULTS / 'notebook.md', 'runs'): notebook_table(),
    }


def replace_between(path, name, table):
    """Replace what stands between a page's marks <!-- name --> and <!-- /name -->. Exits if they are not there."""
    text, begin, end = path.read_text(encoding='utf-8'), f'<!-- {name} -->\n', f'<!-- /{name} -->\n'
    if begin not in text or end not in text:
        sys.exit(f'{os.path.relpath(path)} has no line {begin.strip()} or no line {end.strip()}: add the two lines '
                 'where the table belongs.')  # fmt: skip
    path.write_text(text.split(begin)[0] + begin + table + '\n' + end + text.split(end)[1], encoding='utf-8')


def main():
    try:
        from results.pictures import PICTURES
    except ImportError as error:
        sys.exit(f'the pictures need matplotlib: pip install matplotlib ({error})')
    for (path, name), table in all_tables().items():
        replace_between(path, name, table)
    for name, draw in PICTURES.items():
        draw(RESULTS / f'{name}.png')
    print('the tables and pictures are made')


if __name__ == '__main__':
    run_program(main)

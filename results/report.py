"""The tables of results/README.md and the front page's, made from results/*.json: the results KIND_NAME.json become
what stands between <!-- KIND_NAME --> and <!-- /KIND_NAME -->. `python -m results.ladder --report` calls it."""

import math
import os
import statistics
import sys
from pathlib import Path

import torch

import train
from configurator import configure
from data import MERGES
from model import build_model
from results.paired import interval, last_loss, paired, runs_by_row, verdict
from results.pictures import PICTURES, milliseconds
from results.record import RESULTS, ROOT, read
from results.rows import LOG, NUMBERS, config_of, parent_of

LADDER = 'ladder_stdlib_cpu.json'  # whose losses stand in the front page's table, and decide the log's claims
SPEED = 'bench_cpu.json'  # whose times decide those on speed
# the log's claims: (its number, the claim, what the log measured, the row that should be lower, the other, in what).
# What takes a long training to see, no short one can decide: its verdict is given.
LONG = 'a coffee break cannot decide it'
CLAIMS = (
    ('1', 'Adam beats SGD', '2.86, 2.96', 'adam', 'sgd', 'val_loss'),
    ('2', 'a cosine schedule helps a little', '2.85, 2.86', 'cosine', 'adam', 'val_loss'),
    ('3', 'the flash model is faster', '', 'flash', 'cosine', 'ms'),
    ('', 'and trains better', '2.79, 2.91', 'flash', 'cosine', 'train_loss'),
    ('', 'and validates far worse', '2.85, 3.14', 'cosine', 'flash', 'val_loss'),
    ('4', 'weight decay beats dropout', '2.64, 3.14', 'weight_decay', 'flash', 'val_loss'),
    ('', 'both are better than dropout alone', '', 'dropout_weight_decay', 'flash', 'val_loss'),
    ('', 'and worse than weight decay alone', '', 'weight_decay', 'dropout_weight_decay', 'val_loss'),
    ('5', 'an average of the weights changes little', '2.62, 2.62', 'ema', 'weight_decay', LONG),
    ('6', 'SwiGLU beats more layers', '2.58, 2.59', 'swiglu', 'deep', 'val_loss'),
    ('', 'and a wider feed-forward', '2.60, 2.61', 'swiglu', 'wide', 'val_loss'),
    ('', 'and is faster than more layers', '38, 48.5 ms', 'swiglu', 'deep', 'ms'),
    ('7', '18 layers help', '2.32, 2.60', 'swiglu_18', 'swiglu', 'val_loss'),
    ('8', 'warmup changes little', '2.56, 2.56', 'warmup', 'swiglu', LONG),
    ('', 'three times the rate helps', '2.54, 2.56', 'learning_rate', 'warmup', LONG),
    ('9', '97 M parameters help', '2.23, 2.59', 'swiglu_23', 'learning_rate', 'val_loss'),
    ('10', 'learned positions beat rotary ones', '2.53, 2.54', 'learned', 'learning_rate', 'val_loss'),
)


def markdown(columns, rows):
    """A table in Markdown."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def mean_sd(values, digits):
    """The mean, and the standard deviation if there are several values."""
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) < 2 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def signed(differences):
    """The mean of paired differences and its interval, as text."""
    if not differences:
        return ''
    mean, (low, high) = statistics.mean(differences), interval(differences)
    return f'{round(mean, 2) + 0.0:+.2f}' + (f' [{low:+.2f}, {high:+.2f}]' if math.isfinite(low) else '')


def claims_table(results, bench):
    """The log's claims: those on losses are decided by the intervals of paired differences, those on speed by whether
    the middle 80 % of the steps' times are apart."""
    lines, runs = [], runs_by_row(results)
    times = {row['config']: row for row in bench['rows']}
    for number, claim, log, row, other, key in CLAIMS:
        if key == 'ms':
            a, b = times[row], times[other]
            ours = f'{a["ms_median"]:,.0f}, {b["ms_median"]:,.0f} ms'
            faster, slower = a['ms_p90'] < b['ms_p10'], a['ms_p10'] > b['ms_p90']
            decided = 'holds' if faster else 'does not hold here' if slower else 'not decided'
        else:
            differences = paired(runs, row, other, key if key != LONG else 'val_loss')
            ours = signed(differences)
            decided = 'not measured yet' if not differences else LONG if key == LONG else verdict(differences)
        lines.append([number, claim, f'`{row}`, `{other}`', log, ours, decided])
    return markdown(['#', 'the log claims', 'of', 'it measured', 'ours: difference', 'verdict'], lines)


def epochs_of(run):
    """The evaluations at the ends of epochs, which are whole numbers, and the last one."""
    evaluations = run['evaluations']
    return [e for e in evaluations if e is evaluations[-1] or e['epoch'] == int(e['epoch'])]


def parameters(row):
    """How many parameters a row's model has."""
    c, _ = configure([train.__file__], [config_of(row), '--attention=naive'])
    with torch.device('meta'):  # counted, not allocated
        return build_model(c, 256 + MERGES + 1).num_params()


def front_page_table(results):
    """The front page's table: the log's fifteen rows, what each changes, the log's losses, ours at the end, and the
    difference from the row that it changes, seed by seed."""
    lines, runs = [], runs_by_row(results)
    for row, (change, log) in LOG.items():
        ours = mean_sd(ends, 2) if (ends := [*map(last_loss, runs.get(row, ()))]) else 'not measured yet'
        difference = signed(paired(runs, row, parent_of(row)))
        name = f'[`{row}`](config/{row}.py)'
        lines.append([NUMBERS[row], name, change, f'{parameters(row):,}', log, ours, difference])
    return markdown(['#', 'config', 'what changes', 'parameters', 'the log', 'ours', 'difference'], lines)


def ladder_table(results):
    """The log's losses beside ours at the ends of epochs, mean ± standard deviation over the seeds; then samples."""
    lines, runs_of = [], runs_by_row(results)
    for row, runs in runs_of.items():
        ends = list(zip(*map(epochs_of, runs), strict=True))
        losses = ', '.join(mean_sd([e['val_loss'] for e in end], 2) for end in ends)
        if ends[-1][0]['ema_loss'] is not None:
            losses += f' (average: {mean_sd([e["ema_loss"] for e in ends[-1]], 2)})'
        training = mean_sd([e['train_loss'] for e in ends[-1]], 2)
        bits = mean_sd([e['bits_per_byte'] for e in ends[-1]], 3)
        times = [run['ms_per_batch'] for run in runs if run['ms_per_batch']]
        ms, log = f'{statistics.median(times):.0f}' if times else '', LOG[row][1] if row in LOG else ''
        difference = signed(paired(runs_of, row, parent_of(row))) if row in NUMBERS else ''
        lines.append([NUMBERS.get(row, ''), f'`{row}`', log, losses, difference, training, bits, ms])
    columns = ['#', 'config', 'the log', 'ours', 'difference', 'training', 'bits per byte', 'ms/batch']
    return markdown(columns, lines) + samples(results)


def samples(results):
    """What the rows made of the prompt, a line each, of the first seed; nothing where no sample was kept."""
    first = {row: runs[0].get('sample') for row, runs in runs_by_row(results).items()}
    lines = [f'    {row:24s}{text[:200].rstrip()}' for row, text in first.items() if text]
    return '\n'.join(['', '', 'Each goes on from the same beginning:', '', *lines]) if lines else ''


def beside(mine, published):
    """A reader's last losses beside the published ones, a row each."""
    theirs = runs_by_row(published) if published else {}
    lines = []
    for row, runs in runs_by_row(mine).items():
        cells = [mean_sd([*map(last_loss, each)], 3) if each else ''
                 for each in (runs, theirs.get(row))]  # fmt: skip
        lines.append([f'`{row}`', *cells])
    return markdown(['config', 'yours', 'published'], lines)


def dropout_table(results):
    """The log's dropout puzzle."""
    lines = [[c['trained'], c['evaluated'], f'{c["train"]:.2f}', f'{c["val"]:.2f}'] for c in results['cases']]
    return markdown(['trained with', 'dropout in evaluation', 'loss on training text', 'on validation text'], lines)


def positions_table(results):
    """What was tried to explain how learned and rotary positions differ."""
    lines = [[case['case'], f'`{case["row"]}`', f'{last_loss(case):.2f}'] for case in results['cases']]
    return markdown(['what differs', 'from', 'loss'], lines)


def bench_table(results):
    """The rows of bench.py; the earlier ones have the speed of their arithmetic as well."""
    columns, lines = ['config', 'ms/batch', 'p10 to p90', 'tokens/s'], []
    has_peak = all('tflops' in row for row in results['rows'])
    for row in results['rows']:
        median, low, high = (milliseconds(row[name]) for name in ('ms_median', 'ms_p10', 'ms_p90'))
        lines.append([f'`{row["config"]}`', median, f'{low} to {high}', f'{row["tokens_per_s"]:,.0f}'])
        if has_peak:
            lines[-1] += [f'{row["tflops"]:.3f}', f'{row["peak_share"]:.0%}']
    return markdown(columns + ['TFLOP/s', 'of the peak'] * has_peak, lines)


def nanogpt_table(results):
    """The step beside nanoGPT's, a row per shape, medians in ms."""
    lines = []
    for row in results['rows']:
        shape = '{n_layer} layers, {n_embd} wide, {batch_size} x {block_size}'.format(**row)
        lines.append([shape, *map(milliseconds, row['ms_median'].values())])
    return markdown(['shape', *results['rows'][0]['ms_median']], lines)


def screening_table(results):
    """Changes that were tried once, each against the run that it changes."""
    lines = []
    for case in results['cases']:
        loss, difference = case['val_loss'], case['val_loss'] - case['base_loss']
        lines.append([case['change'], case['base'], f'{loss:.3f}', f'{difference:+.3f}'])
    return markdown(['change', 'to', 'loss', 'difference'], lines)


TABLES = {
    'ladder': ladder_table,
    'dropout': dropout_table,
    'positions': positions_table,
    'bench': bench_table,
    'nanogpt': nanogpt_table,
    'screening': screening_table,
}


def replace_between(path, text, name, new):
    """The text of a file with what stands between <!-- name --> and <!-- /name --> replaced."""
    begin, end = f'<!-- {name} -->\n', f'<!-- /{name} -->\n'
    if begin not in text or end not in text:
        sys.exit(f'{os.path.relpath(path)} has no line {begin.strip()} or no line {end.strip()}: add the two lines '
                 'where the table belongs.')  # fmt: skip
    return text.split(begin)[0] + begin + new + '\n' + end + text.split(end)[1]


def make_report():
    """Write the tables into both READMEs, and draw the pictures."""
    notebook, front = RESULTS / 'README.md', ROOT / 'README.md'
    front_text = front.read_text(encoding='utf-8')
    front_text = replace_between(front, front_text, 'ladder', front_page_table(read(RESULTS / LADDER)))
    text = notebook.read_text(encoding='utf-8')
    text = replace_between(notebook, text, 'claims', claims_table(read(RESULTS / LADDER), read(RESULTS / SPEED)))
    kinds = {path: path.stem.split('_')[0] for path in sorted(RESULTS.glob('*.json'))}
    files = {path: kind for path, kind in kinds.items() if kind in TABLES}
    for path in kinds.keys() - files.keys():
        print(f'{os.path.relpath(path)} is none of ours: left out', file=sys.stderr)
    for path, kind in files.items():
        text = replace_between(notebook, text, path.stem, TABLES[kind](read(path)))
    front.write_text(front_text, encoding='utf-8')
    notebook.write_text(text, encoding='utf-8')
    for path, kind in files.items():
        if kind in PICTURES:
            PICTURES[kind](read(path), path.with_suffix('.png'))
    print(f'{len(files)} results: the tables of {os.path.relpath(front)} and {os.path.relpath(notebook)}, and pictures')
    for path in sorted(Path('out').glob('ladder_*.json')):
        print(f'\n{path}, beside the published one:\n\n{beside(read(path), read(RESULTS / path.name))}')

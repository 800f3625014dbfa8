"""The tables of results/README.md and the front page's, made from results/*.json: the results KIND_NAME.json become
what stands between <!-- KIND_NAME --> and <!-- /KIND_NAME -->. `python -m results.ladder --report` calls it."""

import os
import statistics
import sys
from pathlib import Path

import torch

import train
from configurator import configure
from data import MERGES
from model import build_model
from results.pictures import PICTURES
from results.record import RESULTS, ROOT, read
from results.rows import LOG, NUMBERS, config_of

FRONT_PAGE = 'ladder_books_mini_cpu.json'  # whose losses stand in the front page's table


def markdown(columns, rows):
    """A table in Markdown."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def mean_sd(values, digits):
    """The mean, and the standard deviation if there are several values."""
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) < 2 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def runs_by_row(results):
    """{row: its runs, one per seed}, the ladder's rows in its order, then any others."""
    names = [*NUMBERS, *(run['row'] for run in results['rows'])]
    runs = {name: [run for run in results['rows'] if run['row'] == name] for name in names}
    return {name: mine for name, mine in runs.items() if mine}


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
    """The front page's table: the log's fifteen rows, what each changes, the log's losses, and ours at the end."""
    lines, runs = [], runs_by_row(results)
    for row, (change, log) in LOG.items():
        ends = [run['evaluations'][-1]['val_loss'] for run in runs.get(row, [])]
        ours = mean_sd(ends, 2) if ends else 'not measured yet'
        lines.append([NUMBERS[row], f'[`{row}`](config/{row}.py)', change, f'{parameters(row):,}', log, ours])
    return markdown(['#', 'config', 'what changes', 'parameters', 'the log', 'ours'], lines)


def ladder_table(results):
    """The log's losses beside ours at the ends of epochs, mean ± standard deviation over the seeds; then samples."""
    lines = []
    for row, runs in runs_by_row(results).items():
        ends = list(zip(*map(epochs_of, runs), strict=True))
        losses = ', '.join(mean_sd([e['val_loss'] for e in end], 2) for end in ends)
        if ends[-1][0]['ema_loss'] is not None:
            losses += f' (average: {mean_sd([e["ema_loss"] for e in ends[-1]], 2)})'
        training = mean_sd([e['train_loss'] for e in ends[-1]], 2)
        bits = mean_sd([e['bits_per_byte'] for e in ends[-1]], 3)
        times = [run['ms_per_batch'] for run in runs if run['ms_per_batch']]
        ms, log = f'{statistics.median(times):.0f}' if times else '', LOG[row][1] if row in LOG else ''
        lines.append([NUMBERS.get(row, ''), f'`{row}`', log, losses, training, bits, ms])
    columns = ['#', 'config', 'the log', 'ours', 'training', 'bits per byte', 'ms/batch']
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
        cells = [mean_sd([run['evaluations'][-1]['val_loss'] for run in each], 3) if each else ''
                 for each in (runs, theirs.get(row))]  # fmt: skip
        lines.append([f'`{row}`', *cells])
    return markdown(['config', 'yours', 'published'], lines)


def dropout_table(results):
    """The log's dropout puzzle."""
    lines = [[c['trained'], c['evaluated'], f'{c["train"]:.2f}', f'{c["val"]:.2f}'] for c in results['cases']]
    return markdown(['trained with', 'dropout in evaluation', 'loss on training text', 'on validation text'], lines)


def bench_table(results):
    """The rows of bench.py; the earlier ones have the speed of their arithmetic as well."""
    columns = {
        'config': '`{config}`',
        'ms/batch': '{ms_median:,.0f}',
        'p10 to p90': '{ms_p10:,.0f} to {ms_p90:,.0f}',
        'tokens/s': '{tokens_per_s:,.0f}',
    }
    if all('tflops' in row for row in results['rows']):
        columns |= {'TFLOP/s': '{tflops:.3f}', 'of the peak': '{peak_share:.0%}'}
    return markdown(columns, [[cell.format(**row) for cell in columns.values()] for row in results['rows']])


def nanogpt_table(results):
    """The step beside nanoGPT's, a row per shape, medians in ms."""
    lines = []
    for row in results['rows']:
        shape = '{n_layer} layers, {n_embd} wide, {batch_size} x {block_size}'.format(**row)
        lines.append([shape, *(f'{ms:.0f}' if ms >= 100 else f'{ms:.1f}' for ms in row['ms_median'].values())])
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
    front_text = replace_between(front, front_text, 'ladder', front_page_table(read(RESULTS / FRONT_PAGE)))
    text = notebook.read_text(encoding='utf-8')
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

"""Run the ladder, row after row, and make README.md's tables and pictures from what came out.

    python ladder.py                                   the log's fifteen rows, and the rungs past it
    python ladder.py config/swiglu.py --seeds=1,2,3    some rows, several seeds each
    python ladder.py --puzzle                          the log's broken dropout, tried on rows 4 and 5
    python ladder.py --report                          the tables and pictures of all that is in results/

Almost any of train.py's knobs may follow and holds for all rows. Each is trained by train.py in a folder of its own.
The same command again goes on: finished rows are skipped, a row that was stopped is taken up at its last checkpoint.
A row that fails is reported at the end, and stops no other.
"""

import itertools
import json
import os
import shlex
import signal
import statistics
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
from torch import nn

import train
from bench import surroundings
from configurator import configure
from data import open_corpus
from model import Attention
from sample import load_model

seeds = '1'  # of each row, with commas between them
learning_rate_scale = 1.0  # multiplies the rows' learning rates, but for SGD's: a short run needs a higher one
prompt = 'The old man looked at me and said'  # every finished row goes on from here: a sample of what it learned
puzzle = False  # evaluate rows 4 and 5 with dropout left on, instead of training all rows
report = False  # make the tables and pictures, instead of training

# row: the log's validation losses after epochs 1, 2, 3
LOG = {
    'sgd': '3.03, 3.02, 2.96',
    'adam': '2.87, 2.87, 2.86',
    'cosine': '2.87, 2.86, 2.85',
    'flash': '3.18, 3.18, 3.14',
    'weight_decay': '2.69, 2.66, 2.64',
    'dropout_weight_decay': 'between the two',
    'ema': '2.66, 2.63, 2.62',
    'swiglu': '2.60, 2.58, 2.56',
    'deep': '2.62, 2.59',
    'wide': '2.61',
    'swiglu_18': '2.32',
    'warmup': '2.59, 2.57, 2.56',
    'learning_rate': '2.59, 2.57, 2.54',
    'swiglu_23': '2.23',
    'learned': '2.58, 2.55, 2.53',
}
# a change each, from row 15 on; the last is row 14 with all of them
PAST_THE_LOG = ('rate', 'muon', 'rotary', 'faster', 'embedding_norm', 'best', 'best_97m')
ROWS = (*LOG, *PAST_THE_LOG)
RESULTS, README = Path(__file__).parent / 'results', Path(__file__).parent / 'README.md'
PALETTE = '#0072b2 #d55e00 #009e73 #cc79a7 #56b4e9 #e69f00 #000000'.split()  # Okabe and Ito's, for all eyes


# ---- running -------------------------------------------------------------------------------------------------------


def overrides(arguments):
    """The arguments that are train.py's knobs: they hold for all rows and say what the numbers are numbers of."""
    own = ('--seeds', '--learning_rate_scale', '--prompt', '--puzzle', '--report')
    return [a for a in arguments if a.startswith('-') and not a.startswith(own)]


def run_row(config, seed, scale, flags, folder):
    """Train one row by train.py; returns whether it was finished. Ctrl-C lets it save, then ends this program too."""
    c, _ = configure([train.__file__], [config, *flags])
    knobs = [*flags, f'--seed={seed}', f'--out_dir={folder}']
    if c.optimizer != 'sgd' and scale != 1:
        knobs += [f'--learning_rate={c.learning_rate * scale:.6g}', f'--min_lr={c.min_lr * scale:.6g}']
    torch.compiler.reset()  # it compiles the same code only so many times, and the rows share theirs
    try:
        if any((folder / name).exists() for name in ('ckpt.pt', 'ckpt_prev.pt')):
            knobs.append('--init_from=resume')
            was, now = train.load_checkpoint(folder)['knobs'], vars(configure([train.__file__], [config, *knobs])[0])
            other = [k for k in now if k not in ('init_from', 'dtype') and was.get(k, now[k]) != now[k]]
            if other:
                sys.exit(f'{folder} holds a run with another {", ".join(other)}: move it away.')
        sys.argv = ['train.py', config, *knobs]
        train.main()
    except SystemExit as stop:
        if stop.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise
        print(stop.code, file=sys.stderr)
        return False
    except Exception:  # whatever it is, the other rows are not to suffer
        traceback.print_exc()
        return False
    return True


def measured(row, seed, folder):
    """A finished row's numbers, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    evaluations = [line for line in lines if 'val_loss' in line]
    times = [line['ms_per_batch'] for line in lines if 'ms_per_batch' in line]
    ms = statistics.median(times) if times else None
    return {'row': row, 'seed': seed, 'ms_per_batch': ms, 'evaluations': evaluations}


def sample(c, folder):
    """What a finished row's model makes of the prompt, on one line."""
    model, encoding, machine = load_model(folder, c.device, c.dtype)
    generator = torch.Generator(machine.device).manual_seed(1)
    text = train.stream_text(model, encoding, c.prompt, 60, temperature=0.7, top_k=50, generator=generator)
    with machine.autocast():
        return ' '.join((c.prompt + ''.join(text)).split())


def place(c):
    """The corpus, the device, and the file of results that belongs to both."""
    corpus, machine = open_corpus(c.dataset), train.choose_machine(c)
    return corpus, machine.device, RESULTS / f'ladder_{corpus.folder.name}_{machine.device.type}.json'


def command_line():
    return shlex.join(['python', 'ladder.py', *sys.argv[1:]])


def write(path, results):
    new = path.with_suffix('.new')
    new.write_text(json.dumps(results, indent=1) + '\n')
    os.replace(new, path)


def run_ladder(c, configs, flags):
    """Train the rows that path does not hold yet, writing it after each."""
    corpus, device, path = place(c)
    setup = {
        'command': command_line(),
        'knobs': flags,
        'learning_rate_scale': c.learning_rate_scale,
        'corpus': {side: corpus.meta[side]['tokens'] for side in ('train', 'val')},
    }
    results = json.loads(path.read_text()) if path.exists() else {**setup, 'rows': []}
    for key in ('knobs', 'learning_rate_scale', 'corpus'):
        if results[key] != setup[key]:
            sys.exit(f'{path} holds rows with {key} {results[key]}, now {setup[key]}: move it away to start another.')
    done = {(row['row'], row['seed']) for row in results['rows']}
    wanted = [(config, int(seed)) for seed in c.seeds.split(',') for config in configs]
    todo = [(config, seed) for config, seed in wanted if (Path(config).stem, seed) not in done]
    failed, start = [], time.monotonic()
    RESULTS.mkdir(exist_ok=True)
    for i, (config, seed) in enumerate(todo):
        row = Path(config).stem
        left = f'about {(time.monotonic() - start) / i * (len(todo) - i) / 60:.0f} minutes left' if i else ''
        print(f'\n==== {row}, seed {seed}: {i + 1} of {len(todo)} {left}', flush=True)
        folder = Path('out', path.stem, f'{row}_{seed}')
        if not run_row(config, seed, c.learning_rate_scale, flags, folder):
            failed.append(f'{row} (seed {seed})')
            continue
        found = measured(row, seed, folder)
        results['rows'].append({**found, 'sample': sample(c, folder), **surroundings(device)})
        write(path, results)
    print(f'\n{path}: {len(results["rows"])} rows' + (f'; failed: {", ".join(failed)}' if failed else ''))
    sys.exit(1 if failed else 0)


# ---- the log's dropout puzzle --------------------------------------------------------------------------------------
# "Its training loss is better (2.79 against 2.91) and its validation loss far worse (3.18 against 2.87): my guess is
# that the dropout is broken." Which break would look like this?


PUZZLE = {  # how a model is trained: (its row, what differs from it)
    'dropout 0.2': ('flash', []),
    'dropout 0.2 twice': ('flash', ['--dropout=0.36']),  # of what the first leaves, 0.8, the second takes a fifth
    'no dropout': ('weight_decay', []),
}


def leave_on(model, kinds):
    """The model, of which the modules of some kinds now stay in training mode when it is told to evaluate: the bug."""

    def evaluate():
        for module in model.modules():
            module.training = isinstance(module, kinds)

    model.eval = evaluate
    return model


def solve_puzzle(c, flags):
    """Train row 4 (dropout 0.2), row 4 with each dropout twice, and row 5 (none), where that is still to be done; then
    evaluate each on training and on validation text, with dropout off, or 0.2 left on in places."""
    corpus, device, path = place(c)
    beginning = SimpleNamespace(train=corpus.train, val=corpus.train[: len(corpus.val)], meta=corpus.meta)
    seed = int(c.seeds.split(',')[0])
    found = {'command': command_line(), **surroundings(device), 'cases': []}
    for trained, (row, change) in PUZZLE.items():
        folder = Path('out', path.stem, f'{trained.replace(" ", "_")}_{seed}')
        config = f'{Path(__file__).parent}/config/{row}.py'
        if not run_row(config, seed, c.learning_rate_scale, [*flags, *change], folder):
            sys.exit(f'{row} could not be trained: the line above says why.')
        saved = train.load_checkpoint(folder)
        knobs = SimpleNamespace(**{**saved['knobs'], 'dropout': 0.2})
        run = train.Run(knobs, corpus, train.choose_machine(knobs))
        run.raw.load_state_dict(saved['model'])
        for name, kinds in (('off', ()), ('left on in attention', Attention), ('left on', (Attention, nn.Dropout))):
            losses = {}
            for side, run.corpus in (('train', beginning), ('val', corpus)):
                torch.manual_seed(c.seed)
                losses[side] = run.evaluate(leave_on(run.raw, kinds))
            found['cases'].append({'trained': trained, 'evaluated': name, **losses})
            print(found['cases'][-1], flush=True)
    write(RESULTS / path.name.replace('ladder', 'dropout'), found)


# ---- reporting -----------------------------------------------------------------------------------------------------


def markdown(columns, rows):
    """A table of README.md."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def epochs_of(run):
    """The evaluations at the ends of epochs, which are whole numbers, and the last one."""
    evaluations = run['evaluations']
    return [e for e in evaluations if e is evaluations[-1] or e['epoch'] == int(e['epoch'])]


def mean_sd(values, digits):
    text = f'{statistics.mean(values):.{digits}f}'
    return text if len(values) < 2 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def runs_by_row(results):
    names = [*ROWS, *(run['row'] for run in results['rows'])]  # the ladder's in its order, then the others
    rows = {name: [run for run in results['rows'] if run['row'] == name] for name in names}
    return {name: runs for name, runs in rows.items() if runs}


def table(results):
    """The README's table of one results file: the log's losses beside ours, mean ± sd over the seeds."""
    lines = []
    for name, runs in runs_by_row(results).items():
        ends = list(zip(*map(epochs_of, runs), strict=True))
        losses = ', '.join(mean_sd([e['val_loss'] for e in end], 2) for end in ends)
        if ends[-1][0]['ema_loss'] is not None:
            losses += f' (average: {mean_sd([e["ema_loss"] for e in ends[-1]], 2)})'
        training = mean_sd([e['train_loss'] for e in ends[-1]], 2)
        bits = mean_sd([e['bits_per_byte'] for e in ends[-1]], 3)
        times = [run['ms_per_batch'] for run in runs if run['ms_per_batch']]  # no log line, no time
        ms = f'{statistics.median(times):.0f}' if times else ''
        number = ROWS.index(name) + 1 if name in ROWS else ''
        lines.append([number, f'`{name}`', LOG.get(name, ''), losses, training, bits, ms])
    return markdown(['#', 'config', 'the log', 'ours', 'training', 'bits per byte', 'ms/batch'], lines)


def bench_table(results):
    """The README's table of one results file of bench.py's rows."""
    cells = ['`{config}`', '{ms_median:,.0f}', '{ms_p10:,.0f} to {ms_p90:,.0f}', '{tokens_per_s:,.0f}',
             '{tflops:.3f}', '{peak_share:.0%}']  # fmt: skip
    lines = [[cell.format(**row) for cell in cells] for row in results['rows']]
    return markdown(['config', 'ms/batch', 'p10 to p90', 'tokens/s', 'TFLOP/s', 'of the peak'], lines)


def nanogpt_table(results):
    """The README's table of bench.py --compare=nanogpt: a row a shape, medians in ms."""
    lines = []
    for row in results['rows']:
        shape = '{n_layer} layers, {n_embd} wide, {batch_size} x {block_size}'.format(**row)
        lines.append([shape, *(f'{ms:.0f}' if ms >= 100 else f'{ms:.1f}' for ms in row['ms_median'].values())])
    return markdown(['shape', *results['rows'][0]['ms_median']], lines)


def screening_table(results):
    """The README's table of changes that were tried once, each against the run that it changes."""
    lines = []
    for case in results['cases']:
        loss, difference = case['val_loss'], case['val_loss'] - case['base_loss']
        lines.append([case['change'], case['base'], f'{loss:.3f}', f'{difference:+.3f}'])
    return markdown(['change', 'to', 'loss', 'difference'], lines)


def dropout_table(results):
    """The README's table of the log's dropout puzzle."""
    lines = [[c['trained'], c['evaluated'], f'{c["train"]:.2f}', f'{c["val"]:.2f}'] for c in results['cases']]
    return markdown(['trained with', 'dropout in evaluation', 'loss on training text', 'on validation text'], lines)


def samples(results):
    """What the rows made of the prompt, a line each, of the first seed; empty where none was kept."""
    first = {name: runs[0].get('sample') for name, runs in runs_by_row(results).items()}
    lines = [f'    {name:22s}{text[:200]}' for name, text in first.items() if text]
    return '\n'.join(['', '', 'Each goes on from the same beginning:', '', *lines]) if lines else ''


README_BLOCKS = {  # what results/KIND_NAME.json becomes between README.md's <!-- KIND_NAME --> and <!-- /KIND_NAME -->
    'ladder': lambda results: table(results) + samples(results),
    'dropout': dropout_table,
    'bench': bench_table,
    'nanogpt': nanogpt_table,
    'screening': screening_table,
}


def spread(values, gap):
    """The values moved apart, in their order, until neighbours are at least a gap apart: for labels."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + gap)
    return placed


def draw_losses(results, path):
    """Validation loss by epoch, a line a row, mean over seeds, named at its end."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout='constrained')
    rows = runs_by_row(results)
    curves = {}
    for name, runs in rows.items():
        points = zip(*(run['evaluations'] for run in runs), strict=True)
        curves[name] = [(p[0]['epoch'], statistics.mean(e['val_loss'] for e in p)) for p in points]
    ends = [curve[-1][1] for curve in curves.values()]
    low, high = min(ends), max(curve[0][1] for curve in curves.values())
    labels = spread(ends, (high - low) / 30)
    for i, ((name, curve), at) in enumerate(zip(curves.items(), labels, strict=True)):
        style = {'color': PALETTE[i % len(PALETTE)], 'linestyle': ('-', '--', ':', '-.')[i // len(PALETTE)]}
        axes.plot(*zip(*curve, strict=True), marker='o', markersize=3, **style)
        axes.annotate(f'{name} {curve[-1][1]:.2f}', curve[-1], (1.02, at), textcoords=('axes fraction', 'data'),
                      color=style['color'], va='center', annotation_clip=False)  # fmt: skip
    axes.set(xlabel='epoch', ylabel='validation loss (nats per token)')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, facecolor='white')
    plt.close(figure)


def draw_speed(results, path):
    """Milliseconds a batch, a bar a row of bench.py."""
    times = {row['config']: row['ms_median'] for row in results['rows']}
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(times) + 1), layout='constrained')
    axes.bar_label(axes.barh(list(times), list(times.values()), color=PALETTE[0]), fmt='%.0f', padding=3)
    axes.set(xlabel='ms/batch, on a logarithmic scale', xscale='log')
    axes.xaxis.set_ticks([], minor=True)
    axes.xaxis.set_ticks([])
    axes.invert_yaxis()
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=150, facecolor='white')
    plt.close(figure)


PICTURES = {'ladder': draw_losses, 'bench': draw_speed}


def replace_between(text, name, new):
    """The text with what stands between <!-- name --> and <!-- /name --> replaced."""
    begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    if begin not in text or end not in text:
        sys.exit(f'README.md has no {begin} … {end}: add the two lines where the table belongs.')
    before, after = text.split(begin)[0], text.split(end)[1]
    return f'{before}{begin}\n{new}\n{end}{after}'


def make_report():
    text = README.read_text()
    for path in sorted(RESULTS.glob('*.json')):
        kind = path.stem.split('_')[0]
        results = json.loads(path.read_text())
        text = replace_between(text, path.stem, README_BLOCKS[kind](results))
        if kind in PICTURES:
            PICTURES[kind](results, path.with_suffix('.png'))
        print(f'{path.stem}: README.md' + (f' and a picture in {RESULTS}' if kind in PICTURES else ''))
    README.write_text(text)


def main():
    c, files = configure([__file__, train.__file__], sys.argv[1:])
    train.check_knobs(configure([train.__file__], overrides(sys.argv[1:]))[0])  # those of all rows
    if not all(seed.isdigit() for seed in c.seeds.split(',')):
        sys.exit(f'seeds is {c.seeds!r}, expected whole numbers with commas between them: --seeds=1,2,3')
    own = [a for a in sys.argv[1:] if a.split('=')[0] in ('--seed', '--out_dir', '--init_from', '--overwrite')]
    if own or c.max_iters == 0:
        sys.exit(f'{" ".join(own) or "--max_iters=0"} is not for the ladder: leave it out.')
    if c.report:
        make_report()
    elif c.puzzle:
        solve_puzzle(c, overrides(sys.argv[1:]))
    else:
        rows = files or [f'{Path(__file__).parent}/config/{row}.py' for row in ROWS]
        run_ladder(c, rows, overrides(sys.argv[1:]))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

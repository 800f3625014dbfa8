"""Run the ladder, row after row, and keep what comes out in out/ladder_CORPUS_DEVICE.json; --publish: in results/.

    python -m results.ladder                                     the log's rows and the rungs past it: for a GPU
    python -m results.ladder config/swiglu.py --seeds=1,2,3      some rows, several seeds each
    python -m results.ladder config/swiglu.py config/best.py config/cpu.py    each with the overlay config/cpu.py
    python -m results.ladder --puzzle                            the log's broken dropout (puzzle.py)
    python -m results.ladder --report                            tables and pictures of what is there (report.py)

train.py's knobs may follow and hold for every row, but --learning_rate_scale leaves SGD and the rungs their own rates.
The same command again goes on: it skips finished rows, and a row that was stopped goes on from its last checkpoint.
A row that fails is reported at the end and stops no other.
"""

import itertools
import json
import os
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

import train
from configurator import configure, read_knobs, run_program
from results.puzzle import solve_puzzle
from results.record import device_name, provenance, read, results_file, write
from results.report import make_report
from results.rows import place, rows_and_overlays, train_row
from sample import load_model

seeds = '1'  # of every row, with commas between them
prompt = 'The old man looked at me and said'  # every finished row goes on from here: a sample of what it learned
puzzle = False  # try the log's broken dropout on rows 4 and 5, instead of training all rows
report = False  # make the tables and pictures, instead of training
publish = False  # keep the results in results/, to be committed, not in out/

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the exit status of a row that was told to stop


def numbers_of(folder):
    """A finished row's numbers, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    times = [line['ms_per_batch'] for line in lines if 'ms_per_batch' in line]
    return {
        'ms_per_batch': statistics.median(times) if times else None,  # a run without a log line has no time
        'evaluations': [line for line in lines if 'val_loss' in line],
    }


def write_sample(c, folder):
    """What a finished row's model makes of the prompt, on one line."""
    net, encoding, knobs = load_model(folder, c.device)
    generator = torch.Generator(knobs.device).manual_seed(1)
    text = train.write_text(net, encoding, c.prompt, 60, knobs, temperature=0.7, top_k=50, generator=generator)
    return ' '.join((c.prompt + text).split())


def open_results(path, corpus, flags):
    """The results that the file holds so far. Exits if they were measured with other knobs or another corpus."""
    setup = {
        'command': shlex.join(['python', '-m', 'results.ladder', *sys.argv[1:]]),
        'knobs': flags,
        'corpus': {side: corpus.meta[side]['tokens'] for side in ('train', 'val')},
    }
    results = read(path) or {**setup, 'rows': []}
    for key in ('knobs', 'corpus'):
        if results[key] != setup[key]:
            sys.exit(f'{os.path.relpath(path)} holds rows with {key} {results[key]}, now {setup[key]}: move it away '
                     'to start another.')  # fmt: skip
    return results


def run_ladder(c, configs, flags):
    """Train the rows that their file does not hold yet; writes it after each."""
    corpus, device, name = place(c)
    path = results_file(f'ladder_{name}', c.publish)
    results = open_results(path, corpus, flags)
    dtype = results.setdefault('dtype', c.dtype)  # one for the whole ladder
    done = {(row['row'], row['seed']) for row in results['rows']}
    wanted = itertools.product(map(int, c.seeds.split(',')), configs)
    todo = [(seed, config, Path(config).stem) for seed, config in wanted if (Path(config).stem, seed) not in done]
    failed, start = [], time.monotonic()
    print(f'{os.path.relpath(path)}: {len(done)} rows done, {len(todo)} to go', flush=True)
    for i, (seed, config, row) in enumerate(todo):
        left = f', about {(time.monotonic() - start) / i * (len(todo) - i) / 60:.0f} minutes left' if i else ''
        print(f'\n==== {row}, seed {seed}: {i + 1} of {len(todo)}{left}', flush=True)
        folder = Path('out', path.stem, f'{row}_{seed}')
        status = train_row(config, [*flags, f'--dtype={dtype}'], seed, folder)
        if status in STOPPED:
            print(f'stopped, {len(todo) - i} to go: the same command goes on', file=sys.stderr)
            sys.exit(status)
        if status:
            failed.append(f'{row} (seed {seed}, exit status {status})')
            continue
        numbers = {'row': row, 'seed': seed, **numbers_of(folder), 'sample': write_sample(c, folder)}
        results['rows'].append(numbers | {'device': device_name(device), **provenance()})
        write(path, results)
    if failed:
        sys.exit(f'\nfailed: {", ".join(failed)}')


def main():
    """Run, solve the puzzle or report, as the knobs say."""
    _, files = configure(PROGRAMS, sys.argv[1:])
    configs, overlays = rows_and_overlays(files)
    given = {flag.removeprefix('--').partition('=')[0]: flag for flag in sys.argv[1:] if flag.startswith('-')}
    c, _ = configure(PROGRAMS, [*overlays, *given.values()])  # without what the rows change
    train.check_knobs(c)
    if not all(seed.isdecimal() for seed in c.seeds.split(',')):
        sys.exit(f'seeds is {c.seeds!r}, expected whole numbers with commas between them: --seeds=1,2,3')
    own = [flag for name, flag in given.items() if name in ('seed', 'out_dir', 'init_from', 'overwrite')]
    if own or c.max_iters == 0:
        sys.exit(f'{" ".join(own) or "--max_iters=0"} is not for the ladder: leave it out.')
    flags = [*overlays, *(flag for name, flag in given.items() if name not in read_knobs(__file__))]
    if c.report:
        make_report()
    elif c.puzzle:
        solve_puzzle(c, flags)
    else:
        run_ladder(c, configs, flags)


if __name__ == '__main__':
    run_program(main)

"""Train many runs, one after the other, and keep their numbers in out/ladder_CORPUS_DEVICE.json.

    python -m results.ladder --dataset=books                           every run at full size: for a GPU
    python -m results.ladder config/cpu.py --learning_rate_scale=3     every run as a short run, on a laptop
    python -m results.ladder config/mine.py config/swiglu.py config/cpu.py --seeds=1,2,3     some, several seeds each

config/cpu.py follows every run, and so do train.py's knobs; but --learning_rate_scale is for AdamW's runs only, 2 to
15. The same command again resumes: it skips finished runs, and continues one that was stopped from its checkpoint. A
run that fails is reported at the end and stops no other. --publish keeps the numbers in results/.
"""

import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from bench import OVERLAYS
from configurator import configure, read_knobs
from data import open_corpus
from machine import choose_machine, run_program
from results.report import compare_with_published
from results.runs import RESULTS, ROOT, RUNS, config_path, provenance, read, results_file, write
from sample import load_model

seeds = '1'  # of every run, with commas between them
prompt = 'The old man looked at me and said'  # every finished run continues it: a sample of what it learned
publish = False  # keep the numbers in results/, to be committed, not in out/

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
ADAMW = [name for name, run in RUNS.items() if 2 <= run['number'] <= 15]  # whom --learning_rate_scale is for
ONE_EPOCH = ('swiglu_18', 'swiglu_23')  # the notebook stopped these after one epoch of three, and so do we
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # the exit status of a run that was told to stop


def runs_and_overlays(files):
    """The config files to train, all of RUNS if none is named; and those that follow each of them."""
    configs = [file for file in files if Path(file).stem not in OVERLAYS]
    overlays = [os.path.relpath(file) for file in files if file not in configs]
    return configs or [config_path(name) for name in RUNS], overlays


def run_train(*words):
    """Run train.py in a process of its own; returns its exit status, as a shell counts it. A terminal's Ctrl-C reaches
    that process too, so this one only waits until it has saved; SIGTERM is handed on."""
    child = subprocess.Popen([sys.executable, ROOT / 'train.py', *words])
    handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda signum, _: child.send_signal(signum)}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        status = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return status if status >= 0 else 128 - status


def train_one(config, flags, seed, folder):
    """Train one config in its folder, from its last checkpoint if it has one; returns train.py's exit status."""
    name, words = Path(config).stem, [config, *flags, f'--seed={seed}', f'--out_dir={folder}']
    if name in RUNS and name not in ADAMW or name == 'best_97m':
        words = [word for word in words if not word.startswith('--learning_rate_scale')]
    if name in ONE_EPOCH and configure([train.__file__], words)[0].max_iters is None:
        words.append('--stop_epoch=1')
    settings, kept = vars(configure([train.__file__], words)[0]), folder / 'knobs.json'
    if (folder / 'ckpt.pt').exists():
        if read(kept) != settings:
            print(f'{folder} holds a run with other settings: move it away', file=sys.stderr)
            return 1
        words.append('--init_from=resume')
    folder.mkdir(parents=True, exist_ok=True)
    new = kept.with_suffix('.new')
    new.write_text(json.dumps(settings), encoding='utf-8')
    os.replace(new, kept)
    return run_train(*words)


def numbers_of(folder):
    """A finished run's numbers, from its metrics.jsonl: its evaluations, its curve as (step, training loss) per log
    line, and its time per batch."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]
    logged = [line for line in lines if 'loss' in line]
    return {
        'ms_per_batch': statistics.median(line['ms_per_batch'] for line in logged) if logged else None,
        'evaluations': [line for line in lines if 'val_loss' in line],
        'curve': [(line['step'], round(line['loss'], 4)) for line in logged],
    }


def write_sample(c, folder):
    """How a finished run's model continues the prompt, on one line."""
    net, encoding, knobs = load_model(folder, c.device)
    generator = torch.Generator(knobs.device).manual_seed(1)
    text = train.write_text(net, encoding, c.prompt, 60, knobs, temperature=0.7, top_k=50, generator=generator)
    return ' '.join((c.prompt + text).split())


def open_results(path, corpus, flags):
    """The numbers that the file holds so far. Exits if they were measured with other knobs or on another corpus."""
    setup = {
        'command': shlex.join(['python', '-m', 'results.ladder', *sys.argv[1:]]),
        'knobs': flags,
        'corpus': {split: corpus.meta[split]['tokens'] for split in ('train', 'val')},
    }
    results = read(path) or {**setup, 'runs': []}
    for key in ('knobs', 'corpus'):
        if results[key] != setup[key]:
            sys.exit(f'{os.path.relpath(path)} holds runs with {key} {results[key]}, now {setup[key]}: move it away '
                     'to start another.')  # fmt: skip
    return results


def train_all(c, configs, flags):
    """Train the runs that the file does not hold yet, and write it after each. Returns the file's path."""
    corpus = open_corpus(c.dataset)
    choose_machine(c)
    device = torch.device(c.device)
    path = results_file(f'ladder_{corpus.folder.name}_{device.type}', c.publish)
    results = open_results(path, corpus, flags)
    dtype = results.setdefault('dtype', c.dtype)  # one for all, so that they can be compared
    done = {(run['config'], run['seed']) for run in results['runs']}
    wanted = itertools.product(map(int, c.seeds.split(',')), configs)
    todo = [(seed, config) for seed, config in wanted if (Path(config).stem, seed) not in done]
    failed, start = [], time.monotonic()
    print(f'{os.path.relpath(path)}: {len(done)} runs done, {len(todo)} to go', flush=True)
    for i, (seed, config) in enumerate(todo):
        name = Path(config).stem
        left = f', about {(time.monotonic() - start) / i * (len(todo) - i) / 60:.0f} minutes left' if i else ''
        print(f'\n==== {name}, seed {seed}: {i + 1} of {len(todo)}{left}', flush=True)
        folder = Path('out', path.stem, f'{name}_{seed}')
        status = train_one(config, [*flags, f'--dtype={dtype}'], seed, folder)
        if status in STOPPED:
            print(f'stopped, {len(todo) - i} to go: the same command resumes', file=sys.stderr)
            sys.exit(status)
        if status:
            failed.append(f'{name} (seed {seed}, exit status {status})')
            continue
        numbers = {'config': name, 'seed': seed, **numbers_of(folder), 'sample': write_sample(c, folder)}
        results['runs'].append(numbers | provenance(device))
        write(path, results)
    if failed:
        sys.exit(f'\nfailed: {", ".join(failed)}')
    return path


def main():
    _, files = configure(PROGRAMS)
    configs, overlays = runs_and_overlays(files)
    given = {flag.removeprefix('--').partition('=')[0]: flag for flag in sys.argv[1:] if flag.startswith('-')}
    c, _ = configure(PROGRAMS, [*overlays, *given.values()])  # without what the runs themselves change
    train.check_knobs(c)
    if not all(seed.isdecimal() for seed in c.seeds.split(',')):
        sys.exit(f'seeds is {c.seeds!r}, expected whole numbers with commas between them: --seeds=1,2,3')
    own = [flag for name, flag in given.items() if name in ('seed', 'out_dir', 'init_from', 'overwrite')]
    if own or c.max_iters == 0:
        sys.exit(f'{" ".join(own) or "--max_iters=0"} is not for the ladder: leave it out.')
    flags = [*overlays, *(flag for name, flag in given.items() if name not in read_knobs(__file__))]
    path = train_all(c, configs, flags)
    print(f'\n{compare_with_published(read(path), read(RESULTS / path.name))}')


if __name__ == '__main__':
    run_program(main)

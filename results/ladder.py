"""Train many runs, one after the other, and keep their numbers in out/ladder_CORPUS_DEVICE.json.

    python -m results.ladder --dataset=books                           every run at full size: for a GPU
    python -m results.ladder config/cpu.py --learning_rate_scale=3 --dtype=float32     as short runs, on a laptop
    python -m results.ladder config/mine.py config/swiglu.py config/cpu.py --seeds=1,2,3     some, several seeds each

config/cpu.py and train.py's knobs apply to every run; but --learning_rate_scale to those with AdamW only, since the
learning rates of SGD and Muon need no factor. The same command again resumes: it skips finished runs, and continues one
that was stopped from its checkpoint. A run that fails is reported at the end. Several of these programs may run at the
same time. --publish keeps the numbers in results/.
"""

import itertools
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import checkpoint
import train
from bench import OVERLAYS
from configurator import configure, read_knobs
from data import open_corpus
from machine import choose_machine, run_program
from results.paired import NOT_SETTINGS, final_loss, runs_by_config
from results.report import markdown, mean_sd
from results.runs import RESULTS, ROOT, RUNS, config_path, provenance, read, results_file, write
from sample import load_model, write_text
from sources import locked

seeds = '1'  # of every run, with commas between them
prompt = 'The old man looked at me and said'  # every finished run continues it: a sample of what it learned
publish = False  # keep the numbers in results/, to be committed, not in out/

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
ONE_EPOCH = ('swiglu_18', 'swiglu_23')  # the notebook stopped these after one epoch of three, and so do we
HANDED_ON = [signum for signum in checkpoint.STOP_SIGNALS if signum.name not in ('SIGINT', 'SIGHUP')]
STOPPED = [128 + signum for signum in checkpoint.STOP_SIGNALS]  # the exit status of a run that was told to stop


def runs_and_overlays(files):
    """The config files to train, all of RUNS if none is named; and those that follow each of them."""
    configs = [file for file in files if Path(file).stem not in OVERLAYS]
    overlays = [os.path.relpath(file) for file in files if file not in configs]
    return configs or [config_path(name) for name in RUNS], overlays


def run_train(*words):
    """Run train.py in a process of its own; returns its exit status, as a shell counts it. A terminal's Ctrl-C reaches
    that process too, so this one only waits until it has saved; what SLURM or kill send is handed on."""
    child = subprocess.Popen([sys.executable, ROOT / 'train.py', *words])
    handlers = dict.fromkeys(HANDED_ON, lambda signum, _: child.send_signal(signum)) | {signal.SIGINT: lambda *_: None}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        status = child.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return status if status >= 0 else 128 - status


def settings_of(config, flags):
    """The settings of a config's runs: train.py's arguments, which are the flags that concern it, and its knobs."""
    name, words = Path(config).stem, [config, *flags]
    if configure([train.__file__], words)[0].optimizer != 'adamw':  # their learning rates need no factor
        words = [word for word in words if not word.startswith('--learning_rate_scale')]
    if name in ONE_EPOCH and configure([train.__file__], words)[0].max_iters is None:
        words.append('--stop_epoch=1')
    return words, vars(configure([train.__file__], words)[0])


def changes(old, new):
    """How a run's knobs differ from an older run's, as text. A knob that the older one lacks had its default."""
    old = vars(configure([train.__file__], [])[0]) | old
    different = [knob for knob in new if old.get(knob) != new[knob] and knob not in NOT_SETTINGS]
    return ', '.join(f'{knob} was {old.get(knob)!r}, now {new[knob]!r}' for knob in different)


def train_one(config, flags, seed, folder):
    """Train one config in its folder, from its last checkpoint if it has one; returns train.py's exit status."""
    words, knobs = settings_of(config, flags)
    words += [f'--seed={seed}', f'--out_dir={folder}']
    if (folder / 'ckpt.pt').exists():
        if changed := changes(checkpoint.load(folder)['knobs'], knobs):
            sys.exit(f'{folder} holds a run with other settings: {changed}. Move it away, or rename the config.')
        words.append('--init_from=resume')
    return run_train(*words)


def numbers_of(folder):
    """A run's knobs, as its checkpoint has them: its config may have changed since it began. And its numbers from
    metrics.jsonl: its evaluations, its curve as (step, training loss) per log line, and its time per batch."""
    lines = checkpoint.read_metrics(folder)
    logged = [line for line in lines if 'loss' in line]
    return {
        'knobs': checkpoint.load(folder)['knobs'],
        'ms_per_batch': statistics.median(line['ms_per_batch'] for line in logged) if logged else None,
        'evaluations': [line for line in lines if 'val_loss' in line],
        'curve': [(line['step'], round(line['loss'], 4)) for line in logged],
    }


def check_complete(folder, evaluations):
    """Exit if a finished run's metrics lack its last evaluation, as they may after a power cut."""
    if not evaluations or evaluations[-1]['step'] != checkpoint.load(folder)['step']:
        sys.exit(f'{folder}/metrics.jsonl lacks the last evaluation: move {folder} away to train it again.')


def write_sample(c, folder):
    """How a finished run's model continues the prompt, on one line."""
    net, encoding, knobs = load_model(folder, c.device)
    generator = torch.Generator(knobs.device).manual_seed(1)
    text = write_text(net, encoding, c.prompt, 60, knobs, temperature=0.7, top_k=50, generator=generator)
    return ' '.join((c.prompt + text).split())


def holds(path, results, run):
    """Whether a results file holds this run. Exits if it holds one of the same config with other knobs."""
    for other in results['runs']:
        knobs = other.get('knobs', run['knobs'])  # older runs lack theirs
        if other['config'] == run['config'] and (changed := changes(knobs, run['knobs'])):
            sys.exit(f'{path} holds {run["config"]} with other settings: {changed}. Rename the config, or move the '
                     f'file and {Path("out", path.stem)} away.')  # fmt: skip
    return (run['config'], run['seed']) in [(other['config'], other['seed']) for other in results['runs']]


def add_run(path, setup, run=None):
    """Add a run to a results file, which begins with its setup; returns what the file holds. Several programs may do so
    at the same time: it is read again under a lock. Exits if its runs are of another setup."""
    with locked(path):
        results = read(path) or {**setup, 'runs': []}
        if changed := changes(results, {key: setup[key] for key in ('knobs', 'corpus')}):
            sys.exit(f'{path} is for runs with other settings ({changed}): move it and {Path("out", path.stem)} away '
                     'to start others.')  # fmt: skip
        if run and not holds(path, results, run):
            results['runs'].append(run)
        write(path, results)
    return results


def train_all(c, configs, flags):
    """Train the runs that the file does not hold yet, and add each to it. Returns the file's path."""
    corpus = open_corpus(c.dataset)
    choose_machine(c)
    device = torch.device(c.device)
    path = results_file(f'ladder_{corpus.folder.name}_{device.type}', c.publish)
    setup = {
        'command': shlex.join(['python', '-m', 'results.ladder', *sys.argv[1:]]),
        'knobs': flags,
        'corpus': {split: corpus.meta[split]['tokens'] for split in ('train', 'val')},
        'dtype': c.dtype,  # one for all, so that they can be compared
    }
    results = add_run(path, setup)
    flags = [*flags, f'--dtype={results.get("dtype", c.dtype)}']
    wanted = [(config, {'config': Path(config).stem, 'seed': seed, 'knobs': settings_of(config, flags)[1]})
              for seed, config in itertools.product(map(int, c.seeds.split(',')), configs)]  # fmt: skip
    todo = [(config, run) for config, run in wanted if not holds(path, results, run)]
    scales = {run['config']: run['knobs']['learning_rate_scale'] for _, run in wanted}
    if unscaled := [name for name, scale in scales.items() if scale != c.learning_rate_scale]:
        print(f'without --learning_rate_scale, which is for AdamW: {", ".join(unscaled)}')
    failed, start = [], time.monotonic()
    print(f'{os.path.relpath(path)}: {len(results["runs"])} runs done, {len(todo)} to go', flush=True)
    for i, (config, run) in enumerate(todo):
        name, seed = run['config'], run['seed']
        left = f', about {(time.monotonic() - start) / i * (len(todo) - i) / 60:.0f} minutes left' if i else ''
        print(f'\n==== {name}, seed {seed}: {i + 1} of {len(todo)}{left}', flush=True)
        folder = Path('out', path.stem, f'{name}_{seed}')
        try:
            if not (status := train_one(config, flags, seed, folder)):
                run |= numbers_of(folder)
                check_complete(folder, run['evaluations'])
                run |= {'sample': write_sample(c, folder)} | provenance(device)
                add_run(path, setup, run)
        except SystemExit as refusal:
            print(refusal, file=sys.stderr)
            status = 1
        if status in STOPPED:
            print(f'stopped, {len(todo) - i} to go: the same command resumes', file=sys.stderr)
            sys.exit(status)
        if status:
            failed.append(f'{name} (seed {seed}, exit status {status})')
    if failed:
        sys.exit(f'\nfailed: {", ".join(failed)}')
    return path


def compare_with_published(mine, published):
    """A reader's final losses beside the published ones of the same configs, where these had the same knobs."""
    theirs, lines = runs_by_config(published), []
    flags = [*published.get('knobs', ()), f'--dtype={published.get("dtype", "auto")}']
    for name, runs in runs_by_config(mine).items():
        cells = [mean_sd([*map(final_loss, each)], 3) for each in (runs, theirs.get(name, ()))]
        if name in theirs and (name in RUNS or 'knobs' in theirs[name][0]):  # older runs lack their knobs
            old = theirs[name][0].get('knobs') or settings_of(config_path(name), flags)[1]
            changed = changes(old, runs[0].get('knobs', old))
            cells[1] = f'none with these knobs: {changed}' if changed else cells[1]
        if name in theirs and mine.get('corpus') != published.get('corpus', mine.get('corpus')):  # of another Python
            cells[1] += ', on another text'
        lines.append([f'`{name}`', *cells])
    return markdown(['config', 'yours', 'published'], lines)


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
        sys.exit(f'{" ".join(own) or "--max_iters=0"} is not for results.ladder: leave it out.')
    flags = [*overlays, *(flag for name, flag in given.items() if name not in read_knobs(__file__))]
    path = train_all(c, configs, flags)
    print(f'\n{compare_with_published(read(path), read(RESULTS / path.name))}')


if __name__ == '__main__':
    run_program(main)

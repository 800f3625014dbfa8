"""Runs in one form, that of results/*.json: yours from their folders, and those published with the same settings."""

import contextlib
import statistics
import sys
from pathlib import Path

import checkpoint
from results import ladder
from results.paired import final_loss, runs_by_config, settings_of
from results.runs import RESULTS, config_path, read
from sources import corpus_name


def load_run(folder):
    """A run's numbers, as results.ladder keeps them, and what they were measured with. Exits if there are none."""
    saved, numbers = checkpoint.load(folder), ladder.numbers_of(Path(folder))
    if not numbers['curve'] and not numbers['evaluations']:
        sys.exit(f'{folder} holds no losses: it was stopped before its first log line; --init_from=resume trains on.')
    knobs = saved['knobs']
    return numbers | {
        'folder': folder,
        'seed': knobs['seed'],
        'settings': settings_of(knobs | {'dataset': corpus_name(knobs['dataset'])}),
        'tokens_per_step': knobs['batch_size'] * knobs['block_size'],
        'evaluated': knobs['eval_iters'] and knobs['eval_iters'] * knobs['batch_size'] * knobs['block_size'],
        **{text: saved.get(text) for text in ('corpus', 'validation text')},  # checksums; older checkpoints lack one
    }


def published(settings):
    """The short runs in results/ that had these settings, in whatever number format: {config: runs}, or {}."""
    results = read(RESULTS / 'ladder_stdlib_cpu.json')
    for name, runs in runs_by_config(results).items():
        with contextlib.suppress(SystemExit):  # the config is gone, or in the middle of an edit
            _, knobs = ladder.settings_of(config_path(name), results['knobs'])
            if settings_of(knobs) == settings | {'dtype': knobs['dtype']}:
                return {name: [run | {'corpus': results['train.bin']} for run in runs]}
    return {}


def curves(run, tokens_per_step=1):
    """A run's training and validation losses: {step: loss} each, or {tokens: loss}. A training loss is the mean of a
    25th of the curve around it; its ends, which have nothing to one side, are left out."""
    curve = run.get('curve', [])  # some published runs have lost theirs
    half = len(curve) // 50
    training = {}
    for i in range(half, len(curve) - half):
        training[curve[i][0] * tokens_per_step] = statistics.mean(loss for _, loss in curve[i - half : i + half + 1])
    return training, {e['step'] * tokens_per_step: final_loss({'evaluations': [e]}) for e in run['evaluations']}

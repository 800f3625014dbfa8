"""The runs by name and number, and how measured numbers are kept in results/*.json."""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent

# the notebook's fifteen runs and those past it: what each changes, and the notebook's figures
NOTEBOOK = json.loads((RESULTS / 'notebook.json').read_text(encoding='utf-8'))
RUNS = {run['config']: run for run in NOTEBOOK['runs']}


def config_path(name):
    return os.path.relpath(ROOT / 'config' / f'{name}.py')


def parent_of(name):
    """The run that a run changes, as the first line of its config says; None for the first."""
    number = re.search(r'^.*?: run (\d+) ', Path(config_path(name)).read_text(encoding='utf-8'))
    return number and [*RUNS][int(number[1]) - 1]


def commit(folder=ROOT):
    """The commit of a checkout, '+' for changes on top; None if git is not installed or the folder is no checkout."""
    try:
        git = ['git', 'describe', '--always', '--dirty=+']
        return subprocess.run(git, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def provenance(device=None):
    """What a number has to be read with: the device (a GPU's name, or how many threads a CPU computes with), the
    versions, the commit and the day."""
    on_gpu = device is not None and device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name(device) if on_gpu else f'cpu, {torch.get_num_threads()} threads',
        'torch': torch.__version__,
        'python': platform.python_version(),
        'commit': commit(),
        'date': datetime.date.today().isoformat(),
    }


def results_file(name, publish):
    """Where numbers are kept: results/ for those to be published, else out/. Exits, before anything is measured, if
    nothing can be written there."""
    path = (RESULTS if publish else Path('out')) / f'{name}.json'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f'.{path.name}.lock').touch()  # of sources.locked
    except OSError as error:
        sys.exit(f'{path} cannot be written: {error.strerror}.')
    return path


def read(path):
    """The contents of a results file; {} if it is not there. Exits if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        sys.exit(f'{path} is damaged: {error}. Move it away.')


def write(path, results):
    """Write the file beside the old one, then take its name: whatever happens, one of them is whole."""
    new = path.with_suffix('.new')
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(new, path)
    print(f'{os.path.relpath(path)} is written', flush=True)

"""What a number has to be read with: the machine, the versions, the commit and the day. And how results/*.json are
written and read. It needs torch; where git is missing, a record has no commit."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent


def commit(folder=ROOT):
    """The commit of a checkout, '+' for changes on top; None if git is not installed or the folder is no checkout."""
    try:
        git = ['git', 'describe', '--always', '--dirty=+']
        return subprocess.run(git, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def provenance():
    """The versions, the commit and the day."""
    return {
        'torch': torch.__version__,
        'python': platform.python_version(),
        'commit': commit(),
        'date': datetime.date.today().isoformat(),
    }


def device_name(device):
    """The GPU's name, or how many threads a CPU computes with."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {torch.get_num_threads()} threads'


def results_file(name, publish):
    """Where results are kept: in results/ to be published, else in out/. Exits, before anything is measured, if nothing
    can be written there."""
    path = (RESULTS if publish else Path('out')) / f'{name}.json'
    new = path.with_suffix('.new')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.touch()
        new.unlink()
    except OSError as error:
        sys.exit(f'{path} cannot be written: {error.strerror}.')
    return path


def read(path):
    """The results of a file; none of a file that is not there. Exits if it is damaged."""
    try:
        return dict(json.loads(path.read_text(encoding='utf-8'))) if path.exists() else {}
    except (ValueError, TypeError) as error:
        sys.exit(f'{path} is damaged: {error}. Move it away.')


def write(path, results):
    """Write the results beside the file, then take its name: whatever happens, the old file or the new one is whole."""
    new = path.with_suffix('.new')
    new.write_text(json.dumps(results, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(new, path)
    print(f'{os.path.relpath(path)} is written', flush=True)

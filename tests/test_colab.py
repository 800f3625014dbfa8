"""The notebook colab.ipynb: its cells run one after the other, here with a small model on a small text."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import REPO, SMALL

import plot
import sample
import train
from machine import run_program

CELLS = json.loads(Path(REPO, 'colab.ipynb').read_text(encoding='utf-8'))['cells']
PROGRAMS = {'train.py': train, 'sample.py': sample, 'plot.py': plot}


def test_the_cells_run(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(train, 'dataset', 'tiny')  # the default, after which no folder is named
    Path('config').mkdir()
    skipped, small = [], [flag for flag in SMALL if 'd_ff' not in flag and 'learning_rate' not in flag]

    def shell(command):
        program, *words = shlex.split(command)
        if program != 'python':
            skipped.append(program)
            return
        if words[0] == 'train.py':
            ours = [word if word == 'config/mine.py' else f'{REPO}/{word}' for word in words[1:3]]
            words = ['train.py', *ours, *words[3:], *small, '--dataset=tiny', '--block_size=32']
        monkeypatch.setattr(sys, 'argv', words)
        run_program(PROGRAMS[words[0]].main)

    ipython = SimpleNamespace(version_info=(9, 0), get_ipython=lambda: None)  # what matplotlib asks it for
    monkeypatch.setitem(sys.modules, 'IPython', ipython)
    monkeypatch.setitem(sys.modules, 'IPython.display', SimpleNamespace(Image=lambda path: shown.append(path)))
    shown, names = [], {'shell': shell}
    for cell in CELLS:
        text = ''.join(cell['source'])
        if cell['cell_type'] != 'code':
            continue
        if text.startswith('%%writefile '):
            path, text = text.removeprefix('%%writefile ').split('\n', 1)
            Path(path).write_text(text)
            continue
        code = re.sub(r'^( *)!(.*)$', lambda found: f'{found[1]}shell(f{found[2]!r})', text, flags=re.MULTILINE)
        exec(re.sub(r'^%cd .*$', '', code, flags=re.MULTILINE), names)
    assert skipped == ['git', 'pip'] and shown == ['out/best_cpu/plot.png', 'out/best_cpu/attention.png']
    assert all(Path(path).read_bytes().startswith(b'\x89PNG') for path in shown)
    printed = capsys.readouterr().out
    assert printed.count('---- temperature') == printed.count('---------------') == 3
    assert 'not decided: ' in printed and 'train seeds 2 and 3 of both' in printed

"""Time every row's step by bench.py, and keep the numbers in out/bench_DEVICE.json; --publish: in results/.

python -m results.bench --batch_size=4                     every row; bench.py's knobs and train.py's may follow
python -m results.bench config/swiglu.py config/deep.py    some rows
"""

import json
import shlex
import subprocess
import sys

import torch

import bench
from configurator import configure, run_program
from machine import choose_machine
from results.record import ROOT, provenance, read, results_file, write
from results.rows import NUMBERS, config_of, rows_and_overlays

publish = False  # keep the results in results/, to be committed, not in out/

SETTING = ('device', 'torch', 'dtype', 'knobs')  # rows of the same one stay in the file


def main():
    """Let bench.py time the rows, print them as they come, and keep them."""
    flags = [argument for argument in sys.argv[1:] if argument.startswith('-')]
    c, _ = configure([__file__, *bench.PROGRAMS], flags)
    if c.compare or c.profile:
        sys.exit('--compare and --profile are for python bench.py: leave them out.')
    choose_machine(c)
    configs, overlays = rows_and_overlays([argument for argument in sys.argv[1:] if argument not in flags])
    path = results_file(f'bench_{torch.device(c.device).type}', c.publish)
    before, rows = read(path), []
    knobs = [*overlays, *(flag for flag in flags if flag != '--publish')]
    words = [*configs, *knobs, '--json']
    with subprocess.Popen([sys.executable, ROOT / 'bench.py', *words], stdout=subprocess.PIPE) as child:
        for line in child.stdout:
            rows.append(json.loads(line) | {'knobs': shlex.join(knobs)} | provenance())
            bench.print_row(rows[-1], first=len(rows) == 1)
    if child.returncode:
        sys.exit(child.returncode)
    measured = {row['config'] for row in rows}
    kept = [row for row in before.get('rows', ())
            if row['config'] not in measured and all(row.get(key) == rows[0][key] for key in SETTING)]  # fmt: skip
    command = ['python', 'bench.py', *(config_of(row['config']) for row in kept), *words]
    rows += kept
    rows.sort(key=lambda row: list(NUMBERS).index(row['config']) if row['config'] in NUMBERS else len(NUMBERS))
    besides = {key: value for key, value in before.items() if key == 'besides'}  # what was measured by hand
    write(path, {'command': shlex.join(command), **besides, 'rows': rows})


if __name__ == '__main__':
    run_program(main)

"""Time the training step of every config with bench.py, and keep the numbers in out/bench_DEVICE.json.

    python -m results.bench config/swiglu.py config/deep.py --batch_size=4

Without a config it times all; bench.py's knobs and train.py's may follow. --publish keeps the numbers in results/.
"""

import json
import shlex
import subprocess
import sys

import bench
from configurator import configure
from machine import choose_device, run_program
from results.ladder import runs_and_overlays
from results.runs import ROOT, provenance, results_file, write

publish = False  # keep the numbers in results/, to be committed, not in out/


def main():
    c, files = configure([__file__, *bench.PROGRAMS])
    flags = [argument for argument in sys.argv[1:] if argument.startswith('-')]
    if c.compare or c.profile:
        sys.exit('--compare and --profile are for python bench.py: leave them out.')
    configs, overlays = runs_and_overlays(files)
    path = results_file(f'bench_{choose_device(c.device).type}', c.publish)
    rows = []
    words = [*configs, *overlays, *(flag for flag in flags if not flag.startswith('--publish')), '--json']
    with subprocess.Popen([sys.executable, ROOT / 'bench.py', *words], stdout=subprocess.PIPE) as child:
        for line in child.stdout:
            rows.append(provenance() | json.loads(line))
            bench.print_row(rows[-1], first=len(rows) == 1)
    if rows and child.returncode in (0, 1):  # 1: some configs could not run
        write(path, {'command': shlex.join(['python', '-m', 'results.bench', *sys.argv[1:]]), 'rows': rows})
    if child.returncode:
        sys.exit(child.returncode)


if __name__ == '__main__':
    run_program(main)

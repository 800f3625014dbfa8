"""Time the very step that train.py runs: ms/batch, tokens/s, memory on a GPU.

    python bench.py                                           train.py's defaults
    python bench.py config/swiglu.py config/deep.py           a row each
    python bench.py config/swiglu.py --batch_size=4 --json    any of train.py's knobs; a JSON object per row
    python bench.py config/swiglu.py --compare=attention      one knob's values turn by turn
    python bench.py config/swiglu.py --compare=n_head=2,5,10  the values named
    python bench.py config/swiglu.py --profile                the costliest operations, and a trace

It trains on random tokens: the time of a step does not depend on the text. It needs train and what that needs.
"""

import gc
import statistics
import sys
import time
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import torch

import train
from configurator import configure, read_knobs, run_program
from data import vocab_size_of
from machine import choose_machine

json = False  # a JSON object per row in place of the table
compare: str | None = None  # a knob, or KNOB=VALUE,VALUE: its values beside each other, turn by turn
profile = False  # where the time of a step goes; the trace is written to trace.json
seconds = 10.0  # how long each row is timed, after the warm-up; at least 5 steps

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
COLUMNS = 'config ms_median ratio ms_p10 ms_p90 tokens_per_s peak_memory_gb'.split()
OVERLAYS = ('cpu',)  # configs of sizes alone, which follow a row; every other config is a row
WARM_UP = 3  # steps: the first compiles and allocates, the next settle caches and clocks
IN_A_ROW = {'cuda': 10}  # steps that are timed as one: in train.py, too, the host runs ahead of a GPU


def build_run(c):
    """train.py's Run on this machine, warmed up, on as many random tokens as two steps read."""
    choose_machine(c)
    generator, vocab_size = torch.Generator().manual_seed(c.seed), vocab_size_of(c.dataset)
    tokens = torch.randint(vocab_size, (2 * c.batch_size * c.block_size + 1,), generator=generator, dtype=torch.int32)
    run = train.Run(c, SimpleNamespace(train=tokens, encoding=SimpleNamespace(n_vocab=vocab_size)))
    for _ in range(WARM_UP):
        run.train_step()
    return run


def milliseconds(function, device, calls=1):
    """How long a call takes, the mean of some in a row, with the device idle before and after."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) * 1e3 / calls


def time_in_turns(steps, device, seconds):
    """Times of several functions in ms, a list each: turn by turn, so that a drift of the machine meets all alike."""
    times, calls = [[] for _ in steps], IN_A_ROW.get(device.type, 1)
    while sum(map(sum, times)) * calls < seconds * 1e3 * len(steps) or len(times[0]) < 5:
        for step, mine in zip(steps, times, strict=True):
            mine.append(milliseconds(step, device, calls))
    return times


def measure(runs, seconds):
    """Yields a row per run, {name: Run}: the times of its training step, and their ratio to the first run's."""
    device = next(iter(runs.values())).device
    on_gpu = device.type == 'cuda'
    machine = torch.cuda.get_device_name() if on_gpu else f'{device}, {torch.get_num_threads()} threads'
    times = time_in_turns([run.train_step for run in runs.values()], device, seconds)
    for (name, run), mine in zip(runs.items(), times, strict=True):
        c, median = run.c, statistics.median(mine)
        p10, *_, p90 = statistics.quantiles(mine, n=10, method='inclusive')
        ratio = statistics.median(a / b for a, b in zip(mine, times[0], strict=True)) if len(runs) > 1 else None
        memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu and len(runs) == 1 else None
        numbers = (name, median, ratio, p10, p90, c.batch_size * c.block_size / median * 1e3, memory)
        setting = {knob: getattr(c, knob) for knob in ('batch_size', 'block_size', 'dtype', 'compile', 'attention')}
        setting |= {'steps': len(mine) * IN_A_ROW.get(device.type, 1), 'device': machine, 'torch': torch.__version__}
        yield dict(zip(COLUMNS, numbers, strict=True)) | setting


def print_row(row, first):
    """A row of the table, the first below a header."""
    if first:
        print('{device}, torch {torch}, {dtype}, batch {batch_size} x {block_size}'.format(**row))
        print(f'{COLUMNS[0]:30s}' + ''.join(f'{column:>15s}' for column in COLUMNS[1:]))
    digits = {'ratio': '.2f', 'tokens_per_s': ',.0f', 'peak_memory_gb': '.2f'}
    cells = ['-' if row[column] is None else format(row[column], digits.get(column, '.1f')) for column in COLUMNS[1:]]
    print(f'{row["config"]:30s}' + ''.join(f'{cell:>15s}' for cell in cells), flush=True)


def compared_runs(name, c, arguments):
    """{name and KNOB=VALUE: its Run} for the values of c.compare; says which cannot run, and why."""
    (knob, _, listed), knobs = c.compare.partition('='), read_knobs(train.__file__)
    if knob not in knobs:
        sys.exit(f'--compare={knob}: train.py has no such knob; --help lists them.')
    _, allowed, _ = knobs[knob]
    choices = ['False', 'True'] if bool in allowed else [one for one in allowed if isinstance(one, str)]
    values = listed.split(',') if listed else [value for value in choices if value != 'auto']
    values = values or sys.exit(f'name the values: --compare={knob}=VALUE,VALUE')
    runs = {}
    for value in values:
        variant, _ = configure(PROGRAMS, [*arguments, f'--{knob}={value}'])
        try:
            train.check_knobs(variant)
            run = runs[f'{name} {knob}={value}'] = build_run(variant)
            arguments.append(f'--dtype={run.c.dtype}')  # for the values that follow, unless they are dtypes
        except (SystemExit, RuntimeError) as error:
            print(f'{knob}={value} is left out: {str(error).splitlines()[0]}', file=sys.stderr)
    return runs or sys.exit(1)


def print_profile(c):
    """torch's own table of the operations that three steps spend their time on; everything else is in trace.json."""
    run = build_run(c)
    Path('trace.json').touch()  # before the work: torch itself does not say when it cannot write
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            milliseconds(run.train_step, run.device)
    profiler.export_chrome_trace('trace.json')
    key = 'self_device_time_total' if run.device.type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))
    print('trace.json opens in https://ui.perfetto.dev')


def main():
    _, files = configure(PROGRAMS, sys.argv[1:])
    flags = [argument for argument in sys.argv[1:] if argument.startswith('-')]
    overlays = [file for file in files if Path(file).stem in OVERLAYS]
    for i, file in enumerate([file for file in files if file not in overlays] or [None]):
        arguments = [file, *overlays, *flags] if file else [*overlays, *flags]
        c, name = configure(PROGRAMS, arguments)[0], Path(file).stem if file else 'default'
        train.check_knobs(c)  # of this row: knobs of several need not go together
        runs = None
        torch.compiler.reset()  # no row inherits the code that was compiled for another
        gc.collect()  # nor its memory, which the peak would count
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if c.profile:
            print_profile(c)
            continue
        runs = compared_runs(name, c, arguments) if c.compare else {name: build_run(c)}
        for j, row in enumerate(measure(runs, c.seconds)):
            print(dumps(row), flush=True) if c.json else print_row(row, first=i == j == 0)
        flags.append(f'--dtype={row["dtype"]}')  # a table is in one dtype


if __name__ == '__main__':
    run_program(main)

"""Time the training step of train.py itself: ms/batch, tokens/s, and memory on a GPU.

    python bench.py                                           train.py's defaults
    python bench.py config/swiglu.py config/deep.py           one line per config
    python bench.py config/swiglu.py --batch_size=4 --json    with any of train.py's knobs; one JSON object per line
    python bench.py config/swiglu.py --compare=attention      all values of a knob that can run here, interleaved
    python bench.py config/swiglu.py --compare=n_head=2,5,10  the values named
    python bench.py config/swiglu.py --profile                the costliest operations, and a trace

It trains on random tokens, since the time of a step does not depend on the text. What cannot run here is left out.
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
from configurator import configure, read_knobs
from data import vocab_size_of
from machine import choose_machine, run_program

json = False  # print JSON objects instead of the table
compare: str | None = None  # a knob, or KNOB=VALUE,VALUE: time its values, interleaved
profile = False  # where the time of a step goes; the trace is written to trace.json
seconds = 10.0  # how long each config is timed, after the warm-up; at least 5 measurements

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
COLUMNS = 'config ms_median ratio ms_p10 ms_p90 tokens_per_s peak_memory_gb'.split()
OVERLAYS = ('cpu',)  # configs of sizes alone, which apply to every other config named
WARM_UP = 6  # steps: the first compiles and allocates, the fourth is recorded (machine.Recorded)
IN_A_ROW = {'cuda': 10}  # steps that are timed as one, since the host runs ahead of a GPU, in train.py as well


def build_run(config):
    """train.py's Run on this machine, warmed up, on as many random tokens as two steps read."""
    choose_machine(config)
    vocab_size = vocab_size_of(config.dataset)
    shape = (2 * config.batch_size * config.block_size + 1,)
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(config.seed), dtype=torch.int32)
    run = train.Run(config, SimpleNamespace(train=tokens, encoding=SimpleNamespace(n_vocab=vocab_size)))
    for _ in range(WARM_UP):
        run.train_step()
    return run


def milliseconds(function, device, calls=1):
    """The mean time of several calls in a row, with the device idle before the first and after the last."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (time.perf_counter() - start) * 1e3 / calls


def time_in_turns(steps, device, seconds):
    """Times of several functions in ms, a list each; interleaved, so that a drift of the machine affects all alike."""
    times = [[] for _ in steps]
    calls = IN_A_ROW.get(device.type, 1)
    while sum(map(sum, times)) * calls < seconds * 1e3 * len(steps) or len(times[0]) < 5:
        for step, its_times in zip(steps, times, strict=True):
            its_times.append(milliseconds(step, device, calls))
    return times


def measure(runs, seconds):
    """Yields a row for each of {name: Run}: the times of its training step, and their ratio to the first run's."""
    device = next(iter(runs.values())).device
    on_gpu = device.type == 'cuda'
    machine = torch.cuda.get_device_name() if on_gpu else f'{device}, {torch.get_num_threads()} threads'
    times = time_in_turns([run.train_step for run in runs.values()], device, seconds)
    for (name, run), ms in zip(runs.items(), times, strict=True):
        config = vars(run.config)
        p10, *_, p90 = statistics.quantiles(ms, n=10, method='inclusive')
        ratio = statistics.median(a / b for a, b in zip(ms, times[0], strict=True)) if len(runs) > 1 else None
        speed = config['batch_size'] * config['block_size'] / statistics.median(ms) * 1e3
        memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu and not config['compare'] else None
        row = dict(zip(COLUMNS, (name, statistics.median(ms), ratio, p10, p90, speed, memory), strict=True))
        row |= {knob: config[knob] for knob in ('batch_size', 'block_size', 'dtype', 'compile', 'attention')}
        steps = len(ms) * IN_A_ROW.get(device.type, 1)
        yield row | {'steps': steps, 'device': machine, 'torch': torch.__version__}


def print_row(row, first):
    """A line of the table, the first below a header."""
    if first:
        print('{device}, torch {torch}, {dtype}, batch {batch_size} x {block_size}'.format(**row))
        print(f'{COLUMNS[0]:30s}' + ''.join(f'{column:>15s}' for column in COLUMNS[1:]))
    digits = {'ratio': '.2f', 'tokens_per_s': ',.0f', 'peak_memory_gb': '.2f'}
    cells = ['-' if row[column] is None else format(row[column], digits.get(column, '.1f')) for column in COLUMNS[1:]]
    print(f'{row["config"]:30s}' + ''.join(f'{cell:>15s}' for cell in cells), flush=True)


def variants_of(name, config):
    """The rows of a config, {its name: the flags that make it}: one, or with --compare one for each value."""
    if not config.compare:
        return {name: []}
    knob, _, listed = config.compare.partition('=')
    if knob in ('device', 'threads'):
        sys.exit(f'--compare={knob}: all that are compared run in one process and have one {knob}: time each by itself')
    _, allowed, _ = read_knobs(train.__file__).get(knob, (None, (), ''))
    choices = ['False', 'True'] if bool in allowed else [one for one in allowed if isinstance(one, str)]
    values = listed.split(',') if listed else [value for value in choices if value != 'auto']
    if not values:
        sys.exit(f"--compare={knob}: name one of train.py's knobs and its values, as in --compare=n_head=2,5,10")
    return {f'{name} {knob}={value}': [f'--{knob}={value}'] for value in values}


def build_runs(variants, files, flags):
    """{name: its Run} for the variants that can run, with what the first chose; says of the others why they cannot."""
    runs = {}
    for name, changes in variants.items():
        try:
            config, _ = configure(PROGRAMS, [*files, *flags, *changes])
            train.check_knobs(config)  # one by one: the knobs of several configs need not fit together
            runs[name] = build_run(config)
            # a table has one dtype, unless dtypes are compared, and one number of threads, which is the process's
            flags += [f'--dtype={config.dtype}', f'--threads={config.threads}']
        except (SystemExit, RuntimeError, MemoryError) as error:
            reason = str(error).splitlines()[0] if str(error) and 'alloc' not in str(error) else 'out of memory'
            print(f'{name} is left out: {reason}', file=sys.stderr)
    return runs


def print_profile(run):
    """torch's own table of the operations that three steps spend their time on; trace.json has the details."""
    Path('trace.json').touch()  # fails before the work does: torch itself does not say when it cannot write
    with torch.profiler.profile() as profiler:
        milliseconds(run.train_step, run.device, calls=3)
    profiler.export_chrome_trace('trace.json')
    key = 'self_device_time_total' if run.device.type == 'cuda' else 'self_cpu_time_total'
    print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))
    print('trace.json opens in https://ui.perfetto.dev')


def main():
    config, files = configure(PROGRAMS)
    flags = [argument for argument in sys.argv[1:] if argument.startswith('-')]
    overlays = [file for file in files if Path(file).stem in OVERLAYS]
    rows, missing = 0, False
    for file in [file for file in files if file not in overlays] or [None]:
        torch.compiler.reset()  # compiled code is not shared
        gc.collect()  # nor is memory, which the peak would count
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        variants = variants_of(Path(file).stem if file else 'default', config)
        runs = build_runs(variants, [file, *overlays] if file else overlays, flags)
        was_asked = not config.compare or '=' in config.compare  # else for all values, of which some may not run here
        missing |= len(runs) < (len(variants) if was_asked else 1)
        if config.profile:
            for run in runs.values():
                print_profile(run)
        elif runs:
            for row in measure(runs, config.seconds):
                print(dumps(row), flush=True) if config.json else print_row(row, first=not rows)
                rows += 1
        runs = None  # frees the models
    if missing:
        sys.exit(1)


if __name__ == '__main__':
    run_program(main)

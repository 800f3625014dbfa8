"""Time the very step that train.py runs: ms/batch, tokens/s, TFLOP/s, memory.

    python bench.py                                          train.py's defaults
    python bench.py config/swiglu.py config/deep.py          a row each
    python bench.py config/swiglu.py --batch_size=4 --json   any of train.py's knobs; rows as JSON lines
    python bench.py config/swiglu.py --compare=attention     variants, interleaved: attention, compile or dtype
    python bench.py config/swiglu.py --profile               the ten costliest operations, and a trace

Runs on random tokens: the time of a step does not depend on the text. Needs train and what it needs.
"""

import contextlib
import statistics
import subprocess
import sys
import time
from json import dumps
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from configurator import configure
from data import vocab_size_of

json = False  # one JSON object a row in place of the table
compare: str | None = None  # 'attention', 'compile' or 'dtype': its variants beside each other
profile = False  # where the time of a step goes; the trace is written to trace.json
seconds = 10.0  # how long each row is timed, after the warm-up; at least 5 steps

COLUMNS = (
    'config',
    'ms_median',
    'ms_p10',
    'ms_p90',
    'tokens_per_s',
    'tflops',
    'peak_share',
    'peak_memory_gb',
    'log_ms',
)
LOG_MS = {'swiglu': 38, 'deep': 48.5, 'wide': 35, 'swiglu_18': 130, 'swiglu_23': 465}  # the log's ms/batch
WARM_UP = 3  # steps: the first compiles and allocates, the next settle caches and clocks


# ---- what is measured ----------------------------------------------------------------------------------------------


def random_corpus(c):
    """As many random tokens as two steps read, in the shape of data.Corpus."""
    vocab_size = vocab_size_of(c.dataset)
    generator = torch.Generator().manual_seed(c.seed)
    tokens = torch.randint(vocab_size, (2 * c.batch_size * c.block_size + 1,), generator=generator)
    return SimpleNamespace(train=tokens.to(torch.int32), val=tokens[:2], meta={'vocab_size': vocab_size})


def flops_per_token(c, model):
    """Multiplications and additions of a training step, per token: 6 for each weight of a matrix product (2 forward,
    4 backward), and 6 n_layer T C for causal attention (two products of T x T x C, half of them masked)."""
    looked_up = {'positions'} if c.model == 'flash' else {'embedding.weight'}  # tables that are read, not multiplied
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name not in looked_up)
    return 6 * weights + 6 * c.n_layer * c.block_size * c.n_embd


def synchronize(device):
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def timed_step(run):
    """Milliseconds of one training step, with the device idle before and after."""
    synchronize(run.device)
    start = time.perf_counter()
    run.train_step()
    synchronize(run.device)
    return (time.perf_counter() - start) * 1e3


def matmul_peak(machine):
    """The TFLOP/s of this machine's best large matrix product in this dtype: what a step could reach at most."""
    n = 8192 if machine.device.type == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    times = []
    for _ in range(20):
        synchronize(machine.device)
        start = time.perf_counter()
        a @ b
        synchronize(machine.device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times) / 1e12


def reset_peak_memory(device):
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone can forget a process's peak
        Path('/proc/self/clear_refs').write_text('5')


def peak_memory_gb(device):
    """GB that the device, or the whole process on a CPU, held at most; None where the system does not tell."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 1e9
    with contextlib.suppress(OSError):
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024 / 1e9
    return None


def commit():
    """The commit of this checkout, '+' for changes on top; None outside of git."""
    here = Path(__file__).parent
    done = subprocess.run(['git', 'describe', '--always', '--dirty=+'], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or None


def measure(name, c, machine, peak):
    """One row: the times of the config's training step on this machine."""
    reset_peak_memory(machine.device)
    run = train.Run(c, random_corpus(c), machine)
    first, *_ = [timed_step(run) for _ in range(WARM_UP)]
    times = []
    while len(times) < 5 or sum(times) < c.seconds * 1e3:
        times.append(timed_step(run))
    median, (p10, *_, p90) = statistics.median(times), statistics.quantiles(times, n=10)
    tokens = c.batch_size * c.block_size
    tflops = flops_per_token(c, run.raw) * tokens / median / 1e9
    return {
        'config': name,
        'ms_median': median,
        'ms_p10': p10,
        'ms_p90': p90,
        'tokens_per_s': tokens / median * 1e3,
        'tflops': tflops,
        'peak_share': tflops / peak,
        'peak_memory_gb': peak_memory_gb(machine.device),
        'log_ms': LOG_MS.get(name) if (c.batch_size, c.block_size) == (20, 1024) else None,
        'first_step_ms': first,
        'steps': len(times),
        'shape': [c.batch_size, c.block_size],
        'attention': machine.attention,
        'compile': machine.compile,
        'dtype': str(machine.dtype).removeprefix('torch.'),
        'device': device_name(machine.device),
        'torch': torch.__version__,
        'commit': commit(),
    }


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {torch.get_num_threads()} threads'


# ---- variants side by side -----------------------------------------------------------------------------------------


def variants(c):
    """The variants of --compare as (name, machine, context to run in); those that cannot run here are left out."""
    if c.compare == 'attention':
        backends = {'cuDNN': SDPBackend.CUDNN_ATTENTION, 'FlashAttention': SDPBackend.FLASH_ATTENTION,
                    'efficient': SDPBackend.EFFICIENT_ATTENTION, 'math': SDPBackend.MATH}  # fmt: skip
        kernels = ('sdpa', 'chunked', 'naive', 'flash')
        wanted = [(kernel, {'attention': kernel}, contextlib.nullcontext) for kernel in kernels]
        for name, backend in backends.items():
            wanted.append((f'sdpa {name}', {'attention': 'sdpa'}, lambda backend=backend: sdpa_kernel(backend)))
    elif c.compare == 'compile':
        wanted = [(f'compile={on}', {'compile': on}, contextlib.nullcontext) for on in (False, True)]
    elif c.compare == 'dtype':
        wanted = [(name, {'dtype': name}, contextlib.nullcontext) for name in ('float32', 'bfloat16')]
    else:
        sys.exit(f"compare is {c.compare!r}, expected 'attention', 'compile' or 'dtype'.")
    for name, change, context in wanted:
        try:
            run = train.Run(SimpleNamespace(**{**vars(c), **change}), random_corpus(c), machine_with(c, change))
            with context():
                for _ in range(WARM_UP):
                    run.train_step()
        except (SystemExit, RuntimeError) as error:
            print(f'{name}: cannot run here: {str(error).splitlines()[0]}', file=sys.stderr)
            continue
        yield name, run, context


def machine_with(c, change):
    return train.choose_machine(SimpleNamespace(**{**vars(c), **change}))


def print_comparison(name, c):
    """Time the variants turn by turn, so that a drift of the machine's speed meets all of them alike."""
    runs = list(variants(c))
    times = [[] for _ in runs]
    while sum(map(sum, times)) < c.seconds * 1e3 * len(runs) or len(times[0]) < 5:
        for (_, run, context), row in zip(runs, times, strict=True):
            with context():
                row.append(timed_step(run))
    print(f'{name}, {c.batch_size} x {c.block_size}, {len(times[0])} steps each')
    for (variant, _, _), row in zip(runs, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(row, times[0], strict=True))
        print(f'  {variant:20s} {statistics.median(row):9.1f} ms   {ratio:5.2f} x {runs[0][0]}')


def print_profile(name, c, machine):
    """The operations that a step spends its time on, and their shares; everything else is in trace.json."""
    run = train.Run(c, random_corpus(c), machine)
    for _ in range(WARM_UP):
        run.train_step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            timed_step(run)
    profiler.export_chrome_trace('trace.json')
    on_gpu = machine.device.type == 'cuda'
    rows = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e) for e in profiler.key_averages()]
    total = sum(t for t, _ in rows)
    print(f'{name}: {total / 3e3:.1f} ms a step; trace.json opens in https://ui.perfetto.dev')
    for t, event in sorted(rows, key=lambda row: -row[0])[:10]:
        print(f'  {t / total:6.1%}  {t / 3e3:8.2f} ms  {event.count // 3:5d} x  {event.key}')


# ---- the program ---------------------------------------------------------------------------------------------------


def cell(name, row):
    """A value of the table, as text."""
    value = row[name]
    if value is None:
        return '-'
    digits = {'tokens_per_s': ',.0f', 'tflops': '.3f', 'peak_share': '.0%', 'peak_memory_gb': '.2f', 'config': 's'}
    return format(value, digits.get(name, '.1f'))


def main():
    programs = [__file__, train.__file__]
    _, files = configure(programs, sys.argv[1:])
    flags = [argument for argument in sys.argv[1:] if argument.startswith('-')]
    peak = None
    for file in files or [None]:
        c, _ = configure(programs, [file, *flags] if file else flags)
        train.check_knobs(c)
        name = Path(file).stem if file else 'default'
        machine = train.choose_machine(c)
        try:
            if c.compare:
                print_comparison(name, c)
            elif c.profile:
                print_profile(name, c, machine)
            else:
                if peak is None:
                    peak = matmul_peak(machine)
                    if not c.json:
                        print(f'{device_name(machine.device)}, torch {torch.__version__}, {machine.dtype}, matmul peak '
                              f'{peak:.3f} TFLOP/s, batch {c.batch_size} x {c.block_size}')  # fmt: skip
                        print(''.join(f'{column:>15s}' for column in COLUMNS))
                row = measure(name, c, machine, peak)
                print(dumps(row) if c.json else ''.join(f'{cell(column, row):>15s}' for column in COLUMNS), flush=True)
        except torch.OutOfMemoryError:
            sys.exit(train.out_of_memory(c, machine))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

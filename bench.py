"""Time the very step that train.py runs: ms/batch, tokens/s, TFLOP/s, memory.

    python bench.py                                          train.py's defaults
    python bench.py config/swiglu.py config/deep.py          a row each
    python bench.py config/swiglu.py --batch_size=4 --json   any of train.py's knobs; rows as JSON lines
    python bench.py config/swiglu.py --compare=attention     variants turn by turn (others: see the knob compare)
    python bench.py config/swiglu.py --profile               the ten costliest operations, and a trace

Runs on random tokens: the time of a step does not depend on the text. Needs train and what it needs.
"""

import contextlib
import datetime
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from json import dumps, loads
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from configurator import configure
from data import vocab_size_of

json = False  # one JSON object a row in place of the table
compare: str | None = None  # 'attention', 'compile', 'cuda_graph', 'dtype', 'nanogpt': variants beside each other
nanogpt = '../nanoGPT'  # for --compare=nanogpt: a clone of nanoGPT
profile = False  # where the time of a step goes; the trace is written to trace.json
seconds = 10.0  # how long each row is timed, after the warm-up; at least 5 steps

PROGRAMS = [__file__, train.__file__]  # whose knobs these are
COLUMNS = 'config ms_median ms_p10 ms_p90 tokens_per_s tflops peak_share peak_memory_gb log_ms'.split()
LOG_MS = {'swiglu': 38, 'deep': 48.5, 'wide': 35, 'swiglu_18': 130, 'swiglu_23': 465}  # the log's ms/batch
WARM_UP = 3  # steps: the first compiles and allocates, the next settle caches and clocks, the third may be recorded


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


def milliseconds(function, device):
    """How long a call takes, with the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3


def matmul_peak(machine):
    """The TFLOP/s of this machine's best large matrix product in this dtype: what a step could reach at most."""
    n = 8192 if machine.device.type == 'cuda' else 1024
    a, b = (torch.randn(n, n, device=machine.device, dtype=machine.dtype) for _ in range(2))
    return 2 * n**3 / min(milliseconds(lambda: a @ b, machine.device) for _ in range(20)) / 1e9


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


def measure(name, c, machine):
    """One row: the times of the config's training step on this machine."""
    run = train.Run(c, random_corpus(c), machine)
    first, *_ = [milliseconds(run.train_step, run.device) for _ in range(WARM_UP)]
    times = []
    while len(times) < 5 or sum(times) < c.seconds * 1e3:
        times.append(milliseconds(run.train_step, run.device))
    median, (p10, *_, p90) = statistics.median(times), statistics.quantiles(times, n=10)
    tokens = c.batch_size * c.block_size
    tflops = flops_per_token(c, run.raw) * tokens / median / 1e9
    memory = peak_memory_gb(machine.device)  # before the peak is measured, which takes some as well
    return {
        'config': name,
        'ms_median': median,
        'ms_p10': p10,
        'ms_p90': p90,
        'tokens_per_s': tokens / median * 1e3,
        'tflops': tflops,
        'peak_share': tflops / matmul_peak(machine),
        'peak_memory_gb': memory,
        'log_ms': LOG_MS.get(name) if (c.batch_size, c.block_size) == (20, 1024) else None,
        'first_step_ms': first,
        'steps': len(times),
        'shape': [c.batch_size, c.block_size],
        'attention': machine.attention,
        'compile': machine.compile,
        'dtype': str(machine.dtype).removeprefix('torch.'),
        **surroundings(machine.device),
    }


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{device.type}, {torch.get_num_threads()} threads'


def surroundings(device):
    """What a number has to be read with."""
    return {
        'device': device_name(device),
        'torch': torch.__version__,
        'commit': commit(),
        'date': datetime.date.today().isoformat(),
    }


# ---- variants side by side -----------------------------------------------------------------------------------------


class NanoGPT:
    """nanoGPT's training step at our shape, as its train.py runs it: compiled, batches read from a file between forward
    and backward. c.nanogpt: a clone of https://github.com/karpathy/nanoGPT, of which model.py is executed."""

    def __init__(self, c, corpus, machine):
        if (c.d_ff, c.activation, c.position) != (4 * c.n_embd, 'gelu', 'learned'):
            sys.exit(f'nanoGPT has one shape only: add --d_ff={4 * c.n_embd} --activation=gelu --position=learned.')
        path = Path(c.nanogpt, 'model.py')
        if not path.exists():
            sys.exit(f'{path} is not there: git clone https://github.com/karpathy/nanoGPT {c.nanogpt}')
        spec = importlib.util.spec_from_file_location('nanogpt', path)
        nanogpt = importlib.util.module_from_spec(spec)
        shape = {name: getattr(c, name) for name in ('block_size', 'n_layer', 'n_head', 'n_embd', 'dropout')}
        with contextlib.redirect_stdout(None):
            spec.loader.exec_module(nanogpt)
            net = nanogpt.GPT(nanogpt.GPTConfig(**shape, vocab_size=-(-corpus.meta['vocab_size'] // 8) * 8, bias=True))
            self.optimizer = net.to(machine.device).configure_optimizers(0.1, 1e-4, (0.9, 0.95), machine.device.type)
        self.model, self.device = torch.compile(net), machine.device
        self.autocast = machine.autocast()
        self.shape, self.file = (c.batch_size, c.block_size), tempfile.NamedTemporaryFile()
        corpus.train.numpy().astype(np.uint16).tofile(self.file.name)
        self.batch = self.read()

    def read(self):
        rows, length = self.shape
        tokens = np.memmap(self.file.name, np.uint16, 'r')
        starts = torch.randint(len(tokens) - length, (rows,))
        x, y = (torch.stack([torch.from_numpy(tokens[i + shift :][:length].astype(np.int64)) for i in starts])
                for shift in (0, 1))  # fmt: skip
        if self.device.type == 'cuda':
            x, y = (side.pin_memory().to(self.device, non_blocking=True) for side in (x, y))
        return x, y

    def train_step(self):
        with self.autocast:
            _, loss = self.model(*self.batch)
        self.batch = self.read()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --compare: the variants as (name, what they change, context to run in); the first is what the others are held against
PLAIN = contextlib.nullcontext
BACKENDS = {'cuDNN': SDPBackend.CUDNN_ATTENTION, 'FlashAttention': SDPBackend.FLASH_ATTENTION,
            'efficient': SDPBackend.EFFICIENT_ATTENTION, 'math': SDPBackend.MATH}  # fmt: skip
DTYPES = ('float32', 'bfloat16')
VARIANTS = {
    'attention': [(kernel, {'attention': kernel}, PLAIN) for kernel in ('sdpa', 'chunked', 'naive', 'flash')]
    + [(f'sdpa {name}', {'attention': 'sdpa'}, partial(sdpa_kernel, it)) for name, it in BACKENDS.items()],
    'compile': [(f'compile={on}', {'compile': on}, PLAIN) for on in (False, True)],
    'cuda_graph': [(f'cuda_graph={on}', {'cuda_graph': on}, PLAIN) for on in (False, True)],
    'dtype': [(dtype, {'dtype': dtype}, PLAIN) for dtype in DTYPES],
    'nanogpt': [(f'nanoGPT, {dtype}', {'dtype': dtype, 'step': NanoGPT}, PLAIN) for dtype in DTYPES]
    + [('this', {'compile': False}, PLAIN), ('this, compiled', {'compile': True}, PLAIN),
       ('this, cuda_graph', {'compile': True, 'cuda_graph': True}, PLAIN)],
}  # fmt: skip


def variants(c):
    """The variants of --compare that can run here, as (name, run, context to run in); says which cannot, and why."""
    for name, change, context in VARIANTS[c.compare]:
        changed = SimpleNamespace(**{**vars(c), 'step': train.Run, **change})
        try:
            run = changed.step(changed, random_corpus(c), train.choose_machine(changed))
            with context():
                for _ in range(WARM_UP):
                    run.train_step()
        except (SystemExit, RuntimeError) as error:
            if change.get('step') and isinstance(error, SystemExit):
                raise  # without nanoGPT there is nothing to be held against
            print(f'{name}: cannot run here: {str(error).splitlines()[0]}', file=sys.stderr)
            continue
        yield name, run, context


def print_comparison(name, c):
    """Time the variants turn by turn, so that a drift of the machine's speed meets all of them alike."""
    runs = list(variants(c)) or sys.exit(1)  # each has said why not
    times = [[] for _ in runs]
    while sum(map(sum, times)) < c.seconds * 1e3 * len(runs) or len(times[0]) < 5:
        for (_, run, context), row in zip(runs, times, strict=True):
            with context():
                row.append(milliseconds(run.train_step, run.device))
    medians = {variant: statistics.median(row) for (variant, _, _), row in zip(runs, times, strict=True)}
    if c.json:
        shape = {knob: getattr(c, knob) for knob in ('n_layer', 'n_head', 'n_embd', 'batch_size', 'block_size')}
        row = {'config': name, 'compare': c.compare, **shape, 'steps': len(times[0]), 'ms_median': medians}
        print(dumps({**row, **surroundings(runs[0][1].device)}), flush=True)
        return
    print(f'{name}, {c.batch_size} x {c.block_size}, {len(times[0])} steps each')
    for (variant, median), row in zip(medians.items(), times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(row, times[0], strict=True))
        print(f'  {variant:20s} {median:9.1f} ms   {ratio:5.2f} x {runs[0][0]}')


def print_profile(name, c, machine):
    """The operations that a step spends its time on, and their shares; everything else is in trace.json."""
    run = train.Run(c, random_corpus(c), machine)
    for _ in range(WARM_UP):
        run.train_step()
    with torch.profiler.profile() as profiler:
        for _ in range(3):
            milliseconds(run.train_step, run.device)
    profiler.export_chrome_trace('trace.json')
    on_gpu = machine.device.type == 'cuda'
    rows = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e) for e in profiler.key_averages()]
    total = sum(t for t, _ in rows)
    print(f'{name}: {total / 3e3:.1f} ms a step; trace.json opens in https://ui.perfetto.dev')
    for t, event in sorted(rows, key=lambda row: -row[0])[:10]:
        print(f'  {t / total:6.1%}  {t / 3e3:8.2f} ms  {event.count // 3:5d} x  {event.key}')


# ---- the program ---------------------------------------------------------------------------------------------------


def print_row(row, header):
    """A row of the table, the first below a header."""
    digits = {'tokens_per_s': ',.0f', 'tflops': '.3f', 'peak_share': '.0%', 'peak_memory_gb': '.2f', 'config': 's'}
    if header:
        peak, shape = row['tflops'] / row['peak_share'], ' x '.join(map(str, row['shape']))
        print(f'{row["device"]}, torch {row["torch"]}, {row["dtype"]}, matmul peak {peak:.3f} TFLOP/s, batch {shape}')
        print(''.join(f'{column:>15s}' for column in COLUMNS))
    cells = ['-' if row[column] is None else format(row[column], digits.get(column, '.1f')) for column in COLUMNS]
    print(''.join(f'{cell:>15s}' for cell in cells), flush=True)


def run_here(file, flags):
    """Print one config's row as JSON, its comparison or its profile."""
    c, _ = configure(PROGRAMS, [file, *flags] if file else flags)
    name, machine = Path(file).stem if file else 'default', train.choose_machine(c)
    try:
        if c.compare:
            print_comparison(name, c)
        elif c.profile:
            print_profile(name, c, machine)
        else:
            print(dumps(measure(name, c, machine)))
    except torch.OutOfMemoryError:
        sys.exit(train.out_of_memory(c, machine))


def main():
    c, files = configure(PROGRAMS, sys.argv[1:])
    train.check_knobs(c)
    if c.compare not in (None, *VARIANTS):
        sys.exit(f'compare is {c.compare!r}, expected one of: {", ".join(VARIANTS)}.')
    flags = [argument for argument in sys.argv[1:] if argument.startswith('-')]
    table = not (c.compare or c.profile or c.json)
    if len(files) < 2 and not table:
        return run_here(*files or [None], flags)
    # a process each: no row inherits the memory that another has freed, or the code that was compiled for it
    for i, file in enumerate(files or [None]):
        command = [sys.executable, __file__, *([file] if file else []), *flags, *(['--json'] if table else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE if table else None, text=True)
        if done.returncode < 0:
            sys.exit(f'{file or "the step"} was ended by signal {-done.returncode}; was there too little memory?')
        if done.returncode:
            sys.exit(done.returncode)
        if table:
            print_row(loads(done.stdout), header=i == 0)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

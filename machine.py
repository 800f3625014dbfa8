"""Hardware and distributed setup: device, number format, attention, compiler, processes; and how a program ends.

It decides what 'auto' means on this computer. It needs model.py, two layers of which it times.
"""

import contextlib
import ctypes
import datetime
import functools
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import build_model


def choose_machine(config, saved=None):
    """Replace 'auto' in device, dtype, threads and attention by what this computer has, and join the other processes.
    A saved run keeps what it computed with. Returns how it computes and why, and which attention and why. Exits if the
    device is not there."""
    device = choose_device(config.device)
    config.device = str(device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 for products in float32
        if torch.__version__ < '2.12':  # there cuDNN rounds the dropout to sixteenths
            torch.backends.cuda.enable_cudnn_sdp(not config.dropout)
    if 'RANK' in os.environ:
        join_processes(device)
    other_run = f'{config.out_dir} does not hold the same run on all machines: copy it from the first to the others.'
    check_same(saved['step'] if saved else 0, other_run)
    kept = saved['knobs'] if saved else {}
    why_dtype = why_cpu = ''
    if device.type == 'cpu':
        keep_freed_memory()
        why_cpu = choose_products(config, kept) + choose_threads(config, kept)
    if config.dtype == 'auto' and saved:
        config.dtype = kept['dtype']
    if config.dtype == 'auto' and device.type != 'cpu':
        is_ampere = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
        config.dtype = 'bfloat16' if is_ampere else 'float32'
    if config.dtype == 'auto':
        speedup = float(all_reduce(bfloat16_speedup(config))) / rank_and_world_size()[1]
        config.dtype, slower = ('bfloat16', 'float32') if speedup > 1 else ('float32', 'bfloat16')
        why_dtype = f' ({max(speedup, 1 / speedup):.1f} times as fast as {slower} here)'
    how = f'{config.dtype}{why_dtype}{why_cpu}'
    if config.model == 'torch':
        return how, "nn.MultiheadAttention's own choice"
    dtype = getattr(torch, config.dtype)
    config.attention, why_attention = choose_attention(config.attention, device, dtype, config.dropout)
    return how, f'{config.attention} ({why_attention})'


def choose_device(name):
    """The torch.device that the knob means, a GPU for each process. Exits if it is not there."""
    if name == 'auto':
        name = next(kind for kind in ('cuda', 'mps', 'cpu') if getattr(torch, kind).is_available())
    if name == 'cuda':
        name = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch's own refusals
        sys.exit(f'device is {name!r}, which is not there; try --device=cpu. {str(error).splitlines()[0]}')
    return device


def choose_products(config, kept):
    """Choose which library multiplies float32 matrices on this CPU: MKL, PyTorch's default, or oneDNN, which PyTorch
    takes where the precision is set to 'medium'. Returns a text on the choice, or ''."""
    speedup = float(all_reduce(onednn_speedup(), dist.ReduceOp.MIN))  # 0 where it is not as exact in each process
    config.products = 'medium' if speedup > 1.2 else 'highest'
    if kept.get('device') == 'cpu' and speedup:
        config.products = kept.get('products', 'highest')  # runs of older versions have MKL's
    torch.set_float32_matmul_precision(config.products)
    return f', float32 products by oneDNN ({speedup:.1f} times as fast here)' if config.products == 'medium' else ''


@functools.cache
def onednn_speedup():
    """How many times as fast as MKL oneDNN multiplies in float32 with one thread: MKL is slow on AMD's CPUs. 0 if it is
    not as exact: on a CPU with AMX it rounds to bfloat16."""
    clock = time.thread_time if os.name == 'posix' else time.perf_counter  # what other programs use does not count
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.rand(2, 512, 512, generator=torch.Generator().manual_seed(0))
    exact, seconds, error = a.double() @ b.double(), {'highest': math.inf, 'medium': math.inf}, {}
    for precision in 5 * [*seconds]:
        torch.set_float32_matmul_precision(precision)
        start = clock()
        product = a @ b
        seconds[precision] = min(seconds[precision], clock() - start)
        error[precision] = (product - exact).abs().max()
    torch.set_num_threads(n_threads)
    return seconds['highest'] / seconds['medium'] if error['medium'] < 4 * error['highest'] else 0.0


def choose_threads(config, kept):
    """Choose how many threads compute, where neither the knob nor OMP_NUM_THREADS says so: all that torch would take,
    unless half of them or one is much faster, as on a machine with other work. Returns a text on the choice, or ''."""
    most = torch.get_num_threads()
    before = kept and min(kept.get('threads') or most, most)  # this computer may have fewer
    asked = config.threads or (most if 'OMP_NUM_THREADS' in os.environ else before)
    counts = [asked] if asked else dict.fromkeys((most, max(1, most // 2), 1))
    dtype = 'float32' if config.dtype == 'auto' else config.dtype
    seconds = {n: s for (_, n), s in time_two_layers(config, [(dtype, n) for n in counts]).items()}
    config.threads = min(seconds, key=lambda n: seconds[n] * (1 if n == most else 1.2))
    torch.set_num_threads(config.threads)
    if asked or config.threads == most:
        return ''
    threads = '1 thread' if config.threads == 1 else f'{config.threads} threads'
    return f', {threads} ({seconds[most] / seconds[config.threads]:.1f} times as fast as {most} here)'


def bfloat16_speedup(config):
    """How many times as fast this CPU is in bfloat16 as in float32."""
    n = torch.get_num_threads()
    seconds = time_two_layers(config, [('float32', n), ('bfloat16', n)])
    return seconds['float32', n] / seconds['bfloat16', n]


def time_two_layers(config, ways):
    """{way: seconds} of forward and backward passes of two layers, for ways to compute: (dtype, number of threads)."""
    if len(ways) == 1:
        return dict.fromkeys(ways, math.inf)
    x = torch.zeros(-(-400 // config.block_size), min(config.block_size, 400), dtype=torch.long)
    seconds, models = {way: [] for way in ways}, {}
    for dtype, _ in ways:
        variant = SimpleNamespace(**vars(config) | {'dtype': dtype, 'n_layer': min(2, config.n_layer)})
        variant.attention, _ = choose_attention(config.attention, x.device, getattr(torch, dtype), config.dropout)
        models[dtype] = variant, build_model(variant, 1024)  # about the size of our vocabulary
    for i in range(5):
        for dtype, n_threads in ways:
            torch.set_num_threads(n_threads)
            variant, model = models[dtype]
            start = time.perf_counter()
            with autocast(variant):
                model(x, x).backward()
            seconds[dtype, n_threads].append(time.perf_counter() - start)
        last = [times[-1] for times in seconds.values()]
        if i and max(last) > 4 * min(last):  # decided: a CPU without bfloat16 instructions, say
            break
    return {way: min(times) for way, times in seconds.items()}


def choose_attention(attention, device, dtype, dropout=0.0):
    """The kernel that the knob means on this device: (name, reason). Exits if 'flash' cannot run."""
    capability = torch.cuda.get_device_capability(device) if device.type == 'cuda' else (0, 0)
    why_not_flash = None
    if capability < (8, 0):
        why_not_flash = 'flash-attn needs a CUDA device of capability 8.0 or more'
    elif dtype not in (torch.bfloat16, torch.float16):
        why_not_flash = 'flash-attn needs bfloat16 or float16'
    else:
        try:
            from flash_attn import flash_attn_func  # noqa: F401
        except Exception as error:  # not installed, or built for another torch, which raises many kinds of error
            why_not_flash = f'no flash-attn: {(str(error) or repr(error)).splitlines()[0]}'
    if attention == 'flash' and why_not_flash:
        sys.exit(f'--attention=flash cannot run here: {why_not_flash}. --attention=auto takes what can.')
    if attention != 'auto':
        return attention, 'as asked'
    if device.type == 'cpu' and (dropout or dtype == torch.bfloat16):
        return 'chunked', "PyTorch's CPU kernel is slow in bfloat16 and has no dropout"
    if capability >= (9, 0):
        return 'sdpa', "cuDNN's kernel is the fastest, measured on an H100"
    return ('sdpa', why_not_flash) if why_not_flash else ('flash', 'FlashAttention 2')


def count_params(config, vocab_size):
    """The number of parameters of a config's model, which is not allocated for it."""
    with torch.device('meta'):
        return build_model(SimpleNamespace(**vars(config) | {'attention': 'naive'}), vocab_size).num_params()


def autocast(config):
    """The context in which the forward pass computes in config.dtype wherever that is numerically safe."""
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.dtype), config.dtype != 'float32')


def compile_model(model, x, y, config):
    """Compile the model in place if config.compile asks for it; None: on CUDA only. A micro-batch x, y shows whether
    the compiler works here: if not, the run goes uncompiled, or exits if it was asked to compile."""
    asked = config.compile
    on_cuda = torch.device(config.device).type == 'cuda'
    config.compile = on_cuda if asked is None else asked
    if not config.compile:
        return
    torch.compiler.set_stance('default')  # another model of this process may have failed, in bench.py
    model.compile(dynamic=False)
    try:
        with autocast(config):
            model(x, y).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, no Python.h, a GPU too old: each raises its own
        reason = (str(error) or repr(error)).splitlines()[0]
        if asked:
            sys.exit(f'--compile cannot work here, --compile=False does without: {reason}')
        print0(f'not compiled: {reason}')
        torch.compiler.set_stance('force_eager')
        config.compile = False
    model.zero_grad()


class Recorded:
    """A function of tensors and numbers on a GPU, recorded as a CUDA graph and then replayed as a whole.

    A training step is hundreds of short kernels, and launching them one by one can take the host longer than running
    them takes the GPU; a graph is launched at once. A replay runs the same kernels on the same memory: so the arguments
    are copied to where the recording read them, and the results are copied away from where it wrote them. The first
    three calls are not recorded, since in them kernels are compiled and optimizers create their state."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *arguments):
        if not self.calls:
            device = arguments[0].device
            self.inputs = [torch.as_tensor(argument, device=device).clone() for argument in arguments]
        for place, argument in zip(self.inputs, arguments, strict=True):
            place.copy_(argument) if torch.is_tensor(argument) else place.fill_(argument)
        self.calls += 1
        if self.calls <= 3:  # on a stream other than the default one, which cannot be recorded
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results = self.function(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = self.function(*self.inputs)
        self.graph.replay()
        return [result.clone() for result in self.results]


def keep_freed_memory():
    """Let glibc keep large freed blocks. By default it returns them to the system, which clears them when they are
    allocated anew, in every step: a sixth of its time (swiglu, 4 x 1024, two cores of an AMD EPYC)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc lacks it, Windows has no libc
        for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: their maxima
            ctypes.CDLL(None).mallopt(option, value)


def rank_and_world_size():
    """(this process's rank, the number of processes), as torchrun sets them. Exits if they are no numbers."""
    rank, world_size = os.environ.get('RANK', '0'), os.environ.get('WORLD_SIZE', '1')
    if 'RANK' not in os.environ:  # some clusters set WORLD_SIZE for programs of their own
        return 0, 1
    if not (rank.isdecimal() and world_size.isdecimal()):
        sys.exit(f'RANK is {rank!r} and WORLD_SIZE {world_size!r}, expected numbers. Use torchrun, or unset RANK.')
    return int(rank), int(world_size)


def join_processes(device):
    """Join the processes that torchrun started. Exits if it was not torchrun that set RANK."""
    backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'
    try:  # an hour, since the first process may have a corpus to prepare
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    except ValueError as error:
        sys.exit(f'RANK is set, but not all that torchrun sets: {error}. Use torchrun, or unset RANK.')
    # never freed: gloo would wait there for threads that wait for Python's own lock (pytorch/pytorch#56297)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def all_reduce(value, op=dist.ReduceOp.SUM):
    """A number or tensor, reduced over all processes; a single process gets it back unchanged."""
    if not dist.is_initialized():
        return value
    tensor = torch.as_tensor(value)
    dist.all_reduce(tensor, op)
    return tensor


def check_same(number, otherwise):
    """Exit with one line if a number differs between the processes, which may run on several machines."""
    if all_reduce(number, dist.ReduceOp.MIN) != all_reduce(number, dist.ReduceOp.MAX):
        sys.exit(otherwise if rank_and_world_size()[0] == 0 else 1)


def print0(line):
    """Print a line above the progress bar, from the first process only."""
    if rank_and_world_size()[0] == 0:
        tqdm.write(line)


def run_program(main):
    """Run a program's main. Ctrl-C, a reader of its output that leaves, a file's error and a full memory end it without
    a traceback. A character that the output's encoding lacks is replaced."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
    if hasattr(sys.stdout, 'reconfigure'):  # Jupyter's and IDLE's streams have no encoding
        sys.stdout.reconfigure(errors='replace')
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python itself writes as it ends
        sys.exit(141)
    except OSError as error:
        sys.exit(str(error) or repr(error))
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one; on a CPU torch raises a plain one
        if isinstance(error, RuntimeError) and not re.search('out of memory|allocate|overflow', str(error)):
            raise
        sys.exit('out of memory: a smaller model takes less; in training so does a lower --batch_size or, for the same '
                 'update, more --gradient_accumulation_steps.')  # fmt: skip

"""The computer that a run finds: device, number format, attention, compiler, processes; what 'auto' means on it.

It needs model, two layers of which it times.
"""

import contextlib
import ctypes
import datetime
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import build_model


def processes():
    """(this process's rank, the number of processes), as torchrun says."""
    return int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))


def over_processes(value, op=dist.ReduceOp.SUM):
    """A number or tensor, reduced over all processes; a single process gets its own back."""
    if not dist.is_initialized():
        return value
    tensor = torch.as_tensor(value)
    dist.all_reduce(tensor, op)
    return tensor


def say(line):
    """Print a line above the progress bar, from the first process only."""
    if processes()[0] == 0:
        tqdm.write(line)


def join_processes(device):
    """Join the processes that torchrun started. Exits if it was not torchrun that set RANK."""
    wait = datetime.timedelta(hours=1)  # for the first process, which may have a corpus to prepare
    try:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo', timeout=wait)
    except ValueError as error:
        sys.exit(f'RANK is set, but not all that torchrun sets: {error}. Use torchrun, or unset RANK.')
    # never freed: gloo would wait there for threads that wait for Python's own lock (pytorch/pytorch#56297)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def choose_machine(c, saved=None):
    """Replace 'auto' in device, dtype and attention by what this computer has, and join the other processes. A saved
    run keeps its dtype. Returns why this dtype, and which attention and why. Exits if the device is not there."""
    if c.device == 'auto':
        c.device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if c.device == 'cuda':
        c.device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.device(c.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch's own refusals
        sys.exit(f'device is {c.device!r}, which is not there; try --device=cpu. {str(error).splitlines()[0]}')
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32 where a product is in float32
        if torch.__version__ < '2.12':  # there cuDNN rounds the dropout to sixteenths
            torch.backends.cuda.enable_cudnn_sdp(not c.dropout)
    if device.type == 'cpu':
        keep_freed_memory()
    if 'RANK' in os.environ:
        join_processes(device)
    why_dtype = ''
    if c.dtype == 'auto' and saved:
        c.dtype = saved['knobs']['dtype']
    if c.dtype == 'auto' and device.type != 'cpu':
        fast = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
        c.dtype = 'bfloat16' if fast else 'float32'
    if c.dtype == 'auto':
        gain = float(over_processes(gain_of_bfloat16(c))) / processes()[1]
        c.dtype, loser = ('bfloat16', 'float32') if gain > 1 else ('float32', 'bfloat16')
        why_dtype = f' ({max(gain, 1 / gain):.1f} times as fast as {loser} here)'
    if c.model == 'torch':
        return why_dtype, "nn.MultiheadAttention's own choice"
    c.attention, reason = choose_attention(c.attention, device, getattr(torch, c.dtype), c.dropout)
    return why_dtype, f'{c.attention} ({reason})'


def autocast(c):
    """The context in which the forward pass computes in c.dtype where that is safe."""
    return torch.autocast(torch.device(c.device).type, getattr(torch, c.dtype), enabled=c.dtype != 'float32')


def compile_model(model, x, y, c):
    """Compile the model if c.compile says so; None: on CUDA only. A micro-batch x, y shows whether this computer can:
    where it cannot, the run goes on without, or exits if it was asked for."""
    asked, on_cuda = c.compile, torch.device(c.device).type == 'cuda'
    c.compile = on_cuda if asked is None else asked
    if not c.compile:
        return
    # to launch a small kernel takes longer than to run it: one process records its launches and replays them
    records = on_cuda and processes()[1] == 1
    model.compile(dynamic=False, mode='reduce-overhead' if records else None)
    try:
        with autocast(c):
            model(x, y).backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no C compiler, no Python.h, too old a GPU: each raises its own
        reason = (str(error) or repr(error)).splitlines()[0]
        if asked:
            sys.exit(f'--compile cannot work here, --compile=False does without: {reason}')
        say(f'not compiled: {reason}')
        torch.compiler.set_stance('force_eager')
        c.compile = False
    model.zero_grad()


def gain_of_bfloat16(c):
    """How many times as fast in bfloat16 as in float32 this CPU is, measured on what it will do: two layers of this
    very model, forward and backward, on a few hundred tokens, turn by turn."""
    x = torch.zeros(-(-400 // c.block_size), min(c.block_size, 400), dtype=torch.long)
    models, seconds = {}, {'float32': [], 'bfloat16': []}
    for dtype in seconds:
        variant = SimpleNamespace(**vars(c) | {'dtype': dtype, 'n_layer': min(2, c.n_layer)})
        variant.attention, _ = choose_attention(c.attention, torch.device('cpu'), getattr(torch, dtype), c.dropout)
        models[dtype] = variant, build_model(variant, 1024)  # about the size of our vocabulary
    for i in range(5):
        for dtype, (variant, model) in models.items():
            start = time.perf_counter()
            with autocast(variant):
                model(x, x).backward()
            seconds[dtype].append(time.perf_counter() - start)
        if i and seconds['bfloat16'][-1] > 4 * seconds['float32'][-1]:  # a CPU without instructions for it
            break
    return min(seconds['float32']) / min(seconds['bfloat16'])


def choose_attention(attention, device, dtype, dropout=0.0):
    """The kernel that the knob means on this device: (name, reason). Exits if 'flash' cannot run."""
    obstacle, capability = None, torch.cuda.get_device_capability(device) if device.type == 'cuda' else (0, 0)
    if capability < (8, 0):
        obstacle = 'flash-attn needs a CUDA device of capability 8.0 or more'
    elif dtype not in (torch.bfloat16, torch.float16):
        obstacle = 'flash-attn needs bfloat16 or float16'
    else:
        try:
            import flash_attn  # noqa: F401
        except Exception as error:  # not installed; or built for another torch, for which there are many errors
            obstacle = f'no flash-attn: {(str(error) or repr(error)).splitlines()[0]}'
    if attention == 'flash' and obstacle:
        sys.exit(f'--attention=flash cannot run here: {obstacle}. --attention=auto takes what can.')
    if attention != 'auto':
        return attention, 'as asked'
    if device.type == 'cpu' and (dropout or dtype == torch.bfloat16):
        return 'chunked', "PyTorch's CPU kernel is slow in bfloat16 and has no dropout"
    if capability >= (9, 0):
        return 'sdpa', "cuDNN's kernel is reported to be the fastest on this GPU"
    return ('sdpa', obstacle) if obstacle else ('flash', 'FlashAttention 2')


def keep_freed_memory():
    """glibc gives large blocks back to the system when they are freed, and the system clears them when they are asked
    for anew, in every step: a sixth of its time (swiglu, 4 x 1024, two cores of an AMD EPYC)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc has no such setting, Windows no libc
        for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD: its largest
            ctypes.CDLL(None).mallopt(option, value)

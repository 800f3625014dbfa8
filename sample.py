"""Print text from a trained model, as it is generated.

    python sample.py --out_dir=out/swiglu --start="def " --num_samples=3 --temperature=0.8 --top_k=50

Takes the moving average of the weights where the run kept one. Needs train (to load and build) and its data.
"""

import os
import sys
from types import SimpleNamespace

import torch

import train
from configurator import configure
from data import read_encoding
from train import build_model, choose_machine, load_checkpoint, stream_text

out_dir = 'out/swiglu'  # the run to sample from
start = ''  # the text to go on from; empty: the start of a document
num_samples = 1  # how many samples
max_new_tokens = 200  # tokens a sample, unless it ends by itself
temperature = 0.8  # below 1: more likely text; 0: always the likeliest token
top_k: int | None = 50  # sample among the k likeliest tokens only; None: among all
seed = 1  # same seed, same samples
device = 'auto'  # as in train.py
dtype = 'auto'  # as in train.py


def check_knobs(c):
    train.check_knobs(c)
    for name, low in (('num_samples', 1), ('max_new_tokens', 1), ('temperature', 0), ('top_k', 1)):
        value = getattr(c, name)
        if value is not None and value < low:
            sys.exit(f'{name} is {value}, expected at least {low}.')


def load_model(out_dir, device='auto', dtype='auto'):
    """A run's model, its weights' average where it kept one: (model, its tiktoken.Encoding, the Machine it is on)."""
    saved = load_checkpoint(out_dir)
    defaults, _ = configure([train.__file__], [])  # for knobs that are younger than the checkpoint
    here = {'attention': 'auto', 'device': device, 'dtype': dtype, 'cuda_graph': False}
    knobs = SimpleNamespace(**{**vars(defaults), **saved['knobs'], **here})
    machine = choose_machine(knobs)
    encoding = read_encoding(saved['vocabulary'])
    model = build_model(knobs, encoding.n_vocab, machine.attention)
    averages = {name.removeprefix('module.'): p for name, p in (saved['ema'] or {}).items() if name != 'n_averaged'}
    model.load_state_dict(averages or saved['model'])
    return model.to(machine.device), encoding, machine


def main():
    c, _ = configure([__file__], sys.argv[1:])
    check_knobs(c)
    model, encoding, machine = load_model(c.out_dir, c.device, c.dtype)
    generator = torch.Generator(machine.device).manual_seed(c.seed)
    with machine.autocast():
        for _ in range(c.num_samples):
            print(c.start, end='', flush=True)
            for text in stream_text(model, encoding, c.start, c.max_new_tokens, temperature=c.temperature,
                                    top_k=c.top_k, generator=generator):  # fmt: skip
                print(text, end='', flush=True)
            print('\n---------------')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # what read the text, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

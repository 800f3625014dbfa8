"""Print text from a trained model.

    python sample.py --out_dir=out/swiglu --start="def" --num_samples=3 --temperature=0.8 --top_k=50

It takes the moving average of the weights where the run kept one. It needs train, to load and build the model.
"""

import sys
from types import SimpleNamespace
from typing import Literal

import torch

import checkpoint
import train
from configurator import configure, run_program
from data import read_encoding
from machine import choose_machine
from model import build_model

out_dir = 'out/best_cpu'  # the run to sample from; this one is README.md's first
start = ''  # the text to go on from; empty: the start of a document
num_samples = 1  # how many samples
max_new_tokens = 200  # tokens per sample, unless it ends by itself
temperature = 0.8  # below 1: more likely text; 0: always the likeliest token
top_k: int | None = 50  # sample among the k likeliest tokens only; None: among all
seed = 1  # same seed, same samples
device = 'auto'  # as in train.py
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # 'auto': the run's own


def load_model(out_dir, device='auto', dtype='auto'):
    """A run's model, with the average of its weights where it kept one: (model, its Encoding, the run's knobs)."""
    saved = checkpoint.load(out_dir)
    defaults, _ = configure([train.__file__], [])  # for knobs that are younger than the checkpoint
    knobs = SimpleNamespace(**vars(defaults) | saved['knobs'] | {'attention': 'auto', 'device': device, 'dtype': dtype})
    choose_machine(knobs, saved)
    encoding = read_encoding(saved['vocabulary'])
    net = build_model(knobs, encoding.n_vocab)
    net.load_state_dict(saved['ema'] or saved['model'])
    return net.to(knobs.device), encoding, knobs


def main():
    c, _ = configure([__file__], sys.argv[1:])
    train.check_knobs(c)
    net, encoding, knobs = load_model(c.out_dir, c.device, c.dtype)
    generator = torch.Generator(knobs.device).manual_seed(c.seed)
    options = dict(c=knobs, temperature=c.temperature, top_k=c.top_k, generator=generator)
    for _ in range(c.num_samples):
        text = train.write_text(net, encoding, c.start, c.max_new_tokens, **options)
        print(f'{c.start}{text}\n---------------')


if __name__ == '__main__':
    run_program(main)

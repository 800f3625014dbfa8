"""Print text that a trained model writes.

    python sample.py --start="def" --num_samples=3 --temperature=0.8 --top_k=50
    python sample.py --out_dir=out/swiglu --start=FILE:prompt.txt

Where the run kept a moving average of the weights, the averaged model writes.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

import checkpoint
from bpe import read_encoding, unused_ids
from configurator import configure
from machine import autocast, choose_machine, run_program
from model import build_model

out_dir = 'out/best_cpu'  # the run to sample from; the default is the first run of README.md
start = ''  # the text to continue, or FILE:NAME, a file that holds it; empty: the start of a document
num_samples = 1  # how many samples
max_new_tokens = 200  # tokens per sample, unless it ends before
temperature = 0.8  # below 1: more likely text; 0: always the most likely token
top_k: int | None = 50  # sample among the k most likely tokens only; None: among all
seed = 1  # same seed, same samples
device = 'auto'  # as in train.py
dtype: Literal['auto', 'float32', 'bfloat16', 'float16'] = 'auto'  # 'auto': that of the run


def load_model(out_dir, device='auto', dtype='auto'):
    """A run's model, with the average of its weights where it kept one: (model, its Encoding, the run's knobs)."""
    saved = checkpoint.load(out_dir)
    here = {'attention': 'auto', 'device': device, 'dtype': dtype, 'threads': None}
    knobs = SimpleNamespace(**saved['knobs'] | here)
    choose_machine(knobs, saved)
    encoding = read_encoding(saved['vocabulary'])
    net = build_model(knobs, encoding.n_vocab)
    net.load_state_dict(saved['ema'] or saved['model'])
    return net.to(knobs.device), encoding, knobs


def write_text(net, encoding, prompt, max_new_tokens, config, **options):
    """A model's continuation of a prompt, up to <|endoftext|>. config: the model's knobs; options: model.generate's."""
    net.eval()
    ids = [encoding.eot_token, *encoding.encode_ordinary(prompt)]  # the prompt is the start of a document
    with autocast(config):
        prompt_ids = torch.tensor([ids], device=config.device)
        tokens = net.generate(prompt_ids, max_new_tokens, unused_ids=unused_ids(encoding), **options)
        ids = itertools.takewhile(lambda i: i != encoding.eot_token, map(torch.Tensor.item, tokens))
        return encoding.decode(list(ids))


def main():
    config, _ = configure([__file__])
    net, encoding, knobs = load_model(config.out_dir, config.device, config.dtype)
    generator = torch.Generator(knobs.device).manual_seed(config.seed)
    options = dict(temperature=config.temperature, top_k=config.top_k, generator=generator)
    start = config.start
    if start.startswith('FILE:'):
        start = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8', errors='replace')
    for _ in range(config.num_samples):
        text = write_text(net, encoding, start, config.max_new_tokens, knobs, **options)
        print(f'{start}{text}\n---------------')


if __name__ == '__main__':
    run_program(main)

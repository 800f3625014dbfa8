"""What a loss means: the validation loss of models without a network, on the same tokens, and of a compressor.

    python -m results.baselines stdlib      prints a table and keeps it in out/baselines_stdlib.json

A unigram model gives each token its share of the training text. A bigram model gives each token its share among those
that followed the token before it, mixed with the unigram model where the pair is rare (Witten and Bell, 1991).
"""

import lzma
import math
import sys

import numpy as np

from data import open_corpus
from machine import run_program
from results.report import plain_table
from results.runs import provenance, results_file, write


def unigram_and_bigram(train, val, vocab_size):
    """The losses in nats per token of a unigram and a bigram model of the training tokens on the validation tokens,
    both int arrays. Each token of the vocabulary counts once more than it occurs, so none has probability 0."""
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1] * vocab_size + train[1:], minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    total, kinds = pairs.sum(1, keepdims=True), (pairs > 0).sum(1, keepdims=True)
    bigram = (pairs + kinds * unigram) / np.maximum(total + kinds, 1)
    bigram[total[:, 0] == 0] = unigram  # a token that no other token follows in the training text
    return -np.log(unigram[val[1:]]).mean(), -np.log(bigram[val[:-1], val[1:]]).mean()


def main():
    name, *flags = sys.argv[1:] or ['stdlib']
    corpus = open_corpus(name)
    train, val = (split.numpy().astype(np.int64) for split in (corpus.train, corpus.val))
    vocab_size = corpus.encoding.n_vocab
    unigram, bigram = unigram_and_bigram(train, val, vocab_size)
    text = corpus.encoding.decode_bytes([token for token in val.tolist() if token != corpus.encoding.eot_token])
    bits = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    nats = len(text) / len(val) * math.log(2)  # per token, for one bit per byte
    models = {'all tokens equally likely': math.log(vocab_size), 'unigram': unigram, 'bigram': bigram}
    models['xz -9e of the validation text alone'] = bits * nats
    rows = [{'model': model, 'nats per token': float(loss), 'bits per byte': float(loss / nats)}
            for model, loss in models.items()]  # fmt: skip
    results = {'command': f'python -m results.baselines {name}', 'tokens': [len(train), len(val)], 'rows': rows}
    print(plain_table(results))
    write(results_file(f'baselines_{corpus.folder.name}', '--publish' in flags), results | provenance())


if __name__ == '__main__':
    run_program(main)

"""The data of a training run: a prepared corpus, its training batches, its validation batches.

    python data.py                    prepare the default corpus: the text of Python's own standard library
    python data.py SOURCE             another: a file, a folder, a tar or zip archive, an http(s) URL of one of
                                      these, or a name: stdlib, shakespeare, enwik8
    python data.py SOURCE --encoding=gpt2         with one of tiktoken's vocabularies in place of our own
    python data.py SOURCE --errors=replace        although some of it is not UTF-8

A prepared corpus is a folder data/NAME of train.bin and val.bin (token ids, little-endian int32), bpe.tiktoken (our
vocabulary, in tiktoken's rank-file format) and meta.json (what it was prepared from, and the checksums of the others).
"""

import argparse
import math
import shlex
import sys

import numpy as np
import torch

from bpe import MERGES, read_encoding
from sources import ROOT, command_again, corpus_name, find_prepared, has_changed, locked, prepare, read_meta, source_id


class Corpus:
    """A prepared corpus, checked against its meta.json: .train and .val (token ids, int32, mapped into memory),
    .encoding (its tiktoken.Encoding), .vocabulary (what read_encoding makes it from), .meta, .source, .val_bytes, and
    .description, its name in a run's output. Exits with the command that prepares it again if it is damaged."""

    def __init__(self, name):
        self.folder = ROOT / name
        with locked(self.folder, shared=True):
            self.meta = read_meta(self.folder)
            # mapped copy-on-write: torch warns about memory that is read-only
            self.train, self.val = (
                torch.from_numpy(np.memmap(self.folder / f'{split}.bin', '<i4', mode='c')) for split in ('train', 'val')
            )
            ranks, encoding = self.folder / 'bpe.tiktoken', self.meta['encoding']
            self.vocabulary = ranks.read_text(encoding='utf-8') if encoding == 'bpe' else encoding
        self.source = self.meta['source']
        self.val_bytes = self.meta['val']['bytes']
        self.encoding = read_encoding(self.vocabulary)
        version = self.meta.get('python')  # the library differs from version to version, and so do the losses
        self.description = f'{name} of Python {version}' if version else name


class Batches:
    """Training batches, a pure function of (seed, step): a resumed run sees the batches it would have seen.

    The text is cut into sequences of block_size tokens. Each epoch visits them once in a random order of its own, and
    leaves out those that do not fill its last batch."""

    def __init__(self, tokens, batch_size, block_size, seed, device):
        self.n_sequences = (len(tokens) - 1) // block_size
        self.per_epoch = self.n_sequences // batch_size
        if not self.per_epoch:
            sys.exit(f'{len(tokens)} training tokens do not fill a batch of {batch_size} x {block_size}: lower '
                     '--batch_size or --block_size; config/cpu.py after the config has 6 x 128.')  # fmt: skip
        self.sequences = tokens.to(device).unfold(0, block_size + 1, block_size)  # (n_sequences, T + 1), a view
        self.batch_size, self.seed = batch_size, seed
        self.epoch = None  # the epoch to which self.order, the order of the sequences, belongs

    def get_batch(self, step):
        """The inputs and targets of a step, (batch_size, block_size) each. A token's target is the next token."""
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n_sequences)
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.sequences.device)
        chosen = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        tokens = self.sequences[chosen].long()  # (B, T + 1)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def validation_batches(tokens, batch_size, block_size):
    """Yields inputs and targets, (up to batch_size, block_size) each, in which every token but the first is a target
    exactly once, in order. Targets past the end are -1, which the loss ignores."""
    n_targets = len(tokens) - 1
    rows = min(batch_size, math.ceil(n_targets / block_size))
    offsets = torch.arange(rows * block_size, device=tokens.device).view(rows, block_size)  # (B, T)
    for start in range(0, n_targets, rows * block_size):
        places = start + offsets
        targets = tokens[(places + 1).clamp(max=n_targets)].long().where(places < n_targets, -1)
        yield tokens[places.clamp(max=n_targets)].long(), targets


def open_corpus(dataset, allow_stale=False):
    """The Corpus of a prepared corpus's name, a known name or a path.

    It is prepared first if it does not exist, or if a path was given whose files have changed since. If a name was
    given, it is opened all the same, and a line says so. With allow_stale it is opened as it is: a resumed run needs
    the tokens with which it started."""
    if name := find_prepared(dataset):
        corpus = Corpus(name)
        if not allow_stale and has_changed(corpus.meta):
            again = command_again(corpus.meta)
            print(f'{corpus.source} has changed since {corpus.folder} was prepared; again: {again}', file=sys.stderr)
        return corpus
    if allow_stale and (name := find_prepared(corpus_name(dataset))):
        corpus = Corpus(name)
        if corpus.source == source_id(dataset):  # not another file of the same name
            return corpus
    return Corpus(prepare(dataset))


def vocab_size_of(dataset):
    """The vocabulary size of a prepared corpus, or the one that our own BPE will give it."""
    name = find_prepared(dataset)
    return Corpus(name).encoding.n_vocab if name else 256 + MERGES + 1


def main():
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=as_it_is)
    parser.add_argument('source', nargs='*', default=['stdlib'])
    parser.add_argument('--encoding', default='bpe', help='bpe: learn our own; or a name that tiktoken knows')
    parser.add_argument('--errors', default='strict', choices=('strict', 'replace'), help='bytes that are not UTF-8')
    parser.add_argument('--overwrite', action='store_true', help='prepare it again although it exists')
    arguments = parser.parse_intermixed_args()
    if len(arguments.source) > 1:
        sys.exit('data.py prepares one SOURCE: put several files into a folder; put a name with blanks into quotes.')
    [arguments.source] = arguments.source
    name = prepare(**vars(arguments))
    print(f'train on it: python train.py config/best.py config/cpu.py --dataset={shlex.quote(name)}')


if __name__ == '__main__':
    from machine import run_program

    run_program(main)

"""data.py: a prepared corpus is opened whole or not at all; every token is trained and validated on as promised."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from test_bpe import encoding_with_gaps
from test_sources import bytes_of, exits, place, prose, ranks_of, write  # noqa: F401 (a fixture of every test)
from torch.utils._python_dispatch import TorchDispatchMode

import bpe
import data
import sources
import train
from configurator import configure
from sample import write_text

# ---- a corpus ------------------------------------------------------------------------------------------------------


def test_ids_of_a_large_vocabulary_survive(monkeypatch, capfd):
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    tokens = [bytes([i]) for i in range(256)] + pairs
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: bpe.make_encoding(tokens, name))
    text = '€uro ' * 500
    assert sources.prepare(write('text.txt', text), encoding='large') == 'text-large'
    corpus = data.Corpus('text-large')
    ids = np.fromfile('data/text-large/train.bin', '<i4')
    assert ids.max() == len(tokens) and sorted(set(ids))[-2] > 32767
    assert b''.join(([*tokens, b''])[i] for i in ids).decode() == text[: len(text) * 9 // 10]
    x, y = data.Batches(corpus.train, 1, len(ids) - 1, 0, 'cpu').get_batch(0)
    assert x.tolist() == [ids[:-1].tolist()] and y.tolist() == [ids[1:].tolist()]
    assert data.vocab_size_of('text-large') == data.vocab_size_of('data/text-large') == len(tokens) + 1
    sources.prepare('text.txt', encoding='large')
    assert 'to do it again: python data.py text.txt --encoding=large --overwrite' in capfd.readouterr().err


def test_the_standard_library_names_its_python(monkeypatch):
    monkeypatch.setitem(sources.KNOWN, 'stdlib', str(write('lib/code.py', prose()).parent))
    monkeypatch.setattr(sources.platform, 'python_version', lambda: '3.99.0')
    assert data.open_corpus('stdlib').description == 'stdlib of Python 3.99.0'
    change('meta.json', lambda raw: raw.replace(b'"python": "3.99.0",', b''), 'stdlib')
    assert data.open_corpus('stdlib').description == 'stdlib'  # an older corpus has no version
    assert data.open_corpus(str(write('text.txt', prose()))).description == 'text'
    assert 'python' not in data.Corpus('text').meta


def change(file, how, name='text'):
    """Rewrite a file of a corpus. how: bytes -> bytes, or None to delete it."""
    path = Path('data', name, file)
    if how:
        path.write_bytes(how(path.read_bytes()))
    else:
        path.unlink()


DAMAGE = {
    'truncated': ('train.bin', lambda raw: raw[:-2]),
    'flipped': ('val.bin', lambda raw: bytes([raw[0] ^ 1]) + raw[1:]),
    'deleted': ('train.bin', None),
    'no vocabulary': ('bpe.tiktoken', None),
    'another vocabulary': ('bpe.tiktoken', lambda raw: raw.replace(b'A', b'B', 1)),
    'half': ('meta.json', lambda raw: raw[:99]),
    'binary': ('meta.json', lambda raw: b'\xff\xfe\0'),
    'a list': ('meta.json', lambda raw: b'[1]'),
    'val is 5': ('meta.json', lambda raw: raw.replace(b'"val": ', b'"val": 5, "other": ')),
    'bytes is text': ('meta.json', lambda raw: raw.replace(b'"bytes": ', b'"bytes": "many", "other": ')),
    'sha256 is text': ('meta.json', lambda raw: raw.replace(b'"sha256": ', b'"sha256": "abc", "other": ')),
    **{
        f'no {key}': ('meta.json', lambda raw, key=key: raw.replace(f'"{key}"'.encode(), b'"other"'))
        for key in ('source', 'encoding', 'val', 'bytes', 'sha256')
    },
}


@pytest.mark.parametrize('file, how', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_corpus(file, how):
    sources.prepare(write('text.txt', prose(words=600)))
    change(file, how)
    for use in (data.Corpus, lambda name: sources.prepare(f'{name}.txt')):
        with exits('data/text is damaged', file if file != 'meta.json' else '', 'python data.py', '--overwrite'):
            use('text')
    sources.prepare('text.txt', overwrite=True)  # the remedy
    assert bytes_of('text').decode() == prose(words=600)
    assert data.Corpus('text').encoding.n_vocab == len(ranks_of('text')) == data.vocab_size_of('text')


def test_the_remedy_names_what_was_asked_for(monkeypatch):
    monkeypatch.setitem(sources.KNOWN, 'famous', str(write('folder.d/input.txt', prose())))
    assert sources.prepare('famous') == 'famous'
    os.remove('data/famous/train.bin')
    with exits('python data.py famous --overwrite'):
        data.open_corpus('famous')
    sources.prepare(write('odd.txt', b'\xff' * 900), errors='replace')
    os.remove('data/odd/train.bin')
    with exits('odd.txt --errors=replace --overwrite'):
        data.open_corpus('odd')


def test_a_model_never_writes_an_id_that_stands_for_no_text(monkeypatch):
    """Although its logits favour these: greedily, by chance, and among the likeliest."""
    encoding = encoding_with_gaps()
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: encoding)
    corpus = data.Corpus(sources.prepare(write('text.txt', 'abcd ' * 100), encoding='gaps'))
    config, _ = configure([train.__file__], ['--n_layer=1', '--n_head=2', '--n_embd=8', '--device=cpu'])
    config.dtype, config.attention = 'float32', 'naive'
    net = train.build_model(config, corpus.encoding.n_vocab)
    forward, ids = net.forward, bpe.unused_ids(encoding)

    def favouring(*args, **options):
        logits = forward(*args, **options)
        logits[..., ids] += 1000
        logits[..., encoding.eot_token] = -math.inf
        return logits

    monkeypatch.setattr(net, 'forward', favouring)
    for options in (dict(temperature=0), dict(temperature=1.0), dict(top_k=3), dict(top_k=1)):
        assert len(write_text(net, encoding, 'ab', 50, config, **options)) > 10


# ---- batches -------------------------------------------------------------------------------------------------------


def numbers(n):
    """Token i is i."""
    return torch.arange(n, dtype=torch.int32)


def test_an_epoch_visits_every_sequence_once_but_for_those_that_do_not_fill_a_batch():
    batches = data.Batches(numbers(50_007), 6, 5, 0, 'cpu')  # 10,001 sequences: 1,666 batches, 5 sequences left out
    assert batches.per_epoch == 1666
    epochs = []
    for epoch in range(2):
        steps = range(1666 * epoch, 1666 * (epoch + 1))
        x, y = (torch.cat(side) for side in zip(*map(batches.get_batch, steps), strict=True))
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(5))
        firsts = x[:, 0].tolist()
        assert len(set(firsts)) == 9996 and set(firsts) <= set(range(0, 50_005, 5))
        epochs.append(firsts)
    assert [data.Batches(numbers(n), 1, 5, 0, 'cpu').n_sequences for n in (35, 36)] == [6, 7]  # the last needs a target
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])  # another order, and others left out


def test_batches_are_a_pure_function_of_seed_and_step():
    def new(seed):
        return data.Batches(numbers(1000), 8, 7, seed, 'cpu')

    first = new(1)
    for step in [3, 99, 0, 40, 3, 17]:
        x, y = first.get_batch(step)
        assert x.shape == y.shape == (8, 7) and x.dtype == y.dtype == torch.int64
        assert torch.equal(new(1).get_batch(step)[0], x)
        assert not torch.equal(new(2).get_batch(step)[0], x)


class StaysOnTheDevice(TorchDispatchMode):
    """Fails where something is made on the host or brought over: a GPU's host would wait for the copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert made.device.type == 'meta', f'{function} is not on the device'
        return made


def test_a_batch_needs_nothing_from_the_host():
    """By the device 'meta', which has shapes alone. An epoch's order is brought over once."""
    batches = data.Batches(numbers(1000), 8, 7, 0, 'meta')
    batches.get_batch(0)
    with StaysOnTheDevice():
        batches.get_batch(1)
    with pytest.raises(AssertionError, match='is not on the device'), StaysOnTheDevice():
        batches.get_batch(batches.per_epoch)


def test_a_text_shorter_than_a_batch():
    with exits('5 training tokens do not fill a batch', '--block_size', 'config/cpu.py'):
        data.Batches(numbers(5), 1, 64, 0, 'cpu')


@pytest.mark.parametrize('n', [2, 7, 8, 9, 57, 100, 40_000])
def test_validation_predicts_every_token_once_in_order(n):
    pairs = []
    for x, y in data.validation_batches(numbers(n), 4, 7):
        assert x.shape == y.shape and x.shape[1] == 7 and len(x) <= 4
        pairs += zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    assert [pair for pair in pairs if pair[1] != -1] == [(i, i + 1) for i in range(n - 1)]

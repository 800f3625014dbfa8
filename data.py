"""Text in, tokens out: learn a byte-level BPE from a corpus, write the corpus as token files, read batches of it.

    python data.py                    prepare the default corpus: the text of Python's own standard library
    python data.py SOURCE             another: a file, a folder, a tar or zip archive, an http(s) URL of one of
                                      these, or a name: stdlib, shakespeare, enwik8
    python data.py SOURCE --encoding=gpt2         with one of tiktoken's vocabularies in place of our own
    python data.py SOURCE --errors=replace        although some of it is not UTF-8

A prepared corpus is a folder data/NAME of train.bin and val.bin (token ids, little-endian int32), bpe.tiktoken (our
vocabulary, in tiktoken's rank-file format) and meta.json, which is written last.
"""

import argparse
import base64
import collections
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import regex  # comes with tiktoken, which splits with the same syntax
import tiktoken
import torch
from tqdm import tqdm

ROOT = Path('data')
KNOWN = {
    'stdlib': sysconfig.get_paths()['stdlib'],
    'shakespeare': 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'enwik8': 'http://mattmahoney.net/dc/enwik8.zip',
}
# tests, installed packages, and the file that describes the machine
STDLIB_LEFT_OUT = re.compile(r'(^|/)((test|tests|idle_test|site-packages|dist-packages)/|_sysconfigdata)')
FILES = ('train.bin', 'val.bin', 'bpe.tiktoken', 'meta.json')
END = '<|endoftext|>'  # closes every document; a text that contains these characters still gets ordinary tokens
# GPT-2's split: a BPE token never crosses from a word, a number, a run of signs or of spaces into the next.
# The possessive ++ takes no step back, and PIECE bounds the one \s+ that does, so a million spaces in a row neither
# hang it nor overflow its stack.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
MERGES = 768  # 256 bytes + 768 merges = the log's 1024 tokens; END is the 1025th
SAMPLE = 32_000_000  # characters to learn the BPE from at most; a larger corpus gives an evenly spread sample
PIECE = 1 << 18  # characters of text that are split and encoded at a time
LONGEST = 256  # characters of a word that are counted together; a line of a million letters would take minutes
HELD_OUT = 13  # of the 256 values of a hash's first byte: about 5 % of the documents are kept for validation
BAR = dict(unit='B', unit_scale=True, disable=None)  # a bar of progress, on terminals only


# ---- byte-pair encoding --------------------------------------------------------------------------------------------


def merge(ids, pair, new):
    """A word's token ids with a new token in place of each occurrence of a pair, from left to right."""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new
        else:
            merged.append(i)
    return merged


def learn_bpe(words, merges=MERGES):
    """Byte-pair encoding (Sennrich et al., 2016; over bytes as in GPT-2): start from the 256 bytes, then again and
    again make the commonest pair of neighbouring tokens a token of its own.

    words: {word: how often}; pairs are counted inside words only. Returns the tokens as a list of bytes, the id of
    each its place. Ties go to the pair with the lower first id, then the lower second: the older tokens.
    """
    tokens = [bytes([i]) for i in range(256)]
    spelling = [list(word.encode()) for word in words]  # each word as token ids
    count = list(words.values())
    pairs, users = collections.Counter(), collections.defaultdict(set)  # users: the words that hold a pair
    for w, spelled in enumerate(spelling):
        for pair in itertools.pairwise(spelled):
            pairs[pair] += count[w]
            users[pair].add(w)
    for new in tqdm(range(256, 256 + merges), desc='learn the BPE', disable=None):
        most = max(pairs.values(), default=0)
        if not most:
            break
        pair = min(pair for pair, n in pairs.items() if n == most)
        # never the bytes of an older token: the same bytes merge in the same order wherever they stand
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for w in users.pop(pair):
            for old in itertools.pairwise(spelling[w]):
                pairs[old] -= count[w]
            spelling[w] = merge(spelling[w], pair, new)
            for now in itertools.pairwise(spelling[w]):
                pairs[now] += count[w]
                users[now].add(w)
    return tokens


def encoding_of(tokens, name='bpe'):
    """The tokens of learn_bpe, with END after them, as a tiktoken.Encoding: it encodes by the same merges in the same
    order, and decodes."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={END: len(tokens)})


def read_encoding(vocabulary):
    """The tiktoken.Encoding of a vocabulary: the text of a rank file, or the name of one of tiktoken's."""
    if '\n' in vocabulary:
        return encoding_of([base64.b64decode(line.split()[0]) for line in vocabulary.splitlines()])
    try:
        return tiktoken.get_encoding(vocabulary)
    except (ValueError, OSError) as error:  # OSError: it downloads the vocabulary on first use
        sys.exit(f'tiktoken cannot give the encoding {vocabulary!r}: {" ".join((str(error) or repr(error)).split())}')


# ---- a corpus and its batches --------------------------------------------------------------------------------------


class Corpus:
    """A prepared corpus, checked against its meta.json: .train and .val (token ids, int32, mapped into memory),
    .vocabulary and .encoding (its tiktoken.Encoding), .meta."""

    def __init__(self, name):
        self.folder, self.meta = ROOT / name, {}
        try:
            self.meta = dict(json.loads((self.folder / 'meta.json').read_text(encoding='utf-8')))
            for file, written in self.meta['sha256'].items():
                if checksum(self.folder / file) != written:
                    raise ValueError(f'{file} is not what was written (SHA-256)')
            sides = [np.memmap(self.folder / f'{side}.bin', '<i4', mode='c') for side in ('train', 'val')]
            self.train, self.val = map(torch.from_numpy, sides)
            self.source, encoding = self.meta['source'], self.meta['encoding']
            self.val_bytes = int(self.meta['val']['bytes'])
            ranks = self.folder / 'bpe.tiktoken'
            self.vocabulary = ranks.read_text(encoding='utf-8') if encoding == 'bpe' else encoding
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            asked = {'source': 'SOURCE', 'encoding': 'bpe', 'errors': 'strict'} | self.meta
            remedy = command_again(asked['source'], asked['encoding'], asked['errors'])
            sys.exit(f'{self.folder} is damaged: {error}. Prepare it again: {remedy}')
        self.encoding = read_encoding(self.vocabulary)


def checksum(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def command_again(source, encoding, errors):
    """The command that prepares a corpus anew."""
    options = f' --encoding={encoding}' * (encoding != 'bpe') + f' --errors={errors}' * (errors != 'strict')
    return f'python data.py {shlex.quote(source)}{options} --overwrite'


def is_url(place):
    return place.startswith(('http://', 'https://'))


def origin_of(source):
    """What tells a SOURCE (see the top of this file) from another: a known name, a URL, or a path from the root."""
    return source if source in KNOWN or is_url(source) else os.path.realpath(os.path.expanduser(source))


def name_of(source, encoding='bpe'):
    """The name of the corpus that a SOURCE becomes, in data/NAME."""
    name = source if source in KNOWN else PurePath(os.path.expanduser(source)).name.split('.')[0] or 'corpus'
    return name if encoding == 'bpe' else f'{name}-{encoding}'


def prepared(dataset):
    """NAME, where NAME or data/NAME was asked for, and such a corpus is there; else None."""
    name = Path(dataset).name
    ours = dataset == name or Path(dataset).resolve().parent == ROOT.resolve()
    return name if ours and (ROOT / name / 'meta.json').exists() else None


def open_corpus(dataset, as_it_is=False):
    """The Corpus of a prepared name, a known name or a path. It is prepared first where it is not there, or where the
    files of a path (that is no prepared name as well) have changed; unless as_it_is, since a run that goes on needs the
    tokens with which it began."""
    if name := prepared(dataset):
        return Corpus(name)
    if as_it_is and (name := prepared(name_of(dataset))):
        corpus = Corpus(name)
        if corpus.source == origin_of(dataset):  # and not another file of the same name
            return corpus
    return Corpus(prepare(dataset))


def vocab_size_of(dataset):
    """The vocabulary's size of a prepared corpus, or what our own BPE will give it."""
    return Corpus(name).encoding.n_vocab if (name := prepared(dataset)) else 256 + MERGES + 1


class Batches:
    """Training batches, a pure function of (seed, step). The text is cut into sequences of block_size tokens; each
    epoch visits them in an order of its own, and leaves out those that do not fill its last batch."""

    def __init__(self, tokens, batch_size, block_size, seed, device):
        self.n_sequences = (len(tokens) - 1) // block_size
        self.per_epoch = self.n_sequences // batch_size
        if not self.per_epoch:
            sys.exit(f'{len(tokens)} training tokens do not fill a batch: lower --batch_size or --block_size.')
        self.sequences = tokens.to(device).unfold(0, block_size + 1, block_size)  # (n, block_size + 1), a view
        self.batch_size, self.seed, self.epoch = batch_size, seed, None

    def at(self, step):
        """Inputs and targets of a step, (batch_size, block_size) each: the targets are the inputs' next tokens."""
        epoch, i = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.n_sequences)
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.sequences.device)
        text = self.sequences[self.order[i * self.batch_size : (i + 1) * self.batch_size]].long()
        return text[:, :-1], text[:, 1:]


def validation_batches(tokens, batch_size, block_size):
    """Yields inputs and targets (batch_size, block_size) that predict every token but the first once, in order.
    Targets past the end are -1, which the loss leaves out."""
    n = len(tokens) - 1  # predictions
    rows = min(batch_size, -(-n // block_size))
    grid = torch.arange(rows * block_size, device=tokens.device).view(rows, block_size)
    for start in range(0, n, rows * block_size):
        at = grid + start
        yield tokens[at.clamp(max=n)].long(), tokens[(at + 1).clamp(max=n)].long().where(at < n, -1)


# ---- where text comes from -----------------------------------------------------------------------------------------


def walk(root):
    """Yields the files below a folder, except those of data/. Links to folders are followed; none is read twice."""
    seen = {os.path.realpath(ROOT)}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=lambda error: sys.exit(str(error))):
        real = os.path.realpath(folder)
        if real in seen:
            print(f'{folder} leads to {real}, which holds corpora or was read already: left out', file=sys.stderr)
            subfolders.clear()
        else:
            yield from (Path(folder, name) for name in names)
        seen.add(real)


def find_files(path):
    """{name: path} of a file, or of the files below a folder in a fixed order; without hidden and empty ones."""
    files = {file.relative_to(path): file for file in walk(path)} if path.is_dir() else {PurePath(path.name): path}
    if path == Path(KNOWN['stdlib']):
        files = {n: file for n, file in files.items() if n.suffix == '.py' and not STDLIB_LEFT_OUT.search(n.as_posix())}
    return {name: files[name] for name in sorted(files)
            if '/.' not in f'/{name.as_posix()}' and files[name].is_file() and files[name].stat().st_size}  # fmt: skip


def fingerprint(files):
    """A short text that changes when a file comes, goes, or changes its size or its time."""
    stats = [(name.as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()


def read(name, file, errors):
    """A file's text. Exits with the offset of a byte that is not UTF-8; errors='replace' reads U+FFFD in its place."""
    try:
        return file.read_bytes().decode('utf-8', errors)
    except UnicodeDecodeError as error:
        sys.exit(f'{name}: byte {error.start} is not UTF-8. Convert the file, unpack it or leave it out; or '
                 'python data.py SOURCE --errors=replace reads U+FFFD there.')  # fmt: skip


def split(documents):
    """The documents for training and those for validation: the folders train/ and val/ where there are both; the last
    tenth of a single document; otherwise those whose name has a low hash, which stay when others come or go."""
    if len(documents) == 1:
        [read_all] = documents.values()
        text = read_all()
        cut = len(text) * 9 // 10
        return [lambda: text[:cut]], [lambda: text[cut:]]
    held_out = {name for name in documents if 'val' in name.parts[:-1]}
    if not held_out or not any('train' in name.parts[:-1] for name in documents):
        hashed = {name: hashlib.blake2b(os.fsencode(name.as_posix())).digest()[0] for name in documents}
        low = {name for name in documents if hashed[name] < HELD_OUT}
        held_out = low if 0 < len(low) < len(documents) else {min(documents, key=hashed.get)}  # no side stays empty
    train = [document for name, document in documents.items() if name not in held_out]
    return train, [document for name, document in documents.items() if name in held_out]


def fetch(place, remote, scratch):
    """The file or folder that a place means: downloaded to scratch if it is remote, unpacked there if it is an archive,
    nothing of it outside."""
    path, folder = scratch / 'download' if remote else Path(place), scratch / 'unpacked'
    if remote:
        with tqdm(desc=f'download {place}', **BAR) as bar:
            urllib.request.urlretrieve(place, path, lambda count, size, total: bar.update(size))
    if path.is_file() and zipfile.is_zipfile(path):
        shutil.unpack_archive(path, folder, 'zip')
        if (folder / '[Content_Types].xml').exists():
            raise ValueError('it is an Office document: save it as text first')
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter='data')
            if archive.fileobj.read().strip(b'\0'):  # gzip and xz compare their checksums at the very end
                raise tarfile.ReadError('the archive goes on after its end: it is damaged')
    else:
        return path
    return folder


# ---- preparing a corpus --------------------------------------------------------------------------------------------


def refuse(source, place, name):
    """Exit if a source is not there, or could not become data/NAME without a loss."""
    folder, remote = ROOT / name, is_url(place)
    existing = set(os.listdir(folder)) if folder.is_dir() else set()
    if not remote and not os.path.exists(place):
        names = ', '.join(sorted(p.parent.name for p in ROOT.glob('*/meta.json'))) or 'none'
        sys.exit(f'{source} is no path and no corpus; prepared: {names}; known: {", ".join(KNOWN)}.')
    if name in KNOWN and source not in KNOWN:
        sys.exit(f'{source} would become {folder}, which is the place of the known corpus {name}: rename it.')
    if not remote and Path(os.path.realpath(place)).is_relative_to(folder.resolve()):
        sys.exit(f'{source} lies in {folder}, which its tokens would replace: move it elsewhere first.')
    if existing and ('meta.json' not in existing or existing - set(FILES)):
        sys.exit(f'{folder} is in the way: it holds files that data.py did not write. Move it, or rename {source}.')


def prepare(source='stdlib', encoding='bpe', errors='strict', overwrite=False):
    """Prepare a corpus from a SOURCE (see the top of this file) unless it is there already, from the same files as they
    are now; returns its name. A folder in its place that holds anything else is never touched."""
    source = str(source)
    place = os.path.expanduser(KNOWN.get(source, source))
    remote, origin, name = is_url(place), origin_of(source), name_of(source, encoding)
    folder = ROOT / name
    refuse(source, place, name)
    files = {} if remote else find_files(Path(place))
    mark = fingerprint(files)
    if (folder / 'meta.json').exists() and not overwrite:
        corpus, again = Corpus(name), command_again(source, encoding, errors)
        if corpus.source != origin:
            sys.exit(f'{folder} was prepared from {corpus.source}, not from {origin}: rename one, or lose it: {again}')
        if corpus.meta.get('fingerprint') == mark:
            print(f'{folder} is prepared already; to do it again: {again}', file=sys.stderr)
            return name
        print(f'{origin} has changed since {folder} was prepared', file=sys.stderr)
    print(f'preparing {folder} from {place}', file=sys.stderr)
    try:
        ROOT.mkdir(exist_ok=True)
        for old in ROOT.glob(f'.preparing-{name}-*'):
            if time.time() - old.stat().st_mtime > 24 * 3600:  # of a preparation that was killed
                shutil.rmtree(old)
        with tempfile.TemporaryDirectory(prefix=f'.preparing-{name}-', dir=ROOT) as scratch:
            unpacked = fetch(place, remote, Path(scratch))
            files = files if unpacked == Path(place) else find_files(unpacked)
            documents = {name: partial(read, name, file, errors) for name, file in files.items()}
            meta = {'source': origin, 'errors': errors, 'fingerprint': mark}
            write_corpus(folder, Path(scratch), documents, encoding, meta)
    except Exception as error:  # whatever the source, its archive or the disk answers
        sys.exit(f'{origin} could not be prepared: {" ".join((str(error) or repr(error)).split())}')
    return name


def write_corpus(folder, scratch, documents, encoding, meta):
    """Tokenize the documents into scratch, then let all of it take the folder's name: a preparation that is killed
    leaves no corpus."""
    if not documents:
        raise ValueError('it holds no text')
    train, val = split(documents)
    new, vocabulary = scratch / 'corpus', encoding
    new.mkdir()
    if encoding == 'bpe':  # tiktoken's rank-file format: base64 of the token, a space, its id, a line per token
        tokens = learn_bpe(count_words(train))
        vocabulary = ''.join(f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tokens))
        (new / 'bpe.tiktoken').write_text(vocabulary, encoding='utf-8')
    encoder = read_encoding(vocabulary)
    for side, texts in (('train', train), ('val', val)):
        meta[side] = write_tokens(new / f'{side}.bin', texts, encoder)
        print(f'{folder}: {meta[side]["tokens"]:,} tokens in {side}.bin', file=sys.stderr)
    meta |= {'encoding': encoding, 'sha256': {file.name: checksum(file) for file in sorted(new.iterdir())}}
    (new / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
    if folder.exists():
        folder.replace(scratch / 'before')
    new.replace(folder)


def pieces(text):
    return [text[i : i + PIECE] for i in range(0, len(text), PIECE)]


def count_words(documents):
    """{word: count} of the documents' text split by SPLIT; of every second, third, ... piece of more than SAMPLE."""
    words, pattern = collections.Counter(), regex.compile(SPLIT)
    every = max(1, math.ceil(sum(len(document()) for document in documents) / SAMPLE))
    for piece in itertools.islice((piece for document in documents for piece in pieces(document())), 0, None, every):
        words.update(word[at : at + LONGEST] for word in pattern.findall(piece) for at in range(0, len(word), LONGEST))
    return words


def write_tokens(path, documents, encoder):
    """Write the documents' tokens to a file, END after each; returns what it counted."""
    stream = (piece for document in documents for piece in [*pieces(document()), None])  # None closes a document
    size = 0
    with open(path, 'wb') as file, tqdm(desc=f'tokenize {path.stem}', **BAR) as bar:
        while batch := list(itertools.islice(stream, 64)):
            for ids in encoder.encode_ordinary_batch([piece or '' for piece in batch], num_threads=os.cpu_count()):
                file.write(np.array(ids or [encoder.eot_token], dtype='<i4').tobytes())
            batch_size = sum(len(piece.encode()) for piece in batch if piece)
            size += batch_size
            bar.update(batch_size)
    return {'tokens': path.stat().st_size // 4, 'bytes': size, 'documents': len(documents)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', nargs='?', default='stdlib')
    parser.add_argument('--encoding', default='bpe', help='bpe: learn our own; or a name that tiktoken knows')
    parser.add_argument('--errors', default='strict', choices=('strict', 'replace'), help='bytes that are not UTF-8')
    parser.add_argument('--overwrite', action='store_true', help='prepare it again although it is there')
    name = prepare(**vars(parser.parse_args()))
    print(f'train on it: python train.py config/swiglu.py --dataset={shlex.quote(name)}')


if __name__ == '__main__':
    from configurator import run_program

    run_program(main)

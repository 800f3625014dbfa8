"""Where text comes from: a file, folder, archive or URL becomes a corpus, a folder data/NAME of token files.

`prepare` finds a source's documents, splits them into training and validation, learns a vocabulary from those for
training, and writes both as tokens. Nothing here is needed to understand training. It needs bpe.
"""

import collections
import hashlib
import itertools
import json
import math
import os
import platform
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
from tqdm import tqdm

from bpe import SPLIT, learn_bpe, read_encoding, to_rank_file

ROOT = Path('data')
KNOWN = {
    'stdlib': sysconfig.get_paths()['stdlib'],
    'shakespeare': 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'enwik8': 'http://mattmahoney.net/dc/enwik8.zip',
}
# tests, installed packages, and the file that describes the machine
STDLIB_LEFT_OUT = re.compile(r'(^|/)((test|tests|idle_test|site-packages|dist-packages)/|_sysconfigdata)')
CORPUS_FILES = ('train.bin', 'val.bin', 'bpe.tiktoken', 'meta.json')
VAL_HASH_LIMIT = 13  # of the 256 values of a hash's first byte: about 5 % of the documents are for validation
CHARS_PER_PIECE = 1 << 18  # text is split into words and encoded in pieces of this size
MAX_WORD_CHARS = 256  # a longer word is counted in parts: learning from a line of a million letters would take minutes
SAMPLE_CHARS = 32_000_000  # the BPE is learned from about as much text at most, evenly spread over the corpus
PROGRESS_BAR = dict(unit='B', unit_scale=True, disable=None)  # disable=None: on terminals only


def is_url(place):
    return place.startswith(('http://', 'https://'))


def source_id(source):
    """The identity of a SOURCE (see data.py): a known name, a URL, or an absolute path with its links resolved."""
    return source if source in KNOWN or is_url(source) else os.path.realpath(os.path.expanduser(source))


def corpus_name(source, encoding='bpe'):
    """The NAME of data/NAME, the corpus that a SOURCE becomes."""
    name = source if source in KNOWN else PurePath(os.path.expanduser(source)).name.split('.')[0] or 'corpus'
    return name if encoding == 'bpe' else f'{name}-{encoding}'


def find_prepared(dataset):
    """NAME if `dataset` is NAME or a path of data/NAME and that corpus exists; otherwise None."""
    name = Path(dataset).name
    in_root = dataset == name or Path(dataset).resolve().parent == ROOT.resolve()
    return name if in_root and (ROOT / name / 'meta.json').exists() else None


def command_again(source, encoding, errors):
    """The command that prepares a corpus anew."""
    words = ['python', 'data.py', source, f'--encoding={encoding}', f'--errors={errors}', '--overwrite']
    return shlex.join(word for word in words if word not in ('--encoding=bpe', '--errors=strict'))  # the defaults


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
    visible = sorted(name for name in files if '/.' not in f'/{name.as_posix()}')
    return {name: files[name] for name in visible if files[name].is_file() and files[name].stat().st_size}


def fingerprint(files):
    """A short text that changes when a file is added or removed, or when its size or modification time changes."""
    stats = [(name.as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()


def fetch(place, scratch):
    """The file or folder at a path or URL: a URL is downloaded to scratch, an archive unpacked there, never outside."""
    path, folder = Path(place), scratch / 'unpacked'
    if is_url(place):
        path = scratch / 'download'
        with tqdm(desc=f'download {place}', **PROGRESS_BAR) as bar:
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


def pieces(text):
    return [text[i : i + CHARS_PER_PIECE] for i in range(0, len(text), CHARS_PER_PIECE)]


def read_pieces(name, file, errors):
    """A file's text in pieces. Exits with the offset of a byte that is not UTF-8, which errors='replace' reads as
    U+FFFD."""
    try:
        return pieces(file.read_bytes().decode('utf-8', errors))
    except UnicodeDecodeError as error:
        sys.exit(f'{name}: byte {error.start} is not UTF-8. Convert the file, unpack it or leave it out; or '
                 'python data.py SOURCE --errors=replace reads U+FFFD there.')  # fmt: skip


def split(documents):
    """The documents for training and those for validation, two lists. documents: {name: function that reads pieces}.

    Folders train/ and val/ are the split where both exist. A single document gives its last tenth to validation.
    Otherwise the hash of its name decides for each document, so that it keeps its split when others come or go."""
    if len(documents) == 1:
        [read] = documents.values()
        text = ''.join(read())
        cut = len(text) * 9 // 10
        return [lambda: pieces(text[:cut])], [lambda: pieces(text[cut:])]
    val_names = {name for name in documents if 'val' in name.parts[:-1]}
    if not val_names or not any('train' in name.parts[:-1] for name in documents):
        hashes = {name: hashlib.blake2b(os.fsencode(name.as_posix())).digest()[0] for name in documents}
        val_names = {name for name in documents if hashes[name] < VAL_HASH_LIMIT}
        if not 0 < len(val_names) < len(documents):  # neither split may be empty
            val_names = {min(documents, key=hashes.get)}
    train = [document for name, document in documents.items() if name not in val_names]
    return train, [document for name, document in documents.items() if name in val_names]


def checksum(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_meta(folder):
    """The meta.json of a prepared corpus, once its files agree with it. Exits with the remedy if it is damaged."""
    meta = {}
    try:
        meta = dict(json.loads((folder / 'meta.json').read_text(encoding='utf-8')))
        if missing := {'source', 'encoding', 'val', 'sha256'} - meta.keys():
            raise ValueError(f'meta.json lacks {", ".join(sorted(missing))}')
        meta['val']['bytes'] = int(meta['val']['bytes'])
        for file, sha256 in meta['sha256'].items():
            if checksum(folder / file) != sha256 or not (folder / file).stat().st_size:
                raise ValueError(f'{file} is empty or not what was written (SHA-256)')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        known = {'source': 'SOURCE', 'encoding': 'bpe', 'errors': 'strict'} | meta
        remedy = command_again(known['source'], known['encoding'], known['errors'])
        sys.exit(f'{folder} is damaged: {error}. Prepare it again: {remedy}')
    return meta


def check_source(source, place, name):
    """Exit if a source does not exist, or could not become data/NAME without a loss."""
    folder, remote = ROOT / name, is_url(place)
    existing = set(os.listdir(folder)) if folder.is_dir() else set()
    if not remote and not os.path.exists(place):
        names = ', '.join(sorted(p.parent.name for p in ROOT.glob('*/meta.json'))) or 'none'
        sys.exit(f'{source} is no path and no corpus; prepared: {names}; known: {", ".join(KNOWN)}.')
    if name in KNOWN and source not in KNOWN:
        sys.exit(f'{source} would become {folder}, which is the place of the known corpus {name}: rename it.')
    if not remote and Path(os.path.realpath(place)).is_relative_to(folder.resolve()):
        sys.exit(f'{source} lies in {folder}, which its tokens would replace: move it elsewhere first.')
    if existing and ('meta.json' not in existing or existing - set(CORPUS_FILES)):
        sys.exit(f'{folder} is in the way: it holds files that data.py did not write. Move it, or rename {source}.')


def is_up_to_date(folder, meta, command):
    """Whether a folder's corpus was prepared from the source and files of `meta`; `command` prepares it anew. Exits if
    it was prepared from another source."""
    if not (folder / 'meta.json').exists():
        return False
    old, source = read_meta(folder), meta['source']
    if old['source'] != source:
        sys.exit(f'{folder} was prepared from {old["source"]}, not from {source}: rename one, or lose it: {command}')
    if old.get('fingerprint') == meta['fingerprint']:
        print(f'{folder} is prepared already; to do it again: {command}', file=sys.stderr)
        return True
    print(f'{source} has changed since {folder} was prepared', file=sys.stderr)
    return False


def prepare(source='stdlib', encoding='bpe', errors='strict', overwrite=False):
    """Prepare a corpus from a SOURCE (see data.py) and return its name. One that was prepared from the same files as
    they are now is kept, unless overwrite is set. A folder in its place that holds anything else is never touched."""
    source = str(source)
    place = os.path.expanduser(KNOWN.get(source, source))
    name = corpus_name(source, encoding)
    folder = ROOT / name
    check_source(source, place, name)
    files = {} if is_url(place) else find_files(Path(place))
    meta = {'source': source_id(source), 'errors': errors, 'fingerprint': fingerprint(files)}
    if source == 'stdlib':
        meta['python'] = platform.python_version()
    if not overwrite and is_up_to_date(folder, meta, command_again(source, encoding, errors)):
        return name
    print(f'preparing {folder} from {place}', file=sys.stderr)
    try:
        ROOT.mkdir(exist_ok=True)
        for old in ROOT.glob(f'.preparing-{name}-*'):
            if time.time() - old.stat().st_mtime > 24 * 3600:  # of a preparation that was killed
                shutil.rmtree(old)
        with tempfile.TemporaryDirectory(prefix=f'.preparing-{name}-', dir=ROOT) as scratch:
            path = fetch(place, Path(scratch))
            files = files if path == Path(place) else find_files(path)
            documents = {inner: partial(read_pieces, inner, file, errors) for inner, file in files.items()}
            write_corpus(folder, Path(scratch), documents, encoding, meta)
    except Exception as error:  # whatever the source, its archive or the disk answers
        sys.exit(f'{source_id(source)} could not be prepared: {" ".join((str(error) or repr(error)).split())}')
    return name


def write_corpus(folder, scratch, documents, encoding, meta):
    """Write the corpus into scratch, then move it to its folder: a preparation that is killed leaves no corpus."""
    if not documents:
        raise ValueError('it holds no text')
    train, val = split(documents)
    corpus = scratch / 'corpus'
    corpus.mkdir()
    vocabulary = encoding
    if encoding == 'bpe':
        vocabulary = to_rank_file(learn_bpe(count_words(train)))
        (corpus / 'bpe.tiktoken').write_text(vocabulary, encoding='utf-8')
    encoder = read_encoding(vocabulary)
    for name, texts in (('train', train), ('val', val)):
        meta[name] = write_tokens(corpus / f'{name}.bin', texts, encoder)
        print(f'{folder}: {meta[name]["tokens"]:,} tokens in {name}.bin', file=sys.stderr)
    meta |= {'encoding': encoding, 'sha256': {file.name: checksum(file) for file in sorted(corpus.iterdir())}}
    (corpus / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
    if folder.exists():
        folder.replace(scratch / 'before')
    corpus.replace(folder)


def count_words(documents):
    """{word: count} of the documents' text split by SPLIT; of every second, third, ... piece of a large corpus."""
    words, pattern = collections.Counter(), regex.compile(SPLIT)
    n_chars = sum(len(piece) for read in documents for piece in read())
    every = max(1, math.ceil(n_chars / SAMPLE_CHARS))
    for piece in itertools.islice((piece for read in documents for piece in read()), 0, None, every):
        words.update(
            word[i : i + MAX_WORD_CHARS] for word in pattern.findall(piece) for i in range(0, len(word), MAX_WORD_CHARS)
        )
    return words


def write_tokens(path, documents, encoder):
    """Write the documents' tokens to a file, END_OF_TEXT after each. Returns how many tokens, bytes and documents."""
    stream = (piece for read in documents for piece in [*read(), None])  # None closes a document
    n_bytes = 0
    with open(path, 'wb') as file, tqdm(desc=f'tokenize {path.stem}', **PROGRESS_BAR) as bar:
        while batch := list(itertools.islice(stream, 64)):
            for ids in encoder.encode_ordinary_batch([piece or '' for piece in batch], num_threads=os.cpu_count()):
                file.write(np.array(ids or [encoder.eot_token], dtype='<i4').tobytes())
            batch_bytes = sum(len(piece.encode()) for piece in batch if piece)
            n_bytes += batch_bytes
            bar.update(batch_bytes)
    return {'tokens': path.stat().st_size // 4, 'bytes': n_bytes, 'documents': len(documents)}

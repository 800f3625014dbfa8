"""Where text comes from: a file, folder, archive or URL becomes a corpus, a folder data/NAME of token files.

`prepare` finds a source's documents, splits them into training and validation, learns a vocabulary from those for
training, and writes both as tokens. Nothing here is needed to understand training. It needs bpe and documents.
"""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import socket
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
import zipfile
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import regex  # comes with tiktoken, which splits with the same syntax
from tqdm import tqdm

from bpe import SPLIT, learn_bpe, read_encoding, to_rank_file
from documents import read_pieces, split

ROOT = Path('data')
KNOWN = {
    'stdlib': sysconfig.get_paths()['stdlib'],
    'shakespeare': 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt',
    'enwik8': 'http://mattmahoney.net/dc/enwik8.zip',
}
HIDDEN = re.compile(r'\.')
# tests, installed packages, and the file that describes the machine
STDLIB_LEFT_OUT = re.compile(r'\.|(test|tests|idle_test|site-packages|dist-packages)$|_sysconfigdata')
CORPUS_FILES = ('train.bin', 'val.bin', 'bpe.tiktoken', 'meta.json')
MAX_WORD_CHARS = 256  # a longer word is counted in parts: learning from a line of a million letters would take minutes
TIMEOUT = 60  # seconds without a byte, after which a download ends
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
    in_root = dataset == name or os.path.dirname(os.path.realpath(dataset)) == os.path.realpath(ROOT)
    with locked(ROOT / name, shared=True):
        return name if in_root and (ROOT / name / 'meta.json').exists() else None


def command_again(meta):
    """The command that prepares a corpus anew."""
    words = [meta.get('source', 'SOURCE'), *(f'--{key}={meta[key]}' for key in ('encoding', 'errors') if key in meta)]
    words = [word for word in words if word not in ('--encoding=bpe', '--errors=strict')]  # the defaults
    return shlex.join(['python', 'data.py', *words, '--overwrite'])


def identity(path):
    return path.exists() and (path.stat().st_dev, path.stat().st_ino)


def walk(path, name, left_out, seen):
    """Yields (name, path) of a file, or of each file below a folder in a fixed order, except empty ones. Links are
    followed. seen: the identities of what was read; nothing is read twice."""
    is_new = identity(path) not in seen
    seen.add(identity(path))
    if path.is_dir() and not is_new:
        print(f'{path} leads to {path.resolve()}, which holds corpora or was read already: left out', file=sys.stderr)
    elif path.is_dir():
        for entry in sorted(os.listdir(path)):
            if not left_out.match(entry) and (path / entry).exists():  # not a link to nowhere
                yield from walk(path / entry, name / entry, left_out, seen)
    elif path.is_file() and path.stat().st_size and is_new:
        yield name, path


def find_files(path):
    """{name: path} of a file, or of the files below a folder except hidden ones and those of data/."""
    is_stdlib = path == Path(KNOWN['stdlib'])
    name = '' if path.is_dir() else path.name
    files = walk(path, PurePath(name), STDLIB_LEFT_OUT if is_stdlib else HIDDEN, {identity(ROOT)})
    return {name: file for name, file in files if name.suffix == '.py' or not is_stdlib}


def fingerprint(files):
    """A short text that changes when a file is added or removed, or when its size or modification time changes."""
    stats = [(name.as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for name, file in files.items()]
    return hashlib.blake2b(repr(stats).encode(), digest_size=16).hexdigest()


def fetch(place, scratch):
    """The file or folder at a path or URL: a URL is downloaded to scratch, an archive unpacked there, never outside."""
    path, folder = Path(place), scratch / 'unpacked'
    if is_url(place):
        path = scratch / 'download'
        socket.setdefaulttimeout(TIMEOUT)  # urlretrieve has none of its own: a silent server would hang it
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
    elif path.is_file() and path.open('rb').read(4) == b'PK\3\4':
        raise ValueError('it is a zip archive that lacks its end: fetch it again')
    else:
        return path
    return folder


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
        sys.exit(f'{folder} is damaged: {error}. Prepare it again: {command_again(meta)}')
    return meta


def check_source(source, place, name):
    """Exit if a source does not exist, or could not become data/NAME without a loss."""
    folder, remote = ROOT / name, is_url(place)
    existing = set(os.listdir(folder)) if folder.is_dir() else set()
    if not remote and not os.path.exists(place) and source == name and find_prepared(name):
        sys.exit(f'{folder} is prepared already: --dataset={shlex.quote(name)} trains on it. Only from its source, '
                 f'{read_meta(folder)["source"]}, could it be prepared again.')  # fmt: skip
    if not remote and not os.path.exists(place):
        names = ', '.join(sorted(p.parent.name for p in ROOT.glob('*/meta.json'))) or 'none'
        books = ' results/books.md says how to collect the books.' if name == 'books' else ''
        sys.exit(f'{source} is no path and no known name; prepared: {names}; known: {", ".join(KNOWN)}.{books}')
    if not remote and not os.path.isfile(place) and not os.path.isdir(place):
        sys.exit(f'{source} is a pipe or a device, which cannot be read twice: save its text to a file first.')
    if name in KNOWN and source not in KNOWN:
        sys.exit(f'{source} would become {folder}, which is the place of the known corpus {name}: rename it.')
    if not remote and Path(os.path.realpath(place)).is_relative_to(folder.resolve()):
        sys.exit(f'{source} lies in {folder}, which its tokens would replace: move it elsewhere first.')
    if existing and ('meta.json' not in existing or existing - set(CORPUS_FILES)):
        sys.exit(f'{folder} is in the way: it holds files that data.py did not write. Move it, or rename {source}.')


def has_changed(meta):
    """Whether the files from which a corpus was prepared are still there, but not as they were."""
    place = Path(KNOWN.get(meta['source'], meta['source']))
    with contextlib.suppress(OSError):
        return place.exists() and meta.get('fingerprint') != fingerprint(find_files(place))
    return False


def is_up_to_date(folder, source, command):
    """Whether a folder's corpus was prepared from a source as it is now; `command` prepares it anew. Exits if it was
    prepared from another source."""
    if not (folder / 'meta.json').exists():
        return False
    meta = read_meta(folder)
    if meta['source'] != source_id(source):
        new = source_id(source)
        sys.exit(f'{folder} was prepared from {meta["source"]}, not from {new}: rename one, or lose it: {command}')
    if has_changed(meta):
        print(f'{source} has changed since {folder} was prepared', file=sys.stderr)
        return False
    print(f'{folder} is prepared already; to do it again: {command}', file=sys.stderr)
    return True


@contextlib.contextmanager
def locked(path, shared=False):
    """Waits while another program writes this file or folder, and lets others do so only afterwards. shared: for
    reading."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # Windows, some network file systems, nothing to be read
            import fcntl

            lock = stack.enter_context(open(path.with_name(f'.{path.name}.lock'), 'r' if shared else 'a'))
            how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                fcntl.flock(lock, how | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f'waiting for another program that writes {path}', file=sys.stderr)
                fcntl.flock(lock, how)
        yield


def prepare(source='stdlib', encoding='bpe', errors='strict', overwrite=False):
    """Prepare a corpus from a SOURCE (see data.py) and return its name. One that was prepared from the same files as
    they are now is kept, unless overwrite is set. A folder in its place that holds anything else is never touched."""
    source = str(source)
    place = os.path.expanduser(KNOWN.get(source, source))
    name = corpus_name(source, encoding)
    folder = ROOT / name
    check_source(source, place, name)
    try:
        ROOT.mkdir(exist_ok=True)
        with locked(folder):
            command = command_again({'source': source, 'encoding': encoding, 'errors': errors})
            if not overwrite and is_up_to_date(folder, source, command):
                return name
            print(f'preparing {folder} from {place}', file=sys.stderr)
            prefix = f'.preparing-{name}.'  # a dot, which no name has: not the scratch of NAME-gpt2
            for old in ROOT.glob(f'{glob.escape(prefix)}*'):
                shutil.rmtree(old)  # of a preparation that was killed, since this one is locked
            with tempfile.TemporaryDirectory(prefix=prefix, dir=ROOT) as scratch:
                files = {} if is_url(place) else find_files(Path(place))
                meta = {'source': source_id(source), 'errors': errors, 'fingerprint': fingerprint(files)}
                if source == 'stdlib':
                    meta['python'] = platform.python_version()
                path = fetch(place, Path(scratch))
                files = files if path == Path(place) else find_files(path)
                write_corpus(folder, Path(scratch), files, encoding, meta)
    except Exception as error:  # whatever the source, its archive or the disk answers
        sys.exit(f'{source_id(source)} could not be prepared: {" ".join((str(error) or repr(error)).split())}')
    return name


def write_corpus(folder, scratch, files, encoding, meta):
    """Write the corpus into scratch, then move it to its folder: a preparation that is killed leaves no corpus."""
    if not files:
        raise ValueError('it holds no text')
    documents = {name: partial(read_pieces, name, file, meta['errors']) for name, file in files.items()}
    train, val, why = split(documents, {name: file.stat().st_size for name, file in files.items()})
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
    if not meta['val']['bytes']:
        raise ValueError('it holds no text for validation')
    share = meta['val']['bytes'] / (meta['train']['bytes'] + meta['val']['bytes'])
    much = ', more than half' if share > 0.5 else ''
    few = ', too few for an exact loss' if share < 0.01 or meta['val']['tokens'] < 1000 else ''
    print(f'{folder}: held out for validation: {why}; {share:.1%} of the text{much}{few}', file=sys.stderr)
    meta |= {'encoding': encoding, 'sha256': {file.name: checksum(file) for file in sorted(corpus.iterdir())}}
    (corpus / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n', encoding='utf-8')
    if folder.exists():
        folder.replace(scratch / 'before')
    corpus.replace(folder)


def count_words(documents):
    """{word: count} of the documents' text split by SPLIT; of every second, third, ... piece of a large corpus."""
    words, pattern = collections.Counter(), regex.compile(SPLIT)
    n_chars = sum(len(piece) for read in documents for piece, _ in read())
    pieces = (piece for read in documents for piece, _ in read())
    for piece in itertools.islice(pieces, 0, None, max(1, math.ceil(n_chars / SAMPLE_CHARS))):
        words.update(
            word[i : i + MAX_WORD_CHARS] for word in pattern.findall(piece) for i in range(0, len(word), MAX_WORD_CHARS)
        )
    return words


def write_tokens(path, documents, encoder):
    """Write the documents' tokens to a file, END_OF_TEXT after each. Returns how many tokens, bytes and documents."""
    stream = (piece for read in documents for piece in read())
    n_bytes = n_documents = 0
    with open(path, 'wb') as file, tqdm(desc=f'tokenize {path.stem}', **PROGRESS_BAR) as bar:
        while batch := list(itertools.islice(stream, 16)):
            pieces, ends = zip(*batch, strict=True)
            encoded = encoder.encode_ordinary_batch(pieces, num_threads=os.cpu_count())
            for ids, is_end in zip(encoded, ends, strict=True):
                file.write(np.array(ids + [encoder.eot_token] * is_end, dtype='<i4').tobytes())
            batch_bytes = sum(len(piece.encode()) for piece in pieces)
            n_bytes, n_documents = n_bytes + batch_bytes, n_documents + sum(ends)
            bar.update(batch_bytes)
    return {'tokens': path.stat().st_size // 4, 'bytes': n_bytes, 'documents': n_documents}

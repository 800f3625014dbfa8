"""Text in, tokens out: learn a byte-level BPE from a corpus, write the corpus as token files, read batches of it.

    python data.py                    prepare the default corpus: the text of Python's own standard library
    python data.py SOURCE             another: a file, a folder, a tar or zip archive, an http(s) URL of one of
                                      these, or a name: stdlib, shakespeare, enwik8
    python data.py SOURCE --encoding=gpt2         with one of tiktoken's vocabularies in place of our own
    python data.py SOURCE --errors=replace        although some of it is not UTF-8

A prepared corpus is a folder data/NAME of train.bin and val.bin (token ids, little-endian uint16 or uint32),
bpe.tiktoken (our vocabulary, in tiktoken's rank-file format) and meta.json, which is written last.
"""

import argparse
import base64
import codecs
import collections
import contextlib
import hashlib
import heapq
import http.client
import itertools
import json
import lzma
import os
import shlex
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from functools import lru_cache, partial
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
STDLIB_LEFT_OUT = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'}
END = '<|endoftext|>'  # closes every document; a text that contains these characters still gets ordinary tokens
# GPT-2's split: a BPE token never crosses from a word, a number, a run of signs or of spaces into the next.
# The possessive ++ takes no step back, and PIECE bounds the one \s+ that does, so a million spaces in a row neither
# hang it nor overflow its stack.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
MERGES = 768  # 256 bytes + 768 merges = the log's 1024 tokens; END is the 1025th
SAMPLE = 32_000_000  # bytes to learn the BPE from; a larger corpus gives an evenly spread sample of this size
PIECE = 1 << 18  # bytes of text read at a time
HELD_OUT = 13 / 256  # share of the documents kept for validation, about 5 %
BAR = dict(unit='B', unit_scale=True, disable=None)  # a bar of progress, on terminals only
MAX_EXPANSION = 200  # an archive that unpacks to more than this many times its size is taken for a bomb
READ_ERRORS = (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, RuntimeError,
               ValueError)  # fmt: skip

# ---- where text comes from -----------------------------------------------------------------------------------------


class Document(collections.namedtuple('Document', 'name open end start', defaults=[0])):
    """A text, or the stretch from byte `start` to byte `end` of one; open() gives its bytes as a file."""


@contextlib.contextmanager
def documents(path):
    """The files below a folder or inside an archive, or the one file, as a list of Documents in a fixed order.

    Archives are read where they are: nothing is unpacked, so no member can land outside, and links are not followed.
    """
    if path.is_dir():
        names = sorted(p.relative_to(path) for p in path.rglob('*') if p.is_file() and visible(p.relative_to(path)))
        if path == Path(KNOWN['stdlib']):
            names = [n for n in names if n.suffix == '.py' and not STDLIB_LEFT_OUT & set(n.parts)]
            names = [n for n in names if not n.name.startswith('_sysconfigdata')]  # it names the machine
        yield [Document(n.as_posix(), partial(open, path / n, 'rb'), (path / n).stat().st_size) for n in names]
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            refuse_bomb(path, (m.file_size for m in archive.infolist()))
            files = [m for m in archive.infolist() if not m.is_dir() and visible(m.filename)]
            yield [Document(m.filename, partial(archive.open, m), m.file_size) for m in files]
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            refuse_bomb(path, (m.size for m in archive))
            # tarfile takes a header of zeros for the end, and gzip and xz compare their checksums at the very end
            while rest := archive.fileobj.read(PIECE):
                if rest.strip(b'\0'):
                    raise tarfile.ReadError('the archive goes on after its end: it is damaged')
            files = [m for m in archive if m.isfile() and visible(m.name)]
            yield [Document(m.name, partial(archive.extractfile, m), m.size) for m in files]
    else:
        yield [Document(path.name, partial(open, path, 'rb'), path.stat().st_size)]


def visible(name):
    return not any(part.startswith('.') for part in PurePath(name).parts)


def refuse_bomb(path, sizes):
    """Exits as soon as the sizes of an archive's members add up to more than an honest archive could hold."""
    limit = 100_000_000 + MAX_EXPANSION * path.stat().st_size
    if any(total > limit for total in itertools.accumulate(sizes)):
        sys.exit(f'{path} unpacks to over {limit:,} bytes, {MAX_EXPANSION} times its size: refused as a bomb.')


def split(docs):
    """(training, validation) Documents: folders train/ and val/ as they are; a single file's last 10 %; otherwise
    the documents whose name has a low hash, so that a document stays on its side when others come or go."""
    docs = [d for d in docs if d.end > 0]
    if len(docs) == 1:
        cut = character_boundary(docs[0], docs[0].end * 9 // 10)
        return [docs[0]._replace(end=cut)], [docs[0]._replace(start=cut)]
    side = {d: next((part for part in PurePath(d.name).parts[:-1] if part in ('train', 'val')), None) for d in docs}
    if {'train', 'val'} <= set(side.values()):
        val = {d for d in docs if side[d] == 'val'}
    else:
        low = {d for d in docs if name_hash(d) < HELD_OUT}
        val = low if 0 < len(low) < len(docs) else set(sorted(docs, key=name_hash)[:1])  # neither side stays empty
    return [d for d in docs if d not in val], [d for d in docs if d in val]


def name_hash(document):
    """A number in [0, 1) that depends on the document's name alone; ./a, as tar writes it, is a."""
    name = PurePath(document.name).as_posix()
    return hashlib.blake2b(name.encode(errors='surrogateescape')).digest()[0] / 256


def character_boundary(document, offset):
    """The last offset up to here that does not cut a UTF-8 character: continuation bytes are 10xxxxxx."""
    start = max(0, offset - 3)
    with document.open() as file:
        file.seek(start)
        window = file.read(offset - start + 1)
    return max((start + i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), default=offset)


def read(doc, errors='strict'):
    """Yields a document's text in pieces of about PIECE bytes, none of them empty.

    Bytes that are not UTF-8: exits with file and offset, or with errors='replace' reads them as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder('utf-8')(errors)
    with doc.open() as file:
        file.seek(doc.start)
        for start in range(doc.start, doc.end, PIECE):
            data = file.read(min(PIECE, doc.end - start))
            end = start + len(data)
            if end < min(start + PIECE, doc.end):
                sys.exit(f'{doc.name} ends at byte {end}, not at {doc.end}: it is damaged or still written.')
            try:
                yield decoder.decode(data, final=end == doc.end)
            except UnicodeDecodeError as error:  # its object: data, behind what the last piece cut
                where = end - len(error.object) + error.start
                sys.exit(f'{doc.name}: byte {where} is not UTF-8 text; --errors=replace reads it as U+FFFD.')


def download(url, folder):
    """Fetch a URL into a new folder; returns the path. A transfer that was cut exits."""
    folder.mkdir()
    path = folder / (PurePath(urllib.request.urlparse(url).path).name or 'download')
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(path, 'wb') as file:
            size = int(response.headers.get('Content-Length') or 0)
            with tqdm.wrapattr(file, 'write', size or None, bytes=False, desc=f'download {path.name}', **BAR) as out:
                shutil.copyfileobj(response, out)
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(f'{url} cannot be downloaded: {one_line(error)}. Fetch it by hand, then: python data.py FILE')
    if size and path.stat().st_size != size:
        sys.exit(f'{url} was cut at {path.stat().st_size:,} of {size:,} bytes: run the same command again.')
    return path


# ---- byte-pair encoding --------------------------------------------------------------------------------------------


def learn_bpe(words, merges=MERGES):
    """Byte-pair encoding (Sennrich et al., 2016; over bytes as in GPT-2): start from the 256 bytes, then again and
    again make the commonest pair of neighbouring tokens a token of its own.

    words: {piece of text: how often}, pairs are counted inside pieces only. Returns the tokens as a list of bytes,
    the id of each its place. Ties go to the pair with the lower first id, then the lower second: the older tokens.
    """
    tokens = [bytes([i]) for i in range(256)]
    spelling = [list(word.encode()) for word in words]  # each word as token ids
    count = list(words.values())
    pairs, users = collections.Counter(), collections.defaultdict(set)  # users: the words that hold a pair
    for w, spelled in enumerate(spelling):
        for pair in itertools.pairwise(spelled):
            pairs[pair] += count[w]
            users[pair].add(w)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    while len(tokens) < 256 + merges and heap:
        n, pair = heapq.heappop(heap)
        if pairs[pair] != -n or n == 0:
            continue  # an old entry: the pair was pushed again when its count changed
        # never the bytes of an older token: the same bytes merge in the same order wherever they stand
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for w in users.pop(pair):
            old, new = spelling[w], merge(spelling[w], pair, len(tokens) - 1)
            spelling[w] = new
            for p in itertools.pairwise(old):
                pairs[p] -= count[w]
            for p in itertools.pairwise(new):
                pairs[p] += count[w]
                users[p].add(w)
            changed.update(itertools.pairwise(old), itertools.pairwise(new))
        for p in changed:
            heapq.heappush(heap, (-pairs[p], p))
    return tokens


def merge(ids, pair, new):
    """The list of ids with each occurrence of the pair, from the left, replaced by the new id."""
    merged, i = [], 0
    while i < len(ids):
        together = i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair
        merged.append(new if together else ids[i])
        i += 2 if together else 1
    return merged


def count_words(docs, errors):
    """{piece: count} of the documents' text split by SPLIT; of an evenly spread sample where there are over SAMPLE
    bytes, which is said."""
    total = sum(d.end - d.start for d in docs)
    share = min(1.0, SAMPLE / max(1, total))
    if share < 1:
        note(f'learning the BPE from an evenly spread {share:.0%} of the {total / 1e6:.0f} MB')
    words, pattern = collections.Counter(), regex.compile(SPLIT)
    for i, text in enumerate(text for d in docs for text in read(d, errors)):
        if int((i + 1) * share) > int(i * share):
            words.update(pattern.findall(text))
    return words


def encoding_of(tokens, name='bpe'):
    """The tokens of learn_bpe, with END after them, as a tiktoken.Encoding."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={END: len(tokens)})


def read_encoding(vocabulary):
    """The tiktoken.Encoding of a vocabulary: the text of a rank file, or the name of one of tiktoken's."""
    if '\n' in vocabulary:
        return encoding_of([base64.b64decode(line.split()[0]) for line in vocabulary.splitlines()])
    try:
        return tiktoken.get_encoding(vocabulary)
    except (ValueError, OSError) as error:  # OSError: it downloads the vocabulary on first use
        sys.exit(f'tiktoken cannot give the encoding {vocabulary!r}: {one_line(error)}')


# ---- preparing a corpus --------------------------------------------------------------------------------------------


def note(text):
    print(text, file=sys.stderr)


def one_line(error):
    return ' '.join(str(error).split()) or type(error).__name__


def prepare(source='stdlib', encoding='bpe', errors='strict', overwrite=False):
    """Prepare a corpus from a SOURCE (see the top of this file) unless it is there already; returns its name.

    All is written to a temporary folder that takes its name at the very end: killed half-way, it leaves no corpus.
    """
    source = str(source)
    place = KNOWN.get(source, source)
    remote = place.startswith(('http://', 'https://'))
    name = source if source in KNOWN else PurePath(place).name.split('.')[0] or 'corpus'
    name += '' if encoding == 'bpe' else f'-{encoding}'
    origin = place if remote or source in KNOWN else os.path.realpath(place)
    folder = ROOT / name
    if not remote and Path(origin).is_relative_to(folder.resolve()):
        sys.exit(f'{source} lies in {folder}, which its tokens would replace: move it elsewhere first.')
    if os.path.exists(folder) and not overwrite:
        there = Corpus(name).source
        if there != origin:
            sys.exit(f'{folder} was prepared from {there}, not from {origin}: rename one, or add --overwrite.')
        note(f'{folder} is prepared already; --overwrite prepares it again')
        return name
    if not remote and not os.path.exists(place):
        sys.exit(f'{source} is no file, folder, URL or known name ({", ".join(KNOWN)}).')
    try:
        ROOT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{name}-', dir=ROOT) as scratch:
            path = download(place, Path(scratch, 'download')) if remote else Path(place)
            new = Path(scratch, 'corpus')
            new.mkdir()
            note(f'preparing {folder} from {origin}')
            with documents(path) as docs:
                meta = {'source': origin, **write_corpus(new, docs, encoding, errors)}
            (new / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
            if folder.exists():
                shutil.rmtree(folder)
            new.replace(folder)
    except READ_ERRORS as error:
        sys.exit(f'{origin} could not be prepared: {one_line(error)}')
    note(f'{folder}: {meta["train"]["tokens"]:,} training and {meta["val"]["tokens"]:,} validation tokens')
    return name


def write_corpus(folder, docs, encoding, errors):
    """Tokenize the documents into the folder's train.bin, val.bin and bpe.tiktoken; returns the facts for meta.json."""
    train, val = split(docs)
    if not train or not val:
        sys.exit('the source holds no text.')
    vocabulary = encoding
    if encoding == 'bpe':  # tiktoken's rank-file format: base64 of the token, a space, its id, a line each
        tokens = learn_bpe(count_words(train, errors))
        vocabulary = ''.join(f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tokens))
        (folder / 'bpe.tiktoken').write_text(vocabulary)
    encoder = read_encoding(vocabulary)
    facts = {'encoding': encoding, 'vocab_size': encoder.n_vocab, 'vocabulary_sha256': sha256(vocabulary)}
    with tqdm(total=sum(d.end for d in docs), desc='tokenize', **BAR) as bar:
        for side, texts in (('train', train), ('val', val)):
            facts[side] = write_tokens(folder / f'{side}.bin', texts, encoder, errors, bar)
    return facts


def write_tokens(path, docs, encoder, errors, bar):
    """Stream the documents' tokens, each document closed by END, to a file; returns its counts and checksum."""
    dtype = token_dtype(encoder.n_vocab)
    checksum, size = hashlib.sha256(), 0
    pieces = (text for d in docs for text in itertools.chain(read(d, errors), ['']))  # '' closes a document
    with open(path, 'wb') as file:
        while batch := list(itertools.islice(pieces, 64)):
            for ids in encoder.encode_ordinary_batch(batch, num_threads=os.cpu_count()):
                data = np.array(ids or [encoder.eot_token], dtype=dtype).tobytes()
                file.write(data)
                checksum.update(data)
            batch_size = sum(len(text.encode()) for text in batch)
            size += batch_size
            bar.update(batch_size)
        tokens = file.tell() // dtype.itemsize
    return {'tokens': tokens, 'bytes': size, 'documents': len(docs), 'sha256': checksum.hexdigest()}


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def token_dtype(vocab_size):
    return np.dtype('<u2' if vocab_size <= 1 << 16 else '<u4')


# ---- reading it ----------------------------------------------------------------------------------------------------


class Corpus:
    """A prepared corpus, checked against its meta.json: .train and .val (token ids), .meta, .vocabulary, .encoding."""

    def __init__(self, name):
        self.folder, self.meta = ROOT / name, {}
        try:
            self.meta = dict(json.loads((self.folder / 'meta.json').read_text()))
            self.source, encoding = self.meta['source'], self.meta['encoding']
            self.train, self.val = self.tokens('train'), self.tokens('val')
            self.vocabulary = (self.folder / 'bpe.tiktoken').read_text() if encoding == 'bpe' else encoding
            if self.meta['vocabulary_sha256'] != sha256(self.vocabulary):
                raise ValueError('its vocabulary is not what was written (SHA-256)')
            self.encoding = read_encoding(self.vocabulary)
            if self.encoding.n_vocab != self.meta['vocab_size']:
                raise ValueError(f'its vocabulary has {self.encoding.n_vocab} tokens, not {self.meta["vocab_size"]}')
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            source, encoding = self.meta.get('source', 'SOURCE'), self.meta.get('encoding', 'bpe')
            source = next((name for name, place in KNOWN.items() if place == source), source)
            option = '' if encoding == 'bpe' else f' --encoding={encoding}'
            remedy = f'python data.py {shlex.quote(source)}{option} --overwrite'
            sys.exit(f'{self.folder} is damaged: {error}. Prepare it again: {remedy}')

    def tokens(self, side):
        """One token file, mapped into memory, as the signed tensor of the same width: torch indexes no unsigned.
        Anything but the file that was written is a ValueError."""
        path, facts, vocab_size = self.folder / f'{side}.bin', self.meta[side], self.meta['vocab_size']
        dtype, size = token_dtype(vocab_size), path.stat().st_size
        if size != facts['tokens'] * dtype.itemsize:
            raise ValueError(f'{path.name} has {size} bytes, not {facts["tokens"]} x {dtype.itemsize}')
        ids = np.memmap(path, dtype, mode='c')
        if hashlib.sha256(ids).hexdigest() != facts['sha256']:
            raise ValueError(f'{path.name} is not what was written (SHA-256)')
        if ids.max() >= vocab_size:
            raise ValueError(f'{path.name} holds token {ids.max()}, the vocabulary ends at {vocab_size - 1}')
        return torch.from_numpy(ids.view(f'<i{dtype.itemsize}'))


def open_corpus(dataset):
    """The Corpus of a prepared name, a known name or a path; prepares it first where that is still to be done."""
    if not os.path.exists(ROOT / dataset / 'meta.json'):
        if dataset not in KNOWN and not os.path.exists(dataset) and '://' not in dataset:
            there = sorted(p.parent.name for p in ROOT.glob('*/meta.json'))
            sys.exit(
                f'there is no corpus {dataset!r}; prepared: {", ".join(there) or "none"}; '
                f'known: {", ".join(KNOWN)}; a path is prepared by: python data.py PATH'
            )
        dataset = prepare(dataset)
    return Corpus(dataset)


def vocab_size_of(dataset):
    """The vocabulary's size of a prepared corpus, or what our own BPE will give it."""
    return Corpus(dataset).meta['vocab_size'] if os.path.exists(ROOT / dataset / 'meta.json') else 256 + MERGES + 1


def ids_at(tokens, index):
    """The token ids (int64) at an index tensor, of a tensor that holds them as signed int16 or int32."""
    return tokens[index].long() & ((1 << 8 * tokens.element_size()) - 1)


@lru_cache(maxsize=2)
def epoch_order(n_blocks, seed, epoch):
    """The order in which an epoch visits the blocks: a pure function of (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(n_blocks)


class Batches:
    """Training batches, a pure function of (seed, step): the text is cut into blocks, each epoch visits every block
    once in an order of its own, and the epochs follow each other without a gap, so that every batch is full."""

    def __init__(self, tokens, batch_size, block_size, seed, device):
        n = len(tokens)
        if n <= block_size:
            sys.exit(f'the training text has {n} tokens, fewer than a block: lower --block_size from {block_size}.')
        self.tokens, self.seed = tokens.to(device), seed
        self.batch_size, self.block_size = batch_size, block_size
        self.n_blocks = (n - 1) // block_size
        self.offsets = torch.arange(block_size + 1, device=device)

    def end_of_epoch(self, epoch):
        """The number of steps after which `epoch` epochs are complete."""
        return -(-epoch * self.n_blocks // self.batch_size)

    def epochs_after(self, step):
        """How many epochs, and what fraction of the next, are complete after so many steps."""
        return max(0, step) * self.batch_size / self.n_blocks

    def starts(self, step, part=0, parts=1):
        """Where the blocks of a step begin, (batch_size / parts,), on the CPU: the `part`th of equal parts."""
        rows = self.batch_size // parts
        first = step * self.batch_size + part * rows
        places = (divmod(i, self.n_blocks) for i in range(first, first + rows))
        blocks = [epoch_order(self.n_blocks, self.seed, epoch)[i] for epoch, i in places]
        return torch.tensor(np.array(blocks) * self.block_size)

    def read(self, starts):
        """Inputs and targets of the blocks that begin at `starts`, (their number, block_size) each."""
        text = ids_at(self.tokens, starts[:, None] + self.offsets)
        return text[:, :-1], text[:, 1:]


def validation_batches(tokens, batch_size, block_size):
    """Yields inputs and targets (batch_size, block_size) that predict every token but the first once, in order.
    Targets past the end are -1, which the loss leaves out."""
    n = len(tokens) - 1  # predictions
    rows = min(batch_size, -(-n // block_size))
    grid = torch.arange(rows * block_size, device=tokens.device).view(rows, block_size)
    for start in range(0, n, rows * block_size):
        at = grid + start
        yield ids_at(tokens, at.clamp(max=n)), ids_at(tokens, (at + 1).clamp(max=n)).where(at < n, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', nargs='?', default='stdlib')
    parser.add_argument('--encoding', default='bpe', help='bpe: learn our own; or a name that tiktoken knows')
    parser.add_argument('--errors', default='strict', choices=('strict', 'replace'), help='bytes that are not UTF-8')
    parser.add_argument('--overwrite', action='store_true', help='prepare it again although it is there')
    name = prepare(**vars(parser.parse_args()))
    print(f'train on it: python train.py config/swiglu.py --dataset={shlex.quote(name)}')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

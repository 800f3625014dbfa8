"""The documents of a corpus: their text in pieces, and which of it is held out for validation.

Names decide what is held out (train/ and val/, a.train.txt and a.valid.txt), or else a hash of them, or else it is the
end of the largest document. It needs bpe.
"""

import collections
import hashlib
import os
import re
import sys
from functools import partial

from bpe import END_OF_TEXT

CHARS_PER_PIECE = 1 << 18  # text is split into words and encoded in pieces of this size
END_LINE = re.compile(rf'^{re.escape(END_OF_TEXT)}\r?(?:\n|\Z)', re.MULTILINE)  # as in TinyStories
SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'dev': 'val', 'test': 'test'}
SPLIT_WORD = re.compile(rf'(?<![^\W\d_])({"|".join(SPLITS)})(?![^\W\d_])')  # in a.val.txt and val_1, not in valley
VAL_HASH_LIMIT = 13  # of the 256 values of a hash's first byte: about 5 % of the documents are for validation


def read_pieces(name, file, errors, start=0, stop=sys.maxsize):
    """Yields the text of a file, of its characters from start to stop, in pieces: (piece, whether a document ends
    there). One ends at the end of the file, and at a line that is END_OF_TEXT alone and no part of the text.
    Exits with the offset of a byte that is not UTF-8, which errors='replace' reads as U+FFFD."""
    piece, place = '', 0
    with open(file, encoding='utf-8', errors=errors, newline='\n') as text:
        try:
            while lines := text.read(CHARS_PER_PIECE) + text.readline(CHARS_PER_PIECE):
                for i, part in enumerate(END_LINE.split(lines)):
                    if i and piece:
                        yield piece, True
                        piece = ''
                    piece += part[max(start - place, 0) : max(stop - place, 0)]
                    place += len(part)
                    while len(piece) > CHARS_PER_PIECE:
                        yield piece[:CHARS_PER_PIECE], False
                        piece = piece[CHARS_PER_PIECE:]
        except UnicodeDecodeError as error:
            offset = text.buffer.tell() - len(error.object) + error.start
            sys.exit(f'{name}: byte {offset} is not UTF-8. Convert the file, unpack it or leave it out; or '
                     'python data.py SOURCE --errors=replace reads U+FFFD there.')  # fmt: skip
    if piece or min(place, stop) <= start:  # neither split may be empty
        yield piece, True


def splits_by_name(names):
    """{name: 'train', 'val' or 'test'} where folders are called train/, val/, ..., or else where the names of files
    in a folder differ in such a word, and in digits, alone: a.train.txt, a.valid.txt. Empty where none are."""
    groups = collections.defaultdict(dict)
    for name in names:
        *folders, file = name.as_posix().lower().split('/')
        if found := [SPLITS[folder] for folder in folders if folder in SPLITS]:
            groups['folders'][name] = max(found)  # of several val counts first, then train
        if word := SPLIT_WORD.search(file):
            groups[name.parent, re.sub(r'\d', '', SPLIT_WORD.sub('/', file))][name] = SPLITS[word[0]]
    groups = {key: group for key, group in groups.items() if {'train'} < set(group.values())}
    return groups.get('folders') or {name: side for group in groups.values() for name, side in group.items()}


def split(documents, sizes):
    """The documents for training, those for validation, two lists, and why. documents: {name: function that reads
    pieces}, sizes: {name: bytes}. Documents that are called a test are in neither list.

    Where names do not decide, the lowest hashes of the names do, up to a tenth of the text: so a document keeps its
    split when others come or go. Where that holds out too little, the end of the largest document is held out."""
    named = splits_by_name(documents)
    names = [name for name in documents if named.get(name) != 'test']
    left_out = f', and {len(documents) - len(names)} for tests are left out' if len(names) < len(documents) else ''
    val, why = {name for name in names if named.get(name) == 'val'}, 'by their names'
    if not val:
        total, n_bytes, why = sum(sizes[name] for name in names), 0, 'by a hash of their names'
        hashes = {name: hashlib.blake2b(os.fsencode(name.as_posix())).digest()[0] for name in names}
        for name in sorted(names, key=hashes.get):
            if n_bytes + sizes[name] <= total / 10 and (hashes[name] < VAL_HASH_LIMIT or n_bytes < total / 25):
                n_bytes += sizes[name]
                val.add(name)
        if n_bytes < total / 25:
            largest = max(names, key=sizes.get)
            read, size = documents[largest], sizes[largest]
            cut = sum(len(piece) for piece, _ in read()) * max(10 * size - total, 2 * size) // (10 * size)
            train = [documents[name] if name != largest else partial(read, stop=cut) for name in names]
            return train, [partial(read, start=cut)], f'the end of {largest}{left_out}'
    train = [documents[name] for name in names if name not in val]
    val = [documents[name] for name in names if name in val]
    return train, val, f'{len(val)} of {len(names)} documents, {why}{left_out}'

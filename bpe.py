"""Byte-pair encoding from scratch: how a text becomes the numbers that a language model reads.

A model reads tokens, pieces of text from a fixed list, each by its place in the list, its id. One token per character
makes texts long; one per word makes the list endless. Byte-pair encoding lies between. It starts from the 256 bytes,
which spell any text, and repeats one step: find the pair of neighbouring tokens that occurs most often, and make it a
token of its own. Frequent words become one token, rare words several.

Take a text in which "low" occurs 5 times, "lower" twice, "newest" 6 times and "widest" 3 times. The most frequent pair
is e and s, 9 times; then es and t, 9 times; then l and o, 7 times; then lo and w, 7 times:

    >>> tokens = learn_bpe({'low': 5, 'lower': 2, 'newest': 6, 'widest': 3}, merges=4)
    >>> tokens[256:]
    [b'es', b'est', b'lo', b'low']

A word that was not in the text is spelled by the same merges, in the order in which they were learned:

    >>> [tokens[i] for i in make_encoding(tokens).encode('lowest')]
    [b'low', b'est']

Rewrite merge or learn_bpe yourself; `python -m pytest tests/test_bpe.py -x` judges your version.
"""

import base64
import collections
import itertools
import sys

import tiktoken
from tqdm import tqdm

MERGES = 768  # 256 bytes, 768 merges and END_OF_TEXT: 1,025 tokens, by the notebook's parameter counts
END_OF_TEXT = '<|endoftext|>'  # closes every document; inside a line of text these characters get ordinary tokens
# GPT-2's rule for words: a token stays within a word, a number or a run of punctuation, each with the one space before
# it, or within a run of white space. The possessive ++ does not backtrack, and documents.CHARS_PER_PIECE bounds the one
# \s+ that does: a million spaces in a row would otherwise take minutes or overflow the stack.
SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def merge(ids, pair, new_id):
    """The token ids of a word, with new_id in place of each occurrence of a pair of ids, from left to right."""
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new_id
        else:
            merged.append(i)
    return merged


def learn_bpe(words, merges=MERGES):
    """Learn the tokens of byte-pair encoding (Sennrich et al., 2016; over bytes as in GPT-2).

    words: {word: how often it occurs}. Pairs are counted inside words only. Of pairs that occur equally often the one
    with the lower first id wins, then the one with the lower second id. Returns the tokens as a list of bytes, in the
    order of their ids: the 256 bytes, then a token per merge; fewer where no pair is left to merge.
    """
    tokens = [bytes([i]) for i in range(256)]
    spellings = [list(word.encode()) for word in words]  # each word as token ids
    counts = list(words.values())
    pair_counts, words_with_pair = collections.Counter(), collections.defaultdict(set)
    for w, spelling in enumerate(spellings):
        for pair in itertools.pairwise(spelling):
            pair_counts[pair] += counts[w]
            words_with_pair[pair].add(w)
    for new_id in tqdm(range(256, 256 + merges), desc='learn the BPE', disable=None):
        highest = max(pair_counts.values(), default=0)
        if highest == 0:
            break
        pair = min(pair for pair, count in pair_counts.items() if count == highest)
        # No older token has the same bytes: within a token, equal bytes were merged in the same order everywhere.
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for w in words_with_pair.pop(pair):  # only these words change: recounting all would take minutes
            for old in itertools.pairwise(spellings[w]):
                pair_counts[old] -= counts[w]
            spellings[w] = merge(spellings[w], pair, new_id)
            for new in itertools.pairwise(spellings[w]):
                pair_counts[new] += counts[w]
                words_with_pair[new].add(w)
    return tokens


def make_encoding(tokens, name='bpe'):
    """The tiktoken.Encoding of learned tokens, with END_OF_TEXT as the last id: it encodes text and decodes ids."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(tokens)})


def unused_ids(encoding):
    """The ids below n_vocab that stand for no text, a list: cl100k_base has 16. A model must not sample them."""
    tokens = [*encoding.token_byte_values(), *encoding.special_tokens_set]
    return sorted(set(range(encoding.n_vocab)).difference(map(encoding.encode_single_token, tokens)))


def to_rank_file(tokens):
    """The text of a vocabulary in tiktoken's format: a line per token, its bytes in base64, a space, its id."""
    return ''.join(f'{base64.b64encode(token).decode()} {i}\n' for i, token in enumerate(tokens))


def read_encoding(vocabulary):
    """The tiktoken.Encoding of a vocabulary: the text of a rank file, or the name of one of tiktoken's encodings."""
    if '\n' in vocabulary:
        return make_encoding([base64.b64decode(line.split()[0]) for line in vocabulary.splitlines()])
    try:
        return tiktoken.get_encoding(vocabulary)
    except (ValueError, OSError) as error:  # OSError: it downloads the vocabulary on first use
        sys.exit(f'tiktoken cannot give the encoding {vocabulary!r}: {" ".join((str(error) or repr(error)).split())}')

"""bpe.py against a replay that counts every pair anew, and against tiktoken. Judges your own merge and learn_bpe, too:

python -m pytest tests/test_bpe.py -x
"""

import builtins
import collections
import doctest
import itertools
import random

import pytest
import tiktoken
from tiktoken import _educational as educational
from tiktoken_ext.openai_public import r50k_pat_str

import bpe
from test_model import exercise


@pytest.mark.parametrize(
    'ids, pair, expected',
    [
        ([], (1, 2), []),
        ([1], (1, 1), [1]),
        ([3, 1, 2, 4, 1, 2], (1, 2), [3, 256, 4, 256]),
        ([2, 1], (1, 2), [2, 1]),  # order matters
        ([1, 1, 2], (1, 2), [1, 256]),
        ([1, 1, 1], (1, 1), [256, 1]),  # from left to right
        ([1, 1, 1, 1], (1, 1), [256, 256]),
        ([300, 7, 300, 7], (300, 7), [256, 256]),
    ],
)
@exercise
def test_merge(ids, pair, expected):
    """merge should put new_id in place of each occurrence of the pair, from left to right."""
    merged = bpe.merge(list(ids), pair, 256)
    assert merged == expected, f'merge({ids}, {pair}, 256) gave {merged}, expected {expected}'


def check_merges(words, merges):
    """Compares the tokens of learn_bpe with a replay in which words are lists of bytes and nothing is remembered."""
    tokens = bpe.learn_bpe(dict(words), merges)
    spellings = {word: [bytes([b]) for b in word.encode()] for word in words}
    expected = [bytes([i]) for i in range(256)]
    assert tokens[:256] == expected, 'the first 256 tokens are the bytes, in order'
    for n in range(1, merges + 1):
        counts = collections.Counter()
        for word, spelling in spellings.items():
            for pair in itertools.pairwise(spelling):
                counts[pair] += words[word]
        if not counts:
            assert len(tokens) == len(expected), f'no pair is left after merge {n - 1}: {tokens[len(expected) :]}'
            break
        # the most frequent; of several, the lower first id, then the lower second
        first, second = min(counts, key=lambda pair: (-counts[pair], expected.index(pair[0]), expected.index(pair[1])))
        got = tokens[len(expected)] if len(tokens) > len(expected) else 'no token'
        ties = list(counts.values()).count(counts[first, second]) - 1
        rank = f'like {ties} more with higher ids' if ties else 'more often than any other pair'
        reason = f'{first} + {second} occurs {counts[first, second]} times, {rank}'
        assert got == first + second, f'merge {n} of {words}: {reason}; expected {first + second}, got {got}'
        expected.append(first + second)
        for spelling in spellings.values():
            for i in range(len(spelling)):
                if tuple(spelling[i : i + 2]) == (first, second):
                    spelling[i : i + 2] = [first + second]
    assert len(tokens) == len(expected) == len(set(tokens)), 'a token per merge, none twice'


@pytest.mark.parametrize(
    'words, merges',
    [
        ({'low': 5, 'lower': 2, 'newest': 6, 'widest': 3}, 10),
        ({'zy': 3, 'ad': 3, 'ba': 3, 'ac': 3}, 4),  # all occur equally often
        ({'abc': 4, 'xy': 4, 'ab': 1}, 3),  # xy ties with ab + c: x is an older token than ab
        ({'aaaaa': 1}, 9),  # ends when no pair is left
        ({'aab': 3, 'aaa': 2, 'baaab': 2}, 9),
        ({'né': 2, 'é漢': 3, '😀😀': 1}, 20),  # bytes, not characters
        ({'x': 7, '': 1}, 3),
        ({}, 3),
    ],
)
@exercise
def test_learn_bpe_merges_the_most_frequent_pair(words, merges):
    """Each merge should make a token of the pair of neighbouring tokens that occurs most often inside words. Of pairs
    that occur equally often it should take the one with the lower first id, then the one with the lower second id."""
    check_merges(words, merges)


@exercise
def test_learn_bpe_on_random_words():
    """The same for 100 times 9 random words, which often have a tie."""
    rng = random.Random(0)
    for _ in range(100):
        check_merges({''.join(rng.choices('aabcé', k=rng.randint(1, 12))): rng.randint(1, 5) for _ in range(9)}, 25)


@exercise
def test_learn_bpe_is_tiktokens_where_no_pair_ties(monkeypatch):
    """The tokens should be those that tiktoken's own, slow training learns."""

    def one_max(stats, key):
        first, second = sorted(map(key, stats), reverse=True)[:2]
        assert first > second, 'a tie'
        return builtins.max(stats, key=key)

    monkeypatch.setattr(educational, 'max', one_max, raising=False)
    text = ''.join(random.Random(33).choices("aéb n's1", range(9, 1, -1), k=40_000))
    ranks = educational.bpe_train(text, 256 + 30, r50k_pat_str, visualise=None)
    words = collections.Counter(educational.regex.findall(r50k_pat_str, text))
    assert bpe.learn_bpe(words, 30) == sorted(ranks, key=ranks.get)


def test_500_random_texts_come_back():
    rng = random.Random(1)
    words = {''.join(rng.choices('etaoinshéßжд漢€', k=rng.randint(1, 8))): rng.randint(1, 50) for _ in range(200)}
    tokens = bpe.learn_bpe(words, 300)
    encoding = bpe.make_encoding(tokens)
    assert encoding.eot_token == len(tokens) == encoding.n_vocab - 1
    ranges = [(0, 32), (32, 127), (127, 0x250), (0x300, 0x370), (0x400, 0x700), (0x3000, 0xD800), (0xE000, 0x110000)]
    for _ in range(500):
        text = ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 60)))
        text += rng.choice(['', bpe.END_OF_TEXT, '  ', '\r\n', "'ll", *words])
        ids = encoding.encode_ordinary(text)
        assert encoding.eot_token not in ids
        assert encoding.decode_bytes(ids) == text.encode()
        assert bpe.read_encoding(bpe.to_rank_file(tokens)).encode_ordinary(text) == ids


def test_ids_that_stand_for_no_text_are_known():
    tokens = [bytes([i]) for i in range(256)] + [b'ab', b'cd']
    assert bpe.unused_ids(bpe.make_encoding(tokens)) == []
    assert bpe.unused_ids(encoding_with_gaps()) == [256, 259, 261]


def encoding_with_gaps():
    ranks = {bytes([i]): i for i in range(256)} | {b'ab': 257, b'cd': 258}
    special = {bpe.END_OF_TEXT: 260, '<|other|>': 262}
    return tiktoken.Encoding('gaps', pat_str=bpe.SPLIT, mergeable_ranks=ranks, special_tokens=special)


def test_the_example_in_bpe():
    failed, tried = doctest.testmod(bpe)
    assert tried and not failed

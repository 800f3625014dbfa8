"""data.py against tiktoken's educational BPE, plain Python and hashlib. Every test has an empty folder to itself."""

import base64
import builtins
import collections
import contextlib
import hashlib
import http.server
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path, PurePath

import numpy as np
import pytest
import tiktoken
import torch
from tiktoken import _educational as educational
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str
from torch.utils._python_dispatch import TorchDispatchMode

import data

ODD = (
    'a\0b\0\0 c\r\nd\r\re\n\n\n \t\v\f\x85\u2028\u3000f \ufeffg \u0301\u0308\u200d\ufffd\uffff e\u0301 '
    "👩‍👩‍👧‍👦🏳️‍🌈😀 don't WE'LL x''s 12345 ¾ ٣ नमस्ते ไทย 漢字 \x1b[0m\x7f <|endoftext|><|endoftext|> |> \U0010ffff"
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Runs each test in an empty folder, since data.ROOT is relative; gives the folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('no_proxy', '*')
    return tmp_path


@contextlib.contextmanager
def exits(*words):
    """The block ends in one line that names these words."""
    with pytest.raises(SystemExit) as caught:
        yield
    assert isinstance(caught.value.code, str) and '\n' not in caught.value.code
    assert all(word in caught.value.code for word in words), caught.value.code


def prose(seed=0, words=3000):
    """Random text of made-up words in three scripts."""
    rng = random.Random(seed)
    made_up = [''.join(rng.choices('etaoinsh' if i % 3 else 'éßжд漢€', k=rng.randint(1, 8))) for i in range(300)]
    return ''.join(rng.choice(made_up) + rng.choice([' ', ' ', ' ', ', ', '\n']) for _ in range(words))


def write(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def folder_of_texts(n=12):
    """A folder with documents on both sides, an empty one and hidden ones."""
    texts = {f'part{i % 3}/{i}.txt': prose(i, 100) + str(i) for i in range(n)}
    for name, text in texts.items():
        write(f'texts/{name}', text)
    write('texts/part0/empty.txt', '')
    write('texts/.git/config', 'hidden')
    write('texts/part1/._0.txt', b'\xff hidden, not UTF-8')
    return sorted(texts.values())


def ranks_of(name):
    """The corpus' vocabulary, read by hand, END (no bytes) at its end."""
    lines = Path(f'data/{name}/bpe.tiktoken').read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    return [base64.b64decode(line.split()[0], validate=True) for line in lines] + [b'']


def bytes_of(name, sides=('train', 'val')):
    """The bytes of a corpus, decoded by hand."""
    tokens = ranks_of(name)
    ids = np.concatenate([np.fromfile(f'data/{name}/{side}.bin', '<i4') for side in sides])
    return b''.join(tokens[i] for i in ids)


def texts_of(name):
    """The documents of a corpus: what stands between the ENDs."""
    tokens, texts = ranks_of(name), [[]]
    for i in np.concatenate([np.fromfile(f'data/{name}/{side}.bin', '<i4') for side in ('train', 'val')]):
        if i == len(tokens) - 1:
            texts.append([])
        else:
            texts[-1].append(tokens[i])
    assert texts.pop() == []  # the file ends in END
    return [b''.join(text).decode() for text in texts]


# ---- byte-pair encoding --------------------------------------------------------------------------------------------


def test_learn_bpe_is_tiktokens_where_no_pair_ties(monkeypatch):
    def one_max(stats, key):
        first, second = sorted(map(key, stats), reverse=True)[:2]
        assert first > second, 'a tie'
        return builtins.max(stats, key=key)

    monkeypatch.setattr(educational, 'max', one_max, raising=False)
    text = ''.join(random.Random(33).choices("aéb n's1", range(9, 1, -1), k=40_000))
    ranks = educational.bpe_train(text, 256 + 30, r50k_pat_str, visualise=None)
    words = collections.Counter(educational.regex.findall(r50k_pat_str, text))
    assert data.learn_bpe(words, 30) == sorted(ranks, key=ranks.get)


def test_learn_bpe_gives_ties_to_the_older_tokens():
    assert data.learn_bpe({'zy': 3, 'ad': 3, 'ba': 3, 'ac': 3}, 4)[256:] == [b'ac', b'ad', b'ba', b'zy']
    # xy ties with ab + c: x is an older token than ab, although its byte is the greater one
    assert data.learn_bpe({'abc': 4, 'xy': 4, 'ab': 1}, 3)[256:] == [b'ab', b'xy', b'abc']
    assert data.learn_bpe({'ab': 1}, 9)[256:] == [b'ab']  # ends when no pair is left
    assert data.learn_bpe({'aaaa': 1}, 9)[256:] == [b'aa', b'aaaa']


def test_learn_bpe_makes_no_token_twice():
    rng = random.Random(0)
    for _ in range(200):
        words = {''.join(rng.choices('aab', k=rng.randint(1, 15))): rng.randint(1, 9) for _ in range(5)}
        tokens = data.learn_bpe({**words, 'abc': 5, 'bc': 6, 'aabc': 5}, 40)
        assert len(set(tokens)) == len(tokens)


def test_500_random_texts_come_back():
    encoding = data.encoding_of(data.learn_bpe(collections.Counter(prose().split())))
    rng = random.Random(1)
    ranges = [(0, 32), (32, 127), (127, 0x250), (0x300, 0x370), (0x400, 0x700), (0x3000, 0xD800), (0xE000, 0x110000)]
    for _ in range(500):
        text = ''.join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(0, 60)))
        text += rng.choice(['', data.END, '  ', '\r\n', "'ll"])
        ids = encoding.encode_ordinary(text)
        assert encoding.eot_token not in ids
        assert encoding.decode_bytes(ids) == text.encode()


def test_tiktoken_reads_the_vocabulary(place, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(place / 'cache'))
    text = prose() + ODD
    data.prepare(write('text.txt', text))
    ranks = load_tiktoken_bpe('data/text/bpe.tiktoken')
    theirs = tiktoken.Encoding('theirs', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    ours = data.Corpus('text').encoding
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    slow = educational.SimpleBytePairEncoding(pat_str=r50k_pat_str, mergeable_ranks=ranks)
    train = bytes_of('text', ['train']).decode()
    assert slow.encode(train, visualise=None) == list(np.fromfile('data/text/train.bin', '<i4')[:-1])


# ---- preparing -----------------------------------------------------------------------------------------------------


def test_an_odd_text_comes_back():
    for i, text in enumerate(['\ufeff' + ODD * 50, '\0' * 300 + 'a', data.END * 30, '\u0301' * 50, 'x', 'ab', '😀']):
        name = data.prepare(write(f'odd{i}.txt', text))
        assert bytes_of(name).decode() == text
        ends = [np.fromfile(f'data/{name}/{side}.bin', '<i4') == len(ranks_of(name)) - 1 for side in ('train', 'val')]
        assert [end.sum() for end in ends] == [1, 1] and all(end[-1] for end in ends)  # one at the end of each file


@pytest.mark.parametrize(
    'text',
    ['a b ' * 1_000_000, 'a' * 1_000_000, ' ' * 1_000_000 + 'x', '\n' * 1_000_000, 'x\n' + ' \u3000' * 300_000 + 'x'],
    ids=['4 MB line', 'one letter', 'spaces', 'newlines', 'wide spaces'],
)
def test_a_long_monotonous_text_comes_back(text):
    """SPLIT neither hangs nor overflows its stack."""
    data.prepare(write('text.txt', text))
    assert bytes_of('text').decode() == text


def test_documents_come_back():
    texts = folder_of_texts()
    data.prepare('texts')
    assert sorted(texts_of('texts')) == texts


def test_meta_is_right():
    folder_of_texts()
    data.prepare('texts')
    meta = json.loads(Path('data/texts/meta.json').read_text())
    assert meta['source'] == str(Path('texts').resolve()) and meta['encoding'] == 'bpe'
    for side in ('train', 'val'):
        ids = np.fromfile(f'data/texts/{side}.bin', '<i4')
        ends = int((ids == len(ranks_of('texts')) - 1).sum())
        assert meta[side] == {'tokens': len(ids), 'bytes': len(bytes_of('texts', [side])), 'documents': ends}
    assert meta['sha256'] == {
        name: hashlib.sha256(Path('data/texts', name).read_bytes()).hexdigest()
        for name in ('bpe.tiktoken', 'train.bin', 'val.bin')
    }
    assert meta['train']['documents'] + meta['val']['documents'] == 12
    assert {p.name for p in Path('data').rglob('*')} == {'texts', 'train.bin', 'val.bin', 'bpe.tiktoken', 'meta.json'}


def test_a_large_corpus_is_sampled_evenly(monkeypatch):
    text = ' '.join(map(str, range(20_000)))
    monkeypatch.setattr(data, 'PIECE', 200)
    assert sum(data.count_words([lambda: text]).values()) > 20_000  # digits that a piece cuts count twice
    monkeypatch.setattr(data, 'SAMPLE', len(text) // 20)
    words = data.count_words([lambda: text[:50_000], lambda: text[50_000:]])
    places = [int(word) for word in words if word.strip().isdigit()]
    assert 0.04 < len(places) / 20_000 < 0.06
    assert all(0.2 < sum(i // 5000 == quarter for i in places) / len(places) < 0.3 for quarter in range(4))


def test_prepare_twice(monkeypatch):
    data.prepare(write('text.txt', prose()))
    write('elsewhere/text.txt', 'other ' * 99)
    with monkeypatch.context() as m:
        m.setattr(data, 'write_corpus', None)  # nothing is written
        assert data.prepare('text.txt') == 'text'
        with exits(
            'data/text',
            str(Path('text.txt').resolve()),
            str(Path('elsewhere/text.txt').resolve()),
            'python data.py elsewhere/text.txt --overwrite',
        ):
            data.prepare('elsewhere/text.txt')
    assert bytes_of('text').decode() == prose()
    data.prepare('elsewhere/text.txt', overwrite=True)
    assert bytes_of('text') == b'other ' * 99


@pytest.mark.parametrize('yours', ['mine.txt', 'text.txt', 'train.bin', 'meta.json'])
def test_prepare_deletes_no_folder_of_yours(yours):
    """Whatever it holds, and whatever the flags; not even of a corpus to which a file was added."""
    for _ in range(2 if yours.endswith('.txt') else 1):
        mine = write(f'data/text/{yours}', 'mine')
        for source in (write('text.txt', prose()), 'data/text', 'data/text/', 'data/text/../text'):
            if yours != 'meta.json' or Path(source).name != 'text.txt':  # a damaged corpus looks like this
                for overwrite in (False, True):
                    with pytest.raises(SystemExit) as refusal:
                        data.prepare(str(source), overwrite=overwrite)
                    assert len(refusal.value.code.splitlines()) == 1 and mine.read_text() == 'mine'
        shutil.rmtree('data/text')
        data.prepare('text.txt')


def test_a_changed_source_is_prepared_again(capfd, monkeypatch):
    """A file by its size or time, a folder by those of its documents, an archive by its own."""
    source = write('text.txt', 'one ' * 500)
    data.open_corpus('text.txt')
    write('text.txt', 'two ' * 500)
    os.utime(source, (1, 1))
    capfd.readouterr()
    data.open_corpus('text.txt')
    assert 'text.txt has changed since data/text was prepared' in capfd.readouterr().err
    assert bytes_of('text') == b'two ' * 500
    folder_of_texts(4)
    data.prepare('texts')
    write('texts/part0/0.txt', 'new text')
    data.prepare('texts')
    assert 'new text' in texts_of('texts')
    Path('texts/part1/1.txt').unlink()
    data.prepare('texts')
    assert len(texts_of('texts')) == 3
    data.prepare(archive_of('packed.zip', ['part0/0.txt', 'part2/2.txt']))
    data.prepare(archive_of('packed.zip', ['part0/0.txt']))
    assert ''.join(texts_of('packed')) == 'new text'
    monkeypatch.setattr(data, 'write_corpus', None)
    data.open_corpus('texts')  # by its name it is opened as it is, whatever became of its source
    write('texts/part0/0.txt', 'newer text')
    data.open_corpus('texts/', as_it_is=True)
    write('elsewhere/texts/0.txt', prose())
    with exits('was prepared from', 'rename one'):
        data.open_corpus('elsewhere/texts', as_it_is=True)
    with exits('no path'):
        data.open_corpus('nowhere/texts', as_it_is=True)
    shutil.rmtree('texts')
    assert len(data.open_corpus('data/texts').val) and len(data.open_corpus('data/texts/').val)


def test_a_folder_is_no_corpus_because_of_a_file_called_meta_json(place, monkeypatch):
    for name in ('one', 'two'):
        write(f'{name}/meta.json', '{}')
        write(f'{name}/text.txt', prose())
    assert len(data.open_corpus(str(place / 'one')).train) and len(data.open_corpus(str(place / 'data/one')).train)
    monkeypatch.chdir(Path('data'))
    assert len(data.open_corpus('../two').train)


def test_a_source_around_data_gives_its_own_texts_alone(monkeypatch, capfd):
    write('a.txt', prose(1)), write('b.txt', prose(2))
    for _ in range(2):
        data.prepare('.', overwrite=True)
        assert sorted(texts_of('corpus')) == sorted([prose(1), prose(2)])
    assert './data leads to' in capfd.readouterr().err
    with exits('no text'):
        data.prepare('data')


def test_links_to_folders_are_followed_once(capfd):
    for i in range(3):
        write(f'elsewhere/{i}.txt', f'train{i}')
        write(f'texts/val/{i}.txt', f'val{i}')
    Path('texts/train').symlink_to(Path('elsewhere').resolve())
    Path('texts/val/loop').symlink_to(Path('texts').resolve())
    Path('texts/val/dangling').symlink_to('nowhere')
    data.prepare('texts')
    assert bytes_of('texts', ['train']) == b'train0train1train2'
    assert bytes_of('texts', ['val']) == b'val0val1val2'
    assert capfd.readouterr().err.count('texts/val/loop leads to') == 1


def test_a_tilde_is_the_home_folder(place, monkeypatch):
    monkeypatch.setenv('HOME', str(place / 'home'))
    write('home/text.txt', prose())
    assert data.open_corpus('~/text.txt').meta['source'] == str(place.resolve() / 'home/text.txt')
    data.prepare('~/text.txt', overwrite=True)
    assert not Path('~').exists()


def test_what_a_killed_preparation_left_is_cleared():
    names = ('.preparing-text-old', '.preparing-other-old', '.text-mine', '.preparing-text-young')
    old, *others = [write(f'data/{name}/train.bin', 'x') for name in names]
    for file in (old, *others[:2]):
        os.utime(file.parent, (1, 1))
    data.prepare(write('text.txt', prose()))
    assert not old.exists() and all(file.exists() for file in others)  # a young one may be alive


def run_and(*lines):
    """A process that runs these lines, then prepares text.txt."""
    script = '\n'.join(['import data, os, resource, signal, sys', 'from pathlib import Path', *lines, 'data.main()'])
    environ = {**os.environ, 'PYTHONPATH': str(Path(data.__file__).parent)}
    return subprocess.run([sys.executable, '-c', script, 'text.txt'], capture_output=True, text=True, env=environ)


def test_a_killed_preparation_leaves_no_corpus(monkeypatch):
    write('text.txt', 'half ' * 100_000)
    killed = run_and(
        'write_tokens = data.write_tokens',
        'def dying(*args):',
        '    write_tokens(*args)',
        '    os.kill(os.getpid(), signal.SIGKILL)',
        'data.write_tokens = dying',
    )
    assert killed.returncode == -signal.SIGKILL
    assert not Path('data/text').exists()
    with exits('text', 'no corpus'):
        data.open_corpus('text')
    assert data.prepare('text.txt') == 'text'
    assert bytes_of('text') == b'half ' * 100_000


def test_a_corpus_that_is_replaced_is_moved_first(monkeypatch):
    """Killed in between, there is no corpus, and it can be prepared."""
    data.prepare(write('text.txt', prose(1)))
    write('text.txt', prose(2))
    replace, moved = Path.replace, []

    def dying(path, target):
        moved.append(path.name)
        if path.name == 'corpus':
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, 'replace', dying)
        data.prepare('text.txt')
    assert moved == ['text', 'corpus'] and not Path('data/text').exists()
    data.prepare('text.txt')
    assert bytes_of('text').decode() == prose(2)


def test_a_full_disk_is_one_line():
    write('text.txt', prose(words=20_000))
    full = run_and('resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))')
    first, last = full.stderr.splitlines()  # what it is about to do, and the error
    assert full.returncode == 1 and 'preparing' in first
    assert 'text.txt' in last and 'File too large' in last
    assert list(Path('data').iterdir()) == []


# ---- splits --------------------------------------------------------------------------------------------------------


def test_train_and_val_folders_are_the_split():
    for i in range(3):
        write(f'texts/sub/train/{i}.txt', f'train{i}')
        write(f'texts/sub/val/{i}.txt', f'val{i}')
    data.prepare('texts')
    assert bytes_of('texts', ['train']) == b'train0train1train2'
    assert bytes_of('texts', ['val']) == b'val0val1val2'
    assert b'train' in ranks_of('texts') and b'val' not in ranks_of('texts')  # the vocabulary is training's


def test_the_standard_library_is_read_without_its_tests_and_the_machines_traits(place, monkeypatch):
    names = ['a.py', 'a/testing.py', 'a.txt', 'test/b.py', 'c/tests/d.py', 'c/idle_test/e.py', 'site-packages/f.py',
             '_sysconfigdata__linux.py']  # fmt: skip
    for name in names:
        write(f'lib/{name}', name)
    assert len(data.find_files(Path('lib'))) == len(names)
    monkeypatch.setitem(data.KNOWN, 'stdlib', 'lib')
    assert {str(name) for name in data.find_files(Path('lib'))} == {'a.py', 'a/testing.py'}


def test_documents_keep_their_side():
    def val(names):
        documents = {PurePath(name): name for name in names}
        train, held_out = data.split(documents)
        assert sorted(train + held_out) == sorted(names)
        return set(held_out)

    few, more = [f'some/{i}.txt' for i in range(0, 20_000, 2)], [f'some/{i}.txt' for i in range(20_000)]
    assert val(few) == val(more) & set(few) == val(few[::-1])
    assert 0.045 < len(val(more)) / len(more) < 0.055
    assert len(val(['a', 'b'])) == len(val(['b', 'c', 'd'])) == 1  # never without validation
    assert len(val(['51.txt', '115.txt'])) == 1  # nor without training: both have a low hash


@pytest.mark.parametrize('shift', range(4))
def test_a_single_file_gives_its_last_tenth_in_whole_characters(shift):
    text = 'x' * shift + '😀' * 1000
    data.prepare(write('text.txt', text))
    train, val = bytes_of('text', ['train']), bytes_of('text', ['val'])
    assert train.decode() + val.decode() == text
    assert abs(len(val) - len(text.encode()) / 10) <= 4


def archive_of(path, names, root='texts'):
    """A zip or tar archive of files below a folder, in this order."""
    if path.endswith('.zip'):
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(f'{root}/{name}', name)
    else:
        mode = path.split('.')[-1].replace('tar', '')
        with tarfile.open(path, f'w:{mode}', **({'compresslevel': 0} if mode == 'gz' else {})) as archive:
            for name in names:
                archive.add(f'{root}/{name}', name)
    return Path(path)


@pytest.mark.parametrize('kind', ['tar.gz', 'tar.xz', 'tar.bz2', 'zip'])
def test_an_archive_is_the_folder(kind):
    folder_of_texts(40)
    names = sorted(str(p.relative_to('texts')) for p in Path('texts').rglob('*') if p.is_file())
    archive_of(f'packed.{kind}', [f'./{n}' if 'tar' in kind else n for n in names])
    data.prepare('texts')
    data.prepare(f'packed.{kind}')
    assert bytes_of('texts') != b''
    for file in ('train.bin', 'val.bin', 'bpe.tiktoken'):
        assert Path('data/packed', file).read_bytes() == Path('data/texts', file).read_bytes()


# ---- bad sources ---------------------------------------------------------------------------------------------------


def nothing_is_left():
    return not Path('data').exists() or list(Path('data').iterdir()) == []


def test_a_source_without_text():
    write('empty.txt', '')
    write('folder/empty.txt', '')
    for source, word in (('missing.txt', 'missing.txt'), ('empty.txt', 'no text'), ('folder', 'no text')):
        with exits(word):
            data.prepare(source)
    with exits('nameless', 'none', 'stdlib'):
        data.open_corpus('nameless')
    assert nothing_is_left()


BAD = {
    'early': b'plain text\xff' + b'x' * 1000,
    'late': b'x' * 300_000 + b'\xfe' + b'x' * 100_000,
    'after wide characters': 'é€😀'.encode() * 40_000 + b'\x80' + b'x' * 100_000,
    'overlong': b'ab\xc0\x80' + b'x' * 100,
    'surrogate': b'abc\xed\xa0\x80' + b'x' * 100,
    'validation': 'é'.encode() * 5000 + b'\xff' + b'x' * 9,
    'cut at the end': b'x' * 1000 + '€'.encode()[:2],
}


@pytest.mark.parametrize('raw', BAD.values(), ids=BAD)
def test_bytes_that_are_no_text(raw):
    with pytest.raises(UnicodeDecodeError) as caught:
        raw.decode()
    write('bad.txt', raw)
    with exits('bad.txt', f'byte {caught.value.start} ', '--errors=replace'):
        data.prepare('bad.txt')
    assert nothing_is_left()
    data.prepare('bad.txt', errors='replace')
    assert bytes_of('bad').decode() == raw.decode(errors='replace')


def test_a_text_shorter_than_a_block():
    data.prepare(write('text.txt', 'short'))
    with exits('do not fill a batch', '--block_size'):
        data.Batches(data.open_corpus('text').train, 1, 64, 0, 'cpu')


def test_an_encoding_that_cannot_be_had(place, monkeypatch):
    def refuse(path):
        raise OSError('no\nnetwork')

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(place / 'cache'))
    monkeypatch.setattr(tiktoken.load, 'read_file', refuse)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    write('text.txt', prose())
    with exits("'gpt2'", 'no network'):
        data.prepare('text.txt', encoding='gpt2')
    with exits("'gpt9'", 'Unknown encoding'):
        data.prepare('text.txt', encoding='gpt9')
    assert nothing_is_left()


# ---- archives ------------------------------------------------------------------------------------------------------


def hostile_tar(path, outside):
    with tarfile.open(path, 'w:gz') as archive:
        archive.add('good.txt')
        for name in (str(outside / 'absolute.txt'), '../up.txt', 'a/../../up.txt'):
            archive.add('good.txt', name)
        for name, kind in (('soft', tarfile.SYMTYPE), ('hard', tarfile.LNKTYPE), ('dev', tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, str(outside / 'secret.txt'), 9  # a size, which is a lie
            archive.addfile(member)


def hostile_zip(path, outside):
    with zipfile.ZipFile(path, 'w') as archive:
        for name in ('good.txt', str(outside / 'absolute.txt'), '../up.txt', 'a/../../up.txt'):
            archive.writestr(zipfile.ZipInfo(name), prose())
        link = zipfile.ZipInfo('soft')
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(outside / 'secret.txt'))


@pytest.mark.parametrize('pack', [hostile_tar, hostile_zip])
def test_a_hostile_archive_reaches_nothing_outside(pack, place, monkeypatch):
    """shutil leaves out of a zip what would land outside; tarfile refuses an archive with such members, whole."""
    outside = write('outside/secret.txt', 'SECRET' * 99).resolve().parent
    work = write('work/sub/good.txt', prose()).resolve().parent
    monkeypatch.chdir(work)
    pack('hostile.archive', outside)
    before = sorted(place.rglob('*'))
    if pack is hostile_zip:
        data.prepare('hostile.archive')
        assert prose().encode() in bytes_of('hostile') and b'SECRET' not in bytes_of('hostile')
    else:
        with exits('hostile.archive', 'could not be prepared', 'outside'):
            data.prepare('hostile.archive')
        assert nothing_is_left()
    assert before == [p for p in sorted(place.rglob('*')) if not p.is_relative_to(work / 'data')]


@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE], ids=['soft', 'hard', 'device'])
def test_a_member_of_a_tar_that_is_no_text(kind):
    secret = write('outside/secret.txt', 'SECRET' * 99).resolve()
    with tarfile.open('hostile.tar', 'w') as archive:
        archive.add(write('good.txt', prose()))
        member = tarfile.TarInfo('member')
        member.type, member.linkname = kind, str(secret)
        archive.addfile(member)
    with exits('hostile.tar', 'could not be prepared', 'member'):
        data.prepare('hostile.tar')
    assert nothing_is_left()


@pytest.mark.parametrize('kind', ['tar.gz', 'tar.xz', 'zip'])
def test_a_damaged_archive(kind):
    folder_of_texts()
    whole = archive_of(f'bad.{kind}', [f'part{i % 3}/{i}.txt' for i in range(12)]).read_bytes()
    for place in (0.2, 0.5, 0.9):
        flipped = bytearray(whole)  # a tar.gz stores its text here, so that only the checksum at its end can tell
        flipped[int(len(whole) * place)] ^= 1
        for raw in (whole[: int(len(whole) * place)], flipped):
            write(f'bad.{kind}', raw)
            with exits(f'bad.{kind}'):
                data.prepare(f'bad.{kind}')
    assert nothing_is_left()


@pytest.mark.parametrize('kind', ['tar', 'tar.gz', 'zip'])
def test_an_archive_that_holds_nothing(kind):
    folder_of_texts()
    archive_of(f'empty.{kind}', [])
    with exits(f'empty.{kind}', 'no text'):
        data.prepare(f'empty.{kind}')
    assert nothing_is_left()


def test_a_zip_whose_directory_is_not_utf8():
    with zipfile.ZipFile('bad.zip', 'w') as archive:
        archive.writestr('é.txt', prose())
    write('bad.zip', Path('bad.zip').read_bytes().replace('é'.encode(), b'\xc3('))
    with exits('bad.zip', 'utf-8'):
        data.prepare('bad.zip')
    assert nothing_is_left()


def test_a_tar_with_a_header_of_zeros():
    """tarfile takes it for the archive's end, and would leave out what follows."""
    folder_of_texts()
    raw = bytearray(archive_of('bad.tar', ['part0/0.txt', 'part1/1.txt', 'part2/2.txt']).read_bytes())
    header = raw.rindex(b'././@PaxHeader')  # the last member's first block
    raw[header : header + 512] = bytes(512)
    write('bad.tar', raw)
    with exits('bad.tar', 'goes on after its end'):
        data.prepare('bad.tar')
    assert nothing_is_left()


def test_an_encrypted_zip():
    folder_of_texts()
    raw = bytearray(archive_of('locked.zip', ['part0/0.txt']).read_bytes())
    raw[6] |= 1  # the flags in the file's header, and in the directory at the end
    raw[raw.index(b'PK\x01\x02') + 8] |= 1
    write('locked.zip', raw)
    with exits('locked.zip', 'encrypted'):
        data.prepare('locked.zip')
    assert nothing_is_left()


# ---- URLs ----------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = prose().encode()
        if self.path == '/garbage':
            self.wfile.write(b'garbage\r\n\r\n')
            return
        if self.path == '/missing.txt':
            self.send_error(404)
            return
        self.send_response(302 if self.path == '/loop' else 200)
        if self.path == '/loop':
            self.send_header('Location', '/loop')
        elif self.path == '/chunks':
            self.send_header('Transfer-Encoding', 'chunked')
            body = b'ffff\r\n' + body[:1000]
        else:
            self.send_header('Content-Length', str(len(body)))
            body = body[:1000] if self.path == '/cut.txt' else body
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_urls(server):
    for path, name in (('/text.txt?a=1', 'text'), ('/corpus', 'corpus'), ('/download/', 'download')):
        assert data.prepare(server + path) == name
        assert bytes_of(name).decode() == prose()
        assert json.loads(Path(f'data/{name}/meta.json').read_text())['source'] == server + path
        assert [p.name for p in Path('data').iterdir()] == [name]  # the download is gone
        shutil.rmtree(f'data/{name}')


@pytest.mark.parametrize(
    'path, word',
    [
        ('/missing.txt', '404'),
        ('/cut.txt', 'got only 1000 out of'),
        ('/chunks', 'IncompleteRead'),
        ('/garbage', 'garbage'),
        ('/loop', 'infinite loop'),
        ('/with space', 'control characters'),
    ],
)
def test_a_url_that_fails(server, path, word):
    with exits(server + path, word):
        data.prepare(server + path)
    assert nothing_is_left()


def test_a_url_that_nobody_serves():
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
        url = f'http://127.0.0.1:{server.server_port}/text.txt'
    with exits(url, 'refused'):
        data.prepare(url)
    assert nothing_is_left()


# ---- damaged corpora -----------------------------------------------------------------------------------------------


def change(file, how):
    """Rewrite a file of the corpus `text`; how: bytes -> bytes."""
    path = Path('data/text', file)
    path.write_bytes(how(path.read_bytes()))


def meta_with(**values):
    """Damage: meta.json with these values; side__key reaches into a side, None deletes."""

    def rewrite(raw):
        meta = json.loads(raw)
        for name, value in values.items():
            *outer, key = name.split('__')
            facts = meta[outer[0]] if outer else meta
            del facts[key]
            if value is not None:
                facts[key] = value
        return json.dumps(meta).encode()

    return lambda: change('meta.json', rewrite)


def no_tokens():
    """Damage: an empty file, with its checksum right."""
    change('train.bin', lambda raw: b'')
    meta_with(**{'sha256__train.bin': hashlib.sha256(b'').hexdigest()})()


def swap_tokens(raw):
    lines = raw.splitlines(keepends=True)
    lines[260], lines[300] = lines[300], lines[260]
    return b''.join(lines)


DAMAGE = {
    'truncated': (lambda: change('train.bin', lambda raw: raw[:-2]), 'train.bin'),
    'odd size': (lambda: change('val.bin', lambda raw: raw + b'\0'), 'val.bin'),
    'flipped': (lambda: change('train.bin', lambda raw: raw[:99] + bytes([raw[99] ^ 1]) + raw[100:]), 'train.bin'),
    'no tokens': (no_tokens, 'empty'),
    'no train.bin': (lambda: os.remove('data/text/train.bin'), 'train.bin'),
    'empty meta.json': (lambda: change('meta.json', lambda raw: b''), ''),
    'half meta.json': (lambda: change('meta.json', lambda raw: raw[:99]), ''),
    'binary meta.json': (lambda: change('meta.json', lambda raw: b'\xff\xfe\0'), ''),
    'list meta.json': (lambda: change('meta.json', lambda raw: b'[1]'), ''),
    'number meta.json': (lambda: change('meta.json', lambda raw: b'7'), ''),
    'no vocabulary': (lambda: os.remove('data/text/bpe.tiktoken'), 'bpe.tiktoken'),
    'empty vocabulary': (lambda: change('bpe.tiktoken', lambda raw: b''), 'bpe.tiktoken'),
    'short vocabulary': (lambda: change('bpe.tiktoken', lambda raw: raw[:-20]), 'bpe.tiktoken'),
    'flipped vocabulary': (lambda: change('bpe.tiktoken', lambda raw: raw.replace(b'=', b'x', 1)), 'bpe.tiktoken'),
    'swapped vocabulary': (lambda: change('bpe.tiktoken', swap_tokens), 'bpe.tiktoken'),
    **{f'no {key}': (meta_with(**{key: None}), key.split('__')[-1])
       for key in ('source', 'encoding', 'val', 'val__bytes', 'sha256')},
    **{f'{key} is {value!r}': (meta_with(**{key: value}), '')
       for key, value in (('val', 5), ('val', 'abc'), ('val', []), ('val__bytes', 'many'), ('val__bytes', {}),
                          ('sha256', 'abc'), ('sha256__val.bin', 'abc'))},
}  # fmt: skip


@pytest.mark.parametrize('damage, word', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_corpus(damage, word):
    data.prepare(write('text.txt', prose(words=600)))
    damage()
    for use in (data.Corpus, lambda name: data.prepare(f'{name}.txt')):
        with exits('data/text', word, 'python data.py', '--overwrite'):
            use('text')
    data.prepare('text.txt', overwrite=True)  # the remedy
    assert bytes_of('text').decode() == prose(words=600)
    assert data.Corpus('text').encoding.n_vocab == len(ranks_of('text')) == data.vocab_size_of('text')


def test_the_remedy_names_what_was_asked_for(monkeypatch):
    monkeypatch.setitem(data.KNOWN, 'famous', str(write('folder.d/input.txt', prose())))
    assert data.prepare('famous') == 'famous'
    os.remove('data/famous/train.bin')
    with exits('python data.py famous --overwrite'):
        data.open_corpus('famous')
    data.prepare(write('odd.txt', b'\xff' * 900), errors='replace')
    os.remove('data/odd/train.bin')
    with exits('odd.txt --errors=replace --overwrite'):
        data.open_corpus('odd')


def test_a_file_does_not_take_the_place_of_a_known_corpus():
    for _ in range(2):
        with exits('shakespeare.txt would become data/shakespeare', 'rename it'):
            data.open_corpus(str(write('shakespeare.txt', prose())))
    with exits('would become data/enwik8'):
        data.prepare('https://example.org/enwik8.txt')
    with exits('no path'):
        data.open_corpus('data/stdlib')
    assert nothing_is_left()


# ---- reading -------------------------------------------------------------------------------------------------------


def test_ids_of_a_large_vocabulary_survive(monkeypatch, capfd):
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    tokens = [bytes([i]) for i in range(256)] + pairs
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: data.encoding_of(tokens, name))
    text = '€uro ' * 500
    assert data.prepare(write('text.txt', text), encoding='large') == 'text-large'
    corpus = data.Corpus('text-large')
    ids = np.fromfile('data/text-large/train.bin', '<i4')
    assert ids.max() == len(tokens) and sorted(set(ids))[-2] > 32767
    assert b''.join(([*tokens, b''])[i] for i in ids).decode() == text[: len(text) * 9 // 10]
    rows = [inputs for inputs, _ in data.validation_batches(corpus.train, 2, 50)]
    assert torch.cat(rows).flatten().tolist()[: len(ids) - 1] == ids[:-1].tolist()
    x, y = data.Batches(corpus.train, 1, len(ids) - 1, 0, 'cpu').at(0)
    assert x.tolist() == [ids[:-1].tolist()] and y.tolist() == [ids[1:].tolist()]
    assert data.vocab_size_of('text-large') == data.vocab_size_of('data/text-large') == len(tokens) + 1
    data.prepare('text.txt', encoding='large')
    assert 'to do it again: python data.py text.txt --encoding=large --overwrite' in capfd.readouterr().err
    os.remove('data/text-large/val.bin')
    with exits('text.txt --encoding=large --overwrite'):
        data.Corpus('text-large')


def numbers(n):
    """Token i is i."""
    return torch.arange(n, dtype=torch.int32)


def test_an_epoch_visits_every_sequence_once_but_for_those_that_do_not_fill_a_batch():
    batches = data.Batches(numbers(50_007), 6, 5, 0, 'cpu')  # 10,001 sequences: 1,666 batches, 5 sequences left out
    assert batches.per_epoch == 1666
    epochs = []
    for epoch in range(2):
        x, y = (torch.cat(side) for side in zip(*(batches.at(1666 * epoch + i) for i in range(1666)), strict=True))
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
        x, y = first.at(step)
        assert x.shape == y.shape == (8, 7) and x.dtype == y.dtype == torch.int64
        assert torch.equal(new(1).at(step)[0], x)
        assert not torch.equal(new(2).at(step)[0], x)


class StaysOnTheDevice(TorchDispatchMode):
    """Fails where something is made on the host or brought over: a GPU's host would wait for the copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        assert made.device.type == 'meta', f'{function} is not on the device'
        return made


def test_a_batch_needs_nothing_from_the_host():
    """By the device 'meta', which has shapes alone. An epoch's order is brought over once."""
    batches = data.Batches(numbers(1000), 8, 7, 0, 'meta')
    batches.at(0)
    with StaysOnTheDevice():
        batches.at(1)
    with pytest.raises(AssertionError, match='is not on the device'), StaysOnTheDevice():
        batches.at(batches.per_epoch)


@pytest.mark.parametrize('n', [2, 7, 8, 9, 57, 100, 40_000])
def test_validation_predicts_every_token_once_in_order(n):
    pairs = []
    for x, y in data.validation_batches(numbers(n), 4, 7):
        assert x.shape == y.shape and x.shape[1] == 7 and len(x) <= 4
        pairs += zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    assert [pair for pair in pairs if pair[1] != -1] == [(i, i + 1) for i in range(n - 1)]

"""sources.py against plain Python, hashlib and tiktoken: every text comes back, what cannot be read is refused in one
line, and nothing of the user's is lost. Every test has an empty folder to itself."""

import base64
import contextlib
import hashlib
import http.server
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
import time
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path, PurePath

import numpy as np
import pytest
import tiktoken
from tiktoken import _educational as educational
from tiktoken.load import load_tiktoken_bpe
from tiktoken_ext.openai_public import r50k_pat_str

import data
import documents
import sources
from bpe import END_OF_TEXT

ODD = (
    'a\0b\0\0 c\r\nd\r\re\n\n\n \t\v\f\x85\u2028\u3000f \ufeffg \u0301\u0308\u200d\ufffd\uffff e\u0301 '
    "👩‍👩‍👧‍👦🏳️‍🌈😀 don't WE'LL x''s 12345 ¾ ٣ नमस्ते ไทย 漢字 \x1b[0m\x7f <|endoftext|><|endoftext|> |> \U0010ffff"
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Runs each test in an empty folder, since sources.ROOT is relative; gives the folder."""
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


def refused(source, *words, **options):
    """A source cannot be prepared, one line says why, and nothing but its lock is left of it."""
    with exits(*words):
        sources.prepare(source, **options)
    assert left_in_data() == []


def left_in_data():
    return [path.name for path in Path('data').glob('*') if path.suffix != '.lock']


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
    """A folder with documents for both splits, an empty one and hidden ones."""
    texts = {f'part{i % 3}/{i}.txt': prose(i, 100) + str(i) for i in range(n)}
    for name, text in texts.items():
        write(f'texts/{name}', text)
    write('texts/part0/empty.txt', '')
    write('texts/.git/config', 'hidden')
    write('texts/part1/._0.txt', b'\xff hidden, not UTF-8')
    return sorted(texts.values())


def ranks_of(name):
    """The corpus' vocabulary, read by hand, END_OF_TEXT (no bytes) at its end."""
    lines = Path(f'data/{name}/bpe.tiktoken').read_text().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    return [base64.b64decode(line.split()[0], validate=True) for line in lines] + [b'']


def ids_of(name, splits=('train', 'val')):
    return np.concatenate([np.fromfile(f'data/{name}/{split}.bin', '<i4') for split in splits])


def bytes_of(name, splits=('train', 'val')):
    """The bytes of a corpus, decoded by hand."""
    tokens = ranks_of(name)
    return b''.join(tokens[i] for i in ids_of(name, splits))


def texts_of(name):
    """The documents of a corpus, which END_OF_TEXT closes."""
    tokens = [*ranks_of(name)[:-1], b'\xff']  # no byte of UTF-8
    *texts, rest = b''.join(tokens[i] for i in ids_of(name)).split(b'\xff')
    assert rest == b''
    return [text.decode() for text in texts]


def test_tiktoken_reads_the_vocabulary(place, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(place / 'cache'))
    text = prose() + ODD
    sources.prepare(write('text.txt', text))
    ranks = load_tiktoken_bpe('data/text/bpe.tiktoken')
    theirs = tiktoken.Encoding('theirs', pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    ours = data.Corpus('text').encoding
    assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)
    slow = educational.SimpleBytePairEncoding(pat_str=r50k_pat_str, mergeable_ranks=ranks)
    train = bytes_of('text', ['train']).decode()
    assert slow.encode(train, visualise=None) == list(ids_of('text', ['train'])[:-1])


# ---- preparing -----------------------------------------------------------------------------------------------------


def test_an_odd_text_comes_back_its_last_tenth_in_validation():
    texts = ['\ufeff' + ODD * 50, '\0' * 300 + 'a', END_OF_TEXT * 30, '\u0301' * 55, 'x', 'ab', '😀']
    for i, text in enumerate(texts):
        name = sources.prepare(write(f'odd{i}.txt', text))
        cut = len(text) * 9 // 10
        assert bytes_of(name, ['train']).decode() == text[:cut] and bytes_of(name, ['val']).decode() == text[cut:]
        for ids in (ids_of(name, ['train']), ids_of(name, ['val'])):
            assert np.flatnonzero(ids == len(ranks_of(name)) - 1).tolist() == [len(ids) - 1]  # one, at the end


@pytest.mark.parametrize(
    'text',
    ['a b ' * 1_000_000, 'a' * 1_000_000, ' ' * 1_000_000 + 'x', '\n' * 1_000_000, 'x\n' + ' \u3000' * 300_000 + 'x'],
    ids=['4 MB line', 'one letter', 'spaces', 'newlines', 'wide spaces'],
)
def test_a_long_monotonous_text_comes_back(text):
    """SPLIT neither hangs nor overflows its stack."""
    sources.prepare(write('text.txt', text))
    assert bytes_of('text').decode() == text


def test_documents_come_back_and_meta_is_right():
    texts = folder_of_texts()
    sources.prepare('texts')
    assert sorted(texts_of('texts')) == texts
    meta = json.loads(Path('data/texts/meta.json').read_text())
    assert meta['source'] == str(Path('texts').resolve()) and meta['encoding'] == 'bpe'
    for split in ('train', 'val'):
        ids = ids_of('texts', [split])
        ends = int((ids == len(ranks_of('texts')) - 1).sum())
        assert meta[split] == {'tokens': len(ids), 'bytes': len(bytes_of('texts', [split])), 'documents': ends}
    assert meta['sha256'] == {
        name: hashlib.sha256(Path('data/texts', name).read_bytes()).hexdigest()
        for name in ('bpe.tiktoken', 'train.bin', 'val.bin')
    }
    assert meta['train']['documents'] + meta['val']['documents'] == 12
    assert {p.name for p in Path('data/texts').iterdir()} == {'train.bin', 'val.bin', 'bpe.tiktoken', 'meta.json'}
    assert left_in_data() == ['texts']


def test_a_large_corpus_is_sampled_evenly(monkeypatch):
    text = ' '.join(map(str, range(20_000)))
    monkeypatch.setattr(documents, 'CHARS_PER_PIECE', 200)
    read = partial(documents.read_pieces, 'text', write('text.txt', text), 'strict')
    both = [partial(read, stop=50_000), partial(read, start=50_000)]
    assert sum(sources.count_words(both).values()) > 20_000  # digits that a piece cuts count twice
    monkeypatch.setattr(sources, 'SAMPLE_CHARS', len(text) // 20)
    words = sources.count_words(both)
    places = [int(word) for word in words if word.strip().isdigit()]
    assert 0.04 < len(places) / 20_000 < 0.06
    assert all(0.2 < sum(i // 5000 == quarter for i in places) / len(places) < 0.3 for quarter in range(4))


def test_prepare_twice(monkeypatch):
    sources.prepare(write('text.txt', prose()))
    write('elsewhere/text.txt', 'other ' * 99)
    with monkeypatch.context() as m:
        m.setattr(sources, 'write_corpus', None)  # nothing is written
        assert sources.prepare('text.txt') == 'text'
        here, there = (str(Path(path).resolve()) for path in ('text.txt', 'elsewhere/text.txt'))
        with exits('data/text', here, there, 'python data.py elsewhere/text.txt --overwrite'):
            sources.prepare('elsewhere/text.txt')
    assert bytes_of('text').decode() == prose()
    sources.prepare('elsewhere/text.txt', overwrite=True)
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
                        sources.prepare(str(source), overwrite=overwrite)
                    assert len(refusal.value.code.splitlines()) == 1 and mine.read_text() == 'mine'
        shutil.rmtree('data/text')
        sources.prepare('text.txt')


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
    sources.prepare('texts')
    write('texts/part0/0.txt', 'new text')
    sources.prepare('texts')
    assert 'new text' in texts_of('texts')
    Path('texts/part1/1.txt').unlink()
    sources.prepare('texts')
    assert len(bytes_of('texts')) == sum(file.stat().st_size for file in Path('texts').glob('part?/[0-9].txt'))
    sources.prepare(archive_of('packed.zip', ['part0/0.txt', 'part2/2.txt']))
    sources.prepare(archive_of('packed.zip', ['part0/0.txt']))
    assert ''.join(texts_of('packed')) == 'new text'
    monkeypatch.setattr(sources, 'write_corpus', None)
    data.open_corpus('texts')  # by its name it is opened as it is, whatever became of its source
    write('texts/part0/0.txt', 'newer text')
    data.open_corpus('texts/', allow_stale=True)
    write('elsewhere/texts/0.txt', prose())
    with exits('was prepared from', 'rename one'):
        data.open_corpus('elsewhere/texts', allow_stale=True)
    with exits('no path'):
        data.open_corpus('nowhere/texts', allow_stale=True)
    shutil.rmtree('texts')
    with exits('data/texts is prepared already: --dataset=texts trains on it.'):
        sources.prepare('texts')  # the name of a corpus in place of its source
    with exits('books is no path and no known name; prepared: ', 'results/books.md says how to collect the books.'):
        sources.prepare('books')
    with exits('texts is no path and no known name; prepared: ', 'texts'):
        sources.prepare('texts', encoding='gpt2')
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
        sources.prepare('.', overwrite=True)
        assert sorted(bytes_of('corpus').decode()) == sorted(prose(1) + prose(2))
    assert 'data leads to' in capfd.readouterr().err
    with exits('no text'):
        sources.prepare('data')


def test_train_and_val_folders_are_the_split_and_links_to_folders_are_followed_once(capfd):
    for i in range(3):
        write(f'elsewhere/{i}.txt', f'train{i}')
        write(f'texts/sub/val/{i}.txt', f'val{i}')
    Path('texts/sub/train').symlink_to(Path('elsewhere').resolve())
    Path('texts/sub/val/loop').symlink_to(Path('texts').resolve())
    Path('texts/sub/val/dangling').symlink_to('nowhere')
    sources.prepare('texts')
    assert bytes_of('texts', ['train']) == b'train0train1train2'
    assert bytes_of('texts', ['val']) == b'val0val1val2'
    assert b'train' in ranks_of('texts') and b'val' not in ranks_of('texts')  # the vocabulary is training's
    assert capfd.readouterr().err.count('texts/sub/val/loop leads to') == 1


def test_a_tilde_is_the_home_folder(place, monkeypatch):
    monkeypatch.setenv('HOME', str(place / 'home'))
    write('home/text.txt', prose())
    assert data.open_corpus('~/text.txt').meta['source'] == str(place.resolve() / 'home/text.txt')
    sources.prepare('~/text.txt', overwrite=True)
    assert not Path('~').exists()


def test_what_a_killed_preparation_left_is_cleared():
    names = ('.preparing-text.old', '.preparing-other.old', '.preparing-text-gpt2.old', '.text-mine')
    old, *others = [write(f'data/{name}/train.bin', 'x') for name in names]
    sources.prepare(write('text.txt', prose()))
    assert not old.exists() and all(file.exists() for file in others)


def run_and(line):
    """A process that runs this line, then prepares text.txt."""
    script = f'import os, resource, signal, data, sources; {line}; data.main()'
    environ = {**os.environ, 'PYTHONPATH': str(Path(sources.__file__).parent)}
    return subprocess.run([sys.executable, '-c', script, 'text.txt'], capture_output=True, text=True, env=environ)


def test_a_killed_preparation_leaves_no_corpus():
    write('text.txt', 'half ' * 100_000)
    killed = run_and('sources.checksum = lambda path: os.kill(os.getpid(), signal.SIGKILL)')
    assert killed.returncode == -signal.SIGKILL and 'tokens in val.bin' in killed.stderr
    assert not Path('data/text').exists()
    with exits('text is no path', 'prepared: none'):
        data.open_corpus('text')
    assert sources.prepare('text.txt') == 'text'
    assert bytes_of('text') == b'half ' * 100_000


def test_a_corpus_that_is_replaced_is_moved_first(monkeypatch):
    """Killed in between, there is no corpus, and it can be prepared."""
    sources.prepare(write('text.txt', prose(1)))
    write('text.txt', prose(2))
    replace, moved = Path.replace, []

    def dying(path, target):
        moved.append(path.name)
        if path.name == 'corpus':
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, 'replace', dying)
        sources.prepare('text.txt')
    assert moved == ['text', 'corpus'] and not Path('data/text').exists()
    sources.prepare('text.txt')
    assert bytes_of('text').decode() == prose(2)


def test_a_full_disk_is_one_line():
    write('text.txt', prose(words=20_000))
    full = run_and('resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))')
    first, last = full.stderr.splitlines()  # what it is about to do, and the error
    assert full.returncode == 1 and 'preparing' in first
    assert 'text.txt' in last and 'File too large' in last
    assert left_in_data() == []


# ---- splits --------------------------------------------------------------------------------------------------------


def test_the_standard_library_is_read_without_its_tests_and_the_machines_traits(place, monkeypatch):
    names = ['a.py', 'a/testing.py', 'a.txt', 'test/b.py', 'c/tests/d.py', 'c/idle_test/e.py', 'site-packages/f.py',
             '_sysconfigdata__linux.py']  # fmt: skip
    for name in names:
        write(f'lib/{name}', name)
    assert len(sources.find_files(Path('lib'))) == len(names)
    monkeypatch.setitem(sources.KNOWN, 'stdlib', 'lib')
    assert {str(name) for name in sources.find_files(Path('lib'))} == {'a.py', 'a/testing.py'}


def test_documents_keep_their_split():
    def val(names):
        texts = {PurePath(name): name for name in names}
        train, held_out, _ = documents.split(texts, dict.fromkeys(texts, 100))
        assert sorted(train + held_out) == sorted(names)
        return set(held_out)

    few, more = [f'some/{i}.txt' for i in range(0, 20_000, 2)], [f'some/{i}.txt' for i in range(20_000)]
    assert val(few) == val(more) & set(few) == val(few[::-1])
    assert 0.045 < len(val(more)) / len(more) < 0.055


def held_out():
    """{name: split} of a folder texts/, prepared. Each file's text is its name, repeated."""
    sources.prepare('texts', overwrite=True)
    ends = {'train': bytes_of('texts', ['train']).decode(), 'val': bytes_of('texts', ['val']).decode()}
    names = [str(p.relative_to('texts')) for p in Path('texts').rglob('*') if p.is_file()]
    return {name: ''.join(split for split, text in ends.items() if f'[{name}]' in text) for name in names}


def texts(*names, size=1000):
    shutil.rmtree('texts', ignore_errors=True)
    for name in names:
        write(f'texts/{name}', f'[{name}]' * (size // (len(name) + 2) + 1))


@pytest.mark.parametrize(
    'train, val, test',
    [
        ('train/a.txt', 'val/a.txt', 'test/a.txt'),
        ('train/a.txt', 'validation/a.txt', 'test/a.txt'),
        ('Train/a.txt', 'Val/a.txt', 'TEST/a.txt'),
        ('deep/train/a.txt', 'deep/dev/b/a.txt', 'deep/test/a.txt'),
        ('train.txt', 'valid.txt', 'test.txt'),
        ('train', 'dev', 'test'),
        ('ptb.train.txt', 'ptb.valid.txt', 'ptb.test.txt'),
        ('input_train.txt', 'input_val.txt', 'input_test.txt'),
        ('TinyStoriesV2-GPT4-train.txt', 'TinyStoriesV2-GPT4-valid.txt', 'TinyStoriesV2-GPT4-test.txt'),
        ('train-00000-of-00002.txt', 'validation-00000-of-00001.txt', 'test-00000-of-00001.txt'),
        ('en/train.txt', 'en/val1.txt', 'en/test2.txt'),
    ],
)
def test_the_usual_names_are_the_split(train, val, test, capfd):
    """Test text is in neither; what no name decides is for training; one line says so."""
    others = ['valley.txt', 'contest.txt', 'training-log.txt', 'dev.to/a.txt', 'en/other.txt']
    for names in ({train: 'train', val: 'val', test: ''}, {train: 'train', val: 'val'}):
        texts(*names, *others)
        assert held_out() == names | dict.fromkeys(others, 'train')
        [line] = [line for line in capfd.readouterr().err.splitlines() if 'held out' in line]
        assert line.startswith('data/texts: held out for validation: 1 of 7 documents, by their names')
        assert (', and 1 for tests are left out' in line) == (test in names)


def test_a_test_text_is_left_out_where_no_name_says_what_is_validation():
    texts('test/a.txt', *(f'train/{i}.txt' for i in range(30)))
    split = held_out()
    assert split['test/a.txt'] == '' and sorted(split.values()).count('val') in (2, 3)


@pytest.mark.parametrize(
    'names',
    [
        ['valley.txt', 'contest.txt', 'training-log.txt', 'dev.to/a.txt'],
        ['train.py', 'model.py', 'test_model.py', 'requirements-dev.txt', 'tests/test_train.py'],  # of a program
        ['train/a.txt', 'other/a.txt'],  # nothing to hold out by name
        ['val/a.txt', 'other.txt'],
    ],
)
def test_other_names_are_no_split(names):
    texts(*names, *(f'more/{i}.txt' for i in range(40)))
    split = held_out()
    assert '' not in split.values() and 2 <= list(split.values()).count('val') <= 5
    sizes = {PurePath(name): 1 for name in names}
    assert documents.splits_by_name(sizes) == {}


@pytest.mark.parametrize(
    'sizes',
    [
        {'main.py': 90_000, 'setup.py': 6, 'util.py': 6},
        {'book.txt': 50_000, **{f'note{i}.txt': 20 for i in range(25)}},
        {'a': 10_000, 'b': 10_000},
        {'51.txt': 10_000, '115.txt': 10_000},  # both have a low hash
        {f'{i}.txt': 7400 for i in range(13)} | {'short.txt': 3000},
        {f'{i}.txt': 2000 + 37 * i for i in range(60)},
        {'one': 10_000},
    ],
)
def test_5_to_10_percent_of_the_text_are_held_out(sizes, capfd):
    for name, size in sizes.items():
        write(f'texts/{name}', (name + ' ') * (size // len(name) or 1))
    sources.prepare('texts')
    meta = json.loads(Path('data/texts/meta.json').read_text())
    share = meta['val']['bytes'] / (meta['val']['bytes'] + meta['train']['bytes'])
    assert 0.04 <= share < 0.1002
    if len(sizes) not in (14, 60):  # what is cut is the largest document; all others are whole
        train, val = (bytes_of('texts', [split]).decode() for split in ('train', 'val'))
        assert all(name in train for name in sizes) and max(sizes, key=sizes.get) in val
        assert f'held out for validation: the end of {max(sizes, key=sizes.get)}; ' in capfd.readouterr().err


def test_a_tiny_or_large_side_gets_a_line(capfd):
    for n_train, n_val, words in ((9, 40, '%, more than half, too few'), (9000, 2, '%, too few'), (9000, 900, '%\n')):
        write('texts/train/a.txt', prose(1, n_train)), write('texts/val/a.txt', prose(2, n_val))
        sources.prepare('texts', overwrite=True)
        assert words in capfd.readouterr().err.replace(' of the text', '')


def test_a_link_to_a_file_is_read_once():
    for i in range(3):
        write(f'texts/{i}.txt', prose(i))
    Path('texts/soft.txt').symlink_to('0.txt')
    os.link('texts/1.txt', 'texts/hard.txt')
    Path('texts/sub').mkdir()
    Path('texts/sub/up.txt').symlink_to('../2.txt')
    sources.prepare('texts')
    assert sorted(bytes_of('texts').decode()) == sorted(prose(0) + prose(1) + prose(2))


def test_lines_that_are_end_of_text_end_documents(monkeypatch):
    """At the start, at the end, twice, and across two pieces; the same characters inside a line do not."""
    stories = [f'story {i}\nends {END_OF_TEXT} {i}\n' + 'x' * i for i in range(60)]
    for size in (17, 57, 1 << 18):
        monkeypatch.setattr(documents, 'CHARS_PER_PIECE', size)
        for newline in ('\n', '\r\n'):
            end = f'{END_OF_TEXT}{newline}'
            text = f'{end}' + f'\n{end}'.join(stories) + f'\n{end}{end}'
            sources.prepare(write('text.txt', text), overwrite=True)
            train, val = (bytes_of('text', [side]).decode() for side in ('train', 'val'))
            assert train + val == '\n'.join(stories) + '\n'
            meta = json.loads(Path('data/text/meta.json').read_text())
            assert meta['train']['documents'] + meta['val']['documents'] == 61  # one is cut by the split
            assert texts_of('text')[:50] == [f'{story}\n' for story in stories[:50]]
            assert 0.09 < len(val) / len(train + val) < 0.11
    with exits('no text'):
        sources.prepare(write('ends.txt', end * 3))


def test_pieces_are_those_of_the_whole_text(monkeypatch):
    rng = random.Random(5)
    for _ in range(200):
        monkeypatch.setattr(documents, 'CHARS_PER_PIECE', rng.randint(14, 40))
        raw = ''.join(rng.choices('aé😀\n\r< \u2028', k=rng.randint(0, 300))).encode()
        raw = rng.choice([raw, raw[: rng.randint(0, 300)], raw + b'\xff\xe2\x82x'])
        whole, n = raw.decode(errors='replace'), documents.CHARS_PER_PIECE
        start = rng.randint(0, len(whole))
        read = partial(documents.read_pieces, 'text', write('text.txt', raw), 'replace')
        for part, pieces in ((whole[:start], read(stop=start)), (whole[start:], read(start=start)), (whole, read())):
            expected = [part[i : i + n] for i in range(0, len(part), n)] or ['']
            assert list(pieces) == [(piece, i == len(expected) - 1) for i, piece in enumerate(expected)]


def test_a_large_text_needs_little_memory(monkeypatch):
    """10 million characters, a wide one among them: the whole would take 4 bytes each."""
    write('text.txt', '😀' + prose() * 1000)
    monkeypatch.setattr(sources, 'SAMPLE_CHARS', 1e6)
    monkeypatch.setattr(sources, 'write_tokens', lambda *arguments: {'tokens': 1, 'bytes': 1})
    tracemalloc.start()
    sources.prepare('text.txt')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert os.path.getsize('text.txt') > 10e6 and peak < 12e6


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
    sources.prepare('texts')
    sources.prepare(f'packed.{kind}')
    assert bytes_of('texts') != b''
    for file in ('train.bin', 'val.bin', 'bpe.tiktoken'):
        assert Path('data/packed', file).read_bytes() == Path('data/texts', file).read_bytes()


# ---- bad sources ---------------------------------------------------------------------------------------------------


def test_a_source_without_text():
    write('empty.txt', '')
    write('folder/empty.txt', '')
    for kind in ('tar.gz', 'zip'):
        refused(archive_of(f'archive.{kind}', []), f'archive.{kind}', 'no text')
    refused('empty.txt', 'no text')
    refused('folder', 'no text')
    refused('missing.txt', 'missing.txt')
    with exits('nameless', 'none', 'stdlib'):
        data.open_corpus('nameless')


def test_a_validation_without_text():
    """Its single token would not be a target."""
    write('texts/train/a.txt', prose())
    write('texts/val/a.txt', f'{END_OF_TEXT}\n')
    refused('texts', 'no text for validation')


def test_a_pipe_and_several_sources(monkeypatch):
    os.mkfifo('pipe')
    for source in ('pipe', '/dev/null'):
        refused(source, source, 'cannot be read twice', 'to a file')
    for arguments in (['a.txt', 'b.txt'], ['a.txt', '--errors=replace', 'b.txt']):
        monkeypatch.setattr(sys, 'argv', ['data.py', *arguments])
        with exits('one SOURCE', 'into a folder'):
            data.main()


def test_no_abbreviation_prepares_a_corpus_anew(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['data.py', 'text.txt', '--ov'])
    with pytest.raises(SystemExit):
        data.main()
    assert 'unrecognized arguments: --ov' in capsys.readouterr().err


def test_a_corpus_opened_by_name_says_that_its_source_has_changed(capfd):
    folder_of_texts()
    sources.prepare('texts')
    for name in ('texts', 'data/texts'):
        data.open_corpus(name)
        assert capfd.readouterr().err.count('has changed') == 0
    write('texts/part0/0.txt', 'newer text')
    for name in ('texts', 'data/texts'):
        data.open_corpus(name)
        [line] = capfd.readouterr().err.splitlines()
        assert 'has changed since data/texts was prepared' in line and line.endswith('/texts --overwrite')
    data.open_corpus('texts', allow_stale=True)  # a resumed run
    shutil.rmtree('texts')
    data.open_corpus('texts')
    assert capfd.readouterr().err == ''


TOGETHER = """
import sys, data, sources
for i in range(int(sys.argv[2])):
    if sys.argv[1] == 'overwrite':
        sources.prepare('text.txt', overwrite=True)
    assert len(data.open_corpus('text.txt').val) and len(data.open_corpus('text').train)
print('fine')
"""


def test_programs_that_prepare_a_text_at_the_same_moment_wait_for_one():
    write('text.txt', prose())
    environ = {**os.environ, 'PYTHONPATH': str(Path(sources.__file__).parent)}
    command = [sys.executable, '-c', TOGETHER]
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    together = [start([*command, 'open', '10']) for _ in range(3)] + [start([*command, 'overwrite', '2'])]
    outputs = [program.communicate() for program in together]
    assert [out for out, _ in outputs] == ['fine\n'] * 4, outputs
    assert sum(error.count('preparing data/text from') for _, error in outputs[:3]) <= 1
    assert bytes_of('text').decode() == prose() and left_in_data() == ['text']


BAD = {
    'late': b'x' * 300_000 + b'\xfe' + b'x' * 100_000,
    'after wide characters': 'é€😀'.encode() * 40_000 + b'\x80' + b'x' * 100_000,
    'surrogate': b'abc\xed\xa0\x80' + b'x' * 100,
    'validation': 'é'.encode() * 5000 + b'\xff' + b'x' * 9,
    'cut at the end': b'x' * 1000 + '€'.encode()[:2],
}


@pytest.mark.parametrize('raw', BAD.values(), ids=BAD)
def test_bytes_that_are_no_text(raw):
    with pytest.raises(UnicodeDecodeError) as caught:
        raw.decode()
    write('bad.txt', raw)
    refused('bad.txt', 'bad.txt', f'byte {caught.value.start} ', '--errors=replace')
    sources.prepare('bad.txt', errors='replace')
    assert bytes_of('bad').decode() == raw.decode(errors='replace')


def test_an_encoding_that_cannot_be_had(place, monkeypatch):
    def fail(path):
        raise OSError('no\nnetwork')

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(place / 'cache'))
    monkeypatch.setattr(tiktoken.load, 'read_file', fail)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    write('text.txt', prose())
    refused('text.txt', "'gpt2'", 'no network', encoding='gpt2')
    refused('text.txt', "'gpt9'", 'Unknown encoding', encoding='gpt9')


# ---- archives ------------------------------------------------------------------------------------------------------


def test_a_hostile_zip_reaches_nothing_outside(place, monkeypatch):
    """shutil leaves out what would land outside, and writes a link as a file."""
    outside = write('outside/secret.txt', 'SECRET' * 99).resolve().parent
    monkeypatch.chdir(write('work/sub/file.txt', '').parent.parent)
    with zipfile.ZipFile('hostile.zip', 'w') as archive:
        for name in ('good.txt', str(outside / 'absolute.txt'), '../up.txt', 'a/../../up.txt'):
            archive.writestr(zipfile.ZipInfo(name), prose())
        link = zipfile.ZipInfo('soft')
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(outside / 'secret.txt'))
    before = sorted(place.rglob('*'))
    sources.prepare('hostile.zip')
    assert prose()[:5000].encode() in bytes_of('hostile') and b'SECRET' not in bytes_of('hostile')
    assert before == [p for p in sorted(place.rglob('*')) if not p.is_relative_to(place / 'work/data')]


@pytest.mark.parametrize(
    'name, kind',
    [
        ('../up', tarfile.REGTYPE),
        ('a/../../up', tarfile.REGTYPE),
        ('soft', tarfile.SYMTYPE),
        ('hard', tarfile.LNKTYPE),
        ('dev', tarfile.CHRTYPE),
    ],
    ids=['up', 'down and up', 'soft link', 'hard link', 'device'],
)
def test_a_hostile_tar_reaches_nothing_outside(place, monkeypatch, name, kind):
    """tarfile refuses an archive with such a member, whole; an absolute path becomes a relative one."""
    outside = write('outside/secret.txt', 'SECRET' * 99).resolve().parent
    with tarfile.open(write('work/sub/hostile.tar', ''), 'w') as archive:
        archive.add(write('good.txt', prose()), str(outside / 'absolute.txt'))
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, str(outside / 'secret.txt')
        archive.addfile(member)
    monkeypatch.chdir('work/sub')
    before = sorted(place.rglob('*'))
    refused('hostile.tar', 'hostile.tar', 'could not be prepared', name)
    assert before == [p for p in sorted(place.rglob('*')) if not p.is_relative_to(place / 'work/sub/data')]


@pytest.mark.parametrize('kind', ['tar.gz', 'tar.xz', 'zip'])
def test_a_damaged_archive(kind):
    folder_of_texts()
    whole = archive_of(f'bad.{kind}', [f'part{i % 3}/{i}.txt' for i in range(12)]).read_bytes()
    for place in (0.2, 0.5, 0.9):
        flipped = bytearray(whole)  # a tar.gz stores its text here, so that only the checksum at its end can tell
        flipped[int(len(whole) * place)] ^= 1
        for raw in (whole[: int(len(whole) * place)], flipped):
            write(f'bad.{kind}', raw)
            refused(
                f'bad.{kind}', f'bad.{kind}', *(['lacks its end'] if kind == 'zip' and len(raw) < len(whole) else [])
            )


def test_a_zip_that_cannot_be_read():
    with zipfile.ZipFile('bad.zip', 'w') as archive:
        archive.writestr('é.txt', prose())
    raw = Path('bad.zip').read_bytes()
    refused(write('bad.zip', raw.replace('é'.encode(), b'\xc3(')), 'bad.zip', 'utf-8')
    locked = bytearray(raw)
    locked[6] |= 1  # the flags in the file's header, and in the directory at the end
    locked[raw.index(b'PK\x01\x02') + 8] |= 1
    refused(write('locked.zip', locked), 'locked.zip', 'encrypted')


def test_a_tar_with_a_header_of_zeros():
    """tarfile takes it for the archive's end, and would leave out what follows."""
    folder_of_texts()
    raw = bytearray(archive_of('bad.tar', ['part0/0.txt', 'part1/1.txt', 'part2/2.txt']).read_bytes())
    header = raw.rindex(b'././@PaxHeader')  # the last member's first block
    raw[header : header + 512] = bytes(512)
    refused(write('bad.tar', raw), 'bad.tar', 'goes on after its end')


# ---- URLs ----------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = prose().encode()
        if self.path == '/garbage':
            self.wfile.write(b'garbage\r\n\r\n')
            return
        if self.path == '/silent':
            time.sleep(3)
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
        assert sources.prepare(server + path) == name
        assert bytes_of(name).decode() == prose()
        assert json.loads(Path(f'data/{name}/meta.json').read_text())['source'] == server + path
        assert left_in_data() == [name]  # the download is gone
        shutil.rmtree(f'data/{name}')


@pytest.mark.parametrize(
    'path, word',
    [
        ('/missing.txt', '404'),
        ('/cut.txt', 'got only 1000 out of'),
        ('/chunks', 'IncompleteRead'),
        ('/garbage', 'garbage'),
        ('/loop', 'infinite loop'),
        ('/silent', 'timed out'),
        ('/with space', 'control characters'),
    ],
)
def test_a_url_that_fails(server, path, word, monkeypatch):
    monkeypatch.setattr(sources, 'TIMEOUT', 1 if path == '/silent' else 60)
    refused(server + path, server + path, word)


def test_a_url_that_nobody_serves():
    with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
        url = f'http://127.0.0.1:{server.server_port}/text.txt'
    refused(url, url, 'refused')


def test_a_file_does_not_take_the_place_of_a_known_corpus():
    refused(write('shakespeare.txt', prose()), 'shakespeare.txt would become data/shakespeare', 'rename it')
    refused('https://example.org/enwik8.txt', 'would become data/enwik8')
    with exits('no path'):
        data.open_corpus('data/stdlib')

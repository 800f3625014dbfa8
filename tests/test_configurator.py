"""Config files and flags: what is right is taken, what is wrong gets one line, and nothing is ever executed."""

import ast
import contextlib
import io
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS

from configurator import configure
from machine import run_program

HOME = Path(__file__).parent.parent
PROGRAM = '''
"""A program."""
import sys
n_layer = 6  # blocks
learning_rate = 1e-4  # the peak
dataset = 'stdlib'  # a name
compile: bool | None = None  # None: by itself
out_dir: str | None = None  # where
max_iters: int | None = None  # steps
overwrite = False  # start over
schedule: Literal['up', 'down'] = 'up'  # the way
CONSTANT = 1  # no knob
def main(): pass
'''


@pytest.fixture(autouse=True)
def program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('program.py').write_text(PROGRAM)


def knobs(*arguments, config=None):
    """The settings that these arguments give, and a config file of this content."""
    if config is not None:
        Path('c.py').write_bytes(config if isinstance(config, bytes) else config.encode())
    return vars(configure(['program.py'], [*(['c.py'] if config is not None else []), *arguments])[0])


@contextlib.contextmanager
def exits(*words):
    """The block ends in one line that names these words."""
    with pytest.raises(SystemExit) as caught:
        yield
    assert isinstance(caught.value.code, str) and '\n' not in caught.value.code and len(caught.value.code) < 400
    assert all(word in caught.value.code for word in words), caught.value.code
    assert not re.search(r'[.?!;:]\W*[.?!]$', caught.value.code), caught.value.code


DEFAULTS = {
    'n_layer': 6,
    'learning_rate': 1e-4,
    'dataset': 'stdlib',
    'compile': None,
    'out_dir': None,
    'max_iters': None,
    'overwrite': False,
    'schedule': 'up',
}


def test_defaults_and_order():
    assert knobs() == DEFAULTS
    Path('second.py').write_text('n_layer = 8\ndataset = "b"')
    given = knobs('second.py', '--dataset=c', config='n_layer = 7\nlearning_rate = 1')
    assert given == {**DEFAULTS, 'n_layer': 8, 'learning_rate': 1.0, 'dataset': 'c'}
    assert configure(['program.py'], ['--n_layer=2', 'c.py', 'second.py'])[1] == ['c.py', 'second.py']
    assert knobs('--n_layer=2', config='n_layer = 7')['n_layer'] == 2  # the command line wins wherever it stands


@pytest.mark.parametrize(
    'line, name, value',
    [
        ('n_layer = 2 * 3 + 4 // 2 - 1', 'n_layer', 7),
        ('learning_rate = 6e-4 / 2', 'learning_rate', 3e-4),
        ('learning_rate = 1', 'learning_rate', 1.0),
        ('learning_rate = 2 * -(-1)', 'learning_rate', 2.0),
        ('compile = True', 'compile', True),
        ('compile = None', 'compile', None),
        ('max_iters = 5', 'max_iters', 5),
        ('out_dir = "a=b"', 'out_dir', 'a=b'),
        ('"""A docstring."""\n# a comment\n\nn_layer = 3  # why', 'n_layer', 3),
    ],
)
def test_values_of_a_config_file(line, name, value):
    for text in (line, line.replace('\n', '\r\n'), '\ufeff' + line):
        given = knobs(config=text)
        assert given == {**DEFAULTS, name: value} and type(given[name]) is type(value)


@pytest.mark.parametrize(
    'flag, name, value',
    [
        ('--n_layer=2*3', 'n_layer', 6),
        ('--learning_rate=3e-4', 'learning_rate', 3e-4),
        ('--learning_rate=3', 'learning_rate', 3.0),
        ('--max_iters=None', 'max_iters', None),
        ('--out_dir=None', 'out_dir', None),
        ('--dataset=None', 'dataset', 'None'),  # this one takes text only
        ('--dataset=5', 'dataset', '5'),
        ('--dataset=', 'dataset', ''),
        ('--dataset=a=b --c', 'dataset', 'a=b --c'),
        ("--dataset=don't", 'dataset', "don't"),
        ('--overwrite', 'overwrite', True),
        ('--overwrite=False', 'overwrite', False),
        ('--compile', 'compile', True),
        ('--schedule=down', 'schedule', 'down'),
    ],
)
def test_values_of_a_flag(flag, name, value):
    given = knobs(flag)
    assert given[name] == value and type(given[name]) is type(value)


@pytest.mark.parametrize('words, changes', [
    ('--n_layer 8', {'n_layer': 8}), ('--learning_rate -1+3', {'learning_rate': 2.0}),
    ('--schedule down --overwrite', {'schedule': 'down', 'overwrite': True}),
    ('--dataset c.py --out_dir None', {'dataset': 'c.py'}),
    ('--compile False --overwrite True', {'compile': False, 'overwrite': True}),
    ('--overwrite c.py --compile c.py', {'overwrite': True, 'compile': True, 'n_layer': 7}),  # a switch takes no file
])  # fmt: skip
def test_a_blank_will_do_for_the_equals_sign(words, changes):
    Path('c.py').write_text('n_layer = 7')
    assert knobs(*words.split()) == DEFAULTS | changes


def test_the_command_to_resume_is_right_after_blanks(run):
    """Here a knob that it changes would leave its old value behind, as a config file."""
    out = run('--max_iters', '2', '--overwrite', '--out_dir', 'out/blank')
    command = shlex.split(out.split('train on:')[1], comments=True)
    assert command[:2] == ['python', 'train.py'] and '--out_dir=out/blank' in command and '--max_iters=4' in command
    out = run(*command[2:])
    assert 'resumed at step 2 of 4' in out and '--max_iters=8' in out


@pytest.mark.parametrize(
    'config, words',
    [
        ('\nn_layers = 3', ['c.py:2', "'n_layers'", 'did you mean n_layer?']),
        ('zzz = 3', ['c.py:1', "'zzz'", '--help']),
        ('n_layer = 3.0', ['c.py:1', '3.0', 'expected int']),
        ('n_layer = True', ['True', 'expected int']),
        ('\nn_layer = 0', ['c.py:2', 'n_layer is 0, expected 1 <= n_layer < ']),
        ('overwrite = 1', ['expected bool']),
        ('schedule = "side"', ['c.py:1', "'side'", "expected 'up' or 'down'"]),
        ('schedule = None', ['None', "expected 'up' or 'down'"]),
        ('n_layer = True + 1', ['literal']),
        ('n_layer = None', ['None', 'expected int']),
        ('max_iters = "5"', ["'5'", 'expected int or None']),
        ('learning_rate = "fast"', ["'fast'", 'expected float']),
        ('learning_rate = 1e999', ['inf', 'expected float']),
        ('n_layer = 1 // 0', ['c.py:1', 'zero']),
        ('learning_rate = 1e308 * -1e308', ['inf']),
        ('n_layer = "a" * 9999999', ['literal']),
        ('n_layer = 9 ** 9 ** 9', ['literal']),
        ('n_layer = [1]', ['literal']),
        ('n_layer = 1j', ['literal']),
        ('n_layer = b"a"', ['literal']),
        ('n_layer = n_layer', ['literal']),
        ('n_layer = ...', ['literal']),
        ('n_layer: int = 3', ['only assignments']),
        ('n_layer = max_iters = 3', ['only assignments']),
        ('n_layer, max_iters = 3, 4', ['only assignments']),
        ('n_layer += 1', ['only assignments']),
        ('dataset.x = 1', ['only assignments']),
        ('n_layer = 3 3', ['c.py:1', 'invalid syntax']),
        ('n_layer = (', ['c.py:1', 'never closed']),
        ('n_layer = 3\n  max_iters = 4', ['c.py:2', 'unexpected indent']),
        (b'n_layer = 3\0', ['c.py']),
        (b'dataset = "\xe9"', ['c.py', 'utf-8']),
        ('n_layer = ' + '9' * 5000, ['c.py']),
        ('learning_rate = ' + '9' * 400, ['c.py:1']),
        ('n_layer = ' + '(' * 5000 + '1' + ')' * 5000, ['c.py']),
        ('n_layer = ' + '-' * 50_000 + '1', ['c.py']),
        ('n_layer = 1' + ' + 1' * 50_000, ['c.py']),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else '',
)
def test_a_bad_config_file(config, words):
    with exits('c.py', *words):
        knobs(config=config)


@pytest.mark.parametrize(
    'flag, words',
    [
        ('--n_layers=3', ["'n_layers'", 'did you mean n_layer?']),
        ('--n_layer', ['--n_layer=VALUE']),
        ('--out_dir', ['--out_dir=VALUE']),
        ('--n_layer --overwrite', ['--n_layer=VALUE']),
        ('--n_layer c.py', ["'c.py'", 'expected int']),
        ('--n_layers 3', ["'n_layers'", 'did you mean n_layer?']),
        ('--overwrite None', ['None', 'expected bool']),
        ('--learn=3', ["'learn'", 'did you mean learning_rate?']),
        ('--n_layer=', ["''", 'expected int']),
        ('--n_layer=three', ["'three'", 'expected int']),
        ('--n_layer=3.5', ['3.5', 'expected int']),
        ('--learning_rate=nan', ["'nan'", 'expected float']),
        ('--overwrite=yes', ["'yes'", 'expected bool']),
        ('--compile=1', ['expected bool or None']),
        ('--CONSTANT=2', ["'CONSTANT'"]),
        ('--sys=2', ["'sys'"]),
        ('--', ["''"]),
        ('-n_layer=3', ['did you mean n_layer?']),
        ('--n_layer=__import__("os").abort()', ['expected int']),
        ('--n_layer=' + '(' * 5000, ['expected int']),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else '',
)
def test_a_bad_flag(flag, words):
    with exits(*words):
        knobs(*flag.split(' '))


def test_a_config_file_that_cannot_be_read():
    Path('swiglu.py').write_text('')
    Path('folder.py').mkdir()
    Path('loop.py').symlink_to('loop.py')
    with exits('swigl.py', 'no such config file', 'did you mean swiglu.py?'):
        knobs('swigl.py')
    for name in ('best', 'best_2_muon', 'best_97m'):
        Path(f'{name}.py').write_text('')
    with exits('did you mean best_2_muon.py?'):  # it starts with what was typed; best.py is shorter
        knobs('best_2.py')
    home = Path('a folder of a long name').absolute()
    home.mkdir()
    (home / 'swiglu.py').write_text('')
    with exits(f'there are: {home}/swiglu.py.'):  # the folder's name makes no names similar
        knobs(f'{home}/adam.py')
    with exits('nowhere/a.py', 'no such config file', 'no .py files'):
        knobs('nowhere/a.py')
    with exits('folder.py is a folder, expected a config file'):
        run_program(lambda: knobs('folder.py'))
    with exits('loop.py', 'symbolic links'):
        run_program(lambda: knobs('loop.py'))


@pytest.mark.parametrize(
    'code',
    [
        'import os\nos.mkdir("ran")',
        '__import__("os").mkdir("ran")',
        'n_layer = __import__("os").mkdir("ran")',
        'n_layer = (lambda: __import__("os").mkdir("ran"))()',
        'n_layer = 3 if __import__("os").mkdir("ran") else 4',
        'n_layer = [__import__("os").mkdir("ran") for _ in "a"]',
        'def f(x=__import__("os").mkdir("ran")): pass',
        'class A:\n    __import__("os").mkdir("ran")',
        "dataset = f\"{__import__('os').mkdir('ran')}\"",
        'assert __import__("os").mkdir("ran")',
        'n_layer: __import__("os").mkdir("ran") = 3',
        'with open("ran", "w"): pass',
        "exec(\"open('ran', 'w')\")",
    ],
)
def test_no_code_of_a_config_runs(code):
    with exits('c.py:1'):
        knobs(config=code)
    with exits('c.py:2'):
        knobs(config='n_layer = 3\n' + code)
    with contextlib.suppress(SystemExit):
        knobs('--n_layer=' + code)
    assert knobs('--dataset=' + code)['dataset'] == code
    assert not Path('ran').exists()


def test_help_lists_every_knob_with_default_and_comment(capsys):
    for program in ('train.py', 'sample.py', 'bench.py', 'plot.py'):
        with pytest.raises(SystemExit) as helped:
            configure([HOME / program], ['--help'])
        assert helped.value.code == 0
        shown = capsys.readouterr().out.splitlines()
        count = 0
        for line in (HOME / program).read_text().splitlines():
            name = line.split(' ')[0].rstrip(':')
            if line[:1].islower() and name.isidentifier() and ' = ' in line and '#' in line:
                default, comment = line.split(' = ', 1)[1].split('#', 1)
                default = ast.literal_eval(default.strip())
                row = next(row for row in shown if row.startswith(f'  --{name}='))
                assert row.startswith(f'  --{name}={default}') and row.endswith(comment.strip()), row
                count += 1
        assert count >= 4


@pytest.mark.parametrize('programs, command', [
    (['train.py'], 'train.py'), (['bench.py', 'train.py'], 'bench.py'),
    (['results/ladder.py', 'train.py'], '-m results.ladder'),
])  # fmt: skip
def test_help_says_how_the_program_is_started(programs, command, capsys):
    with pytest.raises(SystemExit):
        configure([HOME / program for program in programs], ['--help'])
    assert capsys.readouterr().out.startswith(f'usage: python {command} [CONFIG.py ...] [--KNOB=VALUE ...]\n')


@pytest.mark.parametrize('name', CONFIGS)
def test_the_configs_parse(name):
    path = HOME / f'config/{name}.py'
    c, files = configure([HOME / 'train.py'], [str(path)])
    namespace = {}
    exec(path.read_text(), namespace)  # ours is a subset of Python: Python itself reads the same values
    for name, value in namespace.items():
        assert name == '__builtins__' or getattr(c, name) == value
    assert files == [str(path)]


def test_500_random_configs_and_command_lines():
    """Each is taken or refused in one line: no traceback, no hang."""
    rng = random.Random(17)
    words = ['n_layer', 'learning_rate', 'dataset', 'compile', 'max_iters', 'overwrite', 'nlayer', 'x', 'import os']
    bits = [
        *'10-+*/()[]"\'=,:;.#\\ \t\n\0é\ufeff',
        '1e-4',
        '**',
        '"a"',
        'None',
        'True',
        'f"',
        'b""',
        'lambda: ',
        '9' * 99,
    ]

    def phrase():
        return ''.join(rng.choice(bits) for _ in range(rng.randint(0, 6)))

    outcomes = set()
    for _ in range(500):
        lines = [rng.choice(words) + rng.choice([' = ', '=', '']) + phrase() for _ in range(rng.randint(0, 3))]
        flags = [
            rng.choice(['--', '--', '-']) + rng.choice(words) + rng.choice(['=', '']) + phrase()
            for _ in range(rng.randint(0, 2))
        ]
        try:
            given = knobs(*flags, config=rng.choice(['\n', '\n', '\r\n', ';']).join(lines))
            assert given.keys() == DEFAULTS.keys()
            assert type(given['n_layer']) is int and type(given['learning_rate']) is float
            assert type(given['dataset']) is str and type(given['overwrite']) is bool
            assert type(given['max_iters']) in (int, type(None)) and given['compile'] in (True, False, None)
            outcomes.add('taken')
        except SystemExit as error:
            assert isinstance(error.code, str) and '\n' not in error.code and len(error.code) < 400
            outcomes.add('refused')
    assert outcomes == {'taken', 'refused'}


def test_a_config_is_found_from_anywhere(tmp_path):
    """As a path, beside the program, or by its name."""
    for given in ('swiglu', 'swiglu.py', 'config/swiglu', 'config/swiglu.py', str(HOME / 'config/swiglu.py')):
        c, files = configure([HOME / 'train.py'], [given, 'cpu'])
        assert c.activation == 'swiglu' and c.max_iters == 2000
        assert [Path(file) for file in files] == [HOME / 'config/swiglu.py', HOME / 'config/cpu.py']
    Path('swiglu').mkdir()  # such as an out_dir
    assert configure([HOME / 'train.py'], ['swiglu'])[0].activation == 'swiglu'
    with exits('no such config file', 'did you mean', 'config/swiglu.py?'):
        configure([HOME / 'train.py'], ['swigluu'])
    Path('out/mine').mkdir(parents=True)
    with exits('out/mine is a folder, expected a config file; a run is named by --out_dir=out/mine.'):
        configure([HOME / 'train.py'], ['out/mine'])
    with exits('~nobody_of_that_name/swiglu.py: no such config file'):
        configure([HOME / 'train.py'], ['~nobody_of_that_name/swiglu.py'])


def test_a_character_that_the_output_lacks_is_replaced(monkeypatch):
    for encoding in ('ascii', 'latin-1', 'gbk', 'cp1252'):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, 'stdout', out)
        run_program(lambda: print('é漢😀\ufffd.'))
        assert out.buffer.getvalue().endswith(b'.\n')


PROGRAM_THAT_PRINTS = """
import sys
from unittest.mock import MagicMock
sys.modules |= dict.fromkeys(['torch', 'torch.distributed', 'model'], MagicMock())  # takes seconds to import
import machine
def main():
    for i in range(int(sys.argv[1])):
        print(i, flush=i == 0)
    raise KeyboardInterrupt
machine.run_program(main)
"""


@pytest.mark.parametrize(('lines', 'status'), [(1, 130), (100_000, 141)])
def test_a_reader_that_leaves_and_ctrl_c_end_a_program_quietly(lines, status):
    environ = {**os.environ, 'PYTHONPATH': str(HOME)}
    with subprocess.Popen([sys.executable, '-c', PROGRAM_THAT_PRINTS, str(lines)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, env=environ) as child:  # fmt: skip
        assert child.stdout.readline() == b'0\n'
        child.stdout.close()
        assert child.stderr.read() == b''
    assert child.returncode == status


def test_a_program_runs_without_output(monkeypatch):
    """As after >&- 2>&-: Python has no sys.stdout then."""
    monkeypatch.setattr(sys, 'stdout', None)
    monkeypatch.setattr(sys, 'stderr', None)
    run_program(lambda: print(file=sys.stderr))
    assert sys.stdout.name == sys.stderr.name == os.devnull


def test_every_program_ends_so():
    for name in ('train', 'sample', 'bench', 'data'):
        assert '\n    run_program(main)\n' in (HOME / f'{name}.py').read_text(encoding='utf-8')

"""The configs keep their word: each changes what it says it changes, and config/README.md has a lesson for each."""

import ast
import functools
import importlib
import itertools
import re
import subprocess
from pathlib import Path

import pytest
from conftest import CONFIGS, RUNS

import train
from configurator import configure
from machine import count_params

HOME = Path(train.__file__).parent
PARENTS = dict(zip(RUNS, [None, 1, 2, 3, 4, 5, 5, 5, 5, 5, 8, 8, 12, 13, 13, 13, *range(16, 23)], strict=True))
PARENTS['best_97m'] = 14
PLACES = {name: f'Run {i}' for i, name in enumerate(RUNS, 1)} | {'best_97m': 'Past the notebook'}

README = (HOME / 'config/README.md').read_text()
SECTIONS = dict(section.split('\n', 1) for section in re.split('^## ', README, flags=re.MULTILINE)[1:])
EXTRA = ('Making tokens', 'Choosing a learning rate')  # the lessons without a config
LESSONS = {heading: text for heading, text in SECTIONS.items() if heading not in EXTRA}


@functools.cache
def settings(*names):
    paths = [str(HOME / f'config/{name}.py') for name in names]
    return vars(configure([train.__file__], paths)[0])


def difference(a, b):
    return {knob for knob in a if a[knob] != b[knob]}


def read_changes(name):
    """A config's first line, its assignments above `# as in ...`, and where it says the others are from."""
    above, _, below = (HOME / f'config/{name}.py').read_text().partition('\n# as in ')
    lines = above.splitlines()
    return lines[0], [line for line in lines if line[:1] not in ('', '#')], below.partition('\n')[0]


def items_of(heading):
    """A lesson's items, {name: text}."""
    return dict(re.findall(r'- \*\*(.+?)\*\* (.+?)(?=\n- \*\*|\Z)', SECTIONS[heading].strip(), re.DOTALL))


@pytest.mark.parametrize('name', [name for name, parent in PARENTS.items() if parent])
def test_a_config_changes_what_it_says(name):
    first, changes, carried_from = read_changes(name)
    parent = PARENTS[name]
    assert first.startswith(f'# {PLACES[name]}: run {parent} ')
    assert carried_from in ('', f'run {parent}')
    assert all(re.fullmatch(r'\w+ = [^#]+  # \S.*', line) for line in changes)
    assert any('  # the change' in line for line in changes)
    knobs = [line.split(' = ')[0] for line in changes]
    assert sorted(knobs) == sorted(difference(settings(name), settings(RUNS[parent - 1])))


def test_the_cpu_overlay_sets_sizes_and_hides_no_difference():
    _, sizes, _ = read_changes('cpu')
    knobs = {line.split(' = ')[0] for line in sizes}
    assert knobs == {'batch_size', 'block_size', 'max_iters', 'log_interval', 'eval_interval'}
    for a, b in itertools.combinations(PLACES, 2):
        different = difference(settings(a), settings(b))
        assert different and different == difference(settings(a, 'cpu'), settings(b, 'cpu')), (a, b)


def test_every_config_has_its_lesson_in_the_order_of_the_runs():
    lessons = {name: f'{place}: {name}' for name, place in PLACES.items()} | {'cpu': 'Overlay: cpu'}
    assert list(LESSONS) == list(lessons.values())
    assert lessons.keys() == set(CONFIGS)


def test_the_list_of_configs_is_that_of_git():
    listed = subprocess.run(['git', 'ls-files', 'config/*.py'], cwd=HOME, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip('no git repository')
    assert {Path(name).stem for name in listed.stdout.split()} == set(CONFIGS)


@pytest.mark.parametrize('heading', LESSONS)
def test_a_lesson(heading):
    name, items = heading.split(': ')[1], items_of(heading)
    assert list(items) == ['Question', 'Change', 'Idea', 'Read', 'What we saw', 'Try']
    changes = [line.split('  # ')[0] for line in read_changes(name)[1]]
    assert re.findall('`(.+?)`', items['Change'].replace('\n  ', ' ')) == changes
    if PARENTS.get(name):
        parent = settings(RUNS[PARENTS[name] - 1])
        before = re.findall(r'`(\w+) = .+?` \(was (.+?)\)', ' '.join(items['Change'].split()))
        assert len(before) == len(changes)
        assert {knob: ast.literal_eval(text) for knob, text in before} == {knob: parent[knob] for knob, _ in before}
        assert items['Change'].startswith(f'From run {PARENTS[name]}: ')
    for count in re.findall(r'([\d,]+) parameters', items['Change']):
        n_params = count_params(configure([train.__file__], [str(HOME / f'config/{name}.py')])[0], 1025)
        assert n_params == int(count.replace(',', ''))
    assert re.fullmatch(r'(`\w+(\.\w+)+`(,\s+)?)+', items['Read'])


def test_the_course_fits_its_page():
    lines = README.splitlines()
    assert len(lines) <= 570 and max(map(len, lines)) <= 120


def test_what_the_course_names_exists():
    for name in re.findall(r'`(\w+(?:\.\w+)+)`', README):
        if not name.endswith('.py') and name.split('.')[0] not in ('torch', 'self'):
            module, *path = name.split('.')
            assert callable(functools.reduce(getattr, path, importlib.import_module(module))), name
    for link in re.findall(r'\]\((.+?)\)', README):
        path, _, anchor = link.partition('#')
        if not link.startswith('https://'):
            page = HOME / 'config' / (path or 'README.md')
            assert page.exists(), link
            headings = re.findall('^#+ (.+)', page.read_text(), re.MULTILINE) if anchor else ()
            anchors = {re.sub(r'[^\w\- ]', '', heading).lower().replace(' ', '-') for heading in headings}
            assert not anchor or anchor in anchors, link


def test_the_commands_of_the_course_are_understood():
    for command in re.findall(r'^ +python (?:train|bench)\.py (.+)', README, re.MULTILINE):
        words = [word for word in command.split() if not word.startswith('--compare')]
        train.check_knobs(configure([train.__file__], words)[0])


@pytest.mark.parametrize('knob', ['activation=swiglu', 'position=learned', 'attention=naive', 'head_gate',
                                  'embedding_norm', 'value_residual', 'exclude_self', 'induction_heads=1'])  # fmt: skip
def test_what_the_pytorch_model_would_ignore_is_refused(knob):
    def check(*flags):
        train.check_knobs(configure([train.__file__], [str(HOME / 'config/sgd.py'), *flags])[0])

    check()
    check(f'--{knob}', '--model=flash')
    with pytest.raises(SystemExit, match=rf"{knob.split('=')[0]} is .*model='torch' ignores") as refusal:
        check(f'--{knob}')
    assert '\n' not in refusal.value.code


@pytest.mark.parametrize(('flag', 'words'), [
    ('--dropout=1', '0 <= dropout < 1.'), ('--ema_decay=1', '0 <= ema_decay < 1.'),
    ('--n_layer=0', '1 <= n_layer < '), ('--seed=9223372036854775808', '0 <= seed < 9.22e'),
    ('--threads=2147483648', '1 <= threads < 1000.'),
    ('--learning_rate=-1', '0 <= learning_rate < '), ('--lr_schedule=linear', "'constant' or 'cosine'"),
    ('--min_lr=1', 'at most the learning_rate, 0.0001'), ('--stop_epoch=0', '1 <= stop_epoch < '),
    ('--stop_epoch=4', 'at most the epochs, 3'),
])  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused(flag, words):
    with pytest.raises(SystemExit, match=f'{flag[2:].partition("=")[0]} is .*, expected {words}') as refusal:
        train.check_knobs(configure([train.__file__], [flag])[0])
    assert '\n' not in refusal.value.code


def test_stopping_after_an_epoch_and_after_steps_exclude_each_other():
    with pytest.raises(SystemExit, match='^stop_epoch is 2 and max_iters is 9: leave one of them out.$'):
        train.check_knobs(configure([train.__file__], ['--stop_epoch=2', '--max_iters=9'])[0])
    train.check_knobs(configure([train.__file__], ['--stop_epoch=2', '--max_iters=0'])[0])  # only describes the run

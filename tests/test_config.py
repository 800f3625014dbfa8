"""The configs keep their word: each changes what it says it changes, and config/README.md has a lesson for each."""

import functools
import importlib
import itertools
import re
import subprocess
from pathlib import Path

import pytest
from conftest import CLIMB, CONFIGS, NOTEBOOK

import train
from configurator import configure

HOME = Path(train.__file__).parent
PARENT_ROWS = [None, 1, 2, 3, 4, 5, 5, 5, 5, 5, 8, 8, 12, 13, 13]

NAMES = {f'row {i}': name for i, name in enumerate(NOTEBOOK, 1)} | {
    f'rung {i}': name for i, name in enumerate(CLIMB, 1)
}
PLACES = {name: place for place, name in NAMES.items()} | {'best_97m': 'past the log'}
PARENTS = {name: f'row {parent}' for name, parent in zip(NOTEBOOK, PARENT_ROWS, strict=True) if parent}
PARENTS |= {name: f'rung {i}' if i else 'row 15' for i, name in enumerate(CLIMB)} | {'best_97m': 'row 14'}

README = (HOME / 'config/README.md').read_text()
LESSONS = dict(section.split('\n', 1) for section in re.split('^## ', README, flags=re.MULTILINE)[1:])


@functools.cache
def settings(*names):
    paths = [str(HOME / f'config/{name}.py') for name in names]
    return vars(configure([train.__file__], paths)[0])


def difference(a, b):
    return {knob for knob in a if a[knob] != b[knob]}


def read_changes(name):
    """A config's headline, its lines of assignments above `# as in ...`, and where it says the others are from."""
    above, _, below = (HOME / f'config/{name}.py').read_text().partition('\n# as in ')
    lines = above.splitlines()
    return lines[0], [line for line in lines if line[:1] not in ('', '#')], below.partition('\n')[0]


@pytest.mark.parametrize('name', PARENTS)
def test_a_config_changes_what_it_says(name):
    headline, changes, carried_from = read_changes(name)
    parent, place = PARENTS[name], PLACES[name].capitalize()
    assert headline.startswith(f'# {place.replace("Rung", "Past the log, rung")}: {parent} ')
    assert carried_from in ('', parent)
    assert all(re.fullmatch(r'\w+ = [^#]+  # \S.*', line) for line in changes)
    assert any('  # the change' in line for line in changes)
    knobs = [line.split(' = ')[0] for line in changes]
    assert sorted(knobs) == sorted(difference(settings(name), settings(NAMES[parent])))


def test_the_cpu_overlay_sets_sizes_and_hides_no_difference():
    _, sizes, _ = read_changes('cpu')
    knobs = {line.split(' = ')[0] for line in sizes}
    assert knobs == {'batch_size', 'block_size', 'max_iters', 'log_interval', 'eval_interval'}
    for a, b in itertools.combinations(PLACES, 2):
        different = difference(settings(a), settings(b))
        assert different and different == difference(settings(a, 'cpu'), settings(b, 'cpu')), (a, b)


def test_every_config_has_its_lesson_in_the_order_of_the_log():
    lessons = {name: f'{place.capitalize()}: {name}' for name, place in PLACES.items()} | {'cpu': 'Overlay: cpu'}
    assert list(LESSONS) == list(lessons.values())
    assert lessons.keys() == set(CONFIGS)


def test_the_list_of_configs_is_that_of_git():
    listed = subprocess.run(['git', 'ls-files', 'config/*.py'], cwd=HOME, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip('no git repository')
    assert {Path(name).stem for name in listed.stdout.split()} == set(CONFIGS)


@pytest.mark.parametrize('heading', LESSONS)
def test_a_lesson(heading):
    lines = [heading, *(line for line in LESSONS[heading].splitlines() if line)]
    assert 5 <= len(lines) <= 12 and max(map(len, lines)) <= 120
    items = dict(re.findall(r'- \*\*(.+?)\*\* (.+?)(?=\n- |\Z)', LESSONS[heading].strip(), re.DOTALL))
    place, name = heading.split(': ')
    assert list(items) == ['Change', 'Code', 'Why', *['The log'] * place.startswith('Row'), 'Here']
    changes = [line.split('  # ')[0] for line in read_changes(name)[1]]
    assert re.findall('`(.+?)`', items['Change']) == changes
    assert re.fullmatch(r'(`\w+(\.\w+)+`(,\s)?)+', items['Code'])
    assert name == 'cpu' or '](../results/README.md)' in items['Here']


def test_what_the_course_names_exists():
    for name in re.findall(r'`(\w+(?:\.\w+)+)`', README):
        if not name.endswith('.py'):
            module, *path = name.split('.')
            assert callable(functools.reduce(getattr, path, importlib.import_module(module))), name
    for link in re.findall(r'\]\((.+?)\)', README):
        assert link.startswith('https://') or (HOME / 'config' / link).exists(), link


@pytest.mark.parametrize('knob', ['activation=swiglu', 'position=learned', 'attention=naive', 'head_gate',
                                  'embedding_norm', 'value_residual'])  # fmt: skip
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

"""Knobs from config files and the command line: a program's settings are the commented assignments at its top.

    python train.py config/swiglu.py config/cpu.py --n_layer=8 --overwrite

Config files apply in order, then the command line. A config file is parsed and never executed: it holds comments,
and assignments of literals or of arithmetic on numbers.
"""

import ast
import contextlib
import difflib
import math
import os
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

ARITHMETIC = (ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)
TYPES = {'bool': bool, 'int': int, 'float': float, 'str': str, 'None': type(None)}
ERRORS = (ValueError, ArithmeticError, RecursionError, MemoryError)  # what a text can do to parser and arithmetic
Knob = namedtuple('Knob', 'default types choices comment')  # types: the names of TYPES that a value may have


def read_knobs(path):
    """The knobs of a program: {name: Knob} of the lower-case literals assigned at the top level of its source. A knob
    has the type of its default, the types of its annotation `int | None`, or its choices: `Literal['a', 'b']`."""
    source = Path(path).read_text(encoding='utf-8')
    knobs = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            annotated, default = isinstance(node, ast.AnnAssign), node.value.value
            name = (node.target if annotated else node.targets[0]).id
            types, choices = [type(default).__name__], ()
            if annotated and isinstance(node.annotation, ast.Subscript):
                choices = ast.literal_eval(node.annotation.slice)
            elif annotated:
                types = ast.unparse(node.annotation).split(' | ')
            if name.islower():
                comment = source.splitlines()[node.lineno - 1].partition('  # ')[2]
                knobs[name] = Knob(default, types, choices, comment)
    return knobs


def evaluate(node):
    """The value of a literal, or of + - * / // on numbers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in TYPES.values():
        return node.value
    for part in ast.walk(node):
        if not isinstance(part, ARITHMETIC) or isinstance(part, ast.Constant) and type(part.value) not in (int, float):
            raise ValueError('expected a literal, or + - * / on numbers')
    return eval(compile(ast.Expression(node), 'config', 'eval'))  # numbers and signs, nothing else


def check(name, value, knobs):
    """The value as its knob's type; ValueError if there is no such knob or the value is of another type."""
    if name not in knobs:
        close = difflib.get_close_matches(name, knobs, n=1)
        hint = f'did you mean {close[0]}?' if close else 'see --help for all of them.'
        raise ValueError(f'there is no knob {name!r:.60}; {hint}')
    types, choices = knobs[name].types, knobs[name].choices
    if type(value) is int and 'float' in types and 'int' not in types:
        value = float(value)
    if type(value) not in [TYPES[t] for t in types] or isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{name} is {value!r:.60}, expected {" or ".join(types)}')
    if choices and value not in choices:
        raise ValueError(f'{name} is {value!r:.60}, expected one of: {", ".join(choices)}')
    return value


def read_config(path, knobs):
    """The assignments of a config file, checked: {name: value}. Exits with file and line at the first that fails."""
    values, line = {}, 1
    try:
        for node in ast.parse(Path(path).read_text(encoding='utf-8-sig')).body:
            line = node.lineno
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                values[name] = check(name, evaluate(node.value), knobs)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                raise ValueError('a config file holds only assignments, name = value; nothing in it was run')
    except FileNotFoundError:
        there = sorted(str(p) for p in Path(path).parent.glob('*.py'))
        close = difflib.get_close_matches(str(path), there, n=1)
        hint = f'did you mean {close[0]}?' if close else f'there are: {", ".join(there) or "no .py files"}.'
        sys.exit(f'{path}: no such config file; {hint}')
    except OSError as error:
        sys.exit(f'{path}: cannot be read as a config file: {error.strerror}.')
    except SyntaxError as error:
        sys.exit(f'{path}:{error.lineno or line}: not valid Python: {error.msg}.')
    except ERRORS as error:
        sys.exit(f'{path}:{line}: {str(error).rstrip(".") or type(error).__name__}.')
    return values


def find_config(path, program):
    """The path of a config file: as it is, or beside the program, or the name of one in its config/."""
    home = Path(program).parent
    places = (Path(path).expanduser(), home / path, home / 'config' / f'{path}.py')
    named = path if path.endswith('.py') else str(places[-1])  # the error then lists its neighbours
    return next((str(place) for place in places if place.is_file()), named)


def read_flag(flag, knobs):
    """One --key=value, checked: {key: value}. --key alone means True; text needs no quotes and may hold '='."""
    name, equals, text = flag.removeprefix('--').partition('=')
    types = knobs[name].types if name in knobs else ['bool']
    if not equals and 'bool' not in types:
        sys.exit(f'{flag}: a value is missing; write --{name}=VALUE.')
    value = text if equals else True
    if equals and ('str' not in types or text == 'None' and 'None' in types):
        with contextlib.suppress(SyntaxError, *ERRORS):  # the value stays text, and check() says what it expected
            value = evaluate(ast.parse(text.strip(), mode='eval').body)
    try:
        return {name: check(name, value, knobs)}
    except ERRORS as error:
        sys.exit(f'command line: {error}')


def configure(programs, arguments):
    """A program's settings from its arguments: (namespace of all knobs, list of the config files). `programs` are the
    source files whose knobs count. --help prints the knobs and exits."""
    knobs = {name: knob for path in programs for name, knob in read_knobs(path).items()}
    if '--help' in arguments or '-h' in arguments:
        print(f'usage: python {Path(programs[0]).name} [CONFIG.py ...] [--KNOB=VALUE ...]\n')
        for name, knob in knobs.items():
            choices = f'{", ".join(knob.choices)}. ' if knob.choices else ''
            print(f'  --{name}={knob.default}'.ljust(36), choices + knob.comment)
        sys.exit(0)
    flags = [read_flag(a, knobs) for a in arguments if a.startswith('-')]
    files = [find_config(a, programs[-1]) for a in arguments if not a.startswith('-')]
    values = {name: knob.default for name, knob in knobs.items()}
    for given in (*(read_config(path, knobs) for path in files), *flags):
        values |= given
    return SimpleNamespace(**values), files


def run_program(main):
    """Run a program's main. Ctrl-C, or a reader of its output that leaves, ends it without a traceback; a character
    that the output's encoding lacks is replaced."""
    sys.stdout.reconfigure(errors='replace')
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python itself writes what is left at its end
        sys.exit(141)

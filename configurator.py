"""Knobs from config files and the command line: a program's settings are the commented assignments at its top.

    python train.py config/swiglu.py config/cpu.py --learning_rate=3e-4 --overwrite

Config files apply in order, then the command line; both go through the same checks. A config file holds
assignments of literals, or arithmetic on numbers, and comments. It is parsed, never executed.
"""

import ast
import contextlib
import difflib
import io
import math
import operator
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
TYPES = {'bool': bool, 'int': int, 'float': float, 'str': str, 'None': type(None)}
ERRORS = (ValueError, ArithmeticError, RecursionError, MemoryError)  # what a text can do to parser and arithmetic


class Knob(NamedTuple):
    default: object
    types: list  # names of TYPES that a value may have
    comment: str


def read_knobs(path):
    """The knobs of a program: {name: Knob} of the lower-case literals assigned at the top level of its source.

    A knob has the type of its default, or the types that its annotation lists (`int | None`).
    """
    source = Path(path).read_text(encoding='utf-8')
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.strip('# ') for t in tokens if t.type == tokenize.COMMENT}
    knobs = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            annotated = isinstance(node, ast.AnnAssign)
            name = node.target.id if annotated else node.targets[0].id
            default = node.value.value
            types = ast.unparse(node.annotation).split(' | ') if annotated else [type(default).__name__]
            if name.islower():
                knobs[name] = Knob(default, types, comments.get(node.lineno, ''))
    return knobs


def evaluate(node):
    """The value of a literal, or of arithmetic on numbers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in TYPES.values():
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](number(node.left), number(node.right))
    raise ValueError('expected a literal, or + - * / on numbers')


def number(node):
    value = evaluate(node)
    if type(value) not in (int, float):
        raise ValueError(f'no arithmetic on {value!r:.60}')
    return value


def check(name, value, knobs):
    """The value as its knob's type; ValueError if there is no such knob or the value is of another type."""
    if name not in knobs:
        close = difflib.get_close_matches(name, knobs, n=1)
        hint = f'did you mean {close[0]}?' if close else 'see --help for all of them.'
        raise ValueError(f'there is no knob {name!r:.60}; {hint}')
    types = knobs[name].types
    if type(value) is int and 'float' in types and 'int' not in types:
        value = float(value)
    if type(value) not in [TYPES[t] for t in types] or isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'{name} is {value!r:.60}, expected {" or ".join(types)}')
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
        sys.exit(f'{path}:{line}: {error or type(error).__name__}.')
    return values


def read_flag(argument, knobs):
    """One --key=value as {key: value}, checked. --key alone is True; text needs no quotes and may hold '='."""
    name, equals, text = argument.removeprefix('--').partition('=')
    types = knobs[name].types if name in knobs else ['bool']
    if not equals and 'bool' not in types:
        sys.exit(f'{argument}: a value is missing; write --{name}=VALUE.')
    value = text if equals else True
    if equals and ('str' not in types or text == 'None' and 'None' in types):
        with contextlib.suppress(SyntaxError, *ERRORS):  # it stays text, and check() says what was expected
            value = evaluate(ast.parse(text.strip(), mode='eval').body)
    try:
        return {name: check(name, value, knobs)}
    except ERRORS as error:
        sys.exit(f'command line: {error}')


def configure(programs, arguments):
    """A program's settings from its arguments: (namespace of all knobs, list of the config files named).

    programs: the source files whose knobs count, `__file__` for one's own. --help prints them and exits.
    """
    knobs = {name: knob for path in programs for name, knob in read_knobs(path).items()}
    if '--help' in arguments or '-h' in arguments:
        print(f'usage: python {Path(programs[0]).name} [CONFIG.py ...] [--KNOB=VALUE ...]\n')
        for name, knob in knobs.items():
            print(f'  --{name}={knob.default}'.ljust(36), knob.comment)
        sys.exit(0)
    values, from_flags = {name: knob.default for name, knob in knobs.items()}, {}
    for flag in (a for a in arguments if a.startswith('-')):
        from_flags |= read_flag(flag, knobs)
    files = [a for a in arguments if not a.startswith('-')]
    for path in files:
        values |= read_config(path, knobs)
    return SimpleNamespace(**values | from_flags), files

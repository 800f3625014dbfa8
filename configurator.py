"""Knobs from config files and the command line: a program's settings are the commented assignments at its top.

    python train.py config/swiglu.py config/cpu.py --learning_rate=3e-4 --overwrite

Config files apply in order, then the command line; both go through the same checks. A config file holds
assignments of literals, or arithmetic on numbers, and comments. It is parsed, never executed.
"""

import ast
import difflib
import io
import math
import operator
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
TYPES = {'bool': bool, 'int': int, 'float': float, 'str': str, 'None': type(None)}


@dataclass
class Knob:
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
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, ast.Constant):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if not target.id.islower():
            continue
        default = node.value.value
        annotated = isinstance(node, ast.AnnAssign)
        types = ast.unparse(node.annotation).split(' | ') if annotated else [type(default).__name__]
        knobs[target.id] = Knob(default, types, comments.get(node.lineno, ''))
    return knobs


def evaluate(node):
    """The value of a literal, or of arithmetic on numbers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in TYPES.values():
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -number(evaluate(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        return ARITHMETIC[type(node.op)](number(evaluate(node.left)), number(evaluate(node.right)))
    raise ValueError('expected a literal, or + - * / on numbers')


def number(value):
    if type(value) not in (int, float):
        raise ValueError(f'no arithmetic on {value!r}')
    return value


def check(where, name, value, knobs):
    """The value as its knob's type; exits with one line if there is no such knob or the value is of another type."""
    if name not in knobs:
        close = difflib.get_close_matches(name, knobs, n=1)
        hint = f'did you mean {close[0]}?' if close else 'see --help for all of them.'
        sys.exit(f'{where}: there is no knob {name!r}; {hint}')
    types = knobs[name].types
    if type(value) is int and 'float' in types and 'int' not in types and abs(value) < 2**53:
        value = float(value)
    if type(value) not in [TYPES[t] for t in types] or isinstance(value, float) and not math.isfinite(value):
        sys.exit(f'{where}: {name} is {shorten(value)}, expected {" or ".join(types)}.')
    return value


def shorten(value):
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**60 else 'a number of over 60 digits'
    return text if len(text) < 80 else text[:77] + '...'


def read_config(path, knobs):
    """The assignments of a config file, checked: {name: value}."""
    try:
        body = ast.parse(Path(path).read_text(encoding='utf-8')).body
    except FileNotFoundError:
        there = sorted(str(p) for p in Path(path).parent.glob('*.py'))
        close = difflib.get_close_matches(str(path), there, n=1)
        hint = f'did you mean {close[0]}?' if close else f'there are: {", ".join(there) or "no .py files"}.'
        sys.exit(f'{path}: no such config file; {hint}')
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f'{path}: cannot be read as a config file: {error}')
    except SyntaxError as error:
        sys.exit(f'{path}:{error.lineno or 1}: not valid Python: {error.msg}.')
    except (ValueError, RecursionError, MemoryError) as error:
        sys.exit(f'{path}: not valid Python: {error or type(error).__name__}.')
    values = {}
    for node in body:
        where = f'{path}:{node.lineno}'
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            continue  # a docstring
        if not isinstance(node, ast.Assign) or len(node.targets) > 1 or not isinstance(node.targets[0], ast.Name):
            sys.exit(f'{where}: a config file holds only assignments, name = value; nothing in it was run.')
        name = node.targets[0].id
        values[name] = check(where, name, evaluate_or_exit(f'{where}: {name}', node.value), knobs)
    return values


def evaluate_or_exit(where, node):
    try:
        return evaluate(node)
    except (ValueError, ArithmeticError, RecursionError) as error:
        sys.exit(f'{where}: {error or type(error).__name__}; nothing was run.')


def read_flag(argument, knobs):
    """One --key=value as (key, value), checked. --key alone is True; text needs no quotes and may hold '='."""
    name, equals, text = argument.removeprefix('--').partition('=')
    types = knobs[name].types if name in knobs else []
    if not equals and types and types != ['bool']:
        sys.exit(f'{argument}: a value is missing; write --{name}=VALUE.')
    if not equals:
        value = True
    elif 'str' in types and not (text == 'None' and 'None' in types):
        value = text
    else:
        try:
            value = evaluate(ast.parse(text.strip(), mode='eval').body)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            value = text  # of no type that the knob takes: check() says which it does
    return name, check('command line', name, value, knobs)


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
    flags = [a for a in arguments if a.startswith('-')]
    files = [a for a in arguments if not a.startswith('-')]
    values = {name: knob.default for name, knob in knobs.items()}
    for path in files:
        values |= read_config(path, knobs)
    values |= dict(read_flag(flag, knobs) for flag in flags)
    return SimpleNamespace(**values), files

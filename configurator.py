"""Knobs from config files and the command line: a program's settings are the commented assignments at its top.

    python train.py config/swiglu.py config/cpu.py --n_layer=8 --overwrite

Config files apply in order, then the command line. A config file is read, not run: it holds comments, and assignments
of literals or of arithmetic on numbers.
"""

import ast
import contextlib
import difflib
import math
import os
import re
import sys
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Literal, get_args

LITERALS = (bool, int, float, str, NoneType)
ARITHMETIC = (ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)
ERRORS = (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError)  # what a text can do to a parser


def read_knobs(program):
    """The knobs of a program, the lower-case literals at its top level, read from its source: {name: (default, allowed,
    comment)}. A knob may have the type of its default, or the types or choices of its annotation: `int | None`,
    `Literal['a', 'b']`."""
    source, knobs = Path(program).read_text(encoding='utf-8'), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            annotated, default = isinstance(node, ast.AnnAssign), node.value.value
            name = (node.target if annotated else node.targets[0]).id
            kind = eval(ast.unparse(node.annotation), {'Literal': Literal}) if annotated else type(default)
            if name.islower():
                comment = source.splitlines()[node.lineno - 1].partition('  # ')[2]
                knobs[name] = default, get_args(kind) or (kind,), comment
    return knobs


def evaluate(node):
    """The value of a literal, or of + - * / // on numbers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in LITERALS:
        return node.value
    for part in ast.walk(node):
        if not isinstance(part, ARITHMETIC) or isinstance(part, ast.Constant) and type(part.value) not in (int, float):
            raise ValueError('expected a literal, or + - * / on numbers')
    return eval(compile(ast.Expression(node), 'config', 'eval'))  # numbers and signs, nothing else


def closest(name, names, otherwise):
    """What to try in place of a name that does not exist."""
    close = difflib.get_close_matches(name, names, n=1)
    return f'did you mean {close[0]}?' if close else otherwise


def check(name, value, knobs):
    """The value as its knob's type; ValueError if there is no such knob, or it may not be this."""
    if name not in knobs:
        raise ValueError(f'there is no knob {name!r:.60}; {closest(name, knobs, "see --help for all of them.")}')
    _, allowed, _ = knobs[name]
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if not (value in allowed or type(value) in allowed) or isinstance(value, float) and not math.isfinite(value):
        expected = ' or '.join(getattr(one, '__name__', repr(one)) for one in allowed).replace('NoneType', 'None')
        raise ValueError(f'{name} is {value!r:.60}, expected {expected}')
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
        others = f'there are: {", ".join(there) or "no .py files"}.'
        sys.exit(f'{path}: no such config file; {closest(path, there, others)}')
    except ERRORS as error:
        line, reason = getattr(error, 'lineno', None) or line, getattr(error, 'msg', '') or str(error)
        sys.exit(f'{path}:{line}: {reason.rstrip(".") or type(error).__name__}.')
    return values


def find_config(path, program):
    """The path of a config file: as it is, or beside the program, or the name of one in its config/."""
    home = Path(program).parent
    places = (Path(os.path.expanduser(path)), home / path, home / 'config' / f'{path}.py')
    named = path if path.endswith('.py') else str(places[-1])  # the error then lists its neighbours
    return next((str(place) for place in places if place.is_file()), named)


def read_flag(flag, knobs):
    """One --key=value, checked: {key: value}. --key alone means True; text needs no quotes and may hold '='."""
    name, equals, text = flag.removeprefix('--').partition('=')
    _, allowed, _ = knobs.get(name, (None, (bool,), ''))
    if not equals and bool not in allowed:
        sys.exit(f'{flag}: a value is missing; write --{name}=VALUE.')
    value = text if equals else True
    if equals and (not {str, text} & {*allowed} or text == 'None' and NoneType in allowed):
        with contextlib.suppress(*ERRORS):  # the value stays text, and check() says what it expected
            value = evaluate(ast.parse(text.strip(), mode='eval').body)
    try:
        return {name: check(name, value, knobs)}
    except ERRORS as error:
        sys.exit(f'command line: {error}')


def configure(programs, arguments):
    """A program's settings from its arguments: (namespace of all knobs, list of the config files). `programs` are the
    source files whose knobs count, the last of them beside config/. --help prints the knobs and exits."""
    knobs = {name: knob for program in programs for name, knob in read_knobs(program).items()}
    if '--help' in arguments or '-h' in arguments:
        program, home = Path(programs[0]), Path(programs[-1]).parent  # those in results/ are started from home
        name = program.name if program.parent == home else f'-m {program.parent.name}.{program.stem}'
        print(f'usage: python {name} [CONFIG.py ...] [--KNOB=VALUE ...]\n')
        for name, (default, allowed, comment) in knobs.items():
            choices = f'{", ".join(allowed)}. ' if isinstance(allowed[0], str) else ''
            print(f'  --{name}={default}'.ljust(36), choices + comment)
        sys.exit(0)
    flags = [read_flag(a, knobs) for a in arguments if a.startswith('-')]
    files = [find_config(a, programs[-1]) for a in arguments if not a.startswith('-')]
    values = {name: default for name, (default, _, _) in knobs.items()}
    for given in (*(read_config(path, knobs) for path in files), *flags):
        values |= given
    return SimpleNamespace(**values), files


def run_program(main):
    """Run a program's main. Ctrl-C, a reader of its output that leaves, a file's error or full memory end it without a
    traceback. A character that the output's encoding lacks is replaced."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, 'w', encoding='utf-8'))
    sys.stdout.reconfigure(errors='replace')
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python itself writes what is left at its end
        sys.exit(141)
    except OSError as error:
        sys.exit(str(error) or repr(error))
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is one; on a CPU torch has none of its own
        if isinstance(error, RuntimeError) and not re.search('out of memory|allocate|overflow', str(error)):
            raise
        sys.exit('out of memory: in training a lower --batch_size takes less, and so do more '
                 '--gradient_accumulation_steps, for the same update.')  # fmt: skip

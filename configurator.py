"""Read a program's knobs, the commented assignments at its top, from config files and the command line.

    python train.py config/swiglu.py config/cpu.py --n_layer=8 --overwrite

Config files apply in order, then the command line, where --n_layer 8 will do, too. A config is parsed, never executed.
`describe` says in words what a config trains.
"""

import ast
import contextlib
import difflib
import math
import os
import sys
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Literal, get_args

ARITHMETIC = (ast.Constant, ast.UnaryOp, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv)
ERRORS = (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError)  # what parsing a text can raise


def configure(programs, arguments=None, operands='[CONFIG.py ...]'):
    """A program's settings: (namespace of all knobs, list of the config files). `programs` are the source files whose
    knobs count; config/ lies beside the last. Without arguments it reads the command line, and makes each flag one
    word in sys.argv. --help prints the knobs, after what the program takes (operands), and exits."""
    knobs = {name: knob for program in programs for name, knob in read_knobs(program).items()}
    words = sys.argv if arguments is None else ['', *arguments]
    join_flags(words, knobs)
    arguments = words[1:]
    if '--help' in arguments or '-h' in arguments:
        program, home = Path(programs[0]), Path(programs[-1]).parent  # programs in results/ are started from home
        name = program.name if program.parent == home else f'-m {program.parent.name}.{program.stem}'
        print(f'usage: python {name} {operands} [--KNOB=VALUE ...]\n')
        for name, (default, allowed, comment) in knobs.items():
            choices = f'{", ".join(allowed)}. ' if isinstance(allowed[0], str) else ''
            print(f'  --{name}={default}'.ljust(36), choices + comment)
        sys.exit(0)
    flags = dict(read_flag(a, knobs) for a in arguments if a.startswith('-'))
    files = [find_config(a, programs[-1]) for a in arguments if not a.startswith('-')]
    values = {name: default for name, (default, _, _) in knobs.items()}
    for path in files:
        values |= read_config(path, knobs)
    return SimpleNamespace(**values | flags), files


def join_flags(words, knobs):
    """Make `--key value` in a command's words one, `--key=value`; a switch's value can only be True, False or None."""
    for i in reversed(range(1, len(words) - 1)):
        flag, word = words[i : i + 2]
        _, allowed, _ = knobs.get(flag[2:] if flag.startswith('--') else '', (None, (), ''))
        if word in ('True', 'False', 'None') if bool in allowed else allowed and not word.startswith('--'):
            words[i : i + 2] = [f'{flag}={word}']


def read_knobs(program):
    """The literals with lower-case names at the top of a source file: {name: (default, what is allowed, comment)}.
    An annotation like `int | None` or `Literal['a', 'b']` says what is allowed; otherwise the default's type is."""
    source = Path(program).read_text(encoding='utf-8')
    knobs = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Constant):
            assignment, _, comment = source.splitlines()[node.lineno - 1].partition('  # ')
            name = assignment.replace(':', ' ').split()[0]
            annotation = getattr(node, 'annotation', None)
            kind = eval(ast.unparse(annotation), {'Literal': Literal}) if annotation else type(node.value.value)
            if name.islower():
                knobs[name] = node.value.value, get_args(kind) or (kind,), comment
    return knobs


def find_config(path, program):
    """The path of a config file: as given, beside the program, or by its name in config/; read_config may refuse it."""
    home = Path(program).parent
    names = [path, f'{path}.py'] if '/' in path else [path]
    places = [Path(os.path.expanduser(path)), *(home / name for name in names)]
    places += [home / 'config' / path, home / 'config' / f'{path}.py']
    nearest = path if path.endswith('.py') else str(home / 'config' / f'{Path(path).stem}.py')
    if places[0].is_dir() and not any(place.is_file() for place in places):
        sys.exit(f'{path or repr(path)} is a folder, expected a config file; a run is named by --out_dir={path}.')
    return next((str(place) for place in places if place.is_file()), nearest)


def read_config(path, knobs):
    """The assignments of a config file, checked: {name: value}. Exits with file and line at the first error."""
    values, line = {}, 1
    try:
        for node in ast.parse(Path(path).read_text(encoding='utf-8-sig')).body:
            line = node.lineno
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                values[name] = check(name, evaluate(node.value), knobs)
            elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                raise ValueError('a config file holds only assignments, name = value; nothing in it was run.')
    except FileNotFoundError:
        others = sorted(map(str, Path(path).parent.glob('*.py')))
        there_are = f'there are: {", ".join(others) or "no .py files"}.'
        sys.exit(f'{path}: no such config file; {closest(Path(path).stem, others, there_are)}')
    except ERRORS as error:
        reason = getattr(error, 'msg', '') or str(error) or type(error).__name__
        sys.exit(f'{path}:{getattr(error, "lineno", None) or line}: {reason}')
    return values


def read_flag(flag, knobs):
    """One --key=value, checked: (key, value). --key alone means True. Text needs no quotes and may contain '='."""
    name, equals, text = flag.removeprefix('--').partition('=')
    _, allowed, _ = knobs.get(name, (None, (bool,), ''))
    if not equals and bool not in allowed:
        sys.exit(f'{flag}: a value is missing; write --{name}=VALUE.')
    value = text if equals else True
    if equals and (not {str, text} & {*allowed} or text == 'None' and NoneType in allowed):
        with contextlib.suppress(*ERRORS):  # the value stays text, and check() says what it expected
            value = evaluate(ast.parse(text.strip(), mode='eval').body)
    try:
        return name, check(name, value, knobs)
    except ERRORS as error:
        sys.exit(f'command line: {error}')


def evaluate(node):
    """The value of a literal, or of + - * / // on numbers; ValueError for anything else."""
    is_literal = isinstance(node, ast.Constant) and type(node.value) in (bool, str, NoneType)
    parts = [] if is_literal else ast.walk(node)
    if not all(isinstance(part, ARITHMETIC) and type(getattr(part, 'value', 0)) in (int, float) for part in parts):
        raise ValueError('expected a literal, or + - * / on numbers.')
    return eval(compile(ast.Expression(node), 'config', 'eval'))  # safe: it holds nothing but numbers and their signs


def check(name, value, knobs):
    """The value, an int as a float where its knob is one; ValueError if there is no such knob, or it cannot be this."""
    if name not in knobs:
        raise ValueError(f'there is no knob {name!r:.60}; {closest(name, knobs, "see --help for all of them.")}')
    _, allowed, _ = knobs[name]
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if not (value in allowed or type(value) in allowed) or isinstance(value, float) and not math.isfinite(value):
        expected = ' or '.join(getattr(one, '__name__', repr(one)) for one in allowed).replace('NoneType', 'None')
        raise ValueError(f'{name} is {value!r:.60}, expected {expected}.')
    low, high = 0, 1 if name in ('dropout', 'ema_decay') else math.inf
    if type(value) is int:
        low = 0 if name in ('seed', 'warmup_iters', 'max_iters', 'induction_heads') else 1
        high = 1000 if name == 'threads' else 2**63
    if type(value) in (int, float) and not low <= value < high:
        high = high if high < 2**63 else f'{high:.3g}'
        raise ValueError(f'{name} is {value}, expected {low} <= {name} < {high}.')
    return value


def closest(name, names, otherwise):
    """What to suggest for a name that does not exist: one that starts with it, or else a similar one."""
    stems = {Path(one).stem: one for one in names}
    close = [one for one in stems if name and one.startswith(name)] or difflib.get_close_matches(name, stems, n=1)
    return f'did you mean {stems[close[0]]}?' if close else otherwise


def describe(config, n_params):
    """A training run in words, as the notebook names its runs. n_params: the number of its parameters."""
    kind = {'flash': '(flash attention) ', 'torch': ''}[config.model]
    optimizer = {'sgd': 'SGD', 'adamw': 'Adam', 'muon': 'Muon'}[config.optimizer]
    rate = min(float(f'{config.learning_rate * config.learning_rate_scale:.6g}'), sys.float_info.max)
    digits, exponent = f'{rate:e}'.split('e')
    rate = rate if rate >= 0.01 else f'{float(digits):g}e{int(exponent)}'
    schedule = 'cosine learning rate schedule ' if config.lr_schedule == 'cosine' else ''
    schedule += 'with warmup' if config.warmup_iters else ''
    words = [
        (True, f'{config.n_layer} layer {kind}transformer ({n_params} parameters)'),
        (config.activation == 'swiglu', 'swiglu activation'),
        (config.d_ff >= 2 * config.n_embd, f'model width {config.d_ff}'),  # the notebook names no other width
        (config.model == 'flash', f'{config.position} position embeddings'),
        (config.embedding_norm, 'embedding norm'), (config.head_gate, 'head gates'),
        (config.value_residual, 'value residual'), (config.exclude_self, 'attention to earlier tokens only'),
        (config.induction_heads, f'{config.induction_heads} induction heads'),
        (True, f'batch size {config.batch_size}, {optimizer} learning rate {rate}, dropout {config.dropout}'),
        (config.weight_decay, f'weight decay {config.weight_decay}'),
        (schedule, schedule.strip()), (config.ema_decay, 'ema'),
    ]  # fmt: skip
    return ', '.join(text for is_so, text in words if is_so)

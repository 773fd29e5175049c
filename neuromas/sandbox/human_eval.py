"""Programs and tests of HumanEval, HumanEval+ and MBPP: the tests take only the tested names from the program."""

import ast
import warnings
from collections.abc import Sequence

from neuromas.sandbox import Program

_PLUS_TESTS = """
import copy

inf, nan = float("inf"), float("nan")
gold = {{"__name__": "gold"}}
exec({gold!r}, gold)

def is_float(value):
    return isinstance(value, float) or (isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_float, value)))

def same(got, expected, tolerance):
    if got == expected:
        return True
    if isinstance(expected, (list, tuple)) and is_float(expected):
        return type(got) is type(expected) and len(got) == len(expected) and all(map(same, got, expected, [tolerance] *
        len(got)))
    if not is_float(expected) or type(got) not in (int, float):
        return False
    if expected in (inf, -inf):
        # Only itself is near, and every tolerance of it is infinite.
        return False
    return (got != got and expected != expected) or abs(got - expected) <= (tolerance or 1e-6) + 1e-7 * abs(expected)

for arguments in {inputs}:
    got = candidate(*copy.deepcopy(arguments))
"""
_COMPARE = "    assert same(got, gold[{entry_point!r}](*copy.deepcopy(arguments)), {tolerance!r}), arguments\n"
# A root is not unique: HumanEval/32 checks that the answer is one.
_COMPARE_ROOT = '    assert abs(gold["poly"](arguments[0], got)) <= {tolerance!r}, arguments\n'


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> Program:
    """Return a completion of a HumanEval prompt with its tests.

    Three of the tests call helpers that the prompt defines besides the function (`poly`, `encode_cyclic`, `encode_shift`).
    They get the prompt's: otherwise a completion that redefines `encode_shift` as the identity would pass with the identity as
    `decode_shift`.
    """
    helpers = [node for node in _parse(f"{prompt}\n    pass\n").body if getattr(node, "name", None) != entry_point]
    given = {node.name for node in helpers if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used = {node.id for node in ast.walk(_parse(test)) if isinstance(node, ast.Name)}
    preamble = "\n".join(map(ast.unparse, helpers)) if given & used else ""
    return Program(prompt + completion, f"{preamble}\n{test}\ncheck({entry_point})\n", entry_point)


def humaneval_plus_program(
    prompt: str,
    completion: str,
    canonical_solution: str,
    entry_point: str,
    inputs: Sequence[Sequence[object]],
    tolerance: float | int,
) -> Program:
    """Return a completion with the inputs of HumanEval+; the canonical solution computes the expected results in the tests."""
    tests = _PLUS_TESTS.format(gold=prompt + canonical_solution, inputs=repr(list(inputs)))
    compare = _COMPARE_ROOT if entry_point == "find_zero" else _COMPARE
    return Program(prompt + completion, tests + compare.format(entry_point=entry_point, tolerance=tolerance), entry_point)


def mbpp_program(code: str, gold: str, test_list: Sequence[str], test_setup_code: str = "") -> Program:
    """Return code for an MBPP task with its tests. They take the names that the gold program defines and that they use.

    The tests of one task (596) use `sys`, which only its gold program imports: such imports are added to the tests.
    """
    tests = "\n".join([test_setup_code.replace("\r\n", "\n"), *test_list])
    named = {node.id for node in ast.walk(_parse(tests)) if isinstance(node, ast.Name)}
    statements = _parse(gold).body
    imports = [
        ast.unparse(node)
        for node in statements
        if isinstance(node, (ast.Import, ast.ImportFrom)) and named & {alias.asname or alias.name for alias in node.names}
    ]
    defined = [node for node in statements if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in named]
    functions = [node.name for node in defined if isinstance(node, ast.FunctionDef)]
    if not functions:
        raise ValueError(f"the tests call no function that the gold program defines: {test_list!r}")
    names = dict.fromkeys([*functions, *(node.name for node in defined)])
    entry_point, *helpers = names
    return Program(code, "\n".join([*imports, tests]), entry_point, tuple(helpers))


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        # Gold programs write "\\w" where they mean r"\\w".
        warnings.simplefilter("ignore")
        return ast.parse(text)

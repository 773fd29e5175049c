"""The code reward: right programs pass, wrong ones fail, and no program gets paid or gets out by force."""

import ctypes
import math
import mmap
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacks import HONEST, TESTS
from paths import ROOT
from sandboxes import adopt_orphans, available, children, newcomers

from neuromas.sandbox import Limits, Outcome, Program, Sandbox, Status, check_programs, choose_isolation
from neuromas.sandbox.confine import syscall_filter
from neuromas.sandbox.files import copy_into_memory
from neuromas.sandbox.human_eval import mbpp_program
from neuromas.sandbox.isolation import ISOLATIONS, Bubblewrap
from neuromas.sandbox.wire import TooLongError, decode, encode, read_frame

if not any(map(available, ISOLATIONS)):
    pytest.skip("no isolation on this machine", allow_module_level=True)


@pytest.fixture(scope="module", params=ISOLATIONS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    if not available(request.param):
        pytest.skip(f"{request.param} does not work here")
    with Sandbox(workers=2, isolation=request.param) as sandbox:
        yield sandbox


def run(sandbox: Sandbox, source: str, tests: str, *helpers: str) -> Outcome:
    (outcome,) = sandbox.check([Program(source, tests, "f", helpers)])
    return outcome


# What crosses between a program and its tests


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 255, -128, 1 << 200, -(1 << 200), 0.0, -0.0, 1e-300, math.inf, 1 + 2j, "",
        "a\0é\ud800", b"\0\xff",
        bytearray(b"ab"), range(7, -1, -2), slice(1, None), [*range(99)], (*range(99), 1 << 63), [True] * 99,
        (0.5,) * 99, frozenset(range(99)),
        [], [1, [2, (3,)]], (), {1, 2}, frozenset({3}), {}, {"a": [1], (1, 2): {3: None}}, int, [str, type(None)],
    ],
)  # fmt: skip
def test_plain_data_survives_the_wire(value: object) -> None:
    got = decode(encode(value))
    assert got == value
    assert type(got) is type(value)
    assert repr(got) == repr(value)


def test_nan_survives_the_wire() -> None:
    got = decode(encode(math.nan))
    assert isinstance(got, float)
    assert math.isnan(got)


def test_subclasses_are_sent_as_what_they_extend() -> None:
    class Odd(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    got = decode(encode(Odd(3)))
    assert got == 3
    assert type(got) is int


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "bytes end before the value"), (b"N" b"N", "1 bytes after the value"), (b"q\0\0\0\0", "unknown tag"),
        (b"l\xff\xff\xff\xff", "announced"),
        (b"s\5\0\0\0ab", "announced"), (b"h\0\0\0\0", "where plain data was expected"),
        (b"i\1\0\0", "unpack"), (b"f123", "unpack"),
        (b"e\1\0\0\0l\0\0\0\0", "unhashable"),
        (b"Il\2\0\0\0" + b"1" * 15, "2 numbers"),
        (b"Iq\0\0\0\0", "q"), (b"rNNN", "integer"),
        (b"ri\1\0\0\0\0", "bytes end before the value"), (b"s\1\0\0\0\xff", "decode"), (b"y\4\0\0\0eval", "eval"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_value_raise(data: bytes, message: str) -> None:
    with pytest.raises(Exception, match=message):
        decode(data)


def test_a_frame_too_long_is_not_read() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"\5\0\0\0abcde" * 2)
    assert read_frame(reading, 5) == b"abcde"
    with pytest.raises(TooLongError, match="5 bytes announced, 4 allowed"):
        read_frame(reading, 4)
    os.close(reading)
    os.close(writing)


def test_what_is_not_plain_data_needs_a_handle() -> None:
    with pytest.raises(TypeError, match="only plain data can be passed to the program, got 'object'"):
        encode(object())
    assert decode(encode([len], lambda _: 7), lambda number: ("handle", number)) == [("handle", 7)]


# Programs and their outcomes


def test_right_programs_pass_and_wrong_ones_fail_in_order(sandbox: Sandbox) -> None:
    sources = [HONEST, HONEST.replace("+", "-"), HONEST, "def solve(a, b): return 5", HONEST.replace("a + b", "b + a")] * 3
    outcomes = sandbox.check([Program(source, TESTS, "solve") for source in sources])
    assert [outcome.passed for outcome in outcomes] == [True, False, True, False, False] * 3
    assert {outcome.isolation for outcome in outcomes} == {sandbox.isolation}
    assert outcomes[0].detail == ""
    assert outcomes[1].detail == "AssertionError: -1 (line 3 of the tests)"


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("def f(x:", Status.INVALID, "SyntaxError"),
        ("1 / 0", Status.INVALID, "ZeroDivisionError: division by zero"),
        ("import numpy\ndef f(x): return 1", Status.INVALID, "ModuleNotFoundError"),
        ("def g(x): return 1", Status.FAILED, "AttributeError"),
        ("f = 1", Status.FAILED, "TypeError: 'int' object is not callable"),
        ("def f(x): return 1 / 0", Status.FAILED, "ZeroDivisionError: division by zero (line 1 of the tests)"),
        ("", Status.FAILED, "AttributeError"),
    ],
)
def test_programs_that_do_not_run(sandbox: Sandbox, source: str, status: Status, detail: str) -> None:
    outcome = run(sandbox, source, "assert f(1) == 1")
    assert outcome.status is status
    assert detail in outcome.detail


def test_tests_that_never_call_the_program_prove_nothing(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "def f(x): return 1", "assert True")
    assert outcome.status is Status.FAILED
    assert outcome.detail == "the tests never called the program"


def test_tests_cannot_end_early(sandbox: Sandbox) -> None:
    for ending in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert not run(sandbox, "def f(x): return 1", f"assert f(1) == 1\n{ending}").passed
    assert run(sandbox, "def f(x): return 1", "assert f(1) == 1").passed


ODD = {
    "a type": "f = sorted",
    "a builtin type": "f = list",
    "a lambda": "f = lambda x: sorted(x)",
    "a partial function": "from functools import partial\nf = partial(sorted, reverse=False)",
    "a callable object": "class F:\n    def __call__(self, x): return sorted(x)\nf = F()",
    "a class whose instances are lists": "class f(list):\n    pass",
    "a method": "class F:\n    def g(self, x): return sorted(x)\nf = F().g",
    "a decorated function": "from functools import cache\n@cache\ndef g(x): return x\ndef f(x): return [g(y) for y in x]",
    "a subclass of list": "class L(list): pass\ndef f(x): return L(x)",
    "numbers of an enumeration": "from enum import IntEnum\nN = IntEnum('N', 'a b c')\ndef f(x): return [N(y) for y in x]",
    "an exception caught": "def f(x):\n    try:\n        next(iter(()))\n    except StopIteration:\n        return x",
    "prints": "import sys\ndef f(x):\n    print('passed', file=sys.stderr)\n    print(x)\n    return x",
    "input that is empty": "def f(x):\n    try:\n        input()\n    except EOFError:\n        return x",
    "a deep recursion": "import sys\nsys.setrecursionlimit(5000)\ndef f(x, n=2000): return f(x, n - 1) if n else x",
    "many imports": "import json, re, math, decimal, heapq, bisect, string, collections, itertools\ndef f(x): return x",
    "a lock": "import threading\ndef f(x): return x if (a := threading.Lock()).acquire() and not a.acquire(True, 0.001) else 0",
    "many descriptors": "import os\nkept = [os.dup(1) for _ in range(20)]\ndef f(x): return x",
    "warnings": "import warnings\nwarnings.warn('x')\ndef f(x): return x",
}


def test_odd_programs_that_are_right_pass(sandbox: Sandbox) -> None:
    outcomes = sandbox.check(
        [Program(source, "assert f([1, 2, 3]) == [1, 2, 3]\nassert f([]) == []", "f") for source in ODD.values()]
    )
    assert {name: outcome.detail for name, outcome in zip(ODD, outcomes, strict=True) if not outcome.passed} == {}


def test_an_iterator_of_the_program_may_end(sandbox: Sandbox) -> None:
    source = """
def f(n):
    yield from range(n)
class g:
    def __iter__(self): return self
    def __next__(self): raise StopIteration
"""
    tests = "assert list(f(2)) == [0, 1] and list(zip(f(3), [5])) == [(0, 5)] and next(f(0), 7) == 7 and list(g()) == []"
    assert run(sandbox, source, tests, "g").detail == ""


def test_an_answer_does_not_fill_the_runner(sandbox: Sandbox) -> None:
    with Sandbox(workers=1, isolation=sandbox.isolation) as single:
        assert single.check([Program(HONEST, TESTS, "solve")])[0].passed
        before = peak_mb(single)
        (outcome,) = single.check([Program("def f(x): return b'x' * (48 << 20)", "assert len(f(1)) == 48 << 20", "f")])
        assert outcome.detail == ""
        assert peak_mb(single) < before + 16


def peak_mb(sandbox: Sandbox) -> int:
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{sandbox._runners[0].process.pid}/status").read_text())
    return int(size) >> 10


def test_types_and_exceptions_reach_the_tests(sandbox: Sandbox) -> None:
    source = """
class Own(ValueError): pass
def f(kind):
    if kind == "own": raise Own("mine", 7)
    if kind == "free": raise type("Free", (Exception,), {})("x")
    if kind == "key": raise KeyError("k")
    if kind == "text": "\\ud800".encode()
    if kind == "json": import json; json.loads("{")
    if kind == "end": raise type("Done", (StopIteration,), {})
    if kind == "object": raise KeyError(object)
    return {"tuple": (1, 2), "true": True, "set": {1}, "none": None}[kind]
"""
    tests = """
assert type(f("tuple")) is tuple and f("true") is True and isinstance(f("set"), set) and f("none") is None
for kind, expected, args in (
    ("own", ValueError, ("mine", 7)), ("key", KeyError, ("k",)), ("other", KeyError, ("other",)),
    ("text", UnicodeEncodeError, ("utf-8", "\\ud800", 0, 1, "surrogates not allowed")),
    ("json", ValueError, ("Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",)),
    ("object", KeyError, ("<class 'object'>",)),
):
    try:
        f(kind)
    except expected as error:
        assert type(error) is expected and error.args == args, error.args
    else:
        assert False
for kind in ("free", "end"):
    try:
        f(kind)
    except Exception as error:
        assert type(error).__name__ == "ProgramError" and not isinstance(error, StopIteration), error
    else:
        assert False
"""
    assert run(sandbox, source, tests).detail == ""


def test_objects_of_the_program_work_behind_handles(sandbox: Sandbox) -> None:
    source = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
    def __len__(self): return 1 + (0 if self.left is None else len(self.left))
    def __getitem__(self, key): return {"value": self.value}[key]
    def __repr__(self): return f"Node({self.value})"
def f(node): return 0 if node is None else node.value + f(node.left)
def count(n):
    yield from range(n)
"""
    tests = """
root = Node(1)
root.left = Node(2)
assert f(root) == 3 and root.left.value == 2 and len(root) == 2 and root["value"] == 1
assert list(count(3)) == [0, 1, 2] and root == root and root != None and f"{root} {[root]}" == "Node(1) [Node(1)]"
assert root.left is root.left and root.left in [root.left] and root is not root.left
"""
    assert run(sandbox, source, tests, "Node", "count").detail == ""
    assert "NameError" in run(sandbox, source, tests, "Node").detail
    assert "out of the tests' reach" in run(sandbox, source, "f.__code__").detail


# Each would hold for any object at all, or for any but one, since the tests know nothing of it.
UNKNOWN = (
    "same() != Point(1)", "Point(1) != Point(2)", "Point(1) != 5", "not Point(1) == 5", "5 != Point(1)", "[5] != [Point(1)]",
    "Point(1) not in [Point(2)]", "Point(1) not in {5}", "len({Point(1), Point(2)}) == 2", "not [Point(1)].count(5)",
    "Point(1)", "{Point(1): 1}.get(5) is None",
)  # fmt: skip


def test_tests_cannot_compare_an_object_of_the_program(sandbox: Sandbox) -> None:
    source = """
class Point:
    def __init__(self, x): self.x = x
    def __eq__(self, other): return True
    __hash__ = lambda self: 0
one = Point(1)
def f(x): return x
def same(): return one
"""
    # Nor does a handler of the tests see it.
    tests = [f"f(1)\ntry:\n    assert {test}\nexcept BaseException:\n    pass" for test in UNKNOWN]
    outcomes = sandbox.check([Program(source, text, "f", ("Point", "same")) for text in tests])
    assert {(outcome.status, outcome.detail) for outcome in outcomes} == {
        (Status.FAILED, "the program returned an object of its own where the tests compare plain data")
    }
    assert run(sandbox, source, "assert f(1) == 1 and same() == same() and same() is same() in [same()]", "same").detail == ""


def test_arguments_that_cannot_be_passed_are_no_exception_of_the_program(sandbox: Sandbox) -> None:
    source = "def f(x): return x"
    tests = "try:\n    f(1)\n    f({0})\nexcept (TypeError, ValueError, RecursionError):\n    pass"
    for argument, message in (
        (
            "lambda: 1",
            "a call cannot be made: TypeError: only plain data can be passed to the program, got 'function'",
        ),
        ("__import__('itertools').count()", "an iterator of more than 1048576 items cannot be passed to the program"),
    ):
        outcome = run(sandbox, source, tests.format(argument))
        assert (outcome.status, outcome.detail) == (Status.FAILED, message)


def test_ranges_iterators_and_byte_arrays_are_passed_by_value(sandbox: Sandbox) -> None:
    source = """
def f(x, y=()):
    return [type(x).__name__, *x, *y]
class Part:
    def __getitem__(self, key): return range(9)[key]
"""
    tests = """
assert f(range(3)) == ["range", 0, 1, 2] and f(bytearray(b"a")) == ["bytearray", 97]
assert f(iter([1, 2])) == ["list_iterator", 1, 2] and f([], y=map(str, (n for n in [1]))) == ["list", "1"]
assert f(n for n in f([4])) == ["list_iterator", "list", 4] and Part()[1:9:3] == range(1, 9, 3)
"""
    assert run(sandbox, source, tests, "Part").detail == ""


def test_an_index_error_ends_no_iteration_of_the_tests(sandbox: Sandbox) -> None:
    source = """
def f(x): raise IndexError(x)
class Short:
    def __len__(self): return 2
    def __getitem__(self, n): f(n)
"""
    loops = (
        "class S:\n    __getitem__ = lambda self, n: f(n)\nassert all(x == 5 for x in S())",
        "assert list(reversed(Short())) == []",
    )
    for text, detail in zip(loops, ("ProgramError: IndexError: 0", "IndexError: 1"), strict=True):
        assert run(sandbox, source, text, "Short").detail.startswith(detail)
    caught = "try:\n    f(1)\n    assert False\nexcept IndexError as error:\n    assert error.args == (1,)"
    assert run(sandbox, source, caught).detail == ""
    assert run(
        sandbox, "import collections\ndef f(x): return collections.deque(x)", "assert [*reversed(f([1, 2]))] == [2, 1]"
    ).passed


def test_deep_and_large_answers_fit(sandbox: Sandbox) -> None:
    source = "def f(x):\n    for _ in range(600):\n        x = [x]\n    return x"
    assert run(sandbox, source, "x = f(1)\nfor _ in range(600):\n    (x,) = x\nassert x == 1").detail == ""
    assert run(sandbox, "def f(n): return list(range(n))", "assert f(3_000_000)[-1] == 2_999_999").detail == ""


def test_arguments_are_copies(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "def f(x):\n    x.clear()\n    return []", "x = [3, 1]\nassert f(x) == sorted(x), x")
    assert outcome.detail.startswith("AssertionError: [3, 1]")


def test_only_named_helpers_come_from_the_program(sandbox: Sandbox) -> None:
    source = "def f(x): return 0\ndef same(a, b): return True"
    assert "NameError" in run(sandbox, source, "assert same(f(1), 1)").detail
    assert run(sandbox, source, "def same(a, b): return a == b\nassert same(f(1), 0)", "same").passed


def test_one_program_leaves_nothing_for_the_next(sandbox: Sandbox) -> None:
    first = Program("import math\nmath.pi = 3\ndef f(x): return math.pi", "import math\nmath.tau = 1\nassert f(1) == 3", "f")
    second = Program("import math\ndef f(x): return math.pi", "import math\nassert f(1) == math.pi and math.tau > 6", "f")
    assert [outcome.detail for outcome in sandbox.check([first, first, second, second] * 2)] == [""] * 8


def test_results_do_not_depend_on_the_run(sandbox: Sandbox) -> None:
    program = Program("def f(x): return list({'a', 'b', 'c', 'd', 'e'})", "assert False, f(1)", "f")
    assert len({outcome.detail for outcome in sandbox.check([program] * 6)}) == 1


def test_many_callers_share_one_sandbox(sandbox: Sandbox) -> None:
    results: dict[int, list[bool]] = {}

    def check(number: int) -> None:
        programs = [Program(f"def f(x): return {n}", f"assert f(0) == {number}", "f") for n in range(4)]
        results[number] = [outcome.passed for outcome in sandbox.check(programs)]

    threads = [threading.Thread(target=check, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [n == number for n in range(4)] for number in range(4)}


def test_what_a_judge_leaves_unread_reaches_nobody(sandbox: Sandbox) -> None:
    # An answer that the judge has no memory to read: 60 MiB of empty frames and, behind them, a job in a frame of its own.
    source = """
import os, sys
from struct import pack
frame = sys._getframe()
while "writing" not in frame.f_locals:
    frame = frame.f_back
job = frame.f_globals["encode"](("def f(x): return 1", "f(1)", ("f",), "secret", 1 << 30, 1 << 34, 99, 64))
job = pack("<I", len(job)) + job
def answer():
    head, size = b"t\\2\\0\\0\\0s\\5\\0\\0\\0valueb" + pack("<I", 60 << 20), (60 << 20) - len(job)
    os.write(frame.f_locals["writing"], pack("<I", len(head) + (60 << 20)) + head)
    while size:
        size -= os.write(frame.f_locals["writing"], bytes(min(size, 1 << 16)))
    os.write(frame.f_locals["writing"], job)
class Answers:
    def __iter__(self): return self
    def __next__(self): return answer()
def f(x): return Answers() if x else answer()
"""
    compared = ("f(0) == 5", "set(f(1)) == {4, 5}", "list(f(1)) == [4, 5]", "sorted(f(1)) == [4, 5]", "all(map(bool, f(1)))")
    zero = "def f(x): return 0"
    programs = []
    for text in compared:
        programs += [Program(source, f"assert {text}", "f"), Program(zero, "assert f(1) == 1", "f")]
    with Sandbox(Limits(memory_mb=64), workers=1, isolation=sandbox.isolation) as single:
        # One runner, so that each program follows the one before it.
        outcomes = single.check([*programs, Program(zero, "assert f(1) == 0", "f")])
    expected = [(Status.MEMORY, "MemoryError"), (Status.FAILED, "AssertionError:  (line 1 of the tests)")] * len(compared)
    assert [(outcome.status, outcome.detail) for outcome in outcomes] == [*expected, (Status.PASSED, "")]


def test_a_program_has_no_pipe_but_its_own(sandbox: Sandbox) -> None:
    source = """
import os, stat
def f(x):
    found = []
    for fd in range(256):
        try:
            found.append(os.fstat(fd))
        except OSError:
            pass
    return [stat.S_ISFIFO(file.st_mode) for file in found if not file.st_rdev]
"""
    # From the second program on, its judge was started while another program ran.
    outcomes = sandbox.check([Program(source, "assert False, f(1)", "f")] * 6)
    assert {outcome.detail for outcome in outcomes} == {"AssertionError: [True, True] (line 1 of the tests)"}


def test_reading_leaves_nothing_behind() -> None:
    if not available("bubblewrap"):
        pytest.skip("bubblewrap does not work here")
    path = Path(os.__file__).with_name("sndhdr.py")
    tests = (
        f"assert f(0)\nsize, device = f({str(path)!r})\nassert size == {path.stat().st_size} and device != {path.stat().st_dev}"
    )
    source = "import os\ndef f(path): return (len(open(path).read()), os.stat(path).st_dev) if path else 1"
    with Sandbox(workers=1, isolation="bubblewrap") as sandbox:
        assert run(sandbox, source, "assert f(0)").passed
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if is_in_memory(file.fileno()):
                pytest.skip("this file system keeps what it was told to forget, or does not say")
            assert run(sandbox, source, tests).detail == ""
            assert not is_in_memory(file.fileno())
            file.read()
            assert is_in_memory(file.fileno())


def is_in_memory(fd: int) -> bool:
    answer = ctypes.create_string_buffer(1)
    with mmap.mmap(fd, 1, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        assert ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(1), answer) == 0
        del first
    return answer[0] != b"\0"


def test_bubblewrap_shows_nothing_of_the_host(tmp_path: Path) -> None:
    if not available("bubblewrap"):
        pytest.skip("bubblewrap does not work here")
    assert choose_isolation() == "bubblewrap"
    source = "from os.path import exists\ndef f(names): return list(map(exists, names))"
    tests = f"assert f(['/proc', {str(tmp_path)!r}, '/usr/bin', '/lib']) == [False, False, False, True]"
    (outcome,) = check_programs([Program(source, tests, "f")], isolation="bubblewrap")
    assert outcome.detail == ""


def test_details_are_one_printable_line(sandbox: Sandbox) -> None:
    said = "\x1b[2J\r\n\u202e\x9b1m\u2028 é"
    shown = r"\x1b[2J\r\n\u202e\x9b1m\u2028 é"
    assert run(sandbox, f"raise ValueError({said!r})", "f(1)").detail == f"ValueError: {shown}"
    assert run(sandbox, f"def f(x): return {said!r}", "assert f(1) == 0, f(1)").detail.startswith(
        f"AssertionError: {shown} (line"
    )
    assert run(sandbox, f"def f(x): raise ValueError({said!r})", "f(1)").detail.startswith(f"ValueError: {shown} (line")
    assert run(sandbox, f"raise type({said!r}, (Exception,), {{}})", "f(1)").detail == f"{shown}: "


def test_no_programs() -> None:
    assert check_programs([]) == []


# The sandbox itself


def test_without_isolation_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no program 'no-such-bwrap'"):
        Bubblewrap("no-such-bwrap")
    code = """
import sys
sys.modules["sandlock"] = None
import importlib.util
from neuromas.sandbox import Program, check_programs
try:
    check_programs([Program("open('ran', 'w')", "assert f(1)", "f")])
except ValueError as error:
    print(error)
"""
    environment = {"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert re.fullmatch(
        r"untrusted programs are not run without isolation, and there is none here \(bubblewrap: there is no program 'bwrap'; "
        r"sandlock: .* not installed\): install bubblewrap 0\.8 or later \(apt install bubblewrap\) or "
        r"sandlock \(pip install sandlock; Linux 6\.12 or later\)\n",
        result.stdout,
    )
    assert list(tmp_path.iterdir()) == []


def test_isolation_that_does_not_hold_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A "bubblewrap" that isolates nothing: it drops its options and runs the command on the bare host.
    fake = tmp_path / "bwrap"
    fake.write_text(
        '#!/bin/sh\necho "{ \\"child-pid\\": $$ }" > /proc/self/fd/$2\n'
        'while [ "$1" != "--setenv" ]; do shift; done\nshift 3\nexec "$@"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    choose_isolation.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"bubblewrap: it does not hold: failed, .*read a file of the host"):
            choose_isolation(("bubblewrap",))
    finally:
        choose_isolation.cache_clear()


def test_a_machine_that_starts_nothing_is_no_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not available("bubblewrap"):
        pytest.skip("bubblewrap does not work here")
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    message = "no isolated process could be started with bubblewrap: OSError: the isolated judge did not start"
    with Sandbox(workers=1, isolation="bubblewrap") as sandbox, pytest.raises(OSError, match=message):
        sandbox.check([Program(HONEST, TESTS, "solve")])


def test_a_runner_that_is_gone_is_no_zero() -> None:
    with Sandbox(workers=1) as sandbox:
        program = Program(HONEST, TESTS, "solve")
        assert sandbox.check([program])[0].passed
        sandbox._runners[0].process.kill()
        sandbox._runners[0].process.wait()
        with pytest.raises(OSError, match=r"the process that runs programs ended \(exit code -9\)"):
            sandbox.check([program])
        assert sandbox.check([program])[0].passed


def test_a_sandbox_ends_with_its_owner() -> None:
    code = (
        "import os, sys, threading, time\nfrom neuromas.sandbox import *\nsandbox = Sandbox(Limits(seconds=60), 1)\n"
        "sandbox.check([Program('def f(x): return 1', 'assert f(1) == 1', 'f')])\n"
        "threading.Thread(target=sandbox.check, args=([Program('while True: pass', 'f()', 'f')],), daemon=True).start()\n"
        "time.sleep(1)\nprint('ready', flush=True)\ntime.sleep(60)"
    )
    adopt_orphans()
    known = children()
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert newcomers(known, reap=True) == []


def test_an_interrupt_ends_a_batch_of_endless_programs(sandbox: Sandbox) -> None:
    code = (
        # A shell starts what it puts in the background with this signal ignored, and that is inherited.
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom neuromas.sandbox import *\n"
        "with Sandbox(Limits(seconds=60), 2, sys.argv[1]) as sandbox:\n"
        "    sandbox.check([Program('def f(x): return 1', 'assert f(1) == 1', 'f')] * 2)\n"
        "    print('ready', flush=True)\n    sandbox.check([Program('while True: pass', 'f()', 'f')] * 50)"
    )
    adopt_orphans()
    known = children()
    command = [sys.executable, "-c", code, sandbox.isolation]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        assert owner.stdout.readline() == "ready\n"
        time.sleep(0.5)
        owner.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert "KeyboardInterrupt" in owner.stderr.read()
        owner.wait()
        assert time.monotonic() - start < 2
    assert newcomers(known, reap=True) == []


def test_a_user_without_a_passwd_entry_has_sandlock() -> None:
    if not available("sandlock"):
        pytest.skip("sandlock does not work here")
    code = (
        "import os, pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
        "from neuromas.sandbox.isolation import Sandlock\nSandlock()\nassert 'HOME' not in os.environ"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(seconds=100.5),
            r"limits\.seconds=100\.5 takes 102 seconds of processor time, and the hard limit of this host is 99: "
            r"lower limits\.seconds, or raise the hard limit \(ulimit -Ht\)",
        ),
        (Limits(memory_mb=100), r"limits\.memory_mb=100 takes 104857600 bytes of address space, .* is 99: .* \(ulimit -Hv\)"),
        (Limits(open_files=100), r"limits\.open_files=100 takes 100 open files, .* is 99: .* \(ulimit -Hn\)"),
    ],
)
def test_limits_above_those_of_the_host(monkeypatch: pytest.MonkeyPatch, limits: Limits, message: str) -> None:
    kinds = {"seconds": resource.RLIMIT_CPU, "memory_mb": resource.RLIMIT_AS, "open_files": resource.RLIMIT_NOFILE}
    (lowered,) = [kind for name, kind in kinds.items() if name in message.split("=")[0]]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (0, 99 if kind == lowered else resource.RLIM_INFINITY))
    with pytest.raises(ValueError, match=message):
        Sandbox(limits)


def test_a_host_with_low_limits(sandbox: Sandbox) -> None:
    code = (
        "import resource, sys\nfrom neuromas.sandbox import *\n"
        "for kind, value in ((resource.RLIMIT_AS, 400 << 20), (resource.RLIMIT_CPU, 40), (resource.RLIMIT_NOFILE, 64)):\n"
        "    resource.setrlimit(kind, (value, value))\n"
        "limits = Limits(memory_mb=400, seconds=38, open_files=64)\n"
        "print(check_programs([Program('def f(x): return 1', 'assert f(1) == 1', 'f')], limits, 1, sys.argv[1])[0].passed)"
    )
    result = subprocess.run([sys.executable, "-c", code, sandbox.isolation], capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


def test_a_copy_in_memory_needs_namespaces() -> None:
    # The kernel gives a process with two threads no user namespace.
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pytest.raises(OSError, match="unshare failed: Invalid argument; programs are given a file system in memory"):
            copy_into_memory()
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(seconds=0), r"limits\.seconds must be a number from 0\.1 to 86400, got 0"),
        (lambda: Limits(seconds=math.nan), r"limits\.seconds must be a number from 0\.1 to 86400, got nan"),
        (lambda: Limits(seconds=math.inf), r"limits\.seconds must be a number from 0\.1 to 86400, got inf"),
        (lambda: Limits(memory_mb=1), r"limits\.memory_mb must be a whole number from 64 to 134217728, got 1"),
        (
            lambda: Limits(memory_mb=1 << 44),
            r"limits\.memory_mb must be a whole number from 64 to .*, got 17592186044416",
        ),
        (lambda: Limits(open_files=1), r"limits\.open_files must be a whole number from 8 to 1073741824, got 1"),
        (lambda: Limits(open_files=9.5), r"limits\.open_files must be a whole number from 8 to .*, got 9\.5"),  # type: ignore
        (lambda: Limits(output_bytes=1), r"limits\.output_bytes must be a whole number from 1024 to 1099511627776, got 1"),
        (lambda: Sandbox(workers=0), "workers must be at least 1, got 0"),
        (lambda: Program("", "", "a b"), "entry_point and helpers must be Python names, got 'a b'"),
        (lambda: Program("", "", "a", ("b()",)), r"entry_point and helpers must be Python names, got 'b\(\)'"),
        (lambda: syscall_filter("riscv64"), "run on x86_64 and aarch64 only, this machine is 'riscv64'"),
        (
            lambda: mbpp_program("", "def f(): pass", ["assert g() == 1"]),
            "the tests call no function that the gold program defines",
        ),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""Programs that raise what the tests' own loops, lookups and handlers take for an end."""

from attacks.base import CRASHED, FAILED, MEMORY, Attack
from neuromas.sandbox import Status

ALL = "assert all(map(lambda n: solve(n, 1) == n + 1, range(1, 4)))"
EACH = "assert all(map(lambda n: {} == n + 1, range(1, 4)))"
STOPPED = "ProgramError: StopIteration"

ITERATION = [
    Attack(
        "StopIteration in the function",
        """
def solve(a, b):
    raise StopIteration
""",
        FAILED,
        STOPPED,
        tests=ALL,
    ),
    Attack(
        "StopAsyncIteration in the function",
        """
def solve(a, b):
    raise StopAsyncIteration
""",
        FAILED,
        "ProgramError: StopAsyncIteration",
        tests=ALL,
    ),
    Attack(
        "GeneratorExit in the function",
        """
def solve(a, b):
    raise GeneratorExit
""",
        CRASHED,
        "ended itself: GeneratorExit",
        tests=ALL,
    ),
    Attack(
        "SystemExit where the tests catch everything",
        """
def solve(a, b):
    raise SystemExit
""",
        CRASHED,
        "ended itself: SystemExit",
        tests="try:\n    assert solve(2, 3) == 5\nexcept:\n    pass\nfinally:\n    solve = None",
    ),
    Attack(
        "own class named StopIteration",
        """
class StopIteration(Exception):
    pass

def solve(a, b):
    raise StopIteration
""",
        FAILED,
        STOPPED,
        tests=ALL,
    ),
    Attack(
        "subclass of StopIteration",
        """
class Done(StopIteration):
    pass

def solve(a, b):
    raise Done
""",
        FAILED,
        "ProgramError: Done",
        tests=ALL,
    ),
    Attack(
        "StopIteration inside a generator",
        """
def solve(a, b):
    raise StopIteration
    yield
""",
        FAILED,
        "RuntimeError: generator raised StopIteration",
        tests=EACH.format("next(solve(n, 1))"),
    ),
    Attack(
        "StopIteration from __iter__",
        """
class Empty:
    def __iter__(self):
        raise StopIteration

def solve(a, b):
    return Empty()
""",
        FAILED,
        STOPPED,
        tests=EACH.format("max(solve(n, 1))"),
    ),
    Attack(
        "StopIteration from __getitem__",
        """
class Empty:
    def __getitem__(self, key):
        raise StopIteration

def solve(a, b):
    return Empty()
""",
        FAILED,
        STOPPED,
        tests=EACH.format("solve(n, 1)[0]"),
    ),
    Attack(
        "StopIteration from __len__",
        """
class Empty:
    def __len__(self):
        raise StopIteration

def solve(a, b):
    return Empty()
""",
        FAILED,
        STOPPED,
        tests=EACH.format("len(solve(n, 1))"),
    ),
    Attack(
        "StopIteration from a property",
        """
class Empty:
    @property
    def value(self):
        raise StopIteration

def solve(a, b):
    return Empty()
""",
        FAILED,
        STOPPED,
        tests=EACH.format("solve(n, 1).value"),
    ),
    Attack(
        "StopIteration from the module",
        """
class Module(type(sys)):
    def __getattribute__(self, name):
        raise StopIteration

sys.modules["program"].__class__ = Module

def solve(a, b):
    return 5
""",
        FAILED,
        STOPPED,
    ),
    Attack(
        "IndexError where the tests iterate by __getitem__",
        """
def solve(a, b):
    raise IndexError
""",
        FAILED,
        "ProgramError: IndexError",
        tests="class S:\n    def __getitem__(self, n):\n        return solve(n, 1)\nassert all(x == 5 for x in S())",
    ),
    Attack(
        "subclass of IndexError where the tests iterate by __getitem__",
        """
class Done(IndexError, ValueError):
    pass

def solve(a, b):
    raise Done
""",
        FAILED,
        "ProgramError: Done",
        tests="S = type('S', (), {'__getitem__': lambda self, n: solve(n, 1)})\nassert all(x == 5 for x in S())",
    ),
    Attack(
        "IndexError from __getitem__ where the tests go backwards",
        """
class Short:
    def __len__(self):
        return 2

    def __getitem__(self, key):
        raise IndexError

def solve(a, b):
    return Short()
""",
        FAILED,
        "IndexError",
        tests="assert all(x == y for x, y in zip(reversed(solve(2, 3)), [5, 4]))",
    ),
    Attack(
        "StopIteration while the tests make an argument",
        """
def solve(a, b):
    if b == 1:
        raise StopIteration
    return sum(a)
""",
        FAILED,
        STOPPED,
        tests="assert solve(map(lambda n: solve(n, 1), [5]), 0) == 0",
    ),
    Attack(
        "StopIteration from __str__ and __repr__",
        """
class Odd:
    def __str__(self):
        raise StopIteration

    __repr__ = __str__

def solve(a, b):
    return Odd()
""",
        FAILED,
        STOPPED,
        tests=EACH.format("str(solve(n, 1))") + "\n" + EACH.format("repr([solve(n, 1)])"),
    ),
    Attack(
        "StopIteration where iter() waits for a value",
        """
def solve(a, b):
    raise StopIteration
""",
        FAILED,
        STOPPED,
        tests="assert list(iter(lambda: solve(2, 3), 5)) == []",
    ),
    Attack(
        "StopIteration written into the pipe",
        """
def solve(a, b):
    frame = sys._getframe()
    while "writing" not in frame.f_locals:
        frame = frame.f_back
    frame.f_globals["write_frame"](frame.f_locals["writing"], encode(("raise", "StopIteration", "StopIteration", "", ())))

from_frame = sys._getframe()
while "encode" not in from_frame.f_globals:
    from_frame = from_frame.f_back
encode = from_frame.f_globals["encode"]
""",
        FAILED,
        STOPPED,
        tests=ALL,
    ),
    Attack(
        "KeyboardInterrupt while the tests iterate",
        """
def solve(a, b):
    yield a
    raise KeyboardInterrupt
""",
        CRASHED,
        "ended itself: KeyboardInterrupt",
        tests="assert all(x == y for x, y in zip(solve(2, 3), [2, 5]))",
    ),
    Attack(
        "recursion without end while the tests iterate",
        """
def solve(a, b):
    return solve(a, b)
""",
        (Status.FAILED, Status.CRASHED),
        tests=ALL,
    ),
    Attack(
        "MemoryError while the tests iterate",
        """
def solve(a, b):
    yield a
    raise MemoryError
""",
        MEMORY,
        tests="assert all(x == y for x, y in zip(solve(2, 3), [2, 5]))",
    ),
    Attack(
        "__eq__ and __hash__ that raise StopIteration",
        """
class Odd:
    def __eq__(self, other):
        raise StopIteration

    __hash__ = __ne__ = __bool__ = __eq__

def solve(a, b):
    return Odd()
""",
        FAILED,
        "an object of its own",
        tests="assert all(map(lambda n: solve(n, 1) in {n + 1} or solve(n, 1) in [n + 1], range(1, 4)))",
    ),
    Attack(
        "dict() of an object without keys",
        """
class Odd:
    @property
    def keys(self):
        raise StopIteration

    def __iter__(self):
        return iter(())

def solve(a, b):
    return Odd()
""",
        FAILED,
        STOPPED,
        tests="assert all(map(lambda n: dict(solve(n, 1)) == {n: 1}, [1, 2]))",
    ),
]

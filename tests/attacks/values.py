"""Programs that answer with values of their own making."""

from attacks.base import FAILED, MEMORY, OUTPUT, TIMEOUT, Attack

VALUES = [
    Attack(
        "object equal to everything",
        """
class Any:
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0

def solve(a, b):
    return Any()
""",
        FAILED,
        "an object of its own",
    ),
    Attack(
        "two objects that are equal",
        """
class Same:
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0

def solve(a, b):
    return Same()
""",
        FAILED,
        "an object of its own",
        tests="try:\n    assert solve(1, 2) != solve(3, 4)\nexcept BaseException:\n    pass",
    ),
    Attack(
        "one object twice",
        """
kept = object()

def solve(a, b):
    return kept
""",
        FAILED,
        "AssertionError",
        tests="assert solve(1, 2) is not solve(3, 4)",
    ),
    Attack(
        "object that is in no list, set or dict",
        """
def solve(a, b):
    return [object()]
""",
        FAILED,
        "an object of its own",
        tests="assert not any(solve(1, 2)[0] in these for these in ([], {}, {3}))",
    ),
    Attack(
        "set of objects",
        """
def solve(a, b):
    return {object(), object()}
""",
        FAILED,
        "an object of its own",
        tests="assert len(solve(1, 2)) == 2",
    ),
    Attack(
        "objects that print differently",
        """
class Same:
    def __repr__(self):
        return "same"

def solve(a, b):
    return Same()
""",
        FAILED,
        "AssertionError",
        tests="assert str(solve(1, 2)) != str(solve(3, 4))",
    ),
    Attack(
        "range without end",
        """
def solve(a, b):
    return range(10**18)
""",
        MEMORY,
        tests="assert list(solve(1, 2)) == [3]",
    ),
    Attack(
        "slice of an object",
        """
class Any:
    def __eq__(self, other):
        return True

def solve(a, b):
    return slice(Any(), Any())
""",
        FAILED,
        "an object of its own",
        tests="assert solve(1, 2) == slice(1, 2)",
    ),
    Attack(
        "subclass of int equal to everything",
        """
class Any(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__

def solve(a, b):
    return Any(7)
""",
        FAILED,
        "AssertionError: 7",
    ),
    Attack(
        "subclasses of list and str equal to everything",
        """
class L(list):
    def __eq__(self, other):
        return True

class S(str):
    def __eq__(self, other):
        return True

def solve(a, b):
    return L([S("x")])
""",
        FAILED,
        r"AssertionError: \['x'\]",
    ),
    Attack(
        "object that calls itself an int",
        """
class Fake:
    __class__ = int

    def __eq__(self, other):
        return True

    def bit_length(self):
        return 8

    def to_bytes(self, *a, **k):
        return b"7"

def solve(a, b):
    return Fake()
""",
        FAILED,
        "AssertionError: 55",
    ),
    Attack(
        "unittest.mock.ANY",
        """
def solve(a, b):
    from unittest import mock

    return mock.ANY
""",
        FAILED,
        "an object of its own",
    ),
    Attack(
        "arithmetic that always comes out right",
        """
class Zero:
    def __sub__(self, other):
        return self

    __rsub__ = __sub__

    def __abs__(self):
        return 0.0

    def __lt__(self, other):
        return True

def solve(a, b):
    return Zero()
""",
        FAILED,
        "TypeError",
        tests="assert abs(solve(1, 2) - 3) < 1e-6",
    ),
    Attack(
        "object that is true",
        """
class Yes:
    def __bool__(self):
        return True

def solve(a, b):
    return Yes()
""",
        FAILED,
        "an object of its own",
        tests="assert solve(1, 2)",
    ),
    Attack(
        "pickle bomb",
        """
class Bomb:
    def __reduce__(self):
        return (os.system, ("true",))

def solve(a, b):
    return Bomb()
""",
        FAILED,
        "an object of its own",
    ),
    Attack(
        "endless iterator",
        """
import itertools

def solve(a, b):
    return itertools.count()
""",
        TIMEOUT,
        tests="assert list(solve(2, 3)) == [5]",
    ),
    Attack(
        "list that contains itself",
        """
def solve(a, b):
    x = []
    x.append(x)
    return x
""",
        FAILED,
        "RecursionError",
    ),
    Attack(
        "sorted, abs and isinstance of its own",
        """
def sorted(x):
    return [5]

def abs(x):
    return 5

def isinstance(*a):
    return True

def solve(a, b):
    return [9]
""",
        FAILED,
        r"AssertionError: \[9\]",
        tests="got = solve(2, 3)\nassert sorted(got) == [5], got\nassert abs(got[0]) == 5",
    ),
    Attack(
        "huge string",
        """
def solve(a, b):
    return "x" * (100 << 20)
""",
        OUTPUT,
    ),
    Attack(
        "huge integer",
        """
def solve(a, b):
    return 1 << (800 << 20)
""",
        OUTPUT,
    ),
    Attack(
        "integer too long to print",
        """
def solve(a, b):
    return 10**6000
""",
        FAILED,
        "AssertionError: <int of 19932 bits>",
    ),
    Attack(
        "integers too long to print in a list",
        """
def solve(a, b):
    return [{0: (10**6000,)}] * 10000
""",
        FAILED,
        r"AssertionError: \[\{0: \(<int of 19932 bits>\)\}, ",
    ),
    Attack(
        "text of 40 MiB in a list",
        """
def solve(a, b):
    return [["x" * (40 << 20)]]
""",
        FAILED,
        r"AssertionError: \[\['xxx",
    ),
    Attack(
        "list nested 900 deep",
        """
def solve(a, b):
    x = []
    for _ in range(900):
        x = [x]
    return x
""",
        FAILED,
    ),
    Attack(
        "not a number",
        """
def solve(a, b):
    return float("nan")
""",
        FAILED,
        "AssertionError: nan",
    ),
    Attack(
        "dict with more items than it says",
        """
class D(dict):
    def items(self):
        return [(1, 1)] * 9

def solve(a, b):
    return D()
""",
        FAILED,
        "unreadable answer",
    ),
    Attack(
        "list that says it is longer",
        """
class L(list):
    def __len__(self):
        return 1 << 31

def solve(a, b):
    return L([5])
""",
        MEMORY,
        "MemoryError",
    ),
    Attack(
        "text and bytes with an encoding of their own",
        """
class S(str):
    def encode(self, *a):
        return b"5"

def solve(a, b):
    return [S("x"), type("B", (bytes,), {"__len__": lambda self: 1})(b"555")]
""",
        FAILED,
    ),
    Attack(
        "callable object in the place of the function",
        """
class Solve:
    def __call__(self, a, b):
        return 0

    def __eq__(self, other):
        return True

    def __bool__(self):
        return True

    __hash__ = None

solve = Solve()
""",
        FAILED,
        "AssertionError: 0",
    ),
    Attack(
        "builtin in the place of the function",
        """
solve = max
""",
        FAILED,
        "AssertionError: 3",
    ),
    Attack(
        "type as the answer",
        """
def solve(a, b):
    return int
""",
        FAILED,
        "AssertionError: <class 'int'>",
    ),
]

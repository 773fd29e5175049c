"""Traces of problems in symbols: brackets, Boolean expressions, sums."""

import random
from typing import ClassVar

from neuromas.recipes.trace import Card, Trace
from neuromas.tasks import boolean_expressions, dyck_languages, get_family
from neuromas.tasks.boolean_expressions import Expression
from neuromas.tasks.dyck_languages import Brackets
from neuromas.tasks.multistep_arithmetic_two import LARGEST_NUMBER, OPERATIONS, Arithmetic, Sum


class DyckTrace(Trace):
    """A trace of four brackets in each step; the state is the open brackets, outermost first, after a bar."""

    tasks = ("dyck_languages",)
    max_steps = 3
    share = 2.0
    answer_format = get_family("dyck_languages").answer_format
    closers: ClassVar[dict[str, str]] = {**dyck_languages.CLOSERS, "/": "\\"}
    at_once = 4

    def __init__(self, shown: str) -> None:
        self.shown, self.question, self.start = shown, dyck_languages.PROMPT + " ".join(shown), "|"

    @classmethod
    def parse(cls, question: str) -> "DyckTrace":
        return cls(Brackets.parse(question).shown)

    @classmethod
    def draw(cls, rng: random.Random) -> "DyckTrace":
        pairs = rng.choice((rng.randint(2, 6), rng.randint(4, 12), rng.randint(6, 30)))
        shown = list(dyck_languages.draw_brackets(rng, pairs).shown)
        opening = rng.choice([k for k, bracket in enumerate(shown) if bracket in cls.closers])
        depth = 0
        for k in range(opening, len(shown)):
            depth += 1 if shown[k] in cls.closers else -1
            if depth == 0:
                shown[k] = "\\"
                break
        shown[opening] = "/"
        return cls("".join(shown))

    def finished(self, done: int, state: str) -> bool:
        return done * self.at_once >= len(self.shown)

    def step(self, done: int, state: str) -> tuple[str, str]:
        return self._step(done + 1, self.shown[done * self.at_once : (done + 1) * self.at_once], state)

    @classmethod
    def _step(cls, number: int, chunk: str, state: str) -> tuple[str, str]:
        open_ = state.split()[1:]
        for bracket in chunk:
            if bracket in cls.closers:
                open_.append(bracket)
            elif open_:
                # After a wrong state no bracket, or another one, may be open: the reader continues from the given state.
                open_.pop()
        return f"{number}: {' '.join(chunk)}", " ".join(["|", *open_])

    def answer(self, state: str) -> str:
        return " ".join(self.closers[bracket] for bracket in reversed(state.split()[1:]))

    def wrong(self, rng: random.Random, state: str) -> str:
        open_ = state.split()[1:]
        if open_ and rng.random() < 0.5:
            open_[rng.randrange(len(open_))] = rng.choice(list(self.closers))
        else:
            open_ = rng.choices(list(self.closers), k=rng.randint(1, 6))
        return " ".join(["|", *open_])

    def guess(self, rng: random.Random) -> str:
        return " ".join(rng.choices(list(self.closers.values()), k=rng.randint(1, 3)))

    def sentences(self) -> list[str]:
        return [f"{' '.join(self.shown[k : k + 6])} ." for k in range(0, len(self.shown), 6)]

    @classmethod
    def card(cls, rng: random.Random) -> Card:
        open_ = rng.choices(list(cls.closers), k=rng.choice((0, 1, 2, 3, 4, 6, 9)))
        stack, chunk = list(open_), ""
        for _ in range(cls.at_once):
            if stack and rng.random() < 0.5:
                chunk += cls.closers[stack.pop()]
            else:
                stack.append(rng.choice(list(cls.closers)))
                chunk += stack[-1]
        before = " ".join(["|", *open_])
        what, after = cls._step(rng.randint(1, 12), chunk, before)
        return Card(f"from {before};{what}", f" {after}")


class BooleanTrace(Trace):
    """A trace whose state is the remaining expression; a step evaluates its first operation between values."""

    tasks = ("boolean_expressions",)
    max_steps = 2
    answer_format = get_family("boolean_expressions").answer_format
    closers: ClassVar[dict[str, str]] = {"(": ")", "[": "]"}

    def __init__(self, words: tuple[str, ...]) -> None:
        self.start = " ".join(words)
        self.question = f"{self.start} is"

    @classmethod
    def parse(cls, question: str) -> "BooleanTrace":
        return cls(Expression.parse(question).words)

    @classmethod
    def draw(cls, rng: random.Random) -> "BooleanTrace":
        while True:
            words = boolean_expressions.draw_words(rng, rng.randint(7, 12))
            openings = [k for k, word in enumerate(words) if word == "("]
            if openings:
                return cls(cls._mark(words, rng.choice(openings)))

    @staticmethod
    def _mark(words: list[str], opening: int) -> tuple[str, ...]:
        depth = 0
        for k in range(opening, len(words)):
            depth += {"(": 1, ")": -1}.get(words[k], 0)
            if depth == 0:
                return (*words[:opening], "[", *words[opening + 1 : k], "]", *words[k + 1 :])
        raise AssertionError("an expression closes its parentheses")

    def finished(self, done: int, state: str) -> bool:
        return " " not in state

    def step(self, done: int, state: str) -> tuple[str, str]:
        return self._step(done + 1, state)

    @classmethod
    def _step(cls, number: int, state: str) -> tuple[str, str]:
        words = state.split()
        at, count = cls._first_operation(words)
        what = words[at : at + count]
        words[at : at + count] = [cls._value(what)]
        return f"{number}: {' '.join(what)} is", " ".join(words)

    @classmethod
    def _first_operation(cls, words: list[str]) -> tuple[int, int]:
        """Return the index and the length of the first operation between values that no neighbour binds more tightly."""
        values = ("True", "False")
        for k, word in enumerate(words):
            following = words[k + 1 : k + 3]
            if word == "not" and following[:1] and following[0] in values:
                return k, 2
            if word in cls.closers and len(following) == 2 and following[0] in values and following[1] == cls.closers[word]:
                return k, 3
            if word not in values or len(following) < 2 or following[1] not in values or following[0] not in ("and", "or"):
                continue
            before, after = words[k - 1] if k else "", words[k + 3] if k + 3 < len(words) else ""
            if following[0] == "and" and before != "not":
                return k, 3
            if following[0] == "or" and before not in ("not", "and") and after != "and":
                return k, 3
        raise AssertionError(f"no operation in {words}")

    @staticmethod
    def _value(words: list[str]) -> str:
        if words[0] == "not":
            return str(words[1] == "False")
        if len(words) == 3 and words[1] in ("and", "or"):
            sides = (words[0] == "True", words[2] == "True")
            return str(all(sides) if words[1] == "and" else any(sides))
        return words[1]

    def answer(self, state: str) -> str:
        return state

    def wrong(self, rng: random.Random, state: str) -> str:
        words = [rng.choice(("True", "False")) if w in ("True", "False") and rng.random() < 0.4 else w for w in state.split()]
        return " ".join(words)

    def guess(self, rng: random.Random) -> str:
        return rng.choice(("True", "False"))

    def sentences(self) -> list[str]:
        words = self.start.split()
        return [f"{' '.join(words[k : k + 4])} ." for k in range(0, len(words), 4)]

    @classmethod
    def card(cls, rng: random.Random) -> Card:
        # A marked expression after a few steps, as a message of a middle node starts from.
        trace = cls.draw(rng)
        states = trace.states()
        done = rng.randrange(len(states) - 1)
        what, after = trace.step(done, states[done])
        number, _, rest = what.partition(":")
        return Card(f"from {states[done]};{number}:", f"{rest} {after}")


class ArithmeticTrace(Trace):
    """A trace of one number in each step; the state is (sum, product) so far, after the first parenthesis' value if known."""

    tasks = ("multistep_arithmetic_two",)
    max_steps = 3
    share = 1.5
    answer_format = get_family("multistep_arithmetic_two").answer_format
    largest = 12

    def __init__(self, arithmetic: Arithmetic) -> None:
        self.arithmetic, self.question = arithmetic, arithmetic.question
        self.start = f"(0,{arithmetic.left.numbers[0]})"

    @classmethod
    def parse(cls, question: str) -> "ArithmeticTrace":
        return cls(Arithmetic.parse(question))

    @classmethod
    def draw(cls, rng: random.Random) -> "ArithmeticTrace":
        def draw_sum() -> Sum:
            count = rng.choice((3, 4, 4, 4, 5))
            # Large numbers are rare: their products are larger than those of the task.
            numbers = [
                rng.randint(-cls.largest, cls.largest) if rng.random() < 0.2 else rng.randint(-9, 9) for _ in range(count)
            ]
            return Sum(tuple(numbers), tuple(rng.choices(OPERATIONS, k=count - 1)))

        while True:
            arithmetic = Arithmetic(draw_sum(), rng.choice(OPERATIONS), draw_sum())
            if max(map(abs, arithmetic.left.numbers + arithmetic.right.numbers)) > LARGEST_NUMBER:
                return cls(arithmetic)

    def finished(self, done: int, state: str) -> bool:
        return done >= len(self.arithmetic.left.numbers) + len(self.arithmetic.right.numbers)

    def step(self, done: int, state: str) -> tuple[str, str]:
        left, right = self.arithmetic.left, self.arithmetic.right
        first, total, product = self._read(state)
        if done < len(left.operations):
            return self._step(done + 1, "", total, product, left.operations[done], left.numbers[done + 1])
        if done == len(left.operations):
            return f"{done + 1}: ( {right.numbers[0]}", f"{total + product} (0,{right.numbers[0]})"
        k = done - len(left.numbers)
        if k < len(right.operations):
            return self._step(done + 1, f"{first} ", total, product, right.operations[k], right.numbers[k + 1])
        return self._last(done + 1, first, self.arithmetic.operation, total + product)

    @staticmethod
    def _read(state: str) -> tuple[int, int, int]:
        first, _, pair = state.rpartition("(")
        total, _, product = pair.strip(")").partition(",")
        return int(first or 0), int(total), int(product)

    @staticmethod
    def _step(number: int, first: str, total: int, product: int, operation: str, operand: int) -> tuple[str, str]:
        what = f"{number}: {operation} {operand}"
        if operation == "*":
            return what, f"{first}({total},{product * operand})"
        return what, f"{first}({total + product},{operand if operation == '+' else -operand})"

    @staticmethod
    def _last(number: int, first: int, operation: str, second: int) -> tuple[str, str]:
        return f"{number}: {first} {operation} {second}", f"= {Sum((first, second), (operation,)).value}"

    def answer(self, state: str) -> str:
        return state.removeprefix("= ")

    def wrong(self, rng: random.Random, state: str) -> str:
        first, total, product = self._read(state)
        head = f"{first + rng.randint(-5, 5)} " if not state.startswith("(") else ""
        return f"{head}({total + rng.randint(-9, 9)},{product})"

    def guess(self, rng: random.Random) -> str:
        return str(rng.randint(-99, 99))

    def sentences(self) -> list[str]:
        return [f"( {side} )." for side in (self.arithmetic.left, self.arithmetic.right)]

    @classmethod
    def card(cls, rng: random.Random) -> Card:
        def about(size: int) -> int:
            return rng.randint(-size, size)

        def product() -> int:
            value = about(9)
            for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
                value *= about(9)
            return value

        kind = rng.random()
        if kind < 0.7:
            first = f"{about(rng.choice((20, 90, 300)))} " if rng.random() < 0.5 else ""
            total, before = about(rng.choice((20, 90))) if rng.random() < 0.6 else product(), product()
            what, after = cls._step(rng.randint(1, 8), first, total, before, rng.choice(OPERATIONS), about(9))
            return Card(f"from {first}({total},{before});{what}", f" {after}")
        if kind < 0.8:
            total, before, operand = about(90), product(), about(9)
            return Card(f"from ({total},{before});{rng.randint(3, 5)}:( {operand}", f" {total + before} (0,{operand})")
        size = rng.choice((9, 20, 60, 200))
        total, before, first = about(size), product(), about(size)
        what, after = cls._last(8, first, rng.choice(OPERATIONS), total + before)
        number, _, rest = what.partition(":")
        return Card(f"from {first} ({total},{before});{number}:", f"{rest} {after}")

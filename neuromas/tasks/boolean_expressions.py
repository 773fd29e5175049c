"""Boolean expressions, in the grammar of BIG-Bench-Hard: is `not True or ( False and True )` true or false?

An expression is a sequence of words: True, False, not, and, or, and each parenthesis. The published ones have 8 words, and
their shapes are about as frequent as if every expression of 8 words were equally likely; the generator draws them so. There
are only 2,122 of them, so it draws expressions of 9 to 11 words too; difficulty 8 excludes those.
"""

import random
from dataclasses import dataclass
from functools import cache

from neuromas.tasks.answers import words_form
from neuromas.tasks.task import GeneratedTask, Problem

WORD_WEIGHTS = {8: 4, 9: 3, 10: 2, 11: 1}

TRUE_SHARE = 0.54
"""Share of True among the published answers. Without control it would grow with the number of words, to two thirds."""

_ANSWER = words_form("True", "False")


@dataclass(frozen=True, slots=True)
class Expression:
    """The words of one expression, e.g. `Expression(("not", "(", "True", ")"))`."""

    words: tuple[str, ...]

    @property
    def question(self) -> str:
        return f"{' '.join(self.words)} is"

    @property
    def answer(self) -> str:
        return str(_evaluate(self.words))

    @classmethod
    def parse(cls, question: str) -> "Expression":
        """Return the problem of a question; ValueError if it is not of this grammar."""
        expression = cls(tuple(question.removesuffix(" is").split(" ")))
        try:
            _evaluate(expression.words)
        except ValueError as error:
            raise ValueError(f"not a Boolean expressions question: {question!r}") from error
        if expression.question != question:
            raise ValueError(f"not a Boolean expressions question: {question!r}")
        return expression


def _evaluate(words: tuple[str, ...]) -> bool:
    """Return the value; `not` binds before `and`, `and` before `or`. ValueError if the words are no expression."""
    # The next word is the last of the list: each function below removes its words from the end.
    rest = list(reversed(words))
    value = _read_or(rest)
    if rest:
        raise ValueError(f"unexpected {rest[-1]!r}")
    return value


def _read_or(rest: list[str]) -> bool:
    value = _read_and(rest)
    while rest and rest[-1] == "or":
        rest.pop()
        # The words of the right side have to be removed even where the left side decides.
        value = _read_and(rest) or value
    return value


def _read_and(rest: list[str]) -> bool:
    value = _read_not(rest)
    while rest and rest[-1] == "and":
        rest.pop()
        value = _read_not(rest) and value
    return value


def _read_not(rest: list[str]) -> bool:
    word = rest.pop() if rest else ""
    if word == "not":
        return not _read_not(rest)
    if word == "(":
        value = _read_or(rest)
        if not rest or rest.pop() != ")":
            raise ValueError("unclosed '('")
        return value
    if word not in ("True", "False"):
        raise ValueError(f"unexpected {word!r}")
    return word == "True"


@cache
def count_expressions(length: int) -> int:
    """Return the number of expressions of this many words."""
    pairs = sum(_count_operands(k) * count_expressions(length - 1 - k) for k in range(1, length - 1))
    return _count_operands(length) + 2 * pairs


@cache
def _count_operands(length: int) -> int:
    """Return the number of operands of this many words: a value, a negated operand, an expression in parentheses."""
    if length <= 1:
        return 2 * (length == 1)
    return _count_operands(length - 1) + count_expressions(length - 2)


def draw_words(rng: random.Random, length: int) -> list[str]:
    """Draw one of all expressions of this many words, each with the same chance."""
    # The length of the first operand is drawn first; the full length means that it is the only one.
    lengths = [k for k in range(1, length + 1) if k != length - 1]
    ways = [_count_operands(k) * (2 * count_expressions(length - 1 - k) if k < length else 1) for k in lengths]
    first = rng.choices(lengths, weights=ways)[0]
    operand = _draw_operand(rng, first)
    return operand if first == length else [*operand, rng.choice(("and", "or")), *draw_words(rng, length - 1 - first)]


def _draw_operand(rng: random.Random, length: int) -> list[str]:
    """Draw one of all operands of this many words, each with the same chance."""
    if length == 1:
        return [rng.choice(("True", "False"))]
    if rng.randrange(_count_operands(length)) < _count_operands(length - 1):
        return ["not", *_draw_operand(rng, length - 1)]
    return ["(", *draw_words(rng, length - 2), ")"]


class BooleanExpressions(GeneratedTask):
    """Expressions with an answer True or False; difficulty is the number of words, 8 in the published items."""

    name = "boolean_expressions"
    answer_format = 'Write "Answer: True" or "Answer: False".'
    answers = ("True", "False")
    difficulties = range(5, 61)
    difficulty_unit = "words"

    def generate(self, rng: random.Random) -> Problem:
        length = self.difficulty or rng.choices(list(WORD_WEIGHTS), weights=list(WORD_WEIGHTS.values()))[0]
        answer = str(rng.random() < TRUE_SHARE)
        while True:
            expression = Expression(tuple(draw_words(rng, length)))
            if expression.answer == answer:
                return Problem(expression.question, answer)

    def parse_answer(self, text: str) -> str | None:
        return _ANSWER.read(text)

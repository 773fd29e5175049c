"""Verifiers by name: each parses the answer of a text and compares it with the gold answer.

All are strict: a text that names two answers, hedges or says "not" gives none (`answers.py` has the rules). No text makes a
verifier raise, or take longer than its limit.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from textwrap import dedent

from neuromas.config import VerifierName
from neuromas.tasks.answers import number_form, option_form, read_exact, read_open, unboxed, words_form
from neuromas.tasks.math_process import Judge

JUDGE_SECONDS = 5.0
"""Most seconds for one comparison in the judge's process."""
MAX_ANSWER = 300
"""Most characters of an answer that is compared as mathematics or by a regular expression."""

_judge = cache(lambda: Judge(JUDGE_SECONDS))


class Verifier(ABC):
    """Parses and compares answers; `read` returns the normal form, in which gold answers are stored too."""

    answer_format: str

    @abstractmethod
    def read(self, text: str) -> str | None:
        """Return the answer that a text gives, None if it gives none or several."""

    def normal_gold(self, gold: str) -> str:
        """Return a gold answer in normal form; ValueError says why it can't be one."""
        normal = self.read(gold)
        if normal is None:
            raise ValueError(f"{gold!r} is no answer that the verifier can parse")
        return normal

    def check(self, gold: str, text: str) -> bool:
        """Return whether the text gives the gold answer, which is in normal form."""
        return self.read(text) == gold


class Reader(Verifier):
    """Checks that the answer in normal form equals the gold answer."""

    def __init__(self, read: Callable[[str], str | None], answer_format: str) -> None:
        self._read, self.answer_format = read, answer_format

    def read(self, text: str) -> str | None:
        return self._read(text)


class Regex(Verifier):
    """Checks that the gold answer, a regular expression, matches all of the answer."""

    answer_format = 'Write "Answer: " and the answer.'

    def read(self, text: str) -> str | None:
        answer = read_open(text)
        return answer if answer and len(answer) <= MAX_ANSWER else None

    def normal_gold(self, gold: str) -> str:
        try:
            re.compile(gold)
        except re.error as error:
            raise ValueError(f"{gold!r} is no regular expression: {error}") from error
        return gold

    def check(self, gold: str, text: str) -> bool:
        answer = self.read(text)
        # The expression may match the answer with or without the full stop after it.
        ways = {answer, answer.removesuffix(".")} if answer else ()
        return any(_judge().ask("regex", gold, way) for way in ways)


_PERCENT = re.compile(r"(?<=[0-9])\s*(?:\\?%|percent\b)")
_COMMAND = re.compile(r"\\?[a-zA-Z]+")
# fmt: off
_COMMANDS = frozenset((
    r"\frac", r"\dfrac", r"\tfrac", r"\sqrt", r"\pi", r"\cdot", r"\times", r"\div", r"\left", r"\right",
    r"\sin", r"\cos", r"\tan", r"\log", r"\ln", r"\exp", "pi", "sqrt",
))
# fmt: on
_MATH = re.compile(r"[0-9a-zA-Z\\{}()\[\]^_+\-*/.,!|% ]+")
_TWO_SIGNS = re.compile(r"[-+*/^]\s*[+*/^]|-\s*-")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_FRACTION = re.compile(r"-?(?:[0-9]+/[0-9]+|\\[dt]?frac\{-?[0-9]+\}\{[0-9]+\})")


class Math(Verifier):
    r"""Checks that math-verify finds the answer equal to the gold one: 0.5 is \frac{1}{2}, x(x+1) is x^2+x.

    Numbers are compared as numbers, and a calculation is no number: 9 * 2 is not 18. Any other answer has to be one expression
    before math-verify compares it: its words and commands are mathematical or the gold answer's, and it has a comma, an equals
    sign or a plus-minus only if the gold answer has one.
    """

    answer_format = 'Write "Answer: " and the number or expression.'
    _numbers = number_form(decimals=True)

    def read(self, text: str) -> str | None:
        # A question that asks for percent may be answered with or without the sign.
        text = _PERCENT.sub("", unboxed(text).replace("\\$", "$"))
        number = self._numbers.read(text)
        if number is not None:
            return number
        answer = read_open(text)
        answer = answer.strip("$ ").removesuffix(".").rstrip("$ ") if answer else ""
        is_short = 0 < len(answer) <= MAX_ANSWER and answer.isascii()
        # Its commands are allowed here; `check` compares them with the gold answer's.
        commands = {word for word in _COMMAND.findall(answer) if word.startswith("\\")}
        return answer if is_short and ("\\text" in answer or _is_mathematical(answer, commands)) else None

    def normal_gold(self, gold: str) -> str:
        normal = self._numbers.read(gold) or gold.strip("$ .")
        if not 0 < len(normal) <= MAX_ANSWER:
            raise ValueError(f"expected an expression of 1 to {MAX_ANSWER} characters, got {gold[:50]!r}")
        return normal

    def check(self, gold: str, text: str) -> bool:
        answer = self.read(text)
        if answer is None or gold == answer:
            return answer is not None
        if _NUMBER.fullmatch(gold):
            # An integer is not written as a fraction; other numbers may be.
            if "." not in gold or not _FRACTION.fullmatch(answer.replace(" ", "")):
                return False
        elif not _is_expression(answer, gold):
            return False
        return _judge().ask("math", gold, answer)


def _is_mathematical(answer: str, own: Iterable[str]) -> bool:
    return all(len(word) == 1 or word in _COMMANDS or word in own for word in _COMMAND.findall(answer))


def _is_expression(answer: str, gold: str) -> bool:
    signs = set(gold) - set("0123456789")
    # Sympy accepts expressions such as x++y.
    known = not _TWO_SIGNS.search(answer) and all(char in signs or (char != "," and _MATH.fullmatch(char)) for char in answer)
    return known and _is_mathematical(answer, _COMMAND.findall(gold))


class Python(Verifier):
    """Parses programs; their tests decide whether they are right (`neuromas.tasks.code`)."""

    answer_format = 'Write the complete function in one "```python" block.'
    _function = re.compile(r"^(?:(?:async[ \t]+)?def|class)\b|^\w+[ \t]*=[ \t]*lambda\b", re.MULTILINE)

    def read(self, text: str, name: str | None = None) -> str | None:
        """Return the program: the text, its one block, or of several the one that defines `name` (None: any function)."""
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")
        # A byte order mark or form feed at the start is not part of the program.
        blocks = [block.lstrip("\ufeff\f") for block in _blocks(text)]
        if len(blocks) > 1:
            blocks = [block for block in blocks if (defines(block, name) if name else self._function.search(dedent(block)))]
        if len(blocks) != 1:
            return None
        # A Python file cannot hold lone surrogates.
        return blocks[0] if blocks[0].strip() and _encodes(blocks[0]) else None

    def check(self, gold: str, text: str) -> bool:
        raise NotImplementedError("programs are checked many at a time, by neuromas.tasks.code")


_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)")


def _blocks(text: str) -> list[str]:
    """Return the texts between fences (the last fence may be missing) or, if there are none, the whole text."""
    blocks: list[list[str]] = []
    fence, margin = "", ""
    for line in text.split("\n"):
        found = _FENCE.fullmatch(line)
        if not fence and found:
            margin, fence = found[1], found[2]
            blocks.append([])
        elif found and found[2].startswith(fence) and not found[3].strip():
            fence = ""
        elif fence:
            # In a list, a block has the indentation of its fence.
            blocks[-1].append(line.removeprefix(margin))
    if not blocks:
        return [] if "```" in text else [text.rstrip()]
    return ["".join(f"{line}\n" for line in block) for block in blocks]


def defines(program: str, name: str) -> bool:
    """Return whether a program, which may be indented as a whole, defines a name: by def, class, assignment or import."""
    ways = rf"(?:async[ \t]+)?def[ \t]+{name}\b|class[ \t]+{name}\b|{name}[ \t]*(?::[^=\n]+)?=(?!=)"
    imported = rf"(?:from[ \t]+[\w.]+[ \t]+)?import\b[^#\n]*\b{name}[ \t]*(?:[,;)#]|$)"
    return re.search(rf"^(?:{ways}|{imported})", dedent(program), re.MULTILINE) is not None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def make_verifier(name: VerifierName, golds: Iterable[str] = ()) -> Verifier:
    """Return the verifier of a name; `choice` finds the number of options from `golds`."""
    if name == "choice":
        last = max((gold.strip("() \n").upper() for gold in golds), default="E")
        letters = "".join(map(chr, range(ord("A"), max(ord("B"), ord(last[:1] or "B")) + 1)))
        return choice(letters if len(letters) <= 26 else "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if name == "number":
        return Reader(number_form(decimals=True).read, 'Write "Answer: " and the number.')
    if name == "exact":
        return Reader(read_exact, 'Write "Answer: " and the answer.')
    return {"regex": Regex, "math": Math, "python": Python}[name]()


def choice(letters: str) -> Verifier:
    """Return the verifier of one of these letters, in parentheses or alone."""
    return Reader(option_form(letters).read, 'Write "Answer: " and the letter of an option, as in "Answer: (A)".')


def words(*answers: str) -> Verifier:
    """Return the verifier of one of a few words, in any case."""
    *listed, last = [f'"Answer: {answer}"' for answer in answers]
    return Reader(words_form(*answers).read, f"Write {', '.join(listed)} or {last}.")

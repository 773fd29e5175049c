"""Reading one answer out of a text: strict, so that naming several answers never pays."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_MARKER = re.compile(r"\banswer\b(?:\s+is\b)?[\s:=*`\"'$]*", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:or|nor|not|never|neither|maybe|perhaps|possibly|wrong|incorrect)\b|n['\u2019]t|\?", re.IGNORECASE)
_WRAPPING = " \t\r\n*`\"'$"
_CLOSERS = r"[.,;!)\]}*_`\"'$\u00b0\u20ac\u00a3]*"
_SIGNS = r"+/^=<>~|&%#@\\:\-\u00b0-\u00b7\u00d7\u00f7\u2010-\u2015\u2026\u2044\u2190-\u22ff"
# What may follow an answer: its wrapping, then the end, a new line, or words, also behind a colon or dash. All else makes
# another thing of it, a ratio, a range, a term of a calculation: 5:+, 5~6, 5/, A|F are no answers.
_ENDED = re.compile(
    rf"{_CLOSERS}(?:\s*$|[ \t\r]*\n|[ \t]++(?![{_SIGNS}])"
    r"|(?::|[ \t]+[\u2013\u2014-])\s+(?=[*_\"'(]*[^\W\d_]{2})|\u2014(?=[^\W\d_]{2})|\s*\\(?:text|mathrm|[ ,;!]))"
)

# Longer numbers are no answer of any family, and Python refuses to read them from 4,300 digits on.
_MAX_DIGITS = 100


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What the answers of a task look like."""

    pattern: re.Pattern[str]
    """Everything that looks like an answer, wrong forms too: `24.5` where whole numbers are asked for."""
    normal: Callable[[str], str | None]
    """Gives the normal form of what the pattern found, None for a wrong form."""

    def read(self, text: str) -> str | None:
        """Return the answer in normal form; None if the text gives none, or several.

        Either the text is an answer and nothing else, or it says "Answer: ..." or "the answer is ...". Then all that looks like
        an answer from there to the end has to be that same answer, ended as an answer is, and no word such as "or" or "not" may
        follow: "Answer: (A) or (B)", "Answer: not (A)", "Answer: 5:+" and two different answers are none. What comes before is
        free.
        """
        # A stop may follow an answer, not lead it: .5 is not 5. An ellipsis is no stop: 0.3... is not 0.3.
        bare = text.strip(_WRAPPING).removesuffix(".").rstrip(_WRAPPING)
        if self.pattern.fullmatch(bare):
            return self.normal(bare)
        markers = list(_MARKER.finditer(text))
        starts = {marker.end() for marker in markers}
        matches = list(self.pattern.finditer(text))
        first = next((k for k, match in enumerate(matches) if match.start() in starts), None)
        if first is None or _HEDGE.search(text, matches[first].end()):
            return None
        # A second "Answer:" or "the answer is" has to give an answer too, if it gives anything.
        found = {match.start() for match in matches}
        for marker in markers:
            is_label = re.search(r":|\bis\b", marker.group(), re.IGNORECASE) and marker.start() >= matches[first].end()
            if is_label and marker.end() not in found and text[marker.end() :].strip(_WRAPPING + "."):
                return None
        if not all(_ENDED.match(text, match.end()) for match in matches[first:]):
            return None
        named = {self.normal(match.group()) for match in matches[first:]}
        return named.pop() if len(named) == 1 else None


def words_form(*answers: str) -> AnswerForm:
    """Answers are one of these words, in any case."""
    by_word = {answer.lower(): answer for answer in answers}
    return AnswerForm(re.compile(rf"\b(?:{'|'.join(answers)})\b", re.IGNORECASE), lambda word: by_word.get(word.lower()))


def option_form(letters: str) -> AnswerForm:
    """Answers are a letter in parentheses, or a capital letter alone where it is not the article of "A red ball".

    The pattern finds all letters in parentheses, and a letter joined to an option, so that an option that does not exist spoils
    an answer.
    """
    another = r"(?:(?:,[ \t]*|[ \t]+and[ \t]+)[A-HJ-Z](?![\w'-]))?"
    pattern = re.compile(rf"(?:\([a-zA-Z]\)|\b[{letters}](?![\w'-])(?!(?<=A)\s+[a-z])){another}")

    def normal(found: str) -> str | None:
        letter = found.strip("()").upper()
        return f"({letter})" if letter in letters else None

    return AnswerForm(pattern, normal)


def number_form(*, decimals: bool = False) -> AnswerForm:
    """Answers are whole numbers, or decimal ones too, with or without commas between thousands; a calculation is none."""
    # The last part finds the start of a calculation, so that 5 * 5 is not twice the number 5, and what makes another number of
    # it: 5 million, 5x, 5 \\pi, A5.
    more = (
        r"hundred|thousand|million|billion|trillion|dozen|percent|pi|squared|cubed|plus|minus|divided|point|(?:and a )?half"
        r"|(?:times|over|to|and)(?=\W*[0-9])|[b-z](?![\w'\u2019])"
    )
    pattern = re.compile(
        r"(?:[-+\u2212]|[^\W\d_])?[0-9](?:[\w.,]*\w)?(?:\.\.|\s*[+^=<>~|&]|\s*[-*/:(\u2212\u00d7\u00f7](?=\s*[-+(]?[0-9])|\s?[%!]"
        rf"|[\s,;]+(?=[0-9])|\s*[\u221a\u03c0]|\s*\\(?!text|mathrm)[a-zA-Z]+|[ \t]*(?i:{more})\b)?"
    )
    allowed = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)" + (r"(?:\.[0-9]+)?" if decimals else ""))

    def normal(found: str) -> str | None:
        found = found.replace("\u2212", "-")
        if len(found) > _MAX_DIGITS or not allowed.fullmatch(found):
            return None
        whole, _, rest = found.replace(",", "").partition(".")
        rest = rest.rstrip("0")
        number = f"{int(whole)}.{rest}" if rest else str(int(whole))
        return f"-{number}" if rest and whole.startswith("-") and int(whole) == 0 else number

    return AnswerForm(pattern, normal)


def bracket_form() -> AnswerForm:
    """Answers are closing brackets, with one space between two of them when in normal form."""
    pattern = re.compile(r"[()\[\]{}<>](?:\s*[()\[\]{}<>])*")

    def normal(found: str) -> str | None:
        brackets = "".join(found.split())
        return " ".join(brackets) if all(bracket in ")]}>" for bracket in brackets) else None

    return AnswerForm(pattern, normal)


_LABEL = re.compile(r"\banswer\s*:", re.IGNORECASE)


def read_open(text: str) -> str | None:
    """Return an answer of any form, with single spaces; None if the text gives none, or several.

    Either the text is one line and nothing else, or all that follows "Answer:" is the answer; where there are several of these,
    they have to say the same. So a second thought, a doubt or an explanation is part of the answer, and makes it a wrong one.
    """
    first, *labelled = _LABEL.split(text)
    if not labelled and "\n" in first.strip(_WRAPPING):
        return None
    answers = {" ".join(part.strip(_WRAPPING).split()) for part in labelled or [first]}
    return answers.pop() or None if len(answers) == 1 else None

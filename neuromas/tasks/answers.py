"""Parses the answer of a text. The rules are strict, so that naming several answers never pays, and favour no answer.

The parser does not know the gold answer and treats all answers alike: with the answers' names exchanged, the same text gives
the exchanged answer.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from neuromas.tasks.explanations import Span, stands

_WRAPPING = " \t\r\n*`\"'$\u20ac\u00a3"
# "The answer is", "Answer: option", "The correct choice is", a line "#### 18".
_LABEL = re.compile(
    r"(?:\banswer(?:\s+to\s+(?:the|this)\s+(?:question|problem))?\b(?P<is>\s+(?:is|must\s+be)\b)?"
    r"|\b(?:correct|right|best|final)\s+(?:option|choice|letter|response)(?:\s+is\b|(?=\s*:))"
    r"|^[ \t]*####(?=[ \t]*[^\s#]+[ \t]*$))"
    r"(?:\s+(?:therefore|thus|then|hence|clearly|indeed|simply)\b)?"
    r"[\s:=*`\"'$\u20ac\u00a3]*(?:(?:option|choice|letter)\b[\s:*`\"'$]*)?",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSERS = r"[.,;!)\]}*_`\"'$\u00b0\u20ac\u00a3]*"
_SIGNS = r"+/^=<>~|&%#@\\:\-\u00b0-\u00b7\u00d7\u00f7\u2010-\u2015\u2026\u2044\u2190-\u22ff"
# What may follow an answer: its wrapping, then the end, a new line, or words, also after a colon or dash. Other characters make
# it a ratio, a range, or a term of a calculation: 5:+, 5~6, 5/, A|F are no answers.
_ENDED = re.compile(
    rf"{_CLOSERS}(?:\s*$|[ \t\r]*\n|[ \t]++(?![{_SIGNS}])"
    r"|(?::|[ \t]+[\u2013\u2014-])\s+(?=[*_\"'(]*[^\W\d_]{2})|\u2014(?=[^\W\d_]{2})|\s*\\(?:text|mathrm|[ ,;!]))"
)

# No family has longer numbers as answers, and Python refuses to parse numbers from 4,300 digits on.
_MAX_DIGITS = 100

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|textit)\s*\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerForm:
    """The form of a task's answers, and the parser of it."""

    pattern: re.Pattern[str]
    """Matches everything that looks like an answer, wrong forms too: `24.5` where whole numbers are asked for."""
    normal: Callable[[str], str | None]
    """Returns the normal form of a match of the pattern, None for a wrong form."""
    opening: re.Pattern[str] | None = None
    """Matches the start of a text that gives its answer at once, without "Answer:", and continues. None: no text does so."""
    latex: bool = True
    """Whether LaTeX around an answer, such as a box, is removed: False where brackets are answers."""
    words: bool = False
    """Whether the answers are words of the language."""
    interjections: str = "no"
    """Words that withdraw an answer at the start of a clause, as in "5. No, wait"; "" where they are answers themselves."""

    def read(self, text: str) -> str | None:
        """Return the answer in normal form; None if the text gives none, or several.

        The text is an answer and nothing else, or it begins with one that `opening` matches, or it has a label such as
        "Answer: ..." or "the answer is ...". Any text may come before that. The answer must end as answers do ("5:+" is none),
        all later labels have to give the same answer, and the text after it must not withdraw it (`explanations.py`).
        """
        text = _plain(text) if self.latex else text
        # A full stop may follow an answer but not precede it: .5 is not 5. An ellipsis is no full stop: 0.3... is not 0.3.
        bare = text.strip(_WRAPPING).removesuffix(".").rstrip(_WRAPPING)
        if self.pattern.fullmatch(bare):
            return self.normal(bare)
        spans = [Span(m.start(), m.end(), self.normal(m.group())) for m in self.pattern.finditer(text)]
        labels = list(_LABEL.finditer(text))
        claims = {label.end() for label in labels}
        labelled = not claims.isdisjoint(span.start for span in spans)
        if not labelled and self.opening and (begun := self.opening.match(text)):
            claims = {begun.end()}
        first = next((k for k, span in enumerate(spans) if span.start in claims), None)
        if first is None:
            return None
        claim, later = spans[first], spans[first + 1 :]
        given = {span.answer for span in (claim, *later) if span.start in claims}
        if claim.answer is None or given != {claim.answer} or not _ENDED.match(text, claim.end):
            return None
        # A second "Answer:" or "the answer is" has to give an answer too, unless nothing follows it.
        found = {span.start for span in later}
        for label in labels:
            says = label["is"] or ":" in label.group()
            if says and label.start() >= claim.end and label.end() not in found and text[label.end() :].strip(_WRAPPING + "."):
                return None
        left = stands(text, claim, later, labelled=labelled, words=self.words, interjections=self.interjections)
        return claim.answer if left else None


def unboxed(text: str) -> str:
    r"""Return the text with "Answer: x" for every \boxed{x}, so that the same rules hold for both."""
    parts, at = [], 0
    while match := _BOXED.search(text, at):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        if depth:
            break
        # "The answer is \boxed{x}" is one answer, not an empty one and another.
        before, labels = text[at : match.start()], list(_LABEL.finditer(text, at, match.start()))
        if labels and labels[-1].end() == match.start():
            before = text[at : labels[-1].start()]
        parts.append(f"{before} Answer: {text[match.end() : end - 1]}")
        at = end
    return "".join(parts) + text[at:]


def _plain(text: str) -> str:
    """Return the text without LaTeX's boxes, words and delimiters, as in "\\(\\text{B}\\)"; a delimiter becomes a dollar."""
    if "\\" not in text:
        return text
    text = re.sub(r"\\[()\[\]]", "$", text.replace("\\$", "$"))
    return _TEXT.sub(r" \1", unboxed(text))


def words_form(*answers: str) -> AnswerForm:
    """Return the form of answers that are one of these words, in any case."""
    by_word = {answer.lower(): answer for answer in answers}
    # "There is no net displacement" and "no doubt" are no answers, and "no idea" is none of these.
    no = (
        r"no(?!(?:(?<=there is no)|(?<=there are no)|(?<=there was no)|(?<=has no)|(?<=have no)|(?<=had no)|(?<=with no)"
        r"|(?<=leaves no)|(?<=makes no)|(?<=means no)|(?<=at no)|(?<=in no)|(?<=by no))[ \t]+[a-z])"
        r"(?![ \t]+(?:one|doubt|longer|more|other|matter)\b)"
        r"(?:[ \t]+(?:idea|clue|way|opinion|conclusion|solution|information|answer(?!\s*(?::|is\b)))\b)?"
    )
    choices = "|".join(no if word == "no" else word for word in by_word)
    return AnswerForm(
        pattern=re.compile(rf"\b(?:{choices})\b", re.IGNORECASE),
        normal=lambda word: by_word.get(word.lower()),
        opening=re.compile(
            rf"[\s*`\"'$_]*(?=(?:{choices})\b[*`\"'_]*(?:[,.;:!\u2014\u2013]| [\u2014\u2013-] |\s*\n))", re.IGNORECASE
        ),
        words=True,
        interjections="" if "no" in by_word else "yes|no",
    )


def option_form(letters: str) -> AnswerForm:
    """Return the form of a letter in parentheses, or of a capital alone where it is not the article of "A red ball".

    The pattern matches all letters in parentheses, and a letter joined to an option, so that naming an option that does not
    exist makes an answer invalid.
    """
    # No letter is parsed where an A would be an article: otherwise (A) would be harder to give than (B). I is also a pronoun.
    alone = (
        r"(?![\w'\u2019-])(?!(?<=I)\s+[a-z])(?!\s+(?!(?:too|as|also|is|was|are|were|or|nor|and|not|but|because|since|which|would"
        r"|could|can|cannot|should|will|does|then|instead|rather|if|so|by|for|due|given)\b)[a-z])"
    )
    joined = r"(?:(?<=\band )|(?<=\bor )|(?<=\bplus )|(?<=\bthen )|(?<=\bnot ))"
    another = rf"(?:(?:,[ \t]*|[ \t]+and[ \t]+)[A-HJ-Z]{alone})?"
    letter = rf"\b[{letters}]{alone}|{joined}[{letters}](?![\w'\u2019-]|(?<=I) )"
    pattern = re.compile(rf"(?:\([a-zA-Z]\)|{letter}){another}")

    def normal(found: str) -> str | None:
        letter = found.strip("()").upper()
        return f"({letter})" if letter in letters else None

    opening = re.compile(rf"[\s*`\"'$_]*(?:[Oo]ption\s+)?(?=(?:\([a-zA-Z]\)|[{letters}]\**[).:])[*.:,]*\s+[*_\"'$]*\w)")
    return AnswerForm(pattern=pattern, normal=normal, opening=opening)


def number_form(*, decimals: bool = False) -> AnswerForm:
    """Return the form of whole or also decimal numbers, with or without commas between thousands; a calculation is none."""
    # The last part matches the start of a calculation, so that 5 * 5 is not twice the number 5, and words that change the
    # number: 5 million, 5x, 5 \\pi, A5.
    more = (
        r"hundred|thousand|million|billion|trillion|dozen|percent|pi|squared|cubed|plus|minus|divided|point|(?:and a )?half"
        r"|(?:times|over|to|and)(?=\W*[0-9])|[b-z](?![\w'\u2019])"
    )
    pattern = re.compile(
        r"(?:[-+\u2212.]|[^\W_])?[0-9](?:[\w.,]*\w)?(?:\.\.|\s*[+^=<>~|&]|\s*[-*/:(\u2212\u00d7\u00f7](?=\s*[-+(]?[0-9])|\s?[%!]"
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

    # An amount: a number and up to three words, "18 dollars a day".
    opening = re.compile(r"[\s*`\"'$_]*(?=[-+]?[0-9][0-9.,]*\**(?:[ \t]+[a-zA-Z]+){1,3}[.\s*]*\Z)")
    return AnswerForm(pattern=pattern, normal=normal, opening=opening)


def bracket_form() -> AnswerForm:
    """Return the form of closing brackets; the normal form has one space between two of them."""
    pattern = re.compile(r"[()\[\]{}<>](?:\s*[()\[\]{}<>])*")

    def normal(found: str) -> str | None:
        brackets = "".join(found.split())
        return " ".join(brackets) if all(bracket in ")]}>" for bracket in brackets) else None

    return AnswerForm(pattern=pattern, normal=normal, latex=False)


_ANSWER = re.compile(r"\banswer\s*:", re.IGNORECASE)


def read_open(text: str) -> str | None:
    """Return an answer of any form, with single spaces; None if the text gives none, or several.

    The answer is the text if it has one line, or all that follows "Answer:" (which also stands for a box). Several labels have
    to give the same answer. So a second thought, a doubt or an explanation is part of the answer, and makes it wrong.
    """
    first, *labelled = _ANSWER.split(unboxed(text))
    if not labelled and "\n" in first.strip(_WRAPPING):
        return None
    answers = {" ".join(part.strip(_WRAPPING).split()) for part in labelled or [first]} - {""}
    return answers.pop() if len(answers) == 1 else None


def read_exact(text: str) -> str | None:
    """Return the answer of `read_open` without the full stop after it."""
    answer = read_open(text) or ""
    return (answer if answer.endswith("..") else answer.removesuffix(".").rstrip(_WRAPPING)) or None

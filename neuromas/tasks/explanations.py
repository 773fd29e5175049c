"""Checks the text after an answer: whether it explains the answer, withdraws it, or names another one.

An explanation may deny: "No, you do not return" is as much an answer as "Yes, you return", and "B, since (A) is no gas" names
one option alone. A text must not join two answers ("A or B", "5, 6", "Yes. No."), claim a second one ("(A). It could be (B)"),
deny or doubt its own, or withdraw it.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


def _compile(*parts: str) -> re.Pattern[str]:
    return re.compile("".join(parts), re.IGNORECASE)


_NEAR = 100
"""Most characters between an answer and words about it."""
_BLANK = " \t\r\n*_`\"'$.,;:!?()[]{}\u201d"
_CLAUSE = r"(?:^|[\n.,;:!?(\u2014\u2013-])[ \t]*+"
_WRAP = r"[\s*_\"'`$)\]}]*+"
_STOP = re.compile(r"[.!?;]++(?=[)\]}*_`\"'$\u201d]*(?:\s|$))|\n\s*+")

# A new clause with its own subject: another answer in it is not a second answer.
_SUBJECT = _compile(
    r"[,:(\u2014\u2013-]\s*(?:it|this|that|these|those|you|he|she|they|we|i|there|the|which|who|its|his|her|their|our|your|each",
    r"|every|all|while|whereas|where|so|thus|hence)\b",
)
_EXPLAINS = _compile(
    r"\b(?:because|since|(?<!well )as(?! well)|for|due to|given",
    r"|(?:explanation|reason(?:ing|s)?|justification|rationale|steps?|proof|check|verification|working|solution|analysis)",
    r"\s*+\**+\s*+:)",
)

_OR = _compile(r"[\W_]*+(?:(?:and/)?or|nor)\b")
_BARE_NOT = _compile(r"\W*(?:not|never)\b(?!\s+(?!(?:the )?answer\b)[_(*\"']*\w)")
_BE = r"(?:is|was|are|were|seems?|looks?|sounds?|(?:would|must|could|might|may|should|can|will|has to) be)"
_WRONG = r"(?:wrong|incorrect|mistaken|inaccurate|impossible|untrue|false)"
_RIGHT = r"(?:right|correct|true|it|so|the (?:right |correct )?answer)"
_DENIED = _compile(
    _WRAP,
    rf"(?:{_BE}\s+(?:(?:the|a|an|also|\w+ly)\s+)*(?:not|never|no\s+(?:good|answer)|{_WRONG})",
    r"|(?:is|was|are|were|could|would|should|does|do|did|has|must|will)(?:n['\u2019]t|\s+not)|can['\u2019]t|won['\u2019]t",
    r"|can\s?not)\b",
)
_SAID_WRONG = _compile(
    rf"\b(?:it|this|that|which|answer)(?:['\u2019]s|\s+{_BE})\s+(?:(?:also|\w+ly)\s+)*(?:{_WRONG}|not\s+{_RIGHT})\b",
    rf"|\b(?:it|this|that|answer)\s+(?:is|was)n['\u2019]t\s+{_RIGHT}\b",
)
_IT_IS_NOT = _compile(
    r"\b(?:it|this|that|answer)(?:['\u2019]s\s+not|\s+(?:is|was)(?:n['\u2019]t|\s+not))\s+[*_(\"'`$]*$",
)
_NOT = _compile(r"(?:\bnot|n['\u2019]t)\s+[*_(\"'`$]*$")
_DOUBT = _compile(
    r"\b(?:maybe|perhaps|(?<!not )(?<!t )possibly|unsure|uncertain|not (?:\w+ly )?(?:sure|certain|confident)",
    r"|(?:might|may|could) be (?:wrong|mistaken|incorrect))\b",
)
_WITHDRAWN = _compile(
    _CLAUSE,
    r"(?:(?:but|no|oh|or),?\s+)?(?:wait|oops|sorry|hmm+|correction|scratch|nope|nah|not really|not quite|not exactly",
    r"|just kidding|on (?:second|reflection))\b",
    r"|(?:^|[\n.;!?])[ \t]*+(?:actually|alternatively|otherwise|or|rather|instead)\b",
    r"|\bi (?:was|am) (?:wrong|mistaken|incorrect)\b|\bi mean|\btake (?:it|that) back\b|\bchange my mind\b|\bnever ?mind\b",
    r"|\bsecond thought",
)

_CLAIMED_BEFORE = _compile(
    r"(?:\b(?:it|this|that|answer|option|choice|result)(?:['\u2019]s|\s+(?:is|was",
    r"|(?:would|should|must|could|might|may|will) be))",
    r"|\b(?:choose|pick|select|mean|meant|prefer|say|go(?:ing)? with|change (?:it|that|this) to))",
    r"\s+(?:(?:actually|really|probably|also|rather|then|in fact|the|option|choice|letter|number)\s+)*[*_(\"'`$\\]*$",
)
_CLAIMED_AFTER = _compile(
    _WRAP,
    rf"(?:(?:{_BE}\s+(?:(?:also|the|a|an|just|equally|actually|really|most|more|very|my|in fact|quite|another|still|indeed",
    r"|then|\w+ly)\s+)*(?:right|correct|answer|best|better|it|fine|good|acceptable|final|ok|okay",
    r"|(?P<of_words>true|valid|plausible|possible|likely)))|(?:also\s+)?(?:works|fits|applies|holds))\b",
)
_ADDED = _compile(r"\b(?:instead(?! of)|rather(?! than)|alternatively|equally|too(?=\W*$)|as well(?! as))\b")
_LEADS_IN = _compile(
    r"(?:\W|_|\b(?:and|but|then|or|so|thus|hence|therefore|option|choice|also|no|yes|well|okay|ok|plus|to|it|is|that)\b)*",
)
_PREDICATE = _compile(
    _WRAP,
    r"[.:,]*+\s*+(?:[-\u2013\u2014]\s+)?(?:is|are|was|were|does|do|did|can|cannot|could|would|will|has|have|had|describes?",
    r"|refers?|means?|says?|involves?|fails?|lacks?|contradicts?|requires?|produces?|uses?|depends?|not|too|only|irrelevant",
    rf"|{_WRONG}|\w+n['\u2019]t)\b|[^\n.;]*=",
)
_JOINED = _compile(_WRAP, r",?\s*+(?:and|or|nor)?\s*[(*_\"'`$]*")


@dataclass(frozen=True, slots=True)
class Span:
    """The position of something like an answer in a text, and the answer; None if it is none, as 5/6 is no number."""

    start: int
    end: int
    answer: str | None


def stands(text: str, claim: Span, later: Sequence[Span], *, labelled: bool, words: bool, interjections: str) -> bool:
    """Return whether the text after an answer leaves it valid; `later` are the spans there that look like answers.

    After a label ("Answer:") and a "because", other answers may be listed. With `words`, the answers are words of the
    language: "No, that is wrong" and "False. It is not true" deny the question, not the answer. `interjections` are words
    that, alone in a clause, are another answer.
    """
    end, stops = claim.end, list(_STOP.finditer(text, claim.end))
    tail, first_stop = text[end:], stops[0].start() if stops else len(text)
    if _OR.match(tail) or _DENIED.match(tail) or _DOUBT.search(tail) or _WITHDRAWN.search(tail):
        return False
    if interjections and re.search(rf"{_CLAUSE}(?:{interjections})\s*(?:[.,!;]|$)", tail, re.IGNORECASE):
        return False
    explained = next((m.start() for m in _EXPLAINS.finditer(text, end) if labelled), len(text))
    subject = next((m.start() for m in _SUBJECT.finditer(text, end, first_stop)), len(text))
    head_end = min(first_stop, explained, subject)
    if _BARE_NOT.match(text, end, head_end) or "?" in text[end : stops[0].end() if stops else len(text)]:
        return False
    if any(span.answer != claim.answer and span.start < head_end for span in later):
        return False
    starts = [end, *(stop.end() for stop in stops)]
    named: dict[int, list[Span]] = {}
    for span in later:
        named.setdefault(bisect_right(starts, span.start) - 1, []).append(span)
    for k, (start, stop) in enumerate(pairwise([*starts, len(text)])):
        sentence = _Sentence(text, start, stop, named.get(k, ()), claim.answer)
        if sentence.denies(words=words) or sentence.claims_another(explained, words=words):
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Sentence:
    """One sentence after an answer, with the spans in it that look like answers."""

    text: str
    start: int
    stop: int
    spans: Sequence[Span]
    answer: str | None

    def _around(self, span: Span) -> tuple[str, str]:
        """Return the text before and after a span, at most `_NEAR` characters of each, so that long texts take no longer."""
        return self.text[max(self.start, span.start - _NEAR) : span.start], self.text[
            span.end : min(self.stop, span.end + _NEAR)
        ]

    @property
    def others(self) -> list[Span]:
        return [span for span in self.spans if span.answer != self.answer]

    def denies(self, *, words: bool) -> bool:
        """Return whether the sentence denies the answer."""
        if not words and not self.others and _SAID_WRONG.search(self.text, self.start, self.stop):
            return True
        same = [self._around(span) for span in self.spans if span.answer == self.answer]
        if words:
            return any(_IT_IS_NOT.search(before) for before, _ in same)
        return any(_NOT.search(before) or _DENIED.match(after) for before, after in same)

    def claims_another(self, explained: int, *, words: bool) -> bool:
        """Return whether the sentence claims another answer, not only discusses it; from `explained` on, a list claims none."""
        others = self.others
        for k, span in enumerate(others):
            before, after = self._around(span)
            if _CLAIMED_BEFORE.search(before) or _ADDED.search(after):
                return True
            # "not False is True" claims nothing.
            if (claimed := _CLAIMED_AFTER.match(after)) and not (words and claimed["of_words"]):
                return True
            if len(before) < _NEAR and _LEADS_IN.fullmatch(before):
                # "(A) and (C) are wrong" discusses both; "(A)" alone, or "(A) red ball", is an answer.
                last = k
                while last + 1 < len(others) and _JOINED.fullmatch(self.text, others[last].end, others[last + 1].start):
                    last += 1
                _, after = self._around(others[last])
                if not after.strip(_BLANK) if span.start > explained else not _PREDICATE.match(after):
                    return True
        return False

"""Finds which of a few words a text states ("sure", not "unsure" or "not sure"), for methods that act on a judgement."""

import re

_SENTENCE = re.compile(r"[^.;:!?\n]+\??")
_DENIAL = re.compile(r"\b(?:not|no|none|never|neither|nor|cannot|hardly|without|unless|whether|if|doubt)\b|n['\u2019]t\b")
_TURN = re.compile(r"\b(?:but|yet|however|only|except|instead|rather)\b|,\s*(?:it|they|this|that|so|and)\b")


def stated(text: str, pattern: str) -> set[str]:
    """Return the words, in small letters, that a text names and does not ask for, deny, doubt or suppose.

    A denial of a word stands before it in its sentence, after the last turn ("but").

    >>> stated("It does not support it, but contradicts it.", "supports?|contradicts?")
    {'contradicts'}
    >>> stated("Unsure. It is not likely.", "sure|likely")
    set()
    """
    found = set()
    for sentence in _SENTENCE.findall(text.lower()):
        for word in re.finditer(rf"\b(?:{pattern})\b", sentence):
            before = _TURN.split(sentence[: word.start()])[-1]
            if not sentence.endswith("?") and not _DENIAL.search(before):
                found.add(word.group())
    return found

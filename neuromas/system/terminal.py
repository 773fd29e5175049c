"""Escapes text of models and files for the terminal."""

import unicodedata

_KEPT = "\n\t\u200c\u200d"
"""Line breaks, tabs, and the characters that join letters and parts of emoji."""


def printable(text: str, keep: str = _KEPT) -> str:
    r"""Return a text with every character escaped that controls a terminal, e.g. as `\x1b`.

    These are control characters (C0, C1), characters that are invisible or turn the direction of writing (Cf), other line
    separators, and halves of surrogate pairs, which cannot be printed. The text of a model or a file may hold any of them.
    """
    return "".join(c if c.isprintable() or c in keep or not _controls(c) else ascii(c)[1:-1] for c in text)


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def shortened(text: str, most: int = 40) -> str:
    """Return a text of so many characters at most; a longer one is cut and ends in dots."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def one_line(text: str) -> str:
    """Return a text as one line for a terminal."""
    return printable(text, keep="")


def in_short(error: BaseException) -> str:
    """Return what another program's error says, in one line of 300 characters at most; its type if it says nothing."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__

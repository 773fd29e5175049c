"""Text that others wrote, made fit for a terminal."""

import unicodedata

_KEPT = "\n\t\u200c\u200d"
"""Line breaks, tabs, and what joins letters and parts of emoji."""


def printable(text: str, keep: str = _KEPT) -> str:
    r"""Return a text with every character that steers a terminal spelled out, e.g. `\x1b`.

    That are control characters (C0, C1), what turns the direction of writing or is invisible (Cf), other line separators, and
    halves of surrogate pairs, which cannot be printed at all. What a model or a file says may hold any of them.
    """
    return "".join(c if c.isprintable() or c in keep or not _steers(c) else ascii(c)[1:-1] for c in text)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def one_line(text: str) -> str:
    """Return a text as one line for a terminal."""
    return printable(text, keep="")

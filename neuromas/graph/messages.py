"""How a node's text becomes messages: `TO node k:` and what node k reads (arXiv 2605.16757). Malformed text is data."""

import re
from collections.abc import Sequence

from neuromas.types import Message, MessageStatus

NOTHING = "(nothing)"
"""What a recipient reads where no message arrived."""

_SEGMENT = re.compile(r"\bTO node ([0-9]+):", re.IGNORECASE)


def header(recipient: int) -> str:
    """Return what begins a message to a node."""
    return f"TO node {recipient}:"


def parse(text: str, sender: int, recipients: Sequence[int]) -> tuple[Message, ...]:
    """Split a node's text into one message per recipient; never raises.

    A recipient named twice gets both segments, joined by a line break. Text before the first segment and segments for other
    nodes are dropped. A text without any segment goes to every recipient as it is (`MessageStatus.UNADDRESSED`).
    """
    parts = _SEGMENT.split(text)
    segments: dict[int, list[str]] = {}
    for number, body in zip(parts[1::2], parts[2::2], strict=True):
        # A number with thousands of digits names nobody; int() would refuse it.
        if len(number) <= 9:
            segments.setdefault(int(number), []).append(body.strip())
    unaddressed = len(parts) == 1

    def message(recipient: int) -> Message:
        if unaddressed:
            body, status = text.strip(), MessageStatus.UNADDRESSED
        elif recipient not in segments:
            return Message(sender, recipient, NOTHING, MessageStatus.MISSING)
        else:
            body, status = "\n".join(filter(None, segments[recipient])), MessageStatus.OK
        return Message(sender, recipient, body, status) if body else Message(sender, recipient, NOTHING, MessageStatus.EMPTY)

    return tuple(message(recipient) for recipient in recipients)


def deliver(texts: Sequence[str], sender: int, recipients: Sequence[int]) -> tuple[Message, ...]:
    """Return one message per recipient from texts whose headers were given; never raises."""

    def message(recipient: int, text: str) -> Message:
        body = text.strip()
        return Message(sender, recipient, body or NOTHING, MessageStatus.OK if body else MessageStatus.EMPTY)

    # The output node's text is no message.
    return tuple(message(recipient, text) for recipient, text in zip(recipients, texts, strict=True)) if recipients else ()


def drops_text(text: str, recipients: Sequence[int]) -> bool:
    """Say whether `parse` delivers only part of a text: it begins before the first segment, or has one for somebody else."""
    parts = _SEGMENT.split(text)
    addressed = [int(number[:9]) for number in parts[1::2]]
    return bool(addressed) and (bool(parts[0].strip()) or not set(addressed) <= set(recipients))

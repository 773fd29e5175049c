"""What a node reads and how its text becomes messages. Plain text only: tokens are the backbone's business.

A prompt is the question, the same for every node, then the node's own part: its id and layer, who wrote what to it, and
to whom it writes. It mentions no role, unless the topology gives one, and never the size of the network, so a node's prompt
does not change when nodes that it does not talk to come or go. The paper's exact wording is not public; `TO node k:`
segments are its format (arXiv 2605.16757).
"""

import re
from collections.abc import Sequence

from neuromas.graph.topology import Topology
from neuromas.types import Example, Message, MessageStatus

NOTHING = "(nothing)"
"""What a recipient reads where no message arrived."""

_SEGMENT = re.compile(r"\bTO node ([0-9]+):", re.IGNORECASE)


def render(topology: Topology, node: int, example: Example, inbox: Sequence[Message]) -> str:
    """Return the node's own part of its prompt, which follows the question.

    >>> message = Message(1, 2, "hello", MessageStatus.OK)
    >>> print(render(Topology.layered([1, 1, 1]), 2, example, [message]))
    You are node 2 in layer 2.
    From node 1: hello
    Write "TO node 3:" and your message.
    """
    is_output = not topology.recipients(node)
    layer = "the output layer" if is_output else f"layer {topology.layer(node)}"
    lines = list(filter(None, [f"You are node {node} in {layer}.", topology.role(node)]))
    lines += [f"From node {message.sender}: {message.text}" for message in inbox]
    if is_output:
        lines.append(example.answer_format)
    else:
        headers = " and ".join(f'"TO node {recipient}:"' for recipient in topology.recipients(node))
        lines.append(f"Write {headers} and your message.")
    return "\n".join(lines)


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


def drops_text(text: str, recipients: Sequence[int]) -> bool:
    """Say whether `parse` delivers only part of a text: it begins before the first segment, or has one for somebody else."""
    parts = _SEGMENT.split(text)
    addressed = [int(number[:9]) for number in parts[1::2]]
    return bool(addressed) and (bool(parts[0].strip()) or not set(addressed) <= set(recipients))

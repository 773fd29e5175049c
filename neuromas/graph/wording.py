"""How a node's prompt is worded, and how its turn begins.

A prompt is the question, the same for every node, then the node's own part: where it is in the network, who wrote what to it,
and what to write to whom. No wording mentions a role, unless the topology gives one, nor the size of the network, so a node's
prompt does not change when nodes that it does not talk to come or go. The paper's exact wording is not public; `TO node k:`
headers are its format (arXiv 2605.16757).

A node may be left to write the headers itself, or its turn is begun by them: they are then given, not sampled, and a node with
several recipients gets the next header where it has ended a message. A pretrained model that has never seen the format needs
that; the bundled backbone has learned it.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from neuromas.graph.messages import header
from neuromas.graph.topology import Topology
from neuromas.types import Example, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """The template of a node's own part of its prompt, and what begins its turn."""

    name: str
    place: str
    """Holds {node} and {layer}, e.g. `layer 2` or `the output layer`."""
    message: str
    """Holds {sender} and {text}; a line for each message that the node has received."""
    write: str
    """What a node with recipients is told; may hold {node}, {headers} and {recipients}."""
    answer: str
    """What the output node is told; may hold {format}, the task's answer format."""
    begin_messages: bool
    """Whether each message is begun by its header."""
    begin_answer: str
    """What the output node's turn is begun by, if the task's answer format names it (a program begins otherwise)."""
    chat: bool
    """Whether the prompt is a user's turn of the backbone's chat template, if it has one."""
    one_line: bool
    """Whether a text ends with its line."""

    def render(self, topology: Topology, node: int, example: Example, inbox: Sequence[Message]) -> str:
        """Return the node's own part of its prompt, which follows the question.

        >>> from neuromas.types import MessageStatus
        >>> message = Message(1, 2, "hello", MessageStatus.OK)
        >>> example = Example("", "Is 2 even?", "Yes", 'Write "Answer: Yes" or "Answer: No".')
        >>> print(WORDINGS["terse"].render(Topology.layered([1, 1, 1]), 2, example, [message]))
        You are node 2 in layer 2.
        From node 1: hello
        Write "TO node 3:" and your message.
        """
        recipients = topology.recipients(node)
        layer = f"layer {topology.layer(node)}" if recipients else "the output layer"
        lines = list(filter(None, [self.place.format(node=node, layer=layer), topology.role(node)]))
        lines += [self.message.format(sender=received.sender, text=received.text) for received in inbox]
        if recipients:
            headers = " and ".join(f'"{header(recipient)}"' for recipient in recipients)
            named = " and ".join(f"node {recipient}" for recipient in recipients)
            lines.append(self.write.format(node=node, headers=headers, recipients=named))
        else:
            lines.append(self.asks(example.answer_format))
        return "\n".join(lines)

    def asks(self, answer_format: str) -> str:
        """Return what whoever answers is told of the answer's form."""
        return self.answer.format(format=answer_format)

    def begins(self, recipients: Sequence[int], answer_format: str) -> tuple[str, ...]:
        """Return what each text of a node is begun by; empty if the node is left to begin itself."""
        if recipients:
            return tuple(map(header, recipients)) if self.begin_messages else ()
        return (self.begin_answer,) if self.begin_answer and self.begin_answer in answer_format else ()


WORDINGS = {
    wording.name: wording
    for wording in (
        Wording(
            name="terse",
            place="You are node {node} in {layer}.",
            message="From node {sender}: {text}",
            write="Write {headers} and your message.",
            answer="{format}",
            begin_messages=False,
            begin_answer="",
            chat=True,
            one_line=False,
        ),
        Wording(
            name="chat",
            place="You are node {node} in {layer}.",
            message="Node {sender} wrote to you: {text}",
            write="Do not answer yet. Write to {recipients}, in one or two sentences, what helps to find the answer.",
            answer="{format}",
            begin_messages=True,
            begin_answer="Answer:",
            chat=True,
            one_line=False,
        ),
        Wording(
            name="plain",
            place="Node {node}, {layer}.",
            message="Node {sender} wrote: {text}",
            # A base model ends its line after a header of which it has read no example.
            write="Node {node} writes what it knows, as in:\nTO {recipients}: The first part is easy.",
            answer="{format}",
            begin_messages=True,
            begin_answer="Answer:",
            chat=False,
            one_line=True,
        ),
    )
}
"""`terse` is what the bundled backbone learned, `chat` is for instruct models, `plain` for base models."""
BEGIN_ANSWERS = frozenset(wording.begin_answer for wording in WORDINGS.values())
"""What these begin an answer by, where the task's answer format names it."""


_FIELDS = {
    "place": ("node", "layer"),
    "message": ("sender", "text"),
    "write": ("node", "headers", "recipients"),
    "answer": ("format",),
}


def check_begin_answer(begin: str, examples: Sequence[Example]) -> None:
    """Raise ValueError if a setting that is to begin answers begins none of these examples'."""
    if begin not in BEGIN_ANSWERS and examples and not any(begin in example.answer_format for example in examples):
        raise ValueError(
            f"--prompt.begin-answer {begin!r} begins no answer: only words of the task's answer format do, which is "
            f"{examples[0].answer_format!r}"
        )


def check_template(name: str, text: str, needed: tuple[str, ...]) -> None:
    """Raise ValueError, with the setting's name, if a template holds what it may not or lacks what it must hold."""
    known = _FIELDS[name]
    try:
        fields = [(field, spec, kind) for _, field, spec, kind in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise ValueError(f"--prompt.{name}: {error} in {text!r}; write a brace that is meant as {{{{ or }}}}") from error
    found = {field for field, _, _ in fields}
    # A format after a colon may hold fields of its own, and a width of any length.
    formatted = [f"{field}:{spec}" if spec else f"{field}!{kind}" for field, spec, kind in fields if spec or kind]
    if unknown := [*sorted(found - set(known)), *formatted]:
        raise ValueError(f"--prompt.{name} may hold {', '.join(f'{{{field}}}' for field in known)}, got {{{unknown[0]}}}")
    if missing := [field for field in needed if field not in found]:
        raise ValueError(f"--prompt.{name} must hold {{{missing[0]}}}, got {text!r}")

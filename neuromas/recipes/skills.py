"""Generates the conversations from which the bundled backbone learns to behave as a small general model.

It learns the message format, single steps of the problems in `trace`, to continue the work of a message, and also to guess,
restate and chatter. A message holds a few steps at most (`Trace.max_steps`), and guessing is likelier than working, so
reinforcement has useful behaviour to find.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from neuromas.graph.topology import Topology
from neuromas.graph.wording import WORDINGS
from neuromas.recipes.trace import Trace
from neuromas.recipes.traces import FAMILIES
from neuromas.types import Example, Message, MessageStatus

# Probabilities of behaviours: "work" continues the steps, "guess" names an answer, the others give none.
HIDDEN_SHARES = {"work": 0.25, "guess": 0.35, "restate": 0.2, "chatter": 0.2}
OUTPUT_SHARES = {"work": 0.25, "guess": 0.45, "restate": 0.15, "chatter": 0.15}
NATURAL_SHARE = 0.35
"""Share of messages whose behaviour is drawn by these probabilities and learned. The others are "work", and only the text after
its first word is learned, so that the backbone learns to work without preferring it."""

GUESSES = ("I think {}.", "My guess is {}.", "Maybe {}.", "It could be {}.")
CHATTER = (
    "Let us look at this question.",
    "Please check each step with care.",
    "This is a hard question.",
    "Thank you for the message.",
    "We have to find out what happens.",
    "Good luck to all of us.",
)
_GUESSED = re.compile(r"(?:I think|My guess is|Maybe|It could be) ([^;]{1,24})\.$")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text, and whether it is learned."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One node's turn: the node's part of the prompt, and the text that it writes."""

    prompt: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """The most advanced work in an inbox: its number of steps and the state that it names."""

    steps: int
    state: str


def draw_problem(rng: random.Random) -> Trace:
    """Draw a family by its share, and a problem of it."""
    return rng.choices(FAMILIES, weights=[family.share for family in FAMILIES])[0].draw(rng)


def work_text(rng: random.Random, trace: Trace, progress: Progress | None) -> tuple[str, Progress]:
    """Return a text of a few further steps, and the progress after it."""
    done, state = (progress.steps, progress.state) if progress else (0, trace.start)
    parts = [f"{'from' if done else 'start'} {state}"]
    counts = range(1, trace.max_steps + 1)
    for _ in range(rng.choices(counts, weights=counts)[0]):
        if trace.finished(done, state):
            break
        what, state = trace.step(done, state)
        parts.append(f"{what} {state}")
        done += 1
    return f"{';'.join(parts)}. {'Done' if trace.finished(done, state) else 'More'}", Progress(done, state)


def draw_progress(rng: random.Random, trace: Trace) -> Progress | None:
    """Draw the progress of an earlier message; sometimes its state is wrong, and the reader has to continue from it."""
    states = trace.states()
    # The last step decides the answer, so it is drawn more often than the others.
    done = len(states) - 2 if rng.random() < 0.2 else rng.randrange(len(states) - 1)
    if not done or rng.random() < 0.35:
        return None
    return Progress(done, trace.wrong(rng, states[done]) if rng.random() < 0.3 else states[done])


def draw_behaviour(rng: random.Random, shares: dict[str, float]) -> str:
    """Draw a behaviour by these probabilities."""
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def other_text(rng: random.Random, trace: Trace, behaviour: str) -> str:
    """Draw a text of a behaviour other than "work"."""
    if behaviour == "guess":
        return rng.choice(GUESSES).format(trace.guess(rng))
    if behaviour == "restate":
        sentences = trace.sentences()
        first = rng.randrange(len(sentences))
        return " ".join(sentences[first : first + rng.randint(1, 3)])
    return rng.choice(CHATTER)


def draw_inbox_text(rng: random.Random, trace: Trace) -> tuple[str, Progress | None]:
    """Draw the text of a message, and the progress in it."""
    if rng.random() < 0.4:
        return other_text(rng, trace, draw_behaviour(rng, {k: v for k, v in HIDDEN_SHARES.items() if k != "work"})), None
    text, progress = work_text(rng, trace, draw_progress(rng, trace))
    if rng.random() < 0.05:
        return text + rng.choice((". I think {}.", ". Maybe {}.")).format(trace.guess(rng)), progress
    return text, progress


def draw_turn(rng: random.Random, trace: Trace, example: Example) -> Turn:
    """Draw a node of a random network, its inbox, and the text that it writes."""
    widths = [*rng.choices((1, 2, 3), weights=(7, 3, 1), k=rng.choices((0, 1, 2, 3, 4), weights=(1, 2, 4, 2, 1))[0]), 1]
    topology = Topology.layered(widths)
    node = topology.output_node if rng.random() < 0.4 else rng.choice(topology.nodes)
    progress: Progress | None = None
    inbox = []
    for sender in topology.senders(node):
        text, found = draw_inbox_text(rng, trace)
        inbox.append(Message(sender, node, text, MessageStatus.OK))
        if found and (progress is None or found.steps > progress.steps):
            progress = found
    prompt = WORDINGS["terse"].render(topology, node, example, inbox)
    if node == topology.output_node:
        return Turn(prompt, tuple(output_pieces(rng, trace, progress, inbox)))
    pieces: list[Piece] = []
    for recipient in topology.recipients(node):
        pieces.append(Piece(f"{' ' if pieces else ''}TO node {recipient}:", True))
        pieces += message_pieces(rng, trace, progress)
    return Turn(prompt, tuple(pieces))


def _work_pieces(text: str, natural: bool) -> list[Piece]:
    choice, _, rest = text.partition(" ")
    return [Piece(f" {choice}", natural), Piece(f" {rest}", True)]


def message_pieces(rng: random.Random, trace: Trace, progress: Progress | None) -> list[Piece]:
    """Draw the text of a hidden node's message."""
    natural = rng.random() < NATURAL_SHARE
    behaviour = draw_behaviour(rng, HIDDEN_SHARES) if natural else "work"
    if behaviour == "work":
        return _work_pieces(work_text(rng, trace, progress)[0], natural)
    return [Piece(f" {other_text(rng, trace, behaviour)}", True)]


def output_pieces(rng: random.Random, trace: Trace, progress: Progress | None, inbox: Sequence[Message]) -> list[Piece]:
    """Draw the text of the output node."""
    natural = rng.random() < NATURAL_SHARE
    behaviour = draw_behaviour(rng, OUTPUT_SHARES) if natural else "work"
    if behaviour == "work":
        text, reached = work_text(rng, trace, progress)
        answer = trace.answer(reached.state) if trace.finished(reached.steps, reached.state) else trace.guess(rng)
        return [*_work_pieces(text, natural), Piece(f". Answer: {answer}", True)]
    if behaviour == "guess":
        guesses = [match[1] for message in inbox if (match := _GUESSED.search(message.text))]
        answer = rng.choice(guesses) if guesses and rng.random() < 0.5 else trace.guess(rng)
        return [Piece(f" Answer: {answer}", True)]
    return [Piece(f" {other_text(rng, trace, behaviour)}", True)]


def work_turn(trace: Trace, done: int) -> Turn:
    """Return a hidden node's turn after `done` steps, with as many steps as a message may hold; each step is a piece."""
    topology = Topology.layered([1, 1, 1])
    states = trace.states()
    inbox = []
    if done:
        first = max(0, done - trace.max_steps)
        steps = [" ".join(trace.step(k, states[k])) for k in range(first, done)]
        inbox = [
            Message(1, 2, ";".join([f"{'from' if first else 'start'} {states[first]}", *steps]) + ". More", MessageStatus.OK)
        ]
    node = 2 if done else 1
    prompt = WORDINGS["terse"].render(topology, node, trace.example(), inbox)
    pieces = [Piece(f"TO node {node + 1}: {'from' if done else 'start'} {states[done]};", False)]
    stop = min(done + trace.max_steps, len(states) - 1)
    for k in range(done, stop):
        # The punctuation after a step belongs to the piece: a token may merge a bracket with it.
        pieces.append(Piece(" ".join(trace.step(k, states[k])) + (";" if k + 1 < stop else "."), True))
    return Turn(prompt, tuple(pieces))


def draw_card(rng: random.Random) -> tuple[Piece, Piece]:
    """Draw one step from a random state: dense practice of single steps."""
    card = rng.choices(FAMILIES, weights=[family.share for family in FAMILIES])[0].card(rng)
    return Piece(card.given, False), Piece(f"{card.learned}.\n", True)

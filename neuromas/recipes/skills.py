"""Generated conversations from which the bundled backbone learns to behave as a small general model.

It learns the message format, single steps of a Navigate walk, to go on from where a message stopped, and also to guess,
restate and chatter. A message holds at most `MAX_STEPS_PER_MESSAGE` steps of a walk, and guessing is likelier than walking,
so what is useful is left for reinforcement to find.

Every question holds a number above 10, which no Navigate item of BIG-Bench-Hard and no item of the task's generator has:
the training text is disjoint from both by construction.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from neuromas import messages
from neuromas.tasks.navigate import MAX_STEPS, Instruction, Navigate, State, Walk, draw_walk
from neuromas.topology import Topology
from neuromas.types import Example, Message, MessageStatus

MAX_STEPS_PER_MESSAGE = 4
LARGEST_NUMBER = 15

# Shares of behaviours, by what the inbox offers. "work" walks on, "guess" names an answer, the others leave it open.
HIDDEN_SHARES = {"work": 0.25, "guess": 0.35, "restate": 0.2, "chatter": 0.2}
OUTPUT_SHARES = {"work": 0.25, "guess": 0.45, "restate": 0.15, "chatter": 0.15}
NATURAL_SHARE = 0.35
"""Share of messages whose behaviour is drawn by the shares and learned; in the others it is "work" and only what follows
the choice is learned, so that skills get practice without becoming habits."""

GUESSES = ("I think {}.", "My guess is {}.", "Maybe {}.", "It could be {}.")
CHATTER = (
    "Let us look at this question.",
    "Please check each step with care.",
    "This is a hard question.",
    "Thank you for the message.",
    "We have to find out what happens.",
    "Good luck to all of us.",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text and whether it is learned."""

    text: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One node's turn: the node's part of the prompt, then what it writes."""

    prompt: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """The most advanced walk in an inbox: the steps it has done and the state that it names."""

    steps: int
    state: State


def draw_question(rng: random.Random) -> tuple[Walk, Example]:
    while True:
        returns = rng.random() < 0.5
        walk = draw_walk(rng, returns=returns, max_steps=LARGEST_NUMBER)
        if max(i.steps for i in walk.instructions) > MAX_STEPS:
            return walk, Example("", walk.question, "Yes" if returns else "No", Navigate.answer_format)


def state_text(state: State) -> str:
    return f"({state.x},{state.y})" + (f" {state.heading}" if state.heading else "")


def step_text(number: int, instruction: Instruction, after: State) -> str:
    """Restate an instruction, then its result: naming states alone is learned badly."""
    what = f"{instruction.steps} {instruction.direction or 'steps'}" if instruction.steps else f"turn {instruction.direction}"
    return f"{number}:{what} {state_text(after)}"


def work_text(rng: random.Random, walk: Walk, heard: Heard | None) -> tuple[str, Heard]:
    """Walk up to four steps on from what was heard; return the text and where it ends."""
    done, state = (heard.steps, heard.state) if heard else (0, walk.start)
    parts = [f"{'from' if done else 'start'} {state_text(state)}"]
    count = rng.choices((1, 2, 3, 4), weights=(1, 2, 3, 4))[0]
    stop = min(done + count, len(walk.instructions))
    for number in range(done, stop):
        state = walk.instructions[number].apply(state)
        parts.append(step_text(number + 1, walk.instructions[number], state))
    end = "Done" if stop == len(walk.instructions) else "More"
    return ";".join(parts) + f". {end}", Heard(stop, state)


def draw_heard(rng: random.Random, walk: Walk) -> Heard | None:
    """Draw where an earlier message stopped; now and then at a wrong place, which a reader has to take as it is."""
    done = rng.randrange(len(walk.instructions))
    if not done or rng.random() < 0.35:
        return None
    state = walk.states()[done]
    if rng.random() < 0.3:
        state = replace(state, x=state.x + rng.randint(-12, 12), y=state.y + rng.randint(-12, 12))
    return Heard(done, state)


def draw_behaviour(rng: random.Random, shares: dict[str, float]) -> str:
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def other_text(rng: random.Random, walk: Walk, behaviour: str) -> str:
    if behaviour == "guess":
        return rng.choice(GUESSES).format(rng.choice(("Yes", "No")))
    if behaviour == "restate":
        first = rng.randrange(len(walk.instructions))
        return ". ".join(map(str, walk.instructions[first : first + rng.randint(1, 3)])) + "."
    return rng.choice(CHATTER)


def draw_inbox_text(rng: random.Random, walk: Walk) -> tuple[str, Heard | None]:
    """Draw what a sender wrote, and what can be heard in it."""
    if rng.random() < 0.4:
        return other_text(rng, walk, draw_behaviour(rng, {k: v for k, v in HIDDEN_SHARES.items() if k != "work"})), None
    text, heard = work_text(rng, walk, draw_heard(rng, walk))
    if rng.random() < 0.05:
        return text + rng.choice((". I think {}.", ". Maybe {}.")).format(rng.choice(("Yes", "No"))), heard
    return text, heard


def draw_turn(rng: random.Random, walk: Walk, example: Example) -> Turn:
    """Draw a node somewhere in some network, its inbox, and what it writes."""
    widths = [*rng.choices((1, 2, 3), weights=(7, 3, 1), k=rng.choices((0, 1, 2, 3, 4), weights=(1, 2, 4, 2, 1))[0]), 1]
    topology = Topology.layered(widths)
    node = topology.output_node if rng.random() < 0.4 else rng.choice(topology.nodes)
    heard: Heard | None = None
    inbox = []
    for sender in topology.senders(node):
        text, said = draw_inbox_text(rng, walk)
        inbox.append(Message(sender, node, text, MessageStatus.OK))
        if said and (heard is None or said.steps > heard.steps):
            heard = said
    prompt = messages.render(topology, node, example, inbox)
    if node == topology.output_node:
        return Turn(prompt, tuple(output_pieces(rng, walk, heard, inbox)))
    pieces: list[Piece] = []
    for recipient in topology.recipients(node):
        pieces.append(Piece(f"{' ' if pieces else ''}TO node {recipient}:", True))
        pieces += message_pieces(rng, walk, heard)
    return Turn(prompt, tuple(pieces))


def _work_pieces(text: str, natural: bool) -> list[Piece]:
    choice, _, rest = text.partition(" ")
    return [Piece(f" {choice}", natural), Piece(f" {rest}", True)]


def message_pieces(rng: random.Random, walk: Walk, heard: Heard | None) -> list[Piece]:
    natural = rng.random() < NATURAL_SHARE
    behaviour = draw_behaviour(rng, HIDDEN_SHARES) if natural else "work"
    if behaviour == "work":
        return _work_pieces(work_text(rng, walk, heard)[0], natural)
    return [Piece(f" {other_text(rng, walk, behaviour)}", True)]


def output_pieces(rng: random.Random, walk: Walk, heard: Heard | None, inbox: Sequence[Message]) -> list[Piece]:
    natural = rng.random() < NATURAL_SHARE
    behaviour = draw_behaviour(rng, OUTPUT_SHARES) if natural else "work"
    if behaviour == "work":
        text, reached = work_text(rng, walk, heard)
        pieces = _work_pieces(text, natural)
        if reached.steps == len(walk.instructions):
            answer = "Yes" if (reached.state.x, reached.state.y) == (0, 0) else "No"
        else:
            answer = rng.choice(("Yes", "No"))
        return [*pieces, Piece(f". Answer: {answer}", True)]
    if behaviour == "guess":
        heard_guesses = [word for message in inbox for word in ("Yes", "No") if message.text.endswith(f" {word}.")]
        answer = rng.choice(heard_guesses) if heard_guesses and rng.random() < 0.5 else rng.choice(("Yes", "No"))
        return [Piece(f" Answer: {answer}", True)]
    return [Piece(f" {other_text(rng, walk, behaviour)}", True)]


def work_turn(rng: random.Random, walk: Walk, example: Example, heard: Heard | None) -> Turn:
    """Node 2's turn that walks four steps on from what node 1 said; each step is a piece of its own."""
    topology = Topology.layered([1, 1, 1])
    said = f"from {state_text(walk.start)}. More"
    if heard:
        steps = [
            step_text(k + 1, walk.instructions[k], walk.states()[k + 1]) for k in range(max(0, heard.steps - 3), heard.steps)
        ]
        said = ";".join([f"from {state_text(walk.states()[max(0, heard.steps - 3)])}", *steps]) + ". More"
    inbox = [Message(1, 2, said, MessageStatus.OK)] if heard else []
    done, state = (heard.steps, heard.state) if heard else (0, walk.start)
    pieces = [Piece(f"TO node 3: {'from' if heard else 'start'} {state_text(state)};", False)]
    stop = min(done + MAX_STEPS_PER_MESSAGE, len(walk.instructions))
    for k in range(done, stop):
        state = walk.instructions[k].apply(state)
        # The mark that follows belongs to the piece: tokens merge a bracket with what comes after it.
        pieces.append(Piece(step_text(k + 1, walk.instructions[k], state) + (";" if k + 1 < stop else "."), True))
    return Turn(messages.render(topology, 2 if heard else 1, example, inbox).replace("node 2:", "node 3:"), tuple(pieces))


def draw_card(rng: random.Random) -> tuple[Piece, Piece]:
    """Draw one step from anywhere: dense practice of what a walk is made of."""
    sidestep = rng.random() < 0.6
    reach = rng.choice((6, 15, 40))
    heading = None if sidestep else rng.choice(("north", "east", "south", "west"))
    before = State(rng.randint(-reach, reach), rng.randint(-reach, reach), heading)
    if not sidestep and rng.random() < 0.4:
        instruction = Instruction(0, rng.choice(("left", "right", "around")))
    else:
        direction = rng.choice(("forward", "backward", "left", "right")) if sidestep else None
        instruction = Instruction(rng.randint(1, LARGEST_NUMBER), direction)
    after = state_text(instruction.apply(before))
    step = step_text(rng.randint(1, 10), instruction, instruction.apply(before)).removesuffix(f" {after}")
    return Piece(f"from {state_text(before)};{step}", False), Piece(f" {after}.\n", True)

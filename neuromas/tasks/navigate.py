"""Navigate, in the grammar of BIG-Bench-Hard: does a list of moves lead back to the start?

Two styles. `sidestep`: the walker always faces forward and steps forward, backward, left or right. `turn`: the walker steps
ahead and turns left, right or around. The generator is endless and balanced. In a "Yes" the sum over several moves is zero, and
half of the "No" are a "Yes" with one number, direction or turn changed, so that neither pairs of opposite moves nor
lengths reveal the answer.
"""

import random
import re
from dataclasses import dataclass, replace

from neuromas.tasks.answers import words_form
from neuromas.tasks.task import GeneratedTask, Problem

HEADINGS = ("north", "east", "south", "west")
VECTORS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
SIDESTEPS = {"forward": (0, 1), "right": (1, 0), "backward": (0, -1), "left": (-1, 0)}
TURNS = {"right": 1, "around": 2, "left": 3}

QUESTION = "If you follow these instructions, do you return to the starting point?"
OPTIONS = "Options:\n- Yes\n- No"
FACE_FORWARD = "Always face forward"

# Shares of 3 to 10 sentences ("Always face forward." is one): the lengths that BIG-Bench-Hard's own items have.
LENGTH_WEIGHTS = {3: 10, 4: 18, 5: 18, 6: 16, 7: 15, 8: 11, 9: 8, 10: 4}
MAX_STEPS = 10

_SENTENCE = re.compile(r"Take (\d+) steps?(?: (forward|backward|left|right))?|Turn (left|right|around)")
_ANSWER = words_form("Yes", "No")


@dataclass(frozen=True, slots=True)
class State:
    """The position after some instructions; `heading` is None in the sidestep style."""

    x: int = 0
    y: int = 0
    heading: str | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """`Take steps direction` (direction None: ahead), or `Turn direction` where steps is 0."""

    steps: int
    direction: str | None

    def __str__(self) -> str:
        if not self.steps:
            return f"Turn {self.direction}"
        text = f"Take {self.steps} step{'' if self.steps == 1 else 's'}"
        return f"{text} {self.direction}" if self.direction else text

    def vector(self, state: State) -> tuple[int, int]:
        """Return the unit vector of the move from a state; (0, 0) for a turn."""
        if not self.steps:
            return 0, 0
        return SIDESTEPS[self.direction] if self.direction else VECTORS[state.heading or "north"]

    def apply(self, state: State) -> State:
        """Return the state after this instruction."""
        if not self.steps and self.direction:
            heading = HEADINGS[(HEADINGS.index(state.heading or "north") + TURNS[self.direction]) % 4]
            return State(state.x, state.y, heading)
        dx, dy = self.vector(state)
        return State(state.x + self.steps * dx, state.y + self.steps * dy, state.heading)


@dataclass(frozen=True, slots=True)
class Walk:
    """The instructions of one problem in one style."""

    sidestep: bool
    instructions: tuple[Instruction, ...]

    @property
    def start(self) -> State:
        return State(heading=None if self.sidestep else "north")

    def states(self) -> list[State]:
        """Return the states before the first and after every instruction."""
        states = [self.start]
        for instruction in self.instructions:
            states.append(instruction.apply(states[-1]))
        return states

    @property
    def returns(self) -> bool:
        """Whether the walk ends at its start."""
        end = self.states()[-1]
        return (end.x, end.y) == (0, 0)

    @property
    def question(self) -> str:
        sentences = [FACE_FORWARD] * self.sidestep + [str(instruction) for instruction in self.instructions]
        return f"{QUESTION} {'. '.join(sentences)}.\n{OPTIONS}"

    @classmethod
    def parse(cls, question: str) -> "Walk":
        """Return the walk of a question; ValueError if it is not of this grammar."""
        head, _, tail = question.partition("\n")
        sentences = [s.strip() for s in head.removeprefix(QUESTION).split(".") if s.strip()]
        sidestep = sentences[:1] == [FACE_FORWARD]
        matches = [_SENTENCE.fullmatch(sentence) for sentence in sentences[sidestep:]]
        if not head.startswith(QUESTION) or tail != OPTIONS or not matches or not all(matches):
            raise ValueError(f"not a Navigate question: {question!r}")
        groups = [match.groups() for match in matches if match]
        return cls(sidestep, tuple(Instruction(int(n or 0), direction or turn) for n, direction, turn in groups))


def draw_walk(rng: random.Random, *, returns: bool, max_steps: int = MAX_STEPS, sentences: int | None = None) -> Walk:
    """Draw a walk in either style that returns to the start or does not; None draws a number of sentences from 3 to 10."""
    sidestep = rng.random() < 0.5
    length = (sentences or rng.choices(list(LENGTH_WEIGHTS), weights=list(LENGTH_WEIGHTS.values()))[0]) - sidestep
    near_miss = rng.random() < 0.5
    while True:
        walk = _random_walk(rng, sidestep, length, max_steps)
        if returns or near_miss:
            closed = _close(rng, walk, max_steps)
            if closed is None:
                continue
            walk = closed if returns else _change_one(rng, closed, max_steps)
        if walk.returns is returns:
            return walk


def _random_walk(rng: random.Random, sidestep: bool, length: int, max_steps: int) -> Walk:
    instructions = []
    for _ in range(length):
        # Turns are rarer than moves, as in the published items.
        if not sidestep and rng.random() < 0.38:
            instructions.append(Instruction(0, rng.choice(list(TURNS))))
        else:
            direction = rng.choice(list(SIDESTEPS)) if sidestep else None
            instructions.append(Instruction(rng.randint(1, max_steps), direction))
    return Walk(sidestep, tuple(instructions))


def _close(rng: random.Random, walk: Walk, max_steps: int) -> Walk | None:
    """Return the walk with one number along each axis changed so that it returns; None if no legal number does that."""
    instructions = list(walk.instructions)
    states = walk.states()
    vectors = [i.vector(s) for i, s in zip(instructions, states[:-1], strict=True)]
    if not any(map(any, vectors)):
        return None
    for axis, total in enumerate((states[-1].x, states[-1].y)):
        moves = [k for k, vector in enumerate(vectors) if vector[axis]]
        if not moves:
            continue
        k = rng.choice(moves)
        steps = instructions[k].steps - total * vectors[k][axis]
        if not 1 <= steps <= max_steps:
            return None
        instructions[k] = replace(instructions[k], steps=steps)
    return replace(walk, instructions=tuple(instructions))


def _change_one(rng: random.Random, walk: Walk, max_steps: int) -> Walk:
    """Return the walk with one number, direction or turn changed."""
    k = rng.randrange(len(walk.instructions))
    old = walk.instructions[k]
    if not old.steps:
        new = replace(old, direction=rng.choice([t for t in TURNS if t != old.direction]))
    elif walk.sidestep and rng.random() < 0.5:
        new = replace(old, direction=rng.choice([d for d in SIDESTEPS if d != old.direction]))
    else:
        new = replace(old, steps=rng.choice([n for n in range(1, max_steps + 1) if n != old.steps]))
    return replace(walk, instructions=(*walk.instructions[:k], new, *walk.instructions[k + 1 :]))


class Navigate(GeneratedTask):
    """Balanced Yes/No problems; the answer is the last word of "Answer: Yes" or "Answer: No".

    Difficulty is the number of sentences, 3 to 10 in the published items.
    """

    name = "navigate"
    answer_format = 'Write "Answer: Yes" or "Answer: No".'
    difficulties = range(3, 41)
    difficulty_unit = "sentences"
    answers = ("Yes", "No")

    def generate(self, rng: random.Random) -> Problem:
        returns = rng.random() < 0.5
        return Problem(draw_walk(rng, returns=returns, sentences=self.difficulty).question, "Yes" if returns else "No")

    def parse_answer(self, text: str) -> str | None:
        return _ANSWER.read(text)

"""Traces of problems in sentences: walks, chains of statements about people, swaps."""

import random
from dataclasses import replace
from typing import ClassVar

from neuromas.recipes.trace import Card, Trace
from neuromas.tasks import get_family
from neuromas.tasks import tracking_shuffled_objects as tracking
from neuromas.tasks.navigate import HEADINGS, MAX_STEPS, Instruction, State, Walk, draw_walk
from neuromas.tasks.tracking_shuffled_objects import Shuffle
from neuromas.tasks.web_of_lies import CLAIMS, NAMES, Web


def state_text(state: State) -> str:
    """Return a state of a walk as text."""
    return f"({state.x},{state.y})" + (f" {state.heading}" if state.heading else "")


class NavigateTrace(Trace):
    """A trace whose state is the position of the walker, and in the turning style the heading."""

    tasks = ("navigate",)
    max_steps = 4
    share = 2.0
    answer_format = get_family("navigate").answer_format
    largest = 15

    def __init__(self, walk: Walk) -> None:
        self.walk, self.question, self.start = walk, walk.question, state_text(walk.start)

    @classmethod
    def parse(cls, question: str) -> "NavigateTrace":
        return cls(Walk.parse(question))

    @classmethod
    def draw(cls, rng: random.Random) -> "NavigateTrace":
        while True:
            walk = draw_walk(rng, returns=rng.random() < 0.5, max_steps=cls.largest)
            if max(i.steps for i in walk.instructions) > MAX_STEPS:
                return cls(walk)

    def finished(self, done: int, state: str) -> bool:
        return done >= len(self.walk.instructions)

    def step(self, done: int, state: str) -> tuple[str, str]:
        return self._step(done + 1, self.walk.instructions[done], self._read(state))

    @staticmethod
    def _read(state: str) -> State:
        position, _, heading = state.partition(" ")
        x, y = position.strip("()").split(",")
        return State(int(x), int(y), heading or None)

    @staticmethod
    def _step(number: int, instruction: Instruction, before: State) -> tuple[str, str]:
        steps, direction = instruction.steps, instruction.direction
        what = f"{steps} {direction or 'steps'}" if steps else f"turn {direction}"
        return f"{number}: {what}", state_text(instruction.apply(before))

    def answer(self, state: str) -> str:
        return "Yes" if state.startswith("(0,0)") else "No"

    def wrong(self, rng: random.Random, state: str) -> str:
        at = self._read(state)
        return state_text(replace(at, x=at.x + rng.randint(-12, 12), y=at.y + rng.randint(-12, 12)))

    def guess(self, rng: random.Random) -> str:
        return rng.choice(("Yes", "No"))

    def sentences(self) -> list[str]:
        return [f"{instruction}." for instruction in self.walk.instructions]

    @classmethod
    def card(cls, rng: random.Random) -> Card:
        sidestep = rng.random() < 0.6
        reach = rng.choice((6, 15, 40))
        before = State(rng.randint(-reach, reach), rng.randint(-reach, reach), None if sidestep else rng.choice(HEADINGS))
        if not sidestep and rng.random() < 0.4:
            instruction = Instruction(0, rng.choice(("left", "right", "around")))
        else:
            direction = rng.choice(("forward", "backward", "left", "right")) if sidestep else None
            instruction = Instruction(rng.randint(1, cls.largest), direction)
        what, after = cls._step(rng.randint(1, 10), instruction, before)
        return Card(f"from {state_text(before)};{what}", f" {after}")


class WebTrace(Trace):
    """A trace whose state is what the last person does: lies or tells the truth."""

    tasks = ("web_of_lies",)
    max_steps = 2
    answer_format = get_family("web_of_lies").answer_format
    outsiders = ("Ada", "Boris", "Dora", "Emil", "Frieda", "Gustav", "Hanna", "Ivan", "Karin", "Ludwig", "Nora", "Otto")
    words: ClassVar[dict[bool, str]] = {True: "honest", False: "lying"}

    def __init__(self, web: Web) -> None:
        self.web, self.question, self.start = web, web.question, "nobody"

    @classmethod
    def parse(cls, question: str) -> "WebTrace":
        return cls(Web.parse(question))

    @classmethod
    def draw(cls, rng: random.Random) -> "WebTrace":
        count = rng.choice((4, 5, 5, 6))
        strangers = rng.randint(1, 2)
        people = [*rng.sample(NAMES, count - strangers), *rng.sample(cls.outsiders, strangers)]
        rng.shuffle(people)
        return cls(Web(tuple(people), tuple(rng.random() < 0.5 for _ in people)))

    def finished(self, done: int, state: str) -> bool:
        return done >= len(self.web.people)

    def step(self, done: int, state: str) -> tuple[str, str]:
        claim = self.web.claims[done]
        honest = claim if done == 0 else claim is (state == self.words[True])
        says = " says" if done else ""
        return f"{done + 1}: {self.web.people[done]}{says} {CLAIMS[claim].split()[0]}", self.words[honest]

    def answer(self, state: str) -> str:
        return "Yes" if state == self.words[True] else "No"

    def wrong(self, rng: random.Random, state: str) -> str:
        return self.words[state != self.words[True]]

    def guess(self, rng: random.Random) -> str:
        return rng.choice(("Yes", "No"))

    def sentences(self) -> list[str]:
        return [f"{s}." for s in self.question.removeprefix("Question: ").split(". ")[:-1]]

    @classmethod
    def card(cls, rng: random.Random) -> Card:
        trace = cls.draw(rng)
        done = rng.randrange(1, len(trace.web.people))
        state = rng.choice(list(cls.words.values()))
        what, after = trace.step(done, state)
        return Card(f"from {state};{what}", f" {after}")


class TrackingTrace(Trace):
    """A trace from the last swap back to the first: the state is the person who then held the object of the question."""

    tasks = tuple(f"tracking_shuffled_objects_{size}_objects" for size in ("three", "five", "seven"))
    max_steps = 3
    share = 2.0
    answer_format = get_family(tasks[0]).answer_format

    def __init__(self, shuffle: Shuffle) -> None:
        self.shuffle, self.question, self.start = shuffle, shuffle.question, shuffle.people[shuffle.asked]

    @classmethod
    def parse(cls, question: str) -> "TrackingTrace":
        return cls(Shuffle.parse(question))

    @classmethod
    def draw(cls, rng: random.Random) -> "TrackingTrace":
        count = rng.choice((3, 4, 5, 6, 7))
        shuffle = tracking.draw_shuffle(rng, count, count)
        while True:
            people = tuple(rng.sample(tracking.PEOPLE, count))
            if people != tuple(sorted(people)):
                return cls(replace(shuffle, people=people))

    def finished(self, done: int, state: str) -> bool:
        return done > len(self.shuffle.swaps)

    def step(self, done: int, state: str) -> tuple[str, str]:
        shuffle = self.shuffle
        left = len(shuffle.swaps) - done
        if left == 0:
            index = shuffle.people.index(state)
            # The options are in the order of the people, so that counting them finds the letter. A model does not learn in
            # thousands of steps to look up the object of a person whose name occurs in every swap (LOG.md).
            counted = zip(shuffle.people[: index + 1], tracking.LETTERS, strict=False)
            return f"0: {' '.join(f'{person} {letter}' for person, letter in counted)}", f"({tracking.LETTERS[index]})"
        a, b = (shuffle.people[k] for k in shuffle.swaps[left - 1])
        return f"{left}: {a} and {b}", {a: b, b: a}.get(state, state)

    def answer(self, state: str) -> str:
        return state

    def wrong(self, rng: random.Random, state: str) -> str:
        return rng.choice([person for person in self.shuffle.people if person != state])

    def guess(self, rng: random.Random) -> str:
        return f"({rng.choice(tracking.LETTERS[: len(self.shuffle.people)])})"

    def sentences(self) -> list[str]:
        people = self.shuffle.people
        return [f"{people[a]} and {people[b]} {self.shuffle.story.swap}." for a, b in self.shuffle.swaps]

    @classmethod
    def card(cls, rng: random.Random) -> Card:
        a, b, other = rng.sample(tracking.PEOPLE, 3)
        state = rng.choice((a, b, other))
        return Card(f"from {state};{rng.randint(1, 7)}: {a} and {b}", f" {({a: b, b: a}).get(state, state)}")

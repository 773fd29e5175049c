"""Tracking shuffled objects, in the grammar of BIG-Bench-Hard: after some swaps, what does one of the people have?

There are five stories, as published. There are as many swaps as people, each person takes part in one, and no two consecutive
swaps are of the same two people.
"""

import random
import re
from dataclasses import dataclass

from neuromas.tasks.answers import option_form
from neuromas.tasks.task import GeneratedTask, Problem

PEOPLE = ("Alice", "Bob", "Claire", "Dave", "Eve", "Fred", "Gertrude")
COUNT_NAMES = {3: "three", 5: "five", 7: "seven"}
LETTERS = "ABCDEFG"


@dataclass(frozen=True, slots=True)
class Story:
    """The fixed texts of a story, in the order of the question; `{}` stands for an object."""

    setting: str
    holding: str
    trading: str
    swap: str
    ending: str
    final: str
    objects: str
    """All objects of the story, separated by commas."""


STORIES = (
    Story(
        "are friends and avid readers who occasionally trade books. At the start of the semester, they each buy one new book",
        "gets {}",
        "As the semester proceeds, they start trading around the new books.",
        "swap books",
        "At the end of the semester,",
        "has",
        "Catch-22, Frankenstein, Hound of the Baskervilles, Lolita, Moby Dick, The Fellowship of the Ring, The Great Gatsby, "
        "The Odyssey, The Pearl, Ulysses",
    ),
    Story(
        "are dancers at a square dance. At the start of a song, they each have a partner",
        "is dancing with {}",
        "Throughout the song, the dancers often trade partners.",
        "switch partners",
        "At the end of the dance,",
        "is dancing with",
        "Helga, Izzi, Jamie, Karl, Lola, Melissa, Ophelia, Patrick, Rodrigo, Sam",
    ),
    Story(
        "are playing a game. At the start of the game, they are each holding a ball",
        "has a {}",
        "As the game progresses, pairs of players trade balls.",
        "swap balls",
        "At the end of the game,",
        "has the",
        "black ball, blue ball, brown ball, green ball, orange ball, pink ball, purple ball, red ball, white ball, yellow ball",
    ),
    Story(
        "are holding a white elephant gift exchange. At the start of the event, "
        "they are each holding a present of a different color",
        "has a {}",
        "As the event progresses, pairs of people swap gifts.",
        "swap their gifts",
        "At the end of the event,",
        "has the",
        # The published items, too, have balls among the presents.
        "black ball, blue present, brown present, green present, orange ball, pink ball, purple present, red present, "
        "white present, yellow present",
    ),
    Story(
        "are on the same team in a soccer match. At the start of the match, they are each assigned to a position",
        "is playing {}",
        "As the game progresses, pairs of players occasionally swap positions.",
        "trade positions",
        "At the end of the match,",
        "is playing",
        "benchwarmer, center midfielder, cheerleader, fullback, goalkeeper, left midfielder, left winger, right midfielder, "
        "right winger, striker",
    ),
)


@dataclass(frozen=True, slots=True)
class Shuffle:
    """One problem: person k first holds object k; `swaps` and `asked` are indices in `people`."""

    story: Story
    people: tuple[str, ...]
    objects: tuple[str, ...]
    swaps: tuple[tuple[int, int], ...]
    asked: int

    @property
    def question(self) -> str:
        story, people = self.story, self.people
        held = [f"{p} {story.holding.format(o)}" for p, o in zip(people, self.objects, strict=True)]
        swaps = [f"{people[a]} and {people[b]} {story.swap}." for a, b in self.swaps]
        order = ["First", *["Then"] * (len(swaps) - 2), "Finally"]
        told = " ".join(f"{when}, {swap}" for when, swap in zip(order, swaps, strict=True))
        options = "\n".join(f"({letter}) {o}" for letter, o in zip(LETTERS, self.objects, strict=False))
        return (
            f"{_listed(people)} {story.setting}: {_listed(held)}.\n"
            f"{story.trading} {told} {story.ending} {people[self.asked]} {story.final}\n"
            f"Options:\n{options}"
        )

    @property
    def answer(self) -> str:
        held = list(range(len(self.people)))
        for a, b in self.swaps:
            held[a], held[b] = held[b], held[a]
        return f"({LETTERS[held[self.asked]]})"

    @classmethod
    def parse(cls, question: str) -> "Shuffle":
        """Return the problem of a question; ValueError if it is not of this grammar."""
        shuffle = _read(question)
        if shuffle is None or shuffle.question != question:
            raise ValueError(f"not a tracking shuffled objects question: {question!r}")
        return shuffle


def _listed(parts: list[str] | tuple[str, ...]) -> str:
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _read(question: str) -> Shuffle | None:
    """Return the problem with the parts of a question; None if one is missing. The caller checks that there is nothing else."""
    head, _, rest = question.partition("\n")
    told, _, options = rest.partition("\nOptions:\n")
    story = next((s for s in STORIES if f" {s.setting}: " in head and told.startswith(s.trading)), None)
    if story is None:
        return None
    index_of = {person: k for k, person in enumerate(re.split(", and |, ", head.partition(f" {story.setting}: ")[0]))}
    objects = tuple(line[len("(A) ") :] for line in options.split("\n"))
    pairs = re.findall(rf"(\w+) and (\w+) {story.swap}\.", told)
    asked = told.rpartition(f"{story.ending} ")[2].removesuffix(f" {story.final}")
    complete = 3 <= len(index_of) == len(objects) <= len(LETTERS) and len(pairs) >= 2
    if not complete or not {asked}.union(*pairs) <= index_of.keys():
        return None
    return Shuffle(story, tuple(index_of), objects, tuple((index_of[a], index_of[b]) for a, b in pairs), index_of[asked])


def draw_shuffle(rng: random.Random, count: int, swaps: int) -> Shuffle:
    """Draw a problem with this many people and swaps; if swaps are too few for all, the question is about one who swapped."""
    story = rng.choice(STORIES)
    pairs = _draw_pairs(rng, count, swaps)
    while len(set().union(*pairs)) < min(count, 2 * swaps):
        pairs = _draw_pairs(rng, count, swaps)
    # Sorted: the order of a set may differ between runs.
    asked = rng.choice(sorted(set().union(*pairs)))
    return Shuffle(story, PEOPLE[:count], tuple(rng.sample(story.objects.split(", "), count)), tuple(pairs), asked)


def _draw_pairs(rng: random.Random, count: int, swaps: int) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    while len(pairs) < swaps:
        a, b = rng.sample(range(count), 2)
        if not pairs or {a, b} != set(pairs[-1]):
            pairs.append((a, b))
    return pairs


class TrackingShuffledObjects(GeneratedTask):
    """Problems of three, five or seven people with a lettered answer.

    Difficulty is the number of swaps, which equals the number of people in the published items.
    """

    answer_format = 'Write "Answer: " and the letter of an option, as in "Answer: (A)".'
    verifier = "choice"
    difficulties = range(2, 51)
    difficulty_unit = "swaps"

    def __init__(self, count: int, difficulty: int | None = None) -> None:
        self.count = count
        self.name = f"tracking_shuffled_objects_{COUNT_NAMES[count]}_objects"
        self.answers = tuple(f"({letter})" for letter in LETTERS[:count])
        self._form = option_form(LETTERS[:count])
        super().__init__(difficulty)

    def generate(self, rng: random.Random) -> Problem:
        shuffle = draw_shuffle(rng, self.count, self.difficulty or self.count)
        return Problem(shuffle.question, shuffle.answer)

    def parse_answer(self, text: str) -> str | None:
        return self._form.read(text)

"""Web of lies, in the grammar of BIG-Bench-Hard: the first person tells the truth or lies, and each next one speaks of the one
before.

The published items have five people; every statement says "lies" or "tells the truth" with the same probability, so that no
statement alone tells anything about the answer.
"""

import random
import re
from dataclasses import dataclass

from neuromas.tasks.answers import words_form
from neuromas.tasks.task import GeneratedTask, Problem

# fmt: off
NAMES = (
    "Alejandro", "Amberly", "Andree", "Antwan", "Audrie", "Bernita", "Bertha", "Christie", "Conception", "Crystal",
    "Delbert", "Delfina", "Elanor", "Evelyn", "Fidel", "Fletcher", "Gwenn", "Helene", "Inga", "Jamey",
    "Jaunita", "Jerry", "Jim", "Kandi", "Kristian", "Leda", "Lesley", "Lorine", "Maybelle", "Michaela",
    "Millicent", "Osvaldo", "Phoebe", "Rashida", "Raymond", "Ryan", "Sal", "Shalonda", "Shaunda", "Shenna",
    "Sherita", "Sherrie", "Sima", "Tamika", "Teressa", "Vernell", "Vina", "Willene", "Windy", "Yoland",
)
# fmt: on
PUBLISHED_PEOPLE = 5
CLAIMS = {True: "tells the truth", False: "lies"}

_PERSON = re.compile(r"(\w+) (?:says \w+ )?(tells the truth|lies)")
_ANSWER = words_form("Yes", "No")


@dataclass(frozen=True, slots=True)
class Web:
    """People in order, and whether each statement says "tells the truth": first about the first, then about the one before.

    E.g. `Web(("Fidel", "Jerry"), (True, False))`: "Fidel tells the truth. Jerry says Fidel lies."
    """

    people: tuple[str, ...]
    claims: tuple[bool, ...]

    @property
    def question(self) -> str:
        sentences = [f"{self.people[0]} {CLAIMS[self.claims[0]]}."]
        for speaker, subject, claim in zip(self.people[1:], self.people, self.claims[1:], strict=False):
            sentences.append(f"{speaker} says {subject} {CLAIMS[claim]}.")
        return f"Question: {' '.join(sentences)} Does {self.people[-1]} tell the truth?"

    @property
    def answer(self) -> str:
        truthful = self.claims[0]
        for claim in self.claims[1:]:
            # A speaker is truthful exactly if the statement about the one before is true.
            truthful = claim is truthful
        return "Yes" if truthful else "No"

    @classmethod
    def parse(cls, question: str) -> "Web":
        """Return the problem of a question; ValueError if it is not of this grammar."""
        statements = _PERSON.findall(question.rpartition(" Does ")[0])
        web = cls(tuple(name for name, _ in statements), tuple(claim == CLAIMS[True] for _, claim in statements))
        if not statements or len(set(web.people)) < len(web.people) or web.question != question:
            raise ValueError(f"not a web of lies question: {question!r}")
        return web


class WebOfLies(GeneratedTask):
    """Balanced Yes/No problems; difficulty is the number of statements, 5 in the published items."""

    name = "web_of_lies"
    answer_format = 'Write "Answer: Yes" or "Answer: No".'
    answers = ("Yes", "No")
    difficulties = range(2, len(NAMES) + 1)
    difficulty_unit = "statements"

    def generate(self, rng: random.Random) -> Problem:
        count = self.difficulty or PUBLISHED_PEOPLE
        web = Web(tuple(rng.sample(NAMES, count)), tuple(rng.random() < 0.5 for _ in range(count)))
        return Problem(web.question, web.answer)

    def parse_answer(self, text: str) -> str | None:
        return _ANSWER.read(text)

"""Compares generated problems with the published BIG-Bench-Hard items: `python -m neuromas.tasks.compare_families DIR`.

DIR holds the published files, e.g. boolean_expressions.json; navigate_even.json is used if there is no navigate.json.
It prints the tables of docs/families.md.
"""

import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuromas.tasks import Problem, Task, get_family, get_task
from neuromas.tasks.dyck_languages import CLOSERS, Brackets
from neuromas.tasks.tracking_shuffled_objects import LETTERS, Shuffle
from neuromas.tasks.web_of_lies import Web

SEED = 0
COMPARED = 2_000
DRAWN = 20_000
STEPS = 1_000
BATCH = 16


@dataclass(frozen=True, slots=True)
class Family:
    """The measures of one family's problems."""

    measures: dict[str, Callable[[str], float]]
    """Numbers that describe a question."""
    shortcut: str = "-"
    """Description of a way to guess without solving the problem."""
    guess: Callable[[str], str | None] = lambda question: None
    """Returns the guess for a question."""
    kind: Callable[[str], str] = str
    """Returns the kind of an answer, for the balance of answers."""
    difficulties: tuple[int | None, ...] = (None,)


def _depth(question: str) -> int:
    depths = [0]
    for bracket in Brackets.parse(question).shown:
        depths.append(depths[-1] + (1 if bracket in CLOSERS else -1))
    return max(depths)


def _kept(question: str) -> float:
    shuffle = Shuffle.parse(question)
    return float(shuffle.answer == f"({LETTERS[shuffle.asked]})")


def _first_held_by_last_partner(question: str) -> str:
    shuffle = Shuffle.parse(question)
    last = next(swap for swap in reversed(shuffle.swaps) if shuffle.asked in swap)
    return f"({LETTERS[sum(last) - shuffle.asked]})"


def _numbers_come_in_pairs(question: str) -> str:
    return "No" if any(count % 2 for count in Counter(re.findall(r"\d+", question)).values()) else "Yes"


TRACKING = Family(
    {
        "swaps": lambda q: len(Shuffle.parse(q).swaps),
        "swaps of the one asked about": lambda q: sum(Shuffle.parse(q).asked in swap for swap in Shuffle.parse(q).swaps),
        "has the first object again": _kept,
    },
    "what the last partner had first",
    _first_held_by_last_partner,
)

FAMILIES = {
    "boolean_expressions": Family(
        {
            "words": lambda q: len(q.split()) - 1,
            "and, or": lambda q: len(re.findall("and|or", q)),
            "not": lambda q: q.count("not"),
            "parentheses": lambda q: q.count("("),
        },
        'True if there is an "or"',
        lambda q: str("or" in q.split()),
        difficulties=(None, 8),
    ),
    "dyck_languages": Family(
        {
            "brackets shown": lambda q: len(Brackets.parse(q).shown),
            "depth": _depth,
            "brackets missing": lambda q: len(Brackets.parse(q).answer.split()),
        },
        "close the innermost alone",
        lambda q: Brackets.parse(q).answer[0],
        lambda answer: f"{len(answer.split())} missing",
    ),
    "multistep_arithmetic_two": Family(
        {
            "numbers": lambda q: len(re.findall(r"\d+", q)),
            "negative numbers": lambda q: len(re.findall(r"-\d", q)),
            "multiplications": lambda q: q.count("*"),
        },
        kind=lambda answer: "negative" if int(answer) < 0 else "zero" if int(answer) == 0 else "positive",
    ),
    "navigate": Family(
        {"sentences": lambda q: q.partition("\n")[0].count("."), "turns": lambda q: q.count("Turn")},
        "Yes if numbers come in pairs",
        _numbers_come_in_pairs,
    ),
    "tracking_shuffled_objects_three_objects": TRACKING,
    "tracking_shuffled_objects_five_objects": TRACKING,
    "tracking_shuffled_objects_seven_objects": TRACKING,
    "web_of_lies": Family(
        {"statements": lambda q: len(Web.parse(q).claims), "statements of a lie": lambda q: q.count(" lies.")},
        "Yes if the last one says so",
        lambda q: "Yes" if Web.parse(q).claims[-1] else "No",
    ),
}


def read_published(folder: Path, task: Task) -> list[Problem]:
    """Return the published items of a task; an empty list if the folder has no file of it."""
    paths = [path for path in (folder / f"{task.name}.json", folder / f"{task.name}_even.json") if path.exists()]
    return [Problem(example.question, example.answer) for example in task.load(paths[0])] if paths else []


def _range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):g} to {max(values):g})" if values else "-"


def _balance(problems: Sequence[Problem], kind: Callable[[str], str]) -> str:
    counts = Counter(kind(problem.answer) for problem in problems)
    return ", ".join(f"{name} {count / len(problems):.0%}" for name, count in sorted(counts.items())) or "-"


def _floor(task: Task, problems: Sequence[Problem]) -> str:
    return f"{task.floor([task.example(problem) for problem in problems])[1]:.1%}" if problems else "-"


def _score(problems: Sequence[Problem], measured: Family) -> str:
    if not problems or measured.shortcut == "-":
        return "-"
    return f"{sum(measured.guess(problem.question) == problem.answer for problem in problems) / len(problems):.1%}"


def _table(title: str, header: str, rows: list[tuple[str, ...]]) -> str:
    names = header.split(" | ")
    lines = [" | ".join(cells) for cells in (names, ["---"] * len(names), *rows)]
    return "\n".join([f"{title}\n", *(f"| {line} |" for line in lines)])


def training_draws(name: str, folder: Path, steps: int) -> tuple[int, int, int]:
    """Return counts of published items among training questions: of the family, with the file held out, and of `bbh:NAME`."""
    plain, clean, benchmark = get_family(name), get_family(name), get_task(f"bbh:{name}", data=folder)
    ids = frozenset(plain.example(problem).id for problem in read_published(folder, plain))
    clean.held_out = ids
    batches = [
        [e for step in range(steps) for e in task.training_batch(SEED, step, BATCH)] for task in (plain, clean, benchmark)
    ]
    as_it_is, held_out, as_benchmark = (sum(e.id in ids for e in drawn) for drawn in batches)
    return as_it_is, held_out, as_benchmark


def tables(folder: Path) -> str:
    """Return the four tables as Markdown."""
    structure, answers, repeats, training = [], [], [], []
    for name, measured in FAMILIES.items():
        published = read_published(folder, get_family(name))
        counts = [f"{count:,}" for count in training_draws(name, folder, STEPS)] if published else ["-"] * 3
        training.append((name, *counts))
        for difficulty in measured.difficulties:
            task = get_family(name, difficulty)
            family = name if difficulty is None else f"{name}, difficulty {difficulty}"
            rng = random.Random(SEED)
            drawn = [task.generate(rng) for _ in range(DRAWN)]
            compared = drawn[:COMPARED]
            for what, measure in {"characters": len, **measured.measures}.items():
                both = [
                    _range([float(measure(problem.question)) for problem in problems]) for problems in (published, compared)
                ]
                structure.append((family, what, *both))
            balances = [_balance(problems, measured.kind) for problems in (published, compared)]
            floors = [_floor(task, problems) for problems in (published, compared)]
            scores = [_score(problems, measured) for problems in (published, compared)]
            answers.append((family, *balances, *floors, measured.shortcut, *scores))
            questions = {problem.question for problem in published}
            equal = Counter(problem.question for problem in drawn if problem.question in questions)
            distinct = len({problem.question for problem in drawn})
            overlap = (f"{equal.total():,}", f"{len(equal)} of {len(questions)}") if questions else ("-", "-")
            repeats.append((family, f"{distinct:,}", *overlap))
    return "\n\n".join(
        [
            _table("Structure: mean (range).", "family | what | published | generated", structure),
            _table(
                "Answers: balance, floor (best constant answer), and what a shortcut scores.",
                "family | published | generated | floor, published | generated | shortcut | scores, published | generated",
                answers,
            ),
            _table(
                f"Of {DRAWN:,} generated problems.",
                "family | distinct | equal to a published item | published items met",
                repeats,
            ),
            _table(
                f"Published items among the {STEPS * BATCH:,} training questions of {STEPS:,} steps.",
                "family | `--task FAMILY` | and `--task.file FILE` | `--task bbh:FAMILY`",
                training,
            ),
        ]
    )


def main() -> None:
    """Print the tables for the folder on the command line."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit("usage: python -m neuromas.tasks.compare_families DIR, the folder of the BIG-Bench-Hard JSON files")
    print(tables(Path(sys.argv[1])))


if __name__ == "__main__":
    main()

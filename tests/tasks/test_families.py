"""The procedural families: published items solved, generated items right, balanced and parsable, difficulties, strict answers.

1. Every published item reads back byte for byte, and its target is our solver's answer.
2. Every generated item reads back, and its answer is the solver's.
3. Nothing is drawn but from the generator given: equal seeds, equal items; no question is in two splits.
4. The difficulty sets the number of units exactly; None draws what docs/families.md compares.
5. A text that names two answers, or denies one, gives none.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import pytest
from paths import DATA, DOCS

from neuromas.config import TaskConfig, TrainConfig
from neuromas.tasks import SPLITS, TASKS, GeneratedTask, Problem, get_family, split_of
from neuromas.tasks import compare_families as compare
from neuromas.tasks.boolean_expressions import Expression, count_expressions, draw_words
from neuromas.tasks.dyck_languages import CLOSERS, MAX_MISSING, PROMPT, Brackets, draw_complete
from neuromas.tasks.multistep_arithmetic_two import Arithmetic
from neuromas.tasks.navigate import Walk
from neuromas.tasks.tracking_shuffled_objects import STORIES, Shuffle
from neuromas.tasks.web_of_lies import Web
from neuromas.training.questions import Questions

BBH = DATA / "bbh"
PAGE = DOCS / "families.md"

THREE, FIVE, SEVEN = (f"tracking_shuffled_objects_{count}_objects" for count in ("three", "five", "seven"))

Solved = tuple[str, str, float]
"""A question written from the parsed problem, our answer, and the number of units of the difficulty."""


def solve_boolean(question: str) -> Solved:
    expression = Expression.parse(question)
    return expression.question, expression.answer, len(expression.words)


def solve_arithmetic(question: str) -> Solved:
    arithmetic = Arithmetic.parse(question)
    return arithmetic.question, arithmetic.answer, len(arithmetic.left.numbers)


def solve_tracking(question: str) -> Solved:
    shuffle = Shuffle.parse(question)
    return shuffle.question, shuffle.answer, len(shuffle.swaps)


def solve_dyck(question: str) -> Solved:
    brackets = Brackets.parse(question)
    return brackets.question, brackets.answer, (len(brackets.shown) + len(brackets.answer.split())) / 2


def solve_web(question: str) -> Solved:
    web = Web.parse(question)
    return web.question, web.answer, len(web.claims)


def solve_navigate(question: str) -> Solved:
    walk = Walk.parse(question)
    return walk.question, "Yes" if walk.returns else "No", len(walk.instructions) + walk.sidestep


@dataclass(frozen=True)
class Family:
    solve: Callable[[str], Solved]
    published_units: set[int]
    """Numbers of units that are drawn without a difficulty."""
    file: str | None = None
    published: int = 250


FAMILIES = {
    "boolean_expressions": Family(solve_boolean, {8, 9, 10, 11}, "boolean_expressions.json"),
    "dyck_languages": Family(solve_dyck, set(range(2, 51)), "dyck_languages.json"),
    "multistep_arithmetic_two": Family(solve_arithmetic, {4}, "multistep_arithmetic_two.json"),
    "navigate": Family(solve_navigate, set(range(3, 11)), "navigate_even.json", 125),
    THREE: Family(solve_tracking, {3}, f"{THREE}.json"),
    FIVE: Family(solve_tracking, {5}, f"{FIVE}.json"),
    SEVEN: Family(solve_tracking, {7}, f"{SEVEN}.json"),
    "web_of_lies": Family(solve_web, {5}),
}

NAMES = sorted(FAMILIES)
IN_FILES = sorted(name for name, family in FAMILIES.items() if family.file)

_drawn: dict[str, list[Problem]] = {}


def drawn(name: str) -> list[Problem]:
    """Two thousand generated problems of a family, drawn once; 500 of Navigate, which has its own tests."""
    if name not in _drawn:
        rng = random.Random(f"test_families/{name}")
        _drawn[name] = [get_family(name).generate(rng) for _ in range(500 if name == "navigate" else 2000)]
    return _drawn[name]


@pytest.mark.parametrize("name", IN_FILES)
def test_every_published_target_is_our_answer_and_every_question_reads_back(name: str) -> None:
    family = FAMILIES[name]
    assert family.file is not None
    path = BBH / family.file
    if not path.exists():
        pytest.skip(f"{path} is not here")
    items = json.loads(path.read_text(encoding="utf-8"))["examples"]
    wrong = []
    for item in items:
        question, answer, _ = family.solve(item["input"])
        if (question, answer) != (item["input"], item["target"]):
            wrong.append(item)
        assert get_family(name).parse_answer(item["target"]) == item["target"]
    assert wrong == []
    assert len(items) == family.published
    assert len(get_family(name).load(path)) == family.published


@pytest.mark.parametrize("name", NAMES)
def test_generated_problems_read_back_and_are_solved(name: str) -> None:
    found = set()
    for problem in drawn(name):
        question, answer, units = FAMILIES[name].solve(problem.question)
        assert (question, answer) == (problem.question, problem.answer)
        found.add(units)
    assert found == FAMILIES[name].published_units


@pytest.mark.parametrize("name", NAMES)
def test_generated_answers_are_read_in_several_phrasings_and_refused_when_there_are_two(name: str) -> None:
    task = get_family(name)
    problems = drawn(name)[:300]
    for problem, other in pairwise(problems):
        gold, wrong = problem.answer, other.answer
        for text in (
            gold,
            f"{gold}.",
            f"Answer: {gold}",
            f"answer: {gold}.",
            f"I looked (twice) at all 3.\nThe answer is {gold}",
        ):
            assert task.parse_answer(text) == gold
        for text in ("", "Answer:", f"I think {gold}", f"Answer: not {gold}", f"not {gold}"):
            assert task.parse_answer(text) is None
        if wrong != gold:
            for text in (f"Answer: {gold}. Answer: {wrong}", f"The answer is {gold}\nAnswer: {wrong}", f"{gold} or {wrong}"):
                assert task.parse_answer(text) is None


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"navigate"}))
def test_answers_joined_or_taken_back_are_none(name: str) -> None:
    task = get_family(name)
    problems = drawn(name)[:300]
    for problem, other in pairwise(problems):
        gold, wrong = problem.answer, other.answer
        # "No. No, it isn't" says the same twice.
        back = "Yes, it is" if gold == "No" else "No, it isn't"
        for text in (
            f"Answer: {gold} or so",
            f"Answer: {gold} is wrong",
            f"Answer: {gold}. {back}",
            f"Answer: maybe {gold}",
        ):
            assert task.parse_answer(text) is None
        for text in (f"Answer: **{gold}**", f"**Answer:** {gold}", f"Answer: `{gold}`.", f'"{gold}"', f"ANSWER = {gold}"):
            assert task.parse_answer(text) == gold
        if wrong != gold:
            for text in (f"Answer: {gold} or {wrong}", f"Answer: {gold}, {wrong}", f"Answer: {gold} and then {wrong}"):
                assert task.parse_answer(text) is None


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("boolean_expressions", "answer: TRUE", "True"),
        ("boolean_expressions", "not True is False. Answer: False", "False"),
        ("boolean_expressions", "Answer: True, True", "True"),
        ("boolean_expressions", "Answer: Truest", None),
        ("boolean_expressions", "Answer: Fal\u017fe", None),
        ("boolean_expressions", "True and False", None),
        ("boolean_expressions", "True False", None),
        ("boolean_expressions", "Answer: not True. Answer: False", "False"),
        ("multistep_arithmetic_two", "Answer: -39,960", "-39960"),
        ("multistep_arithmetic_two", "Answer: \u221212", "-12"),
        ("multistep_arithmetic_two", "Answer: +7", "7"),
        ("multistep_arithmetic_two", "Answer: -0", "0"),
        ("multistep_arithmetic_two", "4 - 16 = -12. Answer: -12", "-12"),
        ("multistep_arithmetic_two", "4 - 16", None),
        ("multistep_arithmetic_two", "Answer: 5 * 5", None),
        ("multistep_arithmetic_two", "Answer: 24/1", None),
        ("multistep_arithmetic_two", "Answer: 24 = 24", None),
        ("multistep_arithmetic_two", "Answer: 2.5", None),
        ("multistep_arithmetic_two", ".5", None),
        ("multistep_arithmetic_two", "5.0", None),
        ("multistep_arithmetic_two", "24%", None),
        ("multistep_arithmetic_two", "Answer: 1,23", None),
        ("multistep_arithmetic_two", "Answer: 2e3", None),
        ("multistep_arithmetic_two", "Answer: --12", None),
        ("multistep_arithmetic_two", "Answer: \u0661\u0662", None),
        ("multistep_arithmetic_two", "Answer: twelve", None),
        ("multistep_arithmetic_two", "9" * 10_000, None),
        (THREE, "Answer: (b)", "(B)"),
        (THREE, "Answer: B", "(B)"),
        (THREE, "Answer: B.", "(B)"),
        (THREE, "Answer: C) a green ball", "(C)"),
        (THREE, "Answer: (A) red ball", "(A)"),
        (THREE, "Answer: A) red ball", "(A)"),
        (THREE, "Alice had (A) and Bob (B). Answer: (C)", "(C)"),
        (THREE, "Answer: A red ball", None),
        (THREE, "Answer: b", None),
        (THREE, "Answer: (A)(B)", None),
        (THREE, "Answer: A/B", None),
        (THREE, "Answer: A, B", None),
        (THREE, "Answer: (A), not (B)", None),
        (THREE, "Answer: (A) and B too", None),
        (THREE, "Answer: (AB)", None),
        (THREE, "Answer: (D)", None),
        (SEVEN, "Answer: (D)", "(D)"),
        (THREE, "Answer: (A) or (D)", None),
        (THREE, "Answer: (\u0410)", None),
        (THREE, "(A) (B) (C)", None),
        (THREE, "not (A)", None),
        ("dyck_languages", "] ] >", "] ] >"),
        ("dyck_languages", "Answer: ]]>", "] ] >"),
        ("dyck_languages", "[ ( is open. Answer: ) ]", ") ]"),
        ("dyck_languages", "Answer: ( )", None),
        ("dyck_languages", "[ ( ) ]", None),
        ("dyck_languages", "Answer: ) ] then )", None),
        ("dyck_languages", "Answer: ] ], or ] )", None),
        ("web_of_lies", "answer is: NO", "No"),
        ("web_of_lies", "Jerry lies, so no. Answer: Yes", "Yes"),
        ("web_of_lies", "Answer: Nobody lies", None),
        ("web_of_lies", "Yes and no", None),
        ("web_of_lies", "Answer: Yes/No", None),
    ],
)
def test_parse_answer(name: str, text: str, answer: str | None) -> None:
    assert get_family(name).parse_answer(text) == answer


@pytest.mark.parametrize("name", NAMES)
def test_problems_are_a_function_of_the_seed(name: str) -> None:
    first, again, other = (
        [get_family(name).generate(rng) for _ in range(30)] for rng in map(random.Random, ("seed 1", "seed 1", "seed 2"))
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint(name: str) -> None:
    task = get_family(name)
    questions = {
        "train": {e.question for step in range(4) for e in task.training_batch(seed=0, step=step, count=25)},
        "validation": {e.question for e in task.examples("validation", 20)},
        "test": {e.question for e in task.examples("test", 20)},
    }
    assert tuple(questions) == SPLITS
    for split, held in questions.items():
        assert {split_of(question) for question in held} == {split}
    assert len(set.union(*questions.values())) == sum(map(len, questions.values()))


@pytest.mark.parametrize("name", [name for name in NAMES if get_family(name).answers])
def test_a_test_set_holds_each_answer_equally_often(name: str) -> None:
    task = get_family(name)
    counts = Counter(example.answer for example in task.examples("test", 10 * len(task.answers)))
    assert counts == dict.fromkeys(task.answers, 10)


@pytest.mark.parametrize("name", NAMES)
def test_the_difficulty_sets_the_number_of_units(name: str) -> None:
    values = get_family(name).difficulties
    lengths = []
    for difficulty in (values[0], values[0] + 3, values[0] + 7, values[-1]):
        task, rng = get_family(name, difficulty), random.Random(difficulty)
        problems = [task.generate(rng) for _ in range(10)]
        for problem in problems:
            question, answer, units = FAMILIES[name].solve(problem.question)
            assert (question, answer, units) == (problem.question, problem.answer, difficulty)
        lengths.append(sum(len(problem.question) for problem in problems))
    assert lengths == sorted(set(lengths))


def test_a_difficulty_that_a_family_does_not_have_is_refused() -> None:
    units = {
        "boolean_expressions": "5 to 60 words",
        "dyck_languages": "3 to 100 pairs of brackets",
        "multistep_arithmetic_two": "2 to 12 numbers in each pair of parentheses",
        "navigate": "3 to 40 sentences",
        **dict.fromkeys((THREE, FIVE, SEVEN), "2 to 50 swaps"),
        "web_of_lies": "2 to 50 statements",
    }
    assert sorted(units) == NAMES
    for name, text in units.items():
        lowest, highest = (int(word) for word in re.findall(r"\d+", text))
        for value in (lowest - 1, highest + 1):
            message = f"--task.difficulty must be {text}, or left out, for task {name}, got {value}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                get_family(name, value)


COINS = [f"Which side shows coin {number}?" for number in range(8)]


class Coin(GeneratedTask):
    """A task without difficulties that has eight problems."""

    name = "coin"
    answer_format = "Write the side."

    def generate(self, rng: random.Random) -> Problem:
        return Problem(rng.choice(COINS), "heads")

    def parse_answer(self, text: str) -> str | None:
        return text or None


def test_a_task_without_difficulties_refuses_them_all() -> None:
    assert Coin().difficulty is None
    with pytest.raises(ValueError, match=r"^--task.difficulty must be left out for task coin, got 1$"):
        Coin(1)


class HardCoin(Coin):
    difficulties = range(1, 3)


@pytest.mark.parametrize(
    ("task", "others"), [(Coin(), "varied ones by its settings"), (HardCoin(), "difficult ones by --task.difficulty")]
)
def test_a_split_with_too_few_problems_is_refused(task: Coin, others: str) -> None:
    there = sum(split_of(question) == "train" for question in COINS)
    assert len(task.examples("train", there)) == there > 0
    message = (
        f"task coin seems to have only {there} distinct problems in split train, asked for {there + 1}; "
        f"ask for fewer, or for more {others}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        task.examples("train", there + 1)


def test_all_families_are_found_by_name() -> None:
    assert set(NAMES) <= set(TASKS)
    for name in NAMES:
        assert (get_family(name).name, get_family(name).difficulty) == (name, None)
    message = f"family must be one of {sorted(TASKS)}, got 'chess'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_family("chess")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("not True or True", "True"),  # (not True) or True; not (True or True) is False.
        ("True or True and False", "True"),  # True or (True and False); (True or True) and False is False.
        ("( True or True ) and False", "False"),
        ("not not ( not ( True ) )", "False"),
        ("False or not False and not ( True and False )", "True"),
    ],
)
def test_expressions_worked_by_hand(words: str, answer: str) -> None:
    assert Expression.parse(f"{words} is").answer == answer


def test_expressions_are_counted_and_drawn_equally_often() -> None:
    def is_expression(words: tuple[str, ...]) -> bool:
        try:
            return bool(Expression.parse(f"{' '.join(words)} is"))
        except ValueError:
            return False

    vocabulary = ("True", "False", "not", "and", "or", "(", ")")
    for length in (1, 2, 3, 4, 5):
        assert count_expressions(length) == sum(map(is_expression, product(vocabulary, repeat=length)))
    assert count_expressions(8) == 2122

    rng = random.Random(0)
    counts = Counter(" ".join(draw_words(rng, 5)) for _ in range(9000))
    assert len(counts) == count_expressions(5) == 90
    # Each 100 +- 10.
    assert 55 < min(counts.values()) <= max(counts.values()) < 150


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("((2 + 3 * -4) * (1 - 2)) =", "10"),  # (2 - 12) * -1
        ("((2 - 3 - 4) - (2 - -3)) =", "-10"),  # -5 - 5
        ("((-2 * -3 * 4 + 0) + (9 - 2 * 2 * 2)) =", "25"),  # 24 + 1
        ("((1 * 0) + (0 - 0)) =", "0"),
    ],
)
def test_sums_worked_by_hand(question: str, answer: str) -> None:
    assert Arithmetic.parse(question).answer == answer


@pytest.mark.parametrize(("shown", "answer"), [("[ [", "] ]"), ("< [ ] { < ( ) > } [ ] ( { }", ") >"), ("( ) {", "}")])
def test_brackets_closed_by_hand(shown: str, answer: str) -> None:
    assert Brackets.parse(PROMPT + shown).answer == answer


@pytest.mark.parametrize(
    ("claims", "answer"),
    [
        ("Fidel tells the truth. Jerry says Fidel lies.", "No"),
        # Fidel lies, so Jerry, who says so, is truthful, and Vina, who denies that, lies.
        ("Fidel lies. Jerry says Fidel lies. Vina says Jerry lies.", "No"),
        ("Fidel lies. Jerry says Fidel tells the truth. Vina says Jerry lies.", "Yes"),
    ],
)
def test_webs_worked_by_hand(claims: str, answer: str) -> None:
    last = re.findall(r"(\w+) says", claims)[-1]
    assert Web.parse(f"Question: {claims} Does {last} tell the truth?").answer == answer


def test_a_shuffle_worked_by_hand() -> None:
    question = (
        "Alice, Bob, and Claire are playing a game. At the start of the game, they are each holding a ball: "
        "Alice has a orange ball, Bob has a red ball, and Claire has a white ball.\n"
        "As the game progresses, pairs of players trade balls. First, Claire and Bob swap balls. Then, Bob and Alice swap "
        "balls. Finally, Claire and Alice swap balls. At the end of the game, Alice has the\n"
        "Options:\n(A) orange ball\n(B) red ball\n(C) white ball"
    )
    # Orange, red, white -> orange, white, red -> white, orange, red -> red, orange, white.
    shuffle = Shuffle.parse(question)
    assert (shuffle.answer, shuffle.swaps, shuffle.asked) == ("(B)", ((2, 1), (1, 0), (2, 0)), 0)
    assert shuffle.question == question


REFUSED = {
    "boolean_expressions": (
        Expression.parse,
        "Boolean expressions",
        ["True", "True is ", "true is", " is", "True False is", "( True is", "True ) is", "not is", "True and is", "True  is"],
    ),
    "multistep_arithmetic_two": (
        Arithmetic.parse,
        "multistep arithmetic",
        [
            "((1 + 2) / (3 + 4)) =",
            "((1 + 2) + (3 + 4))",
            "((1 +) + (3 + 4)) =",
            "((1 2) + (3 + 4)) =",
            "((01 + 2) + (3 + 4)) =",
            "((a + 2) + (3 + 4)) =",
            "((1 + 2) + (3 + 4) + (5 + 6)) =",
            f"(({'9' * 5000} + 2) + (3 + 4)) =",
        ],
    ),
    "dyck_languages": (
        Brackets.parse,
        "Dyck languages",
        [PROMPT, f"{PROMPT}[ ]", f"{PROMPT}[ )", f"{PROMPT}]", f"{PROMPT}[[", f"{PROMPT}[ x", f"{PROMPT}[ ", "[ ["],
    ),
    "web_of_lies": (
        Web.parse,
        "web of lies",
        [
            "Question: Does Jerry tell the truth?",
            "Question: Fidel lies. Jerry says Vina lies. Does Jerry tell the truth?",
            "Question: Fidel lies. Jerry says Fidel lies. Does Fidel tell the truth?",
            "Question: Fidel lies. Fidel says Fidel lies. Does Fidel tell the truth?",
            "Fidel lies. Does Fidel tell the truth?",
        ],
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_text_of_another_grammar_is_refused(name: str) -> None:
    parse, called, texts = REFUSED[name]
    for text in ["", "What is 2 + 2?", *texts]:
        with pytest.raises(ValueError, match=f"^{re.escape(f'not a {called} question: {text!r}')}$"):
            parse(text)


def test_a_shuffle_with_a_part_changed_is_refused() -> None:
    question = drawn(THREE)[0].question
    changes = [
        ("Alice", "Zoe"),
        ("First", "Then"),
        ("Options", "Choices"),
        ("(B) ", "(C) "),
        (", and Claire", ""),
        ("Finally", ""),
    ]
    for old, new in changes:
        changed = question.replace(old, new, 1)
        assert changed != question
        with pytest.raises(ValueError, match=f"^{re.escape(f'not a tracking shuffled objects question: {changed!r}')}$"):
            Shuffle.parse(changed)


def test_boolean_answers_have_the_published_balance() -> None:
    # 54% +- 1.1%.
    assert 0.50 < sum(problem.answer == "True" for problem in drawn("boolean_expressions")) / 2000 < 0.58


def test_web_of_lies_answers_are_balanced_and_no_statement_gives_them_away() -> None:
    webs = [Web.parse(problem.question) for problem in drawn("web_of_lies")]
    # 1000 +- 22.
    assert 910 < sum(web.answer == "Yes" for web in webs) < 1090
    for index in range(5):
        assert 910 < sum((web.answer == "Yes") is web.claims[index] for web in webs) < 1090


def test_zero_is_no_common_result() -> None:
    # 0.4% +- 0.14%; 2.6% if all were kept.
    assert 0 < sum(problem.answer == "0" for problem in drawn("multistep_arithmetic_two")) < 20


@pytest.mark.parametrize("name", [THREE, FIVE, SEVEN])
def test_shuffles_are_balanced_and_each_person_takes_part(name: str) -> None:
    shuffles = [Shuffle.parse(problem.question) for problem in drawn(name)]
    count = len(shuffles[0].people)
    for counts in (Counter(shuffle.answer for shuffle in shuffles), Counter(shuffle.asked for shuffle in shuffles)):
        # 667 +- 21, 400 +- 18, 286 +- 16.
        assert len(counts) == count
        assert all(abs(n - 2000 / count) < 85 for n in counts.values())
    assert {shuffle.story for shuffle in shuffles} == set(STORIES)
    for shuffle in shuffles:
        assert set().union(*shuffle.swaps) == set(range(count))
        assert all(set(a) != set(b) for a, b in pairwise(shuffle.swaps))
        assert len(set(shuffle.objects)) == count


def test_with_few_swaps_the_one_asked_about_took_part() -> None:
    rng = random.Random(0)
    for _ in range(100):
        shuffle = Shuffle.parse(get_family(SEVEN, 2).generate(rng).question)
        assert len({person for swap in shuffle.swaps for person in swap}) == 4
        assert any(shuffle.asked in swap for swap in shuffle.swaps)


def test_one_to_three_brackets_are_missing_equally_often() -> None:
    counts = Counter(len(problem.answer.split()) for problem in drawn("dyck_languages"))
    # 667 +- 21, a little less for three, which a sequence of two pairs cannot lack.
    assert sorted(counts) == [1, 2, MAX_MISSING]
    assert all(560 < n < 770 for n in counts.values())


def test_complete_sequences_have_the_shapes_that_their_grammar_gives() -> None:
    def expand(rng: random.Random, room: int) -> str:
        """S -> ( S ) | S S | nothing, None if it needs more than `room` pairs."""
        chance = rng.random()
        if chance < 0.25 or room < 0:
            return ""
        if chance < 0.75:
            return f"({expand(rng, room - 1)})"
        left = expand(rng, room)
        return left + expand(rng, room - left.count("("))

    rng = random.Random(0)
    grammar: Counter[str] = Counter()
    while grammar.total() < 3000:
        word = expand(rng, 4)
        if word.count("(") == 3:
            grammar[word] += 1
    kind = str.maketrans({**dict.fromkeys(CLOSERS, "("), **dict.fromkeys(CLOSERS.values(), ")")})
    ours = Counter(draw_complete(rng, 3).translate(kind) for _ in range(3000))
    assert set(ours) == set(grammar) == {"((()))", "(()())", "(())()", "()(())", "()()()"}
    for shape, count in grammar.items():
        # The commonest shape has about 2,360 of 3,000 +- 22 in each of the two counts.
        assert abs(count - ours[shape]) < 110


@pytest.mark.parametrize("name", NAMES)
def test_training_meets_published_items_unless_they_are_held_out(name: str) -> None:
    if not BBH.is_dir():
        pytest.skip(f"{BBH} is not here")
    files = {path: {item["input"] for item in json.loads(path.read_text())["examples"]} for path in sorted(BBH.glob("*.json"))}
    assert len(files) == 24
    published, own = set().union(*files.values()), FAMILIES[name].file
    tasks = {"plain": TaskConfig(name=name)}
    if own:
        tasks |= {"file": TaskConfig(name=name, file=BBH / own), "benchmark": TaskConfig(name=f"bbh:{name}", data=BBH)}
    met: dict[str, int] = {}
    for way, config in tasks.items():
        task = Questions.of(TrainConfig(task=config, eval_size=1)).task
        drawn = [e.question for step in range(30) for e in task.training_batch(0, step, 16)]
        assert len(drawn) == 480
        met[way] = sum(question in published for question in drawn)
    # Counted once: short problems meet published ones.
    expected = {"boolean_expressions": 18, "dyck_languages": 21, "navigate": 5}
    assert met == dict.fromkeys(tasks, 0) | {"plain": expected.get(name, 0)}


def test_a_comparison_prints_four_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "DRAWN", 40)
    monkeypatch.setattr(compare, "COMPARED", 30)
    monkeypatch.setattr(compare, "STEPS", 1)
    problem = get_family("web_of_lies").generate(random.Random(compare.SEED))
    unlike = "Question: Zoe lies. Does Zoe tell the truth?"
    items = [{"input": problem.question, "target": problem.answer}, {"input": unlike, "target": "No"}]
    (tmp_path / "web_of_lies.json").write_text(json.dumps({"examples": items}), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["compare_families", str(tmp_path)])
    compare.main()
    printed = capsys.readouterr().out
    rows = {tuple(line.strip("| ").split(" | ")[:2]): line for line in printed.splitlines() if line.startswith("|")}
    # Five statements and one: 3 on average.
    assert rows["web_of_lies", "statements"] == "| web_of_lies | statements | 3.00 (1 to 5) | 5.00 (5 to 5) |"
    assert rows["web_of_lies", "40"] == "| web_of_lies | 40 | 1 | 1 of 2 |"
    assert rows["navigate", "40"] == "| navigate | 40 | - | - |"
    assert rows["boolean_expressions, difficulty 8", "words"].endswith("| - | 8.00 (8 to 8) |")
    assert "Of 40 generated problems." in printed
    assert "among the 16 training questions of 1 steps." in printed
    assert "| web_of_lies | 0 | 0 | 0 |" in printed


def test_a_comparison_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compare_families"])
    with pytest.raises(SystemExit, match=r"^usage: python -m neuromas.tasks.compare_families DIR, the folder of"):
        compare.main()


@pytest.mark.slow
def test_the_tables_of_the_docs_are_what_the_command_prints() -> None:
    if not BBH.is_dir():
        pytest.skip(f"{BBH} is not here")
    assert compare.tables(BBH) in PAGE.read_text(encoding="utf-8")

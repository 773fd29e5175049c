"""Tasks: Navigate's grammar and balance, disjoint splits, answers, the floor, and examples from files."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from paths import DATA

from neuromas.tasks import SPLITS, GeneratedTask, Navigate, Problem, Split, Task, get_task, question_id, split_of
from neuromas.tasks.navigate import FACE_FORWARD, OPTIONS, QUESTION, Walk, draw_walk

BBH = DATA / "bbh" / "navigate_even.json"

TASK = Navigate()


def sentences(question: str) -> list[str]:
    """Return the sentences of a question after the first one, without their full stops."""
    head = question.partition("\n")[0].removeprefix(QUESTION)
    return [sentence.strip() for sentence in head.split(".") if sentence.strip()]


def question(*parts: str) -> str:
    return f"{QUESTION} {'. '.join(parts)}.\n{OPTIONS}"


@pytest.fixture(scope="module")
def walks() -> list[tuple[bool, Walk]]:
    """Return a thousand drawn walks, each with whether it should return."""
    rng = random.Random("test_tasks")
    return [(returns, draw_walk(rng, returns=returns)) for returns in [True, False] * 500]


@pytest.mark.parametrize(
    ("parts", "end", "returns"),
    [
        (("Always face forward", "Take 3 steps right", "Take 1 step left", "Take 2 steps left"), (0, 0), True),
        (("Always face forward", "Take 2 steps forward", "Take 2 steps backward", "Take 1 step right"), (1, 0), False),
        # North 1, turn to east, east 2, turn around to west, west 2: still one step north.
        (("Take 1 step", "Turn right", "Take 2 steps", "Turn around", "Take 2 steps"), (0, 1), False),
        # A square: north 5, west 5, south 5, east 5.
        (("Take 5 steps", "Turn left", "Take 5 steps", "Turn left", "Take 5 steps", "Turn left", "Take 5 steps"), (0, 0), True),
        (("Turn left", "Turn around"), (0, 0), True),
    ],
)
def test_walks_worked_by_hand(parts: tuple[str, ...], end: tuple[int, int], returns: bool) -> None:
    walk = Walk.parse(question(*parts))
    last = walk.states()[-1]
    assert ((last.x, last.y), walk.returns) == (end, returns)
    assert walk.question == question(*parts)


def test_states_come_before_the_first_and_after_every_instruction() -> None:
    walk = Walk.parse(question("Take 2 steps", "Turn right", "Take 3 steps"))
    assert [(s.x, s.y, s.heading) for s in walk.states()] == [
        (0, 0, "north"),
        (0, 2, "north"),
        (0, 2, "east"),
        (3, 2, "east"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 2 + 2?",
        question("Take 2 steps up"),
        question("Take two steps"),
        question(FACE_FORWARD),
        question("Take 2 steps") + "\n- Maybe",
        question("Take 2 steps").replace(OPTIONS, ""),
    ],
)
def test_a_text_of_another_grammar_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'not a Navigate question: {text!r}')}$"):
        Walk.parse(text)


def test_every_drawn_question_reads_back_as_the_same_walk(walks: list[tuple[bool, Walk]]) -> None:
    for returns, walk in walks:
        assert Walk.parse(walk.question) == walk
        assert walk.returns is returns


def test_drawn_walks_have_three_to_ten_sentences_both_styles_and_legal_numbers(walks: list[tuple[bool, Walk]]) -> None:
    lengths = Counter(len(sentences(walk.question)) for _, walk in walks)
    assert set(lengths) == set(range(3, 11))
    # 500 +- 16.
    assert 420 < sum(walk.sidestep for _, walk in walks) < 580
    for _, walk in walks:
        assert (sentences(walk.question)[0] == FACE_FORWARD) is walk.sidestep
        assert all(1 <= i.steps <= 10 for i in walk.instructions if i.steps)
        assert all(i.steps for i in walk.instructions) or not walk.sidestep


def test_style_and_length_do_not_give_the_answer_away(walks: list[tuple[bool, Walk]]) -> None:
    for returns in (True, False):
        chosen = [walk for wanted, walk in walks if wanted is returns]
        # 250 +- 11.
        assert 190 < sum(walk.sidestep for walk in chosen) < 310
        mean = sum(len(sentences(walk.question)) for walk in chosen) / len(chosen)
        # Mean of LENGTH_WEIGHTS: 5.92, standard deviation 1.9, so 0.09 for the mean of 500.
        assert 5.5 < mean < 6.4


def test_a_return_is_a_sum_over_several_moves_more_often_than_pairs_of_opposites(walks: list[tuple[bool, Walk]]) -> None:
    def is_pairs(walk: Walk) -> bool:
        moves = Counter()
        for instruction, state in zip(walk.instructions, walk.states(), strict=False):
            dx, dy = instruction.vector(state)
            if instruction.steps:
                # +1 for a move along its axis, -1 for as many steps the other way.
                moves[abs(dx), instruction.steps] += dx + dy
        return not any(moves.values())

    returning = [walk for returns, walk in walks if returns and sum(i.steps > 0 for i in walk.instructions) >= 4]
    assert sum(map(is_pairs, returning)) / len(returning) < 0.25


def test_at_least_half_of_the_walks_that_do_not_return_are_near_misses(walks: list[tuple[bool, Walk]]) -> None:
    def one_change_returns(walk: Walk) -> bool:
        kept = sentences(walk.question)
        for k, sentence in enumerate(kept):
            if sentence.startswith("Turn"):
                options = ["Turn left", "Turn right", "Turn around"]
            elif sentence.startswith("Take"):
                direction = sentence.split()[3:] if walk.sidestep else []
                ways = [*direction, "forward", "backward", "left", "right"] if walk.sidestep else [""]
                numbers = range(1, 11)
                old = int(sentence.split()[1])
                options = [f"Take {n} step{'s' * (n > 1)} {(direction or [''])[0]}".strip() for n in numbers]
                options += [f"Take {old} step{'s' * (old > 1)} {way}".strip() for way in ways]
            else:
                continue
            for option in options:
                if Walk.parse(question(*kept[:k], option, *kept[k + 1 :])).returns:
                    return True
        return False

    missing = [walk for returns, walk in walks if not returns][:100]
    # Half are made as near misses (50 +- 5); some of the others are near misses by chance.
    assert sum(map(one_change_returns, missing)) > 33


def test_generated_answers_are_right_and_balanced() -> None:
    rng = random.Random("balance")
    problems = [TASK.generate(rng) for _ in range(400)]
    assert {problem.answer for problem in problems} == {"Yes", "No"}
    for problem in problems:
        assert problem.answer == ("Yes" if Walk.parse(problem.question).returns else "No")
    # 200 +- 10.
    assert 150 < sum(problem.answer == "Yes" for problem in problems) < 250


class Numbers(GeneratedTask):
    """A task with trivial problems, for tests of what all tasks inherit."""

    name = "numbers"
    answer_format = "Write the number."

    def generate(self, rng: random.Random) -> Problem:
        number = rng.randrange(10**5)
        return Problem(f"Which number is {number}?", str(number))

    def parse_answer(self, text: str) -> str | None:
        return text.strip() or None


@pytest.mark.parametrize(("task", "steps", "held_out"), [(Numbers(), 80, 300), (TASK, 4, 20)], ids=["numbers", "navigate"])
def test_splits_are_disjoint_however_much_is_drawn(task: Task, steps: int, held_out: int) -> None:
    drawn = {
        "train": {e.question for step in range(steps) for e in task.training_batch(seed=step % 3, step=step, count=50)},
        "validation": {e.question for e in task.examples("validation", held_out)},
        "test": {e.question for e in task.examples("test", held_out)},
    }
    assert tuple(drawn) == SPLITS == get_args(Split)
    for split, questions in drawn.items():
        assert {split_of(text) for text in questions} == {split}
    assert len(set.union(*drawn.values())) == sum(map(len, drawn.values()))
    assert (len(drawn["validation"]), len(drawn["test"])) == (held_out, held_out)
    assert len(drawn["train"]) > 0.9 * 50 * steps


def test_a_tenth_of_all_questions_is_kept_for_validation_and_a_tenth_for_the_test() -> None:
    shares = Counter(split_of(f"question {i}") for i in range(5000))
    assert 450 < shares["validation"] < 550
    assert 450 < shares["test"] < 550


def test_evaluation_examples_are_balanced_and_the_first_ones_of_a_longer_list() -> None:
    examples = TASK.examples("test", 40)
    assert TASK.examples("test", 10) == examples[:10]
    assert len({example.id for example in examples}) == 40
    assert sum(example.answer == "Yes" for example in examples) == 20


def test_a_training_batch_is_a_function_of_seed_and_step() -> None:
    batch = TASK.training_batch(seed=1, step=7, count=8)
    TASK.training_batch(seed=1, step=3, count=8)
    assert Navigate().training_batch(seed=1, step=7, count=8) == batch
    ids = {example.id for example in batch}
    assert ids.isdisjoint(example.id for example in TASK.training_batch(seed=1, step=8, count=8))
    assert ids.isdisjoint(example.id for example in TASK.training_batch(seed=2, step=7, count=8))


@pytest.mark.parametrize("name", ["boolean_expressions", "navigate", "tracking_shuffled_objects_three_objects"])
def test_a_training_batch_holds_each_answer_equally_often(name: str) -> None:
    task = get_task(name)
    for step in range(4):
        counts = Counter(example.answer for example in task.training_batch(seed=1, step=step, count=24))
        assert counts == dict.fromkeys(task.answers, 24 // len(task.answers))


def test_a_task_that_never_gives_one_of_its_answers_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = get_task("navigate")
    monkeypatch.setattr(task, "generate", lambda rng: Problem(f"Take {rng.random()} steps.", "Yes"))
    assert {example.answer for example in task.training_batch(seed=1, step=0, count=4)} == {"Yes"}


def test_an_example_is_named_by_its_question_and_carries_the_answer_format() -> None:
    example = TASK.example(Problem("Where?", "Yes"))
    assert (example.id, example.question, example.answer) == (question_id("Where?"), "Where?", "Yes")
    assert example.answer_format == 'Write "Answer: Yes" or "Answer: No".'


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: Yes", "Yes"),
        ("answer: NO.", "No"),
        ("After 3: 0 0. Answer: Yes", "Yes"),
        ("The answer is no", "No"),
        ("the answer is: Yes, because", "Yes"),
        ("Yes", "Yes"),
        (" no. ", "No"),
        ("Answer: Yes. I repeat, Answer: yes", "Yes"),
        ("Answer: Yes. Answer: No", None),
        ("Answer: No\nthe answer is Yes", None),
        ("", None),
        ("Answer:", None),
        ("Answer: Maybe", None),
        ("Answer: Nothing", None),
        ("Yes and no", None),
        ("I think yes", None),
    ],
)
def test_parse_answer(text: str, answer: str | None) -> None:
    assert TASK.parse_answer(text) == answer


def test_the_reward_is_one_bit() -> None:
    example = TASK.example(Problem("q", "No"))
    texts = ("Answer: No", "Answer: Yes", "Answer: No. Answer: Yes", "")
    assert [TASK.reward(example, text) for text in texts] == [1.0, 0.0, 0.0, 0.0]


def test_the_floor_is_the_best_constant_answer() -> None:
    answers = ["Yes", "No", "No", "Yes", "No"]
    assert TASK.floor([TASK.example(Problem(str(i), answer)) for i, answer in enumerate(answers)]) == ("No", 0.6)


def test_tasks_are_found_by_name() -> None:
    assert isinstance(get_task("navigate"), Navigate)
    with pytest.raises(ValueError, match=r"^task must be one of \['arc_challenge', .*\] or bbh:TASK, .*, got 'chess'$"):
        get_task("chess")


def test_a_file_in_the_format_of_big_bench_hard(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text(
        json.dumps({"canary": "x", "examples": [{"input": "a?", "target": "Yes"}, {"input": "b?", "target": "No"}]})
    )
    assert TASK.load(path) == [TASK.example(Problem("a?", "Yes")), TASK.example(Problem("b?", "No"))]


def test_a_file_of_json_lines_with_blank_lines_and_other_line_separators(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes('{"question": "a\u2028b?", "answer": "Yes"}\r\n\n{"question": "b?", "answer": "No", "more": 1}'.encode())
    assert TASK.load(path) == [TASK.example(Problem("a\u2028b?", "Yes")), TASK.example(Problem("b?", "No"))]


def test_answers_of_a_file_are_taken_in_normal_form(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "a?", "answer": "yes"}\n{"question": "b?", "answer": "Answer: No"}\n')
    examples = TASK.load(path)
    assert [example.answer for example in examples] == ["Yes", "No"]
    assert TASK.reward(examples[0], "Answer: Yes") == 1.0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": "a?", "answer": "Yes"}\n\n{"question": "b?"', ", line 3: not JSON (Expecting ',' delimiter)"),
        (
            "a.jsonl",
            '{"question": "a?", "answer": "Yes"}\n{"question": "b?", "target": "No"}',
            ", line 2: expected an object with the texts 'question' and 'answer'",
        ),
        ("a.jsonl", '["a?", "Yes"]', ", line 1: expected an object with the texts 'question' and 'answer'"),
        (
            "a.jsonl",
            '{"question": "a?", "answer": true}',
            ", line 1: expected an object with the texts 'question' and 'answer'",
        ),
        ("a.jsonl", '\n{"question": "a?", "answer": "Maybe"}', ", line 2: 'Maybe' is no answer of task navigate"),
        ("a.jsonl", "\n\n", " holds no examples"),
        ("a.json", '{"examples": [\n{"input": "a?"\n', ", line 3: not JSON (Expecting ',' delimiter)"),
        ("a.json", "[]", ": expected a JSON object with a list 'examples', as BIG-Bench-Hard has it"),
        ("a.json", '{"items": []}', ": expected a JSON object with a list 'examples', as BIG-Bench-Hard has it"),
        ("a.json", '{"examples": []}', " holds no examples"),
        (
            "a.json",
            '{"examples": [{"input": "a?", "target": "No"}, {"input": "b?"}]}',
            ", item 2: expected an object with the texts 'input' and 'target'",
        ),
        ("a.json", '{"examples": [{"input": "a?", "target": "(A)"}]}', ", item 1: '(A)' is no answer of task navigate"),
    ],
)
def test_the_error_for_a_wrong_file_names_it_and_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^task.file {re.escape(str(path) + message)}$"):
        TASK.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^task\.file .*/none\.json cannot be read: No such file or directory$"):
        TASK.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match=rf"^task\.file {re.escape(str(tmp_path))} cannot be read: Is a directory$"):
        TASK.load(tmp_path)
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8 text \(byte 14\); convert it to UTF-8$"):
        TASK.load(path)


def test_the_solver_agrees_with_every_published_item() -> None:
    if not BBH.exists():
        pytest.skip("the BIG-Bench-Hard file is not next to the repository")
    examples = TASK.load(BBH)
    solved = ["Yes" if Walk.parse(example.question).returns else "No" for example in examples]
    assert solved == [example.answer for example in examples]
    assert len(examples) == 125
    assert TASK.floor(examples) == ("No", 68 / 125)


def test_training_never_draws_what_is_held_out() -> None:
    task = get_task("navigate")
    drawn = task.training_batch(seed=0, step=0, count=40)
    task.held_out = frozenset(example.id for example in drawn[:20])
    again = task.training_batch(seed=0, step=0, count=40)
    assert not task.held_out & {example.id for example in again}
    assert again[20:] == drawn[20:]  # the other draws stay as they were


def test_navigate_gives_nothing_for_naming_both_answers() -> None:
    for text in ("Answer: Yes or No", "Answer: Yes/No", "Answer: not Yes", "Answer: Yes. Answer: No", "", "Yes, no"):
        assert TASK.parse_answer(text) is None, text
    for text in (
        "Answer: Yes",
        " from (0,0) south. Done. Answer: Yes",
        "yes.",
        "The answer is Yes",
        "No way to tell. Answer: Yes",
    ):
        assert TASK.parse_answer(text) == "Yes", text

"""The training text of the bundled backbone: right answers, short messages, and no question of a benchmark or generator."""

import json
import random

import pytest
from paths import DATA

from neuromas.recipes import skills, traces
from neuromas.recipes.bundled import draw_row, pack, train_tokenizer
from neuromas.recipes.trace import Trace
from neuromas.recipes.traces import FAMILIES
from neuromas.tasks import TASKS as GENERATED
from neuromas.tasks import get_task
from neuromas.tasks.boolean_expressions import Expression
from neuromas.tasks.dyck_languages import Brackets
from neuromas.tasks.multistep_arithmetic_two import Arithmetic
from neuromas.tasks.navigate import MAX_STEPS, Walk
from neuromas.tasks.tracking_shuffled_objects import PEOPLE, Shuffle
from neuromas.tasks.web_of_lies import NAMES, Web

BBH = DATA / "bbh"


def in_grammar(question: str) -> bool:
    """Return whether a task's generator could have drawn the question, at any difficulty."""
    for parse in (Expression.parse, Brackets.parse):
        try:
            parse(question)
        except ValueError:
            continue
        return True
    if question.startswith("If you"):
        return all(i.steps <= MAX_STEPS for i in Walk.parse(question).instructions)
    if question.startswith("Question:"):
        return set(Web.parse(question).people) <= set(NAMES)
    if question.endswith(" ="):
        arithmetic = Arithmetic.parse(question)
        return max(map(abs, arithmetic.left.numbers + arithmetic.right.numbers)) <= 9
    if "Options:\n(A)" in question:
        people = Shuffle.parse(question).people
        return people == PEOPLE[: len(people)]
    return False


def test_every_generated_family_is_learned() -> None:
    assert {name for _, name in traces.TASKS} == set(GENERATED)


@pytest.mark.parametrize(("family", "name"), traces.TASKS, ids=[name for _, name in traces.TASKS])
def test_a_trace_ends_in_the_gold_answer(family: type[Trace], name: str) -> None:
    task = get_task(name)
    examples = task.examples("validation", 100)
    path = next(BBH.glob(f"{name}*.json"), None) if BBH.is_dir() else None
    questions = [(e.question, e.answer) for e in examples]
    if path:
        questions += [(e.question, e.answer) for e in task.load(path)]
    for question, answer in questions:
        assert in_grammar(question)
        assert family.parse(question).example().answer == answer


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_no_drawn_question_is_one_of_the_generator(family: type[Trace]) -> None:
    rng = random.Random(0)
    for _ in range(500):
        trace = family.draw(rng)
        assert not in_grammar(trace.question), trace.question
        assert trace.example().answer


@pytest.mark.skipif(not BBH.is_dir(), reason="the benchmark files are not next to the repository")
def test_no_published_item_is_in_the_training_text() -> None:
    published = {item["input"] for path in BBH.glob("*.json") for item in json.loads(path.read_text())["examples"]}
    rng = random.Random(1)
    assert not published & {skills.draw_problem(rng).question for _ in range(2000)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_message_holds_a_few_steps_and_a_reader_can_go_on(family: type[Trace]) -> None:
    rng = random.Random(2)
    for _ in range(100):
        trace = family.draw(rng)
        progress, said = None, []
        while not said or not said[-1].endswith("Done"):
            text, progress = skills.work_text(rng, trace, progress)
            said.append(text)
            assert 1 <= text.count(";") <= family.max_steps
        assert progress
        assert trace.answer(progress.state) == trace.example().answer
        # A wrong state is used as it is; the work from it is still text.
        states = trace.states()
        for done in range(1, len(states) - 1):
            skills.work_text(rng, trace, skills.Progress(done, trace.wrong(rng, states[done])))


def test_a_turn_sees_its_question_and_itself_alone() -> None:
    tokenizer = train_tokenizer(400, 0)
    rng = random.Random(3)
    row = draw_row(rng, tokenizer, 512)
    batch = pack([row], 512, "cpu")
    turns = [k for k, segment in enumerate(row.segments) if segment > 0]
    for k in turns[:: max(1, len(turns) // 50)]:
        seen = {row.segments[j] for j in batch.mask[0, 0, k].nonzero().flatten().tolist()}
        assert seen == {0, row.segments[k]}
    assert sum(row.learned) == int((batch.targets >= 0).sum())
    assert not any(row.learned[: row.prefix])

"""Warnings on a run that learns nothing more: when they begin, when they end, and where there are none."""

import re
from collections.abc import Sequence

import pytest
import torch

from neuromas.tasks import Navigate
from neuromas.training.progress import Progress
from neuromas.training.watch import GroupAnswers, Watch, group_answers
from neuromas.types import Completion, Example, Group, Prompt, Rollout, Sample


def group(gold: str, *answers: str) -> Group:
    """Return rollouts that give these answers; an empty one is a text that no answer can be read from."""

    def rollout(index: int, answer: str) -> Rollout:
        sample = Sample((1,), (-0.5,), (f"Answer: {answer}",), stopped=True, adapter_version=0)
        return Rollout(Example("id", "q", gold, ""), index, (Completion(1, Prompt((), (1,)), sample, ()),))

    return tuple(rollout(index, answer) for index, answer in enumerate(answers))


def step(*groups: Group) -> list[GroupAnswers]:
    task = Navigate()
    rewards_PG = torch.tensor([[task.reward(r.example, r.answer) for r in each] for each in groups])
    return group_answers(task, groups, rewards_PG)


def told(*steps: Sequence[Group]) -> tuple[list[list[str]], Watch]:
    watch = Watch()
    return [watch.look(step(*groups)) for groups in steps], watch


YES = ("Yes",) * 8
GOOD = [group("Yes", *("Yes",) * 6, "No", "No"), group("No", *("No",) * 5, "Yes", "Yes", "Yes")] * 2
CONSTANT = [group("Yes", *YES), group("No", *YES)] * 2


def test_one_answer_that_takes_over_is_told_once_and_once_when_it_ends() -> None:
    notes, watch = told(*[GOOD] * 5, *[CONSTANT] * 8, *[GOOD] * 5)
    about = [note for notes_of_step in notes for note in notes_of_step if "answer" in note.partition(":")[0]]
    begin = (
        "one answer takes over: 91% of the answers to the last 20 questions are 'Yes', which is right for 10 of the 20 that it "
        "was given to. Try a lower --lr, --kl-coef or --entropy-coef above 0, or a higher --temperature"
    )
    assert about == [begin, "one answer no longer takes over: 74% are 'Yes'"]
    assert [index for index, found in enumerate(notes) if begin in found] == [8]
    assert watch.active == {}


@pytest.mark.parametrize(
    "groups",
    [
        GOOD,
        # Always the same, and that is what is asked.
        [group("Yes", *YES)] * 4,
        # 'Yes' is right for 9 of 10 questions.
        [*[group("Yes", *YES)] * 9, group("No", *YES)],
        # The same answer in all texts that have one, but those are few.
        [group("No", "Yes", "", "", "", "", "", "", "")] * 4,
        # No answer at all.
        [group("No", *("",) * 8)] * 4,
    ],
)
def test_no_answer_takes_over(groups: list[Group]) -> None:
    notes, watch = told(*[groups] * 9)
    assert not [note for found in notes for note in found if "takes over" in note]
    assert "answer" not in watch.active


def test_groups_without_a_signal_are_told_once_and_once_when_they_have_one_again() -> None:
    wrong = [group("No", *YES)] * 4
    notes, watch = told(*[GOOD] * 5, *[wrong] * 6, *[GOOD] * 3)
    about = [note for found in notes for note in found if "signal" in note]
    assert len(about) == 2
    begin = (
        "most groups carry no signal: for 100% of the last 20 questions all rollouts have the same reward, at a mean reward of "
        "0.00. Try an easier task or --task.difficulty (neuromas screen tells what can be learned), a larger --group-size, a "
        "higher --temperature, or, if all write the same, a lower --lr"
    )
    assert about[0] == begin
    assert re.fullmatch(r"groups carry a signal again: in \d\d% of them rewards differ", about[1])
    assert watch.active == {}


def test_where_all_is_right_there_is_no_warning() -> None:
    assert told(*[[group("Yes", *YES), group("No", *("No",) * 8)] * 2] * 8)[0] == [[]] * 8


def test_a_single_rollout_has_no_group() -> None:
    assert told(*[[group("No", "Yes"), group("Yes", "No")] * 4] * 8)[0] == [[]] * 8


def test_few_steps_or_few_questions_say_nothing() -> None:
    assert told(*[[group("No", *YES)] * 20] * 4)[0] == [[]] * 4
    assert told(*[[group("No", *YES)]] * 19)[0] == [[]] * 19
    assert told(*[[group("No", *YES)]] * 20)[0][19]


def test_a_long_answer_is_shortened() -> None:
    class Echo(Navigate):
        def parse_answer(self, text: str) -> str | None:
            return text

    groups, watch = [group("x" * 300, *("y" * 300,) * 4)] * 5, Watch()
    for _ in range(5):
        watch.look(group_answers(Echo(), groups, torch.zeros(5, 4)))
    assert watch.active["answer"] == f"100% answer 'Answer: {'y' * 29}...'"


def test_the_live_line_shows_what_holds(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "reward/mean": 0.5, "answer_parsed/frac": 1.0, "message_fault/frac": 0.0, "sampled_tokens_per_second/mean": 10.0,
    }  # fmt: skip
    with Progress(1) as progress:
        progress.step(1, metrics, 10, ["100% answer 'Yes\x1b'"])
    assert "10 tok/s  ! 100% answer 'Yes\\x1b'" in capsys.readouterr().err


def test_a_log_hears_every_ten_seconds_how_far_a_long_score_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr("neuromas.training.progress.time.monotonic", lambda: now)
    with Progress(1) as progress:
        for now in (6.0, 15.0, 16.0, 26.0):
            progress.tell(f"at {now:.0f} s")
    assert capsys.readouterr().err == "at 15 s\nat 26 s\n"

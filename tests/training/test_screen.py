"""Screening: what is said of a task before training, from answers that are known."""

import itertools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Call, assert_refused

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.tasks import Navigate, question_id, rewards_of
from neuromas.training.intervals import wilson
from neuromas.training.screen import Screening, interval, pass_at, screen
from neuromas.types import Example, Request

TASK = Navigate()
EXAMPLES = [Example(name, f"Question {name}?", "No" if name == "c" else "Yes", "Write it.") for name in "abcd"]
FLAGS = ["--questions", 3, "--samples", 2, "--max-new-tokens", 3, "--device", "cpu"]


def test_pass_at_k_is_the_mean_over_all_choices_of_k() -> None:
    # 1 - C(n-c, k) / C(n, k): 1 - C(2, 2) / C(4, 2) = 5/6.
    assert pass_at(2, [1, 0, 1, 0]) == pytest.approx(5 / 6)
    assert [pass_at(k, [0, 0, 1, 0]) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert [pass_at(k, [0.0, 0.0]) for k in (1, 2)] == [0, 0]
    assert pass_at(1024, [1.0] + [0.0] * 2047) == pytest.approx(0.5)  # there are more choices than a float counts
    for rewards in ([1, 0, 0, 1, 1, 0], [0.2, 0.9, 0, 0.2, 1]):
        for k in range(1, len(rewards) + 1):
            best = [max(chosen) for chosen in itertools.combinations(rewards, k)]
            assert pass_at(k, rewards) == pytest.approx(sum(best) / len(best))


def test_the_interval_counts_as_many_samples_as_are_independent() -> None:
    # Question means 1, 1/2, 0, 1/2: mean 1/2, variance of a mean (1/4 + 1/4) / 3 / 4 = 1/24; 1/4 / (1/24) = 6 of 8 samples.
    assert interval([[1, 1], [1, 0], [0, 0], [0, 1]]) == wilson(3, 6, freedom=3)
    # All samples of a question alike: a question counts less than once, as its variance is estimated.
    assert interval([[1, 1], [1, 1], [0, 0], [0, 0]]) == wilson(1.5, 3, freedom=3)
    # Questions alike: every sample counts. Nothing right: a question counts once.
    assert interval([[1, 0], [0, 1]]) == wilson(2, 4, freedom=1)
    assert interval([[0, 0, 0]] * 5) == wilson(0, 5, freedom=4)
    assert interval([[1, 0, 0]]) == wilson(1, 3, freedom=1)


def make_network(backbone: Backbone, script: Callable[[Request], str], *widths: int) -> Network:
    adapter = AdapterConfig(rank=1, target_modules=("q_proj",))
    return Network(Topology.layered(widths), backbone, adapter=adapter, engine=ScriptedEngine(script))


def test_what_is_said_of_a_task_is_what_was_answered(tiny_backbone: Backbone) -> None:
    said = {
        "a": ["Yes"] * 4,
        "b": ["Yes", "No", "hm", "No"],
        "c": ["Yes", "Yes", "Yes", "No"],
        "d": ["No"] * 4,
        "greedy": ["No"],
    }

    def script(request: Request) -> str:
        kind, _, example, index, node = request.seed
        if node == 1:
            return ("TO node 2: x", "TO node 2:", "x", "TO node 9: x")[int(index)]
        text = said["greedy" if kind == "evaluate" else str(example)][int(index)]
        return text if text == "hm" else f"Answer: {text}"

    told: list[str] = []
    found = screen(make_network(tiny_backbone, script, 1, 1), TASK, EXAMPLES, 4, seed=7, tell=told.append)
    # Rewards: 1111, 1000, 0001, 0000.
    assert found.pass_at == {1: 6 / 16, 2: (1 + 0.5 + 0.5) / 4, 4: 3 / 4}
    assert (found.low, found.high) == interval([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert (found.greedy, found.floor, found.floor_answer) == (1 / 4, 3 / 4, "Yes")
    assert (found.parse_rate, found.mixed) == (15 / 16, 2 / 4)
    # Of the four messages of a group the first alone is addressed to node 2 and says something.
    assert found.well_formed == 1 / 4
    written = 4 * sum(map(len, ("TO node 2: x", "TO node 2:", "x", "TO node 9: x")))
    answers = sum(len(text) if text == "hm" else len(f"Answer: {text}") for name in "abcd" for text in said[name])
    assert found.tokens_per_answer == (written + answers) / 16
    # One wrong answer of b, c and d each: all of a's are right.
    assert found.wrong == (("Answer: No", "Yes"), ("Answer: Yes", "No"), ("Answer: No", "Yes"))
    assert told == ["navigate: 0 of 4 questions sampled", "navigate: greedy answers"]
    one = screen(make_network(tiny_backbone, lambda request: "Answer: Yes", 1), TASK, EXAMPLES, 2)
    assert (one.well_formed, one.pass_at) == (None, {1: 3 / 4, 2: 3 / 4})


def screening(once: float, best: float, mixed: float, low: float = 0.4, floor: float = 0.3) -> Screening:
    return Screening("t", 40, 8, {1: once, 8: best}, low, 1.0, 0.5, floor, "Yes", 1.0, None, mixed, 9.0, (), 1.0)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (screening(0.3, 0.8, 0.5), "yes"),
        (screening(0.05, 0.15, 0.2), "yes"),
        (screening(0.5, 0.8, 0.5, low=0.3), "yes, but not above the floor yet"),
        (screening(0.04, 0.2, 0.3), "no: pass@1 is below 5%"),
        (screening(0.61, 0.9, 0.5), "no: pass@1 is above 60%"),
        (screening(0.5, 0.55, 0.1), "no: pass@8 is 5 points above pass@1, 10% of the groups are mixed"),
        (screening(0.0, 0.0, 0.0), "no: pass@1 is below 5%, pass@8 is 0 points above pass@1, 0% of the groups are mixed"),
    ],
)
def test_the_verdict_follows_the_rule_of_thumb(found: Screening, verdict: str) -> None:
    assert found.verdict == verdict
    assert found.to_json()["learnable"] == verdict.startswith("yes")


# The command


def test_the_command_prints_a_table_or_json(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "screen.json"
    flags = [
        "screen",
        *FLAGS,
        "--backbone",
        tiny_folder,
        "--tasks",
        "navigate",
        "dyck_languages",
        "navigate",
        "--dtype",
        "auto",
    ]
    plain = call(*flags)
    assert plain.status == 0, plain.err
    head, _, *rows = plain.out.splitlines()
    assert head.startswith("| task | n | pass@1 (95% interval) | pass@2 | greedy | floor | parsed | messages | mixed groups |")
    assert [row.split(" | ")[:2] for row in rows[:2]] == [["| navigate", "3"], ["| dyck_languages", "3"]]
    assert (
        "in float32, 1 node, wording terse, 2 samples a question, temperature 1, at most 3 tokens a text, seed 0" in plain.out
    )
    wrong = re.findall("^(navigate|dyck_languages), wrong: '.*', gold '.+'$", plain.out, re.MULTILINE)
    assert wrong[-1] == "dyck_languages"
    assert "can learn a task with a pass@1 of 5% to 60%, with a pass@k at least 10 points above it" in plain.out
    told = plain.err.splitlines()
    assert told[0] == "navigate: 0 of 3 questions sampled"
    assert told[-1].startswith("dyck_languages: no: pass@1 is")
    report = json.loads(call(*flags, "--json", "--out", out).out)
    assert json.loads(out.read_text()) == report
    assert [found["task"] for found in report["tasks"]] == ["navigate", "dyck_languages"]
    assert report["config"]["topology"]["widths"] == [1]
    assert (report["config"]["dtype"], report["config"]["prompt"]["wording"]) == ("float32", "terse")
    said = {"pass_at", "low", "high", "greedy", "floor", "parse_rate", "mixed", "wrong", "learnable", "verdict"}
    assert said <= report["tasks"][0].keys()
    # The same seed says the same; a file gives its settings, and flags win over it.
    toml = tmp_path / "run.toml"
    toml.write_text(f'backbone = "{tiny_folder}"\ntopology.widths = [1, 1]\ntask.name = "dyck_languages"\nlr = 0.5\n')
    chain = json.loads(call("screen", toml, *FLAGS, "--json").out)
    assert [found["task"] for found in chain["tasks"]] == ["dyck_languages"]
    assert chain["tasks"][0]["well_formed"] is not None
    again = json.loads(call("screen", toml, *FLAGS, "--widths", 1, "--json").out)["tasks"][0]
    assert again | {"seconds": 0} == report["tasks"][1] | {"seconds": 0}


def test_no_test_question_is_ever_asked(call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    rollout = Network.rollout

    def spy(network: Network, examples: list[Example], *args: object, **kwargs: object) -> object:
        asked.update(example.id for example in examples)
        return rollout(network, examples, *args, **kwargs)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(Network, "rollout", spy)
    items = tmp_path / "items.jsonl"

    def write(*splits: str) -> None:
        lines = [{"question": f"{split} {i}?", "answer": "1", "split": split} for split in splits for i in (0, 0, 1)]
        items.write_text("".join(json.dumps(line) + "\n" for line in lines))

    flags = ["screen", *FLAGS, "--backbone", tiny_folder, "--tasks", f"jsonl:{items}", "--task.train-on-evaluation"]
    for splits, expected in ((("test", "train", "validation"), "validation"), (("test", "train"), "train")):
        write(*splits)
        asked.clear()
        assert call(*flags).status == 0
        assert asked == {question_id(f"{expected} {i}?") for i in (0, 1)}
    # What a file scores is asked no more than test questions.
    file = tmp_path / "file.jsonl"
    file.write_text(json.dumps({"question": "train 0?", "answer": "1"}) + "\n")
    asked.clear()
    assert call(*flags, "--task.file", file).status == 0
    assert asked == {question_id("train 1?")}
    write("test", "validation")
    file.write_text(json.dumps({"question": "validation 1?", "answer": "1"}) + "\n")
    asked.clear()
    assert call(*flags, "--task.file", file).status == 0
    assert asked == {question_id("validation 0?")}
    write("test")
    assert_refused(call(*flags), r"task jsonl:\S+ has neither validation nor training questions here, and test .*; leave the")


def test_mistakes_are_said_before_anything_is_loaded(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("a backbone was loaded"))
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(tmp_path / "out.json")
    os.mkfifo(pipe)
    for flags, message in (
        (["--tasks", "navigate", "chess"], r"task must be one of \[.*\] or .*, got 'chess'$"),
        (
            ["--tasks", "navigate", "arc_challenge", "--task.data", tmp_path],
            r"task\.data \S+ holds no file of task arc_challenge",
        ),
        (["--tasks", "jsonl:none.jsonl"], r"none\.jsonl cannot be read: No such file or directory$"),
        (["--samples", 1], r"--samples must be 2 to 1,000, got 1$"),
        (["--engine", "vllm"], r"--engine must be torch, which does all sampling here, got 'vllm'$"),
        (["--society.rounds", 1], r"--society\.rounds must be 0: a network is screened, got 1$"),
        (["--questions", 0], r"--questions must be 1 to 999,999, got 0$"),
        (["--temperature", 0], r"--temperature must be at least 0\.001"),
        (["--out", tmp_path / "none" / "out.json"], r"--out must be a file in a folder that is there, got \S+out\.json$"),
        (["--out", "/proc/out.json"], r"--out /proc/out\.json cannot be written: "),
        (["--out", tmp_path], r"--out must be a file in a folder that is there, got \S+$"),
        (["--out", link], r"--out \S+link is a link or no regular file, and would be replaced; name another file$"),
        (["--out", pipe], r"--out \S+pipe is a link or no regular file, and would be replaced; name another file$"),
        (["--backbone", "./none"], r"--backbone \./none: expected a folder with a config\.json, found none$"),
    ):
        assert_refused(call("screen", *FLAGS, "--backbone", tiny_folder, *flags), message)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (lambda: [math.nan, 1.0], "task navigate gave the reward nan, expected a number from 0 to 1"),
        (lambda: [1, 2], r"task navigate gave the reward 2\.0, expected a number from 0 to 1"),
        (lambda: [1.0], "task navigate gave 1 rewards for 2 answers, expected one for each"),
        (lambda: 1 / 0, "task navigate: its rewards fail: ZeroDivisionError: division by zero"),
        (lambda: None, "task navigate: its rewards fail: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_rewards_that_are_none_are_one_error(rewards: Callable[[], list[float]], message: str) -> None:
    class Own(Navigate):
        def rewards(self, pairs: object) -> list[float]:
            return rewards()

    with pytest.raises(ValueError, match=message):
        rewards_of(Own(), [(EXAMPLES[0], "x")] * 2)


def test_a_class_that_fails_is_one_line_and_our_own_mistake_is_not(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.py"
    file.write_text("from neuromas.tasks import Navigate\nclass X(Navigate):\n    def reward(self, *_): return float('nan')\n")
    refused = call("screen", *FLAGS, "--backbone", tiny_folder, "--tasks", f"class:{file}:X")
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.splitlines()[-1] == "error: task navigate gave the reward nan, expected a number from 0 to 1"
    monkeypatch.setattr(Navigate, "rewards", lambda self, pairs: [1 / 0])
    with pytest.raises(ZeroDivisionError):
        rewards_of(Navigate(), [])


def test_what_is_stopped_leaves_the_tasks_that_are_done(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neuromas.tasks.DyckLanguages.rewards", stop)
    out = tmp_path / "out.json"
    flags = ["--tasks", "navigate", "dyck_languages", "--out", out]
    stopped = call("screen", *FLAGS, "--backbone", tiny_folder, *flags)
    assert (stopped.status, stopped.out) == (130, "")
    assert stopped.err.endswith("\nstopped\n")
    assert [found["task"] for found in json.loads(out.read_text())["tasks"]] == ["navigate"]

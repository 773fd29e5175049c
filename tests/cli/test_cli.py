"""The command line interface: bad input is one clear line and exit status 2, before any long work; `--json` is one object."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import FLAGS, Call, Outcome, assert_refused

from neuromas import Backbone
from neuromas.cli import main as cli
from neuromas.cli.describe import print_rollout
from neuromas.sandbox import choose_isolation
from neuromas.tasks import code, get_task
from neuromas.training import load_run
from neuromas.training.run_directory import RunDirectory
from neuromas.types import Completion, Example, Prompt, Rollout, Sample

CHAIN = ["--widths", "1", "1", "1"]
"""Resets widths to the default: explicit edges replace them."""


# Before a model is touched


def test_unknown_command(call: Call) -> None:
    known = ", ".join(cli.COMMANDS)
    assert_refused(call("trian"), rf"^error: unknown command 'trian'; known are {known}$")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 0.1", r"run\.toml: unknown key 'learning_rate'; known are adapter, backbone, branches, centring, "),
        ("[adapter]\nranks = 3", r"run\.toml: unknown key 'adapter\.ranks'; known are adapter\.alpha, adapter\.budget, "),
        ("num_steps = 'many'", r"run\.toml: num_steps must be of type int, got 'many'$"),
        ("num_steps = = 3", r"run\.toml is not TOML: Invalid value \(at line 1, column 13\)$"),
        ("topology.widths = [2, 2]", r"topology\.widths must end in 1 \(one output node\), got \[2, 2\]$"),
        ("topology.edges = [[1, 2], [2, 1]]", r"must not form a cycle; nodes \[1, 2\] wait for each other$"),
        ("task.name = 'chess'", r"task must be one of \[.*'navigate'.*\] or .*, got 'chess'$"),
    ],
)
@pytest.mark.parametrize("command", [("train",), ("train", "--dry-run"), ("show",)], ids=" ".join)
def test_a_wrong_toml(call: Call, tmp_path: Path, command: tuple[str, ...], text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert_refused(call(command[0], path, *command[1:]), message)


def test_an_example_names_its_wording(call: Call) -> None:
    auto = r"--- wording terse, which auto is for the bundled backbone; for others it is chat, or plain without a chat template"
    for flags, line in (
        (["--wording", "auto"], auto),
        (["--wording", "plain"], "--- wording plain"),
        ([], "--- wording terse"),
    ):
        assert call("tasks", "show", "navigate", *flags).out.splitlines()[0] == line
    assert one_object(call("tasks", "show", "navigate", "--json"))["wording"] == "terse"
    refused = call("tasks", "show", "navigate", "--prompt.begin-answer", "It is")
    assert_refused(refused, r"^error: --prompt\.begin-answer 'It is' begins no answer: only words of the task's answer")


@pytest.mark.parametrize("command", ["train", "show"])
def test_a_toml_that_is_not_there(call: Call, command: str) -> None:
    assert_refused(call(command, "none.toml"), r"^error: config none\.toml cannot be read: No such file or directory$")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "1", "2"], r"topology\.widths must end in 1 \(one output node\), got \[1, 2\]"),
        (["--widths", "0", "1"], r"topology\.widths must be positive"),
        (
            [*CHAIN, "--topology.edges", "1", "2", "2", "3", "3", "2"],
            r"must not form a cycle; nodes \[2, 3\] wait for each other",
        ),
        ([*CHAIN, "--topology.edges", "1", "2", "2", "4"], r"leaves node 3 unreachable; add an edge or renumber the nodes"),
        (
            ["--topology.edges", "1", "2"],
            r"takes the place of widths and skip, got it and --topology\.widths \[1, 1\]; leave one",
        ),
        (
            [*CHAIN, "--topology.edges", "1", "2", "1", "3"],
            r"must lead to one output node, got 2 nodes that send to nobody: \[2, 3\]",
        ),
        (["--lr", "0"], r"--lr must be above 0 and at most 1e\+30, got 0\.0"),
        (["--group-size", "1"], r"--group-size must be at least 2 with --centring leave_one_out, got 1"),
        (["--adapter.rank", "1", "--adapter.budget", "9"], r"--adapter\.rank and --adapter\.budget exclude each other"),
        (["--task", "chess"], r"task must be one of \[.*'navigate'.*\] or .*, got 'chess'"),
        (["--task.file", "none.json"], r"task\.file none\.json cannot be read: No such file or directory"),
        (["--prompt.begin-answer", "So:"], r"--prompt\.begin-answer 'So:' begins no answer"),
    ],
)
def test_a_wrong_flag_leaves_no_run_folder(
    call: Call, tmp_path: Path, tiny_folder: Path, flags: list[str], message: str
) -> None:
    run = tmp_path / "run"
    for more in ([], ["--dry-run"]):
        assert_refused(call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", run, *flags, *more), message)
    assert not run.exists()


def test_a_dry_run_does_not_mind_a_run_that_is_there(call: Call, tiny_folder: Path, trained: Path) -> None:
    planned = call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", trained, "--dry-run")
    assert (planned.status, planned.err) == (0, "")


@pytest.fixture
def no_isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Simulate a machine with neither sandlock nor bubblewrap."""
    monkeypatch.setitem(sys.modules, "sandlock", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    for found in (choose_isolation, code._sandbox):
        found.cache_clear()
    yield
    choose_isolation.cache_clear()


@pytest.mark.usefixtures("no_isolation")
def test_a_code_task_without_a_sandbox_says_so_before_anything_is_loaded(call: Call, tmp_path: Path, trained: Path) -> None:
    tests, run = tmp_path / "tests.jsonl", tmp_path / "run"
    tests.write_text('{"question": "q", "answer": "assert f(1) == 1"}\n')
    message = r"error: untrusted programs are not run without isolation, .*: install bubblewrap .*\) or sandlock \(pip"
    for task in (["humaneval"], ["humaneval_plus"], ["mbpp"], [f"jsonl:{tests}", "--task.verifier", "python"]):
        # Neither the data nor the backbone is there to be read.
        flags = [*FLAGS, "--backbone", "none", "--task.data", "none", "--run-dir", run, "--task", *task]
        for more in ([], ["--dry-run"]):
            assert_refused(call("train", *flags, *more), message)
        shutil.copytree(trained, run, symlinks=True)
        config = json.loads((run / "config.json").read_text())
        config["task"] |= {"name": task[0], "verifier": "python"}
        (run / "config.json").write_text(json.dumps({**config, "backbone": "none"}))
        assert_refused(call("eval", run), message)
        shutil.rmtree(run)


def test_a_task_file_that_cannot_be_read_names_the_line(call: Call, tmp_path: Path, tiny_folder: Path, trained: Path) -> None:
    path, run = tmp_path / "items.jsonl", tmp_path / "run"
    path.write_text('{"question": "a?", "answer": "Yes"}\n{"question": "b?", "answer": }\n')
    message = r"^error: task\.file .*/items\.jsonl, line 2: not JSON \(Expecting value\)$"
    assert_refused(call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", run, "--task.file", path), message)
    assert not run.exists()
    assert_refused(call("eval", trained, "--file", path), message)
    # Before the backbone is read.
    shutil.copytree(trained, run, symlinks=True)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "backbone": "none"}))
    assert_refused(call("eval", run, "--file", path), message)


# Models


def test_a_budget_too_small_for_rank_1(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    flags = ["--backbone", tiny_folder, "--run-dir", tmp_path / "run", "--adapter.budget", "1000"]
    # Per layer q 64+64, k and v 64+32, o 64+64, gate and up 64+128, down 128+64; two layers; two nodes: 4096.
    message = r"^error: --adapter\.budget 1,000 is too small for rank 1: 2 nodes need at least 4,096 trainable parameters$"
    assert_refused(call("train", *FLAGS, *flags), message)
    assert_refused(call("train", *FLAGS, *flags, "--dry-run"), message)
    assert not (tmp_path / "run").exists()


def test_a_target_module_that_is_not_there(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    flags = ["--backbone", tiny_folder, "--run-dir", tmp_path / "run", "--adapter.target-modules", "q_proj", "Wqkv"]
    message = r"adapter\.target_modules must be among \['down_proj', .*'v_proj'\] for this backbone, got \['Wqkv'\]$"
    assert_refused(call("train", *FLAGS, *flags), message)


def test_a_missing_model_folder(call: Call, tmp_path: Path) -> None:
    flags = ["--backbone", tmp_path / "no-model", "--run-dir", tmp_path / "run"]
    assert_refused(call("train", *FLAGS, *flags), r"^error: --backbone .*/no-model: expected a folder with a config\.json")
    assert_refused(call("train", *FLAGS, *flags, "--dry-run"), r"^error: --backbone .*/no-model: ")
    assert not (tmp_path / "run").exists()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def test_a_corrupt_model_folder(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    truncated(folder / "model.safetensors")
    refused = call("train", *FLAGS, "--backbone", folder, "--run-dir", tmp_path / "run")
    assert_refused(refused, rf"^error: --backbone {re.escape(str(folder))}: .{{20,}}")
    assert not (tmp_path / "run").exists()


# Runs


def test_a_run_directory_that_exists(call: Call, tiny_folder: Path, trained: Path) -> None:
    before = sorted(trained.rglob("*"))
    refused = call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", trained)
    assert_refused(refused, r"/run exists already; continue it with --resume or name another --run-dir$")
    assert sorted(trained.rglob("*")) == before


def test_a_run_directory_of_another_config(call: Call, tiny_folder: Path, trained: Path) -> None:
    refused = call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", trained, "--lr", "0.5", "--resume")
    message = r"/run belongs to another config, which has lr = 0\.0005 \(got 0\.5\); resume with its own settings"
    assert_refused(refused, message + r" or name another --run-dir$")
    longer = call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", trained, "--num-steps", 9, "--resume")
    assert_refused(longer, rf"neuromas grow {trained} --steps \d trains it on$")


def test_a_run_directory_that_is_something_else(call: Call, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert_refused(call("train", *FLAGS, "--run-dir", tmp_path), r"exists already and is no run; name another")
    message = r"--run-dir .* is no run, there is nothing to --resume; start one there without it$"
    assert_refused(call("train", *FLAGS, "--run-dir", tmp_path, "--resume"), message)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """Return a run whose only checkpoint is truncated."""
    run = tmp_path / "damaged"
    shutil.copytree(trained, run, symlinks=True)
    truncated(run / "checkpoints" / "step-000001" / "optimizer.safetensors")
    return run


def test_a_truncated_checkpoint(call: Call, tiny_folder: Path, damaged: Path) -> None:
    message = (
        r"^error: checkpoint .*/step-000001: optimizer\.safetensors is truncated \(\d+ of \d+ bytes\); "
        r"delete .*/step-000001 to start again$"
    )
    assert_refused(call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", damaged, "--resume"), message)
    assert_refused(call("eval", damaged, "--size", "1"), message)
    assert_refused(call("ask", damaged, "Where?"), message)


def test_a_damaged_config(call: Call, damaged: Path) -> None:
    truncated(damaged / "config.json")
    message = r"^error: .*/config\.json is damaged: not JSON "
    assert_refused(call("train", "--run-dir", damaged, "--resume"), message)
    assert_refused(call("show", damaged), message)


@pytest.mark.parametrize("args", [("eval",), ("ask", "Where?"), ("show",)], ids=lambda args: args[0])
def test_a_folder_that_is_no_run(call: Call, tmp_path: Path, args: tuple[str, ...]) -> None:
    refused = call(args[0], tmp_path, *args[1:])
    assert_refused(refused, r"is no run: expected config\.json in it, No such file or directory$")


def test_a_run_without_a_checkpoint(call: Call, damaged: Path) -> None:
    shutil.rmtree(damaged / "checkpoints")
    assert_refused(call("ask", damaged, "Where?"), r"/damaged holds no checkpoint yet; train it first$")


def test_a_backbone_that_has_changed_since(call: Call, tmp_path: Path, trained: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run, symlinks=True)
    other = Backbone.tiny(1)
    other.model.save_pretrained(folder)
    other.tokenizer.save_pretrained(folder)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "backbone": str(folder)}))
    (run / "identity.json").unlink()
    for command in (["ask", run, "Where?"], ["eval", run, "--untrained"], ["train", "--resume", "--run-dir", run]):
        assert_refused(call(*command), r"--backbone .*/other has other weights now \(checksum \w+\) than run ")
    # Killed before its first checkpoint, a run knows it as well: it has its score before training.
    shutil.rmtree(run / "checkpoints")
    checksum = json.loads((trained / "identity.json").read_text())["backbone"]
    (run / "identity.json").write_text(json.dumps({"backbone": checksum}))
    refused = call("train", "--resume", "--run-dir", run)
    assert_refused(refused, rf"/other has other weights now \(checksum \w+\) than run \S+ was trained on \({checksum}\)")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--best"], r"^error: .*/run holds no best checkpoint: no validation was its best yet; leave --best out$"),
        (["--best", "--untrained"], r"^error: --best and --untrained exclude each other; give one of them$"),
        (["--size", "0"], r"^error: --size must be 1 to 999,999, got 0$"),
        (["--temperature", "-1"], r"^error: --temperature must be 0 \(greedy\) or at least 0\.001, got -1\.0$"),
    ],
)
def test_eval_with_flags_that_make_no_sense(call: Call, trained: Path, flags: list[str], message: str) -> None:
    assert_refused(call("eval", trained, *flags), message)


def test_an_empty_question(call: Call, trained: Path) -> None:
    assert_refused(call("ask", trained, "  "), r"^error: QUESTION must not be empty$")


def test_a_path_that_the_system_refuses(call: Call, tiny_folder: Path) -> None:
    assert_refused(call("show", "x" * 5000), r"is no run: expected config\.json in it, File name too long$")
    assert_refused(call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", "x" * 5000), r"File name too long")


# What works


def one_object(outcome: Outcome) -> dict[str, object]:
    """Return the single JSON object on standard output; standard error is empty."""
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.count("\n") == 1
    data = json.loads(outcome.out)
    assert isinstance(data, dict)
    return data


def test_show_json_of_a_run(call: Call, trained: Path) -> None:
    shown = one_object(call("show", trained, "--json"))
    assert shown["nodes"] == [
        {"id": 1, "layer": 1, "reads": [], "writes_to": [2]},
        {"id": 2, "layer": 2, "reads": [1], "writes_to": []},
    ]
    # A total rank of 24 over two nodes; 2048 parameters for each rank of a node.
    assert (shown["rank"], shown["trainable_parameters"]) == (12, 2 * 12 * 2048)
    assert (shown["output_node"], shown["checkpoint"]) == (2, "step-000001")
    assert shown["ledger"] == json.loads((trained / "checkpoints" / "step-000001" / "ledger.json").read_text())


def test_show_json_of_a_config(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"backbone = '{tiny_folder}'\ntopology.widths = [2, 1]\nadapter.budget = 13000\n")
    shown = one_object(call("show", path, "--json"))
    # 13000 / (3 nodes * 2048) = 2.1, so rank 2.
    assert (shown["rank"], shown["trainable_parameters"], shown["calls_per_answer"]) == (2, 12288, 3)
    assert "evaluation" not in shown
    # 40 steps of 16 questions, 4 rollouts each; with a budget of tokens their number is not known.
    assert (shown["training_rollouts"], "training_sampled_tokens" in shown) == (2560, False)
    path.write_text(f"step_tokens = 500\n{path.read_text()}")
    shown = one_object(call("show", path, "--json"))
    assert ("training_rollouts" in shown, shown["training_sampled_tokens"]) == (False, 20_000)


def test_show_draws_every_node(call: Call, trained: Path) -> None:
    shown = call("show", trained)
    assert (shown.status, shown.err) == (0, "")
    for text in ("question", "answer", "trainable parameters: 49,152", "checkpoint: step-000001", "AT OR BELOW FLOOR"):
        assert text in shown.out


def test_show_prints_brackets_in_a_path_as_they_are(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "[bold]" / "[" / "model"
    shutil.copytree(tiny_folder, folder)
    path = tmp_path / "run.toml"
    path.write_text(f"backbone = '{folder}'\n")
    assert "/[bold]/[/model" in call("show", path).out.replace("\n", "")


def test_the_best_validation_is_told_and_can_be_scored(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ("--num-steps", "2", "--eval-every", "1", "--validation-size", "2", "--backbone", tiny_folder, "--run-dir", run)
    told = f"best validation: 0.0% after step 1; neuromas eval {run} --best scores those adapters"
    assert told in call("train", *FLAGS, *flags).out.splitlines()
    scored = call("eval", run, "--best", "--size", "2")
    assert (scored.status, scored.out[:4]) == (0, "0.0%"), scored


def test_eval_json(call: Call, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(
        '{"question": "a?", "answer": "Yes"}\n{"question": "b?", "answer": "No"}\n{"question": "c?", "answer": "No"}\n'
    )
    scored = one_object(call("eval", trained, "--file", path, "--json"))
    assert {"accuracy", "n", "low", "high", "floor", "parse_rate", "calls_per_answer", "tokens_per_answer", "answers"} <= set(
        scored
    )
    assert (scored["n"], scored["floor"], scored["floor_answer"], scored["calls_per_answer"]) == (3, 2 / 3, "No", 2.0)


def test_eval_on_a_file_counts_what_training_has_drawn(call: Call, trained: Path, tmp_path: Path) -> None:
    path, task = tmp_path / "items.jsonl", get_task("navigate")
    items = [*task.training_batch(0, 0, 1), *task.training_batch(0, 1, 1), *task.examples("test", 1)]
    path.write_text("".join(json.dumps({"question": e.question, "answer": e.answer}) + "\n" for e in items))
    # The run has made one step of one question.
    score, count, others = call("eval", trained, "--file", path).out.splitlines()
    assert "(n 3, " in score
    assert count == "items.jsonl: 1 of 3 items were drawn in training"
    assert re.match(r"the other 2: [0-9.]+% \(n 2, ", others)
    report = one_object(call("eval", trained, "--file", path, "--json"))
    assert (report["n"], report["drawn_in_training"]) == (3, 1)
    assert isinstance(report["not_drawn"], dict)
    assert report["not_drawn"]["n"] == 2
    untrained = call("eval", trained, "--file", path, "--untrained").out.splitlines()
    assert untrained[1:] == ["items.jsonl: 0 of 3 items were drawn in training"]


def test_items_held_out_are_counted_as_such_and_stay_the_same(
    call: Call, tiny_folder: Path, trained: Path, tmp_path: Path
) -> None:
    path, moved, run = tmp_path / "items.jsonl", tmp_path / "moved.jsonl", tmp_path / "run"
    lines = [
        json.dumps({"question": e.question, "answer": e.answer}) + "\n" for e in get_task("navigate").training_batch(0, 0, 1)
    ]
    path.write_text(lines[0])
    flags = ["train", *FLAGS, "--backbone", tiny_folder, "--run-dir", run]
    assert call(*flags, "--task.file", path).status == 0
    path.rename(moved)
    # It was in the way of the generator, and the run knows so without the file; a run without it has drawn it.
    assert "moved.jsonl: 0 of 1 items were drawn" in call("eval", run, "--file", moved).out
    assert "moved.jsonl: 1 of 1 items were drawn" in call("eval", trained, "--file", moved).out
    # The file may lie elsewhere when a run goes on, but has to hold what it held.
    assert call(*flags, "--resume", "--task.file", moved).status == 0
    moved.write_text('{"question": "Another?", "answer": "Yes"}\n')
    message = (
        r"--run-dir .*/run was started with other questions or answers \(.*--task\.file\); resume with the same data or name"
    )
    refused = call(*flags, "--resume", "--task.file", moved)
    assert (refused.status, refused.out) == (2, "")
    assert re.search(message, refused.err)


def test_data_that_is_gone_leaves_the_count_open(call: Call, trained: Path, tmp_path: Path) -> None:
    path, run = tmp_path / "items.jsonl", tmp_path / "run"
    path.write_text('{"question": "a?", "answer": "#### 5"}\n')
    shutil.copytree(trained, run, symlinks=True)
    config = json.loads((run / "config.json").read_text())
    config["task"] |= {"name": "gsm8k", "data": "none"}
    (run / "config.json").write_text(json.dumps(config))
    score, count = call("eval", run, "--file", path).out.splitlines()
    assert "(n 1, " in score
    assert re.search(r"the number of its items that were drawn in training is unknown: task\.data none is not there", count)
    assert one_object(call("eval", run, "--file", path, "--json"))["drawn_in_training"] is None


def test_eval_prints_a_score_with_all_that_belongs_to_it(call: Call, trained: Path) -> None:
    scored = call("eval", trained, "--size", "2", "--untrained")
    assert (scored.status, scored.err) == (0, "")
    assert re.search(r"% \(n 2, 95% interval .* floor .* parsed .* 2 calls and .* tokens an answer\)", scored.out)


def test_ask_json_and_text_tell_the_same(call: Call, trained: Path) -> None:
    asked = one_object(call("ask", trained, "Do you return?", "--json"))
    assert (asked["question"], asked["calls"]) == ("Do you return?", 2)
    messages = asked["messages"]
    assert isinstance(messages, list)
    assert [(message["from"], message["to"]) for message in messages] == [(1, 2)]
    text = call("ask", trained, "Do you return?")
    assert (text.status, text.err) == (0, "")
    assert "node 1 ─▶ node 2" in text.out
    assert "node 2 answers" in text.out


def test_ask_takes_the_adapters_that_eval_takes(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(call("ask", trained, "Why?", "--best"), r"^error: .*/run holds no best checkpoint: ")
    assert_refused(call("ask", trained, "Why?", "--best", "--untrained"), r"^error: --best and --untrained exclude each other")
    asked: list[dict[str, bool]] = []
    load = load_run.load_network
    monkeypatch.setattr(load_run, "load_network", lambda run, **which: asked.append(which) or load(run, **which))
    assert call("ask", trained, "Why?", "--untrained").status == 0
    assert asked == [{"untrained": True, "best": False}]


def test_the_node_whose_answer_won_the_vote_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    samples = [Sample((1,), (0.0,), (f"Answer: {word}",), stopped=True, adapter_version=0) for word in ("Yes", "No")]
    answers = tuple(Completion(node, Prompt((), (1,)), sample, ()) for node, sample in enumerate(samples, start=1))
    print_rollout(Rollout(Example("id", "?", "Yes", ""), 0, answers, winner=0), get_task("navigate"))
    out = capsys.readouterr().out
    assert "node 1 answers" in out
    assert out.endswith("answer: Yes\n")


def test_a_dry_run_shows_the_plan_and_leaves_nothing(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    planned = call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", tmp_path / "run", "--dry-run")
    assert (planned.status, planned.err) == (0, "")
    assert "trainable parameters: 49,152" in planned.out
    settings = json.loads(planned.out[planned.out.index("\n{") :])
    assert (settings["num_steps"], settings["topology"]["widths"]) == (1, [1, 1])
    assert not (tmp_path / "run").exists()


def test_flags_win_over_toml_and_toml_over_defaults(call: Call, tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"backbone = '{tiny_folder}'\nlr = 0.25\nseed = 3\neval_size = 2\n[topology]\nwidths = [2, 1]\n")
    planned = call("train", path, "--seed", "4", "--dry-run")
    settings = json.loads(planned.out[planned.out.index("\n{") :])
    assert (settings["lr"], settings["seed"], settings["topology"]["widths"]) == (0.25, 4, [2, 1])
    # Another backbone than the bundled one has defaults of its own, whether the file or a flag names it.
    assert (settings["group_size"], settings["max_new_tokens"]) == (4, 32)
    path.write_text("lr = 0.25\ngroup_size = 6\neval_size = 2\n")
    for flags, expected in (((), (6, 80)), (("--backbone", tiny_folder), (6, 32))):
        planned = call("train", path, "--dry-run", *flags)
        settings = json.loads(planned.out[planned.out.index("\n{") :])
        assert (settings["lr"], settings["group_size"], settings["max_new_tokens"]) == (0.25, *expected)


def test_a_finished_run_resumes_to_the_same_scores(call: Call, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    names = ("metrics.jsonl", "rollouts.jsonl", "evaluation.json")
    before = [(run / name).read_bytes() for name in names]
    # No other flag: everything else comes from the run itself.
    resumed = call("train", "--run-dir", run, "--resume")
    assert resumed.status == 0
    assert re.search(r"^after training, test: .* \(n 2, ", resumed.out, re.MULTILINE)
    assert [(run / name).read_bytes() for name in names] == before


def test_usage_names_every_command(call: Call) -> None:
    for args, status in ((("--help",), 0), (("-h",), 0), ((), 2)):
        usage = call(*args)
        assert usage.status == status
        assert all(f"\n  {command} " in usage.out for command in cli.COMMANDS)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ("--widths", "--backbone", "--task.file", "--adapter.budget", "--resume", "--dry-run")),
        ("eval", ("--file", "--split", "--untrained", "--json")),
        ("ask", ("--json",)),
        ("show", ("--json",)),
    ],
)
def test_help_of_a_command_names_its_flags(call: Call, command: str, flags: tuple[str, ...]) -> None:
    told = call(command, "--help")
    assert told.status == 0
    assert all(flag in told.out for flag in flags)


def test_an_unknown_flag_is_refused_by_name(call: Call) -> None:
    refused = call("train", "--learning-rate", "1")
    assert refused.status == 2
    assert "--learning-rate" in refused.err
    assert "Traceback" not in refused.err


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "neuromas.cli"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: neuromas COMMAND")
    assert done.stderr == ""
    failed = subprocess.run([*command, "train", "--widths", "2"], capture_output=True, text=True, check=False)
    assert_refused(Outcome(failed.returncode, failed.stdout, failed.stderr), r"topology\.widths must end in 1")


def test_dtype_auto_is_stored_as_what_was_chosen(
    call: Call, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[int, int]] = []

    def faster(features: int, outputs: int) -> str:
        measured.append((features, outputs))
        return "bfloat16"

    monkeypatch.setattr("neuromas.model.backbone.faster_dtype", faster)
    flags = ["train", "--backbone", str(tiny_folder), *FLAGS, "--run-dir", str(tmp_path / "run"), "--dtype", "auto"]
    outcome = call(*flags)
    assert (outcome.status, len(measured)) == (0, 1), outcome
    assert "--dtype auto: bfloat16 suits this backbone and machine" in outcome.out
    assert RunDirectory.open(tmp_path / "run").config.dtype == "bfloat16"
    # A run that is resumed keeps its format, whatever this machine would choose.
    assert (call(*flags, "--resume").status, len(measured)) == (0, 1)

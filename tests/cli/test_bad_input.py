"""Mistakes in the input, and files of others: one clear line, before long work, and no folder is left."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import FLAGS, Call, assert_refused
from paths import RIVALS

from neuromas import Backbone
from neuromas.compare import run as compare
from neuromas.system.terminal import one_line, printable
from neuromas.tasks import get_task

Line = dict[str, object]


def write_lines(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def numbered(count: int, **more: object) -> list[Line]:
    return [{"question": f"What is {number}?", "answer": str(number), **more} for number in range(count)]


Refuses = Callable[..., None]


@pytest.fixture
def refuses(call: Call, tmp_path: Path, tiny_folder: Path) -> Refuses:
    """Return a function that starts a run and asserts that it is refused with one line and leaves no folder."""

    def refuses(message: str, *flags: object) -> None:
        run = tmp_path / "refused"
        assert_refused(call("train", *FLAGS, "--backbone", tiny_folder, "--run-dir", run, *flags), message)
        assert not run.exists()

    return refuses


# Numbers and sizes


def test_numbers_that_are_none_and_sizes_that_do_not_fit(refuses: Refuses, call: Call, tiny_folder: Path) -> None:
    refuses(r"--lr must be a finite number, got inf$", "--lr", "inf")
    refuses(r"--adapter\.alpha must be a finite number, got nan$", "--adapter.alpha", "nan")
    refuses(r"--max-new-tokens must be at most 999,999, got 999999999999$", "--max-new-tokens", 999999999999)
    refuses(r"need up to \d+ tokens, the backbone reads \d+; shorten one of them$", "--max-new-tokens", 99999)
    refuses(r"topology\.widths must make at most 512 nodes, got 200,001$", "--widths", 100000, 100000, 1)
    message = r"need [\d,]+\.\d GiB of memory, there are [\d,]+\.\d; ask for less$"
    refuses(rf"adapters of --adapter\.rank 999999999 for 2 nodes {message}", "--adapter.rank", 999999999)
    planned = call("train", *FLAGS, "--backbone", tiny_folder, "--dry-run", "--adapter.rank", 999999999)
    assert_refused(planned, rf"trainable parameters \(rank 999999999, 2 nodes\) {message}")
    refuses(r"--examples-per-step x --group-size x --replays must be at most 100,000, got 999999$", "--group-size", 999999)


def test_questions_that_are_too_long(refuses: Refuses, call: Call, trained: Path, tmp_path: Path) -> None:
    long = "word " * 40_000
    items = write_lines(tmp_path / "items.jsonl", [{"question": long, "answer": "Yes"}])
    message = r"a question of \d+ tokens \('word word .* the backbone reads \d+; shorten one of them$"
    refuses(message, "--task.file", items)
    refuses(r"\d{5} tokens for a node alone, .* the backbone reads \d+; shorten", "--topology.roles", long, "You are brief.")
    # Also one that is not scored, and that training or validation would meet later.
    for split in ("train", "validation"):
        lines = [*numbered(30, split="train"), {"question": long, "answer": "1", "split": split}, *numbered(1, split="test")]
        refuses(message, "--task", f"jsonl:{write_lines(tmp_path / 'mine.jsonl', lines)}", "--eval-every", 1)
    assert_refused(call("ask", trained, long), message)
    assert_refused(call("ask", trained, "x" * 1_000_001), r"QUESTION must be at most 1,000,000 characters$")


def test_a_model_that_could_not_be_laid_out(refuses: Refuses, tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = None
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**4}))
    refuses(r"/model: its config has 10,000 layers, at most 1,000 are read$", "--backbone", folder)


def test_cuda_where_there_is_none_is_told_by_its_flag(refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refuses(r"^error: --device cuda: no NVIDIA GPU found; use --device cpu$", "--device", "cuda")


@pytest.mark.parametrize("variable", ["NUMBA_NUM_THREADS", "OMP_NUM_THREADS"])
def test_a_number_of_threads_that_is_none(call: Call, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for value in ("0", "two", "-1"):
        monkeypatch.setenv(variable, value)
        assert_refused(call("tasks"), rf"^error: {variable} must be a number of threads, at least 1, got '{value}'; set it so")


# Files


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


def test_what_has_no_end_is_not_read(refuses: Refuses, call: Call, trained: Path, pipe: Path, tmp_path: Path) -> None:
    for path in (pipe, Path("/dev/zero")):
        message = rf"{path} cannot be read: not a regular file, but a device or a pipe$"
        refuses(message, "--task.file", path)
        refuses(message, "--task", f"jsonl:{path}")
        assert_refused(call("train", path), message)
        assert_refused(call("compare", path), message)
        assert_refused(call("eval", trained, "--file", path), message)
    message = r"^error: --data must be left out for task navigate, which is no benchmark; --file FILE scores on a file$"
    assert_refused(call("eval", trained, "--data", tmp_path), message)
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    (run / "evaluation.json").unlink()
    os.mkfifo(run / "evaluation.json")
    assert_refused(call("show", run), r"evaluation\.json is damaged \(not a regular file, but a device or a pipe\); restore it")


def test_a_comparison_that_cannot_be_made_leaves_nothing(call: Call, tmp_path: Path) -> None:
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text('methods = ["single_rl"]\ntasks = ["gsm8k"]\nseeds = [0]\n[train]\neval_size = 2\n')
    refused = call("compare", grid, "--out", out, "--data", tmp_path / "none")
    assert_refused(refused, r"^error: task\.data .*/none is not there, which should be a file or folder for task gsm8k")
    refused = call("compare", grid, "--out", out, "--tasks", "navigate", "--backbone", tmp_path)
    assert_refused(refused, r"^error: --backbone .* expected a folder with a config\.json, found none$")
    assert not out.exists()


def test_a_file_that_is_too_large_is_not_read(refuses: Refuses, tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        file.truncate(2**31)
    refuses(r"large\.jsonl cannot be read: 2\.0 GiB, more than is read at once$", "--task", f"jsonl:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, r"line 1: not JSON \(nested too deeply\)$"),
        ('{"question": "a", "answer": ' + "9" * 5000 + "}", r"line 1: not JSON \(Exceeds the limit \(4300 digits\)"),
        ('{"question": "a \\ud800", "answer": "1"}', r"line 1: a text holds half a character, '\\ud800', without its other"),
        ('{"question": "a", "answer": "1", "split": []}', r"line 1: 'split' must be one of \[.*\] in every line or in none"),
    ],
)
def test_lines_that_are_no_questions(refuses: Refuses, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text + "\n")
    refuses(message, "--task", f"jsonl:{path}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def (", r"mine\.py, line 1: SyntaxError: invalid syntax$"),
        ("x = 1\n1 / 0", r"mine\.py, line 2: ZeroDivisionError: division by zero$"),
        ("import sys\nsys.exit(0)", r"mine\.py, line 2: SystemExit: 0$"),
        (
            "from neuromas.tasks import Task\nclass X(Task): pass",
            r"X: it cannot be made: TypeError: Can't instantiate",
        ),
        (
            "from neuromas.tasks import Navigate\nclass X(Navigate):\n    def generate(self, rng): return None",
            r"X: AttributeError: 'NoneType' object has no attribute 'question'$",
        ),
    ],
)
def test_a_class_file_that_fails(refuses: Refuses, call: Call, tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    refuses(message, "--task", f"class:{path}:X")
    if "neuromas" not in source:
        grid = tmp_path / "grid.toml"
        grid.write_text(f'methods = ["class:{path}:X"]\ntasks = ["navigate"]\nseeds = [0]\n')
        assert_refused(call("compare", grid, "--dry-run"), message)


OWN = """
from pathlib import Path
from neuromas.tasks import Navigate
Path(__file__).with_name("ran").touch()
class X(Navigate):
    name = "own"
"""


def test_code_of_a_run_is_not_executed_unasked(call: Call, trained: Path, tmp_path: Path) -> None:
    """A run with a task in a Python file may come from anywhere."""
    run, file = tmp_path / "run", tmp_path / "own.py"
    file.write_text(OWN)
    shutil.copytree(trained, run, symlinks=True)
    (run / "identity.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config["task"]["name"] = f"class:{file}:X"
    (run / "config.json").write_text(json.dumps(config))
    message = r"the task of run .*/run is a Python file, class:.*/own\.py:X, which this would execute; look at the file, then"
    for command in (["eval", run], ["ask", run, "?"], ["train", "--resume", "--run-dir", run], ["grow", run, "--to", 2, 1]):
        assert_refused(call(*command), message)
    assert "task: class:" in call("show", run).out.replace("\n", "")
    assert not (tmp_path / "ran").exists()
    assert call("eval", run, "--size", 2, "--allow-code").status == 0
    assert (tmp_path / "ran").exists()


def test_code_of_a_backbone_is_never_executed(refuses: Refuses, tmp_path: Path, tiny_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refuses(r"--backbone .*/model: cannot be loaded: ", "--backbone", folder)
    assert not (tmp_path / "ran").exists()


# Runs


def test_hand_edited_files_of_a_run_are_named(call: Call, trained: Path, tmp_path: Path) -> None:
    """Each value of each file is replaced by another one: the command prints one line of error or its result, no traceback."""
    rng, seen = random.Random(0), 0
    others: list[object] = [None, 3, -1.5, "x", [], [{}], {}, {"a": []}, True]
    for path in sorted(trained.glob("*.json")):
        data = json.loads(path.read_text())
        key_paths = list(_value_paths(data))
        for keys in [(), *rng.sample(key_paths, min(4, len(key_paths)))]:
            run = tmp_path / "run"
            shutil.copytree(trained, run, symlinks=True)
            (run / path.name).write_text(json.dumps(_with(data, keys, rng.choice(others))))
            shown = call("show", run)
            assert (shown.status, bool(shown.out)) in ((0, True), (2, False)), (path.name, keys)
            if shown.status:
                assert_refused(shown, r"is damaged|must be|is not the topology of|expected|task must be|exclude|unknown key")
            seen += shown.status == 2
            shutil.rmtree(run)
    assert seen > 5


def test_a_run_does_not_go_on_from_damaged_files(call: Call, trained: Path, tmp_path: Path) -> None:
    for name, text, message in (
        ("evaluation.json", '{"after": {"test": {"accuracy": 1}}}', r"is damaged \(a score lacks a part\)"),
        ("evaluation.json", '{"after": {"test": NaN}}', r"is damaged \(NaN is no JSON\)"),
        ("growth.json", "3", r"is damaged \(it holds no JSON list\)"),
        ("metrics.jsonl", '{"step": 0, "reward/mean": "x"}\n', r"is damaged: a line is no record with a step"),
        ("rollouts.jsonl", '{"step": 0, "split": []}\n', r"is damaged: a line is no record with a step"),
    ):
        run, child = tmp_path / "run", tmp_path / "child"
        shutil.copytree(trained, run, symlinks=True)
        (run / name).write_text(text)
        assert_refused(call("train", "--resume", "--run-dir", run), message)
        if name.endswith(".json"):
            assert_refused(call("grow", run, "--to", 2, 1, "--run-dir", child), message)
        assert not child.exists()
        shutil.rmtree(run)
    shutil.copytree(trained, run, symlinks=True)
    (run / "lock").unlink()
    os.mkfifo(run / "lock")
    assert call("train", "--resume", "--run-dir", run).status == 0


def _value_paths(data: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [keys for key, value in items for keys in [(*at, key), *_value_paths(value, (*at, key))]]


def _with(data: Any, keys: tuple[Any, ...], value: object) -> Any:
    if not keys:
        return value
    copied = dict(data) if isinstance(data, dict) else list(data)
    copied[keys[0]] = _with(data[keys[0]], keys[1:], value)
    return copied


def test_settings_that_were_changed_by_hand_are_not_resumed(call: Call, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "seed": 1}))
    message = r"config\.json has other settings than the run was started with; restore it, or delete .*/identity\.json to go on"
    assert_refused(call("train", "--resume", "--run-dir", run), message)
    (run / "identity.json").unlink()
    assert call("train", "--resume", "--run-dir", run).status == 0


def test_a_run_of_code_that_had_fewer_settings_is_said_to_be_one(call: Call, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    config = json.loads((run / "config.json").read_text())
    del config["prompt"]["answer"], config["credit"]
    (run / "config.json").write_text(json.dumps(config))
    started = json.loads((run / "identity.json").read_text())
    (run / "identity.json").write_text(json.dumps({**started, "settings": "as that code counted them"}))
    message = (
        r"config\.json was written by other code, which had no setting prompt\.answer, credit; go on with that code, "
        r"or delete .*/identity\.json to go on"
    )
    assert_refused(call("train", "--resume", "--run-dir", run), message)
    (run / "identity.json").unlink()
    assert call("train", "--resume", "--run-dir", run).status == 0


def test_questions_that_have_changed_are_noticed(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    file, run = tmp_path / "mine.jsonl", tmp_path / "run"
    others = [{"question": f"{split}?", "answer": "9", "split": split} for split in ("test", "validation")]
    lines = [*numbered(4, split="train"), *others]
    flags = [
        "train",
        *FLAGS,
        "--eval-every",
        1,
        "--backbone",
        tiny_folder,
        "--run-dir",
        run,
        "--task",
        f"jsonl:{write_lines(file, lines)}",
    ]
    assert call(*flags).status == 0
    for index, what in ((1, "training"), (4, "test"), (5, "validating")):
        write_lines(file, [{**line, "answer": "7"} if at == index else line for at, line in enumerate(lines)])
        message = rf"was started with other questions or answers \({what}\); resume with the same data or name another"
        assert_refused(call(*flags, "--resume"), message)
    write_lines(file, lines)
    assert call(*flags, "--resume").status == 0
    # A child that is asked the same begins where its parent ended; one that is asked something else is asked anew.
    child, other = tmp_path / "child", tmp_path / "other"
    assert call("grow", run, "--to", 2, 1, "--run-dir", child).status == 0
    scores = [json.loads((folder / "evaluation.json").read_text()) for folder in (run, child)]
    assert scores[1]["before"] == scores[0]["after"]
    write_lines(file, [*lines[:4], {"question": "Another?", "answer": "x", "split": "test"}])
    assert call("grow", run, "--to", 2, 1, "--run-dir", other).status == 0
    assert json.loads((other / "evaluation.json").read_text())["before"]["test"]["floor_answer"] == "x"


def test_make_train_starts_a_run_and_goes_on_with_it(call: Call, tiny_folder: Path, tmp_path: Path) -> None:
    command = ["train", *FLAGS, "--backbone", tiny_folder, "--resume", "--run-dir", tmp_path / "runs" / "mine"]
    first, second = call(*command), call(*command)
    assert (first.status, second.status) == (0, 0)
    assert first.out == second.out
    assert_refused(call(*command[:-1], tmp_path), r"is no run, there is nothing to --resume; start one there without it$")


# A task of lines


@pytest.mark.parametrize("count", [2, 5, 60])
def test_lines_that_name_no_test_are_held_out_by_hash(call: Call, tiny_folder: Path, tmp_path: Path, count: int) -> None:
    plain, named = (write_lines(tmp_path / f"{name}.jsonl", numbered(count, **more)) for name, more in
                    (("plain", {}), ("named", {"split": "train"})))  # fmt: skip
    tasks = [get_task(f"jsonl:{path}") for path in (plain, named)]
    ids = [{split: [e.id for e in task.examples(split, 99)] for split in ("train", "test")} for task in tasks]
    assert ids[0] == ids[1]
    assert ids[0]["test"]
    assert not set(ids[0]["test"]) & set(ids[0]["train"])
    told = rf"names no questions to score on: some are held out by their hash \(.*{len(ids[0]['test'])} for test"
    planned = call("train", *FLAGS, "--backbone", tiny_folder, "--task", f"jsonl:{named}", "--dry-run")
    assert planned.status == 0
    assert "held out by their hash" in planned.out
    assert re.search(told, tasks[0].remark)
    both = write_lines(tmp_path / "both.jsonl", [*numbered(3, split="train"), *numbered(1, split="test")])
    assert get_task(f"jsonl:{both}").remark == ""


# The terminal


def test_what_others_wrote_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x9bc\x07\x7f\r\u202ed\ud800e\u2028") == r"a\x1b[2Jb\x9bc\x07\x7f\r\u202ed\ud800e\u2028"
    assert printable("line\n\tnext: é 你 👩\u200d🔬") == "line\n\tnext: é 你 👩\u200d🔬"
    assert one_line("a\nb") == r"a\nb"


def test_no_command_lets_escape_codes_through(
    call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "\x1b[31m\x9b1m\u202eAnswer: Yes\x07"
    monkeypatch.setattr(Backbone, "detokenize", lambda self, ids: evil)
    path = write_lines(tmp_path / "mine.jsonl", [{"question": f"{evil} {n}?", "answer": f"{evil}{n}"} for n in range(12)])
    outcomes = [
        call("ask", trained, "Where?"),
        call("tasks", "show", f"jsonl:{path}"),
        call(evil),
        call("train", f"--{evil}"),
        call("show", evil),
        call("train", *FLAGS, "--task", evil),
    ]
    for outcome in outcomes:
        assert not set("\x1b\x9b\u202e\x07") & set(outcome.out + outcome.err), outcome
    assert r"\x1b[31m" in outcomes[0].out


def test_a_terminal_without_columns(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in ("0", "1", "-5", "x"):
        monkeypatch.setenv("COLUMNS", columns)
        for command in (["show", trained], ["train", "--help"]):
            outcome = call(*command)
            assert outcome.status == 0
            assert outcome.out
        assert_refused(call("train", "--nope"), "--nope")


# Signals


@pytest.mark.parametrize(
    ("while_loading", "left"), [("neuromas.cli.main", (-signal.SIGINT, "", "")), ("tyro", (130, "", "\nstopped\n"))]
)
def test_a_signal_while_it_loads_is_the_end_of_it_and_no_traceback(while_loading: str, left: tuple[int, str, str]) -> None:
    """From our first line on Ctrl-C ends the program without a traceback; the interpreter's start is not ours."""
    code = (
        "import os, signal, sys\n"
        "sys.argv = ['neuromas', 'tasks']\n"
        "class Late:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {while_loading!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Late())\n"
        "from neuromas.cli.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == left


GRID = """
methods = ["class:{rivals}:Waits"]
tasks = ["navigate"]
seeds = [0]
[train]
num_steps = 1
"""


@pytest.mark.processes
def test_workers_of_a_comparison_that_was_killed_end_and_leave_the_folder(tmp_path: Path) -> None:
    out, grid = tmp_path / "out", tmp_path / "grid.toml"
    grid.write_text(GRID.format(rivals=RIVALS))
    process = subprocess.Popen([sys.executable, "-m", "neuromas.cli", "compare", str(grid), "--out", str(out)])
    while not (found := [path for path in out.glob("runs/*/pid") if path.read_text()]):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    worker, deadline = int(found[0].read_text()), time.monotonic() + 60
    # One that has ended may stay as a zombie until the machine's first process collects it.
    while (state := Path(f"/proc/{worker}/stat")).exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with compare._locked(out):
        pass

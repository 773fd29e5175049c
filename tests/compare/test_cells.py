"""Cells: named by content, made in processes of their own, and lost one at a time.

1. A cell is found again if method, settings, backbone and code are the same; only the code may be told to be ignored.
2. A cell's process that dies, of any cause, costs that cell alone; cells stored before are not run again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Call, assert_refused, run_cli
from paths import CONFIGS, RIVALS
from rivals import Rival

from neuromas.compare import cluster
from neuromas.compare import code_version as sources
from neuromas.compare import run as compare
from neuromas.compare.cells import Cell, Stored, cell_of, read, write
from neuromas.compare.cluster import make_remotely
from neuromas.compare.code_version import code_version
from neuromas.compare.grid import find_method
from neuromas.compare.methods import METHODS, CellSpec
from neuromas.compare.workers import make_all, to_order
from neuromas.config import TaskConfig, TrainConfig
from neuromas.training.questions import data_checksum

CONFIG = TrainConfig(eval_size=12, num_steps=6)


def rival_cell(method: str, out: Path, seed: int = 0, checksum: str = "a") -> Cell:
    return cell_of(CellSpec(f"class:{RIVALS}:{method}", replace(CONFIG, seed=seed)), out, checksum)


def test_a_cell_is_named_by_all_that_decides_it(tmp_path: Path) -> None:
    first = rival_cell("Fine", tmp_path)
    assert rival_cell("Fine", tmp_path) == first
    spec = first.spec
    others = [
        rival_cell("Fine", tmp_path, seed=1),
        rival_cell("Fine", tmp_path, checksum="b"),
        cell_of(replace(spec, config=replace(CONFIG, lr=0.5)), tmp_path, "a"),
        cell_of(replace(spec, method="direct"), tmp_path, "a"),
    ]
    assert len({other.path for other in (first, *others)}) == 5
    # What changes no number changes no name.
    for same in (replace(CONFIG, device="cpu"), replace(CONFIG, save_every=3), replace(CONFIG, run_dir=Path("x"))):
        assert cell_of(replace(spec, config=same), tmp_path, "a").path == first.path


def test_changed_questions_make_other_cells(tmp_path: Path) -> None:
    file, code = tmp_path / "own.jsonl", tmp_path / "own.py"
    of_file, of_code = TaskConfig(name=f"jsonl:{file}"), TaskConfig(name=f"class:{code}:Own")
    code.write_text("from neuromas.tasks import Navigate\n\n\nclass Own(Navigate):\n    pass\n")

    def checksums(gold: str) -> tuple[str, str]:
        rows = [{"question": f"{i}?", "answer": gold if i == 7 else "no"} for i in range(40)]
        file.write_text("\n".join(map(json.dumps, rows)))
        return data_checksum(of_file), data_checksum(of_code)

    first = checksums("no")
    assert checksums("no") == first
    other = checksums("yes")
    code.write_text(code.read_text() + "    other = 1\n")
    last = checksums("yes")
    assert len({first, other, last}) == 3
    assert other[0] == last[0]
    assert data_checksum(CONFIG.task) == ""


def test_the_code_version_follows_the_source_that_matters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "neuromas"
    shutil.copytree(sources.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors", "sandbox"))
    own = tmp_path / "own.py"
    own.write_text(
        RIVALS.read_text()
        + "\nfrom neuromas.compare.methods import debate\n\n\ndef late():\n    import neuromas.graph.messages\n"
    )
    monkeypatch.setattr(sources, "PACKAGE", package)
    monkeypatch.setattr(sources, "LEFT_OUT", frozenset({package / "compare" / "methods" / "__init__.py"}))

    def version() -> str:
        sources._imported.cache_clear()
        return code_version(find_method(f"class:{own}:Fine"))

    before = version()
    assert version() == before
    for unrelated in ("compare/report.py", "compare/methods/macnet.py", "compare/methods/__init__.py"):
        (package / unrelated).write_text((package / unrelated).read_text() + "\n# changed\n")
        assert version() == before
    seen = {before}
    for related in (
        "graph/messages.py",
        "compare/methods/debate.py",
        "compare/methods/method.py",
        "config.py",
        "__init__.py",
        "rollout/torch_engine.py",
        "model/kernels/loops.py",
        "graph/__init__.py",
    ):
        (package / related).write_text((package / related).read_text() + "\n# changed\n")
        seen.add(version())
    own.write_text(own.read_text() + "\n# changed\n")
    seen.add(version())
    assert len(seen) == 10
    sources._imported.cache_clear()


def test_the_code_version_knows_fields_and_their_functions() -> None:
    debate, consistency = METHODS["debate"], METHODS["self_consistency"]
    assert len({code_version(METHODS[name]) for name in METHODS}) == len(METHODS)
    assert code_version(debate) == code_version(debate) != code_version(consistency)
    files = sources._imported(Path(sys.modules["neuromas.compare.methods.debate"].__file__ or "").resolve())
    assert all(path.read_bytes() in sources.sources_of(debate) for path in files)
    assert code_version(Rival(skill=0.1)) != code_version(Rival(skill=0.2))


def test_methods_that_train_alike_share_a_run_and_no_cell(tmp_path: Path) -> None:
    one, vote = (cell_of(CellSpec(name, CONFIG), tmp_path, "a") for name in ("single_rl", "single_rl_vote_3"))
    assert one.run == vote.run
    assert one.path != vote.path
    assert cell_of(CellSpec("neuromas_3", CONFIG), tmp_path, "a").run != one.run


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    cell = rival_cell("Fine", tmp_path)
    assert read(cell) is None
    cell.run.mkdir(parents=True)
    result = find_method(cell.spec.method).run(cell.spec, cell.run)
    write(cell, Stored("c", result, None, 1.0))
    assert read(cell) == Stored("c", result, None, 1.0)
    assert [path.name for path in cell.path.parent.iterdir()] == [cell.path.name]


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    cell = rival_cell("Fine", tmp_path)
    cell.path.parent.mkdir(parents=True)
    cell.path.write_text('{"code": "a", ')
    with pytest.raises(ValueError, match=f"cell {cell.path} is damaged"):
        read(cell)


def test_a_death_in_the_middle_costs_one_cell(tmp_path: Path) -> None:
    cells = [rival_cell("Killed", tmp_path, seed) for seed in range(4)]
    seen: list[tuple[int, str | None]] = []
    make_all(cells, 1, lambda cell, stored: seen.append((cell.spec.config.seed, stored.error)))
    message = f"its process was killed by SIGKILL (out of memory?); see {cells[1].log}"
    assert seen == [(0, None), (1, message), (2, None), (3, None)]
    stored = [read(cell) for cell in cells]
    assert [bool(s and s.result) for s in stored] == [True, False, True, True]
    assert stored[1] is not None
    assert stored[1].error == message
    # What a method prints goes to its log, and does not get between the lines of the protocol.
    assert "a method may print" in cells[0].log.read_text()


def test_an_error_is_one_line_and_the_log_has_the_rest(tmp_path: Path) -> None:
    cell = rival_cell("Dies", tmp_path)
    make_all([cell], 2, lambda *_: None)
    stored = read(cell)
    assert stored is not None
    assert (stored.result, stored.error) == (None, "RuntimeError: out of ideas")
    assert "Traceback" in cell.log.read_text()


GRID = f"""
methods = ["class:{RIVALS}:Fine", "class:{RIVALS}:Killed"]
tasks = ["navigate"]
seeds = [0, 1, 2]
reference = "class:{RIVALS}:Fine"
matched = ["calls_per_answer"]
[train]
eval_size = 12
num_steps = 6
"""


def run(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> tuple[str, str]:
    """Call `neuromas compare` on GRID in this process; return what it printed."""
    (folder / "grid.toml").write_text(GRID)
    run_cli("compare", folder / "grid.toml", "--out", folder / "out", *flags)
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.processes
def test_the_command_goes_on_where_it_was(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, err = run(capsys, tmp_path, "--jobs", "2")
    assert "6 cells: 0 are there, 6 to make, 2 at a time" in err
    assert re.search(r"navigate: class:\S+:Killed: seed 1 died: its process was killed by SIGKILL", out)
    assert "not compared: refused on 1 of 1 tasks: navigate" in out
    assert (tmp_path / "out" / "report.html").is_file()
    # A second time: only the dead one is tried again.
    _, err = run(capsys, tmp_path)
    assert "6 cells: 5 are there, 1 to make" in err
    # A report alone makes nothing.
    out, err = run(capsys, tmp_path, "--report-only")
    assert err == ""
    assert "seed 1 died" in out
    # Where its cells are not, a report stays as it is.
    report = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(SystemExit):
        run(capsys, tmp_path, "--report-only", "--seeds", "9")
    message = "--out .*out holds no cell of this comparison, so --report-only has nothing to report; name the folder in which"
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "out" / "report.json").read_bytes() == report

    stored = next((tmp_path / "out" / "cells").glob("*seed0*"))
    now = json.loads(stored.read_text())["code"]
    stored.write_text(stored.read_text().replace(now, "0ld"))
    line = f"navigate, bundled, seed 0: made by other code (0ld, now {now})"
    out, err = run(capsys, tmp_path, "--keep-old")
    assert f"{line}; kept as it is" in out
    assert "6 cells: 5 are there, 1 to make" in err
    assert f"{line}; kept as it is" in (tmp_path / "out" / "report.md").read_text()
    _, err = run(capsys, tmp_path)
    assert f"{line}; it is made again" in err
    assert "6 cells: 4 are there, 2 to make" in err
    assert json.loads(stored.read_text())["code"] == now

    stored.write_text("{")
    _, err = run(capsys, tmp_path, "--report-only")
    assert re.search(r"cell \S+ is damaged \(.*\); it is left out", err)
    _, err = run(capsys, tmp_path)
    assert re.search(r"cell \S+ is damaged \(.*\); it is made again", err)


@pytest.mark.processes
def test_a_comparison_that_is_ended_ends_its_processes_and_stores_no_failure(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace(":Fine", ":Waits").replace(f', "class:{RIVALS}:Killed"', ""))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "neuromas.cli", "compare", str(tmp_path / "grid.toml"), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (found := [path for path in out.glob("runs/*/pid") if path.read_text()]):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert "stopped; the same command goes on from here" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int(found[0].read_text()), 0)
    assert not list(out.glob("cells/*.json"))


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with compare._locked(tmp_path), pytest.raises(ValueError, match=f"--out {tmp_path} is in use by another comparison"):
        compare._locked(tmp_path).__enter__()


def test_the_dry_run_counts_the_papers_parameters_from_the_config_alone(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = call("compare", CONFIGS / "paper_table1.toml", "--dry-run").out
    counts = dict(re.findall(r"^(\w+) +yes +18 +[\d,]+ \(([\d.]+M)\)", out, re.MULTILINE))
    assert counts == {"malt": "6.9M", "single_rl": "6.9M", "single_rl_vote_3": "6.9M", "neuromas_3": "6.9M",
                      "single_rl_long": "6.9M", "single_rl_long_continued": "6.9M",
                      "neuromas_5": "11.5M", "neuromas_7": "16.1M", "neuromas_5_grown": "11.5M",
                      "neuromas_7_grown": "16.1M"}  # fmt: skip
    assert "neuromas_3 - single_rl: matched in trainable parameters, training questions" in out
    assert "270 cells: 15 methods x 6 tasks x 3 seeds on Qwen/Qwen3-0.6B" in out
    # Nine methods train by the common loop; the vote shares the single model's trials.
    assert "108 trials: every trained method on every task tries lr 0.0003, 0.001; validation chooses" in out


def test_the_dry_run_counts_tokens_where_these_are_the_budget(call: Call) -> None:
    out = call("compare", CONFIGS / "path_dependence.toml", "--dry-run").out
    assert len(re.findall(r"^neuromas_\w+ +yes +10 +[\d,]+ +of [\d,]+ tokens +\d+$", out, re.MULTILINE)) == 4
    assert "neuromas_7_grown - neuromas_7: matched in training steps, sampled tokens in training (to within" in out


def test_the_dry_run_counts_one_debate_of_each_question(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('methods = ["neuromas_3", "multiagent_ft"]\ntasks = ["navigate"]\nseeds = [0]\n[train]\nnum_steps = 5\n')
    counts = dict(re.findall(r"^(\w+) +yes +1 +[\d,]+ +(\d+) +5$", call("compare", file, "--dry-run").out, re.MULTILINE))
    assert counts == {"neuromas_3": str(5 * 16 * 8), "multiagent_ft": str(5 * 16)}


def test_a_society_stands_beside_a_method_with_a_critic_of_another_rate(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    lists = 'methods = ["collm_dc", "multiagent_ft", "star"]\ntasks = ["navigate"]\nseeds = [0]\n'
    file.write_text(f"{lists}[train]\ncritic_lr = 0.05\nreplays = 2\n")
    assert "3 cells: 3 methods x 1 tasks x 1 seeds" in call("compare", file, "--dry-run").out


def test_a_node_of_a_cluster_with_other_code_makes_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cell = rival_cell("Fine", tmp_path)
    stored = make_remotely(to_order(cell), str(tmp_path))
    assert stored.result is not None
    # The user's process stores it.
    assert read(cell) is None
    with pytest.raises(ValueError, match=rf"has other code \({cell.code}\) than this machine \(other\); install the same"):
        make_remotely(to_order(replace(cell, code="other")), str(tmp_path))


def test_a_cluster_with_no_device_for_a_cell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 4.0})
    monkeypatch.setattr(cluster, "load_ray", lambda: ray)
    on_gpu = CellSpec(f"class:{RIVALS}:Fine", replace(CONFIG, device="cuda"))
    with pytest.raises(ValueError, match="--workers needs 1 or more GPUs, one for each cell, and the cluster has 0"):
        cluster.make_on_cluster([cell_of(on_gpu, tmp_path, "a")], lambda *_: None)


def test_jobs_must_be_some(call: Call) -> None:
    assert_refused(call("compare", "x.toml", "--jobs", 0), "--jobs must be at least 1, got 0$")

"""Every command and program of the pages runs, in its smallest form: SHORTER says what is put behind a command.

A page is run from top to bottom, in a folder that has the runs that it takes for granted. `make docs` runs these.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from browser import browser, find_browser
from commands import Call

from neuromas.config import TrainConfig
from neuromas.system.schema import from_dict

ROOT = Path(__file__).parent.parent
HAS_BLOCKS = re.compile(r"^```(bash|python|toml)", re.MULTILINE)
PAGES = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if HAS_BLOCKS.search(path.read_text()))
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
SMALL = [
    "--num-steps", "1", "--examples-per-step", "1", "--group-size", "2", "--max-new-tokens", "6", "--eval-size", "2",
    "--validation-size", "2",
]  # fmt: skip
SHORTER: dict[str, list[str]] = {
    "train": SMALL,
    "finetune": [*SMALL, "--dry-run"],  # a debate is longer than all other commands together
    "grow": ["--steps", "1", "--open-steps", "1"],
    "eval": ["--size", "2"],
    "diagnose": ["--limit", "2"],
    "screen": ["--questions", "2", "--samples", "2", "--max-new-tokens", "4"],
    "compare": ["--dry-run"],  # cells take minutes at least
}
NOT_RUN = {
    "pip install": "installs; the gate itself is made so",
    "neuromas serve": "serves until Ctrl-C; tests/serve runs it",
    "curl ": "needs a server; tests/serve sends such requests",
    "neuromas chat": "reads a terminal; tests/serve runs it",
    "lm_eval": "is not installed; tests/serve/test_harness.py runs it where it is",
    "python -m benchmarks.gpu": "tests/test_gpu_benchmark.py runs it",
    "python -m pytest": "the gate runs all of it",
    "neuromas train configs/tinker.toml": "needs a service; tests/test_tinker_service.py trains by one",
    "make ": "installs; the gate itself is made so",
    "python3 -m venv": "installs; the gate itself is made so",
    "neuromas train --engine vllm": "vLLM is not installed; tests/test_vllm.py trains by it",
    "vllm serve": "vLLM is not installed; tests/training/test_exported.py compares the command with what vLLM takes",
    "tensorboard --logdir": "serves until Ctrl-C",
    "TRACKIO_DIR=": "serves until Ctrl-C",
    "wandb sync": "needs the network",
    "neuromas view runs/navigate-1-1-1-seed0 --watch": "runs until Ctrl-C; tests/view runs it",
}
PROGRAMS_NOT_RUN = {"serve": "needs a server; tests/serve asks one by the same client"}
TAKEN_FOR_GRANTED = ("navigate-1-1-1-seed0", "a", "b", "c")
STEPS = {"configs/grow_3_5_7.toml": ["--dry-run"]}
"""Its growths need all its steps."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python|toml)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """Return the commands of a block, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [re.split(r"\s#\s", line)[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def shortened(command: str, number: int, backbone: Path) -> list[str]:
    """Return the arguments of a command in its smallest form, on a backbone that is here."""
    arguments = shlex.split(command)[1:]
    if "--backbone" in arguments and arguments[0] != "grow":
        arguments[arguments.index("--backbone") + 1] = str(backbone)
    if {"configs/capitals.toml", "configs/smollm2.toml", "configs/real.toml"} & set(arguments):
        arguments += ["--backbone", str(backbone)]
    if "--resume" not in arguments and "--dry-run" not in arguments:
        arguments += next((flags for name, flags in STEPS.items() if name in arguments), SHORTER.get(arguments[0], []))
    if arguments[0] in ("train", "finetune", "grow") and "--run-dir" not in arguments:
        arguments += ["--run-dir", f"runs/of-block-{number}"]
    return arguments


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on the bundled backbone, validated."""
    path = tmp_path_factory.mktemp("run") / "run"
    command = [sys.executable, "-m", "neuromas.cli", "train", *SMALL, "--eval-every", "1", "--run-dir", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


@pytest.fixture
def place(run: Path, tmp_path: Path) -> Path:
    """A folder with what the pages take for granted."""
    for name in ("configs", "benchmarks", "docs", "neuromas"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in TAKEN_FOR_GRANTED:
        shutil.copytree(run, tmp_path / "runs" / name, symlinks=True)
    shutil.copytree(run, tmp_path / "RUN", symlinks=True)
    (tmp_path / "items.json").write_text(json.dumps({"examples": [{"input": "Is it?", "target": "Yes"}]}))
    return tmp_path


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_says_runs(page: Path, call: Call, place: Path, tiny_folder: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    for number, (language, block) in enumerate(blocks(page)):
        if language == "python" and page.stem not in PROGRAMS_NOT_RUN:
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        elif language == "toml":
            found = tomllib.loads(block)
            if "methods" not in found:
                from_dict(TrainConfig, found, where=page.name).check()
        for line, command in enumerate(commands(block)) if language == "bash" else ():
            if any(command.startswith(start) for start in NOT_RUN):
                continue
            assert command.startswith("neuromas "), f"{command!r} is neither run nor in NOT_RUN"
            done = call(*shortened(command, 100 * number + line, tiny_folder))
            assert done.status == 0, f"{command}: {done.err}"


def test_what_is_not_run_is_on_a_page() -> None:
    said = [command for page in PAGES for language, block in blocks(page) if language == "bash" for command in commands(block)]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in said)] == []


def test_the_notebook_is_the_tutorial() -> None:
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs/make_notebook.py")
    assert spec
    assert spec.loader
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    made = maker.notebook((ROOT / "docs/tutorial.md").read_text())
    assert (ROOT / "docs/tutorial.ipynb").read_text() == made, "python docs/make_notebook.py makes it anew"
    cells = [cell for cell in json.loads(made)["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == len(blocks(ROOT / "docs/tutorial.md"))
    assert "".join(cells[1]["source"]).startswith("!neuromas train")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_its_command_minutes_and_result(example: Path) -> None:
    head = example.read_text().split('"""')[1]
    assert f"python examples/{example.name}" in head
    assert re.search(r"Takes \d", head)
    assert "Prints" in head


@pytest.mark.docs
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(example), "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.docs
def test_the_site_is_whole_and_asks_nothing_of_a_network(tmp_path: Path) -> None:
    """From disk: the first page, a reference page, a search, and the copy of a file that lies beside the docs."""
    if importlib.util.find_spec("mkdocs") is None or find_browser() is None:
        pytest.skip("mkdocs (extra docs) or a browser is not installed")
    site = tmp_path / "site"
    # Any warning of a link or a name that leads nowhere is an error.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "configs" in {path.name for path in (site / "repository").iterdir()}
    for path in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img|iframe|source)[^>]*(?:src|href|srcset)="(https?:[^"]+)"', path.read_text())
        assert fetched == [], path
    with browser(tmp_path / "profile") as page:
        for name, shown in (("index.html", "NeuroMAS"), ("reference/graph.html", "neuromas.graph.topology")):
            page.call("Page.navigate", url=(site / name).as_uri())
            page.wait_for(f"document.querySelector('article')?.innerText.includes({json.dumps(shown)})")
        page.ask("document.querySelector('.md-search__input').focus()")
        page.ask("""(() => { const input = document.querySelector('.md-search__input'); input.value = 'adapter';
            input.dispatchEvent(new KeyboardEvent('keyup', {key: 'r', bubbles: true})) })()""")
        page.wait_for("/matching documents/.test(document.querySelector('.md-search-result__meta').innerText)")
        assert [request for request in page.requests if not request.startswith(("file:", "data:", "about:"))] == []
        assert page.complaints == []

"""The house law: what the pages promise holds, and modules stay small."""

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODULES = sorted((ROOT / "neuromas").rglob("*.py"))
LARGEST_MODULE, LARGEST_FUNCTION = 400, 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert missing == []


def test_the_program_of_the_readme_prints_what_nodes_say() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "README.md", "exec"), {})
    lines = out.getvalue().splitlines()
    assert sum("->" in line for line in lines) >= 5
    assert "(nothing)" not in out.getvalue()
    assert len(out.getvalue()) > 100


def test_the_commands_of_the_readme_exist() -> None:
    from neuromas.cli.main import COMMANDS

    used = set(re.findall(r"^neuromas (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert used
    assert used <= set(COMMANDS)


def test_the_readme_has_no_gaps_left() -> None:
    assert not re.search(r"^(RESULTS|TRANSCRIPT|TODO)", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_stay_small(module: Path) -> None:
    text = module.read_text()
    assert len(text.splitlines()) <= LARGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < LARGEST_FUNCTION, node.name


def test_shapes_are_checked_wherever_they_are_written(pytestconfig: pytest.Config) -> None:
    *checked, checker = str(pytestconfig.getoption("jaxtyping_packages")).split(",")
    writing = [path for path in MODULES if "from jaxtyping import" in path.read_text()]
    assert checker == "beartype.beartype"
    assert sorted(checked) == [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in writing]


def test_public_names_are_these() -> None:
    import neuromas

    assert neuromas.__all__ == ["Backbone", "Network", "Topology"]
    assert all(getattr(neuromas, name).__name__ == name for name in neuromas.__all__)

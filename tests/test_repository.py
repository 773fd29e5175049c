"""The house law: what the pages promise holds, and modules stay small."""

import ast
import contextlib
import io
import re
from graphlib import TopologicalSorter
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


LAW: dict[str, set[str]] = {
    "types": set(),
    "system": set(),
    "sandbox": set(),
    "graph": {"types"},
    "config": {"graph", "system"},
    "bundled": {"system"},
    "tasks": {"types", "config", "system", "sandbox"},
    "model": {"types", "config", "system", "bundled"},
    "rollout": {"types", "config", "graph", "model"},
    "training": {"types", "config", "graph", "system", "tasks", "model", "rollout"},
    "compare": {"types", "config", "graph", "system", "tasks", "model", "rollout", "training"},
    "recipes": {"types", "graph", "tasks", "model", "rollout", "training"},
    "cli": {"types", "config", "graph", "system", "bundled", "tasks", "model", "training", "compare"},
    "__init__": {"graph", "model", "rollout"},
}
"""What each room may import, rooms in the order of the straight line: CONTRIBUTING.md draws it."""


def imports_of(module: Path) -> set[str]:
    """Return the modules of this package that a module imports, wherever in it."""
    names = set(MODULE_NAMES)
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & names or {node.module}
    return found & names


def name_of(module: Path) -> str:
    return ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULE_NAMES = {name_of(module): module for module in MODULES}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def test_rooms_import_what_the_law_allows() -> None:
    arrows: dict[str, set[str]] = {room: set() for room in LAW}
    for name, module in MODULE_NAMES.items():
        arrows[room_of(name)] |= {room_of(other) for other in imports_of(module)} - {room_of(name), "__init__"}
    assert arrows == LAW
    # No circle between rooms: each imports rooms that stand above it.
    order = list(LAW)
    assert all(order.index(other) < order.index(room) for room, others in LAW.items() for other in others)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for room, others in LAW.items():
        if room != "__init__":
            assert re.search(rf"^    {room} +<- *{re.escape(', '.join(sorted(others)))}$", page, re.MULTILINE), room


def test_no_module_imports_itself_by_way_of_others() -> None:
    sorter = TopologicalSorter({name: imports_of(module) - {name} for name, module in MODULE_NAMES.items()})
    sorter.prepare()  # raises CycleError


def test_only_settings_and_records_stand_outside_of_rooms() -> None:
    assert {path.name for path in (ROOT / "neuromas").glob("*.py")} == {"__init__.py", "config.py", "types.py"}


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.parent.name for path in MODULES} - {"neuromas", "kernels", "methods", "bundled"}
    assert rooms <= {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}


def test_public_names_are_these() -> None:
    import neuromas

    assert neuromas.__all__ == ["Backbone", "Network", "Topology"]
    assert all(getattr(neuromas, name).__name__ == name for name in neuromas.__all__)

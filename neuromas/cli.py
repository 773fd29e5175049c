"""The command line: parse, call, print. Results go to standard output, progress and errors to standard error."""

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from neuromas.arguments import (
    AskArguments,
    CompareArguments,
    EvalArguments,
    GrowArguments,
    ShowArguments,
    TasksArguments,
    TasksShowArguments,
    TrainArguments,
)
from neuromas.bundled import find_backbone
from neuromas.config import COLDEST, MOST_COUNTED, GrowthConfig, TaskConfig, TrainConfig, load_toml
from neuromas.descent import grown_config
from neuromas.process import settle
from neuromas.questions import Questions, check_code, drawn_in_training, open_run
from neuromas.rundir import RunDirectory
from neuromas.terminal import one_line, printable

MOST_ASKED = 1_000_000
"""Characters of a question: standard input may have no end."""

USAGE = """usage: neuromas COMMAND [ARGUMENTS]

  train [CONFIG.toml]   train a network; without arguments a small one on a bundled backbone, in minutes
  grow RUN --to WIDTHS  add nodes or layers to a trained network and train on, in a new run
  eval RUN              score a trained run on held-out problems or on a file
  ask RUN QUESTION      put one question to a trained run; prints every message on its edge, then the answer
  show RUN|CONFIG.toml  draw a network and its budget
  compare CONFIG.toml   run methods x tasks x seeds at matched budgets; one report with intervals, floors and tests
  tasks                 list tasks with their splits, floors and verifiers; `tasks show NAME` prints an example

neuromas COMMAND --help explains a command. Results go to standard output; with --json they are one JSON object."""


def run_train(args: Sequence[str]) -> None:
    base, rest = TrainConfig(), list(args)
    if rest and not rest[0].startswith("-"):
        base = load_toml(Path(rest.pop(0)))
    parsed = _parse(TrainArguments, rest, "train", default=TrainArguments(config=base))
    run_path = parsed.config.run_path
    if parsed.resume and (run_path / "config.json").is_file() and len(args) == len(rest):
        # Without a config file, what the flags leave open comes from the run itself.
        run, named = RunDirectory.open(run_path), parsed.config.task.name
        parsed = _parse(TrainArguments, rest, "train", default=TrainArguments(config=run.config))
        check_code(run, parsed.allow_code or named == run.config.task.name)
    config = parsed.config.check()
    if parsed.dry_run:
        _plan(config)
        return
    _train(config, RunDirectory.find(config, resume=parsed.resume), resume=parsed.resume)


def _plan(config: TrainConfig) -> None:
    """Print what a run would be, after whatever would refuse it but its folder."""
    find_backbone(config.backbone)
    questions = Questions.of(config)
    from neuromas import show  # loads torch, which a wrong flag need not wait for

    print(show.plan(config, questions.task.remark))


def _train(config: TrainConfig, run: RunDirectory, *, resume: bool = False, parent: RunDirectory | None = None) -> None:
    """Train a run, print its scores and draw its curve; exit with 130 if the user stops it."""
    find_backbone(config.backbone)
    questions = Questions.of(config)
    # What is wrong so far is told without waiting for torch, which these load.
    from neuromas.plot import plot_run
    from neuromas.stop import Interrupted
    from neuromas.train import train

    try:
        scores = train(config, resume=resume, parent=parent, questions=questions)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        if parent:
            print(f"that is: neuromas train --resume --run-dir {run.path}", file=sys.stderr)
        sys.exit(130)
    for when, results in scores.items():
        for name, result in results.items():
            print(f"{when} training, {name}: {result}")
    print(f"curve: {plot_run(run)}")
    print(f"look into it: neuromas show {run.path}")


def run_grow(args: Sequence[str]) -> None:
    parsed = _parse(GrowArguments, args, "grow")
    if not (parsed.to or parsed.connect or parsed.edges):
        raise ValueError("grow needs --to, --connect or --edges: what to grow to, e.g. --to 2 2 1")
    if any(width < 1 for width in parsed.to or ()):
        raise ValueError(f"--to must be positive widths, e.g. 2 2 1, got {' '.join(map(str, parsed.to))}")
    entry = GrowthConfig(
        widths=parsed.to, new_layers=parsed.new_layers, connect=parsed.connect, edges=parsed.edges, start=parsed.start,
        noise=parsed.noise, opening=parsed.opening, open_steps=parsed.open_steps, warmup_new=parsed.warmup_new,
    )  # fmt: skip
    parent = RunDirectory.open(parsed.run)
    check_code(parent, parsed.allow_code)
    changes = {
        name: value for name in ("lr", "step_tokens", "run_dir", "backbone") if (value := getattr(parsed, name)) is not None
    }
    if parsed.task is not None:
        changes["task"] = replace(parent.config.task, name=parsed.task)
    config = grown_config(parent, entry, steps=parsed.steps, **changes)
    if parsed.dry_run:
        _plan(config)
        return
    _train(config, RunDirectory.find(config, resume=False), parent=parent)


def run_eval(args: Sequence[str]) -> None:
    parsed = _parse(EvalArguments, args, "eval")
    if not 1 <= parsed.size <= MOST_COUNTED:
        raise ValueError(f"--size must be 1 to {MOST_COUNTED:,}, got {parsed.size}")
    if parsed.temperature != 0 and not COLDEST <= parsed.temperature < math.inf:
        raise ValueError(f"--temperature must be 0 (greedy) or at least {COLDEST}, got {parsed.temperature}")
    run, task = open_run(parsed.run, untrained=parsed.untrained, data=parsed.data, allow_code=parsed.allow_code)
    task.check_ready()
    examples = task.load(parsed.file) if parsed.file else task.examples(parsed.split, parsed.size)
    find_backbone(run.config.backbone)
    from neuromas.evaluate import evaluate, score
    from neuromas.load import load_network

    network, step = load_network(run, untrained=parsed.untrained)
    result, groups = evaluate(network, task, examples, temperature=parsed.temperature, seed=parsed.seed)
    report, lines = result.to_json(), [str(result)]
    if parsed.file:
        # A score on items that training has met says little about new ones.
        try:
            drawn = drawn_in_training(run, step, examples)
        except ValueError as error:
            report["drawn_in_training"] = None
            lines.append(f"{parsed.file.name}: how many of its items were drawn in training cannot be told: {error}")
        else:
            others = [group for group in groups if group[0].example.id not in drawn]
            report["drawn_in_training"] = len(groups) - len(others)
            lines.append(f"{parsed.file.name}: {len(groups) - len(others)} of {len(groups)} items were drawn in training")
            if 0 < len(others) < len(groups):
                unseen = score(task, others)
                report["not_drawn"] = unseen.to_json()
                lines.append(f"the other {len(others)}: {unseen}")
    print(json.dumps(report) if parsed.json else printable("\n".join(lines)))


def run_ask(args: Sequence[str]) -> None:
    parsed = _parse(AskArguments, args, "ask")
    if parsed.question == "-":
        question = sys.stdin.buffer.read(4 * MOST_ASKED + 1).decode(errors="surrogateescape")
    else:
        question = parsed.question
    if len(question) > MOST_ASKED:
        raise ValueError(f"QUESTION must be at most {MOST_ASKED:,} characters")
    if not question.strip():
        raise ValueError("QUESTION must not be empty")
    if not question.isascii() and question.encode(errors="replace").decode() != question:
        raise ValueError("QUESTION must be UTF-8 text, got bytes that are none")
    run, _ = open_run(parsed.run, allow_code=parsed.allow_code)
    find_backbone(run.config.backbone)
    from neuromas import show
    from neuromas.load import load_run

    loaded = load_run(parsed.run, allow_code=parsed.allow_code)
    rollout = loaded.network.ask(question.strip(), answer_format=loaded.task.answer_format)
    if parsed.json:
        print(json.dumps(show.rollout_json(rollout, loaded.task)))
    else:
        show.print_rollout(rollout, loaded.task)


def run_show(args: Sequence[str]) -> None:
    parsed = _parse(ShowArguments, args, "show")
    what = load_toml(parsed.what).check() if parsed.what.suffix == ".toml" else RunDirectory.open(parsed.what)
    from neuromas import show

    description = show.describe(what)
    if parsed.json:
        print(json.dumps(description))
    else:
        show.print_description(description)


def run_compare(args: Sequence[str]) -> None:
    parsed = _parse(CompareArguments, args, "compare")
    if parsed.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {parsed.jobs}")
    from neuromas.grid import load_grid

    grid = load_grid(
        parsed.grid, quick=parsed.quick, tasks=parsed.tasks, seeds=parsed.seeds, backbones=parsed.backbone,
        data=parsed.data, device=parsed.device,
    )  # fmt: skip
    from neuromas.compare import print_plan, print_result, run

    if parsed.dry_run:
        print_plan(grid)
        return
    out = parsed.out or Path("runs") / f"compare-{grid.name}"
    print_result(run(grid, out, jobs=parsed.jobs, keep_old=parsed.keep_old, report_only=parsed.report_only), out)


def run_tasks(args: Sequence[str]) -> None:
    from neuromas import catalogue

    if args and args[0] == "show":
        shown = _parse(TasksShowArguments, args[1:], "tasks show")
        config = TaskConfig(
            name=shown.name, difficulty=shown.difficulty, data=shown.data, split=shown.split, verifier=shown.verifier
        )
        reading = catalogue.readings(config)
        if shown.json:
            print(json.dumps(reading))
            return
        for node in reading["nodes"]:
            print(printable(f"--- node {node['node']} reads\n{node['reads']}"))
        print(printable(f"--- gold answer, split {reading['split']}, verifier {reading['verifier']}\n{reading['gold']}"))
        return
    parsed = _parse(TasksArguments, args, "tasks")
    rows = catalogue.listing(parsed.data)
    print(json.dumps({"tasks": rows}) if parsed.json else f"{catalogue.table(rows)}\n\n{catalogue.more_tasks()}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": run_train, "grow": run_grow, "compare": run_compare, "eval": run_eval, "ask": run_ask, "show": run_show,
    "tasks": run_tasks,
}  # fmt: skip


def _parse(kind: Any, args: Sequence[str], command: str, **kwargs: Any) -> Any:
    """Parse flags; a mistake in them is a ValueError of one line, as every other mistake."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=args, prog=f"neuromas {command}", **kwargs)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = (line.strip("│╰╭─╮╯ ") for line in complaint.getvalue().splitlines() if not line.startswith("╭"))
        raise ValueError(" ".join(line for line in lines if line.strip("-"))) from stop


def main() -> None:
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if args else 2)
    command = COMMANDS.get(args[0])
    if command is None:
        print(f"error: unknown command {args[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        settle()
        command(args[1:])
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does; there is nobody left to tell.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

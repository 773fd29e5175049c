"""Does it matter how a network came to its size? Grown against from scratch, at equal updates and equal sampled tokens.

    python -m benchmarks.path_dependence --quick                     # minutes: shows that everything runs
    python -m benchmarks.path_dependence --out runs/path --jobs 2    # 4 tasks, 6 arms, 5 seeds

The claim (arXiv 2605.16757, Navigate, one run each): 3, 5, 7 nodes from scratch 45.5, 41.0, 40.5; grown 45.5, 48.0, 51.0.
Every arm has the rank of the three-node network, so arms of equal size have equally many parameters. A cell is a task, an arm
and a seed: one run in a process of its own, one JSON when it is done. A finished cell is skipped, an unfinished one goes on
from its last checkpoint. `report.md` and `curves.png` are written from whatever cells are done.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuromas.config import AdapterConfig, GrowthConfig, TaskConfig, TopologyConfig, TrainConfig

THREE, FIVE, SEVEN = (1, 1, 1), (2, 2, 1), (2, 2, 2, 1)
ARMS: dict[str, tuple[tuple[tuple[int, ...], ...], str]] = {
    "scratch-3": ((THREE,), "immediate"),
    "scratch-5": ((FIVE,), "immediate"),
    "scratch-7": ((SEVEN,), "immediate"),
    "grown-5": ((THREE, FIVE), "immediate"),
    "grown-7": ((THREE, FIVE, SEVEN), "immediate"),
    "grown-7-annealed": ((THREE, FIVE, SEVEN), "annealed"),
}
"""Widths from stage to stage, each of equally many updates, and how a growth opens; zero adapters throughout. `immediate` is
the paper's."""
PAIRS = [("grown-5", "scratch-5"), ("grown-7", "scratch-7"), ("grown-7-annealed", "scratch-7"), ("grown-7-annealed", "grown-7"),
         ("grown-5", "scratch-3"), ("grown-7", "scratch-3"), ("grown-7-annealed", "scratch-3")]  # fmt: skip
TASKS = ("navigate", "web_of_lies", "tracking_shuffled_objects_five_objects", "boolean_expressions")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Settings:
    """What all cells have in common."""

    updates: int = 90
    step_tokens: int = 13_000
    examples_per_step: int = 16
    group_size: int = 8
    max_new_tokens: int = 128
    n: int = 500
    eval_every: int = 10
    validation_size: int = 100
    lr: float = 1e-3
    rank: int = 8
    backbone: str = "bundled"


QUICK = Settings(updates=6, step_tokens=1500, examples_per_step=2, group_size=4, max_new_tokens=64, n=20, eval_every=3,
                 validation_size=10)  # fmt: skip


def cell_config(settings: Settings, task: str, arm: str, seed: int, run_dir: Path, device: str = "auto") -> TrainConfig:
    """Return the run of one cell; ValueError if the updates cannot be shared out equally among its stages."""
    stages, opening = ARMS[arm]
    each, rest = divmod(settings.updates, len(stages))
    if rest:
        raise ValueError(f"--updates must be a multiple of {len(stages)} for {arm}, got {settings.updates}")
    growth = tuple(
        GrowthConfig(at_step=each * place, widths=widths, opening=opening, open_steps=max(1, each // 2))  # type: ignore[arg-type]  # a Literal
        for place, widths in enumerate(stages[1:], start=1)
    )
    return TrainConfig(
        topology=TopologyConfig(widths=stages[0]), growth=growth, task=TaskConfig(name=task), seed=seed, run_dir=run_dir,
        adapter=AdapterConfig(rank=settings.rank), backbone=settings.backbone, device=device, lr=settings.lr,  # type: ignore[arg-type]  # a Literal
        num_steps=settings.updates, step_tokens=settings.step_tokens, examples_per_step=settings.examples_per_step,
        group_size=settings.group_size, max_new_tokens=settings.max_new_tokens, eval_size=settings.n,
        eval_every=settings.eval_every, validation_size=settings.validation_size,
    ).check()  # fmt: skip


def run_cell(settings: Settings, out: Path, task: str, arm: str, seed: int, device: str = "auto") -> None:
    """Train one cell, going on where it stopped, and write its JSON."""
    from neuromas.checkpoint import RunDirectory
    from neuromas.tasks import from_config
    from neuromas.train import train
    from neuromas.types import Example

    started = time.time()
    config = cell_config(settings, task, arm, seed, out / "runs" / f"{task}-{arm}-seed{seed}", device)
    scores = train(config, resume=True)
    run = RunDirectory.open(config.run_path)
    judge, output = from_config(config.task), str(config.topology.build().output_node)
    outcomes = {}
    with (run.path / "rollouts.jsonl").open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            if record["split"] == "test" and record["step"] == config.num_steps:
                example = Example(record["example"], record["question"], record["gold"], "")
                outcomes[example.id] = int(judge.reward(example, record["texts"][output]))
    score = scores["after"]["test"]
    assert sum(outcomes.values()) == round(score.accuracy * score.n), "the rollouts are not those of the score"
    folder = run.checkpoints()[-1]
    keys = ("reward/mean", "validation/accuracy/mean", "questions/sum", "open_probability/value")
    cell = {
        "task": task, "arm": arm, "seed": seed, "settings": dataclasses.asdict(settings), "evaluation": score.to_json(),
        "before": scores["before"]["test"].to_json(), "outcomes": outcomes,
        "ledger": json.loads((folder / "ledger.json").read_text()), "growth": run.read_json("growth.json"),
        "curve": [{"step": m["step"] + 1, **{k: m[k] for k in keys if k in m}} for m in run.metrics()],
        "backbone_checksum": run.backbone_checksum, "seconds": time.time() - started,
    }  # fmt: skip
    path = cell_path(out, task, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(cell))
    fresh.replace(path)
    (run.path / "rollouts.jsonl").unlink()  # the largest file by far, and what is needed of it is in the cell


def cell_path(out: Path, task: str, arm: str, seed: int) -> Path:
    return out / "cells" / f"{task}-{arm}-seed{seed}.json"


def load_cells(out: Path, settings: Settings) -> list[dict[str, Any]]:
    """Read the finished cells; ValueError if one was made with other settings or on another backbone than the rest."""
    cells = [json.loads(path.read_text()) for path in sorted((out / "cells").glob("*.json"))]
    for cell in cells:
        name = cell_path(out, cell["task"], cell["arm"], cell["seed"])
        if cell["settings"] != dataclasses.asdict(settings):
            raise ValueError(f"{name} was made with other settings; name another --out or delete it")
        if cell["backbone_checksum"] != cells[0]["backbone_checksum"]:
            raise ValueError(
                f"{name} was made on another backbone than {cells[0]['arm']} of seed {cells[0]['seed']}; delete one"
            )
    return cells


def paired_interval(differences_SE: np.ndarray, *, over_seeds: bool, seed: int = 0) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean of paired differences, (seeds, examples).

    Examples are resampled, the same for all seeds; with `over_seeds` the seeds are as well, so that the interval speaks of
    other seeds too. With few seeds that one is itself rough.
    """
    rng = np.random.default_rng(seed)
    seeds, examples = differences_SE.shape
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        which = rng.integers(seeds, size=seeds) if over_seeds else slice(None)
        weights = np.bincount(rng.integers(examples, size=examples), minlength=examples)
        means[i] = (differences_SE[which] @ weights).mean() / examples
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_differences(cells: Sequence[dict[str, Any]], task: str, one: str, other: str) -> tuple[list[int], np.ndarray]:
    """Return the seeds that both arms have, and right minus right by (seed, example): 1, 0 or -1."""
    found = {(c["arm"], c["seed"]): c["outcomes"] for c in cells if c["task"] == task}
    seeds = sorted({s for arm, s in found if arm == one} & {s for arm, s in found if arm == other})
    examples = sorted(set.intersection(*(set(found[arm, s]) for s in seeds for arm in (one, other)))) if seeds else []
    rows = [[found[one, s][e] - found[other, s][e] for e in examples] for s in seeds]
    return seeds, np.array(rows, dtype=float)


def report(cells: Sequence[dict[str, Any]], settings: Settings) -> tuple[str, bool]:
    """Return the report as Markdown, and whether all budgets are equal."""
    command = " ".join(["python -m benchmarks.path_dependence", *sys.argv[1:]])
    lines = [
        "# Path dependence: grown against from scratch",
        "",
        f"Command: `{command}`",
        "",
        f"Settings: {dataclasses.asdict(settings)}; backbone {cells[0]['backbone_checksum']}.",
        "Greedy accuracy in percent on held-out generated problems, the same for all cells of a task.",
        "Evaluation is not in the ledger.",
        "",
    ]
    matched = True
    for task in dict.fromkeys(cell["task"] for cell in cells):
        of_task = [cell for cell in cells if cell["task"] == task]
        equal, line = _budgets(of_task)
        matched &= equal
        lines += [f"## {task}", "", line, "", *_table(of_task), "", *_differences(cells, task), ""]
    return "\n".join(lines), matched


def _budgets(cells: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    tokens = [cell["ledger"]["sampled_tokens"] for cell in cells]
    updates = {cell["ledger"]["optimizer_steps"] for cell in cells}
    apart = max(tokens) / min(tokens) - 1
    # A run ends within one step's tokens of its budget; more than that is a mistake somewhere.
    step_tokens = cells[0]["settings"]["step_tokens"]
    budget = cells[0]["settings"]["updates"] * step_tokens
    equal = len(updates) == 1 and all(abs(spent - budget) <= step_tokens for spent in tokens)
    what = "Budgets are equal to within one step's tokens" if equal else "**BUDGETS DIFFER, this is no comparison**"
    return equal, (
        f"{what}, by the ledgers: {', '.join(map(str, sorted(updates)))} updates, {min(tokens):,} to {max(tokens):,} sampled "
        f"tokens ({apart:.1%} apart)."
    )


def _table(cells: Sequence[dict[str, Any]]) -> list[str]:
    head = "arm | accuracy (each seed) | n | floor | updates | sampled tokens | rollouts | trainable parameters"
    lines = [f"| {head} | calls, tokens an answer | |", "| --- " * 10 + "|"]
    for arm in ARMS:
        group = [cell for cell in cells if cell["arm"] == arm]
        if not group:
            continue
        scores = [cell["evaluation"] for cell in group]
        mean, floor = statistics.mean(s["accuracy"] for s in scores), scores[0]["floor"]

        def average(key: str, group: Sequence[dict[str, Any]] = group) -> float:
            return statistics.mean(cell["ledger"][key] for cell in group)

        low = sum(s["low"] <= s["floor"] for s in scores)
        flag = "AT OR BELOW FLOOR" if mean <= floor else f"{low} of {len(group)} reach the floor" if low else ""
        each = ", ".join(f"{100 * s['accuracy']:.1f}" for s in scores)
        cost = f"{statistics.mean(s['calls_per_answer'] for s in scores):.3g}, " + (
            f"{statistics.mean(s['tokens_per_answer'] for s in scores):.0f}"
        )
        lines.append(
            f"| {arm} | {100 * mean:.1f} ({each}) | {scores[0]['n']} | {100 * floor:.1f} | {average('optimizer_steps'):.0f} | "
            f"{average('sampled_tokens'):,.0f} | {average('rollouts'):,.0f} | {average('trainable_parameters'):,.0f} | "
            f"{cost} | {flag} |"
        )
    changes = [
        f"{cell['arm']} seed {cell['seed']}: " + ", ".join(
            f"{g['from']} to {g['to']} {g['changed_answers']['share']:.0%}" for g in cell["growth"] if "changed_answers" in g
        )
        for cell in cells
        if any("changed_answers" in g for g in cell["growth"] or [])
    ]  # fmt: skip
    return (
        [*lines, "", f"Answers changed by an immediate opening, before any update: {'; '.join(changes)}."] if changes else lines
    )


def _differences(cells: Sequence[dict[str, Any]], task: str) -> list[str]:
    lines = ["Paired differences, same seed and same problems, in points:", "",
             "| difference | mean | 95% interval, these seeds | 95% interval, over seeds too | each seed |",
             "| --- " * 5 + "|"]  # fmt: skip
    for one, other in PAIRS:
        seeds, differences = paired_differences(cells, task, one, other)
        if not seeds:
            continue
        fixed, free = (paired_interval(differences, over_seeds=flag) for flag in (False, True))
        each = ", ".join(f"{seed}: {100 * row.mean():+.1f}" for seed, row in zip(seeds, differences, strict=True))
        lines.append(
            f"| {one} - {other} | {100 * differences.mean():+.1f} | {100 * fixed[0]:+.1f} to {100 * fixed[1]:+.1f} | "
            f"{100 * free[0]:+.1f} to {100 * free[1]:+.1f} | {each} |"
        )
    return lines


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the validation accuracy of each arm over the updates, mean over seeds, one panel a task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    figure, panels = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), layout="constrained", squeeze=False, sharey=True)
    for axes, task in zip(panels[0], tasks, strict=True):
        for arm, color in zip(ARMS, ("0.6", "tab:cyan", "tab:blue", "tab:pink", "tab:red", "tab:orange"), strict=True):
            group = [cell for cell in cells if (cell["task"], cell["arm"]) == (task, arm)]
            looks: dict[int, list[float]] = {}
            for cell in group:
                for point in cell["curve"]:
                    if "validation/accuracy/mean" in point:
                        looks.setdefault(point["step"], []).append(point["validation/accuracy/mean"])
            if looks:
                steps = sorted(looks)
                means = [statistics.mean(looks[step]) for step in steps]
                axes.plot(steps, means, color=color, marker=".", label=f"{arm} ({len(group)} seeds)")
                axes.fill_between(steps, [min(looks[s]) for s in steps], [max(looks[s]) for s in steps], color=color, alpha=0.1)
        axes.axhline(next(c for c in cells if c["task"] == task)["evaluation"]["floor"], color="k", linestyle="--", linewidth=1)
        axes.set(title=task, xlabel="update (equal sampled tokens each)", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation accuracy, greedy; mean, lowest to highest seed")
    panels[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny settings, one task, two seeds")
    parser.add_argument("--out", type=Path, help="folder of cells and report")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--report-only", action="store_true", help="write the report from the cells that are done")
    parser.add_argument("--cell", nargs=3, metavar=("TASK", "ARM", "SEED"), help="run this cell here and now")
    for field in dataclasses.fields(Settings):
        assert isinstance(field.type, type)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, help=f"default {field.default}")
    return parser.parse_args(args)


def main() -> None:
    options = parse()
    given = {f.name: v for f in dataclasses.fields(Settings) if (v := getattr(options, f.name)) is not None}
    settings = dataclasses.replace(QUICK if options.quick else Settings(), **given)
    out = options.out or Path("runs") / ("path_dependence_quick" if options.quick else "path_dependence")
    if options.cell:
        task, arm, seed = options.cell
        run_cell(settings, out, task, arm, int(seed), options.device)
        return
    tasks = options.tasks or (TASKS[:1] if options.quick else TASKS)
    seeds = options.seeds or (range(2) if options.quick else range(5))
    # Seed by seed: whatever is done when it is stopped is a comparison of all arms.
    wanted = [(task, arm, seed) for seed in seeds for task in tasks for arm in options.arms]
    for task, arm, seed in wanted:
        cell_config(settings, task, arm, seed, out / "runs")
    load_cells(out, settings)
    missing = [] if options.report_only else [cell for cell in wanted if not cell_path(out, *cell).exists()]
    (out / "logs").mkdir(parents=True, exist_ok=True)
    common = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(settings).items()]

    def work(cell: tuple[str, str, int]) -> bool:
        command = [sys.executable, "-m", "benchmarks.path_dependence", f"--out={out}", f"--device={options.device}", *common]
        with (out / "logs" / f"{'-'.join(map(str, cell))}.log").open("a") as log:
            done = subprocess.run([*command, "--cell", *map(str, cell)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                                  stdout=log, stderr=log, check=False)  # fmt: skip
        print(f"{' '.join(map(str, cell))}: {'done' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)
        return done.returncode == 0

    with ThreadPoolExecutor(options.jobs) as pool:
        succeeded = list(pool.map(work, missing))
    cells = load_cells(out, settings)
    if not cells:
        sys.exit("no cell is done yet")
    text, matched = report(cells, settings)
    (out / "report.md").write_text(text)
    draw(cells, out / "curves.png")
    print(text)
    sys.exit(0 if all(succeeded) and matched else 1)


if __name__ == "__main__":
    main()

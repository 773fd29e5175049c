"""What societies become over the iterations of finetuning: accuracy and diversity on the same validation questions."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuromas.compare import figures, statistics
from neuromas.system.files import replace_file
from neuromas.training.finetune import read_iterations
from neuromas.training.run_directory import RunDirectory

MEASURES = {
    "first_accuracy": "first answers right",
    "consensus": "consensus",
    "different_texts": "different texts",
    "distinct_bigrams": "distinct bigrams",
    "nll_own": "-log p, own",
    "nll_other": "-log p, other agents",
}
"""Measures of `neuromas.training.diversity` with their names in tables."""
BASES = (0, 1)
"""Iterations since which changes are shown: whether finetuning helps at all, and whether a method goes on improving."""
SHARES = ("first_accuracy", "consensus", "different_texts", "distinct_bigrams")


@dataclass(frozen=True, slots=True)
class Iteration:
    """One method after some iterations, over its seeds."""

    iteration: int
    accuracy: float
    low: float
    """Lower end of the 95% interval over questions and runs; over questions alone where there is one run."""
    high: float
    by_seed: dict[int, float]
    since: dict[int, statistics.Estimate]
    """Change of the accuracy on the same questions since each earlier iteration of BASES."""
    measures: dict[str, list[float]]
    """Each of MEASURES by seed; empty where no seed has it."""


def iterations_of(measured: Sequence[dict[str, Any]]) -> list[Iteration]:
    """Return the iterations of a method from what its runs have measured: those that all its seeds have."""
    by_seed: dict[int, dict[int, dict[str, Any]]] = {}
    for each in measured:
        by_seed.setdefault(each["seed"], {})[each["iteration"]] = each
    if not by_seed:
        return []
    done = sorted(set.intersection(*(set(of_seed) for of_seed in by_seed.values())))
    tables = {number: _table([of_seed[number] for of_seed in by_seed.values()]) for number in done}
    found = []
    for number in done:
        table = tables[number]
        low, high = statistics.share_interval(table)
        runs = [of_seed[number] for of_seed in by_seed.values()]
        accuracies = {seed: of_seed[number]["accuracy"] for seed, of_seed in by_seed.items()}
        found.append(
            Iteration(
                number, float(table.mean()), low, high, accuracies,
                {base: statistics.crossed_estimate(table - tables[base]) for base in BASES if base in tables and base < number},
                {name: [run[name] for run in runs if run[name] is not None] for name in MEASURES},
            )
        )  # fmt: skip
    return found


def _table(runs: Sequence[dict[str, Any]]) -> statistics.Table:
    """Return the rewards of runs on the questions, which are the same and in the same order in all of them."""
    return np.array([list(run["right"].values()) for run in runs], dtype=float)


def rows_of(title: str, iterations: Sequence[Iteration]) -> list[list[str]]:
    """Return the rows of a table: one for each iteration."""
    return [
        [
            title, str(each.iteration), f"{100 * each.accuracy:.1f} ({100 * each.low:.1f} to {100 * each.high:.1f})",
            ", ".join(f"{seed}: {100 * accuracy:.1f}" for seed, accuracy in each.by_seed.items()),
            *(_change(each.since.get(base)) for base in BASES),
            *(_mean(name, each.measures[name]) for name in MEASURES),
        ]
        for each in iterations
    ]  # fmt: skip


CHANGES = tuple(f"since iteration {base} (95%)" for base in BASES)
COLUMNS = ("method", "iteration", "accuracy (95%)", "by seed", *CHANGES, *MEASURES.values())


def _change(estimate: statistics.Estimate | None) -> str:
    if estimate is None:
        return "-"
    low, high = (min(1.0, max(-1.0, end)) for end in estimate.interval())
    interval = f"{100 * low:+.1f} to {100 * high:+.1f}" if statistics.varies(low, high) else statistics.NO_INTERVAL
    return f"{100 * estimate.mean:+.1f} ({interval})"


def _mean(name: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    scale, digits = (100, 1) if name in SHARES else (1, 3)
    text = f"{scale * float(np.mean(values)):.{digits}f}"
    spread = f" ({scale * min(values):.{digits}f} to {scale * max(values):.{digits}f})" if len(values) > 1 else ""
    return text + spread


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


NOTE = (
    "Shares in percent, -log p in nats a token. Measured on the same validation questions, before the first iteration (0) and "
    "after each; intervals of accuracies are over questions and runs, ranges of measures over seeds."
)


def write_run_report(run: RunDirectory) -> Path:
    """Write what a run has measured as iterations.md and iterations.svg into its folder; return the path of the page."""
    seed, page = run.config.seed, run.path / "iterations.md"
    measured = [{"seed": seed, **each} for each in read_iterations(run)]
    title = f"{run.config.task.name}, widths {'-'.join(map(str, run.config.topology.widths))}"
    if not measured:
        nothing = "Nothing was validated (--eval-every 0, or no validation questions), or what was is deleted."
        replace_file(page, f"# {title}\n\n{nothing}\n".encode())
        return page
    floor = measured[0]["floor"]
    rows = rows_of("society", iterations_of(measured))
    text = f"# {title}\n\nFloor {100 * floor:.1f}, n {len(measured[0]['right'])}. {NOTE}\n\n{markdown(rows)}\n"
    replace_file(page, text.encode())
    problem = {
        "name": title, "backbone": run.config.backbone, "task": run.config.task.name,
        "scores": {"society": {"iterations": measured}},
    }  # fmt: skip
    data = {"methods": ["society"], "titles": {"society": {"title": "society", "trained": True}}, "problems": [problem]}
    picture = iterations_picture(data)
    assert picture is not None
    replace_file(run.path / "iterations.svg", base64.b64decode(picture.partition(",")[2]))
    return page


def iterations_picture(data: figures.Data) -> str | None:
    """Draw accuracy and diversity against the iteration, a row of panels for each problem; None if nothing was finetuned."""
    problems = [p for p in figures.one_a_task(data) if any(score["iterations"] for score in p["scores"].values())]
    if not problems:
        return None
    shown = {"accuracy": "accuracy", "consensus": "consensus", "distinct_bigrams": "distinct bigrams",
             "nll_other": "-log p, other agents"}  # fmt: skip
    figure, axes = figures.make_panels(len(problems) * len(shown), len(shown), (figures.WIDTH, 0.8 + 2.4 * len(problems)))
    lines: dict[str, Any] = {}
    for row, problem in enumerate(problems):
        for column, (name, label) in enumerate(shown.items()):
            panel = axes[row * len(shown) + column]
            for method, score in problem["scores"].items():
                iterations = iterations_of(score["iterations"])
                points = [(each.iteration, *_point(name, each)) for each in iterations if _point(name, each)]
                if not points:
                    continue
                x, middle, low, high = zip(*points, strict=True)
                style = figures.style_of(data, method)
                (lines[figures.title_of(data, method)],) = panel.plot(x, middle, linewidth=1.3, markersize=4, **style)
                panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            if name == "accuracy":
                # Of the validation questions, not of those that are scored.
                floors = [each["floor"] for score in problem["scores"].values() for each in score["iterations"]]
                panel.axhline(floors[0], **figures.FLOOR_STYLE)
                panel.set_ylabel(problem["name"], fontsize=8)
            panel.set_title(label, fontsize=8.5)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.25)
    figure.supxlabel("iterations of finetuning", fontsize=9)
    figure.legend(list(lines.values()), list(lines), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figures.to_svg(figure)


def _point(name: str, each: Iteration) -> tuple[float, float, float] | tuple[()]:
    """Return middle and ends of what is drawn: the interval of the accuracy, the range over seeds of a measure."""
    if name == "accuracy":
        return each.accuracy, each.low, each.high
    values = each.measures[name]
    return (float(np.mean(values)), min(values), max(values)) if values else ()

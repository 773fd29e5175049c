"""Draws the pictures of a comparison as SVG inside the page, from the data of `findings.to_json`."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from neuromas.compare.budget_match import QUANTITIES

Data = dict[str, Any]
WIDTH = 11.0
THUMBNAIL = (1.4, 0.7)
FLOOR_STYLE = {"color": "0.45", "linestyle": "--", "linewidth": 1}
AXES = ("trainable_parameters", "calls_per_answer", "tokens_per_answer")
"""Costs that accuracy is drawn against."""


def scores_picture(data: Data) -> str:
    """Draw every score with its interval, its runs and the floor: one panel for each problem."""
    problems, methods = data["problems"], data["methods"]
    columns = min(4, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure, axes = make_panels(len(problems), columns, (WIDTH, rows * (0.9 + 0.24 * len(methods))), sharex=True, sharey=True)
    for panel, problem in zip(axes, problems, strict=False):
        floors = [score["floor"] for score in problem["scores"].values() if score["floor"] is not None]
        if floors:
            panel.axvline(floors[0], **FLOOR_STYLE)
        for index, method in enumerate(methods):
            if (score := problem["scores"].get(method)) is None:
                panel.text(0.02, index, "no score", va="center", fontsize=7, color="tab:red")
                continue
            style = style_of(data, method)
            panel.scatter([run["accuracy"] for run in score["runs"]], [index + 0.22] * len(score["runs"]), s=7,
                          color=style["color"], alpha=0.5, linewidths=0)  # fmt: skip
            error = [[score["accuracy"] - score["low"]], [score["high"] - score["accuracy"]]]
            panel.errorbar([score["accuracy"]], [index], xerr=error, markersize=5, capsize=2, linewidth=1.2, **style)
        panel.set_title(problem["name"], fontsize=8.5)
        panel.set(xlim=(0, 1), yticks=range(len(methods)), ylim=(len(methods) - 0.4, -0.6))
        panel.set_yticklabels([title_of(data, method) for method in methods], fontsize=8)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.grid(axis="x", alpha=0.25)
    return to_svg(figure)


def pareto_picture(data: Data, problems: Sequence[Data]) -> str:
    """Draw mean accuracy against cost, with the Pareto frontier."""
    methods = [method for method in data["methods"] if all(method in problem["scores"] for problem in problems)]
    figure, axes = make_panels(3, 3, (WIDTH, 4.1), sharey=True)
    for panel, key in zip(axes, AXES, strict=True):
        points = {method: _mean_point(problems, method, key) for method in methods}
        frontier = _frontier(list(points.values()))
        panel.step(*zip(*frontier, strict=True), where="post", color="0.75", linewidth=1.5, zorder=0)
        for method, (x, y) in points.items():
            panel.plot([x], [y], linestyle="none", markersize=7, label=title_of(data, method), **style_of(data, method))
        number_costs(panel.xaxis, [x for x, _ in points.values()])
        panel.set_xlabel(QUANTITIES[key])
        panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy" if len(problems) == 1 else f"accuracy, mean of {len(problems)} tasks")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return to_svg(figure)


def number_costs(axis: Any, amounts: Sequence[float]) -> None:
    """Number an axis of costs by whole numbers, each once and with room beside it; it is logarithmic over a wide range."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    if min(amounts) > 0 and max(amounts) / min(amounts) > 12:
        axis.axes.set_xscale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(amounts) / min(amounts) < 1000 else (1,)))
        axis.set_minor_formatter(NullFormatter())
    else:
        # Of equal costs only one is numbered.
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.set_major_formatter(lambda value, _: f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value:,.0f}")


def one_a_task(data: Data) -> list[Data]:
    """Return the problems without further sets of a task: what is measured in training is the same in them."""
    return list({(p["backbone"], p["task"]): p for p in reversed(data["problems"])}.values())[::-1]


def curves_picture(data: Data, key: str, label: str) -> str | None:
    """Draw validation accuracy in training, mean and range of the runs, against `key`; None if no method validates.

    A triangle on a line marks a growth of the network.
    """
    from matplotlib.ticker import MaxNLocator

    problems = [p for p in one_a_task(data) if any(score["curve"] for score in p["scores"].values())]
    if not problems:
        return None
    columns = min(4, len(problems))
    rows = math.ceil(len(problems) / columns)
    figure, axes = make_panels(len(problems), columns, (WIDTH, 0.7 + 2.4 * rows), sharey=True)
    shown: dict[str, Any] = {}
    for panel, problem in zip(axes, problems, strict=False):
        for method, score in problem["scores"].items():
            if not score["curve"]:
                continue
            steps = sorted({point["step"] for point in score["curve"]})
            at = [[point for point in score["curve"] if point["step"] == step] for step in steps]
            x = [float(np.mean([point[key] for point in points])) for points in at]
            values = [[point["accuracy"] for point in points] for points in at]
            color = style_of(data, method)["color"]
            means = [float(np.mean(v)) for v in values]
            (shown[title_of(data, method)],) = panel.plot(x, means, color=color, marker=".", linewidth=1.3)
            marks = growth_marks(score["growths"], steps, x, means)
            panel.scatter([x for x, _ in marks], [y for _, y in marks], s=45, marker="^", color=color, zorder=3)
            panel.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, linewidth=0)
        floors = [score["floor"] for score in problem["scores"].values() if score["floor"] is not None]
        if floors:
            panel.axhline(floors[0], **FLOOR_STYLE)
        panel.set_title(problem["name"], fontsize=8.5)
        panel.set(ylim=(0, 1), xlim=(0, None))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.3g}M" if value >= 1e5 else f"{value:,.0f}")
        panel.grid(alpha=0.25)
    figure.supxlabel(label, fontsize=9)
    figure.legend(list(shown.values()), list(shown), loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return to_svg(figure)


def thumbnail(data: Data, problem: Data, method: str) -> str | None:
    """Draw the validation accuracy of one method on one problem, a line for each run; None where it does not validate.

    All thumbnails of a problem have the same axes, so that they can be compared: steps up to the longest run's, 0 to 100%.
    """
    score = problem["scores"][method]
    if not score["curve"]:
        return None
    longest = max(point["step"] for each in problem["scores"].values() for point in each["curve"])
    figure, (panel, *_) = make_panels(1, 1, THUMBNAIL)
    panel.set(xlim=(0, longest), ylim=(0, 1.05), xticks=[], yticks=[])
    if score["floor"] is not None:
        panel.axhline(score["floor"], **FLOOR_STYLE)
    for seed in dict.fromkeys(point["seed"] for point in score["curve"]):
        points = [point for point in score["curve"] if point["seed"] == seed]
        panel.plot([point["step"] for point in points], [point["accuracy"] for point in points], linewidth=0.8,
                   color=style_of(data, method)["color"], marker="." if len(points) == 1 else None)  # fmt: skip
    return to_svg(figure)


def growth_marks(
    growths: Sequence[int], steps: Sequence[int], x: Sequence[float], y: Sequence[float]
) -> list[tuple[float, float]]:
    """Return the points on the line through (x, y), given at `steps`, at which a network grows; none before or after the line.

    >>> growth_marks([3, 9], [2, 4], [100.0, 300.0], [0.5, 0.6])
    [(200.0, 0.55)]
    """
    inside = [step for step in growths if steps[0] <= step <= steps[-1]]
    return [(float(np.interp(step, steps, x)), float(np.interp(step, steps, y))) for step in inside]


def _mean_point(problems: Sequence[Data], method: str, key: str) -> tuple[float, float]:
    scores = [problem["scores"][method] for problem in problems]
    return float(np.mean([s["amounts"][key] for s in scores])), float(np.mean([s["accuracy"] for s in scores]))


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no point of equal or lower cost surpasses, and the end of the line."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return [*best, (max(x for x, _ in points), best[-1][1])]


def style_of(data: Data, method: str) -> dict[str, Any]:
    """Return the colour and marker of a method, the same in all pictures."""
    from matplotlib import colormaps

    index = data["methods"].index(method)
    color = colormaps["tab10"](index % 10)
    trained = data["titles"][method]["trained"]
    return {"color": color, "marker": "osD^v"[index // 10 % 5], "markerfacecolor": color if trained else "white"}


def title_of(data: Data, method: str) -> str:
    """Return the title of a method."""
    return data["titles"][method]["title"]


def make_panels(panels: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Any, list[Any]]:
    """Return a figure with so many panels in rows of `columns`, and the panels."""
    import matplotlib  # slow to import, and only a report needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = math.ceil(panels / columns)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kwargs)
    for index, panel in enumerate(axes.flat):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.set_visible(index < panels)
    return figure, list(axes.flat)


def to_svg(figure: Any) -> str:
    """Return a figure as a data URL, so that the page holds the image."""
    import matplotlib
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    # A fixed salt makes the file the same for the same data.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "neuromas", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()

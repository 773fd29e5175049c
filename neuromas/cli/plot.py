"""Draws the curve of a run."""

import io
from pathlib import Path

from neuromas.graph.growth import widths_of
from neuromas.system.files import replace_file
from neuromas.training.run_directory import RunDirectory

SMOOTHING_STEPS = 10
VALIDATED = {"validation/accuracy/mean", "validation/low/value", "validation/high/value"}
"""What a line of metrics has of a step that validated."""


def plot_run(run: RunDirectory) -> Path:
    """Draw reward and validation accuracy over the steps, with the floor and the final scores; return the PNG's path."""
    import matplotlib  # slow to import, and only a finished run needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = run.metrics()
    # A line may lack what other code, or a hand, has not written.
    rewarded = [record for record in records if "reward/mean" in record]
    steps, rewards = [record["step"] + 1 for record in rewarded], [record["reward/mean"] for record in rewarded]
    smooth = [sum(part) / len(part) for i in range(len(rewards)) if (part := rewards[max(0, i + 1 - SMOOTHING_STEPS) : i + 1])]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, rewards, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(steps, smooth, color="tab:blue", label=f"training reward, mean of {SMOOTHING_STEPS} steps")
    validations = [record for record in records if record.keys() >= VALIDATED]
    if validations:
        how = "by debate and vote" if run.config.society.rounds else "greedy"
        accuracy = [record["validation/accuracy/mean"] for record in validations]
        below = [a - record["validation/low/value"] for a, record in zip(accuracy, validations, strict=True)]
        above = [record["validation/high/value"] - a for a, record in zip(accuracy, validations, strict=True)]
        axes.errorbar(
            [record["step"] + 1 for record in validations], accuracy, yerr=[below, above], color="tab:orange", marker="o",
            capsize=3, label=f"validation accuracy, {how}, 95% interval",
        )  # fmt: skip
    scores = {when: run.scores(when) for when in ("before", "after")}
    for growth in run.config.growth:
        axes.axvline(growth.at_step, color="tab:gray", linestyle=":", linewidth=1)
    first = records[0]["step"] if records else 0
    for when, at in (("before", first), ("after", run.step)):
        for name, color in zip(scores.get(when, {}), ("tab:green", "tab:red"), strict=False):
            score = scores[when][name]
            axes.errorbar(
                [at], [score["accuracy"]], color=color,
                yerr=[[score["accuracy"] - score["low"]], [score["high"] - score["accuracy"]]],
                marker="s", capsize=3, linestyle="none", label=f"{name} (n {score['n']})" if when == "after" else None,
            )  # fmt: skip
            if when == "after":
                axes.axhline(score["floor"], color=color, linestyle="--", linewidth=1, label=f"floor of {name}")
    shapes = [run.topology, *(growth.grown for growth in run.config.growths())]
    widths = " to ".join("-".join(map(str, widths_of(shape))) for shape in shapes)
    axes.set(
        xlabel="step",
        ylabel="share right",
        ylim=(0, 1),
        title=f"{run.config.task.name}, widths {widths}, seed {run.config.seed}",
    )
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    path = run.path / "curve.png"
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    replace_file(path, picture.getvalue())
    return path

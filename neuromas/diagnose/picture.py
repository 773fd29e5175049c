"""Draws a diagnosis."""

from io import BytesIO
from typing import Any

from matplotlib.figure import Figure

MOST_EFFECTS = 60
"""Interventions that are drawn: those that change most."""
COLOURS = {"loss": "tab:red", "gain": "tab:green"}
CURVES = {
    "distinct_2": "distinct-2 within a question",
    "self_similarity": "self-similarity across questions",
    "entropy": "entropy of words, bits",
    "faults": "share of faults",
}


def draw(diagnosis: dict[str, Any]) -> bytes:
    """Return the picture as PNG: the change of accuracy under each intervention, and each node's texts over training."""
    effects = diagnosis["effects"]
    drawn = sorted(effects, key=lambda effect: -abs(effect["change"]))[:MOST_EFFECTS]
    drawn = [effect for effect in effects if effect in drawn]
    figure = Figure(figsize=(12, max(6.0, 1.5 + 0.28 * len(drawn))), layout="constrained")
    grid = figure.add_gridspec(len(CURVES), 2, width_ratios=(3, 2))
    axes = figure.add_subplot(grid[:, 0])
    for place, effect in enumerate(drawn):
        change = 100 * effect["change"]
        colour = COLOURS.get(effect["reading"], "tab:gray")
        axes.barh(place, change, color=colour, alpha=0.7)
        axes.plot([100 * effect["low"], 100 * effect["high"]], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(drawn)), [effect["name"].replace("─▶", " to ") for effect in drawn], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    left_out = f", the {len(drawn)} largest of {len(effects)}" if len(drawn) < len(effects) else ""
    score = diagnosis["undisturbed"]
    axes.set_xlabel(f"change of accuracy in points, 95% interval{left_out}; red: loss, green: gain")
    asked = f"{diagnosis['split']}, step {diagnosis['step']}"
    score = f"{score['accuracy']:.1%} undisturbed (n {score['n']}, floor {score['floor']:.1%})"
    axes.set_title(f"{asked}: {score}", fontsize=10)
    history = diagnosis["training"]
    for row, (name, title) in enumerate(CURVES.items()):
        small = figure.add_subplot(grid[row, 1])
        for node, measured in history["nodes"].items():
            values = [float("nan") if value is None else value for value in measured[name]]
            small.plot(history["steps"], values, marker=".", markersize=3, linewidth=1.2, label=f"node {node}")
        small.set_title(title, fontsize=9)
        small.grid(alpha=0.3)
        if name != "entropy":
            small.set_ylim(-0.03, 1.03)
        small.tick_params(labelsize=8)
        if row == 0 and history["nodes"]:
            small.legend(fontsize=7, ncols=4)
        if row == len(CURVES) - 1:
            small.set_xlabel("training step", fontsize=9)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()

"""A diagnosis as text for the terminal."""

from collections.abc import Sequence
from typing import Any

from neuromas.diagnose.effects import READINGS
from neuromas.training.evaluate import Evaluation


def report(diagnosis: dict[str, Any]) -> str:
    """Return the diagnosis as tables, each with what its columns mean."""
    parts = [
        f"undisturbed, {diagnosis['split']}: {Evaluation(**diagnosis['undisturbed'])}",
        _effects(diagnosis["effects"]),
        _nodes(diagnosis),
        _adapters(diagnosis["adapters"]),
    ]
    return "\n\n".join(filter(None, parts))


def _effects(effects: Sequence[dict[str, Any]]) -> str:
    if not effects:
        return ""
    rows = [
        [
            effect["name"], f"{effect['accuracy']:.1%}", points(effect["change"]),
            f"{points(effect['low'])} to {points(effect['high'])}", f"{effect['disturbed']:.0%}",
            f"{effect['answers_changed']:.0%}", effect["reading"],
        ]
        for effect in effects
    ]  # fmt: skip
    heads = ["intervention", "accuracy", "change", "95% interval", "disturbed", "answers changed", "reading"]
    used = dict.fromkeys(effect["reading"] for effect in effects)
    meanings = "\n".join(f"{name}: {READINGS[name]}" for name in READINGS if name in used)
    return (
        f"{table(heads, rows)}\n\nchange: points of accuracy against the undisturbed network on the same questions, paired; "
        f"disturbed: questions in which another text arrived\n{meanings}"
    )


def _nodes(diagnosis: dict[str, Any]) -> str:
    told, norms = diagnosis["specialisation"], diagnosis["adapters"]["norms"]
    history = diagnosis["training"]
    names = {"distinct_2": "distinct-2", "self_similarity": "self-similarity", "entropy": "entropy (bits)"}
    rows = []
    for node, faults in diagnosis["faults"].items():
        shares = [f"{found['by_node'].get(node, 0.0):.0%}" if found else "-" for found in told.values()]
        variety = [_course(history["nodes"].get(node, {}).get(name, [])) for name in names]
        norm = f"{norms[node]:.3g}" if node in norms else "-"
        rows.append([node, f"{faults:.1%}", *shares, norm, *variety])
    heads = ["node", "faults", *(f"told ({name})" for name in told), "norm of update", *names.values()]
    lines = [
        table(heads, rows),
        "",
        "faults: messages that are missing, empty or unaddressed; of an answering node, texts without a readable answer",
    ]
    for name, found in told.items():
        if found:
            interval = f"95% interval {found['low']:.1%} to {found['high']:.1%}, chance {found['chance']:.1%}"
            lines.append(
                f"told ({name}): texts of the {name} nodes that a classifier of words gives to the right node: "
                f"{found['accuracy']:.1%} ({interval})"
            )
    lines.append("distinct-2, self-similarity, entropy: of the node's texts in training, first to last step")
    return "\n".join(lines)


def _course(values: Sequence[float | None]) -> str:
    """Return the first and the last value that are there."""
    there = [value for value in values if value is not None]
    return f"{there[0]:.2f} to {there[-1]:.2f}" if there else "-"


def _adapters(adapters: dict[str, Any]) -> str:
    if not adapters["pairs"]:
        return ""
    rows = [
        [f"{a} and {b}", "-" if pair["cosine"] is None else f"{pair['cosine']:.3f}", f"{pair['distance']:.3g}"]
        for pair in adapters["pairs"]
        for a, b in [pair["nodes"]]
    ]
    return f"{table(['adapters of', 'cosine', 'distance'], rows)}\n\nof the products B A over all modules"


def points(share: float) -> str:
    """Return a difference of shares in points, with its sign; 0 has none."""
    return f"{100 * share:+.1f}" if round(100 * share, 1) else "0.0"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)

"""Rounds to ratios: a table in Markdown of medians with their spread."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.environments import PEERS

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
"""How far losses and gradient norms of peers may be apart, relative, by the coarser number format of the two."""
WAYS = ("peft_loop", "peft_merged")
"""Ways of rollouts node by node, with the adapter beside the weights or in them."""


def spread(values: Sequence[float]) -> str:
    """Return the median with minimum, quartiles and maximum.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    '3.00 (1.00, 2.00 to 4.00, 5.00)'
    """
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return f"{middle:.2f} ({min(values):.2f}, {low:.2f} to {high:.2f}, {max(values):.2f})"


def rates(result: dict[str, Any]) -> list[float]:
    return [round_["tokens"] / round_["seconds"] for round_ in result["rounds"]]


def ratios(record: dict[str, Any], peer: str) -> list[float]:
    """Return our tokens per second over the peer's, round by round; rounds of both follow each other directly."""
    results = record["results"]
    return [a / b for a, b in zip(rates(results["ours"]), rates(results[peer]), strict=False)]


def agreement(record: dict[str, Any], peer: str) -> str:
    """Say whether a peer did the same work: equal loss and gradient norms, or equal greedy tokens, before any update."""
    ours, theirs = (record["results"][name].get("check", {}) for name in ("ours", peer))
    if "loss" in ours and "loss" in theirs:
        pairs = [(ours["loss"], theirs["loss"]), *zip(ours["grad_norms"], theirs["grad_norms"], strict=True)]
        apart = max(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs)
        formats = {record["results"][name].get("dtype") for name in ("ours", peer)}
        bound = TOLERANCE["bfloat16" if "bfloat16" in formats else "float32"]
        return f"loss and gradients {apart:.0e} apart" if apart <= bound else f"**DIFFERS: {apart:.0e} apart**"
    if "greedy" in ours and "greedy" in theirs:
        tokens = [a == b for x, y in zip(ours["greedy"], theirs["greedy"], strict=True) for a, b in zip(x, y, strict=True)]
        return f"{sum(tokens)} of {len(tokens)} greedy tokens equal"
    return "not comparable" if theirs or ours else ""


def shown(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results without the slower of two ways of one peer: it is given its faster one."""
    ways = [peer for peer in WAYS if results.get(peer, {}).get("rounds")]
    slower = sorted(ways, key=lambda peer: statistics.median(rates(results[peer])))[:-1]
    return {peer: result for peer, result in results.items() if peer not in slower}


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return one row per case and peer; a peer that failed has its row as well."""
    lines = [
        "| case | who | tokens/s, median | ours / theirs: median (min, quartiles, max) | same work | peak MiB |",
        "| --- | --- | ---: | --- | --- | ---: |",
    ]
    for record in records:
        for peer, result in shown(record["results"]).items():
            title = (PEERS[peer].title if peer in PEERS else peer) + (", bfloat16" if result.get("dtype") == "bfloat16" else "")
            if result.get("error") or not result["rounds"]:
                lines.append(f"| {record['name']} | {title} | | **did not run**: {result.get('error') or 'no round'} | | |")
                continue
            compared = peer != "ours" and bool(record["results"]["ours"]["rounds"])
            ratio = spread(ratios(record, peer)) if compared else ""
            same = agreement(record, peer) if compared else ""
            if peer == "limit" and compared:
                ratio = f"fraction reached {ratio}"
                same = ""
            peak = max(round_["peak_mib"] for round_ in result["rounds"])
            rate = f"{statistics.median(rates(result)):,.0f}"
            lines.append(f"| {record['name']} | {title} | {rate} | {ratio} | {same} | {peak:,.0f} |")
    return lines


def scaling(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return how our time per token grows with nodes, group and prompt: each round against the first case of its kind."""
    lines = [
        "| W4: kind, model | what grows | time per token against the first: median (min, quartiles, max) |",
        "| --- | --- | --- |",
    ]
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        case = record["case"]
        if case["workload"] != "W4" or not record["results"]["ours"]["rounds"]:
            continue
        families.setdefault((*_family(case), case["kind"], case["model"], case["barrier_free"]), []).append(record)
    for (what, kind, model, free), members in families.items():
        first = rates(members[0]["results"]["ours"])
        for record in members:
            values = [a / b for a, b in zip(first, rates(record["results"]["ours"]), strict=False)]
            grown = {
                "nodes": sum(record["case"]["widths"]),
                "group": record["case"]["group"],
                "prompt": record["case"]["prefix"],
            }
            lines.append(f"| {kind}{', no edges' if free else ''}, {model} | {what} {grown[what]} | {spread(values)} |")
    return lines if len(lines) > 2 else []


def _family(case: dict[str, Any]) -> tuple[str]:
    if case["prefix"] != 128:
        return ("prompt",)
    rollouts = case["questions"] * case["group"]
    return ("group",) if rollouts in (32, 64) else ("nodes",)


def memory(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return peak memory against nodes, for each peer, with what was resident before any work."""
    lines = [
        "| W5: kind, model | who | nodes | loaded MiB | peak MiB | peak against 1 node |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    first: dict[tuple[str, str, str], float] = {}
    for record in records:
        case = record["case"]
        if case["workload"] != "W5":
            continue
        for peer, result in record["results"].items():
            if result.get("error") or not result["rounds"]:
                continue
            peak = max(round_["peak_mib"] for round_ in result["rounds"])
            base = first.setdefault((peer, case["kind"], case["model"]), peak)
            who = f"{case['kind']}, {case['model']} | {PEERS[peer].title}"
            loaded = result["loaded_mib"]
            lines.append(f"| {who} | {sum(case['widths'])} | {loaded:,.0f} | {peak:,.0f} | {peak / base:.2f} |")
    return lines if len(lines) > 2 else []


def report(records: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    parts = [
        "# Speed beside peers",
        "",
        f"Command: `{about['command']}`",
        "",
        f"{about['machine']}; {about['threads']} threads; {about['rounds']} rounds in turn; load when it began "
        f"{about['load']:.1f}, when it ended {about['load_after']:.1f}; commit {about['commit']}. "
        f"{about['minutes']:.1f} minutes, environments and models aside.",
        "",
        "A ratio is of the tokens per second of rounds that followed each other; above 1 we are faster. What each line "
        "measures: `docs/benchmarks.md`.",
        "",
        *table(records),
    ]
    for extra in (scaling(records), memory(records)):
        parts += ["", *extra] if extra else []
    return "\n".join([*parts, ""])

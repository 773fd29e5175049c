"""Writes the report of a comparison: one self-contained HTML page and one Markdown page, from the same data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from neuromas.compare import figures, iterations
from neuromas.compare.budget_match import QUANTITIES, format_amount, shorten
from neuromas.compare.statistics import NO_INTERVAL, SIGNIFICANT, varies
from neuromas.system.files import replace_file

Data = dict[str, Any]
TEMPLATES = Path(__file__).parent
ANSWERS_SHOWN = 4
MINUS = "\N{MINUS SIGN}"


def write_report(data: Data, out: Path) -> tuple[Path, Path]:
    """Write report.html, report.md and report.json from the data of `findings.to_json`; return the paths of the two pages.

    Raises ValueError if the disk refuses; what an earlier report says stays.
    """
    view = _view(data)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        autoescape=lambda name: bool(name) and ".html" in str(name),
    )  # fmt: skip
    environment.filters["cell"] = _cell
    page, text = out / "report.html", out / "report.md"
    written = {
        out / "report.json": json.dumps(data, indent=1),
        text: environment.get_template("report.md.jinja").render(view),
        page: environment.get_template("report.html.jinja").render(view | _pictures(data)),
    }
    try:
        for path, content in written.items():
            replace_file(path, content.encode())
    except OSError as error:
        raise ValueError(
            f"--out {out}: the report cannot be written ({error.strerror}); all cells are kept. "
            "Make room and run the same command with --report-only"
        ) from error
    return page, text


def _view(data: Data) -> Data:
    """Return the data of both pages, with numbers as text."""
    title = {name: entry["title"] for name, entry in data["titles"].items()}
    methods = [
        {"index": index, "name": name, "title": title[name], "source": data["titles"][name]["source"]}
        for index, name in enumerate(data["methods"])
    ]
    pairs = [_pair(pair, index, data, title) for index, pair in enumerate(data["pairs"])]
    return {
        "name": data["name"], "notes": data["notes"], "methods": methods, "pairs": pairs,
        "summary": _summary(data),
        "problems": [{"index": index} | _problem(problem, data, title) for index, problem in enumerate(data["problems"])],
        "spent": [_spent(name, data, title) for name in data["methods"]],
        "quantities": list(QUANTITIES.values()),
        "code": ", ".join(data["code"]),
        "backbones": [f"{name} ({checksum})" for name, checksum in data["backbone_checksums"].items()],
        "single_run": len(data["seeds"]) == 1,
        "trials": [_tried(entry, title) for entry in data["trials"]],
        "iterations": [found for problem in figures.one_a_task(data) if (found := _iterated(problem, title))["rows"]],
        "iteration_columns": iterations.COLUMNS, "iteration_note": iterations.NOTE,
    }  # fmt: skip


def _iterated(problem: Data, title: dict[str, str]) -> Data:
    """Return the iterations of all methods that finetune a society, as text."""
    scores = problem["scores"]
    floors = {measured["floor"] for score in scores.values() for measured in score["iterations"]}
    return {
        "name": problem["name"],
        "floor": ", ".join(f"{100 * floor:.1f}" for floor in floors),
        "rows": [
            row
            for name, score in scores.items()
            for row in iterations.rows_of(title[name], iterations.iterations_of(score["iterations"]))
        ],
    }


def _tried(entry: Data, title: dict[str, str]) -> Data:
    """Return the trials of a method on a task as text; the chosen one is marked."""
    tried = [trial["lr"] for trial in entry["trials"]]

    def format_trial(trial: Data) -> str:
        rank = f", rank {trial['rank']}" if trial["rank"] else ""
        seen = "not run yet" if trial["accuracy"] is None else f"{100 * trial['accuracy']:.1f}"
        seen = f"died: {trial['died']}" if trial["died"] else seen
        at_end = trial["lr"] in (min(tried), max(tried))
        chosen = " (chosen, at the end of what was tried)" if at_end else " (chosen)"
        return f"lr {trial['lr']:g}{rank}: {seen}{chosen if trial['chosen'] else ''}"

    return {
        "method": title[entry["method"]],
        "task": entry["task"] + (f", {entry['backbone']}" if entry["backbone"] != "bundled" else ""),
        "trials": [format_trial(trial) for trial in entry["trials"]],
    }


def _summary(data: Data) -> str:
    def count(number: int, what: str) -> str:
        return f"{number} {what}{'' if number == 1 else 's'}"

    gaps = sum(len(problem["missing"]) for problem in data["problems"])
    parts = [count(len(data["methods"]), "method"), count(len(data["tasks"]), "task"), count(len(data["seeds"]), "seed")]
    if len(data["backbones"]) > 1:
        parts.append(count(len(data["backbones"]), "backbone"))
    return f"{' x '.join(parts)}." + (f" {count(gaps, 'score')} missing or incomplete, each named below." if gaps else "")


def _pair(pair: Data, index: int, data: Data, title: dict[str, str]) -> Data:
    return {
        "name": f"{title[pair['first']]} {MINUS} {title[pair['second']]}",
        "asks": pair["asks"],
        "matched": ", ".join(QUANTITIES[name] for name in pair["matched"]),
        "tolerance": f"{pair['tolerance']:.0%}",
        "overall": _difference(data["overall"][index]),
        "each": [_difference(problem["differences"][index]) for problem in data["problems"]],
        "last": _difference(data["last"]["overall"][index]),
        "each_last": [_difference(problem["differences"][index]) for problem in data["last"]["problems"]],
    }


def _difference(found: Data) -> Data:
    """Return a difference with numbers as text; one that is refused has no number."""
    if found["refused"]:
        return {"refused": found["refused"], "uninformative": None}
    p = found["p"] if found["p_holm"] is None else found["p_holm"]
    return {
        "refused": None,
        "mean": _points(found["mean"]),
        "interval": _interval(found["low"], found["high"]),
        "p": _p(found["p"]),
        "p_holm": None if found["p_holm"] is None else _p(found["p_holm"]),
        "significant": p < SIGNIFICANT,
        "sign": "up" if found["mean"] > 0 else "down" if found["mean"] < 0 else "even",
        "detectable": f"{100 * found['detectable']:.1f}" if varies(found["low"], found["high"]) else "-",
        "these_runs": None if found["p_these_runs"] is None else
        f"{_interval(found['low_these_runs'], found['high_these_runs'])}, p {_p(found['p_these_runs'])}",
        "runs": [
            f"{run['seed']}: {_points(run['mean'])} ({run['only_first']}:{run['only_second']}, p {_p(run['p_mcnemar'])})"
            for run in found["runs"]
        ],
        "unmatched": found["unmatched"],
        "uninformative": found["uninformative"],
    }  # fmt: skip


def _problem(problem: Data, data: Data, title: dict[str, str]) -> Data:
    scores = problem["scores"]
    last = next(each for each in data["last"]["problems"] if each["name"] == problem["name"])["scores"]
    first = next(iter(scores.values()), None)
    return {
        "name": problem["name"],
        "floor": "none" if first is None or first["floor"] is None else
        f"{100 * first['floor']:.1f} (always {shorten(first['floor_answer'])!r})",
        "n": first["n"] if first else 0,
        "distinct": first["distinct"] if first else 0,
        "rows": [_row(name, scores.get(name), last.get(name), problem["missing"].get(name), title) for name in data["methods"]],
    }  # fmt: skip


def _row(name: str, score: Data | None, last: Data | None, missing: str | None, title: dict[str, str]) -> Data:
    if score is None or last is None:
        return {"title": title[name], "missing": missing, "score": None}
    amounts = score["amounts"]
    return {
        "title": title[name],
        "missing": missing,
        "score": f"{100 * score['accuracy']:.1f}",
        "interval": f"{100 * score['low']:.1f} to {100 * score['high']:.1f}",
        "last": f"{100 * last['accuracy']:.1f}" if score["best_steps"] else "",
        "best_steps": ", ".join(map(str, score["best_steps"])),
        "seeds": [f"{run['seed']}: {100 * run['accuracy']:.1f} ({100 * run['low']:.0f} to {100 * run['high']:.0f})"
                  for run in score["runs"]],
        "floor": "none" if score["floor"] is None else f"{100 * score['floor']:.1f}",
        "parsed": f"{100 * score['parse_rate']:.0f}",
        "answers": _histogram(score["answers"]),
        "parameters": format_amount(amounts["trainable_parameters"]),
        "calls": format_amount(amounts["calls_per_answer"]),
        "tokens": format_amount(round(amounts["tokens_per_answer"], 1)),
        "most_tokens": format_amount(round(amounts["most_tokens_per_answer"], 1)),
        "flags": score["flags"],
        "warned": any(not flag.startswith("no floor") for flag in score["flags"]),
    }  # fmt: skip


def _histogram(answers: dict[str, int]) -> list[Data]:
    total, shown = sum(answers.values()), list(answers.items())[:ANSWERS_SHOWN]
    bars = [{"answer": shorten(answer), "share": f"{100 * count / total:.0f}"} for answer, count in shown]
    if rest := len(answers) - len(shown):
        share = 1 - sum(count for _, count in shown) / total
        bars.append({"answer": f"{rest} other{'s' if rest > 1 else ''}", "share": f"{100 * share:.0f}"})
    return bars


def _spent(name: str, data: Data, title: dict[str, str]) -> Data:
    """Return the mean amounts of a method over all problems that have a score of it."""
    scores = [problem["scores"][name] for problem in data["problems"] if name in problem["scores"]]
    if not scores:
        return {"title": title[name], "amounts": None}
    means = (sum(score["amounts"][key] for score in scores) / len(scores) for key in QUANTITIES)
    return {"title": title[name], "amounts": [format_amount(round(mean, 1)) for mean in means]}


def _pictures(data: Data) -> Data:
    problems: Sequence[Data] = [problem for problem in data["problems"] if problem["scores"]]
    scores = [score for problem in problems for score in problem["scores"].values()]
    together = any(all(method in problem["scores"] for problem in problems) for method in data["methods"])
    return {
        "scores_picture": figures.scores_picture(data) if problems else None,
        "pareto_picture": figures.pareto_picture(data, problems) if problems and together else None,
        "pareto_pictures": [{"name": problem["name"], "picture": figures.pareto_picture(data, [problem])}
                            for problem in problems] if len(problems) > 1 else [],
        "curves_pictures": [
            picture
            for key, label in (("step", "training steps"), ("sampled_tokens", "tokens sampled in training"))
            if (picture := figures.curves_picture(data, key, label))
        ],
        "thumbnails": [
            {method: drawn for method in problem["scores"] if (drawn := figures.thumbnail(data, problem, method))}
            for problem in data["problems"]
        ],
        "iterations_picture": iterations.iterations_picture(data),
        "grows": any(score["growths"] for score in scores),
    }  # fmt: skip


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _interval(low: float, high: float) -> str:
    return f"{_points(low)} to {_points(high)}" if varies(low, high) else NO_INTERVAL


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _cell(text: object) -> str:
    """Return text with the characters escaped that would end a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")

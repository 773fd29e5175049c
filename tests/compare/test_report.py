"""Comparisons: scores with all that belongs to them, differences of matched pairs only, and one line for each gap.

1. What is not matched as declared has no number in any form of the report.
2. A method that died, a cell that was not run, a task without a floor, a cell of other code: one line each.
3. Methods answer the same questions in the same order, or are not compared.
"""

import base64
import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rivals import Rival

from neuromas.compare import figures
from neuromas.compare.analysis import amounts_of, compare
from neuromas.compare.budget_match import QUANTITIES, mismatches
from neuromas.compare.cells import Stored
from neuromas.compare.figures import growth_marks
from neuromas.compare.findings import Comparison, Difference, format_difference, to_json
from neuromas.compare.grid import Grid, load_grid
from neuromas.compare.methods import METHODS, Answer, CellResult, CurvePoint
from neuromas.compare.report import write_report
from neuromas.compare.statistics import wilson
from neuromas.compare.tuning import Trial
from neuromas.system import files
from neuromas.system.files import write_file

GRID = """
methods = ["team", "single"]
tasks = ["navigate"]
seeds = [0, 1, 2]
[train]
eval_size = 40
[[pairs]]
compare = ["team", "single"]
matched = ["trainable_parameters", "training_rollouts"]
asks = "Does it help?"
"""


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> dict[str, Rival]:
    made = {"team": Rival("team", "The <b>team</b> | all", skill=0.95, calls=3), "single": Rival("single", "One", skill=0.6)}
    for name, rival in made.items():
        monkeypatch.setitem(METHODS, name, rival)
    return made


def grid_of(tmp_path: Path, text: str = GRID) -> Grid:
    path = tmp_path / "grid.toml"
    path.write_text(text)
    return load_grid(path)


def run_all(
    tmp_path: Path, change: Mapping[tuple[str, int], CellResult | str | None] | None = None, text: str = GRID
) -> Comparison:
    """Compare a grid's cells; `change` replaces the result of (method, seed) by another result, an error, or nothing."""
    grid, found = grid_of(tmp_path, text), []
    for spec in grid.cells:
        result = (change or {}).get((spec.method, spec.config.seed), METHODS[spec.method].run(spec, tmp_path))
        error = result if isinstance(result, str) else None
        found.append((spec, None if result is None else Stored("code", None if error else result, error, 1.0)))  # type: ignore[reportArgumentType]  # error is the text
    return compare(grid, found)


def result(tmp_path: Path, method: str, seed: int) -> CellResult:
    grid = grid_of(tmp_path)
    return METHODS[method].run(next(s for s in grid.cells if (s.method, s.config.seed) == (method, seed)), tmp_path)


def pages(comparison: Comparison, out: Path) -> tuple[str, str]:
    data = to_json(comparison) | {"code": ["c0de"], "backbone_checksums": {"bundled": "5um"}}
    page, text = write_report(json.loads(json.dumps(data)), out)
    return page.read_text(), text.read_text()


def answers(golds: str, given: str, **kwargs: int) -> tuple[Answer, ...]:
    """Return the answers Y or N, or - for none, to questions q0, q1, ..."""
    return tuple(
        Answer(f"q{i}", gold, None if said == "-" else said, float(gold == said), kwargs.get("calls", 1), 10, 5)
        for i, (gold, said) in enumerate(zip(golds, given, strict=True))
    )


def test_a_matched_pair_is_compared_and_its_other_differences_are_listed(rivals: dict[str, Rival], tmp_path: Path) -> None:
    comparison = run_all(tmp_path)
    (table,) = comparison.tables
    found, team, single = table.differences[0], table.scores["team"], table.scores["single"]
    assert found.mean is not None
    assert found.low is not None
    assert found.high is not None
    assert found.mean == pytest.approx(team.accuracy - single.accuracy)
    assert 0 < found.low < found.mean < found.high <= 1
    assert found.p == found.p_holm
    assert (team.n, team.floor, team.floor_answer, len(team.runs)) == (40, 0.5, "Yes", 3)
    assert sum(team.answers.values()) == 120
    assert "calls per answer 3 against 1" in found.unmatched
    assert not any(text.startswith("trainable parameters") for text in found.unmatched)
    assert format_difference(found).startswith(f"{100 * found.mean:+.1f} points (95% interval +")
    assert comparison.overall[0].mean == pytest.approx(found.mean)


def test_differences_by_hand(rivals: dict[str, Rival], tmp_path: Path) -> None:
    changed = {}
    for seed in (0, 1, 2):
        changed["team", seed] = replace(result(tmp_path, "team", seed), answers={"test": answers("YYYNNNNN", "YYYNNN-Y")})
        changed["single", seed] = replace(result(tmp_path, "single", seed), answers={"test": answers("YYYNNNNN", "YNNNYYN-")})
    (table,) = run_all(tmp_path, changed).tables
    # 6 of 8 against 3 of 8; only the team is right on 4 questions, only the single one on 1: p = 2 (1 + 5) / 32.
    assert (table.scores["team"].accuracy, table.scores["single"].accuracy) == (6 / 8, 3 / 8)
    assert table.scores["team"].parse_rate == pytest.approx(7 / 8)
    assert table.scores["team"].answers == {"Y": 12, "N": 9, "(none)": 3}
    assert (table.scores["team"].floor, table.scores["team"].floor_answer) == (5 / 8, "N")
    assert table.differences[0].runs[0] == {"seed": 0, "mean": 3 / 8, "only_first": 4, "only_second": 1, "p_mcnemar": 0.375}
    assert table.scores["single"].flags == ["at or below floor"]


@pytest.mark.parametrize(
    ("other", "matched", "line"),
    [
        ({"parameters": 1100}, "trainable_parameters", "trainable parameters 1,000 against 1,100 (9% apart)"),
        ({"calls": 1}, "calls_per_answer", "calls per answer 3 against 1 (67% apart)"),
        ({"tokens": 12}, "training_sampled_tokens", "sampled tokens in training 51,200 against 61,440 (17% apart)"),
        ({"trained": False}, "updates", "optimizer steps with a gradient 40 against 0 (100% apart)"),
    ],
)
def test_an_unmatched_pair_has_no_number(
    rivals: dict[str, Rival], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: dict[str, int], matched: str, line: str
) -> None:
    monkeypatch.setitem(METHODS, "single", replace(rivals["single"], **other))  # type: ignore[reportArgumentType]  # fields by name
    text = GRID.replace('"trainable_parameters", "training_rollouts"', f'"{matched}"')
    comparison = run_all(tmp_path, text=text)
    found = comparison.tables[0].differences[0]
    assert found == Difference(refused=f"seed 0: {line}; declared as matched to within 2%")
    assert comparison.overall[0] == Difference(refused=f"refused on 1 of 1 tasks: navigate: {found.refused}")
    assert format_difference(found) == f"not compared: {found.refused}"
    page, table = pages(comparison, tmp_path)
    assert f"NOT COMPARED: {found.refused}" in table
    assert f"not compared: {found.refused}" in page
    (row,) = [row for row in table.splitlines() if "NOT COMPARED: seed 0" in row]
    # Nothing but the refusal: no difference, no p.
    assert row.count("|  |") + row.count("| |") >= 2
    assert not re.search("[+\N{MINUS SIGN}][0-9]", row)
    # A wider tolerance accepts it, if it is declared.
    if "parameters" in other:
        wide = run_all(tmp_path, text=text + "tolerance = 0.1\n")
        assert wide.tables[0].differences[0].refused is None


def test_every_run_must_match_not_the_mean(rivals: dict[str, Rival], tmp_path: Path) -> None:
    more, less = (replace(result(tmp_path, "team", seed), trainable_parameters=count) for seed, count in ((0, 1100), (1, 900)))
    found = run_all(tmp_path, {("team", 0): more, ("team", 1): less}).tables[0].differences[0]
    assert found.refused is not None
    assert "seed 0: trainable parameters 1,100 against 1,000" in found.refused


def test_amounts_of_nothing_match(tmp_path: Path) -> None:
    zero = dict.fromkeys(QUANTITIES, 0.0)
    assert mismatches(zero, zero, tuple(QUANTITIES), 0.0) == []


def test_questions_are_those_that_training_asked(rivals: dict[str, Rival], tmp_path: Path) -> None:
    """With a budget of tokens the settings tell the questions of the first step, and not those of the others."""
    spec = grid_of(tmp_path, GRID.replace("[train]", "[train]\nstep_tokens = 1000")).cells[0]
    found = METHODS["team"].run(spec, tmp_path)
    assert found.training
    asked = replace(found, training={**found.training, "questions": 130})
    assert amounts_of(spec, asked, found.answers["test"])["training_questions"] == 130


def test_curves_show_where_a_network_grew(rivals: dict[str, Rival], tmp_path: Path) -> None:
    grown = {
        ("team", seed): replace(result(tmp_path, "team", seed), settings={"growth": [{"at_step": 25}]}) for seed in (0, 1, 2)
    }
    comparison = run_all(tmp_path, grown)
    assert {name: score.growths for name, score in comparison.tables[0].scores.items()} == {"team": [25], "single": []}
    line = "A triangle is where a network grows."
    assert line in pages(comparison, tmp_path)[0]
    assert line not in pages(run_all(tmp_path), tmp_path)[0]
    assert growth_marks([5, 25, 40], [10, 20, 30], [1e5, 2e5, 4e5], [0.5, 0.5, 0.7]) == [(3e5, pytest.approx(0.6))]


def test_a_row_of_a_trained_method_has_the_curves_of_its_runs(
    rivals: dict[str, Rival], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METHODS, "single", replace(rivals["single"], trained=False))
    page, _ = pages(run_all(tmp_path), tmp_path)
    (drawn,) = re.findall(r'<img class="curve" alt="[^"]*team[^"]*" src="data:image/svg\+xml;base64,([^"]+)"', page)
    # A line for each of three seeds, and the floor.
    assert len(re.findall(r"<path [^>]*stroke: #1f77b4", svg := base64.b64decode(drawn).decode())) == 3
    assert svg.count("stroke-dasharray") == 1
    monkeypatch.setitem(METHODS, "team", replace(rivals["team"], trained=False))
    assert "<th>curves</th>" not in pages(run_all(tmp_path), tmp_path)[0]


def test_a_method_that_died_is_a_line(rivals: dict[str, Rival], tmp_path: Path) -> None:
    comparison = run_all(tmp_path, {("team", 0): "RuntimeError: no memory", ("team", 2): "RuntimeError: no memory"})
    (table,) = comparison.tables
    assert table.missing == {"team": "seed 0, 2 died: RuntimeError: no memory"}
    assert [run.seed for run in table.scores["team"].runs] == [1]
    assert table.differences[0].refused == "team: seed 0, 2 died: RuntimeError: no memory"
    page, text = pages(comparison, tmp_path)
    assert "INCOMPLETE: seed 0, 2 died: RuntimeError: no memory" in text
    assert "incomplete: seed 0, 2 died: RuntimeError: no memory" in page
    assert "1 score missing or incomplete" in text


def test_a_task_without_answers_is_a_table_of_lines(rivals: dict[str, Rival], tmp_path: Path) -> None:
    change = {(m, s): None if s else "RuntimeError: gone" for m in ("team", "single") for s in (0, 1, 2)}
    comparison = run_all(tmp_path, change)
    assert comparison.tables[0].missing["single"] == "seed 0 died: RuntimeError: gone; seed 1, 2 not run yet"
    page, text = pages(comparison, tmp_path)
    assert text.count("NO SCORE: seed 0 died: RuntimeError: gone; seed 1, 2 not run yet") == 2
    assert page.count("no score: seed 0 died") == 2


def test_a_task_without_a_floor_is_a_line(rivals: dict[str, Rival], tmp_path: Path) -> None:
    open_ended = {
        (m, s): replace(result(tmp_path, m, s), answers={"test": answers("ABCD", "ABC-")}) for m in rivals for s in (0, 1, 2)
    }
    comparison = run_all(tmp_path, open_ended)
    assert comparison.notes == [
        "navigate: no floor, since no two questions have the same answer; scores stand against 0%"
    ]  # fmt: skip
    assert comparison.tables[0].scores["team"].floor is None
    assert comparison.tables[0].scores["team"].flags == ["no floor"]
    assert all(comparison.notes[0] in page for page in pages(comparison, tmp_path))


def test_other_questions_or_another_order_are_not_compared(rivals: dict[str, Rival], tmp_path: Path) -> None:
    own = result(tmp_path, "team", 1)
    turned = replace(own, answers={"test": own.answers["test"][::-1]})
    table = run_all(tmp_path, {("team", 1): turned}).tables[0]
    assert table.missing["team"] == "its seeds answered different questions, so they have no common score"
    all_turned = {
        ("team", s): replace(r := result(tmp_path, "team", s), answers={"test": r.answers["test"][::-1]}) for s in (0, 1, 2)
    }
    found = run_all(tmp_path, all_turned).tables[0].differences[0]
    assert found.refused == "seed 0: not the same questions (their order differs)"
    shorter = {
        ("team", s): replace(r := result(tmp_path, "team", s), answers={"test": r.answers["test"][1:]}) for s in (0, 1, 2)
    }
    found = run_all(tmp_path, shorter).tables[0].differences[0]
    assert found.refused == "seed 0: not the same questions (1 questions are in one only)"


def test_flags_say_what_is_wrong_with_a_score(
    rivals: dict[str, Rival], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METHODS, "single", replace(rivals["single"], always="Yes"))
    comparison = run_all(tmp_path)
    assert comparison.tables[0].scores["single"].flags == ["at or below floor", "answers collapsed to 'Yes'"]
    assert comparison.tables[0].scores["team"].flags == []
    one = {("team", 1): replace(result(tmp_path, "single", 1), method="team")}
    flags = run_all(tmp_path, one).tables[0].scores["team"].flags
    assert flags[-2:] == ["at or below floor with seed 1", "answers collapsed to 'Yes' with seed 1"]
    page, text = pages(comparison, tmp_path)
    assert "at or below floor; answers collapsed to 'Yes' |" in text
    assert '<span class="flag">at or below floor</span>' in page


def test_an_interval_that_reaches_the_floor_is_a_flag(rivals: dict[str, Rival], tmp_path: Path) -> None:
    weak = {
        ("single", s): replace(result(tmp_path, "single", s), answers={"test": answers("YN" * 10, "YN" * 6 + "NY" * 4)})
        for s in (0, 1, 2)
    }
    assert run_all(tmp_path, weak).tables[0].scores["single"].flags == ["interval reaches floor"]


def test_holm_runs_over_all_tasks(rivals: dict[str, Rival], tmp_path: Path) -> None:
    comparison = run_all(tmp_path, text=GRID.replace('["navigate"]', '["navigate", "web_of_lies"]'))
    first, second = (table.differences[0] for table in comparison.tables)
    assert first.p is not None
    assert second.p is not None
    assert first.p_holm is not None
    assert min(first.p_holm, second.p_holm or 1) == pytest.approx(2 * min(first.p, second.p))
    assert comparison.overall[0].p_holm == comparison.overall[0].p
    assert comparison.overall[0].mean == pytest.approx(((first.mean or 0) + (second.mean or 0)) / 2)


def test_one_seed_is_said_to_say_nothing_about_other_runs(rivals: dict[str, Rival], tmp_path: Path) -> None:
    comparison = run_all(tmp_path, text=GRID.replace("[0, 1, 2]", "[0]"))
    found = comparison.tables[0].differences[0]
    assert (found.p, found.low, found.high) == (found.p_these_runs, found.low_these_runs, found.high_these_runs)
    for page in pages(comparison, tmp_path):
        assert "one seed says nothing about other training runs" in page


def test_both_pages_show_the_same_and_need_no_network(rivals: dict[str, Rival], tmp_path: Path) -> None:
    comparison = run_all(tmp_path)
    page, text = pages(comparison, tmp_path)
    score = comparison.tables[0].scores["team"]
    for shown in (f"{100 * score.accuracy:.1f}", f"{100 * score.low:.1f} to {100 * score.high:.1f}", "Does it help?", "c0de"):
        assert shown in page
        assert shown in text
    addresses = re.findall(r"""(?:src|href)=["']?([^"'\s>]{0,30})""", page)
    assert len(addresses) >= 3
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not re.search(r"<script|@import|url\(", page)
    # A title is text, not markup, and does not end a cell.
    assert "The &lt;b&gt;team&lt;/b&gt; | all" in page
    assert "<b>team" not in page
    assert "The <b>team</b> \\| all" in text


def test_iterations_of_finetuning_are_a_table_and_a_picture(rivals: dict[str, Rival], tmp_path: Path) -> None:
    names = ("first_accuracy", "consensus", "different_texts", "distinct_bigrams", "nll_own")
    changed = {
        ("team", seed): replace(
            result(tmp_path, "team", seed),
            iterations=[
                {"iteration": number, "accuracy": right / 4, "floor": 0.5, **dict.fromkeys(names, 0.5), "nll_other": None,
                 "right": {f"q{i}": float(i < right) for i in range(4)}}
                for number, right in enumerate((1, 2, 3))
            ],
        )
        for seed in (0, 1, 2)
    }  # fmt: skip
    page, text = pages(run_all(tmp_path, changed), tmp_path)
    assert "Accuracy and diversity against iterations" in page
    rows = re.findall(
        r"^\| The <b>team</b> \\\| all \| (\d) \| (\S+) \(.*\| 0: \S+, 1: \S+, 2: \S+ \| (-|\S+ \(.*?\)) \| (\S+) ",
        text,
        re.MULTILINE,
    )
    assert [(number, share, start.split(" ")[0], first) for number, share, start, first in rows] == [
        ("0", "25.0", "-", "-"), ("1", "50.0", "+25.0", "-"), ("2", "75.0", "+50.0", "+25.0"),
    ]  # fmt: skip


def test_what_is_measured_in_training_is_shown_once_for_a_task_with_a_file(
    rivals: dict[str, Rival], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first_accuracy", "consensus", "different_texts", "distinct_bigrams", "nll_own", "nll_other")
    changed = {}
    for seed in (0, 1, 2):
        found = result(tmp_path, "team", seed)
        measured = {"iteration": 0, "accuracy": 0.25, "floor": 0.75, **dict.fromkeys(names, 0.5), "right": {"a": 0.0, "b": 0.5}}
        of_file = {"file items.json": found.answers["test"]}
        changed["team", seed] = replace(
            found, iterations=[measured], curve=(CurvePoint(1, 10, 0.25),), answers=found.answers | of_file
        )
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "to_svg", lambda figure: drawn.append(figure) or "data:,")
    page, text = pages(run_all(tmp_path, changed), tmp_path)
    assert "## navigate, file items.json" in text
    assert text.count("(validation, floor 75.0)") == page.count("(validation, floor 75.0)") == 1
    titles = [[panel.get_title() for panel in figure.axes if panel.get_visible()] for figure in drawn]
    assert titles.count(["navigate"]) >= 2, "a learning curve against steps, and against tokens"
    (measures,) = (figure for figure, shown in zip(drawn, titles, strict=True) if "consensus" in shown)
    assert len(measures.axes) == 4
    # The floor is that of the validation questions.
    assert 0.75 in [line.get_ydata()[0] for line in measures.axes[0].lines]


@pytest.mark.parametrize(
    ("amounts", "numbers"),
    [
        ([9, 9], ["9"]),
        ([1, 3], ["1", "2", "3"]),
        ([0, 2], ["0", "1", "2"]),
        ([2, 40], ["2", "5", "10", "20"]),
        ([4, 45_000], ["10", "100", "1,000", "10,000"]),
        ([1_000_000, 12_000_000], ["2.5M", "5M", "7.5M", "10M", "12.5M"]),
    ],
)
def test_costs_are_numbered_in_whole_numbers_each_once(amounts: list[float], numbers: list[str]) -> None:
    figure, (panel, *_) = figures.make_panels(1, 1, (3, 3))
    panel.plot(amounts, [0.5] * len(amounts), linestyle="none", marker="o")
    figures.number_costs(panel.xaxis, amounts)
    figure.canvas.draw()
    low, high = panel.get_xlim()
    labels = [text.get_text() for text in panel.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert labels == numbers


def test_equal_differences_have_no_interval(rivals: dict[str, Rival], tmp_path: Path) -> None:
    changed = {(name, seed): replace(result(tmp_path, name, seed), answers={"test": answers("YYNN", "YYYY")})
               for name in ("team", "single") for seed in (0, 1, 2)}  # fmt: skip
    comparison = run_all(tmp_path, changed)
    assert format_difference(comparison.overall[0]).startswith("+0.0 points (no interval: all differences are equal, p 1)")
    for written in pages(comparison, tmp_path):
        assert "no interval: all differences are equal" in written
        assert "+0.0 to +0.0" not in written
    (row,) = re.findall(
        r"^\| The.* One \| \+0.0 .*", (tmp_path / "report.md").read_text().partition("## navigate")[2], re.MULTILINE
    )
    # It says nothing about what it would have seen.
    assert row.split(" | ")[4] == "-"


def test_the_same_data_make_the_same_page(rivals: dict[str, Rival], tmp_path: Path) -> None:
    assert pages(run_all(tmp_path), tmp_path) == pages(run_all(tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["report.json", "report.md", "report.html"])
def test_a_full_disk_loses_no_report(
    rivals: dict[str, Rival], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    comparison = run_all(tmp_path)
    pages(comparison, tmp_path)
    before = (tmp_path / name).read_bytes()

    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data[:100])
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, data)

    monkeypatch.setattr(files, "write_file", write)
    said = f"--out {tmp_path}: the report cannot be written (No space left on device); all cells are kept. Make room and run "
    with pytest.raises(ValueError, match=f"^{re.escape(said)}the same command with --report-only$"):
        pages(comparison, tmp_path)
    assert (tmp_path / name).read_bytes() == before


def test_only_what_is_significant_is_bold(rivals: dict[str, Rival], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, _ = pages(run_all(tmp_path), tmp_path)
    assert 'class="number up clear"' in page
    monkeypatch.setitem(METHODS, "single", replace(rivals["single"], skill=0.95))
    comparison = run_all(tmp_path)
    assert (comparison.overall[0].p_holm or 0) > 0.05
    page, _ = pages(comparison, tmp_path)
    assert "clear" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)


# Readings: the best validation and the end; what a score can say


def test_both_readings_are_compared_each_with_its_own_answers(rivals: dict[str, Rival], tmp_path: Path) -> None:
    changed = {}
    for seed in (0, 1, 2):
        team = replace(result(tmp_path, "team", seed), answers={"test": answers("YYYNNNNN", "YYYYYYYY")}, best_step=4)
        changed["team", seed] = replace(team, best_answers={"test": answers("YYYNNNNN", "YYYNNN-Y")})
        # A method without validation has one answer, which is the best and the last.
        changed["single", seed] = replace(result(tmp_path, "single", seed), answers={"test": answers("YYYNNNNN", "YNNNYYN-")})
    comparison = run_all(tmp_path, changed)
    assert comparison.last is not None
    (best,), (last,) = comparison.tables, comparison.last.tables
    assert (best.scores["team"].accuracy, last.scores["team"].accuracy) == (6 / 8, 3 / 8)
    assert best.scores["single"].accuracy == last.scores["single"].accuracy == 3 / 8
    assert (best.scores["team"].best_steps, best.scores["single"].best_steps) == ([4, 4, 4], [])
    assert (best.differences[0].mean, last.differences[0].mean) == (3 / 8, 0)
    page, text = pages(comparison, tmp_path)
    assert "| 75.0 (" in text
    assert "| 37.5 | 4, 4, 4 | 62.5 |" in text
    assert '<td class="number">4, 4, 4</td>' in page


def test_runs_that_are_clear_of_the_floor_are_not_at_it_however_far_apart_they_are(
    rivals: dict[str, Rival], tmp_path: Path
) -> None:
    golds, shares = "YN" * 100, {("team", 0): 180, ("team", 1): 118, ("team", 2): 118, ("single", 0): 118, ("single", 1): 118}
    changed = {}
    for name in ("team", "single"):
        for seed in (0, 1, 2):
            right = shares.get((name, seed), 180)
            given = "".join(gold if i < right else "NY"["NY".index(gold) - 1] for i, gold in enumerate(golds))
            changed[name, seed] = replace(result(tmp_path, name, seed), answers={"test": answers(golds, given)})
    comparison = run_all(tmp_path, changed)
    (table,) = comparison.tables
    assert [score.low <= 0.5 <= score.high for score in table.scores.values()] == [True, True]
    assert table.differences[0].uninformative is None


@pytest.mark.parametrize(
    ("team", "single", "reason"),
    [
        ("YYYYNNNN", "YYYYNNNN", "both at the ceiling (95% or more)"),
        ("YYYYYNNN", "YYYYYYYN", "both at the floor (it lies in the intervals of these runs)"),
        ("YYYYNNNN", "YYYYYYYY", None),
        ("NNNNYYYY", "NNNNYYYN", "neither is clear of the floor"),
        ("NNNNYYYY", "YYYYYYYY", "neither is clear of the floor"),
    ],
)
def test_a_difference_at_the_floor_or_the_ceiling_is_uninformative(
    rivals: dict[str, Rival], tmp_path: Path, team: str, single: str, reason: str | None
) -> None:
    golds = "YYYYNNNN" * 25
    changed = {
        (name, seed): replace(result(tmp_path, name, seed), answers={"test": answers(golds, given * 25)})
        for name, given in (("team", team), ("single", single))
        for seed in (0, 1, 2)
    }
    # Three of eight apart from half is clear of the floor with 200 questions, so the floor here has other answers.
    if reason and "both at the floor" in reason:
        changed = {key: replace(each, answers={"test": answers(golds, "Y" * 200)}) for key, each in changed.items()}
    comparison = run_all(tmp_path, changed)
    assert comparison.tables[0].differences[0].uninformative == reason
    said = f"UNINFORMATIVE on 1 of 1 tasks: navigate ({reason})"
    assert (said in format_difference(comparison.overall[0])) == (reason is not None)
    assert ("○" in pages(comparison, tmp_path)[1].split("## Scores")[0].split("| --- |")[1]) == (reason is not None)


def test_an_item_that_is_published_twice_is_one_question(rivals: dict[str, Rival], tmp_path: Path) -> None:
    """Four distinct questions, the first three times: the mean counts all six, which are worth 6^2 / (9 + 3) = 3 questions."""
    ids = ("a", "a", "a", "b", "c", "d")
    made = {
        (name, seed): replace(
            result(tmp_path, name, seed),
            answers={"test": tuple(replace(a, example=i) for a, i in zip(answers("YYYNNN", given), ids, strict=True))},
        )
        for name, given in (("team", "YYYNNY"), ("single", "NNNNNN"))
        for seed in (0, 1, 2)
    }
    (table,) = run_all(tmp_path, made).tables
    team = table.scores["team"]
    assert (team.n, team.distinct) == (6, 4)
    assert team.accuracy == pytest.approx(5 / 6)
    assert (team.runs[0].low, team.runs[0].high) == pytest.approx(wilson(3 * 5 / 6, 3))
    assert table.differences[0].mean == pytest.approx(5 / 6 - 3 / 6)
    # One question that only the team has right, one that only the other has.
    assert table.differences[0].runs[0] == {
        "seed": 0,
        "mean": pytest.approx(2 / 6),
        "only_first": 1,
        "only_second": 1,
        "p_mcnemar": 1.0,
    }
    assert "6 questions, 4 of them different, floor" in pages(run_all(tmp_path, made), tmp_path)[1]


def test_most_tokens_an_answer_are_what_its_calls_may_write(rivals: dict[str, Rival], tmp_path: Path) -> None:
    spec = grid_of(tmp_path).cells[0]
    found = METHODS["team"].run(spec, tmp_path)
    longer = replace(found, settings={"max_new_tokens": 240})
    amounts = [amounts_of(spec, each, each.answers["test"])["most_tokens_per_answer"] for each in (found, longer)]
    assert amounts == [3 * 80, 3 * 240]


def test_the_report_lists_what_was_tried(rivals: dict[str, Rival], tmp_path: Path) -> None:
    grid, found = grid_of(tmp_path), []
    for spec in grid.cells:
        found.append((spec, Stored("code", METHODS[spec.method].run(spec, tmp_path), None, 1.0)))
    trials = {("team", "bundled", "navigate"): [Trial(1e-3, None, 0.5, 0.4), Trial(2e-3, None, 0.75, 0.5, chosen=True)]}
    page, text = pages(compare(grid, found, (), trials), tmp_path)
    assert "<b>team</b> \\| all | navigate | lr 0.001: 50.0; lr 0.002: 75.0 (chosen, at the end of what was tried)" in text
    assert "lr 0.001: 50.0; lr 0.002: 75.0 (chosen, at the end of what was tried)" in page

"""The experiment: arms that differ in the path alone, budgets that are equal or said to differ, intervals that cover."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from models import make_model, save_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "path_dependence.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("path_dependence", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_arms_of_equal_size_have_equal_parameters_and_updates(bench: ModuleType) -> None:
    for arm, (stages, _) in bench.ARMS.items():
        config = bench.cell_config(bench.Settings(), "navigate", arm, 3, Path("run"))
        assert (config.num_steps, config.adapter.rank, config.seed) == (90, 8, 3)
        growths = config.growths()
        assert [growth.at_step for growth in growths] == [90 // len(stages) * k for k in range(1, len(stages))]
        assert len((growths[-1].grown if growths else config.topology.build()).nodes) == int(re.findall(r"\d", arm)[0])
        assert all(source is None for growth in growths for _, source in growth.copies)
    with pytest.raises(ValueError, match=r"^--updates must be a multiple of 3 for grown-7, got 10$"):
        bench.cell_config(bench.Settings(updates=10), "navigate", "grown-7", 0, Path("run"))


def cell(bench: ModuleType, arm: str, seed: int, right: list[int], tokens: int = 1_170_000) -> dict[str, Any]:
    share = sum(right) / len(right)
    return {
        "task": "navigate", "arm": arm, "seed": seed, "settings": dataclasses.asdict(bench.Settings()), "growth": [],
        "backbone_checksum": "b", "outcomes": {str(i): value for i, value in enumerate(right)},
        "evaluation": {"accuracy": share, "n": len(right), "low": share - 0.1, "high": share + 0.1, "floor": 0.5,
                       "calls_per_answer": 7.0, "tokens_per_answer": 300.0},
        "ledger": {"optimizer_steps": 90, "sampled_tokens": tokens, "rollouts": 100, "trainable_parameters": 7},
        "curve": [{"step": 10, "validation/accuracy/mean": share}],
    }  # fmt: skip


def test_the_report_pairs_seeds_and_problems_and_names_what_is_at_the_floor(bench: ModuleType, tmp_path: Path) -> None:
    cells = [
        cell(bench, "scratch-7", 0, [1, 0, 0, 0, 1]), cell(bench, "scratch-7", 1, [1, 0, 0, 1, 0]),
        cell(bench, "grown-7", 0, [1, 1, 1, 0, 1]), cell(bench, "grown-7", 1, [1, 1, 0, 1, 0]),
        cell(bench, "grown-7", 2, [0] * 5),
    ]  # fmt: skip
    cells[2]["growth"] = [{"from": [1, 1, 1], "to": [2, 2, 1], "changed_answers": {"share": 0.25}}]
    text, matched = bench.report(cells, bench.Settings())
    assert matched
    assert "by the ledgers: 90 updates, 1,170,000 to 1,170,000 sampled tokens (0.0% apart)." in text
    assert "| scratch-7 | 40.0 (40.0, 40.0) | 5 | 50.0 | 90 | 1,170,000 | 100 | 7 | 7, 300 | AT OR BELOW FLOOR |" in text
    # Seed 0: two of five more; seed 1: one of five more; seed 2 has no partner.
    assert re.search(r"\| grown-7 - scratch-7 \| \+30\.0 \| .* \| 0: \+40\.0, 1: \+20\.0 \|", text)
    assert "grown-7 seed 0: [1, 1, 1] to [2, 2, 1] 25%" in text
    bench.draw(cells, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_budgets_that_differ_are_no_comparison(bench: ModuleType) -> None:
    cells = [cell(bench, "scratch-7", 0, [1, 0]), cell(bench, "grown-7", 0, [1, 0], tokens=1_190_000)]
    text, matched = bench.report(cells, bench.Settings())
    assert not matched
    assert "**BUDGETS DIFFER, this is no comparison**" in text


def test_the_bootstrap_interval_is_that_of_the_mean(bench: ModuleType) -> None:
    """Independent differences of variance v: the interval of the mean of S x E of them is about +-1.96 sqrt(v / (S E))."""
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[0.2, 0.5, 0.3], size=(1, 400))
    low, high = bench.paired_interval(differences, over_seeds=False)
    width = 1.96 * differences.std() / 20
    assert (low, high) == pytest.approx((differences.mean() - width, differences.mean() + width), abs=0.01)
    # Seeds that disagree widen the interval only where seeds are drawn too.
    seeds = np.stack([np.ones(400), -np.ones(400)])
    assert bench.paired_interval(seeds, over_seeds=False) == (0.0, 0.0)
    assert bench.paired_interval(seeds, over_seeds=True) == (-1.0, 1.0)


def test_a_cell_runs_once_and_its_outcomes_are_its_score(bench: ModuleType, tmp_path: Path) -> None:
    settings = bench.Settings(
        updates=3, step_tokens=150, examples_per_step=2, group_size=4, max_new_tokens=3, n=6, eval_every=2, validation_size=4,
        rank=1, backbone=str(save_model(make_model("qwen3", says=("Yes", "No")), tmp_path / "model")),
    )  # fmt: skip
    bench.run_cell(settings, tmp_path, "navigate", "grown-7", 0, "cpu")
    (found,) = bench.load_cells(tmp_path, settings)
    assert len(found["outcomes"]) == 6
    assert sum(found["outcomes"].values()) == round(6 * found["evaluation"]["accuracy"])
    assert [phase["optimizer_steps"] for phase in found["ledger"]["phases"]] == [1, 1, 1]
    assert [growth["to"] for growth in found["growth"]] == [[2, 2, 1], [2, 2, 2, 1]]
    assert all("changed_answers" in growth for growth in found["growth"])
    with pytest.raises(ValueError, match=r"navigate-grown-7-seed0\.json was made with other settings; name another --out"):
        bench.load_cells(tmp_path, bench.Settings())
    other = {**found, "seed": 1, "backbone_checksum": "other"}
    bench.cell_path(tmp_path, "navigate", "grown-7", 1).write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"seed1\.json was made on another backbone than grown-7 of seed 0; delete one$"):
        bench.load_cells(tmp_path, settings)

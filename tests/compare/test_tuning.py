"""Settings of cells: the same trials for every trained method, chosen by validation, and tokens that follow another method.

1. Every trained method has as many trials as every other, on every task, on seeds that are not scored.
2. The highest validation accuracy chooses; the sooner one of equals.
3. A method that trains on another's tokens waits for them, in its trials as in its cells.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from neuromas.compare.grid import load_grid
from neuromas.compare.methods import CellResult, CellSpec, CurvePoint
from neuromas.compare.tuning import Tuning

HEAD = """
methods = ["direct", "single_rl", "single_rl_vote_3", "single_rl_long_continued", "neuromas_3"]
tasks = ["navigate"]
seeds = [0, 1]
[tuning]
lr = [5e-4, 1e-3, 2e-3]
seeds = [11]
"""
FEW = "[train]\neval_size = 20\nvalidation_size = 20\n"

Curves = Callable[[CellSpec], list[float] | None]


def tuning_of(tmp_path: Path, curves: Curves, text: str = HEAD) -> Tuning:
    """Tune a grid whose cells have the given validation curves, and sample 1000 tokens a seed and learning rate."""
    path = tmp_path / "grid.toml"
    path.write_text(text)

    def result(spec: CellSpec) -> CellResult | None:
        if (curve := curves(spec)) is None:
            return None
        tokens = 1000 * (1 + spec.config.seed) + round(1e5 * spec.config.lr)
        points = tuple(CurvePoint(step, 0, accuracy) for step, accuracy in enumerate(curve, start=1))
        return CellResult(spec.method, spec.config.task.name, spec.config.seed, {}, 1, {"sampled_tokens": tokens}, points)

    return Tuning(load_grid(path), result)


def cell(tuning: Tuning, method: str, seed: int = 0) -> CellSpec:
    return next(spec for spec in tuning.grid.cells if (spec.method, spec.config.seed) == (method, seed))


def best_at(lr: float) -> Curves:
    return lambda spec: [0.4, 0.9 if spec.config.lr == lr else 0.5]


def test_every_trained_method_has_equally_many_trials_on_seeds_that_are_not_scored(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, lambda spec: None)
    trials = tuning.trials()
    assert {trial.config.seed for trial in trials} == {11}
    assert all(trial.trial for trial in trials)
    lrs = {method: [t.config.lr for t in trials if t.method == method] for method in {t.method for t in trials}}
    # A vote shares the trials of what it votes with; what is not trained has none.
    assert lrs == {name: [5e-4, 1e-3, 2e-3] for name in ("single_rl", "single_rl_long_continued", "neuromas_3")}


def test_validation_chooses_and_the_first_of_equals_wins_unless_it_learns_later(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, best_at(2e-3))
    for method in ("single_rl", "single_rl_vote_3", "neuromas_3"):
        resolved = tuning.resolve(cell(tuning, method, seed=1))
        assert resolved is not None
        assert (resolved.config.lr, resolved.config.seed, resolved.trial) == (2e-3, 1, False)
    assert tuning.resolve(cell(tuning, "direct")) == cell(tuning, "direct")
    assert [row.chosen for row in tuning.table(cell(tuning, "single_rl"))] == [False, False, True]
    curves = {5e-4: [0.2, 0.8], 1e-3: [0.8, 0.8], 2e-3: [0.8, 0.8]}
    tuning = tuning_of(tmp_path, lambda spec: curves[spec.config.lr])
    assert [(row.accuracy, row.chosen) for row in tuning.table(cell(tuning, "neuromas_3"))] == [
        (0.8, False), (0.8, True), (0.8, False),
    ]  # fmt: skip


def test_nothing_is_chosen_while_a_trial_is_missing(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, lambda spec: None if spec.config.lr == 1e-3 else [0.5])
    assert tuning.resolve(cell(tuning, "neuromas_3")) is None
    assert [row.accuracy for row in tuning.table(cell(tuning, "neuromas_3"))] == [0.5, None, 0.5]
    assert not any(row.chosen for row in tuning.table(cell(tuning, "neuromas_3")))


def test_a_candidate_whose_trial_died_is_not_chosen(tmp_path: Path) -> None:
    def curves(spec: CellSpec) -> list[float]:
        return [0.9 if spec.config.lr == 2e-3 else 0.4 + 100 * spec.config.lr]

    tuning = tuning_of(tmp_path, curves)
    lookup = tuning.results
    tuning.results = lambda spec: "ValueError: the loss is nan" if spec.trial and spec.config.lr == 2e-3 else lookup(spec)
    resolved = tuning.resolve(cell(tuning, "neuromas_3"))
    assert resolved is not None
    assert resolved.config.lr == 1e-3
    assert [row.died for row in tuning.table(cell(tuning, "neuromas_3"))] == [None, None, "ValueError: the loss is nan"]
    tuning.results = lambda spec: "ValueError: the loss is nan" if spec.trial else None
    assert tuning.resolve(cell(tuning, "neuromas_3")) is None
    assert tuning.why_not(cell(tuning, "neuromas_3")) == "all its trials died: ValueError: the loss is nan"


def test_a_network_that_grows_is_judged_as_what_it_has_grown_to(tmp_path: Path) -> None:
    text = HEAD.replace('"neuromas_3"]', '"neuromas_3", "neuromas_7_grown"]') + "[train]\nnum_steps = 6\n"
    # Points at steps 1 to 6; five nodes come at step 2, seven at step 4. With 5e-4 the three nodes alone are good.
    tuning = tuning_of(tmp_path, lambda spec: [0.9] * 4 + [0.5] * 2 if spec.config.lr == 5e-4 else [0.4] * 4 + [0.6] * 2, text)
    assert [row.accuracy for row in tuning.table(cell(tuning, "neuromas_7_grown"))] == [0.5, 0.6, 0.6]
    assert [row.accuracy for row in tuning.table(cell(tuning, "neuromas_3"))] == [0.9, 0.6, 0.6]


def test_settings_that_a_method_cannot_train_with_are_told_before_the_first_cell(tmp_path: Path) -> None:
    text = HEAD + "rank = [2]\n[train.adapter]\nbudget = 100000\n"
    with pytest.raises(ValueError, match=r"adapter.rank and --adapter.budget exclude each other"):
        tuning_of(tmp_path, lambda spec: None, text).check_settings()
    scaled = tuning_of(tmp_path, lambda spec: None, HEAD + "rank = [2, 8]\n[train.adapter]\nrank = 4\nalpha = 8.0\n")
    alphas = {(t.config.adapter.rank, t.config.adapter.alpha) for t in scaled.trials()}
    assert alphas == {(2, 4.0), (8, 16.0)}


def test_what_is_scored_chooses_nothing(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, lambda spec: None, HEAD + FEW + '[train.task]\nsplit = "validation"\n')
    with pytest.raises(ValueError, match=r"\[tuning\] would choose by questions that are scored; score another split or file"):
        tuning.check()


def test_a_method_trains_to_the_tokens_of_another_with_the_same_seed(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, best_at(2e-3))
    follower = next(t for t in tuning.trials() if t.method == "single_rl_long_continued" and t.config.lr == 5e-4)
    resolved = tuning.resolve(follower)
    assert resolved is not None
    # 1000 tokens for each seed up to 11, and 200 of the team's chosen learning rate, independent of its own.
    assert (resolved.config.train_tokens, resolved.config.lr) == (12_200, 5e-4)
    resolved = tuning.resolve(cell(tuning, "single_rl_long_continued", seed=1))
    assert resolved is not None
    assert resolved.config.train_tokens == 2_200
    assert replace(resolved.config, train_tokens=0) == replace(cell(tuning, "single_rl", seed=1).config, lr=2e-3)


def test_a_method_waits_for_the_tokens_that_it_trains_to(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, lambda spec: [0.5] if spec.trial else None)
    assert tuning.resolve(cell(tuning, "neuromas_3")) is not None
    assert tuning.resolve(cell(tuning, "single_rl_long_continued")) is None


def test_a_single_candidate_needs_no_trials_and_ranks_are_tried_too(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, best_at(1e-3), HEAD.replace("lr = [5e-4, 1e-3, 2e-3]\nseeds = [11]", "lr = [1e-3]"))
    assert tuning.trials() == []
    resolved = tuning.resolve(cell(tuning, "neuromas_3"))
    assert resolved is not None
    assert resolved.config.lr == 1e-3
    assert tuning.table(cell(tuning, "neuromas_3")) == []
    tuning = tuning_of(tmp_path, lambda spec: [0.1 * (spec.config.adapter.rank or 0)], HEAD + "rank = [2, 4]\n")
    resolved = tuning.resolve(cell(tuning, "single_rl"))
    assert resolved is not None
    assert (resolved.config.adapter.rank, resolved.config.lr) == (4, 5e-4)
    assert len(tuning.trials()) == 3 * 6


def test_trials_need_validation(tmp_path: Path) -> None:
    tuning = tuning_of(tmp_path, lambda spec: None, HEAD + FEW + "eval_every = 0\n")
    with pytest.raises(ValueError, match=r"trial of lr 0.002: \[tuning\] chooses by validation; give the task validation"):
        tuning.check()
    tuning_of(tmp_path, lambda spec: None, HEAD + FEW).check()

"""What each trained method of a comparison trains with: settings that trials choose, and tokens that follow another method.

Every trained method gets the same trials on every task: each candidate is trained on seeds that are not scored and judged by
the highest validation accuracy of its training. A method with `tokens_of` trains until it has sampled as many tokens as that
method has with the same seed; its trials go by that method's chosen trial.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from neuromas.baselines.base import CellResult, CellSpec
from neuromas.baselines.networks import Trained
from neuromas.config import TrainConfig
from neuromas.grid import Grid, describe_cell, find_method, problem_of
from neuromas.tasks import from_config

Results = Callable[[CellSpec], CellResult | None]
"""Returns what a cell has measured; None if it is not made yet or has died."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate of a method on a task, and what validation said of it; None while one of its seeds has no result."""

    lr: float
    rank: int | None
    accuracy: float | None
    """Highest validation accuracy in training, mean over the trials' seeds."""
    mean_accuracy: float | None
    """Mean over all validations, which is higher where the same is learned sooner: it decides between equals."""
    chosen: bool = False


class Tuning:
    """Settles the cells of a grid that wait for results of other cells."""

    def __init__(self, grid: Grid, results: Results) -> None:
        self.grid, self.results = grid, results
        self._base = {(spec.method, *problem_of(spec)): spec.config for spec in reversed(grid.cells)}

    def check(self) -> None:
        """Raise ValueError if there are trials on a task that has nothing to choose by."""
        for trial in self.trials():
            if not (trial.config.eval_every and from_config(trial.config.task).has("validation")):
                raise ValueError(
                    f"{describe_cell(trial)}: [tuning] chooses by validation; give the task validation problems and eval_every "
                    "above 0, or leave out [tuning]"
                )

    def trials(self) -> list[CellSpec]:
        """Return the trials of all methods and tasks, each once: methods that train alike share theirs."""
        specs = {repr(trial): trial for key, config in reversed(self._base.items()) for trial in self._trials(key[0], config)}
        return list(specs.values())

    def settle(self, spec: CellSpec) -> CellSpec | None:
        """Return a cell with all its settings; None while the results that decide them are missing."""
        method = find_method(spec.method)
        if not isinstance(method, Trained):
            return spec
        config = spec.config if spec.trial else self._tuned(spec.method, spec.config)
        if config is None or not method.tokens_of:
            return replace(spec, config=config) if config else None
        base = self._tuned(method.tokens_of, self._base[method.tokens_of, *problem_of(spec)])
        other = CellSpec(method.tokens_of, replace(base, seed=config.seed), spec.trial) if base else None
        result = self.results(other) if other else None
        if result is None or not result.training:
            return None
        return replace(spec, config=replace(config, train_tokens=result.training["sampled_tokens"]))

    def table(self, spec: CellSpec) -> list[Trial]:
        """Return what the trials of a cell's method on its task have given; empty where nothing is tried."""
        rows = [self._row(config, trials) for config, trials in self._candidates(spec.method, spec.config) if trials]
        if not rows or any(row.accuracy is None for row in rows):
            return rows
        # max returns the first of equals, and candidates come in the order of the file.
        best = max(rows, key=lambda row: (row.accuracy, row.mean_accuracy))
        return [replace(row, chosen=row is best) for row in rows]

    def _tuned(self, method: str, config: TrainConfig) -> TrainConfig | None:
        candidates = self._candidates(method, config)
        if len(candidates) <= 1:
            return candidates[0][0] if candidates else config
        rows = self.table(CellSpec(method, config))
        return next((own for (own, _), row in zip(candidates, rows, strict=True) if row.chosen), None)

    def _trials(self, method: str, config: TrainConfig) -> list[CellSpec]:
        return [trial for _, trials in self._candidates(method, config) for trial in trials]

    def _candidates(self, name: str, config: TrainConfig) -> list[tuple[TrainConfig, list[CellSpec]]]:
        """Return the settings that a method may train with, each with its trials; a single one needs none."""
        method, space = find_method(name), self.grid.tuning
        if space is None or not isinstance(method, Trained):
            return []
        configs = [
            replace(config, lr=lr, adapter=replace(config.adapter, rank=rank) if rank else config.adapter)
            for rank in space.ranks or (None,)
            for lr in space.lrs
        ]
        seeds = space.seeds if len(configs) > 1 else ()
        who = name if method.trains_as == method.name else method.trains_as
        return [(own, [CellSpec(who, replace(own, seed=seed), trial=True) for seed in seeds]) for own in configs]

    def _row(self, config: TrainConfig, trials: list[CellSpec]) -> Trial:
        settled = [self.settle(trial) for trial in trials]
        results = [self.results(trial) for trial in settled if trial]
        curves = [[point.accuracy for point in result.curve] for result in results if result]
        if len(curves) < len(trials):
            return Trial(config.lr, config.adapter.rank, None, None)
        best, mean = (sum(map(of, curves)) / len(curves) for of in (max, lambda curve: sum(curve) / len(curve)))
        return Trial(config.lr, config.adapter.rank, best, mean)

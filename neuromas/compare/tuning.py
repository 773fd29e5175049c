"""Resolves the settings of trained methods: those that trials choose, and tokens that follow another method.

Every trained method gets the same trials on every task: each candidate is trained on seeds that are not scored and judged by
the highest validation accuracy of its training. A method with `tokens_of` trains until it has sampled as many tokens as that
method with the same seed; its trials follow that method's chosen trial.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from neuromas.compare.grid import Grid, describe_cell, find_method, problem_of
from neuromas.compare.methods.method import CellResult, CellSpec
from neuromas.compare.methods.networks import Trained
from neuromas.config import AdapterConfig, TrainConfig
from neuromas.tasks import from_config
from neuromas.training.questions import evaluation_sets

Results = Callable[[CellSpec], CellResult | str | None]
"""Returns the result of a cell, or the error that it died of; None if it is not made yet."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate of a method on a task, with its validation accuracy; None while one of its seeds has no result."""

    lr: float
    rank: int | None
    accuracy: float | None
    """Highest validation accuracy in training, mean over the trials' seeds."""
    mean_accuracy: float | None
    """Mean over all validations, which is higher where a run learns sooner: it decides between equals."""
    chosen: bool = False
    died: str | None = None
    """The error that a trial died of, such as a loss that is not a number: this candidate is not chosen."""


class Tuning:
    """Resolves the settings of a grid's cells, some of which depend on results of other cells."""

    def __init__(self, grid: Grid, results: Results) -> None:
        self.grid, self.results = grid, results
        self._base = {(spec.method, *problem_of(spec)): spec.config for spec in reversed(grid.cells)}

    def check_settings(self) -> None:
        """Raise ValueError if a method cannot train with one of its candidates."""
        for (name, *_), config in self._base.items():
            method = find_method(name)
            if isinstance(method, Trained):
                for candidate, _ in self._candidates(name, config) or [(config, [])]:
                    method.change(candidate).check()
                    if method.tokens_of:
                        method.change(replace(candidate, train_tokens=1)).check()

    def check(self) -> None:
        """Raise ValueError if trials have no validation problems to choose by, or only scored ones."""
        for trial in {trial.config.task: trial for trial in self.trials()}.values():
            task, config = from_config(trial.config.task), trial.config
            if not (config.eval_every and task.has("validation")):
                raise ValueError(
                    f"{describe_cell(trial)}: [tuning] chooses by validation; give the task validation problems and eval_every "
                    "above 0, or leave out [tuning]"
                )
            scored = {example.id for examples in evaluation_sets(config, task).values() for example in examples}
            if any(example.id in scored for example in task.examples("validation", config.validation_size)):
                raise ValueError(
                    f"{describe_cell(trial)}: [tuning] would choose by questions that are scored; score another split or file"
                )

    def trials(self) -> list[CellSpec]:
        """Return the trials of all methods and tasks, each once: methods that train alike share theirs."""
        specs = {repr(trial): trial for key, config in reversed(self._base.items()) for trial in self._trials(key[0], config)}
        return list(specs.values())

    def resolve(self, spec: CellSpec) -> CellSpec | None:
        """Return a cell with all its settings; None while results that they depend on are missing."""
        method = find_method(spec.method)
        if not isinstance(method, Trained):
            return spec
        config = spec.config if spec.trial else self._tuned(spec.method, spec.config)
        if config is None or not method.tokens_of:
            return replace(spec, config=config) if config else None
        base = self._tuned(method.tokens_of, self._base[method.tokens_of, *problem_of(spec)])
        other = CellSpec(method.tokens_of, replace(base, seed=config.seed), spec.trial) if base else None
        result = self.results(other) if other else None
        if not isinstance(result, CellResult) or not result.training:
            return None
        return replace(spec, config=replace(config, train_tokens=result.training["sampled_tokens"]))

    def why_not(self, spec: CellSpec) -> str:
        """Return what an unresolved cell waits for."""
        rows = self.table(spec)
        if rows and all(row.died for row in rows):
            return f"all its trials died: {rows[0].died}"
        if rows and not any(row.chosen for row in rows):
            return "waits for its trials"
        method = find_method(spec.method)
        return f"waits for {method.tokens_of if isinstance(method, Trained) else ''}, or that died"

    def table(self, spec: CellSpec) -> list[Trial]:
        """Return the trials of a cell's method on its task with their results; empty where there are none."""
        rows = [self._row(config, trials) for config, trials in self._candidates(spec.method, spec.config) if trials]
        alive = [row for row in rows if not row.died]
        if not alive or any(row.accuracy is None for row in alive):
            return rows
        # max returns the first of equals, and candidates come in the order of the file.
        best = max(alive, key=lambda row: (row.accuracy, row.mean_accuracy))
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
            replace(config, lr=lr, adapter=_of_rank(config.adapter, rank) if rank else config.adapter)
            for rank in space.ranks or (None,)
            for lr in space.lrs
        ]
        seeds = space.seeds if len(configs) > 1 else ()
        trained_as = name if method.trains_as == method.name else method.trains_as
        return [(own, [CellSpec(trained_as, replace(own, seed=seed), trial=True) for seed in seeds]) for own in configs]

    def _row(self, config: TrainConfig, trials: list[CellSpec]) -> Trial:
        resolved = [self.resolve(trial) for trial in trials]
        results = [self.results(trial) for trial in resolved if trial]
        lr, rank = config.lr, config.adapter.rank
        if errors := [result for result in results if isinstance(result, str)]:
            return Trial(lr, rank, None, None, died=errors[0])
        found = zip(trials, results, strict=False)
        curves = [_final_validations(trial, result) for trial, result in found if isinstance(result, CellResult)]
        if len(curves) < len(trials):
            return Trial(lr, rank, None, None)
        best, mean = (sum(map(measure, curves)) / len(curves) for measure in (max, lambda curve: sum(curve) / len(curve)))
        return Trial(lr, rank, best, mean)


def _of_rank(adapter: AdapterConfig, rank: int) -> AdapterConfig:
    """Return an adapter's settings with another rank; alpha / rank stays, so that ranks differ in nothing else."""
    alpha = adapter.alpha * rank / adapter.rank if adapter.alpha and adapter.rank else adapter.alpha
    return replace(adapter, rank=rank, alpha=alpha)


def _final_validations(spec: CellSpec, result: CellResult) -> list[float]:
    """Return the validation accuracies of the network that is scored: of one that grows, those after its last growth."""
    method = find_method(spec.method)
    growths = method.change(spec.config).growths() if isinstance(method, Trained) else ()
    whole = [p.accuracy for p in result.curve if all(p.step > g.at_step and g.open_probability(p.step) == 1 for g in growths)]
    return whole or [0.0]

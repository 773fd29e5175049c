"""Single-LLM RL with a sweep of its own: several ranks and learning rates, the best on validation problems answers.

The strongest fair opponent: a learning rate that suits three small adapters need not suit a large one.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuromas.baselines.base import CellResult, CellSpec
from neuromas.baselines.networks import PAPER, Trained, single
from neuromas.config import TrainConfig


@dataclass(kw_only=True)
class Sweep(Trained):
    """One run for each pair of a share of the rank and a factor of the learning rate, in folders of their own.

    The cell's result, `training` included, is the chosen run's; `settings["sweep"]` lists every run with its validation
    accuracy and ledger, for what the search has spent.
    """

    rank_shares: tuple[float, ...] = (1.0,)
    """Of the rank with equally many parameters as NeuroMAS-3; below 1 the run has fewer."""
    lr_factors: tuple[float, ...] = (0.3, 1.0, 3.0)

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        from neuromas.baselines.training import answer_sets, result_of, train_run  # loads torch
        from neuromas.evaluate import evaluate
        from neuromas.train import Trainer

        runs: list[tuple[float, TrainConfig, dict[str, Any]]] = []
        for config in self.configs(spec.config, folder):

            def note(trainer: Trainer, _: object, config: TrainConfig = config) -> dict[str, Any]:
                if not trainer.task.has("validation"):
                    raise ValueError(f"{self.name}: task {trainer.task.name} has no validation split to choose a run by")
                problems = trainer.task.examples("validation", config.validation_size)
                seen, _groups = evaluate(trainer.network, trainer.task, problems)
                entry = {"lr": config.lr, "rank": trainer.bank.rank, "validation_accuracy": seen.accuracy}
                runs.append((seen.accuracy, config, {**entry, "training": trainer.ledger.to_json()}))
                return {}

            train_run(config, note)
        # max returns the first of equals, and shares and factors come in the order given.
        _, best, _ = max(runs, key=lambda run: run[0])
        done = train_run(
            best,
            lambda trainer, stop: answer_sets(
                trainer.network, trainer.task, trainer.sets, votes=self.votes, temperature=self.temperature, seed=best.seed,
                between=lambda: stop.leave_if_asked("while answering"),
            ),
        )  # fmt: skip
        return result_of(self, done, sweep=[entry for _, _, entry in runs])

    def configs(self, config: TrainConfig, folder: Path) -> list[TrainConfig]:
        """Return the settings of the sweep's runs."""
        from neuromas.sizes import sizes

        whole = self.change(config)
        rank = sizes(whole).rank
        return [
            replace(
                whole,
                adapter=replace(whole.adapter, rank=max(1, round(share * rank)), budget=None, alpha=self._alpha(whole, share)),
                lr=factor * config.lr,
                run_dir=folder / f"run-rank-{share:g}-lr-{factor:g}",
            )
            for share in self.rank_shares
            for factor in self.lr_factors
        ]

    def _alpha(self, config: TrainConfig, share: float) -> float | None:
        """Scale a given alpha with the rank, so that alpha / rank stays."""
        return None if config.adapter.alpha is None else share * config.adapter.alpha


METHODS = (
    Sweep(
        name="single_rl_sweep",
        title="Single-LLM RL, own learning rate",
        source=f"{PAPER}, the network of one node, tuned for itself",
        change=single,
    ),
)

"""Finetunes the societies of compared methods, and answers evaluation sets with them."""

from dataclasses import replace
from pathlib import Path

from neuromas.compare.methods.method import CellResult, CellSpec
from neuromas.compare.methods.train_cell import Answers, answer_sets, trained_cell
from neuromas.config import TrainConfig
from neuromas.training.finetune import finetuner_of, iterate_to_end
from neuromas.training.plan import resolve
from neuromas.training.run_directory import RunDirectory


def run_finetuned(name: str, config: TrainConfig, spec: CellSpec, folder: Path) -> CellResult:
    """Finetune a society, resuming its run, and answer the evaluation sets; a trial answers none.

    `config` is the cell's as the method changes it. It raises the errors of `finetune`.
    """
    config = replace(config, run_dir=folder / "run")
    with finetuner_of(resolve(config), RunDirectory.find(config, resume=True)) as (finetuner, progress):
        iterate_to_end(finetuner, progress)

        def answer() -> Answers:
            # One debate of each question, whose answer has been voted for.
            return answer_sets(
                finetuner.society, finetuner.task, {} if spec.trial else finetuner.sets, votes=1,
                temperature=config.temperature, seed=config.seed, between=finetuner.leave_if_asked,
            )  # fmt: skip

        cell = trained_cell(name, finetuner, answer, evaluation_temperature=config.temperature)
    return replace(cell, iterations=finetuner.measured)

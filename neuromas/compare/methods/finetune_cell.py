"""Finetunes the societies of compared methods, and answers evaluation sets with them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from neuromas.compare.methods.conversation import Answered
from neuromas.compare.methods.converse import answer_in_parts, answers_of, majority_answer
from neuromas.compare.methods.method import CellResult, CellSpec
from neuromas.compare.methods.train_cell import Answers, trained_cell
from neuromas.config import TrainConfig
from neuromas.training.finetune import Finetuner, finetuner_of, iterate_to_end
from neuromas.training.plan import resolve
from neuromas.training.run_directory import RunDirectory
from neuromas.types import Example


def run_finetuned(name: str, config: TrainConfig, spec: CellSpec, folder: Path) -> CellResult:
    """Finetune a society, resuming its run, and answer the evaluation sets; a trial answers none.

    `config` is the cell's as the method changes it. It raises the errors of `finetune`.
    """
    config = replace(config, run_dir=folder / "run")
    with finetuner_of(resolve(config), RunDirectory.find(config, resume=True)) as (finetuner, progress):
        iterate_to_end(finetuner, progress)
        cell = trained_cell(name, finetuner, lambda: answer(finetuner, spec), evaluation_temperature=config.temperature)
    return replace(cell, iterations=finetuner.measured)


def answer(finetuner: Finetuner, spec: CellSpec) -> Answers:
    """Answer every set by one debate of each question."""
    task, config = finetuner.task, finetuner.config

    def debate(examples: Sequence[Example]) -> list[Answered]:
        groups = finetuner.society.rollout(examples, 1, seed=("evaluate", config.seed), temperature=config.temperature)
        return [majority_answer(task, group) for group in groups]

    return {
        name: answers_of(task, answer_in_parts(examples, debate, finetuner.leave_if_asked))
        for name, examples in ({} if spec.trial else finetuner.sets).items()
    }

"""Trains the networks of compared methods by the common loop, and answers evaluation sets with them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from neuromas.compare.methods.conversation import Answered
from neuromas.compare.methods.converse import answer_in_parts, answers_of, majority_answer, settings_of
from neuromas.compare.methods.method import Answer, CellResult, CellSpec, CurvePoint
from neuromas.config import TrainConfig
from neuromas.model.adapters import AdapterBank
from neuromas.tasks import Task, from_config
from neuromas.training import checkpoint
from neuromas.training.evaluate import Answering
from neuromas.training.ledger import Ledger
from neuromas.training.loop import train_to_end, trainer_of
from neuromas.training.plan import resolve
from neuromas.training.questions import evaluation_sets
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import build_network
from neuromas.types import Example

Answers = dict[str, tuple[Answer, ...]]
"""What was answered, by set of examples."""


def answer_sets(
    network: Answering,
    task: Task,
    sets: dict[str, list[Example]],
    *,
    votes: int,
    temperature: float,
    seed: int,
    between: Callable[[], None] = lambda: None,
) -> Answers:
    """Answer every set by the majority vote of `votes` rollouts of a network, or debates of a society, for each example."""

    def answer(examples: Sequence[Example]) -> list[Answered]:
        groups = network.rollout(examples, votes, seed=("evaluate", seed), temperature=temperature)
        return [majority_answer(task, group) for group in groups]

    return {
        name: answers_of(task, answer_in_parts(network.policy, examples, answer, between)) for name, examples in sets.items()
    }


def curve_of(run: RunDirectory) -> tuple[CurvePoint, ...]:
    """Return the validations of a run, each with the tokens that were sampled before it."""
    points, tokens = [], 0.0
    for record in run.metrics():
        tokens += record["sampled_tokens/sum"]
        if "validation/accuracy/mean" in record:
            points.append(CurvePoint(int(record["step"]) + 1, round(tokens), record["validation/accuracy/mean"]))
    return tuple(points)


def run_trained(name: str, config: TrainConfig, spec: CellSpec, folder: Path, *, votes: int, temperature: float) -> CellResult:
    """Train a method's network, resuming its run, and answer the evaluation sets; a trial answers none.

    `config` is the cell's as the method changes it. Unlike `loop.train` this scores nothing before training. It raises the same
    errors.
    """
    config = replace(config, run_dir=folder / "run")
    plan = resolve(config)
    with trainer_of(plan, RunDirectory.find(config, resume=True)) as (trainer, progress, stop):
        train_to_end(trainer, progress, stop)

        def answer() -> Answers:
            return answer_sets(
                trainer.network, trainer.task, {} if spec.trial else trainer.sets, votes=votes,
                temperature=temperature, seed=config.seed, between=lambda: stop.leave_if_asked("while answering"),
            )  # fmt: skip

        return trained_cell(name, trainer, answer, evaluation_temperature=temperature, votes=votes)


class EndedRun(Protocol):
    """A run that has ended: of a network, or of a society."""

    config: TrainConfig
    task: Task
    run: RunDirectory
    bank: AdapterBank
    ledger: Ledger
    step: int


def trained_cell(
    name: str, trained: EndedRun, answer: Callable[[], Answers], *, evaluation_temperature: float, **settings: int
) -> CellResult:
    """Return the cell of a run: what the last adapters answer, and what the best on validation do, which are then loaded."""
    answers, best_answers, curve = answer(), {}, curve_of(trained.run)
    best_step = checkpoint.load_best(trained.run, trained.bank) if curve else None
    if best_step is not None:
        best_answers = answers if best_step == trained.step else answer()
    return CellResult(
        method=name,
        task=trained.task.name,
        seed=trained.config.seed,
        answers=answers,
        trainable_parameters=trained.bank.trainable_parameters,
        training=trained.ledger.to_json(),
        curve=curve,
        best_answers=best_answers,
        best_step=best_step,
        settings=settings_of(trained.config, evaluation_temperature=evaluation_temperature, rank=trained.bank.rank, **settings),
    )


def run_untrained_network(name: str, config: TrainConfig) -> CellResult:
    """Answer with the network as it is before training."""
    config = config.check()
    task = from_config(config.task)
    sets = evaluation_sets(config, task)
    return CellResult(
        method=name,
        task=task.name,
        seed=config.seed,
        answers=answer_sets(build_network(config), task, sets, votes=1, temperature=0.0, seed=config.seed),
        trainable_parameters=0,
        training=None,
        settings=settings_of(config, evaluation_temperature=0.0, votes=1),
    )

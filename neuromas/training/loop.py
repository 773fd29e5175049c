"""The training loop, the same line for every network: joint REINFORCE (Williams 1992; arXiv 2605.16757)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neuromas.rollout.engine import EngineFault
from neuromas.rollout.network import Diverged
from neuromas.system.engines import describe_engine
from neuromas.training.evaluate import Evaluation
from neuromas.training.grown_run import check_descends
from neuromas.training.plan import Plan
from neuromas.training.progress import Progress
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import Setup, network_of, start_engine
from neuromas.training.signals import Stop, stop_signals
from neuromas.training.tracking import tracked
from neuromas.training.trainer import Trainer
from neuromas.training.watch import group_answers


def train_step(trainer: Trainer) -> dict[str, float]:
    """Do one step; return its metrics, which are logged."""
    step, started = trainer.step, time.perf_counter()
    trainer.grow_if_due(step)
    examples = trainer.draw_questions(step)
    groups = trainer.roll_out(examples, step)
    sampled = time.perf_counter()
    rewards_PG = trainer.rewards(groups)
    questions = group_answers(trainer.task, groups, rewards_PG)
    divergence = trainer.divergence(groups)
    credits, metrics = trainer.credit(rewards_PG, groups, divergence)
    metrics |= trainer.describe_step(groups, questions, rewards_PG, credits, divergence)
    metrics |= trainer.update(groups, credits)
    ended = time.perf_counter()
    metrics["seconds/rollout/sum"], metrics["seconds/update/sum"] = sampled - started, ended - sampled
    metrics["sampled_tokens_per_second/mean"] = metrics["sampled_tokens/sum"] / (ended - started)
    return trainer.finish_step(groups, questions, rewards_PG, metrics)


def train_to_end(trainer: Trainer, progress: Progress, stop: Stop) -> None:
    """Do the steps that are left, with checkpoints on the way.

    Raises ValueError if the numbers are no longer finite, and `Interrupted` if the user stops it, after saving.
    """
    while not trainer.finished:
        step = f"step {trainer.step + 1}"
        try:
            metrics = train_step(trainer)
            progress.step(trainer.step, metrics, trainer.ledger.sampled_tokens, trainer.watch.active.values())
            trainer.save_if_due(stop)
        except Diverged as error:
            raise trainer.diverged(step, error) from error
        except EngineFault as error:
            raise trainer.without_engine(step, error) from error
    trainer.backbone.check_unchanged(trainer.checksum)


def train(plan: Plan, run: RunDirectory, *, parent: RunDirectory | None = None) -> dict[str, dict[str, Evaluation]]:
    """Train a run to its end and return its scores, `before` and `after`, by set of examples.

    A run that is there goes on from its newest checkpoint; with a `parent`, a new run from that run's. Raises ValueError for a
    mistake in the plan or the run directory before any long work, and where a GPU's memory is full; `Interrupted` if the user
    stops it, after saving.
    """
    with trainer_of(plan, run, parent=parent) as (trainer, progress, stop):
        try:
            return train_and_score(trainer, progress, stop)
        except torch.OutOfMemoryError as error:
            raise trainer.without_memory(error) from error


def train_and_score(trainer: Trainer, progress: Progress, stop: Stop) -> dict[str, dict[str, Evaluation]]:
    """Do the steps that are left, and score the network before and after; return the scores and raise as `train`."""
    progress.note(f"run {trainer.run.path}: {trainer.bank.trainable_parameters:,} trainable parameters")
    scores = {"before": trainer.evaluate_once("before", progress, stop)}
    train_to_end(trainer, progress, stop)
    scores["after"] = trainer.evaluate_once("after", progress, stop)
    return scores


@contextmanager
def trainer_of(
    plan: Plan, run: RunDirectory, *, parent: RunDirectory | None = None
) -> Iterator[tuple[Trainer, Progress, Stop]]:
    """Yield the trainer of a run at its newest checkpoint, while the run directory is locked; raises as `train`."""
    config, task, checksums = plan.config, plan.questions.task, plan.questions.checksums()
    if parent:
        check_descends(parent, config)
    for each in (run, parent) if parent else (run,):
        each.check_files()
        for score in (score for when in ("before", "after") for score in each.scores(when).values()):
            Evaluation.from_json(score, str(each.path / "evaluation.json"))
    network = network_of(plan)
    if parent:
        parent.check_backbone(network.backbone.checksum())
    with run.locked():
        # An engine may take minutes to start: two processes of one run would both wait for theirs.
        setup = start_engine(plan, network)
        if parent:
            run.adopt(parent, checksums)
        run.initialise(task.held_out, checksums)
        with Progress(config.num_steps, config.train_tokens) as progress, stop_signals(progress.note) as stop:
            trainer = begin(setup, run, progress)
            progress.note(describe_engine(config.engine.name, trainer.backbone.device.type))
            with tracked(config.track, run, progress.note):
                yield trainer, progress, stop


def begin(setup: Setup, run: RunDirectory, progress: Progress) -> Trainer:
    """Return the trainer of a run, which is made and locked, at its newest checkpoint."""
    trainer = Trainer(setup, run)
    trainer.tell = progress.note
    if remark := setup.plan.questions.task.remark:
        progress.note(remark)
    if trainer.learns_anew and trainer.config.engine.name == "tinker":
        raise ValueError(
            f"--run-dir {run.path}: these adapters were imported, and a service cannot be given an adapter to begin with; "
            "`neuromas eval` and `neuromas ask` answer with them, and a run that trains begins in another --run-dir"
        )
    if trainer.learns_anew and not trainer.finished:
        progress.note("these adapters were imported, and what learns them was not: optimizer and critic begin anew")
    return trainer

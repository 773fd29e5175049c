"""The training loop: rollouts, rewards, advantages, one joint update of all nodes; the same line for every network."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from neuromas import reinforce
from neuromas.backbone import Backbone
from neuromas.budget import Ledger, Pace
from neuromas.checkpoint import RunDirectory, State
from neuromas.config import TrainConfig
from neuromas.evaluate import Evaluation, evaluate
from neuromas.growth import Growth, describe
from neuromas.metrics import rollout_metrics, well_formed
from neuromas.network import Network
from neuromas.progress import Progress
from neuromas.stages import Stages, changed_answers, check_descends
from neuromas.stop import Stop, stop_signals
from neuromas.tasks import Task, from_config
from neuromas.types import Example, Group


@dataclass(slots=True)
class Setup:
    """What a config describes, built; anything that is wrong with it has been said by now."""

    config: TrainConfig
    task: Task
    network: Network
    evaluation_sets: dict[str, list[Example]]


def set_up(config: TrainConfig) -> Setup:
    """Build task, backbone and network; ValueError names the flag that is wrong."""
    task, sets = set_up_task(config)
    network = build_network(config)
    if growths := config.growths():
        # What the network will grow to must fit as well, and that is better said now than in the midst of the run.
        for example in (example for examples in sets.values() for example in examples):
            network.check_length(example, *(growth.grown for growth in growths))
    return Setup(config, task, network, sets)


def set_up_task(config: TrainConfig) -> tuple[Task, dict[str, list[Example]]]:
    """Return the task and its evaluation sets: all of a set-up that needs no weights. ValueError as of `set_up`."""
    config.check()
    task = from_config(config.task)
    task.check_ready()
    sets = evaluation_sets(config, task)
    # A task with nothing to train on says so now, not after the first evaluation.
    task.training_batch(config.seed, 0, 1)
    return task, sets


def find_run(config: TrainConfig, *, resume: bool) -> RunDirectory:
    """Return the run to start or to go on with; nothing is written. ValueError if it can't be."""
    return RunDirectory.resume(config) if resume else RunDirectory.create(config)


def evaluation_sets(config: TrainConfig, task: Task) -> dict[str, list[Example]]:
    """Return what is scored, by name; ValueError if that is what is trained on. The task then never draws a file's items."""
    split = config.task.split
    if split == "train" and not config.task.train_on_evaluation:
        raise ValueError("--task.split train would score what is trained on; say --task.train-on-evaluation if that is meant")
    sets: dict[str, list[Example]] = {split: task.examples(split, config.eval_size)}
    if config.task.file:
        name = f"file {config.task.file.name}"
        sets[name] = task.load(config.task.file)
        task.held_out = frozenset(example.id for example in sets[name])
    return sets


def build_network(config: TrainConfig) -> Network:
    backbone = Backbone.load(config.backbone, dtype=config.dtype, device=config.device)
    return Network(
        config.topology.build(), backbone, adapter=config.adapter, max_new_tokens=config.max_new_tokens, seed=config.seed,
        read=from_config(config.task).parse_answer if config.topology.vote else None,
    )  # fmt: skip


def learning_rate(config: TrainConfig, step: int, sampled_tokens: int = 0) -> float:
    """Linear warm-up, then a cosine from the peak to `final_lr` of it at the last step; a growth may begin both anew.

    With `train_tokens` the cosine follows the share of them that the steps before have sampled.
    """
    restarts = [entry.at_step for entry in config.growth if entry.restart_lr]
    first = max((at for at in restarts if at <= step), default=0)
    end = min((at for at in restarts if at > step), default=config.num_steps)
    step -= first
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.train_tokens:
        done = min(1.0, sampled_tokens / config.train_tokens)
    else:
        done = (step - config.warmup_steps) / max(1, end - first - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def train(config: TrainConfig, *, resume: bool = False, parent: RunDirectory | None = None) -> dict[str, dict[str, Evaluation]]:
    """Train a run to its end and return its scores, `before` and `after`, by set of examples.

    With a `parent`, a new run goes on from that run's newest checkpoint.

    Raises ValueError for a mistake in the config or the run directory before any long work, and `Interrupted` if the user
    stops it, after saving.
    """
    with trainer_of(config, resume=resume, parent=parent) as (trainer, progress, stop):
        progress.note(f"run {trainer.run.path}: {trainer.bank.trainable_parameters:,} trainable parameters")
        scores = {"before": trainer.evaluate_once("before", progress, stop)}
        trainer.train_to_end(progress, stop)
        scores["after"] = trainer.evaluate_once("after", progress, stop)
    return scores


@contextmanager
def trainer_of(
    config: TrainConfig, *, resume: bool, parent: RunDirectory | None = None
) -> "Iterator[tuple[Trainer, Progress, Stop]]":
    """Give the trainer of a run, set up and where it stands, while its folder is locked; raises as `train`."""
    config.check()
    run = find_run(config, resume=resume)
    if parent:
        check_descends(parent, config)
    setup = set_up(config)
    if parent:
        parent.check_backbone(None, setup.network.backbone.checksum())
    with run.locked():
        if parent:
            run.adopt(parent)
        run.initialise(setup.task.held_out)
        trainer = Trainer(setup, run)
        with Progress(config.num_steps, config.train_tokens) as progress, stop_signals(progress.note) as stop:
            trainer.tell = progress.note
            yield trainer, progress, stop


class Trainer:
    """A run in progress: one optimizer over the adapters of all nodes."""

    def __init__(self, setup: Setup, run: RunDirectory) -> None:
        self.config, self.task, self.network, self.run = setup.config, setup.task, setup.network, run
        self.sets = setup.evaluation_sets
        self.bank, self.backbone = setup.network.adapters, setup.network.backbone
        self.tell: Callable[[str], None] = lambda text: None
        self.checksum = self.backbone.checksum()
        self.stages = Stages(setup.network, setup.config.growths())
        self.stages.restore(run.step)
        self.optimizer = torch.optim.AdamW(self.bank.parameters().values(), lr=setup.config.lr, weight_decay=0.0)
        state = run.load(self.bank, self.optimizer)
        if state:
            run.check_backbone(state, self.checksum)
        self.step = state.step if state else 0
        self.running_mean = state.running_mean if state else 0.0
        self.ledger = state.ledger if state else Ledger(self.bank.trainable_parameters)
        self.pace = state.pace if state else Pace()
        run.forget_after(self.step)
        self.validates = self.config.eval_every > 0 and self.task.has("validation")
        if self.validates:
            self.validation = self.task.examples("validation", self.config.validation_size)
        self.best_accuracy = run.best_accuracy()

    def train_to_end(self, progress: Progress, stop: Stop) -> None:
        """Do the steps that are left, with checkpoints on the way."""
        while not self.finished:
            metrics = self.train_step(self.step)
            progress.step(self.step, metrics, self.ledger.sampled_tokens)
            if stop.asked or self.step % self.config.save_every == 0 or self.finished:
                self.save()
            stop.leave_if_asked(f"after step {self.step}")
        self.check_frozen()

    @property
    def finished(self) -> bool:
        """Whether training has spent its steps, or its tokens where it counts those."""
        if self.config.train_tokens:
            return self.ledger.sampled_tokens >= self.config.train_tokens
        return self.step >= self.config.num_steps

    def train_step(self, step: int) -> dict[str, float]:
        """Do one step of the straight line; log it and return its metrics."""
        while growth := self.stages.due(step):
            self._grow(growth)
        self.stages.open(step)
        config, started = self.config, time.perf_counter()
        examples = self._questions(step)
        groups = self.network.rollout(
            examples, config.group_size, seed=(config.seed, step), temperature=config.temperature, branches=config.branches
        )  # fmt: skip
        rollout_seconds = time.perf_counter() - started
        self.pace.settle(config.step_tokens, groups)

        rewards = self.task.rewards([(r.example, r.answer) for group in groups for r in group])
        rewards_PG = torch.tensor(rewards).view(len(groups), config.group_size)
        trained_PG = rewards_PG
        if config.format_bonus:
            form = [well_formed(self.task, r) for group in groups for r in group]
            trained_PG = rewards_PG + config.format_bonus * torch.tensor(form).view_as(rewards_PG)
        advantages_PG = reinforce.advantages(
            trained_PG, config.centring, running_mean=self.running_mean, normalize=config.normalize
        )
        self.running_mean += (trained_PG.mean().item() - self.running_mean) * (0.1 if step else 1.0)
        metrics = rollout_metrics(self.task, groups, rewards_PG, advantages_PG)
        metrics |= self._shape(step, examples) | self._update(step, groups, advantages_PG)

        seconds = time.perf_counter() - started
        metrics["seconds/rollout/sum"] = rollout_seconds
        metrics["seconds/update/sum"] = seconds - rollout_seconds
        metrics["sampled_tokens_per_second/mean"] = metrics["sampled_tokens/sum"] / seconds
        self.step = step + 1
        self.stages.open(self.step)
        if self.validates and (self.step % config.eval_every == 0 or self.finished):
            metrics |= self._validate()
        self.run.log_metrics(step, metrics)
        self.run.log_rollouts(step, _records(groups, rewards_PG.tolist()))
        return metrics

    def _questions(self, step: int) -> list[Example]:
        config = self.config
        if not config.step_tokens:
            return self.task.training_batch(config.seed, step, config.examples_per_step)
        calls = self.stages.expected_calls() * config.group_size
        count = self.pace.questions(config.step_tokens, config.examples_per_step, calls)
        # Always as many are drawn: what a step draws is then a function of the step alone.
        return self.task.training_batch(config.seed, step, config.drawn_per_step)[:count]

    def _shape(self, step: int, examples: list[Example]) -> dict[str, float]:
        metrics: dict[str, float] = {"questions/sum": float(len(examples))}
        if self.config.growth:
            grown = [self.network.topology_of(e, (self.config.seed, step)) == self.network.topology for e in examples]
            metrics["open_groups/frac"] = sum(grown) / len(grown)
            metrics["open_probability/value"] = self.network.open_probability
        return metrics

    def _grow(self, growth: Growth) -> None:
        """Take on a growth: old adapters and their optimizer state are not touched. What was done is told and stored."""
        record = growth.record()
        measured = growth.opening == "immediate" and self.task.has("validation")
        examples = self.task.examples("validation", self.config.validation_size) if measured else []
        before = evaluate(self.network, self.task, examples) if measured else None
        if parameters := self.network.grow(growth):
            self.optimizer.add_param_group({"params": parameters})
        self.stages.taken += 1
        self.stages.open(growth.at_step)
        self.ledger.begin_phase(self.bank.trainable_parameters)
        if before:
            record["changed_answers"] = changed_answers(before, self.network, self.task, examples)
        records = (self.run.read_json("growth.json") or [])[: self.stages.taken - 1]
        self.run.write_json("growth.json", [*records, record])
        self.tell(describe(record))

    def _update(self, step: int, groups: list[Group], advantages_PG: torch.Tensor) -> dict[str, float]:
        config, bank = self.config, self.bank
        batch = reinforce.build_batch(
            groups, advantages_PG, nodes=bank.nodes, adapter_version=bank.version, temperature=config.temperature,
            scope=self.backbone.scope,
        )  # fmt: skip
        loss_sum = gap = 0.0
        for micro_batch in batch.split(config.tokens_per_micro_batch, self.backbone.device):
            logprobs_K = self.backbone.logprobs(micro_batch.rows)
            loss = reinforce.loss(logprobs_K, micro_batch.advantages_K, batch.num_rollouts)
            loss.backward()
            loss_sum += loss.item()
            gap = max(gap, (logprobs_K.detach() - micro_batch.sampled_logprobs_K).abs().max().item())
        bank.drop_gradients(self.stages.learning(step, groups))
        grad_norms = bank.clip_grad_norms(config.max_grad_norm)
        lr = learning_rate(config, step, self.ledger.sampled_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        bank.version += 1
        self.ledger.record(groups, updated=any(grad_norms.values()))
        norms = {f"grad_norm/node/{node}/max": norm for node, norm in grad_norms.items()}
        return {"loss/mean": loss_sum, "logprob_gap/max": gap, "lr/value": lr, **norms}

    def _validate(self) -> dict[str, float]:
        seen, _ = evaluate(self.network, self.task, self.validation)
        # The best of a run that grows is the best of what it has grown to.
        whole = self.stages.taken == len(self.stages.growths) and self.network.open_probability == 1
        if whole and seen.accuracy > self.best_accuracy:
            self.best_accuracy = seen.accuracy
            self.save(validation_accuracy=seen.accuracy)
        values = {
            "accuracy/mean": seen.accuracy,
            "low/value": seen.low,
            "high/value": seen.high,
            "floor/value": seen.floor,
        }
        return {f"validation/{name}": value for name, value in values.items()}

    def evaluate_once(self, when: str, progress: Progress, stop: Stop) -> dict[str, Evaluation]:
        """Score every evaluation set and store it; a resumed run reads what it has already measured."""
        stored: dict[str, Any] = self.run.read_json("evaluation.json") or {}
        results: dict[str, Evaluation] = {}
        for name, examples in self.sets.items():
            if name in stored.get(when, {}):
                results[name] = Evaluation(**stored[when][name])
                continue
            if when == "before" and self.step:
                continue
            progress.note(f"scoring {when} training on {name}: {len(examples)} questions")
            results[name], groups = evaluate(
                self.network, self.task, examples, between=lambda: stop.leave_if_asked(f"while scoring {when} training")
            )  # fmt: skip
            self.run.log_rollouts(self.step, _records(groups, split=name))
            stored.setdefault(when, {})[name] = results[name].to_json()
            self.run.write_json("evaluation.json", stored)
            progress.note(f"{when} training, {name}: {results[name]}")
        return results

    def save(self, *, validation_accuracy: float | None = None) -> None:
        state = State(
            self.step, self.running_mean, self.checksum, self.ledger, self.pace, self.network.topology, validation_accuracy
        )
        self.run.save(self.bank, self.optimizer, state)

    def check_frozen(self) -> None:
        """Raise RuntimeError if a weight of the backbone is not what it was."""
        if (found := self.backbone.checksum()) != self.checksum:
            raise RuntimeError(f"training changed the frozen backbone: checksum {self.checksum} became {found}")


def _records(groups: list[Group], rewards: list[list[float]] | None = None, split: str = "train") -> list[dict[str, Any]]:
    """Return rollouts as JSON-ready records: who said what to whom, the answer, the reward."""
    return [
        {
            "split": split,
            "example": rollout.example.id,
            "question": rollout.example.question,
            "gold": rollout.example.answer,
            "rollout": rollout.index,
            "texts": {c.node: c.sample.text for c in rollout.completions},
            "faults": [[m.sender, m.recipient, m.status.value] for c in rollout.completions for m in c.messages
                       if m.status.value != "ok"],
            **({"reward": rewards[i][j]} if rewards else {}),
        }
        for i, group in enumerate(groups)
        for j, rollout in enumerate(group)
    ]  # fmt: skip

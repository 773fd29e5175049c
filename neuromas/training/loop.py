"""The training loop: rollouts, rewards, advantages, one joint update of all nodes; the same line for every network."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from neuromas.config import TrainConfig
from neuromas.graph.growth import Growth, describe
from neuromas.model.adapters import require_memory
from neuromas.model.backbone import Backbone
from neuromas.rollout.network import Diverged, Network
from neuromas.rollout.torch_engine import MAX_ROWS
from neuromas.tasks import from_config
from neuromas.training import checkpoint, reinforce
from neuromas.training.evaluate import Evaluation, evaluate
from neuromas.training.grown_run import check_descends
from neuromas.training.growth_schedule import Stages, changed_answers
from neuromas.training.ledger import Ledger, Pace
from neuromas.training.metrics import rollout_metrics, well_formed
from neuromas.training.progress import Progress
from neuromas.training.questions import Questions
from neuromas.training.run_directory import RunDirectory
from neuromas.training.signals import Stop, stop_signals
from neuromas.types import Example, Group

ROLLOUT_BYTES = 3000
"""What a completion of few words takes in memory, at least."""


@dataclass(slots=True)
class Setup:
    """What a config describes, built; anything that is wrong with it has been said by now."""

    config: TrainConfig
    questions: Questions
    network: Network


def set_up(config: TrainConfig, questions: Questions | None = None) -> Setup:
    """Build task, backbone and network; ValueError names the flag that is wrong."""
    questions = questions or Questions.of(config)
    network = build_network(config)
    # What the network will grow to must fit as well, and that is better said now than in the midst of the run.
    later = [growth.grown for growth in config.growths()]
    network.check_lengths([*questions.training, *chain(*questions.evaluation_sets.values())], *later)
    check_memory(config, network, max(len(shape.nodes) for shape in (network.topology, *later)))
    return Setup(config, questions, network)


def check_memory(config: TrainConfig, network: Network, nodes: int) -> None:
    """Raise ValueError if training would need more memory than there is: before it, not in the midst of it."""
    bank, rollouts = network.adapters, config.examples_per_step * config.group_size
    trainable = (1 if config.adapter.shared else nodes) * bank.rank * bank.parameters_per_rank
    device = network.backbone.device
    require_training_memory(trainable, bank.rank, nodes, device)
    columns = config.max_new_tokens * min(rollouts * nodes, MAX_ROWS)
    require_memory(
        f"keys and values of texts of --max-new-tokens {config.max_new_tokens}", columns * network.backbone.token_bytes, device
    )
    what = f"--examples-per-step {config.examples_per_step} x --group-size {config.group_size} rollouts of {nodes} nodes"
    require_memory(what, rollouts * nodes * ROLLOUT_BYTES, torch.device("cpu"))


def require_training_memory(trainable: int, rank: int, nodes: int, device: torch.device) -> None:
    """Raise ValueError if adapters with all that training keeps of them do not fit into memory."""
    # In float32: a weight, its gradient, and AdamW's two moments of it.
    require_memory(f"{trainable:,} trainable parameters (rank {rank}, {nodes} nodes)", 16 * trainable, device)


def build_network(config: TrainConfig) -> Network:
    backbone = Backbone.load(config.backbone, dtype=config.dtype, device=config.device, prompt_date=config.prompt_date)
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


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    parent: RunDirectory | None = None,
    questions: Questions | None = None,
) -> dict[str, dict[str, Evaluation]]:
    """Train a run to its end and return its scores, `before` and `after`, by set of examples.

    With a `parent`, a new run goes on from that run's newest checkpoint. `questions` are the config's, if there already.

    Raises ValueError for a mistake in the config or the run directory before any long work, and `Interrupted` if the user
    stops it, after saving.
    """
    with trainer_of(config, resume=resume, parent=parent, questions=questions) as (trainer, progress, stop):
        progress.note(f"run {trainer.run.path}: {trainer.bank.trainable_parameters:,} trainable parameters")
        scores = {"before": trainer.evaluate_once("before", progress, stop)}
        trainer.train_to_end(progress, stop)
        scores["after"] = trainer.evaluate_once("after", progress, stop)
    return scores


@contextmanager
def trainer_of(
    config: TrainConfig, *, resume: bool, parent: RunDirectory | None = None, questions: Questions | None = None
) -> "Iterator[tuple[Trainer, Progress, Stop]]":
    """Give the trainer of a run, set up and where it stands, while its folder is locked; raises as `train`."""
    config.check()
    run = RunDirectory.find(config, resume=resume)
    if parent:
        check_descends(parent, config)
    for each in (run, parent) if parent else (run,):
        each.check_files()
        for score in (score for when in ("before", "after") for score in each.scores(when).values()):
            Evaluation.from_json(score, str(each.path / "evaluation.json"))
    setup = set_up(config, questions)
    task, checksums = setup.questions.task, setup.questions.checksums()
    if parent:
        parent.check_backbone(setup.network.backbone.checksum())
    with run.locked():
        if parent:
            run.adopt(parent, checksums)
        run.initialise(task.held_out, checksums)
        trainer = Trainer(setup, run)
        with Progress(config.num_steps, config.train_tokens) as progress, stop_signals(progress.note) as stop:
            trainer.tell = progress.note
            if task.remark:
                progress.note(task.remark)
            yield trainer, progress, stop


class Trainer:
    """A run in progress: one optimizer over the adapters of all nodes."""

    def __init__(self, setup: Setup, run: RunDirectory) -> None:
        self.config, self.network, self.run = setup.config, setup.network, run
        self.task, self.sets = setup.questions.task, setup.questions.evaluation_sets
        self.bank, self.backbone = setup.network.adapters, setup.network.backbone
        self.tell: Callable[[str], None] = lambda text: None
        self.checksum = self.backbone.checksum()
        self.stages = Stages(setup.network, setup.config.growths())
        self.stages.restore(run.step)
        self.optimizer = torch.optim.AdamW(self.bank.parameters().values(), lr=setup.config.lr, weight_decay=0.0)
        state = checkpoint.load(run, self.bank, self.optimizer)
        if state:
            run.check_backbone(self.checksum, state.backbone_checksum)
        self.step = state.step if state else 0
        self.running_mean = state.running_mean if state else 0.0
        self.ledger = state.ledger if state else Ledger(self.bank.trainable_parameters)
        self.pace = state.pace if state else Pace()
        self.sampled_from = -1
        """The step whose adapters have written finite numbers last."""
        run.forget_after(self.step)
        self.validates = self.config.eval_every > 0 and self.task.has("validation")
        if self.validates:
            self.validation = self.task.examples("validation", self.config.validation_size)
            scored = {example.id for examples in self.sets.values() for example in examples}
            # What is scored chooses nothing.
            self.chooses = not any(example.id in scored for example in self.validation)
        best = run.best()
        self.best_accuracy = best[1]["validation_accuracy"] if best else -1.0

    def train_to_end(self, progress: Progress, stop: Stop) -> None:
        """Do the steps that are left, with checkpoints on the way."""
        while not self.finished:
            try:
                metrics = self.train_step(self.step)
            except Diverged as error:
                raise self._given_up(f"step {self.step + 1}", error) from error
            progress.step(self.step, metrics, self.ledger.sampled_tokens)
            if stop.asked or self.step % self.config.save_every == 0 or self.finished:
                self.save()
            stop.leave_if_asked(f"after step {self.step}")
        self.check_frozen()

    def _given_up(self, when: str, error: Diverged) -> ValueError:
        """Return what to say of a run whose numbers are no longer finite; no checkpoint that cannot answer stays."""
        is_bad = self.sampled_from != self.step != self.run.first_step
        left = self.run.drop_checkpoint(self.step) if is_bad else self.run.checkpoints()
        kept = f"the last good checkpoint is {left[-1].name}" if left else "there is no good checkpoint"
        return ValueError(
            f"--run-dir {self.run.path}: {when}: {error}. Training has diverged and is stopped; {kept}. Start again, in "
            "another --run-dir, with a lower --lr"
        )

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
        self.sampled_from = step
        rollout_seconds = time.perf_counter() - started
        self.pace.settle(config.step_tokens, groups)

        rewards = self.task.rewards([(r.example, r.answer) for group in groups for r in group])
        rewards_PG = torch.tensor(rewards).view(len(groups), config.group_size)
        trained_PG = rewards_PG
        if config.format_bonus:
            form = [well_formed(self.task, r) for group in groups for r in group]
            trained_PG = rewards_PG + config.format_bonus * torch.tensor(form).view_as(rewards_PG)
        advantages = self._advantages(trained_PG)
        self.running_mean += (trained_PG.mean().item() - self.running_mean) * (0.1 if step else 1.0)
        metrics = rollout_metrics(self.task, groups, rewards_PG, advantages[self.network.topology.output_node])
        metrics |= self._shape(step, examples) | self._update(step, groups, advantages)

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

    def _advantages(self, trained_PG: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the advantages of each node's texts; in a tree, rollouts have those of early layers in common."""
        config, topology = self.config, self.network.topology
        return {
            node: reinforce.advantages(
                trained_PG, config.centring, alike=config.branches ** (topology.depth - topology.layer(node)),
                running_mean=self.running_mean, normalize=config.normalize,
            )
            for node in topology.nodes
        }  # fmt: skip

    def _questions(self, step: int) -> list[Example]:
        config = self.config
        if not config.step_tokens:
            asked = self.task.training_batch(config.seed, step, config.examples_per_step)
            return asked[: self._affordable()] if config.train_tokens else asked
        calls = self.stages.expected_calls() * config.group_size
        count = self.pace.questions(config.step_tokens, config.examples_per_step, calls)
        # Always as many are drawn: what a step draws is then a function of the step alone.
        return self.task.training_batch(config.seed, step, config.drawn_per_step)[:count]

    def _affordable(self) -> int:
        """Return how many questions the tokens that are left are about good for, one at least: the last step asks fewer."""
        if not self.pace.tokens_per_call:
            return self.config.examples_per_step
        tokens = self.pace.tokens_per_call * self.stages.expected_calls() * self.config.group_size
        return max(1, round((self.config.train_tokens - self.ledger.sampled_tokens) / tokens))

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
        records = (self.run.read_json("growth.json", list) or [])[: self.stages.taken - 1]
        self.run.write_json("growth.json", [*records, record])
        self.tell(describe(record))

    def _update(self, step: int, groups: list[Group], advantages: dict[int, torch.Tensor]) -> dict[str, float]:
        config, policy, bank = self.config, self.network.policy, self.bank
        batch = reinforce.build_batch(
            groups, advantages, routing=policy.routing, adapter_version=policy.version, temperature=config.temperature
        )  # fmt: skip
        loss_sum = gap = 0.0
        for micro_batch in batch.split(config.tokens_per_micro_batch, self.backbone.device):
            logprobs_K = policy.logprobs(micro_batch.rows)
            loss = reinforce.loss(logprobs_K, micro_batch.advantages_K, batch.num_rollouts)
            loss.backward()
            loss_sum += loss.item()
            gap = max(gap, (logprobs_K.detach() - micro_batch.sampled_logprobs_K).abs().max().item())
        bank.drop_gradients(self.stages.learning(step, groups))
        grad_norms = bank.clip_grad_norms(config.max_grad_norm)
        if not math.isfinite(sum((loss_sum, gap, *grad_norms.values()))):
            raise Diverged(f"the loss is {loss_sum:g}, the largest gradient norm {max(grad_norms.values(), default=0.0):g}")
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
        if whole and self.chooses and seen.accuracy > self.best_accuracy:
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
        stored = {moment: self.run.scores(moment) for moment in ("before", "after")}
        results: dict[str, Evaluation] = {}
        for name, examples in self.sets.items():
            if name in stored[when]:
                results[name] = Evaluation.from_json(stored[when][name], str(self.run.path / "evaluation.json"))
                continue
            # A run that has grown begins where its parent ended.
            if when == "before" and self.step != self.run.first_step:
                continue
            progress.note(f"scoring {when} training on {name}: {len(examples)} questions")
            try:
                results[name], groups = evaluate(
                    self.network, self.task, examples, between=lambda: stop.leave_if_asked(f"while scoring {when} training")
                )  # fmt: skip
            except Diverged as error:
                raise self._given_up(f"scoring {when} training", error) from error
            self.run.log_rollouts(self.step, _records(groups, split=name))
            stored[when][name] = results[name].to_json()
            self.run.write_json("evaluation.json", stored)
            progress.note(f"{when} training, {name}: {results[name]}")
        return results

    def save(self, *, validation_accuracy: float | None = None) -> None:
        state = checkpoint.State(
            self.step, self.running_mean, self.checksum, self.ledger, self.pace, self.network.topology, validation_accuracy
        )
        checkpoint.save(self.run, self.bank, self.optimizer, state)

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

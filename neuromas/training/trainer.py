"""A run in progress: what each step of the loop does, and what is kept between steps."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from neuromas.graph.growth import Growth, describe
from neuromas.model.policy import Policy
from neuromas.rollout.engine import EngineFault
from neuromas.rollout.network import Diverged
from neuromas.system.process import return_freed_memory
from neuromas.system.terminal import one_line, shortened
from neuromas.tasks import rewards_of, with_repeats
from neuromas.training import checkpoint
from neuromas.training.credit import SCHEMES, Step
from neuromas.training.credit.critic import Critic
from neuromas.training.divergence import Divergence
from neuromas.training.evaluate import Evaluation, evaluate
from neuromas.training.going_on import command_for
from neuromas.training.growth_schedule import GrowthSchedule, changed_answers
from neuromas.training.learning_rate import learning_rate
from neuromas.training.ledger import Ledger, Pace
from neuromas.training.metrics import rollout_metrics
from neuromas.training.progress import Progress
from neuromas.training.reinforce import Credits
from neuromas.training.run_directory import RunDirectory
from neuromas.training.scores import Validation, as_metrics, score_sets
from neuromas.training.setup import Setup
from neuromas.training.signals import Stop
from neuromas.training.watch import GroupAnswers, Watch
from neuromas.types import Example, Group, MessageStatus

SAVE_SECONDS = 120.0
"""A step of a real model may take minutes: what a killed run has to do again is bounded in time as well as in steps."""


class Trainer:
    """A run in progress: a network, its learner, and what is kept between steps."""

    def __init__(self, setup: Setup, run: RunDirectory) -> None:
        plan = setup.plan
        self.config, self.network, self.run = plan.config, setup.network, run
        self.task, self.sets = plan.questions.task, plan.questions.evaluation_sets
        self.bank, self.backbone = setup.network.adapters, setup.network.backbone
        self.tell: Callable[[str], None] = lambda text: None
        self.watch = Watch()
        self.checksum = self.backbone.checksum()
        self.growths = GrowthSchedule(setup.network, plan.growths)
        self.learner = setup.learner
        self.bare = Policy(self.backbone, frame=setup.network.policy.frame) if self.config.kl_coef else None
        """The backbone without adapters, from which divergence is penalised."""
        for parameters in self.growths.restore(run.step):
            self.learner.add_nodes(parameters)
        self.scheme = SCHEMES[self.config.credit]
        self.critic = self._critic()
        state = checkpoint.load(run, self.bank, self.learner, self.critic)
        if state:
            run.check_backbone(self.checksum, state.backbone_checksum)
        else:
            run.check_start(self.checksum)
        self.learns_anew = state is not None and not state.has_optimizer
        """Whether the run goes on from an import, with an optimizer (and a critic) that begins anew."""
        self.step = state.step if state else 0
        self.running_mean = state.running_mean if state else 0.0
        self.ledger = state.ledger if state else Ledger(self.bank.trainable_parameters)
        self.pace = state.pace if state else Pace()
        self.sampled_from = -1
        """The step whose adapters have written finite numbers last."""
        self.saved_at = time.monotonic()
        run.forget_after(self.step)
        self.validation = Validation(plan.questions.validation, self.sets, run)

    def diverged(self, when: str, error: Diverged) -> ValueError:
        """Return what to say of a run whose numbers are no longer finite; no checkpoint that cannot answer stays."""
        is_bad = self.sampled_from != self.step != self.run.first_step
        left = self.run.drop_checkpoint(self.step) if is_bad else self.run.checkpoints()
        others = [f"--{name}-coef" for name in ("kl", "entropy") if getattr(self.config, f"{name}_coef")]
        others += ["--critic-lr"] if self.critic else []
        kept = f"the last good checkpoint is {left[-1].name}" if left else "there is no good checkpoint"
        return ValueError(
            f"--run-dir {self.run.path}: {when}: {error}. Training has diverged and is stopped; {kept}. Start again, in "
            f"another --run-dir, with a lower {' or '.join(['--lr', *others])}"
        )

    def without_engine(self, when: str, error: EngineFault) -> ValueError:
        """Return what to say where an engine outside of this process has failed; the checkpoints are as they were."""
        return ValueError(f"--run-dir {self.run.path}: {when}: {error}. {self._resuming} {self._onwards}")

    def without_memory(self, error: torch.OutOfMemoryError) -> ValueError:
        """Return what to say where a GPU's memory is full; the checkpoints are as they were."""
        reason = shortened(one_line(str(error)), 120)
        return ValueError(
            f"--run-dir {self.run.path}: after step {self.step}: {reason} {self._resuming} and --grad-checkpoint "
            f"{self._onwards}, and needs less, as does a lower --tokens-per-micro-batch in another --run-dir"
        )

    @property
    def _resuming(self) -> str:
        command = command_for(self.run.path)
        return command[0].upper() + command[1:]

    @property
    def _onwards(self) -> str:
        saved = self.run.checkpoints()
        return f"goes on from {saved[-1].name}" if saved else "begins again, for there is no checkpoint yet"

    @property
    def finished(self) -> bool:
        """Whether training has spent its steps, or its tokens where it counts those."""
        if self.config.train_tokens:
            return self.ledger.sampled_tokens >= self.config.train_tokens
        return self.step >= self.config.num_steps

    # What a step is made of, in order (loop.py).

    def grow_if_due(self, step: int) -> None:
        """Grow the network if this step begins with a growth, and set the probability that the growth is open."""
        while growth := self.growths.due(step):
            self._grow(growth)
        self.growths.set_open_probability(step)

    def draw_questions(self, step: int) -> list[Example]:
        """Return the questions of a step; with a budget of tokens, the number that fits it."""
        config = self.config
        if not config.step_tokens:
            drawn = with_repeats(self.task.training_batch(config.seed, step, config.examples_per_step))
            return drawn[: self._affordable()] if config.train_tokens else drawn
        calls = self.growths.expected_calls() * config.group_size
        count = self.pace.questions(config.step_tokens, config.examples_per_step, calls)
        # The same number is drawn always: the questions of a step are then a function of the step alone.
        return with_repeats(self.task.training_batch(config.seed, step, config.drawn_per_step))[:count]

    def roll_out(self, examples: list[Example], step: int) -> list[Group]:
        """Pass each question through the network `group_size` times."""
        config = self.config
        groups = self.network.rollout(
            examples, config.group_size, seed=(config.seed, step), temperature=config.temperature, branches=config.branches
        )  # fmt: skip
        self.sampled_from = step
        return_freed_memory()
        return groups

    def rewards(self, groups: list[Group]) -> Float[Tensor, "P G"]:
        """Return the terminal reward of every rollout: whether its answer is right."""
        rewards = rewards_of(self.task, [(r.example, r.answer) for group in groups for r in group])
        return torch.tensor(rewards).view(len(groups), self.config.group_size)

    def divergence(self, groups: list[Group]) -> Divergence | None:
        """Return how far the rollouts are from the bare backbone's; None, at no cost, where that is not penalised."""
        if self.bare is None:
            return None
        config = self.config
        tokens = config.tokens_per_micro_batch or self.bare.backbone.tokens_per_micro_batch
        return Divergence.of(groups, self.bare, temperature=config.temperature, tokens_per_micro_batch=tokens)

    def credit(
        self, rewards_PG: Float[Tensor, "P G"], groups: list[Group], divergence: Divergence | None
    ) -> tuple[Credits, dict[str, float]]:
        """Return the advantages of all texts by the run's credit scheme, and the scheme's own metrics."""
        step = Step(
            config=self.config, network=self.network, task=self.task, seed=(self.config.seed, self.step), groups=groups,
            terminal_PG=rewards_PG, running_mean=self.running_mean, critic=self.critic,
        )  # fmt: skip
        credits = replace(self.scheme.credit(step), replays=tuple(step.replays))
        if divergence:
            credits = divergence.taken_off(credits, self.config.kl_coef, step.shared_by)
        self.running_mean += (step.rewards_PG.mean().item() - self.running_mean) * (0.1 if self.step else 1.0)
        self.pace.update(self.config.step_tokens, groups, credits.replays)
        return credits, step.metrics

    def describe_step(
        self,
        groups: list[Group],
        questions: list[GroupAnswers],
        rewards_PG: Tensor,
        credits: Credits,
        divergence: Divergence | None,
    ) -> dict[str, float]:
        """Return the metrics of a step's rollouts."""
        metrics = rollout_metrics(questions, groups, rewards_PG, credits, self.network.topology.output_node)
        metrics["questions/sum"] = float(len(groups))
        if divergence:
            metrics["kl/mean"] = divergence.per_token()
        if self.config.growth:
            examples, seed = [group[0].example for group in groups], (self.config.seed, self.step)
            grown = [self.network.topology_of(example, seed) == self.network.topology for example in examples]
            metrics["open_groups/frac"] = sum(grown) / len(grown)
            metrics["open_probability/value"] = self.network.open_probability
        return metrics

    def update(self, groups: list[Group], credits: Credits) -> dict[str, float]:
        """Do one joint update of all nodes, and count it."""
        lr = learning_rate(self.config, self.step, self.ledger.sampled_tokens)
        update = self.learner.update(credits, learning=self.growths.learning(self.step, groups), lr=lr)
        self.ledger.record(groups, credits.replays, updated=any(update.grad_norms.values()))
        norms = {f"grad_norm/node/{node}/max": norm for node, norm in update.grad_norms.items()}
        found = {
            "loss/mean": update.loss, "logprob_gap/max": update.logprob_gap, "lr/value": lr, "entropy/mean": update.entropy,
            "importance_weight/max": update.largest_weight,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None} | norms

    def finish_step(
        self, groups: list[Group], questions: list[GroupAnswers], rewards_PG: Tensor, metrics: dict[str, float]
    ) -> dict[str, float]:
        """Validate if that is due, and log the step with all its rollouts; return all its metrics."""
        step = self.step
        self.step = step + 1
        self.growths.set_open_probability(self.step)
        if self.validation.examples and (self.step % self.config.eval_every == 0 or self.finished):
            metrics |= self._validate()
        for text in self.watch.look(questions):
            self.tell(f"step {self.step}: {text}")
        self.run.log_metrics(step, metrics)
        self.run.log_rollouts(step, _records(groups, rewards_PG.tolist()))
        return metrics

    def save_if_due(self, stop: Stop) -> None:
        """Save every `save_every` steps, after `SAVE_SECONDS` without, at the end, and if the user has asked to stop.

        Raises Interrupted in that last case. Who asks while a checkpoint is written is heard after the next step.
        """
        # Workers hear it here at the latest, all of them.
        overdue = self.run.agreed(time.monotonic() - self.saved_at > SAVE_SECONDS)
        asked = stop.asked
        if asked or overdue or self.step % self.config.save_every == 0 or self.finished:
            self.save()
            self.saved_at = time.monotonic()
        if asked:
            stop.leave_if_asked(f"after step {self.step}")

    # What those need.

    def _critic(self) -> Critic | None:
        """Return the value heads that the credit scheme learns; new nodes of later growths have theirs from the start."""
        if self.scheme.heads == "none":
            return None
        shape = self.growths.all[-1].grown if self.growths.all else self.network.topology
        heads = shape.nodes if self.scheme.heads == "one a node" else (0,)
        return Critic(self.backbone, heads, self.config.critic_lr, self.config.tokens_per_micro_batch)

    def _affordable(self) -> int:
        """Return how many questions the tokens that are left are about good for, one at least: the last step asks fewer."""
        if not self.pace.tokens_per_call:
            return self.config.examples_per_step
        tokens = self.pace.tokens_per_call * self.growths.expected_calls() * self.config.group_size
        return max(1, round((self.config.train_tokens - self.ledger.sampled_tokens) / tokens))

    def _grow(self, growth: Growth) -> None:
        """Take on a growth: old adapters and their optimizer state are not touched. What was done is told and stored."""
        record = growth.record()
        measured = growth.opening == "immediate" and not growth.adds_nothing and self.task.has("validation")
        examples = self.task.examples("validation", self.config.validation_size) if measured else []
        before = evaluate(self.network, self.task, examples) if measured else None
        if parameters := self.network.grow(growth):
            self.learner.add_nodes(parameters)
        self.growths.taken += 1
        self.growths.set_open_probability(growth.at_step)
        self.ledger.begin_phase(self.bank.trainable_parameters)
        if before:
            record["changed_answers"] = changed_answers(before, self.network, self.task, examples)
        records = (self.run.read_json("growth.json", list) or [])[: self.growths.taken - 1]
        self.run.write_json("growth.json", [*records, record])
        self.tell(f"{describe(record)}\n  trainable parameters from here on: {self.bank.trainable_parameters:,}")

    def _validate(self) -> dict[str, float]:
        seen, _ = evaluate(self.network, self.task, self.validation.examples)
        # The best of a run that grows is the best of what it has grown to.
        whole = self.growths.taken == len(self.growths.all) and self.network.open_probability == 1
        if whole and self.validation.is_best(seen.accuracy):
            self.save(validation_accuracy=seen.accuracy)
        return {f"validation/{name}": value for name, value in as_metrics(seen).items()}

    def evaluate_once(self, when: str, progress: Progress, stop: Stop) -> dict[str, Evaluation]:
        """Score every evaluation set and store it; a resumed run reads what it has already measured."""

        def measure(examples: list[Example]) -> tuple[Evaluation, list[Group]]:
            try:
                return evaluate(
                    self.network, self.task, examples, between=lambda: stop.leave_if_asked(f"while scoring {when} training"),
                    tell=lambda text: progress.tell(f"scoring {when} training: {text}"),
                )  # fmt: skip
            except Diverged as error:
                raise self.diverged(f"scoring {when} training", error) from error
            except EngineFault as error:
                raise self.without_engine(f"scoring {when} training", error) from error

        return score_sets(
            self.run, self.sets, when, step=self.step, of="training", measure=measure,
            records=lambda groups, name: _records(groups, split=name), note=progress.note,
        )  # fmt: skip

    def save(self, *, validation_accuracy: float | None = None) -> None:
        state = checkpoint.State(
            self.step, self.running_mean, self.checksum, self.ledger, self.pace, self.network.topology, validation_accuracy
        )
        checkpoint.save(self.run, self.bank, self.learner, state, self.critic)


def _records(groups: list[Group], rewards: list[list[float]] | None = None, split: str = "train") -> list[dict[str, Any]]:
    """Return rollouts as JSON-ready records: who said what to whom, the answer, the reward."""
    return [
        {
            "split": split,
            "example": rollout.example.id,
            "question": rollout.example.question,
            "gold": rollout.example.answer,
            "rollout": rollout.index,
            "texts": {c.node: c.text for c in rollout.completions},
            "faults": [[m.sender, m.recipient, m.status.value] for c in rollout.completions for m in c.messages
                       if m.status is not MessageStatus.OK],
            **({"reward": rewards[i][j]} if rewards else {}),
        }
        for i, group in enumerate(groups)
        for j, rollout in enumerate(group)
    ]  # fmt: skip

"""Who learns: the gradient of a step's rollouts, and one optimizer step over the adapters of all nodes.

`TorchLearner` learns in process, on the weights that the torch engine samples with. `Setup` holds the run's learner: another
one, such as a service that trains, is any class with these methods.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from neuromas.config import TrainConfig
from neuromas.model.policy import Policy
from neuromas.rollout.engine import EngineFault
from neuromas.rollout.network import Diverged
from neuromas.training import reinforce
from neuromas.training.reinforce import Batch, Credits
from neuromas.types import Completion

FLOAT32_BOUND, BFLOAT16_BOUND = 0.01, 1.0
"""Default of --engine.logprob-bound."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an update was."""

    loss: float
    logprob_gap: float | None
    """Largest difference between a token's log-probability as sampled and as recomputed by the learner; None: no text was."""
    grad_norms: dict[int, float]
    """Norm of each node's gradient before clipping."""
    entropy: float | None = None
    """Mean entropy at a sampled token; None without an entropy bonus."""
    largest_weight: float | None = None
    """Largest importance weight of a token, before it is bounded; None where no token is weighed."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What the gradient of a batch was, or of some of its rows."""

    loss: float = 0.0
    gap: float = 0.0
    """Largest difference between a log-probability as sampled and as recomputed."""
    entropy: float = 0.0
    largest_weight: float = 0.0

    @classmethod
    def of(cls, parts: Sequence["Sums"]) -> "Sums":
        """Return those of a batch in parts."""
        return cls(
            sum(part.loss for part in parts), max(part.gap for part in parts), sum(part.entropy for part in parts),
            max(part.largest_weight for part in parts),
        )  # fmt: skip


class Learner(Protocol):
    """Updates the adapters that sampled. Adapters themselves are saved and loaded by the run, in PEFT's format.

    They are loaded before `load_state` is called and saved after `state` is: a learner whose weights are elsewhere takes them
    from the policy's bank there, and brings the bank up to date.
    """

    def update(self, credits: Credits, *, learning: Collection[int], lr: float) -> Update:
        """Do one joint update of the nodes in `learning`; Diverged if a number is not finite, before anything is changed."""
        ...

    def add_nodes(self, parameters: Sequence[Parameter]) -> None:
        """Learn the parameters of new nodes too; optimizer state of the others is not touched."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's state, for a checkpoint."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state that was saved."""
        ...


def check_gap(config: TrainConfig, policy: Policy, gap: float) -> None:
    """Raise EngineFault if an engine with weights of its own has sampled from another policy than is learned."""
    engine = config.engine
    bound = engine.logprob_bound or (FLOAT32_BOUND if policy.backbone.model.dtype == torch.float32 else BFLOAT16_BOUND)
    if engine.name != "torch" and engine.mismatch == "stop" and math.isfinite(gap) and gap > bound:
        raise EngineFault(
            f"a token's log-probability as {engine.name} sampled it and as the learner recomputes it differ by {gap:.3g}, "
            f"engine.logprob_bound is {bound:g}: the engine rounds otherwise, or its adapters are not the learner's. "
            "Raise --engine.logprob-bound, or start again with --engine.mismatch weight"
        )


class TorchLearner:
    """AdamW over the adapters of a policy.

    An adapter without a gradient in a step keeps its weights and moments. The count of steps, by which AdamW corrects the start
    of its moments, is that of all adapters that joined together.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        assert policy.adapters is not None
        self.policy, self.config, self.bank = policy, config, policy.adapters
        if config.grad_checkpoint:
            policy.recompute_layers()
        self.optimizer = torch.optim.AdamW(self.bank.parameters().values(), lr=config.lr, weight_decay=0.0)

    def add_nodes(self, parameters: Sequence[Parameter]) -> None:
        self.optimizer.add_param_group({"params": list(parameters)})

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in self.bank.parameters().items()
            for key, value in self.optimizer.state[parameter].items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        # Until some rollout has been right, no step has had a gradient, and there are no moments yet.
        for name, parameter in self.bank.parameters().items():
            # Nodes that have joined have none of their own until they have learned something.
            for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.step" in state else ():
                value = state[f"{name}.{key}"]
                self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)

    def update(self, credits: Credits, *, learning: Collection[int], lr: float) -> Update:
        policy, config = self.policy, self.config
        batch = reinforce.build_batch(
            credits, routing=policy.routing, adapter_version=policy.version, temperature=config.temperature,
            keep_all=config.entropy_coef > 0,
        )  # fmt: skip
        sums = self.gradient(batch)
        try:
            check_gap(config, policy, sums.gap)
        except EngineFault:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        self.bank.drop_gradients(learning)
        grad_norms = self._step(sums.loss, sums.gap, lr)
        if not batch.completions:
            return Update(sums.loss, None, grad_norms)
        sampled = sum(len(c.sample.logprobs) for c, _ in batch.completions)
        entropy = sums.entropy / sampled if config.entropy_coef else None
        return Update(sums.loss, sums.gap, grad_norms, entropy, sums.largest_weight if self._weighs else None)

    @property
    def _weighs(self) -> bool:
        return self.policy.backbone.model.dtype != torch.float32 or self.config.engine.mismatch == "weight"

    def gradient(self, batch: Batch) -> Sums:
        """Leave the gradient of a batch in the parameters."""
        policy, config = self.policy, self.config
        loss_sum = gap = entropy_sum = largest = 0.0
        tokens = config.tokens_per_micro_batch or policy.backbone.tokens_per_micro_batch
        for micro_batch in batch.split(tokens, policy.backbone.device):
            if config.entropy_coef:
                logprobs_K, entropies_K = policy.logprobs_and_entropies(micro_batch.rows)
            else:
                logprobs_K, entropies_K = policy.logprobs(micro_batch.rows), None
            advantages_K = micro_batch.advantages_K
            if self._weighs:
                weights_K, before = reinforce.importance_weights(logprobs_K, micro_batch.sampled_logprobs_K)
                advantages_K, largest = advantages_K * weights_K, max(largest, before)
            loss = reinforce.loss(logprobs_K, advantages_K, batch.num_rollouts)
            if entropies_K is not None:
                loss = loss + reinforce.entropy_loss(entropies_K, micro_batch.shares_K, config.entropy_coef, batch.num_rollouts)
                entropy_sum += entropies_K.sum().item()
            loss.backward()
            loss_sum += loss.item()
            gap = max(gap, (logprobs_K.detach() - micro_batch.sampled_logprobs_K).abs().max().item())
        return Sums(loss_sum, gap, entropy_sum, largest)

    def imitate(self, texts: Sequence[Completion], *, lr: float) -> dict[int, float]:
        """Do one supervised update: each adapter learns its own nodes' texts, whichever version of it wrote them.

        The loss of an adapter is the mean of -log p over all sampled tokens of its texts, as in supervised finetuning; what
        was read, and what a text was begun by, is not learned. Returns that mean, before the update, by index of the adapter;
        Diverged if a number is not finite, before anything is changed.
        """
        policy, config = self.policy, self.config
        own = sorted(((policy.routing.adapter_of(text.node), text) for text in texts), key=lambda item: item[0])
        tokens = Counter[int]()
        for adapter, text in own:
            tokens[adapter] += len(text.sample.logprobs)
        weighted = tuple((text, 1.0 / tokens[adapter]) for adapter, text in own)
        batch = Batch(weighted, 1, policy.routing, temperature=1.0)
        found: dict[int, float] = defaultdict(float)
        at_once = config.tokens_per_micro_batch or policy.backbone.tokens_per_micro_batch
        for micro_batch in batch.split(at_once, policy.backbone.device):
            logprobs_K = policy.logprobs(micro_batch.rows)
            reinforce.loss(logprobs_K, micro_batch.advantages_K, batch.num_rollouts).backward()
            rows = micro_batch.rows
            adapters_K = rows.node_of_row_B[rows.suffixes.row_T[rows.sampled_K]]
            parts_K = logprobs_K.detach() * micro_batch.advantages_K
            for adapter in adapters_K.unique().tolist():
                found[adapter] -= parts_K[adapters_K == adapter].sum().item()
        self._step(sum(found.values()), 0.0, lr)
        return dict(found)

    def _step(self, loss: float, gap: float, lr: float) -> dict[int, float]:
        """Clip the gradients, do an optimizer step, and return the norms before."""
        grad_norms = self.bank.clip_grad_norms(self.config.max_grad_norm)
        if not math.isfinite(sum((loss, gap, *grad_norms.values()))):
            raise Diverged(f"the loss is {loss:g}, the largest gradient norm {max(grad_norms.values(), default=0.0):g}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Momentum would go on moving an adapter that has learned nothing in this step.
        idle = [node for node, norm in grad_norms.items() if norm == 0]
        kept = [(row, row.clone()) for row in self._rows(idle)]
        self.optimizer.step()
        for row, before in kept:
            row.copy_(before)
        self.optimizer.zero_grad(set_to_none=True)
        self.bank.version += 1
        return grad_norms

    def _rows(self, nodes: Collection[int]) -> Iterator[Tensor]:
        """Yield what a step changes of some nodes' adapters, weights and moments, as views into what all nodes have stacked."""
        for number, cohort in enumerate(self.bank.cohorts):
            indices = [index for index, node in enumerate(cohort) if node in nodes]
            for parameter in self.bank.parameters(number).values() if indices else ():
                # Before its first step a parameter has no moments, and a gradient of 0 gives it none.
                state = self.optimizer.state.get(parameter, {})
                for stack in (parameter.data, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)):
                    yield from (stack[index] for index in indices)

"""A critic: small value heads on the states of the frozen backbone.

    V(text) = w . h(text) / |h(text)| + b

where h is the last hidden state of the bare backbone after the text: no adapter acts, and no weight of the backbone learns.
So a critic knows what the backbone makes of a text, and no more. The heads learn the terminal reward by mean squared error
(AdamW), always after their values have been used: an advantage never depends on its own reward through the critic.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy
from neuromas.training.reinforce import Batch
from neuromas.types import Completion, Prompt, Sample

UPDATES = 4
"""Optimizer steps on the values of one training step."""


class Critic:
    """Value heads by name (node ids, or 0 for a single one), with their optimizer."""

    def __init__(self, backbone: Backbone, heads: Sequence[int], lr: float, tokens_per_micro_batch: int | None = None) -> None:
        self.bare, self.heads = Policy(backbone), tuple(heads)
        self.tokens = tokens_per_micro_batch or backbone.tokens_per_micro_batch
        size = backbone.model.config.get_text_config().hidden_size
        # Both start at 0, so that a critic that has learned nothing takes nothing away from the rewards.
        self.weights = torch.zeros(len(heads), size, device=backbone.device, requires_grad=True)
        self.biases = torch.zeros(len(heads), device=backbone.device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.weights, self.biases], lr=lr, weight_decay=0.0)

    def states(self, completions: Sequence[Completion]) -> list[Float[Tensor, "K C"]]:
        """Return, for each completion, the normed state before each of its sampled tokens: the first one is its prompt's."""
        distinct = {(c.prompt, c.sample.token_ids, c.sample.given): c for c in completions}
        # Rows with one prefix lie together: it is then read once.
        ordered = sorted(distinct, key=lambda key: key[0].prefix_ids)
        batch = Batch(tuple((distinct[key], 1.0) for key in ordered), 1, self.bare.routing, 1.0)
        parts = [self.bare.states(part.rows).float() for part in batch.split(self.tokens, self.bare.backbone.device)]
        states_KC = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
        by_text = dict(zip(ordered, states_KC.split([len(distinct[key].sample.logprobs) for key in ordered]), strict=True))
        return [by_text[c.prompt, c.sample.token_ids, c.sample.given] for c in completions]

    def prompt_states(self, prompts: Sequence[Prompt]) -> Float[Tensor, "B C"]:
        """Return the normed state after each prompt."""
        # The token after a prompt has no part in the state before it.
        after = Sample((0,), (0.0,), ("",), stopped=True, adapter_version=0)
        return torch.cat(self.states([Completion(0, prompt, after, ()) for prompt in prompts]))

    def values(self, states_BC: Float[Tensor, "B C"], heads: Sequence[int]) -> Float[Tensor, " B"]:
        """Return the value of each state by its head, without gradients."""
        with torch.no_grad():
            return self._values(states_BC, self._indices(heads)).cpu()

    def fit(self, states_BC: Float[Tensor, "B C"], heads: Sequence[int], rewards: Sequence[float]) -> float:
        """Learn the rewards that followed these states; return the mean squared error before."""
        indices_B, targets_B = self._indices(heads), torch.tensor(rewards, device=states_BC.device)
        # Momentum would go on moving a head that values nothing here, such as that of a node that is still closed.
        idle = [row for row, head in enumerate(self.heads) if head not in heads]
        stacks = [stack for each in (self.weights, self.biases) for stack in self._stacks(each)]
        kept = [stack[idle].clone() for stack in stacks]
        errors = []
        for _ in range(UPDATES):
            error = (self._values(states_BC, indices_B) - targets_B).square().mean()
            error.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            errors.append(error.item())
        for stack, before in zip(stacks, kept, strict=True):
            stack[idle] = before
        return errors[0]

    def _stacks(self, parameter: Tensor) -> list[Tensor]:
        """Return what learning changes of a parameter: its values, and its moments once it has some."""
        state = self.optimizer.state.get(parameter, {})
        return [parameter.data, *(state[key] for key in ("exp_avg", "exp_avg_sq") if key in state)]

    def _indices(self, heads: Sequence[int]) -> Int[Tensor, " B"]:
        return torch.tensor([self.heads.index(head) for head in heads], device=self.weights.device)

    def _values(self, states_BC: Tensor, indices_B: Tensor) -> Tensor:
        return (states_BC * self.weights[indices_B]).sum(1) + self.biases[indices_B]

    def state(self) -> dict[str, Tensor]:
        """Return the heads and the optimizer's moments, for a checkpoint."""
        named = {"weights": self.weights, "biases": self.biases}
        moments = {f"{name}.{key}": value for name, each in named.items() for key, value in self.optimizer.state[each].items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in (named | moments).items()}
        return {"heads": torch.tensor(self.heads), **tensors}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state that was saved; heads that it does not have, of nodes that have joined since, stay at 0."""
        rows = [self.heads.index(head) for head in state["heads"].tolist()]

        def spread(saved: Tensor, parameter: Tensor) -> Tensor:
            whole = torch.zeros_like(parameter)
            whole[rows] = saved.to(parameter.device)
            return whole

        with torch.no_grad():
            for name, parameter in (("weights", self.weights), ("biases", self.biases)):
                parameter.copy_(spread(state[name], parameter))
                for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.step" in state else ():
                    value = state[f"{name}.{key}"]
                    self.optimizer.state[parameter][key] = value if key == "step" else spread(value, parameter).detach()

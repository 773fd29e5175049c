"""How far a network's rollouts are from those of the bare backbone: the penalty `--kl-coef`, for the reward of each node.

    KL(network || bare) = E[ sum over a rollout's texts of  log p_node(text | what it read) - log p_bare(text | what it read) ]

is the divergence of whole rollouts, by the chain rule. One rollout estimates it without bias by its own sum (the estimator `k1`
of Schulman 2020, "Approximating KL divergence"), and the gradient of (reward - coefficient * sum) is that of REINFORCE with the
sum as a part of the reward (Ziegler et al. 2019, arXiv 1909.08593), for the gradient of the sum itself has the expectation 0.
Used as a loss instead, k1 would have no gradient in expectation and `k3` that of the reversed divergence; a `k2` summed over
tokens leaves out what a token does to those after it (Tang and Munos 2025, arXiv 2506.09477).

A node's share is the sum over its own text and the texts that follow from it; all others do not depend on what it writes, so
that they would only add noise.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from neuromas.model.policy import Policy
from neuromas.training.ledger import spending
from neuromas.training.reinforce import Advantage, Batch, Credits, advantages
from neuromas.types import Completion, Group, Prompt, Rollout

Text = tuple[Prompt, tuple[int, ...], tuple[int, ...]]
"""A prompt, the tokens after it, and the indices of those that were given and not sampled."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The log-probabilities of a step's texts with the bare backbone, at the temperature that they were sampled at."""

    groups: Sequence[Group]
    bare: Mapping[Text, float]

    @classmethod
    def of(cls, groups: Sequence[Group], bare: Policy, *, temperature: float, tokens_per_micro_batch: int) -> "Divergence":
        """Compute them by one forward of the bare backbone without gradients; what all nodes read alike, it reads once."""
        completions = {
            _text(completion): (completion, 0.0)
            for group in groups
            # Micro-batches take rows in order: those with one prefix have to lie together, whatever their node.
            for completion in sorted((c for r in group for c in r.completions), key=lambda c: c.prompt.prefix_ids)
        }
        batch = Batch(tuple(completions.values()), len(groups), bare.routing, temperature)
        with torch.no_grad():
            parts = [bare.logprobs(part.rows) for part in batch.split(tokens_per_micro_batch, bare.backbone.device)]
        by_text = torch.cat(parts).cpu().split([len(completion.sample.logprobs) for completion, _ in batch.completions])
        return cls(groups, {text: logprobs.sum().item() for text, logprobs in zip(completions, by_text, strict=True)})

    def per_token(self) -> float:
        """Return the mean of the log-ratios over all sampled tokens."""
        total = sum(self._log_ratio(c) for group in self.groups for rollout in group for c in rollout.completions)
        return total / spending(self.groups).sampled_tokens

    def penalties(self, node: int, *, shared_by: int = 1) -> Float[Tensor, "P G"]:
        """Return each rollout's sum over the text of this node and the texts that follow from it; 0 without such a text.

        It is centred over the group's rollouts that do not hold the node's text, as rewards are, which leaves it unbiased.
        """
        sums_PG = torch.tensor([[self._from_node(rollout, node) for rollout in group] for group in self.groups])
        return advantages(sums_PG, "leave_one_out" if sums_PG.shape[1] > 1 else "none", shared_by=shared_by)

    def taken_off(self, credits: Credits, coefficient: float, shared_by: Mapping[int, int]) -> Credits:
        """Return the credits with each text of the rollouts paying for the divergence, whatever the scheme gave it.

        The rollouts are the sample that the divergence is estimated from, so a replay pays nothing, and a text of a rollout
        without a credit gets one. It is no part of what a scheme normalizes, which in a group of equal rewards would blow it
        up to the size of a reward. `shared_by` is as in `penalties`, by node.
        """
        penalties = {node: coefficient * self.penalties(node, shared_by=times) for node, times in shared_by.items()}
        owed = defaultdict[int, list[tuple[Completion, Advantage]]](list)
        for text, penalty in Credits.of(self.groups, penalties).texts:
            # Rollouts of a tree hold one text together, and each pays for it.
            owed[id(text)].append((text, penalty))
        texts = []
        for text, advantage in credits.texts:
            mine = owed[id(text)]
            texts.append((text, _minus(advantage, mine.pop(0)[1]) if mine else advantage))
        texts += [(text, _minus(0.0, penalty)) for left in owed.values() for text, penalty in left]
        return replace(credits, texts=tuple(texts))

    def _from_node(self, rollout: Rollout, node: int) -> float:
        reached, total = {node}, 0.0
        # A text comes after all texts that it has read.
        for completion in rollout.completions:
            if completion.node in reached:
                reached |= {message.recipient for message in completion.messages}
                total += self._log_ratio(completion)
        return total

    def _log_ratio(self, completion: Completion) -> float:
        return sum(completion.sample.logprobs) - self.bare[_text(completion)]


def _minus(advantage: Advantage, penalty: Advantage) -> Advantage:
    assert not isinstance(penalty, tuple)
    return tuple(each - penalty for each in advantage) if isinstance(advantage, tuple) else advantage - penalty


def _text(completion: Completion) -> Text:
    return completion.prompt, completion.sample.token_ids, completion.sample.given

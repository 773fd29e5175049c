"""The estimator, as pure functions: rewards to advantages, rollouts to rows, log-probabilities to a loss.

Joint REINFORCE (Williams 1992; stochastic computation graphs, Schulman et al. 2015; arXiv 2605.16757): one terminal reward
trains every node through the log-probability of what it wrote itself,

    grad J = E[ sum over nodes n, sampled tokens t of  advantage * grad log p_n(token_t | what node n read and wrote) ].
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from neuromas.config import Centring
from neuromas.model.packing import Packed
from neuromas.model.policy import PrefixKey, Routing, Rows
from neuromas.system.process import return_freed_memory
from neuromas.types import Completion, Group, Replay


def advantages(
    rewards_PG: Float[Tensor, "P G"],
    centring: Centring,
    *,
    shared_by: int = 1,
    running_mean: float = 0.0,
    normalize: bool = False,
) -> Float[Tensor, "P G"]:
    """Centre rewards, for texts that `shared_by` consecutive rollouts have in common.

    `leave_one_out`: minus the mean of the group's other rollouts (Kool et al. 2019): those that do not hold the text, since the
    reward of one that does depends on it; unbiased.
    `group_mean`: minus the group's mean; the expected gradient is (G - 1) / G of the true one.
    `ema`: minus `running_mean`, a mean over earlier steps; unbiased. `none`: the reward itself.
    `normalize` divides by the group's standard deviation (Shao et al. 2024); biased towards groups of equal rewards.
    A group whose rewards are all equal, such as a group of one, gives 0 under the first two.

    >>> advantages(torch.tensor([[1.0, 0.0, 0.0]]), "leave_one_out")
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    group_size = rewards_PG.shape[1]
    if centring == "leave_one_out":
        # r - (sum - sum of those that share the text) / (G - shared_by) in one fraction, which is 0 for a group of one.
        same_PG = rewards_PG.unflatten(1, (-1, shared_by)).sum(2).repeat_interleave(shared_by, 1)
        others = group_size - shared_by
        centred = (others * rewards_PG - (rewards_PG.sum(1, keepdim=True) - same_PG)) / max(1, others)
    elif centring == "group_mean":
        centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    else:
        centred = rewards_PG - (running_mean if centring == "ema" else 0.0)
    if centring in ("leave_one_out", "group_mean"):
        # Sums of equal rewards are rounded: what they leave is no signal.
        centred = centred.masked_fill((rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True), 0.0)
    if normalize:
        # A group of equal rewards has nothing to compare: it teaches nothing, whatever is subtracted.
        spread_P1 = rewards_PG.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(rewards_PG)
        centred = torch.where(spread_P1 > 0, centred / spread_P1.clamp(min=1e-6), 0.0)
    return centred


Advantage = float | tuple[float, ...]
"""What a text is worth: one number for all its sampled tokens, or one for each of them."""


@dataclass(frozen=True, slots=True)
class Credits:
    """What the estimator takes: every text that may learn, each with its advantage, whichever rollout or replay it is from.

    The loss is their sum over `num_rollouts`, so a scheme that draws several texts where a rollout has one weighs each with
    its share.
    """

    texts: tuple[tuple[Completion, Advantage], ...]
    num_rollouts: int
    """Rollouts of the step, those without a gradient included: the denominator of the loss."""
    replays: tuple[Replay, ...] = ()
    """What was sampled beyond the rollouts to find the credits: the ledger counts it."""

    @classmethod
    def of(cls, groups: Sequence[Group], advantages: Mapping[int, Float[Tensor, "P G"]]) -> "Credits":
        """Return the credits of rollouts, given one advantage for each rollout and node."""
        weights = {node: advantages_PG.tolist() for node, advantages_PG in advantages.items()}
        texts = tuple(
            (completion, weights[completion.node][p][g])
            for p, group in enumerate(groups)
            for g, rollout in enumerate(group)
            for completion in rollout.completions
        )
        return cls(texts, sum(map(len, groups)))

    def signal(self, node: int) -> float:
        """Return the share of a node's texts with an advantage other than 0 in any token."""
        found = [teaches(advantage) for completion, advantage in self.texts if completion.node == node]
        return sum(found) / max(1, len(found))


def teaches(advantage: Advantage) -> bool:
    """Say whether a text with this advantage has a gradient."""
    return any(advantage) if isinstance(advantage, tuple) else advantage != 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of K sampled tokens with, per token, its advantage, the log-probability recorded while sampling, and its share
    of the entropy bonus of the row."""

    rows: Rows
    advantages_K: Tensor
    sampled_logprobs_K: Tensor
    shares_K: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """All completions of a step that carry a gradient, with their advantages; rows that share a prefix lie together."""

    completions: tuple[tuple[Completion, Advantage], ...]
    num_rollouts: int
    routing: Routing
    temperature: float
    bonus_of: Mapping[int, float] = field(default_factory=dict)
    """By node, the share of the entropy bonus that each of its texts is paid: below 1 where more texts than rollouts learn."""

    def split(self, tokens_per_micro_batch: int, device: torch.device) -> Iterator[MicroBatch]:
        """Yield rows whose own tokens and prefixes are at most so many together, one row at least.

        Rows that share a prefix stay together where they can: it is then read once. What a part has freed goes back to the
        system before the next one, whose tensors have other sizes.
        """
        for part in self._parts(tokens_per_micro_batch):
            yield self._tensors(part, device)
            return_freed_memory()

    def _parts(self, tokens_per_micro_batch: int) -> Iterator[list[tuple[Completion, Advantage]]]:
        part: list[tuple[Completion, Advantage]] = []
        tokens = 0
        for (prefix_ids, _), sharing in groupby(self.completions, lambda item: self._key(item[0])):
            rows = [(item, len(item[0].prompt.suffix_ids) + len(item[0].sample.token_ids)) for item in sharing]
            whole = len(prefix_ids) + sum(own for _, own in rows)
            if part and tokens + whole > tokens_per_micro_batch:
                yield part
                part, tokens = [], 0
            tokens += len(prefix_ids)
            for item, own in rows:
                if part and tokens + own > tokens_per_micro_batch:
                    yield part
                    part, tokens = [], len(prefix_ids)
                tokens += own
                part.append(item)
        if part:
            yield part

    def _key(self, completion: Completion) -> PrefixKey:
        return self.routing.prefix_key(completion.prompt, completion.node)

    def _tensors(self, part: Sequence[tuple[Completion, Advantage]], device: torch.device) -> MicroBatch:
        nodes = [self.routing.adapter_of(completion.node) for completion, _ in part]
        keys = [self._key(completion) for completion, _ in part]
        distinct = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        samples = [completion.sample for completion, _ in part]
        suffixes = Packed.of([(*completion.prompt.suffix_ids, *completion.sample.token_ids) for completion, _ in part], device)
        asked_B = torch.tensor([len(completion.prompt.suffix_ids) for completion, _ in part], device=device)
        is_sampled_T = suffixes.column_T >= asked_B[suffixes.row_T]
        if any(sample.given for sample in samples):
            firsts = (suffixes.lengths_B.cumsum(0) - suffixes.lengths_B + asked_B).tolist()
            given = [first + index for first, sample in zip(firsts, samples, strict=True) for index in sample.given]
            is_sampled_T[torch.tensor(given, device=device)] = False
        sampled_K = is_sampled_T.nonzero()[:, 0]
        rows = Rows(
            prefixes=Packed.of([prefix for prefix, _ in distinct], device),
            prefix_node_Q=torch.tensor([node for _, node in distinct], device=device),
            prefix_of_row_B=torch.tensor([distinct[key] for key in keys], device=device),
            node_of_row_B=torch.tensor(nodes, device=device),
            suffixes=suffixes,
            sampled_K=sampled_K,
            temperature=self.temperature,
        )
        weights = torch.tensor([weight for item in part for weight in per_token(*item)], device=device)
        sampled = torch.tensor([logprob for sample in samples for logprob in sample.logprobs], device=device)
        shares = [self.bonus_of.get(text.node, 1.0) / max(1, len(text.sample.logprobs)) for text, _ in part]
        return MicroBatch(rows, weights, sampled, torch.tensor(shares, device=device)[suffixes.row_T[sampled_K]])


def per_token(completion: Completion, advantage: Advantage) -> Sequence[float]:
    """Return the advantage of each sampled token of a text."""
    count = len(completion.sample.logprobs)
    if not isinstance(advantage, tuple):
        return [advantage] * count
    assert len(advantage) == count, f"{len(advantage)} advantages for {count} sampled tokens"
    return advantage


def build_batch(
    credits: Credits, *, routing: Routing, adapter_version: int, temperature: float, keep_all: bool = False
) -> Batch:
    """Return one row per text that has an advantage other than 0; the others have no gradient.

    `keep_all` keeps those too: an entropy bonus has a gradient in every text.
    Raises ValueError if a completion was written by another version of the adapters: the estimator is on-policy.
    """
    for completion, _ in credits.texts:
        written_by = completion.sample.adapter_version
        if written_by != adapter_version:
            raise ValueError(
                f"node {completion.node}'s completion was written by adapter version {written_by}, the learner holds "
                f"{adapter_version}; sample again with the current adapters"
            )
    chosen = [(completion, advantage) for completion, advantage in credits.texts if keep_all or teaches(advantage)]
    # Stable, so rows of one node and one question stay together and a prefix is computed in few micro-batches.
    chosen.sort(key=lambda item: item[0].node)
    # Replays learn too: their bonus is that of the rollouts, shared among all texts of a node.
    counts = Counter(completion.node for completion, _ in credits.texts)
    bonus_of = {node: min(1.0, credits.num_rollouts / count) for node, count in counts.items()}
    return Batch(tuple(chosen), credits.num_rollouts, routing, temperature, bonus_of)


MOST_WEIGHT = 2.0
"""Bound of importance weights."""


def importance_weights(
    logprobs_K: Float[Tensor, " K"], sampled_logprobs_K: Float[Tensor, " K"]
) -> tuple[Float[Tensor, " K"], float]:
    """Return each token's probability under the learner over that under the sampler, at most `MOST_WEIGHT`; no gradient.

    And the largest of them before that bound. In bfloat16 the two round differently, so the samples are of a slightly other
    policy (truncated importance sampling, Ionides 2008).
    """
    ratios_K = (logprobs_K.detach() - sampled_logprobs_K).exp()
    return ratios_K.clamp(max=MOST_WEIGHT), ratios_K.max().item()


def loss(logprobs_K: Float[Tensor, " K"], advantages_K: Float[Tensor, " K"], num_rollouts: int) -> Float[Tensor, ""]:
    """Return - sum over sampled tokens of advantage * log-probability, over the rollouts of the step.

    The denominator is fixed before sampling: a sum divided by sampled length is no longer the gradient of the expected reward.
    """
    return -(logprobs_K * advantages_K).sum() / num_rollouts


def entropy_loss(
    entropies_K: Float[Tensor, " K"], shares_K: Float[Tensor, " K"], coefficient: float, num_rollouts: int
) -> Float[Tensor, ""]:
    """Return - coefficient * sum over texts of the mean entropy at their sampled tokens, over the rollouts (Mnih et al. 2016).

    The mean, so that a message of many tokens is not paid more for being random than an answer of one. The gradient is exact
    at each token, from all the vocabulary's probabilities. What a token does to the entropy after it is left out: a node is
    not paid for writing more tokens.
    """
    return -coefficient * (entropies_K * shares_K).sum() / num_rollouts

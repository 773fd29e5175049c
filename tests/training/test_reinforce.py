"""The estimator: hand arithmetic, literal masks, and its exact expectation against the true gradient.

What these tests lock: a loss over sampled tokens and stop tokens only, over the number of rollouts, unbiased by default.
"""

from collections.abc import Callable
from itertools import product
from typing import Literal

import pytest
import torch
from torch import Tensor

from neuromas.config import Centring, Scope
from neuromas.model.packing import Packed
from neuromas.model.policy import Routing
from neuromas.training import reinforce
from neuromas.types import Completion, Example, Group, Prompt, Rollout, Sample

CPU = torch.device("cpu")
EXAMPLE = Example("id", "question", "gold", "")
STOP = 9


def completion(node: int, prefix: list[int], suffix: list[int], written: list[int], *, version: int = 0) -> Completion:
    logprobs = tuple(-0.5 - position for position in range(len(written)))
    sample = Sample(tuple(written), logprobs, ("",), stopped=written[-1] == STOP, adapter_version=version)
    return Completion(node, Prompt(tuple(prefix), tuple(suffix)), sample, ())


def group(*rollouts: list[Completion]) -> Group:
    return tuple(Rollout(EXAMPLE, index, tuple(completions)) for index, completions in enumerate(rollouts))


def build(groups: list[Group], advantages: list[list[float]], *, version: int = 0, scope: Scope = "suffix") -> reinforce.Batch:
    return reinforce.build_batch(
        reinforce.Credits.of(groups, dict.fromkeys((4, 7), torch.tensor(advantages))), routing=Routing((4, 7), scope),
        adapter_version=version, temperature=1.0,
    )  # fmt: skip


# Advantages


@pytest.mark.parametrize(
    ("centring", "expected"),
    [
        # 1 - (0 + 0 + 1) / 3 = 2/3; 0 - (1 + 0 + 1) / 3 = -2/3
        ("leave_one_out", [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        # mean 2/4: 1 - 1/2 and 0 - 1/2
        ("group_mean", [0.5, -0.5, -0.5, 0.5]),
        # running mean 0.2: 1 - 0.2 and 0 - 0.2
        ("ema", [0.8, -0.2, -0.2, 0.8]),
        ("none", [1.0, 0.0, 0.0, 1.0]),
    ],
)
def test_advantages_by_hand(centring: Centring, expected: list[float]) -> None:
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    advantages_PG = reinforce.advantages(rewards_PG, centring, running_mean=0.2)
    torch.testing.assert_close(advantages_PG, torch.tensor([expected]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("centring", "expected"),
    [
        # standard deviation of 1, 0, 0, 1: sqrt(4 * 0.25 / 3) = 0.57735; 2/3 / 0.57735 = 1.154701
        ("leave_one_out", [1.154701, -1.154701, -1.154701, 1.154701]),
        # 0.5 / 0.57735 = 0.866025
        ("group_mean", [0.866025, -0.866025, -0.866025, 0.866025]),
        # 0.8 / 0.57735 = 1.385641, -0.2 / 0.57735 = -0.346410
        ("ema", [1.385641, -0.346410, -0.346410, 1.385641]),
        # 1 / 0.57735 = 1.732051
        ("none", [1.732051, 0.0, 0.0, 1.732051]),
    ],
)
def test_normalized_advantages_by_hand(centring: Centring, expected: list[float]) -> None:
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    advantages_PG = reinforce.advantages(rewards_PG, centring, running_mean=0.2, normalize=True)
    torch.testing.assert_close(advantages_PG, torch.tensor([expected]), rtol=0, atol=1e-5)


def test_groups_are_centred_one_by_one() -> None:
    # 1 - (0 + 0) / 2 = 1, 0 - (1 + 0) / 2 = -1/2; 0 - (1 + 1) / 2 = -1, 1 - (0 + 1) / 2 = 1/2
    advantages_PG = reinforce.advantages(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]), "leave_one_out")
    assert advantages_PG.tolist() == [[1.0, -0.5, -0.5], [-1.0, 0.5, 0.5]]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("centring", ["leave_one_out", "group_mean"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7])
def test_equal_rewards_teach_nothing(centring: Centring, reward: float, normalize: bool) -> None:
    advantages_PG = reinforce.advantages(torch.full((2, 7), reward), centring, normalize=normalize)
    assert advantages_PG.tolist() == [[0.0] * 7] * 2


@pytest.mark.parametrize("centring", ["leave_one_out", "group_mean"])
def test_a_group_of_one_teaches_nothing(centring: Centring) -> None:
    assert reinforce.advantages(torch.tensor([[1.0], [0.0]]), centring).tolist() == [[0.0], [0.0]]


def test_an_all_wrong_group_without_centring_teaches_nothing_and_under_ema_is_pushed_down() -> None:
    wrong_PG = torch.zeros(1, 3)
    assert reinforce.advantages(wrong_PG, "none").tolist() == [[0.0] * 3]
    # 0 - 0.25
    assert reinforce.advantages(wrong_PG, "ema", running_mean=0.25).tolist() == [[-0.25] * 3]


# Rows and masks


def rows_of(packed: Packed) -> list[list[int]]:
    return [ids.tolist() for ids in packed.ids_T.split(packed.lengths_B.tolist())]


def test_what_is_learned_is_sampled_tokens_and_the_stop_token_and_nothing_else() -> None:
    first = completion(4, [1, 2], [3], [5, 6, STOP])
    parents_text = [5, 6]
    second = completion(7, [1, 2], [8, *parents_text], [5, STOP])
    cut_off = completion(7, [1, 2, 3], [8], [6, 6, 6])
    batch = build([group([first, second]), group([cut_off])], [[2.0], [-1.0]])
    (micro,) = batch.split(1000, CPU)
    rows = micro.rows
    assert rows_of(rows.prefixes) == [[1, 2], [1, 2, 3]]
    assert rows.prefix_of_row_B.tolist() == [0, 0, 1]
    assert rows.node_of_row_B.tolist() == [0, 1, 1]
    assert rows_of(rows.suffixes) == [[3, 5, 6, STOP], [8, 5, 6, 5, STOP], [8, 6, 6, 6]]
    # Prompts and parents' text lie before them.
    assert rows.sampled_K.tolist() == [1, 2, 3, 7, 8, 10, 11, 12]
    assert micro.advantages_K.tolist() == [2.0] * 3 + [2.0] * 2 + [-1.0] * 3
    assert micro.sampled_logprobs_K.tolist() == [-0.5, -1.5, -2.5, -0.5, -1.5, -0.5, -1.5, -2.5]


@pytest.mark.parametrize(
    ("scope", "prefixes", "prefix_nodes", "prefix_of_row"),
    [
        ("suffix", [[1, 2]], [0], [0, 0, 0]),
        ("all", [[1, 2], [1, 2]], [0, 1], [0, 0, 1]),
    ],
)
def test_a_prefix_is_kept_once_for_all_its_readers(
    scope: Literal["all", "suffix"], prefixes: list[list[int]], prefix_nodes: list[int], prefix_of_row: list[int]
) -> None:
    four, seven = completion(4, [1, 2], [3], [STOP]), completion(7, [1, 2], [8], [STOP])
    (micro,) = build([group([four, seven], [four])], [[1.0, 1.0]], scope=scope).split(1000, CPU)
    assert rows_of(micro.rows.prefixes) == prefixes
    assert micro.rows.prefix_node_Q.tolist() == prefix_nodes
    assert micro.rows.prefix_of_row_B.tolist() == prefix_of_row
    assert micro.rows.node_of_row_B.tolist() == [0, 0, 1]


def test_micro_batches_hold_every_row_once() -> None:
    groups = [group(*[[completion(4, [1], [3], [token, STOP])] for token in (5, 6, 7)])]
    batch = build(groups, [[1.0, 2.0, 3.0]])
    # A prefix of one token and rows of three: seven for two rows, which share it.
    parts = list(batch.split(7, CPU))
    assert [part.advantages_K.tolist() for part in parts] == [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0]]
    assert [rows_of(part.rows.suffixes) for part in parts] == [[[3, 5, STOP], [3, 6, STOP]], [[3, 7, STOP]]]
    assert [part.rows.suffixes.rows for part in batch.split(6, CPU)] == [1, 1, 1]
    assert [part.rows.suffixes.rows for part in batch.split(1, CPU)] == [1, 1, 1], (
        "a row may be longer than all that is allowed"
    )


def test_rollouts_without_an_advantage_make_no_row_but_count_in_the_denominator() -> None:
    row = [completion(4, [1], [3], [5, STOP])]
    batch = build([group(row, row), group(row, row)], [[1.0, -1.0], [0.0, 0.0]])
    assert len(batch.completions) == 2
    assert batch.num_rollouts == 4
    assert build([group(row, row)], [[0.0, 0.0]]).completions == ()


def test_the_loss_is_a_sum_over_tokens_divided_by_rollouts() -> None:
    logprobs_K, advantages_K = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([2.0, 2.0, -1.0])
    # - (2 * -1 + 2 * -2 + (-1) * -3) / 4 = - (-6 + 3) / 4 = 0.75
    loss = reinforce.loss(logprobs_K, advantages_K, num_rollouts=4)
    assert loss.item() == 0.75


def test_another_adapter_version_is_refused() -> None:
    stale = group([completion(4, [1], [3], [STOP], version=2)])
    expected = "node 4's completion was written by adapter version 2, the learner holds 3; sample again"
    with pytest.raises(ValueError, match=expected):
        build([stale], [[1.0]], version=3)
    # Also where the rollout would carry no gradient: a stale group is a mistake of the loop.
    with pytest.raises(ValueError, match=expected):
        build([stale], [[0.0]], version=3)
    assert len(build([stale], [[1.0]], version=2).completions) == 1


# The exact gradient, by enumeration

GROUP_SIZE = 2


def expected_gradient(
    outcomes: list[tuple[Tensor, list[Tensor], float]],
    parameters: list[Tensor],
    estimate: Callable[[list[list[Tensor]], Tensor], Tensor],
) -> list[Tensor]:
    """Return the expectation of the loss's gradient over every group of outcomes, weighted by its probability.

    An outcome is (probability, log-probabilities of the rows it writes, reward).
    """
    total = torch.zeros((), dtype=torch.float64)
    for drawn in product(outcomes, repeat=GROUP_SIZE):
        probability = torch.stack([outcome[0] for outcome in drawn]).prod().detach()
        rewards_PG = torch.tensor([[outcome[2] for outcome in drawn]], dtype=torch.float64)
        total = total + probability * estimate([outcome[1] for outcome in drawn], rewards_PG)
    return list(torch.autograd.grad(total, parameters, retain_graph=True))


def true_gradient(outcomes: list[tuple[Tensor, list[Tensor], float]], parameters: list[Tensor]) -> list[Tensor]:
    """Return the gradient of minus the expected reward."""
    expected_reward = torch.stack([probability * reward for probability, _, reward in outcomes]).sum()
    return list(torch.autograd.grad(-expected_reward, parameters, retain_graph=True))


def cosine_and_ratio(estimated: Tensor, true: Tensor) -> tuple[float, float]:
    norms = estimated.norm() * true.norm()
    return (estimated.flatten() @ true.flatten() / norms).item(), (estimated.norm() / true.norm()).item()


def draw_parameters(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("centring", "ratio"),
    [("leave_one_out", 1.0), ("none", 1.0), ("ema", 1.0), ("group_mean", (GROUP_SIZE - 1) / GROUP_SIZE)],
)
def test_two_node_chain_exact_gradient(centring: Centring, ratio: float) -> None:
    """Node 1 writes one of three symbols, node 2 reads it and writes one of three; one bit of reward at the end."""
    symbols = range(3)
    first, second = parameters = draw_parameters(1, (3,), (3, 3))
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    outcomes = []
    for message, answer in product(symbols, symbols):
        logprobs = [first.log_softmax(-1)[message], second.log_softmax(-1)[message, answer]]
        outcomes.append((torch.stack(logprobs).sum().exp(), logprobs, rewards[message][answer]))

    def estimate(rows: list[list[Tensor]], rewards_PG: Tensor) -> Tensor:
        advantages_PG = reinforce.advantages(rewards_PG, centring, running_mean=0.3)
        logprobs_K = torch.stack([logprob for rollout in rows for logprob in rollout])
        # One token per node: both are weighted by their rollout's advantage.
        return reinforce.loss(logprobs_K, advantages_PG.flatten().repeat_interleave(2), GROUP_SIZE)

    estimated = expected_gradient(outcomes, parameters, estimate)
    for node, true in zip(estimated, true_gradient(outcomes, parameters), strict=True):
        assert true.norm() > 0.01
        assert cosine_and_ratio(node, true) == pytest.approx((1.0, ratio), abs=1e-9)


@pytest.mark.parametrize(("centring", "biased"), [("leave_one_out", False), ("ema", False), ("group_mean", True)])
def test_a_tree_has_the_exact_gradient_in_every_layer(centring: Centring, biased: bool) -> None:
    """Two nodes, two branches: leaves 0 and 1 share the first text, 2 and 3 the other; each node writes one of two symbols."""
    symbols = range(2)
    first, second = parameters = draw_parameters(3, (2,), (2, 2))
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    head, tail = first.log_softmax(-1), second.log_softmax(-1)
    total = torch.zeros((), dtype=torch.float64)
    for texts in product(symbols, repeat=2):
        for answers in product(symbols, repeat=4):
            before = [texts[0], texts[0], texts[1], texts[1]]
            rewards_PG = torch.stack([rewards[a, b] for a, b in zip(before, answers, strict=True)])[None]
            rows = [(head[a], tail[a, b]) for a, b in zip(before, answers, strict=True)]
            # Each text is drawn once, however many leaves hold it.
            probability = (head[texts[0]] + head[texts[1]] + sum(own for _, own in rows)).exp().detach()
            for layer, shared_by in ((0, 2), (1, 1)):
                advantages_PG = reinforce.advantages(rewards_PG, centring, shared_by=shared_by, running_mean=0.3)
                logprobs_K = torch.stack([row[layer] for row in rows])
                total = total + probability * reinforce.loss(logprobs_K, advantages_PG[0], 4)
    expected = (head.exp()[:, None] * tail.exp() * rewards).sum()
    true = torch.autograd.grad(-expected, parameters, retain_graph=True)
    for node, gradient in zip(torch.autograd.grad(total, parameters), true, strict=True):
        assert gradient.norm() > 0.01
        ratio = cosine_and_ratio(node, gradient)[1]
        assert (abs(ratio - 1) > 0.1) if biased else ratio == pytest.approx(1.0, abs=1e-9)


def stop_symbol_outcomes(parameters: list[Tensor], *, learn_stop: bool) -> list[tuple[Tensor, list[Tensor], float]]:
    """Return every text of at most two tokens over a, b and stop, with its probability, log-probabilities and reward."""
    a, b, stop = range(3)
    empty, after = parameters
    outcomes = []
    for text in [(stop,), *product((a, b), (a, b, stop))]:
        logprobs = torch.stack([empty.log_softmax(-1)[text[0]], *(after.log_softmax(-1)[text[0], token] for token in text[1:])])
        learned = torch.tensor([learn_stop or token != stop for token in text])
        # `a` alone is right, and so is nothing at all: stopping is half of the task.
        outcomes.append((logprobs.sum().exp(), [logprobs * learned], float(text in ((a, stop), (stop,)))))
    return outcomes


@pytest.mark.parametrize("learn_stop", [True, False])
def test_stop_symbol_exact_gradient_with_varying_lengths(learn_stop: bool) -> None:
    parameters = draw_parameters(2, (3,), (2, 3))

    def estimate(rows: list[list[Tensor]], rewards_PG: Tensor) -> Tensor:
        texts = [logprobs for (logprobs,) in rows]
        advantages_B = reinforce.advantages(rewards_PG, "leave_one_out").flatten()
        advantages_K = advantages_B.repeat_interleave(torch.tensor([len(logprobs) for logprobs in texts]))
        return reinforce.loss(torch.cat(texts), advantages_K, GROUP_SIZE)

    outcomes = stop_symbol_outcomes(parameters, learn_stop=learn_stop)
    estimated = torch.cat([gradient.flatten() for gradient in expected_gradient(outcomes, parameters, estimate)])
    true = torch.cat([gradient.flatten() for gradient in true_gradient(outcomes, parameters)])
    cosine, ratio = cosine_and_ratio(estimated, true)
    if learn_stop:
        assert (cosine, ratio) == pytest.approx((1.0, 1.0), abs=1e-9)
    else:
        assert cosine < 0.9, "a loss without the stop token should miss the true gradient"


def test_importance_weights_are_the_ratio_of_probabilities_up_to_their_bound() -> None:
    learner_K = torch.tensor([-1.0, -2.0, 0.0], requires_grad=True)
    weights_K, largest = reinforce.importance_weights(learner_K, torch.tensor([-1.0, -1.5, -3.0]))
    torch.testing.assert_close(weights_K, torch.tensor([1.0, 0.6065307, 2.0]))
    # exp 3: what is told is the ratio before its bound, or nobody would see that it was cut.
    assert largest == pytest.approx(20.085537)
    assert not weights_K.requires_grad

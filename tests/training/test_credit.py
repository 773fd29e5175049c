"""Credit schemes: a worked example of each on the scripted engine, the exact gradient by enumeration, runs, mistakes."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, save_model
from torch import Tensor

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, Credit, PromptConfig, TopologyConfig, TrainConfig
from neuromas.model.policy import Routing
from neuromas.rollout.engine import OnSample
from neuromas.rollout.network import Diverged
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.tasks import Navigate
from neuromas.training.credit import SCHEMES, Credits, Step
from neuromas.training.credit.critic import Critic
from neuromas.training.divergence import Divergence
from neuromas.training.learner import TorchLearner
from neuromas.training.ledger import Pace
from neuromas.training.loop import train_step
from neuromas.training.plan import resolve
from neuromas.training.reinforce import advantages, build_batch
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import set_up
from neuromas.training.trainer import Trainer
from neuromas.types import Example, Group, Request, Sample

QUESTION = Example("q", "Question?", "Yes", "Write the answer.")
SMALL = AdapterConfig(rank=1, target_modules=("q_proj",))
CHAIN = Topology.layered([1, 1, 1])
SEED = (0, 0)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone.tiny(0)


Say = Callable[[Request], str]


def step_of(backbone: Backbone, topology: Topology, say: Say, credit: Credit, group_size: int = 2, **changes: Any) -> Step:
    """Return a step of one question whose nodes write what a script says."""
    config = TrainConfig(credit=credit, group_size=group_size, **changes).check()
    network = Network(topology, backbone, adapter=SMALL, engine=ScriptedEngine(say), read=Navigate().parse_answer)
    groups = network.rollout([QUESTION], group_size, seed=SEED)
    rewards_PG = torch.tensor([Navigate().rewards([(r.example, r.answer) for r in groups[0]])])
    return Step(config=config, network=network, task=Navigate(), seed=SEED, groups=groups, terminal_PG=rewards_PG)


def draw_of(request: Request) -> str:
    """Return which text of a node this is: `1` of rollout 1, `1+2` of its second replay."""
    rollout, drawn = request.seed[-2], request.seed[4:-3] if "replay" in request.seed else ()
    return f"{rollout}+{drawn[0]}" if drawn else str(rollout)


def called(step: Step) -> list[tuple[int, str]]:
    assert isinstance(step.network.engine, ScriptedEngine)
    return [(request.node, draw_of(request)) for request in step.network.engine.requests]


def given(credits: Credits) -> list[tuple[int, str, Any]]:
    """Return node, what it said, and its advantage, one for all of its tokens."""
    return [(c.node, c.text.rpartition(": ")[2], pytest.approx(advantage, abs=1e-6)) for c, advantage in credits.texts]


def says(topology: Topology, right: Iterable[str]) -> Say:
    """Return a script in which each node says which of its texts it is; the output node is right in the named ones."""
    right = set(right)

    def say(request: Request) -> str:
        recipients = topology.recipients(request.node)
        mine = f"{request.node}.{draw_of(request)}"
        return "\n".join(f"TO node {r}: {mine}" for r in recipients) or f"Answer: {'Yes' if mine in right else 'No'}"

    return say


# Worked examples


def test_shared_gives_all_nodes_of_a_rollout_the_same(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), "shared", group_size=3)
    # 0 - (1 + 0) / 2 = -1/2; 1 - 0 = 1; 0 - (0 + 1) / 2 = -1/2
    expected = [(rollout, a) for rollout, a in ((0, -0.5), (1, 1.0), (2, -0.5))]
    assert given(SCHEMES["shared"].credit(step)) == [
        (node, f"{node}.{g}" if node < 3 else ("Yes" if g == 1 else "No"), a) for g, a in expected for node in (1, 2, 3)
    ]
    assert (step.replays, step.metrics) == ([], {})


def test_per_node_is_the_normalized_group_until_nodes_have_rewards_of_their_own(backbone: Backbone) -> None:
    credits = SCHEMES["per_node"].credit(step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), "per_node", group_size=4))
    normalized = advantages(torch.tensor([[0.0, 1.0, 0.0, 0.0]]), "group_mean", normalize=True)
    assert credits.texts == Credits.of(step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), "shared", 4).groups,
                                       dict.fromkeys((1, 2, 3), normalized)).texts  # fmt: skip

    def say(request: Request) -> str:
        # Node 1 addresses nobody in rollout 0.
        return "hm" if (request.node, draw_of(request)) == (1, "0") else says(CHAIN, {"3.1"})(request)

    step = step_of(backbone, CHAIN, say, "per_node", format_bonus=0.5)
    # Node 1 gets 0 and 1 + 1/2, the others 1/2 and 1 + 1/2: mean 3/4, deviation 1.06066, and mean 1, deviation 0.70711.
    assert [a for _, _, a in given(SCHEMES["per_node"].credit(step))] == [-0.707107] * 3 + [0.707107] * 3
    assert step.local_rewards(step.groups[0], 1) == [0.0, 0.5]
    # A node that joins later has written nothing in a rollout through the network before.
    assert step.local_rewards(step.groups[0], 4) == [0.0, 0.0]


def test_replay_compares_texts_at_the_same_context(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.0", "3.1+1"}), "replay")
    credits = SCHEMES["replay"].credit(step)
    # Node 1 reads the question alone: nothing is replayed. Node 2's other text is followed by node 3, node 3's by nothing.
    assert called(step)[6:] == [(2, "0+1"), (2, "1+1"), (3, "0+1"), (3, "1+1"), (3, "0+1"), (3, "1+1")]
    # Rewards 1 and 0. Other texts of nodes 2 and 3: wrong in rollout 0, right in rollout 1. K = 2: differences by 2.
    assert given(credits) == [
        (1, "1.0", 1.0), (1, "1.1", -1.0),
        (2, "2.0", 0.5), (2, "2.0+1", -0.5), (3, "Yes", 0.5), (3, "No", -0.5),
        (2, "2.1", -0.5), (2, "2.1+1", 0.5), (3, "No", -0.5), (3, "Yes", 0.5),
    ]  # fmt: skip
    assert credits.num_rollouts == 2
    assert len(step.replays) == 4
    assert step.metrics["replay_tokens/sum"] == sum(len(c.sample.logprobs) for r in step.replays for c in r.written)


def test_removal_takes_off_what_is_right_without_the_message(backbone: Backbone) -> None:
    topology = Topology.layered([2, 1])

    def say(request: Request) -> str:
        if request.node < 3:
            return f"TO node 3: {request.node}"
        prompt = backbone.detokenize(request.prompt.suffix_ids)
        # Both messages are needed in rollout 0, node 2's alone in rollout 1.
        right = "node 2: 2" in prompt and (request.seed[-2] == 1 or "node 1: 1" in prompt)
        return f"Answer: {'Yes' if right else 'No'}"

    step = step_of(backbone, topology, say, "removal")
    credits = SCHEMES["removal"].credit(step)
    # Without node 1, without node 2, in each rollout; without node 3 there is nothing to sample.
    assert called(step)[6:] == [(3, "0"), (3, "0"), (3, "1"), (3, "1")]
    # Node 1: 1 - 0 and 1 - 1; node 2: 1 - 0 twice; node 3: 1 - 0 twice. Centred on the other rollout.
    assert [(node, a) for node, _, a in given(credits)] == [(1, 1.0), (2, 0.0), (3, 0.0), (1, -1.0), (2, 0.0), (3, 0.0)]


def test_removal_takes_off_the_luck_of_what_follows_in_a_chain(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), "removal")
    # Node 3 is right in rollout 1 whatever it reads: with the same random numbers it is so without a message, too.
    assert [(node, a) for node, _, a in given(SCHEMES["removal"].credit(step))] == [
        (1, 0.0), (2, 0.0), (3, -1.0), (1, 0.0), (2, 0.0), (3, 1.0),
    ]  # fmt: skip


def test_removal_of_a_vote(backbone: Backbone) -> None:
    topology = Topology.layered([3], vote=True)
    step = step_of(backbone, topology, lambda request: f"Answer: {'Yes' if request.node > 1 else 'No'}", "removal")
    found = step.replay([(step.groups[0][0], node, 0) for node in (1, 2, 3)], remove=True)
    # No, Yes, Yes: without a Yes it is a tie, which goes to the first.
    assert [Navigate().parse_answer(each.rollout.answer) for each in found] == ["Yes", "No", "No"]
    assert [each.written for each in found] == [()] * 3


def test_a_tree_branches_at_one_node(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.0", "3.1", "3.1+1"}), "tree", replays=2)
    credits = SCHEMES["tree"].credit(step)
    # This question's draw is node 2: two more texts of it in each rollout, and what follows.
    assert sorted(called(step)[6:]) == sorted((node, f"{g}+{k}") for node in (2, 3) for g in (0, 1) for k in (1, 2))
    # Leaves: 1 0 0 and 1 1 0. Node 1: 1/3 - 2/3 and 2/3 - 1/3. In a tree r - mean of the other two, and a third of that.
    assert given(credits) == [
        (1, "1.0", -1 / 3),
        (2, "2.0", 1 / 3), (3, "Yes", 1 / 3), (2, "2.0+1", -1 / 6), (3, "No", -1 / 6), (2, "2.0+2", -1 / 6), (3, "No", -1 / 6),
        (1, "1.1", 1 / 3),
        (2, "2.1", 1 / 6), (3, "Yes", 1 / 6), (2, "2.1+1", 1 / 6), (3, "Yes", 1 / 6), (2, "2.1+2", -1 / 3), (3, "No", -1 / 3),
    ]  # fmt: skip


def test_turn_groups_go_on_from_the_best(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.1", "3.1+2"}), "turn_groups", group_size=3)
    credits = SCHEMES["turn_groups"].credit(step)
    # Rollout 1 is right: node 2 is asked twice more at its message, then node 3 at the best of node 2's, again rollout 1's.
    assert sorted(called(step)[9:13]) == [(2, "1+1"), (2, "1+2"), (3, "1+1"), (3, "1+2")]
    assert called(step)[13:] == [(3, "1+1"), (3, "1+2")]
    # 0 1 0: mean 1/3, deviation 0.57735; 1 0 1 for nodes 2 and 3, which the second replay answers right.
    low, high = -0.577350, 1.154701
    assert given(credits) == [
        (1, "1.0", low), (1, "1.1", high), (1, "1.2", low),
        (2, "2.1", -low), (2, "2.1+1", -high), (2, "2.1+2", -low),
        (3, "Yes", -low), (3, "No", -high), (3, "Yes", -low),
    ]  # fmt: skip
    assert credits.num_rollouts == 3


def critic_of(backbone: Backbone, heads: Sequence[int], biases: Sequence[float]) -> Critic:
    critic = Critic(backbone, heads, lr=0.02)
    with torch.no_grad():
        critic.biases.copy_(torch.tensor(biases))
    return critic


def test_critics_spread_the_reward_of_the_end(backbone: Backbone) -> None:
    names: tuple[Credit, ...] = ("own_critics", "central_critic", "sequential_critic")
    steps = {name: step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), name) for name in names}
    steps["own_critics"].critic = critic_of(backbone, (1, 2, 3), (0.1, 0.2, 0.3))
    for name in names[1:]:
        steps[name].critic = critic_of(backbone, (0,), (0.5,))
    found = {name: [a for _, _, a in given(SCHEMES[name].credit(steps[name]))] for name in names}
    # r - V_n, in rollouts with rewards 0 and 1.
    assert found["own_critics"] == [-0.1, -0.2, -0.3, 0.9, 0.8, 0.7]
    # V is 1/2 everywhere: no turn changes it but the last, by 0 - 1/2 or 1 - 1/2.
    assert found["central_critic"] == [0.0, 0.0, -0.5, 0.0, 0.0, 0.5]
    # delta = 0.99 / 2 - 1/2 = -0.005, -0.005, r - 1/2, with 0.99 * 0.95 = 0.9405 for each node further on:
    # -0.5; -0.005 - 0.9405 * 0.5 = -0.47525; -0.005 - 0.9405 * 0.47525 = -0.451973; and 0.5; 0.46525; 0.432568.
    assert found["sequential_critic"] == [-0.451973, -0.47525, -0.5, 0.432568, 0.46525, 0.5]
    # It learns after that: towards rewards of mean 1/2.
    assert steps["own_critics"].metrics["critic_error/mean"] == pytest.approx(sum(
        (r - v) ** 2 for r, v in product((0, 1), (0.1, 0.2, 0.3))) / 6)  # fmt: skip
    critic = steps["own_critics"].critic
    assert critic is not None
    assert (critic.biases > torch.tensor([0.1, 0.2, 0.3])).all()


def test_a_central_critic_reads_the_history(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), "central_critic")
    step.critic = critic_of(backbone, (0,), (0.0,))
    seen: list[str] = []
    states = step.critic.prompt_states

    def reads(prompts: Any) -> Tensor:
        seen.extend(backbone.detokenize((*prompt.prefix_ids, *prompt.suffix_ids)) for prompt in prompts)
        return states(prompts)

    step.critic.prompt_states = reads  # type: ignore[method-assign]  # only to see what it is given
    SCHEMES["central_critic"].credit(step)
    histories = [text.partition("Question?")[2].split() for text in seen[:3]]
    assert [sum(word.startswith(("1.0", "2.0")) for word in history) for history in histories] == [0, 1, 2]
    # Messages begin lines of their own, as in what nodes read.
    assert not any("\\n" in text for text in seen)


def test_a_learned_value_is_taken_off_the_reward(backbone: Backbone) -> None:
    """V is the critic's own: a head with weights, so that inboxes have different values."""
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.1"}), "value")
    step.critic = critic_of(backbone, (0,), (0.25,))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        step.critic.weights.copy_(torch.randn(step.critic.weights.shape, generator=generator))
    texts = [c for _, _, c in step.texts]
    v = step.critic.values(step.critic.prompt_states([c.prompt for c in texts]), [0] * 6).tolist()
    by_token = [step.critic.values(states, [0] * len(states)).tolist() for states in step.critic.states(texts)]
    assert [values[0] for values in by_token] == pytest.approx(v)
    assert abs(v[1] - v[4]) > 1e-3, "node 2 reads other messages in the two rollouts"
    saved = {name: tensor.clone() for name, tensor in step.critic.state().items()}
    found = [a for _, _, a in given(SCHEMES["value"].credit(step))]
    # (0 - V) - (1 - V'), and the other way round. Node 1 reads the same in both.
    differences = [-1 - v[n] + v[n + 3] for n in range(3)]
    assert found == [*differences, *(-d for d in differences)]
    assert differences[0] == pytest.approx(-1)
    step.critic.load_state(saved)
    tokens = SCHEMES["token_value"].credit(step)
    for index, (_, advantage) in enumerate(tokens.texts):
        reward, other = float(index > 2), index + 3 if index < 3 else index - 3
        assert advantage == pytest.approx([reward - value - (1 - reward - v[other]) for value in by_token[index]], abs=1e-5)


# The exact gradient, by enumeration

SYMBOLS = "ab"
PAIR = Topology.layered([1, 1])
RIGHT = {"aa": 1.0, "ab": 0.0, "ba": 0.25, "bb": 1.0, "na": 0.5, "nb": 0.25, "": 0.125}
"""Reward by what node 2 has read (n: nothing) and what it then wrote; the last where it is left out."""


class Table(Navigate):
    def rewards(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
        return [RIGHT[text] for _, text in pairs]


class Nodes:
    """Node 1 writes two symbols and sends the last one, or one symbol; node 2 reads it and writes one.

    Contexts of node 2 are `alike` in their probabilities, unless that would hide what is tested: it leaves fewer outcomes.
    """

    def __init__(self, *, tokens: int, alike: bool) -> None:
        logits = (
            [[0.4, 0.0]],
            [[0.9, 0.0], [-0.5, 0.0]],
            [[0.8, 0.0], [0.8 if alike else -0.3, 0.0], [0.8 if alike else 0.2, 0.0]],
        )
        self.parameters = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in logits]
        first, after, second = (each.log_softmax(-1) for each in self.parameters)
        texts = list(product(range(2), repeat=tokens))
        self.of_first = {text: [first[0, text[0]], *(after[pair] for pair in pairwise(text))] for text in texts}
        # One thing is enough to enumerate: with two symbols before it, node 2 always writes `a`.
        written = range(2) if tokens == 1 else range(1)
        self.of_second = [{(x,): [second[read, x] if tokens == 1 else torch.zeros(())] for x in written} for read in range(3)]

    def expected_reward(self) -> Tensor:
        whole = [
            (torch.stack([*one, *two]).sum().exp(), RIGHT[SYMBOLS[text[-1]] + SYMBOLS[answer[0]]])
            for text, one in self.of_first.items()
            for answer, two in self.of_second[text[-1]].items()
        ]
        return torch.stack([probability * reward for probability, reward in whole]).sum()

    def expected_divergence(self) -> Tensor:
        """Return E[log p - log p_bare] of whole rollouts, where bare nodes write either symbol alike."""
        whole = [
            torch.stack([*one, *two]).sum() for text, one in self.of_first.items() for two in self.of_second[text[-1]].values()
        ]
        return torch.stack([logprob.exp() * (logprob + 2 * math.log(2)) for logprob in whole]).sum()


class Enumerated:
    """An engine that inverts distribution functions; its draws can be gone through outcome by outcome.

    Requests of one seed have one uniform number. It lies in one of the intervals between the cumulative probabilities that
    the node has in any context, so that each choice of intervals is one outcome.
    """

    def __init__(self, backbone: Backbone, nodes: Nodes) -> None:
        self.backbone, self.nodes = backbone, nodes
        self.tape: list[tuple[int, int]] = []
        """(choice, number of choices) of each distinct seed, in the order of the draws."""

    def begin(self) -> None:
        self.uniforms: dict[tuple[int | str, ...], float] = {}
        self.probability = 1.0

    def advance(self) -> bool:
        """Turn to the next outcome; False after the last."""
        while self.tape and self.tape[-1][0] + 1 == self.tape[-1][1]:
            self.tape.pop()
        if self.tape:
            self.tape[-1] = (self.tape[-1][0] + 1, self.tape[-1][1])
        return bool(self.tape)

    def distribution(self, request: Any) -> dict[tuple[int, ...], list[Tensor]]:
        """Return the log-probabilities of each text of a node, token by token, at what it reads."""
        return self.nodes.of_first if request.node == 1 else self.nodes.of_second[self.read(request.prompt)]

    def divergence(self, groups: Sequence[Group]) -> Divergence:
        """Return that from the bare nodes; samples are recorded with 0, so that the whole log-ratio is in what they give."""
        texts = [c for group in groups for rollout in group for c in rollout.completions]
        logprobs = [torch.stack(self.distribution(c)[tuple(t - 5 for t in c.sample.token_ids)]).sum().item() for c in texts]
        bare = [-(logprob + math.log(2)) for logprob in logprobs]
        return Divergence(groups, dict(zip(((c.prompt, c.sample.token_ids, c.sample.given) for c in texts), bare, strict=True)))

    def read(self, prompt: Any) -> int:
        whole = self.backbone.detokenize(prompt.suffix_ids)
        return next(i for i, text in enumerate(("1: a", "1: b", "(nothing)")) if text in whole)

    def generate(self, requests: Any, on_sample: OnSample, *, temperature: float, max_new_tokens: int) -> None:
        waiting = list(requests)
        while waiting:
            key, request = waiting.pop(0)
            found = self.distribution(request)
            u = self.uniform(request)
            text = next(t for t, top in zip(found, cumulative(found), strict=True) if u < top)
            said = f"TO node 2: {SYMBOLS[text[-1]]}" if request.node == 1 else (SYMBOLS + "n")[self.read(request.prompt)]
            said += SYMBOLS[text[0]] if request.node == 2 else ""
            ids = tuple(5 + symbol for symbol in text)
            waiting += on_sample(key, Sample(ids, (0.0,) * len(ids), (said,), stopped=True, adapter_version=0))

    def uniform(self, request: Any) -> float:
        if request.seed not in self.uniforms:
            contexts = [self.nodes.of_first] if request.node == 1 else self.nodes.of_second
            edges = sorted({0.0, 1.0, *(top for context in contexts for top in cumulative(context)[:-1])})
            if len(self.uniforms) == len(self.tape):
                self.tape.append((0, len(edges) - 1))
            choice = self.tape[len(self.uniforms)][0]
            self.probability *= edges[choice + 1] - edges[choice]
            self.uniforms[request.seed] = (edges[choice] + edges[choice + 1]) / 2
        return self.uniforms[request.seed]


def cumulative(texts: dict[tuple[int, ...], list[Tensor]]) -> list[float]:
    probabilities = torch.stack([torch.stack(logprobs).sum() for logprobs in texts.values()]).exp().detach()
    return [*probabilities.cumsum(0)[:-1].tolist(), 1.0]


def gradients(
    backbone: Backbone, credit: Credit, tokens: int = 1, divergence: float = 0.0, **changes: Any
) -> list[tuple[Tensor, Tensor]]:
    """Return, for each node's logits, the expected gradient of the loss over all outcomes, and the true one.

    The true one is that of minus the reward, plus `divergence` times the divergence from bare nodes.
    """
    config, nodes = TrainConfig(credit=credit, group_size=2, **changes).check(), Nodes(tokens=tokens, alike=credit != "removal")
    engine = Enumerated(backbone, nodes)
    network = Network(PAIR, backbone, adapter=SMALL, engine=engine, prompt=PromptConfig(wording="terse"))
    critic = {"none": None, "one": Critic(backbone, (0,), 0.02), "one a node": Critic(backbone, (1, 2), 0.02)}[
        SCHEMES[credit].heads
    ]
    generator = torch.Generator().manual_seed(3)
    state = critic.state() if critic else {}
    state |= {name: torch.randn(state[name].shape, generator=generator) for name in ("weights", "biases") if critic}
    total, seen = torch.zeros((), dtype=torch.float64), 0.0
    while True:
        engine.begin()
        if critic:
            critic.load_state(state)
        groups = network.rollout([QUESTION], 2, seed=SEED)
        rewards_PG = torch.tensor([[RIGHT[rollout.answer] for rollout in groups[0]]])
        step = Step(config=config, network=network, task=Table(), seed=SEED, groups=groups, terminal_PG=rewards_PG,
                    critic=critic)  # fmt: skip
        credits = SCHEMES[credit].credit(step)
        if divergence:
            credits = engine.divergence(groups).taken_off(credits, divergence, step.shared_by)
        for completion, advantage in credits.texts:
            text = tuple(token - 5 for token in completion.sample.token_ids)
            logprobs = engine.distribution(completion)[text]
            each = advantage if isinstance(advantage, tuple) else (advantage,) * len(logprobs)
            weighted = sum(a * logprob for a, logprob in zip(each, logprobs, strict=True))
            total = total - engine.probability * weighted / credits.num_rollouts
        seen += engine.probability
        if not engine.advance():
            break
    assert seen == pytest.approx(1.0), "all outcomes together are certain"
    loss = divergence * nodes.expected_divergence() - nodes.expected_reward()
    true = torch.autograd.grad(loss, nodes.parameters, allow_unused=True, retain_graph=True)
    found = torch.autograd.grad(total, nodes.parameters, allow_unused=True)
    return [(f, t) for f, t in zip(found, true, strict=True) if f is not None and t is not None]


@pytest.mark.parametrize(
    ("credit", "changes"),
    [
        ("shared", {}), ("replay", {}), ("removal", {}), ("tree", {}), ("value", {}), ("own_critics", {}),
        ("token_value", {"tokens": 2}),
    ],
)  # fmt: skip
def test_unbiased_schemes_have_the_exact_gradient(backbone: Backbone, credit: Credit, changes: dict[str, int]) -> None:
    pairs = gradients(backbone, credit, **changes)
    assert len(pairs) == 2
    for found, true in pairs:
        assert true.norm() > 0.002
        torch.testing.assert_close(found, true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("credit", ["shared", "replay", "tree", "turn_groups"])
def test_every_scheme_pays_alike_for_the_divergence(backbone: Backbone, credit: Credit) -> None:
    """Replays pay nothing, and texts of rollouts that a scheme leaves out (`turn_groups`) pay all the same."""
    plain, paying = (gradients(backbone, credit, divergence=coefficient) for coefficient in (0.0, 0.5))
    for (without, reward), (found, both) in zip(plain, paying, strict=True):
        assert (both - reward).norm() > 0.02
        torch.testing.assert_close(found - without, both - reward, rtol=0, atol=1e-6)


def test_replays_share_the_entropy_bonus_of_their_rollout(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.0"}), "replay")
    wanted: dict[Credit, dict[int, float]] = {"shared": {1: 1.0, 2: 1.0, 3: 1.0}, "replay": {1: 1.0, 2: 0.5, 3: 0.5}}
    for credit, expected in wanted.items():
        batch = build_batch(
            SCHEMES[credit].credit(step), routing=Routing((1, 2, 3)), adapter_version=0, temperature=1.0, keep_all=True
        )
        assert batch.bonus_of == expected
        shares_K = torch.cat([part.shares_K for part in batch.split(10**6, backbone.device)])
        # One for each text of the two rollouts, whatever else learns.
        assert shares_K.sum().item() == pytest.approx(6.0)


@pytest.mark.parametrize("credit", ["per_node", "central_critic", "sequential_critic", "turn_groups"])
def test_biased_schemes_are_said_to_be(backbone: Backbone, credit: Credit) -> None:
    assert max((found - true).norm() / true.norm() for found, true in gradients(backbone, credit)) > 0.005
    module = __import__(SCHEMES[credit].credit.__module__, fromlist=["doc"])
    assert "biased" in (module.__doc__ or "").lower()


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", says=("Yes", "No")), tmp_path_factory.mktemp("speaker"))


def start(config: TrainConfig, *, resume: bool = False) -> Trainer:
    run = RunDirectory.find(config, resume=resume)
    run.initialise()
    return Trainer(set_up(resolve(config)), run)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    critic = trainer.critic.state() if trainer.critic else {}
    adapters = {name: parameter.detach().clone() for name, parameter in trainer.bank.parameters().items()}
    assert isinstance(trainer.learner, TorchLearner)
    return adapters | trainer.learner.state() | {f"critic.{name}": tensor.clone() for name, tensor in critic.items()}


@pytest.mark.exact
@pytest.mark.parametrize("credit", ["own_critics", "tree"])
def test_a_stopped_run_goes_on_bit_for_bit_with_its_critic_and_its_replays(
    folder: Path, tmp_path: Path, credit: Credit
) -> None:
    config = TrainConfig(
        backbone=str(folder), device="cpu", adapter=SMALL, num_steps=2, examples_per_step=2, group_size=4, max_new_tokens=3,
        eval_size=2, eval_every=0, lr=0.01, credit=credit, kl_coef=0.01, entropy_coef=0.01,
        topology=TopologyConfig(widths=(1, 1)), prompt=PromptConfig(wording="terse"), run_dir=tmp_path / "whole",
    )  # fmt: skip
    whole, broken = start(config), start(replace(config, run_dir=tmp_path / "broken"))
    metrics = [train_step(whole) for _ in range(2)]
    train_step(broken)
    broken.save()
    resumed = start(broken.config, resume=True)
    again, last = ({n: v for n, v in each.items() if "second" not in n} for each in (train_step(resumed), metrics[1]))
    assert again == last
    expected, found = state_of(whole), state_of(resumed)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert any(name.startswith("critic.weights") for name in expected) == (credit == "own_critics")
    assert whole.ledger == resumed.ledger
    # What was replayed is spent: two layers, so each rollout's node 2 writes twice.
    calls = 2 * 8 * (3 if credit == "tree" else 2)
    assert (whole.ledger.rollouts, whole.ledger.calls) == (2 * 8, calls)
    assert whole.ledger.sampled_tokens == sum(each["sampled_tokens/sum"] for each in metrics)
    assert all({"kl/mean", "entropy/mean"} <= each.keys() for each in metrics)
    lower = "--lr or --kl-coef or --entropy-coef" + " or --critic-lr" * (credit == "own_critics")
    assert str(whole.diverged("step 3", Diverged("x"))).endswith(f"with a lower {lower}")
    if credit == "tree":
        assert all(0 < each["replay_tokens/sum"] < each["sampled_tokens/sum"] for each in metrics)


def test_heads_of_nodes_that_join_start_at_zero_and_the_others_go_on(backbone: Backbone) -> None:
    parent, grown = critic_of(backbone, (1, 3), (0.5, 0.25)), Critic(backbone, (1, 2, 3), lr=0.02)
    states = torch.nn.functional.normalize(torch.randn(4, parent.weights.shape[1], generator=torch.Generator().manual_seed(0)))
    parent.fit(states, [1, 3, 1, 3], [1.0, 0.0, 1.0, 0.0])
    fresh = {name: tensor.clone() for name, tensor in parent.state().items()}
    grown.load_state(fresh)
    assert grown.values(states, [1, 3, 1, 3]).equal(parent.values(states, [1, 3, 1, 3]))
    assert grown.values(states, [2] * 4).tolist() == [0.0] * 4
    for critic in (parent, grown):
        critic.fit(states, [1, 3, 1, 3], [1.0, 0.0, 1.0, 0.0])
    assert grown.values(states, [1, 3, 1, 3]).equal(parent.values(states, [1, 3, 1, 3]))


def test_a_head_that_values_nothing_in_a_step_keeps_its_weights_and_its_moments(backbone: Backbone) -> None:
    critic = critic_of(backbone, (1, 2), (0.5, 0.25))
    states = torch.nn.functional.normalize(torch.randn(4, critic.weights.shape[1], generator=torch.Generator().manual_seed(0)))
    critic.fit(states, [1, 2, 1, 2], [1.0, 0.0, 1.0, 0.0])
    names = [name for name in critic.state() if name.startswith(("weights", "biases")) and not name.endswith(".step")]
    before = {name: critic.state()[name].clone() for name in names}
    critic.fit(states, [2] * 4, [1.0, 0.0, 1.0, 0.0])
    assert len(names) == 6
    for name, tensor in before.items():
        assert torch.equal(tensor[0], critic.state()[name][0])
        assert not torch.equal(tensor[1], critic.state()[name][1])


def test_replays_are_paid_from_the_tokens_of_a_step(backbone: Backbone) -> None:
    step = step_of(backbone, CHAIN, says(CHAIN, {"3.0"}), "replay")
    SCHEMES["replay"].credit(step)
    pace = Pace()
    pace.update(1000, step.groups, step.replays)
    # 2 rollouts of 14 + 14 + 10 or 11 bytes; replays of node 2 with node 3, and of node 3, wrong in both: 14 + 10 and 10.
    rollouts, replayed = 2 * (14 + 14) + 11 + 10, 2 * (len("TO node 3: 2.0+1") + 10) + 2 * 10
    assert (pace.owed, pace.tokens_per_call) == (1000 - rollouts - replayed, (rollouts + replayed) / 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"credit": "replay", "centring": "ema"}, "--centring must be left out with --credit replay, got 'ema'"),
        ({"credit": "value", "normalize": True}, "--normalize must be left out with --credit value, got True"),
        ({"credit": "tree", "branches": 2}, "--branches must be left out with --credit tree, got 2"),
        ({"replays": 0}, "--replays must be at least 1, got 0"),
        ({"replays": 10**5}, "--examples-per-step x --group-size x --replays must be at most 100,000, got 12800000"),
        ({"critic_lr": 0.0}, r"--critic-lr must be above 0 and at most 1e\+30, got 0.0"),
        ({"critic_lr": 1e38}, r"--critic-lr must be above 0 and at most 1e\+30, got 1e\+38"),
        ({"lr": 1e38}, r"--lr must be above 0 and at most 1e\+30, got 1e\+38"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TrainConfig(**changes).check()

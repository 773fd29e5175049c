"""GPTSwarm: agents whose edges are learned by REINFORCE, on a frozen backbone (Zhuge et al. 2024, arXiv 2402.16823).

Each possible edge between agents, and from an agent to the final vote, is there with probability sigmoid(theta). Graphs are
drawn edge by edge, and edges that would close a cycle are left out; theta follows (utility - moving average) * grad log
p(graph) with Adam. At the end edges with a probability above one half are kept.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neuromas.compare.methods.conversation import Answered, Call, Conversation, lines, listing
from neuromas.compare.methods.method import CellResult, CellSpec
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Task, rewards_of
from neuromas.types import Example

LIE = "Give a wrong answer on purpose."
FINAL = -1
"""The target of an edge that leads to the final vote."""

Edge = tuple[int, int]
Converse = Callable[[list[tuple[Example, Conversation]], tuple[int | str, ...]], list[Answered]]
"""Runs conversations, given the seed of their samples."""


def swarm(example: Example, task: Task, *, edges: frozenset[Edge], truthful: int) -> Conversation:
    """Let each agent read the answers of the agents with an edge to it and answer; those with an edge to the vote vote.

    Agents 0 to `truthful` - 1 answer, the others lie. Only agents from which a path leads to the vote are called, as the
    others change no answer; if there is none, the answer is empty.
    """
    wanted = _upstream(edges)
    answers: dict[int, str] = {}
    while waiting := sorted(wanted - set(answers)):
        before = {agent: [a for a, b in sorted(edges) if b == agent] for agent in waiting}
        ready = [agent for agent in waiting if all(a in answers for a in before[agent])]
        texts = yield [
            Call(
                f"agent/{agent}",
                lines(
                    listing("Answers of others:", [answers[a] for a in before[agent]]),
                    "" if agent < truthful else LIE,
                    example.answer_format,
                ),
            )
            for agent in ready
        ]
        answers |= dict(zip(ready, texts, strict=True))
    ballots = [answers[a] for a, b in sorted(edges) if b == FINAL]
    return ballots[majority_vote(ballots, task.parse_answer)] if ballots else ""


def _upstream(edges: frozenset[Edge]) -> set[int]:
    """Return the agents from which a path leads to the vote."""
    found = {FINAL}
    while more := {a for a, b in edges if b in found} - found:
        found |= more
    return found - {FINAL}


def possible_edges(agents: int) -> list[Edge]:
    """Return every edge between two agents, both ways, and from each agent to the vote."""
    return [(a, b) for a in range(agents) for b in (*range(agents), FINAL) if a != b]


def draw_graph(thetas: Mapping[Edge, float], rng: random.Random) -> tuple[frozenset[Edge], dict[Edge, float]]:
    """Draw edges one by one; return those drawn and d log p(graph) / d theta of each edge that was left to chance.

    For a Bernoulli variable with p = sigmoid(theta) this is 1 - p if it is drawn, -p if not.
    """
    edges: set[Edge] = set()
    slopes: dict[Edge, float] = {}
    for edge, theta in thetas.items():
        if _closes_cycle(edges, edge):
            continue
        probability = 1 / (1 + math.exp(-theta))
        drawn = rng.random() < probability
        slopes[edge] = drawn - probability
        if drawn:
            edges.add(edge)
    return frozenset(edges), slopes


def likely_graph(thetas: Mapping[Edge, float]) -> frozenset[Edge]:
    """Return the edges with a probability above one half, in order, without those that would close a cycle."""
    edges: set[Edge] = set()
    for edge, theta in thetas.items():
        if theta > 0 and not _closes_cycle(edges, edge):
            edges.add(edge)
    return frozenset(edges)


def _closes_cycle(edges: set[Edge], edge: Edge) -> bool:
    reached, sender = {edge[1]}, edge[0]
    while more := {b for a, b in edges if a in reached} - reached:
        reached |= more
    return sender in reached


@dataclass
class EdgeLearner:
    """Holds the thetas and updates them by Adam (Kingma and Ba 2015)."""

    thetas: dict[Edge, float]
    lr: float
    average: float | None = None
    """Moving average of the utility; None before the first update."""
    steps: int = 0
    _moments: dict[Edge, tuple[float, float]] = field(default_factory=dict)

    def update(self, slopes: Sequence[Mapping[Edge, float]], utilities: Sequence[float]) -> None:
        """Take one step up the mean of (utility - average) * slope over the drawn graphs."""
        mean = sum(utilities) / len(utilities)
        average = mean if self.average is None else self.average
        self.average = 0.9 * average + 0.1 * mean
        self.steps += 1
        for edge in self.thetas:
            pairs = zip(utilities, slopes, strict=True)
            gradient = sum((u - average) * own.get(edge, 0.0) for u, own in pairs) / len(utilities)
            first, second = self._moments.get(edge, (0.0, 0.0))
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self._moments[edge] = (first, second)
            size = math.sqrt(second / (1 - 0.999**self.steps)) + 1e-8
            self.thetas[edge] += self.lr * first / (1 - 0.9**self.steps) / size


@dataclass(kw_only=True)
class GPTSwarm:
    """Learn the edges on training questions, then answer with the likely graph.

    Settings are those of the repository's MMLU run: 3 agents that answer and 3 that lie, 200 iterations of 4 questions, lr 0.1.
    Differs: agents that cannot reach the vote are not called. Its learning is cheap but not free: `training` counts it, and
    its trainable parameters are the thetas. They are not saved: a cell that is stopped learns the same edges again.
    """

    name: str = "gptswarm"
    title: str = "GPTSwarm"
    source: str = "Zhuge et al. 2024, arXiv 2402.16823; repository metauto-ai/GPTSwarm (MMLU)"
    truthful: int = 3
    adversarial: int = 3
    iterations: int = 200
    questions: int = 4
    """Questions of an iteration, each with a graph of its own."""
    lr: float = 0.1
    temperature: float = 0.2
    trained: bool = False
    """False: only edges are learned, no adapters."""

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Learn the edges and answer the evaluation sets; nothing is written to `folder`."""
        from neuromas.compare.methods.converse import Answerer, settings_of  # loads torch

        answerer = Answerer(spec.config, self.temperature)
        thetas, ledger = self.learn(answerer.task, spec.config.seed, answerer.converse)
        graph = likely_graph(thetas)
        return CellResult(
            method=self.name,
            task=answerer.task.name,
            seed=spec.config.seed,
            answers=answerer.answers(lambda example: swarm(example, answerer.task, edges=graph, truthful=self.truthful)),
            trainable_parameters=len(thetas),
            training=ledger,
            settings=settings_of(
                spec.config, evaluation_temperature=self.temperature, truthful=self.truthful, adversarial=self.adversarial,
                iterations=self.iterations, questions=self.questions, edge_lr=self.lr, edges=sorted(map(list, graph)),
            ),
        )  # fmt: skip

    def learn(self, task: Task, seed: int, converse: Converse) -> tuple[dict[Edge, float], dict[str, int]]:
        """Return the learned thetas and the ledger of learning them."""
        learner = EdgeLearner(dict.fromkeys(possible_edges(self.truthful + self.adversarial), 0.0), self.lr)
        spent = {"calls": 0, "prompt_tokens": 0, "sampled_tokens": 0}
        for iteration in range(self.iterations):
            rng = random.Random(f"gptswarm/{seed}/{iteration}")
            examples = task.training_batch(seed, iteration, self.questions)
            drawn = [draw_graph(learner.thetas, rng) for _ in examples]
            conversations = [
                swarm(e, task, edges=edges, truthful=self.truthful) for e, (edges, _) in zip(examples, drawn, strict=True)
            ]
            answered = converse(list(zip(examples, conversations, strict=True)), ("gptswarm", seed, iteration))
            for quantity in spent:
                spent[quantity] += sum(getattr(each, quantity) for each in answered)
            utilities = rewards_of(task, [(each.example, each.text) for each in answered])
            learner.update([slopes for _, slopes in drawn], utilities)
        total = self.iterations * self.questions
        counts = {"steps": self.iterations, "optimizer_steps": self.iterations, "questions": total, "rollouts": total}
        return learner.thetas, {"trainable_parameters": len(learner.thetas), **counts, **spent}


METHODS = (GPTSwarm(),)

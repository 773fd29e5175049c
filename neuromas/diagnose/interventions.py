"""What is done to a trained network to see what its parts are worth: messages that are changed, adapters that are replaced.

    silence   a node's messages are empty                bare       nodes write without their adapters
    drop      an edge's message is empty                 exchange   two nodes write with each other's adapters
    shuffle   an edge's message is that of another question
    swap      two edges with one sender, or with one recipient, carry each other's messages

An intervention takes the undisturbed rollouts and returns those of the same questions under it. Changed messages are those of
the undisturbed rollouts: nobody who writes one reads another.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from neuromas.diagnose import Kind
from neuromas.graph.messages import NOTHING
from neuromas.rollout.network import Network
from neuromas.training.evaluate import parts
from neuromas.types import Message, Rollout

Edge = tuple[int, int]
Texts = Mapping[tuple[str, Edge], str]
"""What arrives on an edge in place of its message, by the question's id."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How rollouts are sampled: the same way with an intervention and without, so with the same random numbers."""

    seed: tuple[int | str, ...]
    temperature: float


@dataclass(frozen=True, slots=True)
class Intervention:
    """One thing that is done to a network: to `edges`, or to `nodes`."""

    kind: Kind
    nodes: tuple[int, ...] = ()
    edges: tuple[Edge, ...] = ()
    sources: Mapping[int, int | None] | None = None
    """For `bare` and `exchange`: whose adapter each node writes with, None: with none."""

    def __str__(self) -> str:
        if self.edges:
            return f"{self.kind} {' and '.join(f'{a}─▶{b}' for a, b in self.edges)}"
        if self.kind == "bare" and len(self.nodes) != 1:
            return "bare backbone, all nodes"
        names = " and ".join(map(str, self.nodes))
        return {"silence": f"silence node {names}", "bare": f"bare node {names}"}.get(
            self.kind, f"exchange adapters of {names}"
        )

    def rollouts(self, network: Network, undisturbed: Sequence[Rollout], how: Sampling) -> list[Rollout]:
        """Return the rollouts of the same questions under this intervention."""
        if self.sources is not None:
            with network.adapters.replaced(self.sources):
                return answer(network, undisturbed, how)
        texts = self._texts(undisturbed, how.seed)

        def delivered(rollout: Rollout, message: Message) -> str:
            return texts.get((rollout.example.id, (message.sender, message.recipient)), message.text)

        return [
            rollout
            for part in _parts(network, undisturbed)
            for rollout in network.redeliver(part, delivered, seed=how.seed, temperature=how.temperature)
        ]

    def _texts(self, undisturbed: Sequence[Rollout], seed: tuple[int | str, ...]) -> Texts:
        """Return what arrives in the place of messages."""
        sent = {
            (rollout.example.id, (m.sender, m.recipient)): m.text
            for rollout in undisturbed
            for completion in rollout.completions
            for m in completion.messages
        }
        if self.kind == "shuffle":
            (edge,) = self.edges
            ids = [id for id, of in sent if of == edge]
            # One circle through all questions in a random order, so that none keeps its own message.
            order = np.random.default_rng([len(ids), *(int(part) for part in seed if isinstance(part, int))]).permutation(ids)
            return {(str(id), edge): sent[str(other), edge] for id, other in zip(order, np.roll(order, 1), strict=True)}
        if self.kind == "swap":
            first, second = self.edges
            both = [id for id, of in sent if of == first and (id, second) in sent]
            return {(id, a): sent[id, b] for id in both for a, b in ((first, second), (second, first))}
        gone = [key for key in sent if key[1] in self.edges or key[1][0] in self.nodes]
        return dict.fromkeys(gone, NOTHING)


def _parts(network: Network, rollouts: Sequence[Rollout]) -> Iterator[Sequence[Rollout]]:
    """Yield rollouts in parts, so that memory does not grow with their number."""
    return (rollouts[part] for part in parts(network.policy, [rollout.example for rollout in rollouts]))


def answer(network: Network, asked: Sequence[Rollout], how: Sampling) -> list[Rollout]:
    """Answer the questions of these rollouts anew."""
    return [
        group[0]
        for part in _parts(network, asked)
        for group in network.rollout([r.example for r in part], 1, seed=how.seed, temperature=how.temperature)
    ]


def interventions(network: Network, undisturbed: Sequence[Rollout], kinds: Sequence[Kind]) -> list[Intervention]:
    """Return all interventions of these kinds that the network allows; the bare backbone in all nodes comes first.

    A node that answers sends no messages, so it is not silenced. Nodes that share one adapter have none to exchange.
    """
    rows = [(c.node, tuple((m.sender, m.recipient) for m in c.messages)) for r in undisturbed for c in r.completions]
    edges = list(dict.fromkeys(edge for _, sent in rows for edge in sent))
    hidden = list(dict.fromkeys(node for node, sent in rows if sent))
    bank = network.adapters
    own = () if bank.shared or len(bank.nodes) == 1 else bank.nodes
    of_kind: dict[Kind, Callable[[], list[Intervention]]] = {
        "silence": lambda: [Intervention("silence", (node,)) for node in hidden],
        "drop": lambda: [Intervention("drop", edges=(edge,)) for edge in edges],
        "shuffle": lambda: [Intervention("shuffle", edges=(edge,)) for edge in edges],
        "swap": lambda: [Intervention("swap", edges=(a, b)) for a, b in combinations(edges, 2) if a[0] == b[0] or a[1] == b[1]],
        "bare": lambda: [Intervention("bare", (node,), sources={node: None}) for node in own],
        "exchange": lambda: [Intervention("exchange", (a, b), sources={a: b, b: a}) for a, b in combinations(own, 2)],
    }
    everything = Intervention("bare", () if len(bank.nodes) == 1 else bank.nodes, sources=dict.fromkeys(bank.nodes))
    first = [everything] if "bare" in kinds else []
    return first + [each for kind in dict.fromkeys(kinds) for each in of_kind[kind]()]

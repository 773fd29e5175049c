"""The architecture: nodes in layers, edges from earlier to later layers, one output node."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST_NODES = 512
"""Every node is a call for each answer, and in wide layers a message for each node of the next."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A layered DAG with exactly one output node.

    `layers` maps node id to layer (1-based); `edges` holds (sender, recipient). Ids are names: they stay when a network
    grows, and nothing follows from their order. Use `layered` or `from_edges`; both raise ValueError on a graph that is
    not a network.
    """

    layers: tuple[tuple[int, int], ...]
    edges: tuple[tuple[int, int], ...]
    roles: tuple[str, ...] = ()
    """A sentence for each of the nodes 1, 2, ... to read; empty for role-free nodes. The config holds them, not the JSON."""

    @classmethod
    def layered(cls, widths: Iterable[int], *, skip: bool = False, vote: bool = False) -> "Topology":
        """Build fully connected layers, ids numbered from 1 through the layers (arXiv 2605.16757, section 2).

        `skip` adds an edge from every node to every node of all later layers, not only the next. `vote` allows a last layer
        of several nodes, whose answers are put to the vote.
        """
        widths = tuple(widths)
        if not widths or min(widths) < 1:
            raise ValueError(f"--topology.widths must be positive, e.g. 1 1 1, got {list(widths)}")
        if widths[-1] != 1 and not vote:
            raise ValueError(f"--topology.widths must end in 1 (one output node), got {list(widths)}")
        if sum(widths) > MOST_NODES:
            raise ValueError(f"--topology.widths must make at most {MOST_NODES} nodes, got {sum(widths):,}")
        layer_of = [layer for layer, width in enumerate(widths, start=1) for _ in range(width)]
        layers = tuple(enumerate(layer_of, start=1))
        edges = tuple((a, b) for a, la in layers for b, lb in layers if (la < lb if skip else la + 1 == lb))
        return cls(layers, edges)

    @classmethod
    def from_edges(cls, edges: Iterable[tuple[int, int]]) -> "Topology":
        """Build from explicit edges; a node's layer is 1 + the longest path that leads to it.

        Node ids are 1 to the largest id named. Raises ValueError for an id below 1, an edge named twice, a cycle, a node
        on no edge, or several nodes that send to nobody.
        """
        edges = tuple(edges)
        if wrong := [edge for edge in edges if not (isinstance(edge, Sequence) and len(edge) == 2)]:
            raise ValueError(f"--topology.edges must be pairs of node ids, such as (1, 2), got {wrong[0]!r}")
        edges = tuple(sorted((int(a), int(b)) for a, b in edges))
        if not edges:
            raise ValueError("--topology.edges must name at least one edge, got none; one node is --topology.widths 1")
        if twice := [edge for edge, count in Counter(edges).items() if count > 1]:
            raise ValueError(f"--topology.edges names {list(twice[0])} more than once; remove the repetition")
        named = {node for edge in edges for node in edge}
        if min(named) < 1:
            raise ValueError(f"--topology.edges must use node ids from 1, got {min(named)}")
        if max(named) > MOST_NODES:
            raise ValueError(f"--topology.edges must use node ids up to {MOST_NODES}, got {max(named):,}")
        nodes = range(1, max(named) + 1)
        if lost := next((node for node in nodes if node not in named), None):
            raise ValueError(f"--topology.edges leaves node {lost} unreachable; add an edge or renumber the nodes")
        layers = _longest_path_layers(nodes, edges)
        sinks = sorted(set(nodes) - {a for a, _ in edges})
        if len(sinks) > 1:
            raise ValueError(
                f"--topology.edges must lead to one output node, got {len(sinks)} nodes that send to nobody: {sinks}; "
                "connect all but one of them onward"
            )
        return cls(tuple(sorted(layers.items())), edges)

    def with_roles(self, roles: Sequence[str]) -> "Topology":
        """Return the same graph with a sentence for each node to read; ValueError if there are more or fewer of them."""
        if len(roles) not in (0, len(self.layers)):
            expected = f"{len(self.layers)} sentences, one for each node, or none"
            raise ValueError(f"--topology.roles must be {expected}, got {len(roles)}: {list(roles)}")
        return dataclasses.replace(self, roles=tuple(roles))

    def role(self, node: int) -> str:
        """Return the node's sentence, empty if it has none."""
        return self.roles[node - 1] if self.roles else ""

    @property
    def nodes(self) -> tuple[int, ...]:
        """Node ids in topological order: by layer, then by id."""
        return tuple(node for node, _ in sorted(self.layers, key=lambda item: (item[1], item[0])))

    @property
    def output_node(self) -> int:
        return self.nodes[-1]

    @property
    def depth(self) -> int:
        return self.layer(self.output_node)

    def layer(self, node: int) -> int:
        return dict(self.layers)[node]

    def senders(self, node: int) -> tuple[int, ...]:
        return tuple(a for a, b in self.edges if b == node)

    def recipients(self, node: int) -> tuple[int, ...]:
        return tuple(b for a, b in self.edges if a == node)

    def to_json(self) -> dict[str, list[list[int]]]:
        return {"layers": [list(item) for item in self.layers], "edges": [list(edge) for edge in self.edges]}

    @classmethod
    def from_json(cls, data: dict[str, list[list[int]]]) -> "Topology":
        return cls(tuple((n, la) for n, la in data["layers"]), tuple((a, b) for a, b in data["edges"]))


def _longest_path_layers(nodes: Iterable[int], edges: tuple[tuple[int, int], ...]) -> dict[int, int]:
    """Layer of every node by Kahn's algorithm; ValueError names the nodes of a cycle."""
    layers: dict[int, int] = {}
    waiting = set(nodes)
    while waiting:
        ready = {n for n in waiting if all(a in layers for a, b in edges if b == n)}
        if not ready:
            raise ValueError(f"--topology.edges must not form a cycle; nodes {sorted(waiting)} wait for each other")
        layers |= {n: 1 + max((layers[a] for a, b in edges if b == n), default=0) for n in ready}
        waiting -= ready
    return layers

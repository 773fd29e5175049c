"""Growing a network: pure operations on topologies, and the record of what a growth keeps, adds and opens.

Ids are persistent: a node keeps its id, a new one gets the next free id, so the output node may be node 3 while node 5 is new.
A prompt names a node's layer and recipients, so a network that has grown writes other prompts whatever its new adapters hold.
That is why a growth opens as a whole: each group of rollouts runs either through the parent's topology (closed: new nodes are
absent where the net was widened, bypassed where it was deepened) or through the grown one (open).

Growth after Net2Net (Chen et al. 2016, arXiv 1511.05641) and the progressive growth of arXiv 2605.16757.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neuromas.graph.topology import Topology

Opening = Literal["immediate", "annealed"]


def widths_of(topology: Topology) -> list[int]:
    """Return the number of nodes of each layer."""
    count = Counter(layer for _, layer in topology.layers)
    return [count[layer] for layer in sorted(count)]


def widen(topology: Topology, layer: int, count: int = 1, *, skip: bool = False) -> Topology:
    """Add nodes to a layer before the output layer, each connected to all nodes of the layers before and after it.

    `skip` connects them to all nodes of all other layers. Raises ValueError for a layer that is not there.
    """
    if not 1 <= layer < topology.depth:
        raise ValueError(f"widen: layer must be 1 to {topology.depth - 1} (the output layer keeps its one node), got {layer}")
    new = _free_ids(topology, count)
    edges = set(topology.edges)
    for node, at in topology.layers:
        if at < layer and (skip or at == layer - 1):
            edges |= {(node, fresh) for fresh in new}
        if at > layer and (skip or at == layer + 1):
            edges |= {(fresh, node) for fresh in new}
    return Topology.from_edges(edges)


def deepen(topology: Topology, layer: int, width: int = 1, *, skip: bool = False) -> Topology:
    """Insert a layer, which becomes layer `layer`, before the output layer or before any other.

    It reads all nodes of the layer before it and writes to all of the layer after it; paths through it replace the edges
    between those two. `skip` connects it to all layers and leaves every edge. Raises ValueError for a layer after the
    output.
    """
    if not 1 <= layer <= topology.depth:
        raise ValueError(f"deepen: the new layer must be 1 to {topology.depth} (before the output layer), got {layer}")
    new = _free_ids(topology, width)
    at = dict(topology.layers)
    before = {node for node in at if at[node] < layer and (skip or at[node] == layer - 1)}
    after = {node for node in at if at[node] >= layer and (skip or at[node] == layer)}
    edges = {(a, b) for a, b in topology.edges if skip or not (a in before and b in after)}
    edges |= {(node, fresh) for node in before for fresh in new} | {(fresh, node) for node in after for fresh in new}
    return Topology.from_edges(edges)


def connect(topology: Topology, sender: int, recipient: int) -> Topology:
    """Add an edge from a layer to a later one; ValueError if it is there already or does not lead onward."""
    for node in (sender, recipient):
        if node not in topology.nodes:
            raise ValueError(f"connect: no node {node}; there are {sorted(topology.nodes)}")
    if (sender, recipient) in topology.edges:
        raise ValueError(f"connect: the edge {sender}->{recipient} is there already")
    if topology.layer(sender) >= topology.layer(recipient):
        raise ValueError(
            f"connect: an edge must lead to a later layer, got {sender} (layer {topology.layer(sender)}) -> "
            f"{recipient} (layer {topology.layer(recipient)})"
        )
    return Topology(topology.layers, tuple(sorted({*topology.edges, (sender, recipient)})))


def _free_ids(topology: Topology, count: int) -> range:
    if count < 1:
        raise ValueError(f"a growth must add at least 1 node, got {count}")
    first = max(topology.nodes) + 1
    return range(first, first + count)


def grow_to(parent: Topology, widths: Iterable[int], *, new_layers: Sequence[int] = (), skip: bool = False) -> Topology:
    """Return the parent grown to these widths, layer by layer from the first.

    Which layers of `widths` are new is `new_layers`, counted from 1; by default every old layer keeps the earliest place that
    is wide enough, so that new layers come last, before the output layer: [2,2,1] to [2,2,2,1] inserts layer 3. Raises
    ValueError where nodes or layers would have to go.
    """
    widths, old = list(widths), widths_of(parent)
    Topology.layered(widths)  # says what makes them no network
    new = _new_layers(old, widths, new_layers)
    grown = parent
    for layer, width in enumerate(widths, start=1):
        if layer in new:
            grown = deepen(grown, layer, width, skip=skip)
        elif missing := width - widths_of(grown)[layer - 1]:
            grown = widen(grown, layer, missing, skip=skip)
    return grown


def _new_layers(old: list[int], widths: list[int], given: Sequence[int]) -> set[int]:
    """Return which layers of `widths` have no old layer in them; the output layer always has."""
    does_not_fit = ValueError(
        f"growth: a network of widths {old} does not fit into {widths}; nodes and layers are added, never removed"
    )
    if given:
        new = set(given)
        if len(new) != len(widths) - len(old) or not new <= set(range(1, len(widths))):
            raise ValueError(
                f"growth.new_layers must name {len(widths) - len(old)} of the layers 1 to {len(widths) - 1}, got {list(given)}"
            )
        kept = [width for layer, width in enumerate(widths, start=1) if layer not in new]
        if any(width < was for width, was in zip(kept, old, strict=True)):
            raise does_not_fit
        return new
    new, waiting = set(range(1, len(widths))), list(range(1, len(widths)))
    for was in old[:-1]:
        place = next((layer for layer in waiting if widths[layer - 1] >= was), None)
        if place is None:
            raise does_not_fit
        new.discard(place)
        waiting = [layer for layer in waiting if layer > place]
    return new


def check(parent: Topology, grown: Topology) -> None:
    """Raise ValueError unless `grown` is the parent with nodes and edges added.

    An edge of the parent may give way to a path through new nodes alone: that is a deepened network.
    """
    if lost := sorted(set(parent.nodes) - set(grown.nodes)):
        raise ValueError(f"growth must keep every node, it removes {lost}; a network never shrinks")
    if grown.output_node != parent.output_node:
        raise ValueError(f"growth must keep the output node {parent.output_node}, got {grown.output_node}; write to it instead")
    if idle := [n for n in grown.nodes if n != grown.output_node and not grown.recipients(n)]:
        raise ValueError(f"growth leaves node {idle[0]} an orphan: it writes to no node; give it a recipient")
    for sender, recipient in parent.edges:
        if (sender, recipient) not in grown.edges and not _leads(grown, sender, recipient, set(parent.nodes)):
            raise ValueError(
                f"growth must keep every edge, it removes {sender}->{recipient} and puts no new nodes between them"
            )
    if grown == parent:
        raise ValueError(
            f"growth changes nothing: the network has widths {widths_of(parent)} and these edges already; "
            "without any flag of a growth a run trains on as it is"
        )


def _leads(grown: Topology, sender: int, recipient: int, old: set[int]) -> bool:
    """Say whether a path from sender to recipient passes new nodes only."""
    seen, waiting = set(), [sender]
    while waiting:
        for node in grown.recipients(waiting.pop()):
            if node == recipient:
                return True
            if node not in old and node not in seen:
                seen.add(node)
                waiting.append(node)
    return False


@dataclass(frozen=True, slots=True)
class Growth:
    """One growth of a network: from which topology to which, where new adapters come from, and how it opens."""

    parent: Topology
    grown: Topology
    copies: tuple[tuple[int, int | None], ...]
    """(new node, the node whose adapter it copies); None: a zero adapter, which makes the node the bare backbone."""
    at_step: int = 0
    """Training steps done before it."""
    opening: Opening = "immediate"
    open_steps: int = 0
    """Steps over which an annealed opening goes from 0 to 1."""
    warmup_new: int = 0
    """Steps in which new nodes alone learn."""
    noise: float = 0.0
    """Standard deviation of what is added to a copy, as a share of the copied tensor's root mean square."""

    @property
    def kept(self) -> tuple[int, ...]:
        return self.parent.nodes

    @property
    def new(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.grown.nodes) - set(self.parent.nodes)))

    @property
    def adds_nothing(self) -> bool:
        """Whether the network stays as it is: a finished run trains on."""
        return self.grown == self.parent

    @property
    def opened_by(self) -> int:
        """The first step of which all groups are open."""
        return self.at_step + (self.open_steps if self.opening == "annealed" else 0)

    def open_probability(self, step: int) -> float:
        """Return the probability that a group of this step, counted from 0, runs through the grown network."""
        if step >= self.opened_by:
            return 1.0
        return max(0.0, (step - self.at_step) / self.open_steps)

    def record(self) -> dict[str, Any]:
        """Return what goes where, JSON-ready."""
        adapters = {str(node): "kept" for node in sorted(self.kept)}
        for node, source in self.copies:
            adapters[str(node)] = "zero" if source is None else f"copy of node {source}"
        return {
            "at_step": self.at_step,
            "from": widths_of(self.parent),
            "to": widths_of(self.grown),
            "adapters": adapters,
            "layers": {str(node): self.grown.layer(node) for node in sorted(self.grown.nodes)},
            "new_edges": [list(edge) for edge in self.grown.edges if edge not in self.parent.edges],
            "bypassed_edges": [list(edge) for edge in self.parent.edges if edge not in self.grown.edges],
            "opening": self.opening,
            "open_steps": self.opened_by - self.at_step,
            "warmup_new": self.warmup_new,
            "noise": self.noise,
        }


def describe(record: dict[str, Any]) -> str:
    """Return a growth's record as lines of text: what is kept, what is new, which adapter goes where, how it opens.

    A growth that adds nothing, by which a finished run trains on, is one line.
    """

    def edges(pairs: list[list[int]]) -> str:
        return "  ".join(f"{a}─▶{b}" for a, b in pairs) or "none"

    if record["from"] == record["to"] and not record["new_edges"]:
        return f"step {record['at_step']}: training goes on with the same network, {record['to']}"
    kept = [node for node, origin in record["adapters"].items() if origin == "kept"]
    new = [
        f"({node}) in layer {record['layers'][node]}, {origin}"
        for node, origin in record["adapters"].items()
        if origin != "kept"
    ]
    opens = "at once" if record["opening"] == "immediate" else f"over {record['open_steps']} steps"
    lines = [
        f"growth at step {record['at_step']}: {record['from']} ─▶ {record['to']}",
        f"  kept, with their adapters: {' '.join(f'({node})' for node in kept)}",
        f"  new: {'; '.join(new) or 'no node'}" + (f"; noise {record['noise']:g}" if record["noise"] else ""),
        f"  new messages: {edges(record['new_edges'])}; now through new nodes: {edges(record['bypassed_edges'])}",
        f"  opens {opens}" + (f"; new nodes alone learn for {record['warmup_new']} steps" if record["warmup_new"] else ""),
    ]
    if record.get("changed_answers"):
        lines.append(f"  {describe_change(record['changed_answers'])}")
    return "\n".join(lines)


def describe_change(change: dict[str, Any]) -> str:
    """Return how far an immediate opening is from keeping the function."""
    return (
        f"opening at once changed {change['share']:.1%} of {change['n']} greedy validation answers "
        f"(right before {change['accuracy_before']:.1%}, after {change['accuracy_after']:.1%}, floor {change['floor']:.1%})"
    )


def parse_copies(start: Sequence[str], parent: Topology, grown: Topology) -> tuple[tuple[int, int | None], ...]:
    """Read where new adapters come from: `zero` or `copy:NODE` for all of them, `NEW:zero` or `NEW:copy:NODE` for one.

    Later entries win; what no entry names starts at zero. Raises ValueError for an entry that is none of these or names a node
    that is not there.
    """
    new = sorted(set(grown.nodes) - set(parent.nodes))
    copies: dict[int, int | None] = dict.fromkeys(new)
    for entry in start:
        match = re.fullmatch(r"(?:(\d{1,9}):)?(?:zero|copy:(\d{1,9}))", entry)
        if not match:
            raise ValueError(f"growth.start must be zero, copy:NODE, NEW:zero or NEW:copy:NODE, got {entry!r}")
        which = [int(match[1])] if match[1] else new
        source = int(match[2]) if match[2] else None
        if unknown := [node for node in which if node not in copies]:
            raise ValueError(f"growth.start {entry!r}: node {unknown[0]} is not new; new are {new}")
        if source is not None and source not in parent.nodes:
            raise ValueError(f"growth.start {entry!r}: node {source} is none of the parent's nodes {sorted(parent.nodes)}")
        copies |= dict.fromkeys(which, source)
    return tuple(copies.items())

"""Growing a network: what a topology becomes, and that a closed growth changes nothing.

1. Old nodes keep their ids and edges; an edge gives way only to a path through new nodes.
2. While closed, the grown network writes what its parent writes, token by token, at any temperature.
3. A group is open or closed as a whole; which, is a function of (seed, step, example).
4. Old adapters are bit-equal after a growth; new ones are zero updates or copies.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from models import FAMILIES, load_backbone, make_model, save_model
from products import listed

import neuromas.model.adapters
from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, GrowthConfig
from neuromas.graph.growth import Growth, check, connect, deepen, describe, grow_to, parse_copies, widen, widths_of
from neuromas.model.adapters import LORA_MATRICES
from neuromas.types import Example, Group

CHAIN = Topology.layered([1, 1, 1])
SMALL = AdapterConfig(rank=2, target_modules=("q_proj", "down_proj"))


def edges(text: str) -> tuple[tuple[int, int], ...]:
    """Read `12 23` as edges."""
    return tuple((int(a), int(b)) for a, b in text.split())


# Topologies


def test_widening_adds_nodes_beside_a_layer() -> None:
    grown = widen(CHAIN, 2, 2)
    assert grown == Topology(((1, 1), (2, 2), (3, 3), (4, 2), (5, 2)), edges("12 14 15 23 43 53"))
    assert grown.output_node == 3
    assert widen(CHAIN, 1) == Topology(((1, 1), (2, 2), (3, 3), (4, 1)), edges("12 23 42"))
    assert widen(Topology.layered([1, 1, 1], skip=True), 1, skip=True).edges == edges("12 13 23 42 43")


def test_deepening_inserts_a_layer_anywhere_before_the_output() -> None:
    assert deepen(CHAIN, 3, 2) == Topology(((1, 1), (2, 2), (3, 4), (4, 3), (5, 3)), edges("12 24 25 43 53"))
    assert deepen(CHAIN, 2) == Topology(((1, 1), (2, 3), (3, 4), (4, 2)), edges("14 23 42"))
    assert deepen(CHAIN, 1) == Topology(((1, 2), (2, 3), (3, 4), (4, 1)), edges("12 23 41"))
    assert deepen(Topology.layered([1]), 1) == Topology(((1, 2), (2, 1)), edges("21"))
    # An edge that skips the layer stays; with `skip` all of them do.
    assert deepen(Topology.from_edges(edges("12 13 23")), 3).edges == edges("12 13 24 43")
    assert deepen(Topology.layered([1, 1], skip=True), 2, skip=True).edges == edges("12 13 32")


def test_connecting_adds_an_edge_and_moves_nobody() -> None:
    grown = connect(CHAIN, 1, 3)
    assert (grown.edges, grown.layers) == (edges("12 13 23"), CHAIN.layers)


def test_the_papers_path() -> None:
    five = grow_to(CHAIN, [2, 2, 1])
    assert five == Topology(((1, 1), (2, 2), (3, 3), (4, 1), (5, 2)), edges("12 15 23 42 45 53"))
    seven = grow_to(five, [2, 2, 2, 1])
    assert dict(seven.layers) == {1: 1, 4: 1, 2: 2, 5: 2, 6: 3, 7: 3, 3: 4}
    assert seven.edges == edges("12 15 26 27 42 45 56 57 63 73")
    assert (seven.output_node, widths_of(seven)) == (3, [2, 2, 2, 1])
    # Up to the names of nodes that is the layered network.
    assert sorted(len(seven.recipients(n)) for n in seven.nodes) == [0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("path", [[[1], [1, 1], [3, 1]], [[2, 1], [2, 2, 1], [4, 3, 3, 1]], [[1, 1], [1, 3, 1, 1]]])
def test_any_legal_path_ends_in_the_widths_and_keeps_all(path: list[list[int]]) -> None:
    topology = Topology.layered(path[0])
    for widths in path[1:]:
        grown = grow_to(topology, widths)
        check(topology, grown)
        assert widths_of(grown) == widths
        assert len(grown.edges) == sum(a * b for a, b in pairwise(widths))
        topology = grown


def test_new_layers_go_last_unless_they_are_named() -> None:
    assert dict(grow_to(CHAIN, [1, 1, 1, 1]).layers) == {1: 1, 2: 2, 4: 3, 3: 4}
    assert dict(grow_to(CHAIN, [1, 1, 1, 1], new_layers=[1]).layers) == {4: 1, 1: 2, 2: 3, 3: 4}
    # A layer of two has no room in the first of [1,2,1].
    assert dict(grow_to(Topology.layered([2, 1]), [1, 2, 1]).layers) == {4: 1, 1: 2, 2: 2, 3: 3}


DIAMOND = Topology.from_edges(edges("12 13 24 34"))


@pytest.mark.parametrize(
    ("grow", "message"),
    [
        (lambda: widen(CHAIN, 3), r"^widen: layer must be 1 to 2 \(the output layer keeps its one node\), got 3$"),
        (lambda: widen(CHAIN, 1, 0), r"^a growth must add at least 1 node, got 0$"),
        (lambda: deepen(CHAIN, 4), r"^deepen: the new layer must be 1 to 3 \(before the output layer\), got 4$"),
        (lambda: connect(CHAIN, 1, 9), r"^connect: no node 9; there are \[1, 2, 3\]$"),
        (lambda: connect(CHAIN, 1, 2), r"^connect: the edge 1->2 is there already$"),
        (
            lambda: connect(CHAIN, 3, 1),
            r"^connect: an edge must lead to a later layer, got 3 \(layer 3\) -> 1 \(layer 1\)$",
        ),
        (lambda: grow_to(CHAIN, [2, 1]), r"^growth: a network of widths \[1, 1, 1\] does not fit into \[2, 1\]; nodes and lay"),
        (
            lambda: grow_to(Topology.layered([3, 1]), [2, 2, 1]),
            r"widths \[3, 1\] does not fit into \[2, 2, 1\]; .* never removed$",
        ),
        (lambda: grow_to(CHAIN, [2, 2, 2]), r"^--topology\.widths must end in 1 \(one output node\), got \[2, 2, 2\]$"),
        (
            lambda: grow_to(CHAIN, [1, 1, 1, 1], new_layers=[4]),
            r"^growth\.new_layers must name 1 of the layers 1 to 3, got \[4\]$",
        ),
        (
            lambda: grow_to(Topology.layered([2, 1, 1]), [2, 1, 2, 1], new_layers=[1]),
            r"widths \[2, 1, 1\] does not fit into \[2, 1, 2, 1\]",
        ),
        (lambda: check(DIAMOND, CHAIN), r"^growth must keep every node, it removes \[4\]; a network never shrinks$"),
        (
            lambda: check(CHAIN, Topology.from_edges(edges("12 23 34"))),
            r"^growth must keep the output node 3, got 4; write to it instead$",
        ),
        (
            lambda: check(CHAIN, Topology.from_edges(edges("13 23"))),
            r"^growth must keep every edge, it removes 1->2 and puts no new nodes between them$",
        ),
        (lambda: check(CHAIN, Topology.from_edges(edges("23 14 43"))), r"it removes 1->2 and puts no new nodes between them$"),
        (
            lambda: check(CHAIN, Topology(((1, 1), (2, 2), (3, 3), (4, 2)), edges("12 14 23"))),
            r"^growth leaves node 4 an orphan: it writes to no node; give it a recipient$",
        ),
        (
            lambda: check(CHAIN, CHAIN),
            r"^growth changes nothing: the network has widths \[1, 1, 1\] and these edges already; without any flag",
        ),
    ],
)
def test_what_is_no_growth_says_why(grow: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grow()


def test_where_new_adapters_come_from() -> None:
    grown = grow_to(CHAIN, [2, 2, 1])
    assert parse_copies(["zero"], CHAIN, grown) == ((4, None), (5, None))
    assert parse_copies(["copy:2", "4:copy:1"], CHAIN, grown) == ((4, 1), (5, 2))
    assert parse_copies(["copy:2", "5:zero"], CHAIN, grown) == ((4, 2), (5, None))
    for entry, message in [
        ("random", r"^growth\.start must be zero, copy:NODE, NEW:zero or NEW:copy:NODE, got 'random'$"),
        ("2:copy:1", r"^growth\.start '2:copy:1': node 2 is not new; new are \[4, 5\]$"),
        ("copy:4", r"^growth\.start 'copy:4': node 4 is none of the parent's nodes \[1, 2, 3\]$"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_copies([entry], CHAIN, grown)


def growth_of(parent: Topology, grown: Topology, **settings: object) -> Growth:
    return Growth(parent, grown, parse_copies(["zero"], parent, grown), **settings)  # type: ignore[arg-type]  # fields by name


def test_an_annealed_opening_rises_along_a_line() -> None:
    growth = growth_of(CHAIN, grow_to(CHAIN, [2, 2, 1]), at_step=10, opening="annealed", open_steps=4)
    assert [growth.open_probability(step) for step in range(9, 16)] == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    at_once = growth_of(CHAIN, grow_to(CHAIN, [2, 2, 1]), at_step=10, open_steps=4)
    assert (at_once.open_probability(10), at_once.opened_by) == (1.0, 10)


def test_a_record_says_which_adapter_goes_where() -> None:
    five = grow_to(CHAIN, [2, 2, 1])
    record = GrowthConfig(at_step=3, widths=(2, 2, 2, 1), start=("6:copy:2",), noise=0.1, opening="annealed", open_steps=4)
    assert describe(record.build(five, skip=False).record()).splitlines() == [
        "growth at step 3: [2, 2, 1] ─▶ [2, 2, 2, 1]",
        "  kept, with their adapters: (1) (2) (3) (4) (5)",
        "  new: (6) in layer 3, copy of node 2; (7) in layer 3, zero; noise 0.1",
        "  new messages: 2─▶6  2─▶7  5─▶6  5─▶7  6─▶3  7─▶3; now through new nodes: 2─▶3  5─▶3",
        "  opens over 4 steps",
    ]


# Networks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("growing")
    return {family: save_model(make_model(family), parent / family) for family in FAMILIES}


@pytest.fixture(params=["bundled", *FAMILIES])
def backbone(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Backbone:
    return Backbone.load("bundled", device="cpu") if request.param == "bundled" else load_backbone(folders[request.param])


def stir(network: Network, *nodes: int) -> None:
    """Give nodes adapters that do something, each another."""
    for node in nodes:
        generator = torch.Generator().manual_seed(node)
        for module in network.adapters.modules.values():
            row = network.adapters._node_tensor(module, "lora_B", node)
            row.copy_(0.1 * torch.randn(row.shape, generator=generator))


def make_network(backbone: Backbone, topology: Topology) -> Network:
    network = Network(topology, backbone, adapter=SMALL, max_new_tokens=8)
    stir(network, *topology.nodes)
    return network


def questions(count: int) -> list[Example]:
    return [Example(str(i), f"Take {i} steps. Turn left.", "Yes", 'Write "Answer:".') for i in range(count)]


def roll(network: Network, temperature: float, count: int = 4) -> list[Group]:
    return network.rollout(questions(count), 2, seed=(0, 7), temperature=temperature)


def tokens(groups: list[Group]) -> list[list[tuple[int, tuple[int, ...]]]]:
    return [[(c.node, c.sample.token_ids) for rollout in group for c in rollout.completions] for group in groups]


def logprobs(group: Group) -> list[float]:
    return [logprob for rollout in group for c in rollout.completions for logprob in c.sample.logprobs]


GROWN = {
    "widen": grow_to(CHAIN, [2, 2, 1]),
    "deepen": grow_to(CHAIN, [1, 1, 2, 1]),
    "deepen in front": grow_to(CHAIN, [1, 1, 1, 1], new_layers=[1]),
    "connect": connect(CHAIN, 1, 3),
}


@pytest.mark.exact
@pytest.mark.parametrize("kind", GROWN)
def test_a_closed_growth_writes_what_its_parent_writes(backbone: Backbone, kind: str) -> None:
    network = make_network(backbone, CHAIN)
    before = {temperature: roll(network, temperature) for temperature in (0.0, 1.0)}
    growth = growth_of(CHAIN, GROWN[kind], opening="annealed", open_steps=2)
    network.grow(growth)
    stir(network, *growth.new)
    assert network.open_probability == 0
    for temperature, groups in before.items():
        # Everything: nodes, prompts, tokens, log-probabilities to the last bit, messages.
        assert roll(network, temperature) == groups
    network.open_probability = 1.0
    opened = roll(network, 1.0)
    assert {c.node for rollout in opened[0] for c in rollout.completions} == set(GROWN[kind].nodes)
    assert tokens(opened) != tokens(before[1.0])


@pytest.mark.exact
@pytest.mark.parametrize(("kept", "scope"), [(True, "all"), (False, "suffix")])
@pytest.mark.parametrize("path", [([1], [2, 1]), ([1, 1], [1, 2, 1]), ([1, 1, 1], [2, 2, 1], [2, 2, 2, 1])], ids=str)
def test_a_closed_growth_computes_what_its_parent_computes(
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    path: tuple[list[int], ...],
    kept: bool,
    scope: Literal["all", "suffix"],
) -> None:
    """Products of the same shapes in the same order, so that bits are equal whatever kernels a processor has.

    Rows of all nodes decode together; merged weights are kept up to the bytes of one node's, or never.
    """
    backbone = load_backbone(folders["qwen3"])
    adapter = AdapterConfig(rank=2, target_modules=("q_proj", "v_proj", "down_proj"), scope=scope)
    parent = Topology.layered(path[0])
    network = Network(parent, backbone, adapter=adapter, max_new_tokens=8)
    stir(network, *parent.nodes)
    monkeypatch.setattr(neuromas.model.adapters, "MERGED_AT_MOST", network.adapters._linear_bytes if kept else 0)
    for widths in path[1:]:
        before = network.topology
        growth = growth_of(before, grow_to(before, widths), opening="annealed", open_steps=2)
        with listed() as of_parent:
            groups = roll(network, 1.0)
        network.grow(growth)
        stir(network, *growth.new)
        with listed() as of_closed:
            assert roll(network, 1.0) == groups
        assert {"addmm.default", "bmm.default", "weigh", "sample"} <= {name for name, _ in of_parent}
        assert of_closed == of_parent
        network.open_probability = 1.0


@pytest.mark.exact
def test_a_group_is_open_or_closed_as_a_whole(folders: dict[str, Path]) -> None:
    """Rows of open and closed groups share products, whose rounding differs with their size: docs/growth.md gives the bound."""
    network = make_network(load_backbone(folders["qwen3"]), CHAIN)
    growth = growth_of(CHAIN, GROWN["widen"], opening="annealed", open_steps=2)
    closed = roll(network, 1.0, count=12)
    network.grow(growth)
    stir(network, *growth.new)
    network.open_probability = 1.0
    opened = roll(network, 1.0, count=12)
    network.open_probability = 0.5
    mixed = roll(network, 1.0, count=12)
    is_open = [len(group[0].completions) == 5 for group in mixed]
    alone = [opened[i] if is_open[i] else closed[i] for i in range(12)]
    assert tokens(mixed) == tokens(alone)
    for group, expected in zip(mixed, alone, strict=True):
        assert logprobs(group) == pytest.approx(logprobs(expected), rel=0, abs=1e-5)
    assert 2 <= sum(is_open) <= 10
    # With more probability groups open, none closes again; another step draws anew.

    def drawn(probability: float, step: int) -> list[bool]:
        network.open_probability = probability
        return [network.topology_of(example, (0, step)) == network.topology for example in questions(200)]

    few, many = drawn(0.3, 1), drawn(0.6, 1)
    assert all(later or not sooner for sooner, later in zip(few, many, strict=True))
    assert (sum(few), sum(many)) == (pytest.approx(60, abs=25), pytest.approx(120, abs=25))
    assert few == drawn(0.3, 1)
    assert few != drawn(0.3, 2)


def rows(network: Network, node: int) -> dict[str, torch.Tensor]:
    bank = network.adapters
    return {
        f"{name}.{half}": bank._node_tensor(m, half, node).clone() for name, m in bank.modules.items() for half in LORA_MATRICES
    }


def test_old_adapters_are_bit_equal_and_new_ones_zero_or_copies(tiny_backbone: Backbone) -> None:
    network = make_network(tiny_backbone, CHAIN)
    old = {node: rows(network, node) for node in CHAIN.nodes}
    entry = GrowthConfig(widths=(3, 2, 1), start=("5:copy:1", "6:copy:1"))
    network.grow(entry.build(CHAIN, skip=False))
    assert network.adapters.nodes == (1, 2, 3, 4, 5, 6)
    for node in CHAIN.nodes:
        assert all(torch.equal(tensor, old[node][name]) for name, tensor in rows(network, node).items())
    fresh = Network(Topology.layered([4, 1]), Backbone.tiny(0), adapter=SMALL)
    for name, tensor in rows(network, 4).items():
        assert name.endswith("lora_A") or not tensor.any()
        # What it would have been had it been there from the start.
        assert torch.equal(tensor, rows(fresh, 4)[name])
    for node in (5, 6):
        assert all(torch.equal(tensor, old[1][name]) for name, tensor in rows(network, node).items())


def test_noise_is_a_share_of_what_is_copied(tiny_backbone: Backbone) -> None:
    network = make_network(tiny_backbone, CHAIN)
    entry = GrowthConfig(widths=(3, 1, 1), start=("copy:2",), noise=0.25)
    network.grow(entry.build(CHAIN, skip=False))
    source, first, second = (rows(network, node) for node in (2, 4, 5))
    for name, tensor in source.items():
        added = [first[name] - tensor, second[name] - tensor]
        size = tensor.square().mean().sqrt()
        assert [(part.square().mean().sqrt() / size).item() for part in added] == pytest.approx([0.25, 0.25], rel=0.25)
        assert not torch.equal(first[name], second[name])


def test_a_network_grows_only_from_itself_and_when_it_is_open(tiny_backbone: Backbone) -> None:
    network = make_network(tiny_backbone, CHAIN)
    growth = growth_of(CHAIN, GROWN["widen"], opening="annealed", open_steps=2)
    network.grow(growth)
    network.open_probability = 0.5
    further = growth_of(GROWN["widen"], grow_to(GROWN["widen"], [2, 2, 2, 1]))
    with pytest.raises(ValueError, match=r"^the growth before is open with probability 0\.5 only; open it fully first$"):
        network.grow(further)
    network.open_probability = 1.0
    with pytest.raises(ValueError, match=r"^this growth is of another network: its parent has other nodes or edges$"):
        network.grow(growth)
    network.grow(further)
    assert network.adapters.cohorts == [(1, 2, 3), (4, 5), (6, 7)]

"""The architecture: which graphs are networks, in what order their nodes come, and what a wrong graph is told."""

import itertools
import random
import re
from typing import Any

import pytest

from neuromas import Topology


def test_layered_numbers_nodes_through_the_layers_and_connects_neighbouring_layers() -> None:
    topology = Topology.layered([2, 2, 1])
    assert topology.layers == ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3))
    assert topology.edges == ((1, 3), (1, 4), (2, 3), (2, 4), (3, 5), (4, 5))
    assert topology.nodes == (1, 2, 3, 4, 5)
    assert (topology.output_node, topology.depth) == (5, 3)
    assert (topology.senders(4), topology.recipients(2)) == ((1, 2), (3, 4))
    assert (topology.senders(1), topology.recipients(5)) == ((), ())


def test_skip_connects_every_later_layer() -> None:
    assert Topology.layered([1, 1, 1], skip=True).edges == ((1, 2), (1, 3), (2, 3))
    assert Topology.layered([1, 1, 1]).edges == ((1, 2), (2, 3))
    assert Topology.layered([2, 1, 1], skip=True).edges == ((1, 3), (1, 4), (2, 3), (2, 4), (3, 4))


def test_one_node_is_a_network_without_edges() -> None:
    topology = Topology.layered(width for width in (1,))
    assert (topology.nodes, topology.edges, topology.output_node, topology.depth) == ((1,), (), 1, 1)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([], "--topology.widths must be positive, e.g. 1 1 1, got []"),
        ([0, 1], "--topology.widths must be positive, e.g. 1 1 1, got [0, 1]"),
        ([-1, 1], "--topology.widths must be positive, e.g. 1 1 1, got [-1, 1]"),
        ([2, 2], "--topology.widths must end in 1 (one output node), got [2, 2]"),
        ([1, 2], "--topology.widths must end in 1 (one output node), got [1, 2]"),
    ],
)
def test_widths_that_are_no_network(widths: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Topology.layered(widths)


def test_layers_of_explicit_edges_follow_the_longest_path() -> None:
    # 1 -> 2 -> 4 is longer than 1 -> 4, and 3 is a source beside 1.
    topology = Topology.from_edges([(2, 4), (1, 4), (3, 4), (1, 2)])
    assert dict(topology.layers) == {1: 1, 2: 2, 3: 1, 4: 3}
    assert topology.nodes == (1, 3, 2, 4)
    assert topology.edges == ((1, 2), (1, 4), (2, 4), (3, 4))


def test_ids_are_names_and_say_nothing_about_order() -> None:
    topology = Topology.from_edges([(3, 1), (1, 2)])
    assert topology.nodes == (3, 1, 2)
    assert (topology.output_node, topology.layer(3), topology.layer(1)) == (2, 1, 2)


def test_a_chain_is_the_same_network_by_widths_and_by_edges() -> None:
    assert Topology.from_edges([(2, 3), (1, 2)]) == Topology.layered([1, 1, 1])
    assert Topology.from_edges([(1, 2), (1, 3), (2, 3)]) == Topology.layered([1, 1, 1], skip=True)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([], "--topology.edges must name at least one edge, got none; one node is --topology.widths 1"),
        ([(1, 2), (2, 3), (1, 2)], "--topology.edges names [1, 2] more than once; remove the repetition"),
        ([1, 2, 1, 3], "--topology.edges must be pairs of node ids, such as (1, 2), got 1"),
        ([(1, 2, 3)], "--topology.edges must be pairs of node ids, such as (1, 2), got (1, 2, 3)"),
        ([(0, 1)], "--topology.edges must use node ids from 1, got 0"),
        ([(1, 2), (-4, 2)], "--topology.edges must use node ids from 1, got -4"),
        ([(1, 3)], "--topology.edges leaves node 2 unreachable; add an edge or renumber the nodes"),
        ([(1, 1)], "--topology.edges must not form a cycle; nodes [1] wait for each other"),
        ([(1, 2), (2, 1)], "--topology.edges must not form a cycle; nodes [1, 2] wait for each other"),
        ([(1, 2), (2, 3), (3, 2), (3, 4)], "--topology.edges must not form a cycle; nodes [2, 3, 4] wait for each other"),
        (
            [(1, 2), (1, 3)],
            "--topology.edges must lead to one output node, got 2 nodes that send to nobody: [2, 3]; "
            "connect all but one of them onward",
        ),
    ],
)
def test_edges_that_are_no_network(edges: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Topology.from_edges(edges)


def test_a_huge_node_id_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"topology\.edges must use node ids up to 512, got 1,000,000,000,000"):
        Topology.from_edges([(1, 2), (2, 10**12)])


@pytest.mark.parametrize("topology", [Topology.layered([3, 2, 1], skip=True), Topology.from_edges([(3, 1), (1, 2)])])
def test_json_round_trip(topology: Topology) -> None:
    assert Topology.from_json(topology.to_json()) == topology


def test_random_graphs_come_in_an_order_in_which_every_sender_precedes_its_recipient() -> None:
    rng = random.Random(0)
    for _ in range(100):
        names = rng.sample(range(1, 8), 7)
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        # A chain through all nodes keeps one output node, whatever else is drawn.
        edges = set(itertools.pairwise(names)) | set(rng.sample(pairs, 5))
        topology = Topology.from_edges(rng.sample(sorted(edges), len(edges)))
        place = {node: i for i, node in enumerate(topology.nodes)}
        assert sorted(topology.nodes) == list(range(1, 8))
        assert all(place[a] < place[b] and topology.layer(a) < topology.layer(b) for a, b in topology.edges)
        assert {(a, b) for b in topology.nodes for a in topology.senders(b)} == edges
        assert {(a, b) for a in topology.nodes for b in topology.recipients(a)} == edges
        assert topology.output_node == names[-1]

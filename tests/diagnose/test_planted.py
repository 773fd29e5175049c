"""A diagnosis finds what was planted: an ignored edge, a node that does all the work, adapters that only fit their own node."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import randomise

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig
from neuromas.diagnose import KINDS, Kind, picture
from neuromas.diagnose.adapters import distances
from neuromas.diagnose.diagnosis import diagnose
from neuromas.diagnose.report import report
from neuromas.graph import growth
from neuromas.graph.growth import Growth
from neuromas.model.adapters import AdapterBank
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.tasks.navigate import Navigate
from neuromas.types import Example, Request

TASK = Navigate()
EXAMPLES = [Example(f"q{n}", f"Item {n}?", "No" if n % 3 else "Yes", TASK.answer_format) for n in range(24)]
"""Two thirds of the answers are No, which is the floor."""
GOLD = {example.question: example.answer for example in EXAMPLES}
SMALL = AdapterConfig(rank=1, target_modules=("q_proj", "v_proj"))

Script = Callable[[int, str, str], str]
"""What a node writes, by its id, the question, and its own part of the prompt."""
Plant = Callable[[Topology, Script], Network]


@pytest.fixture
def plant(tiny_backbone: Backbone) -> Plant:
    def build(topology: Topology, script: Script) -> Network:
        def write(request: Request) -> str:
            whole = tiny_backbone.detokenize((*request.prompt.prefix_ids, *request.prompt.suffix_ids))
            question, _, own = whole.partition("\n\n")
            return script(request.node, "Item" + question.rpartition("Item")[2], own)

        network = Network(topology, tiny_backbone, adapter=SMALL, engine=ScriptedEngine(write))
        mark(network.adapters)
        return network

    return build


def mark(bank: AdapterBank) -> None:
    """Write a node's id into its adapter, by which `mark_of` tells whose adapter is in its place."""
    for node in bank.nodes:
        next(bank.factors(node))[1].fill_(node)


def mark_of(network: Network, node: int) -> int:
    return int(next(network.adapters.factors(node))[1][0, 0])


def effects(network: Network, *kinds: Kind, **settings: Any) -> dict[str, dict[str, Any]]:
    found = diagnose(network, TASK, EXAMPLES, kinds or KINDS, **settings)
    return {effect["name"]: effect for effect in found["effects"]}


def heard(own: str, sender: int) -> str:
    """Return what a node reads from a sender."""
    return own.partition(f"From node {sender}: ")[2].partition("\n")[0]


def copy_of_node_1(node: int, question: str, own: str) -> str:
    if node < 3:
        return f"TO node 3: {GOLD[question] if node == 1 else f'hm {question}'}"
    return f"Answer: {'Yes' if heard(own, 1) == 'Yes' else 'No'}"


def test_an_ignored_edge_and_one_that_carries_the_answer(plant: Plant) -> None:
    found = effects(plant(Topology.from_edges([(1, 3), (2, 3)]), copy_of_node_1))
    readings = {name: effect["reading"] for name, effect in found.items()}
    assert readings == {
        "bare backbone, all nodes": "no answer changes",
        "silence node 1": "loss", "silence node 2": "no answer changes",
        "drop 1─▶3": "loss", "drop 2─▶3": "no answer changes",
        "shuffle 1─▶3": "loss", "shuffle 2─▶3": "no answer changes",
        "swap 1─▶3 and 2─▶3": "loss",
        "bare node 1": "no answer changes", "bare node 2": "no answer changes", "bare node 3": "no answer changes",
        "exchange adapters of 1 and 2": "no answer changes", "exchange adapters of 1 and 3": "no answer changes",
        "exchange adapters of 2 and 3": "no answer changes",
    }  # fmt: skip
    dropped, ignored = found["drop 1─▶3"], found["drop 2─▶3"]
    # Without the message node 3 always says No: the third that is Yes is lost.
    assert (dropped["accuracy"], dropped["change"]) == (pytest.approx(2 / 3), pytest.approx(-1 / 3))
    assert (dropped["answers_changed"], dropped["disturbed"]) == (pytest.approx(1 / 3), 1)
    assert (ignored["change"], ignored["low"], ignored["disturbed"]) == (0, -ignored["high"], 1)
    # 24 questions that do not change leave room for some that would: (0 +- 1.96 sqrt(1 / 26)) / sqrt(26).
    assert ignored["high"] == pytest.approx(1.96 / 26, rel=1e-3)


def test_a_node_that_does_all_the_work(plant: Plant) -> None:
    def script(node: int, question: str, own: str) -> str:
        if node < 3:
            return f"TO node {node + 1}: thinking about {question}"
        return f"Answer: {GOLD[question] if mark_of(network, 3) == 3 else 'No'}"

    network = plant(Topology.layered([1, 1, 1]), script)
    readings = {name: effect["reading"] for name, effect in effects(network).items()}
    losses = [name for name, reading in readings.items() if reading == "loss"]
    assert losses == [
        "bare backbone, all nodes", "bare node 3", "exchange adapters of 1 and 3", "exchange adapters of 2 and 3"
    ]  # fmt: skip
    assert {reading for name, reading in readings.items() if name not in losses} == {"no answer changes"}


def test_adapters_that_only_fit_their_own_node(plant: Plant) -> None:
    def script(node: int, question: str, own: str) -> str:
        fits = mark_of(network, node) == node
        if node == 1:
            return f"TO node 2: {GOLD[question] if fits else 'hm'}"
        return f"Answer: {'Yes' if fits and heard(own, 1) == 'Yes' else 'No'}"

    network = plant(Topology.layered([1, 1]), script)
    before = {name: parameter.clone() for name, parameter in network.adapters.parameters().items()}
    found = effects(network, "exchange")
    assert found["exchange adapters of 1 and 2"]["accuracy"] == pytest.approx(2 / 3)
    assert found["exchange adapters of 1 and 2"]["reading"] == "loss"
    assert all(torch.equal(before[name], parameter) for name, parameter in network.adapters.parameters().items())
    assert network.adapters.version == 2


def test_a_node_with_several_recipients_says_different_things_to_them(plant: Plant) -> None:
    def script(node: int, question: str, own: str) -> str:
        if node == 1:
            return f"TO node 2: {GOLD[question]} TO node 3: other"
        if node < 4:
            return f"TO node 4: {heard(own, 1)}"
        return f"Answer: {'Yes' if heard(own, 2) == 'Yes' else 'No'}"

    found = effects(plant(Topology.layered([1, 2, 1]), script), "swap", "drop", "shuffle")
    assert {name: effect["reading"] for name, effect in found.items()} == {
        "swap 1─▶2 and 1─▶3": "loss", "swap 2─▶4 and 3─▶4": "loss",
        "drop 1─▶2": "loss", "drop 1─▶3": "no answer changes", "drop 2─▶4": "loss", "drop 3─▶4": "no answer changes",
        # All questions have the same message there.
        "shuffle 1─▶2": "loss", "shuffle 1─▶3": "nothing to disturb", "shuffle 2─▶4": "loss",
        "shuffle 3─▶4": "nothing to disturb",
    }  # fmt: skip


@pytest.mark.parametrize(("wrong", "reading"), [("No", "uninformative"), ("gold", "uninformative"), ("mixed", "not shown")])
def test_where_nothing_can_be_lost_or_gained_an_effect_says_so(plant: Plant, wrong: str, reading: str) -> None:
    """The output node says `wrong`, and the opposite to one question, where it reads nothing."""

    def script(node: int, question: str, own: str) -> str:
        if node == 1:
            return "TO node 2: x"
        usual = {"No": "No", "gold": GOLD[question], "mixed": "Yes" if question == "Item 1?" else GOLD[question]}[wrong]
        flipped = question == "Item 5?" and heard(own, 1) == "(nothing)"
        return f"Answer: {('Yes' if usual == 'No' else 'No') if flipped else usual}"

    found = effects(plant(Topology.layered([1, 1]), script), "drop")["drop 1─▶2"]
    assert (found["answers_changed"], found["reading"]) == (pytest.approx(1 / 24), reading)


def test_removing_what_harms_is_a_gain(plant: Plant) -> None:
    balanced = [Example(f"r{n}", f"Item {n}?", "Yes" if n % 2 else "No", TASK.answer_format) for n in range(40)]

    def script(node: int, question: str, own: str) -> str:
        number = int(question[5:-1])
        # The message misleads it in a quarter of the questions.
        misled = number % 4 == 0 and heard(own, 1) == "x"
        return "TO node 2: x" if node == 1 else f"Answer: {'Yes' if number % 2 or misled else 'No'}"

    network = plant(Topology.layered([1, 1]), script)
    (gain,) = diagnose(network, TASK, [*balanced, balanced[0]], ["silence"])["effects"]
    assert (gain["change"], gain["reading"]) == (pytest.approx(1 / 4), "gain")


def test_an_answer_that_cannot_be_read_changes_with_its_text(plant: Plant) -> None:
    network = plant(Topology.layered([1, 1]), lambda node, question, own: "TO node 2: x" if node == 1 else own)
    found = effects(network, "drop")["drop 1─▶2"]
    assert (found["answers_changed"], found["reading"]) == (1, "uninformative")


def test_a_network_that_is_opening_has_new_edges_in_some_questions_only(plant: Plant) -> None:
    def script(node: int, question: str, own: str) -> str:
        return f"TO node 2: {GOLD[question]}" if node != 2 else f"Answer: {heard(own, 3) or heard(own, 1)}"

    parent = Topology.layered([1, 1])
    network = plant(parent, script)
    grown = growth.grow_to(parent, (2, 1), new_layers=(), skip=False)
    network.grow(Growth(parent, grown, ((3, None),), at_step=0, opening="annealed", open_steps=2, warmup_new=0, noise=0.0))
    network.open_probability = 0.5
    found = effects(network, "drop", "shuffle", "swap", "silence")
    assert 0 < found["drop 3─▶2"]["disturbed"] < 1
    assert found["drop 1─▶2"]["disturbed"] == 1
    assert found["swap 1─▶2 and 3─▶2"]["reading"] == "nothing to disturb"
    assert found["drop 3─▶2"]["disturbed"] == found["silence node 3"]["disturbed"]


def test_nodes_that_share_an_adapter_are_bare_together(tiny_backbone: Backbone) -> None:
    engine = ScriptedEngine(lambda request: "TO node 2: x" if request.node == 1 else "Answer: No")
    shared = AdapterConfig(rank=1, shared=True)
    network = Network(Topology.layered([1, 1]), tiny_backbone, adapter=shared, engine=engine)
    assert list(effects(network, "bare", "exchange")) == ["bare backbone, all nodes"]


def test_distances_are_those_of_the_full_matrices(tiny_backbone: Backbone) -> None:
    bank = Network(Topology.layered([1, 1, 1]), tiny_backbone, adapter=AdapterConfig(rank=2)).adapters
    assert distances(bank)["pairs"][0] == {"nodes": [1, 2], "cosine": None, "distance": 0.0}
    randomise(bank)
    full = [
        torch.cat([(bank.state.scaling * b.double() @ a.double()).flatten() for a, b in bank.factors(n)]) for n in (1, 2, 3)
    ]
    found = distances(bank)
    assert list(found["norms"].values()) == pytest.approx([float(update.norm()) for update in full])
    first = found["pairs"][0]
    assert first["cosine"] == pytest.approx(float(torch.cosine_similarity(full[0], full[1], dim=0)))
    assert first["distance"] == pytest.approx(float((full[0] - full[1]).norm()))
    assert [pair["nodes"] for pair in found["pairs"]] == [[1, 2], [1, 3], [2, 3]]


def test_common_random_numbers_change_nothing_where_nothing_is_changed(tiny_backbone: Backbone) -> None:
    network = Network(Topology.layered([2, 1]), tiny_backbone, adapter=SMALL, max_new_tokens=6)
    (rollout,) = network.rollout(EXAMPLES[:1], 1, seed=(3,))[0]
    (same,) = network.redeliver([rollout], lambda rollout, m: m.text, seed=(3,), temperature=1.0)
    assert same == rollout
    (other,) = network.redeliver([rollout], lambda r, m: "x" if m.sender == 1 else m.text, seed=(3,), temperature=1.0)
    # What does not follow is kept as it is; the changed message stands in what its sender has sent.
    assert [c.sample for c in other.completions[:2]] == [c.sample for c in rollout.completions[:2]]
    assert [m.text for c in other.completions for m in c.messages] == ["x", rollout.completions[1].messages[0].text]
    assert "From node 1: x" in tiny_backbone.detokenize(other.completions[2].prompt.suffix_ids)


def test_a_picture_has_its_limit_and_a_report_explains_what_it_shows(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "MOST_EFFECTS", 2)
    found = diagnose(plant(Topology.from_edges([(1, 3), (2, 3)]), copy_of_node_1), TASK, EXAMPLES, KINDS, seed=1)
    many = {"step": 1, "split": "validation", **found, "training": {"steps": [], "nodes": {}}}
    many["effects"] = [many["effects"][1] | {"name": f"effect {n}"} for n in range(5)]
    assert picture.draw(many).startswith(b"\x89PNG")
    text = report(many)
    assert "undisturbed, validation: 100.0% (n 24" in text
    assert "loss: answers get worse" in text
    assert "gain: answers get better" not in text

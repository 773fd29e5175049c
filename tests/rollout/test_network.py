"""Message passing over the graph, with a scripted engine.

1. Sources are requested at once, for every rollout; any other node as soon as its last sender has written.
2. Nothing waits for a layer: a node may write before another node of an earlier layer has written.
3. A node reads the messages addressed to it, in the order of its senders' ids, and nothing else of what was written.
4. What a node writes cannot break a rollout: a malformed text has a status, and the recipient reads something.
5. A request's seed is (seed, example, rollout, node), whatever the order of work.
6. A rollout holds its completions in topological order; the output node is last, sends nothing and gives the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig
from neuromas.graph.messages import NOTHING
from neuromas.rollout.engine import Engine, OnSample
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.types import Example, MessageStatus, Request, Sample

EXAMPLES = [Example(name, f"Question {name}?", "Yes", "Write the answer.") for name in ("a", "b")]
SMALL = AdapterConfig(rank=1, target_modules=("q_proj",))


def sample(text: str) -> Sample:
    ids = tuple(text.encode())
    return Sample(ids, (0.0,) * len(ids), (text,), stopped=True, adapter_version=0)


class NewestFirst:
    """An engine that answers the newest request first, so that one rollout ends before the next begins."""

    def __init__(self, script: Callable[[Request], str]) -> None:
        self.script = script
        self.answered: list[tuple[int | str, ...]] = []

    def generate(
        self, requests: Sequence[tuple[int, Request]], on_sample: OnSample, *, temperature: float, max_new_tokens: int
    ) -> None:
        waiting = list(requests)
        while waiting:
            key, request = waiting.pop()
            self.answered.append(request.seed)
            waiting.extend(on_sample(key, sample(self.script(request))))


def to_all(topology: Topology) -> Callable[[Request], str]:
    """Return a script in which node n writes `n>r` to each recipient r, and the output node answers."""

    def script(request: Request) -> str:
        recipients = topology.recipients(request.node)
        return " ".join(f"TO node {r}: {request.node}>{r}" for r in recipients) or "Answer: Yes"

    return script


@pytest.fixture
def make(tiny_backbone: Backbone) -> Callable[[Topology, Engine], Network]:
    """Return a function that builds the test's network on the tiny backbone."""
    return lambda topology, engine: Network(topology, tiny_backbone, adapter=SMALL, engine=engine)


@pytest.fixture
def read(tiny_backbone: Backbone) -> Callable[[Request], list[str]]:
    """Return a function that gives the lines of a node's own part of its prompt."""

    def lines(request: Request) -> list[str]:
        whole = tiny_backbone.detokenize((*request.prompt.prefix_ids, *request.prompt.suffix_ids))
        return whole.split("?\n\n", 1)[1].splitlines()

    return lines


Make = Callable[[Topology, Engine], Network]
Read = Callable[[Request], list[str]]


def test_sources_first_then_each_node_when_its_inbox_is_complete(make: Make) -> None:
    topology = Topology.layered([2, 2, 1])
    engine = ScriptedEngine(to_all(topology))
    make(topology, engine).rollout(EXAMPLES[:1], 2, seed=(0,))
    requested = [(request.node, request.seed[-2]) for request in engine.requests]
    # (node, rollout): nodes 3 and 4 become ready with the last of 1 and 2, node 5 with the last of 3 and 4.
    assert requested == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 0), (3, 1), (4, 1), (5, 0), (5, 1)]


def test_a_node_reads_what_is_addressed_to_it(make: Make, read: Read) -> None:
    topology = Topology.layered([2, 2, 1])
    engine = ScriptedEngine(to_all(topology))
    make(topology, engine).rollout(EXAMPLES[:1], 1, seed=(0,))
    texts = {request.node: read(request) for request in engine.requests}
    assert texts == {
        1: ["You are node 1 in layer 1.", 'Write "TO node 3:" and "TO node 4:" and your message.'],
        2: ["You are node 2 in layer 1.", 'Write "TO node 3:" and "TO node 4:" and your message.'],
        3: ["You are node 3 in layer 2.", "From node 1: 1>3", "From node 2: 2>3", 'Write "TO node 5:" and your message.'],
        4: ["You are node 4 in layer 2.", "From node 1: 1>4", "From node 2: 2>4", 'Write "TO node 5:" and your message.'],
        5: ["You are node 5 in the output layer.", "From node 3: 3>5", "From node 4: 4>5", "Write the answer."],
    }


def test_a_skip_edge_carries_a_message_past_a_layer(make: Make, read: Read) -> None:
    topology = Topology.layered([1, 1, 1], skip=True)
    engine = ScriptedEngine(to_all(topology))
    make(topology, engine).rollout(EXAMPLES[:1], 1, seed=(0,))
    assert [request.node for request in engine.requests] == [1, 2, 3]
    assert read(engine.requests[2])[1:3] == ["From node 1: 1>3", "From node 2: 2>3"]


def test_messages_are_read_by_senders_id_whichever_is_written_first(make: Make, read: Read) -> None:
    topology = Topology.layered([3, 1])
    seen: list[list[str]] = []
    script = to_all(topology)

    def recording_script(request: Request) -> str:
        seen.append(read(request))
        return script(request)

    make(topology, NewestFirst(recording_script)).rollout(EXAMPLES[:1], 1, seed=(0,))
    assert seen[-1][1:4] == ["From node 1: 1>4", "From node 2: 2>4", "From node 3: 3>4"]


def test_no_layer_or_rollout_waits_for_another(make: Make) -> None:
    # Two arms, 1 -> 3 and 2 -> 4, that meet in 5.
    topology = Topology.from_edges([(1, 3), (2, 4), (3, 5), (4, 5)])
    engine = NewestFirst(to_all(topology))
    make(topology, engine).rollout(EXAMPLES, 1, seed=(0,))
    nodes = [(seed[1], seed[-1]) for seed in engine.answered]
    # Node 4 of layer 2 writes before node 1 of layer 1, and example b is answered before node 1 has read example a.
    assert nodes == [("b", 2), ("b", 4), ("a", 2), ("a", 4), ("b", 1), ("b", 3), ("b", 5), ("a", 1), ("a", 3), ("a", 5)]


def test_the_order_of_work_changes_nothing_in_the_rollouts() -> None:
    topology = Topology.layered([2, 2, 1], skip=True)

    def run(engine: Engine) -> object:
        return Network(topology, Backbone.tiny(0), adapter=SMALL, engine=engine).rollout(EXAMPLES, 3, seed=(5, 1))

    assert run(ScriptedEngine(to_all(topology))) == run(NewestFirst(to_all(topology)))


def test_seeds_name_run_example_rollout_and_node(make: Make) -> None:
    engine = ScriptedEngine(lambda request: "TO node 2: x")
    make(Topology.layered([1, 1]), engine).rollout(EXAMPLES, 2, seed=(7, "step", 3))
    assert sorted(request.seed for request in engine.requests) == sorted(
        (7, "step", 3, example, index, node) for example in "ab" for index in (0, 1) for node in (1, 2)
    )


def test_groups_hold_the_rollouts_of_one_example_in_order(make: Make) -> None:
    topology = Topology.from_edges([(3, 1), (1, 2)])
    groups = make(topology, ScriptedEngine(to_all(topology))).rollout(EXAMPLES, 3, seed=(0,))
    assert [[(rollout.example.id, rollout.index) for rollout in group] for group in groups] == [
        [("a", 0), ("a", 1), ("a", 2)],
        [("b", 0), ("b", 1), ("b", 2)],
    ]
    for group in groups:
        for rollout in group:
            assert [completion.node for completion in rollout.completions] == [3, 1, 2]
            assert rollout.completions[-1].messages == ()
            assert rollout.answer == "Answer: Yes"


def test_rollouts_of_an_example_share_a_prefix(make: Make, tiny_backbone: Backbone) -> None:
    """Nodes with an inbox share the question; all other prompts are the same in every rollout and shared as a whole."""
    topology = Topology.layered([2, 1, 1])
    engine = ScriptedEngine(to_all(topology))
    make(topology, engine).rollout(EXAMPLES, 2, seed=(0,))
    for name in "ab":
        prefixes: dict[int, set[tuple[int, ...]]] = {}
        for request in engine.requests:
            if request.seed[1] == name:
                prefixes.setdefault(request.node, set()).add(request.prompt.prefix_ids)
        assert all(len(shared) == 1 for shared in prefixes.values())
        texts = {node: tiny_backbone.detokenize(*shared) for node, shared in prefixes.items()}
        assert texts[3] == texts[4]
        assert texts[3].endswith(f"Question {name}?\n\n")
        assert f"Question {name}?\n\n" in texts[1]
        assert len({texts[1], texts[2], texts[3]}) == 3


def test_nodes_with_one_adapter_share_the_question(tiny_backbone: Backbone) -> None:
    topology = Topology.layered([2, 1])
    engine = ScriptedEngine(to_all(topology))
    Network(topology, tiny_backbone, adapter=replace(SMALL, shared=True), engine=engine).rollout(EXAMPLES, 2, seed=(0,))
    assert len({request.prompt.prefix_ids for request in engine.requests}) == 2


@pytest.mark.parametrize(
    ("text", "text_read", "status"),
    [
        ("TO node 3: fine", "fine", MessageStatus.OK),
        ("no header at all", "no header at all", MessageStatus.UNADDRESSED),
        ("TO node 1: wrong way", NOTHING, MessageStatus.MISSING),
        ("TO node 99: nobody", NOTHING, MessageStatus.MISSING),
        ("TO node 3:", NOTHING, MessageStatus.EMPTY),
        ("", NOTHING, MessageStatus.EMPTY),
    ],
)
def test_malformed_output_is_recorded_and_the_recipient_reads_something(
    make: Make, read: Read, text: str, text_read: str, status: MessageStatus
) -> None:
    engine = ScriptedEngine(
        lambda request: text if request.node == 2 else "TO node 2: go" if request.node == 1 else "TO node 1: ?"
    )
    rollout = make(Topology.layered([1, 1, 1]), engine).rollout(EXAMPLES[:1], 1, seed=(0,))[0][0]
    (message,) = rollout.completions[1].messages
    assert (message.sender, message.recipient, message.text, message.status) == (2, 3, text_read, status)
    assert read(engine.requests[2])[1] == f"From node 2: {text_read}"
    # The output node has no recipients: its text is the answer, with a header or without.
    assert (rollout.answer, rollout.completions[2].messages) == ("TO node 1: ?", ())


def test_text_for_one_recipient_stays_with_that_recipient(make: Make, read: Read) -> None:
    topology = Topology.from_edges([(1, 2), (1, 3), (2, 4), (3, 4)])
    engine = ScriptedEngine(lambda request: "TO node 2: secret" if request.node == 1 else "TO node 4: x")
    make(topology, engine).rollout(EXAMPLES[:1], 1, seed=(0,))
    texts = {request.node: read(request) for request in engine.requests}
    assert texts[2][1] == "From node 1: secret"
    assert texts[3][1] == f"From node 1: {NOTHING}"
    assert not any("secret" in line for line in texts[3] + texts[4])


def test_one_node_answers_alone(make: Make, read: Read) -> None:
    engine = ScriptedEngine(lambda request: "Answer: No")
    groups = make(Topology.layered([1]), engine).rollout(EXAMPLES, 2, seed=(0,))
    assert [[rollout.answer for rollout in group] for group in groups] == [["Answer: No"] * 2] * 2
    assert read(engine.requests[0]) == ["You are node 1 in the output layer.", "Write the answer."]


def test_no_examples_give_no_groups(make: Make) -> None:
    engine = ScriptedEngine(lambda request: "")
    assert make(Topology.layered([1]), engine).rollout([], 2, seed=(0,)) == []
    assert engine.requests == []


def test_ask_puts_one_question_with_its_answer_format(make: Make, read: Read) -> None:
    topology = Topology.layered([1, 1])
    engine = ScriptedEngine(to_all(topology))
    rollout = make(topology, engine).ask("What is 17 + 25?", answer_format="Write a number.")
    assert rollout.example.question == "What is 17 + 25?"
    assert [message.text for message in rollout.completions[0].messages] == ["1>2"]
    assert read(engine.requests[1])[-1] == "Write a number."
    assert rollout.answer == "Answer: Yes"


# Replays

DIAMOND = Topology.from_edges([(1, 3), (2, 3), (2, 4), (3, 4)])


def test_a_replay_keeps_what_does_not_follow_from_the_text(make: Make, read: Read) -> None:
    engine = ScriptedEngine(lambda request: f"{'again' * ('replay' in request.seed)} TO node 3: {request.node} TO node 4: hi")
    network = make(DIAMOND, engine)
    ((first, second),) = network.rollout(EXAMPLES[:1], 2, seed=(5,))
    before = len(engine.requests)
    found = network.replay([(second, 3, 2), (first, 1, 1)], seed=(5,), temperature=1.0)
    assert [(request.node, request.seed) for request in engine.requests[before:]] == [
        (1, (5, "replay", 1, 1, "a", 0, 1)), (3, (5, "replay", 3, 2, "a", 1, 3)),
        (3, (5, "replay", 1, 1, "a", 0, 3)), (4, (5, "replay", 3, 2, "a", 1, 4)), (4, (5, "replay", 1, 1, "a", 0, 4)),
    ]  # fmt: skip
    assert [[c.node for c in each.written] for each in found] == [[3, 4], [1, 3, 4]]
    for each, of in zip(found, (second, first), strict=True):
        anew = {completion.node for completion in each.written}
        assert [c.node for c in each.rollout.completions] == [1, 2, 3, 4]
        assert all(c is old for c, old in zip(each.rollout.completions, of.completions, strict=True) if c.node not in anew)
        assert all(c.text.startswith("again") == (c.node in anew) for c in each.rollout.completions)
        assert (each.rollout.example, each.rollout.index) == (of.example, of.index)


def test_a_message_that_is_removed_is_read_as_nothing(make: Make, read: Read) -> None:
    engine = ScriptedEngine(to_all(DIAMOND))
    network = make(DIAMOND, engine)
    ((rollout,),) = network.rollout(EXAMPLES[:1], 1, seed=(5,))
    before = {request.node: request.seed for request in engine.requests}
    without_first, without_last = network.replay([(rollout, 1, 0), (rollout, 4, 0)], seed=(5,), temperature=1.0, remove=True)
    asked = engine.requests[4:]
    # What follows draws by the random numbers of the rollout.
    assert [(request.node, request.seed) for request in asked] == [(3, before[3]), (4, before[4])]
    assert read(asked[0])[1:3] == [f"From node 1: {NOTHING}", "From node 2: 2>3"]
    assert [c.node for c in without_first.written] == [3, 4]
    removed = without_first.rollout.completions[0]
    assert (removed.text, [m.status for m in removed.messages]) == ("", [MessageStatus.EMPTY])
    assert (without_last.rollout.answer, without_last.written) == ("", ())

"""What a node reads, and how its text becomes messages: malformed text is data, never an exception."""

import random

import pytest

from neuromas import Topology
from neuromas.graph.messages import NOTHING, parse
from neuromas.graph.wording import WORDINGS
from neuromas.types import Example, Message, MessageStatus

EXAMPLE = Example("id", "Is 2 even?", "Yes", 'Write "Answer: Yes" or "Answer: No".')
CHAIN = Topology.layered([1, 1, 1])
render = WORDINGS["terse"].render


def statuses(messages: tuple[Message, ...]) -> list[tuple[int, str, MessageStatus]]:
    return [(message.recipient, message.text, message.status) for message in messages]


def test_first_node_reads_its_place_and_whom_to_write_to() -> None:
    assert render(CHAIN, 1, EXAMPLE, []) == 'You are node 1 in layer 1.\nWrite "TO node 2:" and your message.'


def test_middle_node_reads_its_inbox() -> None:
    inbox = [Message(1, 2, "start 0 0\nfirst 3 left", MessageStatus.OK)]
    assert render(CHAIN, 2, EXAMPLE, inbox) == (
        'You are node 2 in layer 2.\nFrom node 1: start 0 0\nfirst 3 left\nWrite "TO node 3:" and your message.'
    )


def test_output_node_reads_the_answer_format_and_no_recipients() -> None:
    inbox = [Message(2, 3, NOTHING, MessageStatus.MISSING)]
    assert render(CHAIN, 3, EXAMPLE, inbox) == (
        'You are node 3 in the output layer.\nFrom node 2: (nothing)\nWrite "Answer: Yes" or "Answer: No".'
    )


def test_several_senders_and_recipients_come_in_order() -> None:
    topology = Topology.layered([2, 1, 2, 1])
    inbox = [Message(1, 3, "a", MessageStatus.OK), Message(2, 3, "b", MessageStatus.UNADDRESSED)]
    assert render(topology, 3, EXAMPLE, inbox) == (
        'You are node 3 in layer 2.\nFrom node 1: a\nFrom node 2: b\nWrite "TO node 4:" and "TO node 5:" and your message.'
    )


def test_a_prompt_does_not_change_when_nodes_that_it_does_not_talk_to_come() -> None:
    grown = Topology.from_edges([(1, 2), (2, 3), (4, 5), (5, 3)])
    for node, inbox in ((1, []), (2, [Message(1, 2, "x", MessageStatus.OK)])):
        assert render(grown, node, EXAMPLE, inbox) == render(CHAIN, node, EXAMPLE, inbox)


def test_a_segment_for_each_recipient() -> None:
    text = "TO node 3: left\nTO node 4: right, then TO node 3, no colon"
    assert statuses(parse(text, 1, (3, 4))) == [
        (3, "left", MessageStatus.OK),
        (4, "right, then TO node 3, no colon", MessageStatus.OK),
    ]
    assert [message.sender for message in parse(text, 1, (3, 4))] == [1, 1]


def test_a_missing_segment_gives_the_placeholder() -> None:
    assert statuses(parse("TO node 3: left", 1, (3, 4))) == [
        (3, "left", MessageStatus.OK),
        (4, NOTHING, MessageStatus.MISSING),
    ]


def test_a_text_without_segments_goes_to_everybody() -> None:
    assert statuses(parse("  the start is 0 0 \n", 1, (3, 4))) == [
        (3, "the start is 0 0", MessageStatus.UNADDRESSED),
        (4, "the start is 0 0", MessageStatus.UNADDRESSED),
    ]


@pytest.mark.parametrize("text", ["TO node 3:", "TO node 3:  \n ", "", " \n"])
def test_nothing_written_gives_the_placeholder(text: str) -> None:
    assert statuses(parse(text, 1, (3,))) == [(3, NOTHING, MessageStatus.EMPTY)]


def test_repeated_segments_are_joined_in_order_and_empty_ones_left_out() -> None:
    text = "TO node 3: first TO node 4: other TO node 3: TO node 3: second"
    assert statuses(parse(text, 1, (3, 4))) == [
        (3, "first\nsecond", MessageStatus.OK),
        (4, "other", MessageStatus.OK),
    ]


def test_segments_for_strangers_and_the_text_before_the_first_are_dropped() -> None:
    assert statuses(parse("thinking aloud TO node 9: psst TO node 3: hi", 1, (3,))) == [(3, "hi", MessageStatus.OK)]
    assert statuses(parse("thinking aloud TO node 9: psst", 1, (3,))) == [(3, NOTHING, MessageStatus.MISSING)]


def test_a_node_cannot_write_to_itself_or_back() -> None:
    assert statuses(parse("TO node 2: me TO node 1: you", 2, (3,))) == [(3, NOTHING, MessageStatus.MISSING)]


def test_the_header_is_read_in_any_case_with_leading_zeros_and_at_a_word_boundary_only() -> None:
    assert statuses(parse("to NODE 03: hi", 1, (3,))) == [(3, "hi", MessageStatus.OK)]
    assert statuses(parse("go into node 3: hi", 1, (3,))) == [(3, "go into node 3: hi", MessageStatus.UNADDRESSED)]


@pytest.mark.parametrize("number", ["3" * 5000, "0" * 20 + "3", "4294967299"])
def test_a_huge_number_names_nobody(number: str) -> None:
    assert statuses(parse(f"TO node {number}: x", 1, (3,))) == [(3, NOTHING, MessageStatus.MISSING)]
    assert statuses(parse(f"TO node {number}: x TO node 3: y", 1, (3,))) == [(3, "y", MessageStatus.OK)]


def test_the_output_node_sends_nothing() -> None:
    assert parse("TO node 1: hello. Answer: Yes", 3, ()) == ()


def test_any_text_gives_one_message_for_each_recipient() -> None:
    rng = random.Random(0)
    pieces = [
        "TO node ",
        "to node",
        "TO node 3:",
        "TO node 4:",
        "3",
        "\u0663:",
        ":",
        "\n",
        " ",
        "\x00",
        "\ud800",
        "é",
        "-1:",
        "9" * 30,
    ]
    for _ in range(1000):
        text = "".join(
            rng.choice(pieces) if rng.random() < 0.8 else chr(rng.randrange(0x110000)) for _ in range(rng.randrange(25))
        )
        messages = parse(text, 1, (3, 4))
        assert [message.recipient for message in messages] == [3, 4]
        for message in messages:
            # A recipient always reads something, and the placeholder exactly where a fault says so.
            assert message.text.strip()
            placeholder = message.status in (MessageStatus.MISSING, MessageStatus.EMPTY)
            assert placeholder is (message.text == NOTHING)

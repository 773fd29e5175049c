"""The pictures of what nodes say before and after training, drawn from scripted networks."""

import re
from collections.abc import Callable
from io import BytesIO

import pytest

from docs.make_pictures import THEMES, ask, draw, edge_texts, first_corrected
from neuromas import Backbone, Network, Topology
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.tasks.navigate import Navigate
from neuromas.types import Example

TASK = Navigate()
FORWARD, BACK = (Example(a, f"Take {a} steps.\nOptions:", a, TASK.answer_format) for a in ("No", "Yes"))


@pytest.fixture
def answering(tiny_backbone: Backbone) -> Callable[..., Network]:
    """Builds a network that always gives one answer."""

    def build(answer: str, widths: tuple[int, ...] = (1, 1)) -> Network:
        engine = ScriptedEngine(lambda request: f"TO node {request.node + 1}: 1: 2 left;2: $3 <b>\nAnswer: {answer}")
        return Network(Topology.layered(widths), tiny_backbone, engine=engine)

    return build


Answering = Callable[..., Network]


def test_the_question_is_the_first_that_training_corrected(answering: Answering) -> None:
    before, after = answering("Yes"), answering("No")
    assert first_corrected([BACK, FORWARD, FORWARD], before, after, TASK) == 1
    with pytest.raises(ValueError, match="none of the first 1 test questions is wrong before training and right after it"):
        first_corrected([BACK], before, after, TASK)


def test_a_chain_has_a_text_on_every_edge(answering: Answering) -> None:
    first, last = edge_texts(ask(answering("No"), FORWARD))
    assert first.startswith("1: 2 left;2: $3 <b>")
    assert last.endswith("Answer: No")


def test_other_networks_are_refused(answering: Answering) -> None:
    with pytest.raises(ValueError, match="only chains can be drawn: networks of widths 1 1"):
        edge_texts(ask(answering("No", (2, 1)), FORWARD))


@pytest.mark.parametrize("theme", THEMES)
def test_wrong_and_right_answers_have_their_colors(answering: Answering, theme: str) -> None:
    wrong, right = (ask(answering(answer), FORWARD) for answer in ("Yes", "No"))
    one, both = BytesIO(), BytesIO()
    draw(FORWARD, {"before": wrong}, TASK, THEMES[theme]).savefig(one, format="svg")
    draw(FORWARD, {"before": wrong, "after": right}, TASK, THEMES[theme]).savefig(both, format="svg")
    colors = THEMES[theme].wrong, THEMES[theme].right
    assert [color in one.getvalue().decode() for color in colors] == [True, False]
    assert [color in both.getvalue().decode() for color in colors] == [True, True]
    assert not re.search(r"<(text|image)\b", both.getvalue().decode())

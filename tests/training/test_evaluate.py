"""Scores: accuracy never stands without n, interval, floor, parse rate and cost."""

import dataclasses
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest

from neuromas import Backbone, Network, Topology
from neuromas.compare.statistics import wilson
from neuromas.config import AdapterConfig
from neuromas.model.policy import Policy
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.tasks import Navigate
from neuromas.training.evaluate import UNPARSED, Evaluation, evaluate, score
from neuromas.types import Completion, Example, Prompt, Request, Rollout, Sample

TASK = Navigate()
NUMBERS = count()


def rollout(gold: str, text: str, *, calls: int = 1, tokens: int = 5, example: str | None = None) -> Rollout:
    """A rollout of `calls` nodes, each of which read 3 + 4 tokens and wrote `tokens`; to a new question, if not named."""
    sample = Sample(tuple(range(tokens)), (0.0,) * tokens, (text,), stopped=True, adapter_version=0)
    completions = tuple(Completion(node, Prompt((1, 2, 3), (4, 5, 6, 7)), sample, ()) for node in range(1, calls + 1))
    return Rollout(Example(example or f"q{next(NUMBERS)}", "q", gold, "Write it."), 0, completions)


def score_of(right: int, n: int) -> Evaluation:
    return score(TASK, [(rollout("Yes", "Answer: Yes" if i < right else "Answer: No"),) for i in range(n)])


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # z = 1.959964, z^2 = 3.841459; ends are (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n).
        # 8 of 10: (0.8 + 0.192073 -+ 1.959964 * sqrt(0.016 + 0.009604)) / 1.384146 = 0.716740 -+ 0.226577
        (8, 10, 0.490162, 0.943318),
        # 0 of 5: the lower end is 0, the upper (z^2/n) / (1 + z^2/n) = 0.768292 / 1.768292
        (0, 5, 0.0, 0.434482),
        # 5 of 5 mirrors it.
        (5, 5, 0.565518, 1.0),
        # 50 of 100: 0.5 -+ 1.959964 * sqrt(0.0025 + 0.000096) / 1.038415 = 0.5 -+ 0.096168
        (50, 100, 0.403832, 0.596168),
    ],
)
def test_wilson_interval_against_numbers_worked_by_hand(right: int, n: int, low: float, high: float) -> None:
    scored = score_of(right, n)
    assert (scored.accuracy, scored.n) == (right / n, n)
    assert scored.low == pytest.approx(low, abs=2e-6)
    assert scored.high == pytest.approx(high, abs=2e-6)


def test_floor_parse_rate_and_histogram_come_from_exactly_these_rollouts() -> None:
    scored = score(
        TASK,
        [
            (rollout("No", "Answer: No"), rollout("No", "Answer: Yes")),
            (rollout("Yes", "Answer: No. Answer: Yes"), rollout("No", "Answer: No")),
            (rollout("No", "hm"),),
        ],
    )
    assert (scored.n, scored.accuracy) == (5, 0.4)
    assert (scored.floor, scored.floor_answer) == (0.8, "No")
    assert scored.parse_rate == pytest.approx(0.6)
    assert scored.answers == {"No": 2, UNPARSED: 2, "Yes": 1}
    assert list(scored.answers)[-1] == "Yes"


def test_an_answer_costs_its_calls_and_tokens() -> None:
    # 2 nodes that wrote 5 tokens each, and 4 nodes that wrote 2 each: 18 tokens, 6 calls, 6 * 7 prompt tokens.
    scored = score(TASK, [(rollout("Yes", "Yes", calls=2),), (rollout("Yes", "Yes", calls=4, tokens=2),)])
    assert (scored.calls_per_answer, scored.tokens_per_answer, scored.prompt_tokens_per_answer) == (3.0, 9.0, 21.0)


def test_an_item_that_is_published_twice_is_one_question_to_the_interval() -> None:
    said = (("a", "Yes"), ("a", "Yes"), ("b", "No"), ("c", "Yes"))
    scored = score(TASK, [(rollout("Yes", f"Answer: {text}", example=name),) for name, text in said])
    assert (scored.accuracy, scored.n, scored.distinct) == (3 / 4, 4, 3)
    assert (scored.low, scored.high) == wilson(8 / 3 * 3 / 4, 8 / 3)
    assert "75.0% (n 4, 3 of them different, 95% interval" in str(scored)


def test_partial_credit_counts() -> None:
    class Partial(Navigate):
        def rewards(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
            return [0.5] * len(pairs)

    assert score(Partial(), [(rollout("Yes", "Answer: Yes"),)]).accuracy == 0.5


def test_a_score_at_or_below_the_floor_says_so() -> None:
    assert (score_of(5, 5).floor, score_of(5, 5).at_or_below_floor) == (1.0, True)
    assert str(score_of(5, 5)).endswith("an answer)  AT OR BELOW FLOOR")
    assert score_of(1, 5).at_or_below_floor is True
    # 8 of 10, interval 0.4902 to 0.9433.
    above = dataclasses.replace(score_of(8, 10), floor=0.49)
    assert above.at_or_below_floor is False
    assert str(above).endswith("an answer)")
    touching = dataclasses.replace(score_of(8, 10), floor=0.5)
    assert touching.at_or_below_floor is False
    assert str(touching).endswith("an answer)  INTERVAL REACHES FLOOR")


def test_the_line_names_everything_that_belongs_to_a_score() -> None:
    scored = score(
        TASK, [(rollout(gold, f"Answer: {text}", calls=3),) for gold, text in (("No", "No"), ("Yes", "Yes"), ("No", "?"))]
    )
    # 2 of 3, Wilson: (0.666667 + 0.640243 -+ 1.959964 * sqrt(0.074074 + 0.106707)) / 2.280486 = 0.573084 -+ 0.365424
    assert str(scored) == (
        "66.7% (n 3, 95% interval 20.8% to 93.9%, floor 66.7% always 'No', parsed 66.7%, 3 calls and 15.0 tokens an answer)"
        "  AT OR BELOW FLOOR"
    )


def test_json_holds_every_field() -> None:
    scored = score_of(3, 4)
    assert Evaluation(**scored.to_json()) == scored
    assert {"accuracy", "n", "low", "high", "floor", "parse_rate", "calls_per_answer", "tokens_per_answer", "answers"} <= set(
        scored.to_json()
    )


def test_nothing_to_score_raises() -> None:
    with pytest.raises(ValueError, match=r"^nothing to evaluate: expected at least one example$"):
        score(TASK, [])


def test_evaluate_answers_each_example_once(tiny_backbone: Backbone) -> None:
    def script(request: Request) -> str:
        return "TO node 2: hi" if request.node == 1 else "Answer: Yes"

    engine = ScriptedEngine(script)
    adapter = AdapterConfig(rank=1, target_modules=("q_proj",))
    network = Network(Topology.layered([1, 1]), tiny_backbone, adapter=adapter, engine=engine)
    examples = [Example(str(i), f"q{i}", "Yes" if i else "No", "Write it.") for i in range(4)]
    scored, groups = evaluate(network, TASK, examples)
    assert len(engine.requests) == 8
    assert [[r.example for r in group] for group in groups] == [[example] for example in examples]
    assert (scored.accuracy, scored.n, scored.floor, scored.answers) == (0.75, 4, 0.75, {"Yes": 4})
    # 13 bytes of node 1 and 11 of node 2, as the scripted engine counts tokens.
    assert (scored.calls_per_answer, scored.tokens_per_answer) == (2.0, 24.0)


def test_long_questions_are_answered_fewer_at_a_time(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine(lambda request: "Answer: Yes")
    network = Network(Topology.layered([1, 1]), tiny_backbone, adapter=AdapterConfig(rank=1), engine=engine)
    monkeypatch.setattr(network.policy, "prefix_bytes", len)
    monkeypatch.setattr("neuromas.training.evaluate.PREFIX_BYTES_AT_ONCE", 30)
    lengths, told = [10, 10, 10, 15, 16, 40, 1], list[str]()
    examples = [Example(str(i), "q" * length, "Yes", "Write it.") for i, length in enumerate(lengths)]
    _, groups = evaluate(network, TASK, examples, tell=told.append)
    # Three of 10 fill the 30, 15 and 16 do not go together, and 40 is asked although it is longer.
    assert told == [f"{start} of 7 questions answered" for start in (3, 4, 5, 6)]
    assert [group[0].example for group in groups] == examples


def test_prefixes_are_counted_once_for_each_adapter_that_acts_on_them(tiny_backbone: Backbone) -> None:
    def counted(nodes: tuple[int, ...], **settings: Any) -> int:
        return Policy(tiny_backbone, nodes, AdapterConfig(rank=1, **settings)).prefix_bytes("q" * 50)

    bare = Policy(tiny_backbone)
    assert counted(()) == tiny_backbone.token_bytes * len(bare.prompt("q" * 50, "").prefix_ids) > 0
    assert counted((1, 2, 3)) == 3 * counted((1,)) == 3 * counted(())
    assert counted((1, 2, 3), scope="suffix") == counted((1, 2, 3), shared=True) == counted((1,))


def test_a_long_evaluation_says_how_far_it_is(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromas.training.evaluate.EXAMPLES_AT_ONCE", 2)
    adapter = AdapterConfig(rank=1, target_modules=("q_proj",))
    engine = ScriptedEngine(lambda request: "Answer: Yes")
    network = Network(Topology.layered([1]), tiny_backbone, adapter=adapter, engine=engine)
    told: list[str] = []
    evaluate(network, TASK, [Example(str(i), f"q{i}", "Yes", "Write it.") for i in range(5)], tell=told.append)
    assert told == ["2 of 5 questions answered", "4 of 5 questions answered"]

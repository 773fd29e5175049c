"""Metrics: every number that is logged is explained, and means what its explanation says."""

import re

import pytest
import torch
from paths import DOCS

from neuromas.graph.messages import parse
from neuromas.tasks import Navigate
from neuromas.training.metrics import METRICS, check_names, metrics_page, rollout_metrics
from neuromas.training.reinforce import Credits
from neuromas.training.watch import group_answers
from neuromas.types import Completion, Example, Prompt, Rollout, Sample

PAGE = DOCS / "metrics.md"


def completion(node: int, text: str, tokens: int, *, stopped: bool = True, recipients: tuple[int, ...] = ()) -> Completion:
    sample = Sample(tuple(range(tokens)), (-0.5,) * tokens, (text,), stopped, adapter_version=0)
    return Completion(node, Prompt((1, 2), (3,)), sample, parse(text, node, recipients))


def rollout(index: int, *completions: Completion) -> Rollout:
    return Rollout(Example("id", "q", "Yes", "Write it."), index, completions)


def test_the_documentation_is_the_generated_page() -> None:
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), (
        "write it anew: python -m neuromas.training.metrics > docs/metrics.md"
    )


def test_an_unknown_name_raises() -> None:
    check_names(["reward/mean", "completion_tokens/node/12/mean", "grad_norm/node/1/max"])
    message = "metric 'reward/avg' is not in METRICS; describe it there before logging it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_names(["reward/mean", "reward/avg"])
    for name in ("reward/node/1/mean", "grad_norm/node/one/max", "grad_norm/node/1"):
        with pytest.raises(ValueError, match=f"metric '{name}' is not in METRICS"):
            check_names([name])


def test_a_name_ends_in_how_rows_were_reduced() -> None:
    assert {name.rpartition("/")[2] for name in METRICS} == {"mean", "frac", "max", "sum", "value"}


def test_rollout_metrics_counted_by_hand() -> None:
    group = (
        rollout(0, completion(1, "TO node 2: hi", 4, recipients=(2,)), completion(2, "Answer: Yes", 2)),
        rollout(1, completion(1, "hi", 6, recipients=(2,)), completion(2, "perhaps", 8, stopped=False)),
        rollout(2, completion(1, "TO node 9: hi", 5, recipients=(2,)), completion(2, "Answer: No", 2)),
        rollout(3, completion(1, "TO node 2:", 3, recipients=(2,)), completion(2, "Answer: No", 2)),
    )
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    credits = Credits.of([group], {1: torch.ones(1, 4), 2: torch.tensor([[0.5, 0.0, -0.5, 0.0]])})
    metrics = rollout_metrics(group_answers(Navigate(), [group], rewards_PG), [group], rewards_PG, credits, 2)
    check_names(list(metrics))
    assert metrics == pytest.approx(
        {
            "reward/mean": 0.25,
            "answer_parsed/frac": 0.75,
            # One Yes and two No can be read.
            "top_answer/frac": 2 / 3,
            "mixed_groups/frac": 1.0,
            "signal/frac": 0.5,
            "message_fault/frac": 0.75,
            "message_fault/missing/frac": 0.25,
            "message_fault/unaddressed/frac": 0.25,
            "message_fault/empty/frac": 0.25,
            # One of the four hidden nodes' texts is for a node that is not there.
            "dropped_text/frac": 0.25,
            # One of eight completions; 4 + 6 + 5 + 3 and 2 + 8 + 2 + 2 tokens.
            "truncated/frac": 0.125,
            "sampled_tokens/sum": 32,
            "completion_tokens/mean": 4.0,
            "completion_tokens/node/1/mean": 4.5,
            "completion_tokens/node/2/mean": 3.5,
            "logprob/mean": -0.5,
        }
    )


def test_one_node_has_no_messages_and_so_no_faults() -> None:
    groups, ones = [(rollout(0, completion(1, "Yes", 1)),)], torch.ones(1, 1)
    credits = Credits.of(groups, {1: torch.zeros(1, 1)})
    metrics = rollout_metrics(group_answers(Navigate(), groups, ones), groups, ones, credits, 1)
    assert [metrics[name] for name in metrics if name.startswith("message_fault")] == [0.0] * 4
    assert metrics["signal/frac"] == 0.0

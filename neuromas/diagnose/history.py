"""What the rollouts of training tell of each node, step by step: variety of its texts, and the share that cannot be read."""

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from neuromas.diagnose.texts import joined, variety
from neuromas.tasks import Task
from neuromas.types import MessageStatus, Rollout
from neuromas.view.recorded import Recorded

MOST_STEPS = 50
"""Steps of a run that are looked at, evenly spaced."""
MOST_QUESTIONS = 32
"""Questions of a step that are looked at."""
MEASURES = ("distinct_2", "self_similarity", "entropy", "faults")


def history(recorded: Sequence[Recorded], task: Task) -> dict[str, Any]:
    """Return the measures of each node by step; None where it has written nothing in a step.

    `faults` is the share of a node's messages that are missing, empty or unaddressed; of an answering node, of texts in which
    the task reads no answer.
    """
    by_step: dict[int, list[Recorded]] = {}
    for each in recorded:
        by_step.setdefault(each.step, []).append(each)
    steps = sorted(by_step)
    steps = [steps[i * (len(steps) - 1) // (MOST_STEPS - 1)] for i in range(MOST_STEPS)] if len(steps) > MOST_STEPS else steps
    found = [_of_step(by_step[step], task) for step in steps]
    nodes = sorted({node for of_step in found for node in of_step})
    return {
        "steps": [step + 1 for step in steps],
        "nodes": {
            str(node): {name: [of_step.get(node, {}).get(name) for of_step in found] for name in MEASURES} for node in nodes
        },
    }


def _of_step(recorded: Sequence[Recorded], task: Task) -> dict[int, dict[str, float | None]]:
    """Return the measures of each node in one step."""
    asked = list(dict.fromkeys(each.example.id for each in recorded))[:MOST_QUESTIONS]
    texts: dict[int, dict[str, list[str]]] = {}
    faults: dict[int, list[bool]] = {}
    for each in recorded:
        if each.example.id not in asked:
            continue
        sent: dict[int, list[tuple[str, str]]] = {}
        for sender, _, text, status in each.said["messages"]:
            sent.setdefault(sender, []).append((text, status))
            faults.setdefault(sender, []).append(status != MessageStatus.OK.value)
        answers = {node: text for node, text in each.said["written"].items() if node not in sent}
        answers[each.said["answer"]["node"]] = each.said["answer"]["text"]
        for node, text in answers.items():
            faults.setdefault(node, []).append(task.parse_answer(text) is None)
        for node, text in {**{n: joined(messages) for n, messages in sent.items()}, **answers}.items():
            texts.setdefault(node, {}).setdefault(each.example.id, []).append(text)
    return {node: {**variety(list(of.values())), "faults": fmean(faults[node])} for node, of in texts.items()}


def faults(rollouts: Iterable[Rollout], task: Task) -> dict[str, float]:
    """Return the same share of faults for rollouts as they have just been made."""
    found: dict[int, list[bool]] = {}
    for rollout in rollouts:
        for completion in rollout.completions:
            bad = [message.status is not MessageStatus.OK for message in completion.messages]
            found.setdefault(completion.node, []).extend(bad or [task.parse_answer(completion.text) is None])
    return {str(node): fmean(of_node) for node, of_node in sorted(found.items())}

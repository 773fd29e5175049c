"""The bundled backbone's card: what it can do and what it does when nobody has trained it, measured."""

import re
from collections import Counter
from pathlib import Path

from neuromas.backbone import Backbone
from neuromas.evaluate import Evaluation, evaluate
from neuromas.network import Network
from neuromas.recipes.skills import LARGEST_NUMBER, MAX_STEPS_PER_MESSAGE
from neuromas.tasks import get_task
from neuromas.topology import Topology

EXAMPLES = 500

CARD = """---
license: apache-2.0
library_name: transformers
---
# The bundled backbone

A Qwen3 of {parameters:,} parameters with a byte-level BPE tokenizer of {vocab} tokens, made from generated text alone
({tokens:.1f} million tokens) by

    python -m neuromas.recipes.bundled --out neuromas/bundled --compile

It is made to behave as a small general model would towards Navigate: it knows the message format, restates an instruction
and gives its result, goes on from where another message stopped, and also guesses, restates and chatters. A message in its
training text holds at most {max_steps} steps of a walk, so a problem of more steps needs several messages. It shows the
mechanism of a network at work; it says nothing about what another model would gain.

No benchmark item is in its training text: every question there holds a number from 11 to {largest}, which no Navigate item
of BIG-Bench-Hard and no problem of the task's generator has.

| measured on validation problems of the Navigate generator | |
| --- | --- |
| single steps right (instruction restated and result, greedy, given what came before) | {steps:.2%} |
| untrained [1,1,1], greedy | {untrained} |
| untrained [1,1,1], sampled at temperature 1 | {sampled} |
| untrained [1], greedy | {single} |

What the untrained network's nodes do at temperature 1, n = {n} texts each:

| behaviour | first node | output node |
| --- | --- | --- |
{behaviours}
"""


def behaviour(text: str) -> str:
    """Name what a text does; `walk` and `guess` as in `skills`."""
    body = re.sub(r"^TO node \d+:", "", text.strip()).strip()
    if re.match(r"(start|from) \(", body):
        return "walk"
    if re.search(r"\b(Yes|No)\b\.?$", body):
        return "guess"
    if re.match(r"(Take|Turn) ", body):
        return "restate"
    return "chatter"


def write_card(folder: Path, step_accuracy: float, tokens_in_millions: float) -> str:
    """Measure the backbone in a folder, write its README.md, return the text."""
    task = get_task("navigate")
    examples = task.examples("validation", EXAMPLES)

    def measured(widths: list[int], temperature: float) -> tuple[Evaluation, Network, list[Counter[str]]]:
        network = Network(Topology.layered(widths), Backbone.load(str(folder.resolve())))
        result, groups = evaluate(network, task, examples, temperature=temperature)
        counts = [Counter(behaviour(group[0].completions[k].sample.text) for group in groups) for k in (0, -1)]
        return result, network, counts

    greedy, network, _ = measured([1, 1, 1], 0.0)
    sampled, _, (first, output) = measured([1, 1, 1], 1.0)
    single, _, _ = measured([1], 0.0)
    rows = [f"| {name} | {first[name] / EXAMPLES:.1%} | {output[name] / EXAMPLES:.1%} |"
            for name in ("walk", "guess", "restate", "chatter")]  # fmt: skip
    text = CARD.format(
        parameters=sum(p.numel() for p in network.backbone.model.parameters()) - network.adapters.trainable_parameters,
        vocab=len(network.backbone.tokenizer), tokens=tokens_in_millions, max_steps=MAX_STEPS_PER_MESSAGE,
        largest=LARGEST_NUMBER, steps=step_accuracy, untrained=greedy, sampled=sampled, single=single, n=EXAMPLES,
        behaviours="\n".join(rows),
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    return text

"""Measures the bundled backbone before training, and writes its card."""

import re
from collections import Counter
from pathlib import Path

from neuromas.graph.topology import Topology
from neuromas.model.backbone import Backbone
from neuromas.recipes.skills import CHATTER, GUESSES
from neuromas.recipes.traces import FAMILIES, TASKS
from neuromas.rollout.network import Network
from neuromas.tasks import get_task
from neuromas.training.evaluate import evaluate

EXAMPLES = 500
SAMPLED_EXAMPLES = 200
KINDS = ("work", "guess", "restate", "chatter")

CARD = """---
license: apache-2.0
library_name: transformers
---
# The bundled backbone

A Qwen3 of {parameters:,} parameters with a byte-level BPE tokenizer of {vocab} tokens, made from generated text alone
(49 million tokens, 55 minutes on two cores beside other work):

    python -m neuromas.recipes.bundled --out neuromas/bundled --compile

It is made to behave as a small general model would towards the procedural families: it knows the message format, takes single
steps of a problem, goes on from where another message stopped, and also guesses, restates and chatters. A message in its
training text holds at most {max_steps} steps, by family, so a problem of more steps needs several messages. It shows the
mechanism of a network at work; it says nothing about what another model would gain.

No benchmark item is in its training text: every question there bears a mark that no item of BIG-Bench-Hard and no problem of
the task's generator has (a number above the task's largest, an unknown name, people out of order, brackets of another kind; see
`neuromas/recipes/trace.py`). What is left of a Boolean expression after a few steps may equal a published expression, since
there are few short ones.

## What it can do, and what it scores before it is trained

Steps right: single steps, restated and with the right result, greedy, given what came before, on {step_examples} validation
problems. Scores: the untrained networks, greedy, on {n} validation problems, with the 95% interval. The floor is the best
constant answer on exactly these problems.

| task | steps right | floor | untrained [1,1,1] | untrained [1] | most steps in a message | fits in one message |
| --- | --- | --- | --- | --- | --- | --- |
{tasks}

## What its nodes do

The untrained [1,1,1] at temperature 1, {sampled} problems: share of texts that work, guess, restate or chatter.

| task | first node | output node |
| --- | --- | --- |
{behaviours}
"""

_GUESS = re.compile("|".join(re.escape(guess).replace(r"\{\}", ".*") for guess in GUESSES) + "|Answer: .*")


def behaviour(text: str) -> str:
    """Return the behaviour of a text, by the names of `skills`."""
    body = re.sub(r"^TO node \d+:", "", text.strip()).strip()
    if re.match(r"(start|from) ", body):
        return "work"
    if _GUESS.fullmatch(body):
        return "guess"
    return "chatter" if body in CHATTER else "restate"


def write_card(folder: Path, step_accuracy: dict[str, float], step_examples: int) -> str:
    """Measure the backbone in a folder, write its README.md, and return the text."""
    network = Network(Topology.layered([1, 1, 1]), Backbone.load(str(folder.resolve())))
    single = Network(Topology.layered([1]), Backbone.load(str(folder.resolve())))
    rows, behaviours = [], []
    for family, name in TASKS:
        task = get_task(name)
        examples = task.examples("validation", EXAMPLES)
        three, one = (evaluate(net, task, examples)[0] for net in (network, single))
        _, groups = evaluate(network, task, examples[:SAMPLED_EXAMPLES], temperature=1.0)
        fits = sum(len(family.parse(example.question).states()) - 1 <= family.max_steps for example in examples) / EXAMPLES
        scores = [f"{score.accuracy:.1%} ({score.low:.1%} to {score.high:.1%})" for score in (three, one)]
        rows.append(
            f"| `{name}` | {step_accuracy[name]:.2%} | {three.floor:.1%} | {scores[0]} | {scores[1]} "
            f"| {family.max_steps} | {fits:.0%} |"
        )
        shares = []
        for index in (0, -1):
            counts = Counter(behaviour(group[0].completions[index].text) for group in groups)
            shares.append(", ".join(f"{kind} {counts[kind] / len(groups):.0%}" for kind in KINDS))
        behaviours.append(f"| `{name}` | {shares[0]} | {shares[1]} |")
    text = CARD.format(
        parameters=sum(p.numel() for p in network.backbone.model.parameters()) - network.adapters.trainable_parameters,
        vocab=len(network.backbone.tokenizer), n=EXAMPLES, sampled=SAMPLED_EXAMPLES,
        max_steps=max(family.max_steps for family in FAMILIES), step_examples=step_examples,
        tasks="\n".join(rows), behaviours="\n".join(behaviours),
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    return text

"""A diagnosis of a trained network: what each node and edge is worth, how far adapters are apart, what the texts tell."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from neuromas.diagnose import Kind
from neuromas.diagnose.adapters import distances
from neuromas.diagnose.effects import Undisturbed
from neuromas.diagnose.history import faults
from neuromas.diagnose.interventions import Sampling, interventions
from neuromas.diagnose.texts import of_rollout, specialisation
from neuromas.graph.growth import widths_of
from neuromas.rollout.network import Network
from neuromas.tasks import Task, rewards_of
from neuromas.training.evaluate import evaluate
from neuromas.types import Example


def diagnose(
    network: Network,
    task: Task,
    examples: Sequence[Example],
    kinds: Sequence[Kind],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer the examples without and with each intervention, and return the diagnosis as JSON-ready data.

    Examples that occur twice are asked once. `tell` is told how far it is.
    """
    examples = list({example.id: example for example in examples}.values())
    network.check_lengths(examples)
    how = Sampling(("evaluate", seed), temperature)
    tell(f"undisturbed: 0 of {len(examples)} questions answered")
    score, groups = evaluate(
        network, task, examples, temperature=temperature, seed=seed, tell=lambda text: tell(f"undisturbed: {text}")
    )
    rollouts = [group[0] for group in groups]
    undisturbed = Undisturbed(rollouts, rewards_of(task, [(r.example, r.answer) for r in rollouts]), score)
    texts = {"trained": specialisation(list(map(of_rollout, rollouts)))}
    planned, effects, started = interventions(network, rollouts, kinds), [], time.monotonic()
    for number, what in enumerate(planned):
        left = f", {(time.monotonic() - started) / number * (len(planned) - number):.0f} s left" if number else ""
        tell(f"intervention {number + 1} of {len(planned)}: {what}{left}")
        found = what.rollouts(network, rollouts, how)
        effects.append(undisturbed.effect(what, found, task))
        if what.sources == dict.fromkeys(network.adapters.nodes):
            texts["bare"] = specialisation(list(map(of_rollout, found)))
    topology = network.topology
    return {
        "questions": len(examples),
        "temperature": temperature,
        "seed": seed,
        "network": {
            "widths": widths_of(topology),
            "layers": [[node, topology.layer(node)] for node in topology.nodes],
            "edges": [list(edge) for edge in topology.edges],
        },
        "undisturbed": score.to_json(),
        "effects": [effect.to_json() for effect in effects],
        "adapters": distances(network.adapters),
        "specialisation": texts,
        "faults": faults(rollouts, task),
    }

"""Grow a trained network by a node, and count what the output node writes otherwise: closed, nothing at all.

    python examples/grow_without_a_change.py

Takes 16 seconds of one CPU core.
Prints 0 of 30 texts changed while the growth is closed, which is certain, and 0 of 30 with the growth half and fully
open, which is not: the new node says what node 1 says, and an output node of three training steps answers Yes to all.
"""

import sys
from pathlib import Path

from neuromas import Topology, TopologyConfig, TrainConfig, load_run, train
from neuromas.config import GrowthConfig

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 3
config = TrainConfig(
    topology=TopologyConfig(widths=(1, 1)), num_steps=steps, examples_per_step=4, eval_size=4, eval_every=0,
    run_dir=Path("runs/parent"),
)  # fmt: skip
train(config, resume=True)
loaded = load_run(Path("runs/parent"))
network, examples = loaded.network, loaded.task.examples("validation", 10 * steps)


def texts() -> list[str]:
    """What the output node writes, greedily."""
    groups = network.rollout(examples, 1, seed=("grow",), temperature=0.0)
    return [rollout.answer for group in groups for rollout in group]


before = texts()
network.grow(GrowthConfig(widths=(2, 1), opening="annealed").build(Topology.layered([1, 1]), skip=False))
for probability in (0.0, 0.5, 1.0):
    network.open_probability = probability
    pairs = list(zip(texts(), before, strict=True))
    changed = sum(new != old for new, old in pairs)
    answers = sum(loaded.task.parse_answer(new) != loaded.task.parse_answer(old) for new, old in pairs)
    print(f"open for {probability:.0%} of the questions: {changed} of {len(pairs)} texts changed, {answers} answers")

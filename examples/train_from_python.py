"""Train three nodes from Python, and print scores as they should be read.

    python examples/train_from_python.py

Takes 3 to 4 minutes of one CPU core.
Prints 53.8% before and 98.0% after training (n 500, floor 50.0%): the run of `make train`, whose settings these
are. A number behind the command is another number of steps.
"""

import sys
from pathlib import Path

from neuromas import TopologyConfig, TrainConfig, train

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
config = TrainConfig(
    topology=TopologyConfig(widths=(1, 1, 1)), num_steps=steps, eval_size=min(500, 20 * steps), eval_every=0,
    run_dir=Path("runs/from-python"),
)  # fmt: skip
scores = train(config, resume=True)
for when, by_set in scores.items():
    for name, score in by_set.items():
        print(f"{when} training, {name}: {score}")

"""A task of one's own that this backbone cannot learn: no rollout is right for a reason, so there is nothing to reinforce.

    python examples/beyond_the_backbone.py

Takes 17 seconds of one CPU core.
Prints 0.0% (n 200, 95% interval 0.0% to 1.9%) before and after training, below the floor of 50%: the bundled backbone
has never seen a question of this kind, not one answer can be read, and so no reward tells one text from another.
"""

import random
import sys
from pathlib import Path

from neuromas import TaskConfig, TopologyConfig, TrainConfig, train
from neuromas.tasks import GeneratedTask, Problem
from neuromas.tasks.verifiers import words


class Parity(GeneratedTask):
    """Is the number of ones even?"""

    name = "parity"
    answers = ("even", "odd")
    form = words(*answers)
    answer_format = form.answer_format

    def generate(self, rng: random.Random) -> Problem:
        bits = "".join(rng.choices("01", k=12))
        return Problem(f"Is the number of ones in {bits} even or odd?", "odd" if bits.count("1") % 2 else "even")

    def parse_answer(self, text: str) -> str | None:
        return self.form.read(text)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    config = TrainConfig(
        topology=TopologyConfig(widths=(1, 1)), task=TaskConfig(name=f"class:{__file__}:Parity"), num_steps=steps,
        max_new_tokens=24, eval_size=20 * steps, eval_every=0, run_dir=Path("runs/parity"),
    )  # fmt: skip
    scores = train(config, resume=True)
    for when in ("before", "after"):
        print(f"{when} training: {scores[when]['test']}")

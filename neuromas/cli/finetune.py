"""`neuromas finetune`: let a society of agents learn from what its debates agree on."""

from collections.abc import Sequence
from dataclasses import dataclass

from neuromas.cli.train import TrainArguments, run_command
from neuromas.config import TopologyConfig, TrainConfig
from neuromas.graph.society import SocietyConfig

SOCIETY = TrainConfig(
    topology=TopologyConfig(widths=(3, 3), vote=True),
    society=SocietyConfig(rounds=2),
    num_steps=4,
    examples_per_step=48,
    group_size=1,
    centring="none",
    warmup_steps=2,
    eval_size=100,
    eval_every=1,
    validation_size=50,
    save_every=1,
)
"""Three generation agents and three critics, two rounds, four iterations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneArguments(TrainArguments):
    """Finetune a society of agents that debate, without labels (arXiv 2501.05707): each learns, in iterations, from its own
    texts that agree with the majority.

    A TOML file may come first: neuromas finetune configs/mine.toml --lr 5e-4. A step is an iteration. `--widths 3 3` is three
    generation agents and three critics, `--widths 3` generation agents alone, `--widths 1 --society.rounds 1
    --society.samples 9` one agent that votes with itself. Settings of joint REINFORCE and its advantages (--credit,
    --centring, --group-size, --kl-coef, ...) stand below because a run has them; a society refuses other values than its own.
    """


def run(args: Sequence[str]) -> None:
    """Run the command `finetune`."""
    run_command(args, "finetune", FinetuneArguments, SOCIETY)

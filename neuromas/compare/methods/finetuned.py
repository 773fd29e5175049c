"""Multiagent finetuning (Subramaniam, Du et al. 2025, arXiv 2501.05707), what it is made of, and single agents beside it.

A society of three generation agents and three critics debates each question in two rounds. Against it stands one agent with as
many trainable parameters that answers the same questions, in as many iterations, until it has sampled as many tokens, and that
votes over as many answers as the society makes calls.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from neuromas.compare.methods.method import CellResult, CellSpec
from neuromas.compare.methods.networks import NODES, Trained, enlarged
from neuromas.config import AdapterConfig, TopologyConfig, TrainConfig

PAPER = "Subramaniam, Du et al. 2025, arXiv 2501.05707; repository vsubramaniam851/multiagent-ft"
AGENTS, ROUNDS = 3, 2


@dataclass(kw_only=True)
class Finetuned(Trained):
    """A method that finetunes a society, in iterations. It answers by debate and vote, at the temperature that it trains at."""

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Finetune in `folder`, or resume the run there, and answer the evaluation sets."""
        from neuromas.compare.methods.finetune_cell import run_finetuned  # loads torch

        return run_finetuned(self.name, self.change(spec.config), spec, folder)


def society(
    *, labels: bool = False, summary: bool = True, critics: bool = True, shared: bool = False
) -> Callable[[TrainConfig], TrainConfig]:
    """Return a change of settings into those of a society."""

    def change(config: TrainConfig) -> TrainConfig:
        widths = (AGENTS, AGENTS) if critics else (AGENTS,)
        adapter = spread(config.adapter, 1 if shared else sum(widths))
        own = replace(config.society, rounds=ROUNDS, labels=labels, summary=summary)
        return replace(
            _of_debates(config), topology=TopologyConfig(widths=widths, vote=True), adapter=replace(adapter, shared=shared),
            society=own,
        )  # fmt: skip

    return change


def alone(*, labels: bool = False) -> Callable[[TrainConfig], TrainConfig]:
    """Return a change of settings into those of one agent that votes with itself, at the calls of the society."""

    def change(config: TrainConfig) -> TrainConfig:
        calls = replace(config.society, rounds=ROUNDS).calls(AGENTS)
        own = replace(config.society, rounds=1, samples=calls, labels=labels)
        return replace(
            _of_debates(config), topology=TopologyConfig(widths=(1,)), adapter=enlarged(config.adapter), society=own,
        )  # fmt: skip

    return change


def _of_debates(config: TrainConfig) -> TrainConfig:
    """Return settings without what groups, replays and value heads of other methods are set to: debates have none."""
    return replace(config, group_size=1, centring="none", replays=1, critic_lr=TrainConfig().critic_lr)


def spread(adapter: AdapterConfig, adapters: int) -> AdapterConfig:
    """Return the settings of so many adapters with as many parameters as the three nodes' that a cell describes."""
    if adapter.rank is None:
        return adapter
    whole = enlarged(adapter)
    assert whole.rank is not None
    if whole.rank % adapters:
        raise ValueError(
            f"--adapter.rank must be such that {NODES} times it is a multiple of {adapters}, the adapters of a society, got "
            f"{adapter.rank}"
        )
    alpha = None if whole.alpha is None else whole.alpha / adapters
    return replace(whole, rank=whole.rank // adapters, alpha=alpha)


METHODS = (
    Finetuned(name="self_ft", title="Self-improvement, majority vote", source=f"{PAPER}: the single agent",
              change=alone(), tokens_of="multiagent_ft"),
    Finetuned(name="star", title="Self-improvement, labels (STaR-like)", source="Zelikman et al. 2022, arXiv 2203.14465",
              change=alone(labels=True), tokens_of="multiagent_ft"),
    Finetuned(name="multiagent_ft", title="Multiagent finetuning", source=PAPER, change=society()),
    Finetuned(name="multiagent_ft_labels", title="Multiagent finetuning, labels", source="control: reward in place of the vote",
              change=society(labels=True)),
    Finetuned(name="multiagent_ft_no_summary", title="Multiagent finetuning, no summary", source=f"{PAPER}: ablation",
              change=society(summary=False)),
    Finetuned(name="multiagent_ft_no_critics", title="Multiagent finetuning, no critics", source=f"{PAPER}: ablation",
              change=society(critics=False)),
    Finetuned(name="multiagent_ft_shared", title="Multiagent finetuning, one adapter", source="control: separate adapters",
              change=society(shared=True)),
)  # fmt: skip

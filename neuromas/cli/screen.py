"""`neuromas screen`: say before any training which tasks a network can learn by reinforcement."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from neuromas.cli.flags import parse_settings
from neuromas.config import MOST_COUNTED, TopologyConfig, TrainConfig
from neuromas.model.sources import find_backbone
from neuromas.system.files import replace_file, require_writable
from neuromas.system.schema import require
from neuromas.system.terminal import printable
from neuromas.training.config_file import to_json
from neuromas.training.progress import StatusLine
from neuromas.training.questions import questions_to_screen

ONE_NODE = TrainConfig(topology=TopologyConfig(widths=(1,)))
MOST_SAMPLES = 1000
"""Answers to a question, which are sampled at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenArguments:
    """Answer validation questions of several tasks with an untrained network, many times each, and say which tasks
    reinforcement can learn.

    A TOML file of a run may come first: neuromas screen configs/chain3.toml --tasks navigate dyck_languages. Without one, the
    network is one node. All settings of a run may be given; those of training and of scores are not used.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: ONE_NODE)
    tasks: tuple[str, ...] = ()
    """Tasks to screen. Empty: the task of the settings."""
    samples: int = 8
    """Answers sampled to each question: the k of pass@k."""
    questions: int = 40
    """Validation questions of each task, or training questions where it has no validation split; never test."""
    out: Path | None = None
    """File to write the results to as JSON, after each task."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(args: Sequence[str]) -> None:
    """Run the command `screen`."""
    parsed, _ = parse_settings(ScreenArguments, args, "screen", ONE_NODE)
    require(not parsed.config.society.rounds, "--society.rounds", "0: a network is screened", parsed.config.society.rounds)
    config = parsed.config.check()
    require(config.engine.name == "torch", "--engine", "torch, which does all sampling here", config.engine.name)
    require(2 <= parsed.samples <= MOST_SAMPLES, "--samples", f"2 to {MOST_SAMPLES:,}", parsed.samples)
    require(1 <= parsed.questions <= MOST_COUNTED, "--questions", f"1 to {MOST_COUNTED:,}", parsed.questions)
    names = dict.fromkeys(parsed.tasks or (config.task.name,))
    configs = [dataclasses.replace(config, task=dataclasses.replace(config.task, name=name)) for name in names]
    if parsed.out and (parsed.out.is_dir() or not parsed.out.parent.is_dir()):
        raise ValueError(f"--out must be a file in a folder that is there, got {parsed.out}")
    if parsed.out:
        require_writable(parsed.out, "--out")
    find_backbone(config.backbone)
    asked = questions_to_screen(configs, parsed.questions)
    # These load torch: mistakes are reported before.
    from neuromas.training.screen import RULE, screen, table, wrong_answers
    from neuromas.training.setup import build_network

    network, done = build_network(config), []
    for _, examples in asked:
        network.check_lengths(examples)
    chosen = dataclasses.replace(
        config,
        dtype=str(network.backbone.model.dtype).removeprefix("torch."),
        prompt=dataclasses.replace(config.prompt, wording=network.wording.name),
    )
    report = {"config": json.loads(to_json(chosen)), "rule": RULE, "tasks": []}
    with StatusLine() as status:
        for task, examples in asked:
            network.read = task.parse_answer
            found = screen(
                network, task, examples, parsed.samples, temperature=config.temperature, seed=config.seed, tell=status.tell
            )
            done.append(found)
            report["tasks"].append(found.to_json())
            if parsed.out:
                replace_file(parsed.out, json.dumps(report, indent=2).encode())
            status.note(f"{task.name}: {found.verdict}, {found.seconds:.0f} s")
    nodes = len(network.topology.nodes)
    settings = (
        f"{config.backbone} in {chosen.dtype}, {nodes} {'node' if nodes == 1 else 'nodes'}, wording {network.wording.name}, "
        f"{parsed.samples} samples a question, temperature {config.temperature:g}, "
        f"at most {config.max_new_tokens} tokens a text, seed {config.seed}"
    )
    parts = (table(done), wrong_answers(done), f"{settings}\n{RULE}")
    print(json.dumps(report) if parsed.json else printable("\n\n".join(filter(None, parts))))

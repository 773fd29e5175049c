"""What is measured: cases, and the exact token ids that everybody gets."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.models import SMOLLM2
from neuromas.graph.topology import Topology
from neuromas.graph.wording import WORDINGS
from neuromas.types import Example

Kind = Literal["rollout", "update", "step"]
ROLLOUT_PEERS = ("peft_loop", "peft_merged", "peft_mixed", "vllm_lora", "ours_vllm", "limit")
UPDATE_PEERS = ("peft_loop", "peft_mixed", "limit")
TOPOLOGIES = {1: (1,), 3: (1, 1, 1), 5: (2, 2, 1), 7: (2, 2, 2, 1), 15: (4, 4, 4, 2, 1)}
ANSWER_FORMAT = "Write the answer."
STEPS_OF_TEXT = 4
"""Steps of questions that a case of whole steps holds; after that they come again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line of the report: a workload at one size on one model."""

    workload: str
    """W1 to W5."""
    kind: Kind
    model: str
    widths: tuple[int, ...] = (1, 1, 1)
    questions: int = 8
    group: int = 8
    prefix: int = 128
    """Tokens of a question, on average; lengths are spread by a quarter each way."""
    own: int = 40
    """Tokens of a node's own part of the prompt without its messages, on average."""
    new: int = 48
    """Tokens that every row samples. In an update, rows have between a third of it and all of it."""
    scope: Literal["all", "suffix"] = "all"
    barrier_free: bool = False
    """Nodes read nobody: as many rows of each node, all with prompts as long as the first layer's."""
    peers: tuple[str, ...] = ()
    """Who does it, besides us."""

    @property
    def name(self) -> str:
        shape = ",".join(map(str, self.widths)) + (" no edges" if self.barrier_free else "")
        scope = "" if self.scope == "all" else f" scope {self.scope}"
        return (
            f"{self.workload} {self.kind} {self.model} [{shape}] {self.questions} x {self.group}, "
            f"prefix {self.prefix}, new {self.new}{scope}"
        )

    @property
    def nodes(self) -> int:
        return sum(self.widths)

    def topology(self) -> Topology:
        return Topology.layered(self.widths)


def rows_of(case: Case, vocabulary: int, seed: int = 0) -> dict[str, Any]:
    """Return a case as token ids: questions, and per completion its node, its prompt, what it wrote and what it waits for.

    Ids are random: speed does not depend on them, and no engine can share what another could not. A row's `prompt` is what
    follows the question and holds `new` tokens and a frame for each sender, as a message would.
    """
    rng = random.Random(f"{seed}/{case.name}")
    topology = case.topology()

    def ids(mean: int) -> list[int]:
        # The first ids of a vocabulary are control tokens.
        return [rng.randrange(16, vocabulary) for _ in range(rng.randint(mean - mean // 4, mean + mean // 4))]

    questions = [ids(case.prefix) for _ in range(case.questions)]
    rows: list[dict[str, Any]] = []
    place: dict[tuple[int, int], int] = {}
    for rollout in range(case.questions * case.group):
        advantage = round(rng.uniform(0.2, 1.0) * rng.choice([-1, 1]), 3)
        for node in topology.nodes:
            senders = () if case.barrier_free else topology.senders(node)
            prompt = ids(case.own)
            for _ in senders:
                prompt += [rng.randrange(16, vocabulary) for _ in range(case.new + 6)]
            length = rng.randint(max(1, case.new // 3), case.new)
            place[rollout, node] = len(rows)
            rows.append({
                "node": node, "layer": 0 if case.barrier_free else topology.layer(node) - 1, "rollout": rollout,
                "question": rollout // case.group, "prompt": prompt, "waits_for": [place[rollout, s] for s in senders],
                "written": [rng.randrange(16, vocabulary) for _ in range(length)],
                "advantage": advantage,
            })  # fmt: skip
    return {"questions": questions, "rows": rows, "nodes": list(topology.nodes)}


def texts_of(case: Case, seed: int = 0) -> dict[str, Any]:
    """Return a case of whole steps: questions as text, `questions` of them for each of a few steps."""
    rng = random.Random(f"{seed}/{case.name}")

    def question() -> str:
        if case.model in ("bundled", SMOLLM2):
            # Steps of a walk, in the words that the bundled tokenizer knows: about 4 tokens each.
            turns = [
                f"Take {rng.randint(1, 9)} steps {rng.choice(['left', 'right', 'forward'])}." for _ in range(case.prefix // 5)
            ]
            return " ".join(turns)
        return " ".join(f"w{rng.randrange(16, 30000)}" for _ in range(case.prefix))

    steps = [[question() for _ in range(case.questions)] for _ in range(STEPS_OF_TEXT)]
    topology = case.topology()

    def prompts(asked: str) -> list[str]:
        """Return what each node reads where nobody has written to it: for trainers that know no edges."""
        example, wording = Example("", asked, "", ANSWER_FORMAT), WORDINGS["terse"]
        return [f"{asked}\n\n{wording.render(topology, node, example, [])}" for node in topology.nodes]

    return {"steps": steps, "prompts": [[prompts(asked) for asked in step] for step in steps]}


def write_spec(case: Case, folder: Path, model: Path, adapters: Path, vocabulary: int, **settings: Any) -> dict[str, Any]:
    """Write a case's data and return what a worker is told about it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / (case.name.replace(" ", "_").replace("/", "_") + ".json")
    data.write_text(json.dumps(texts_of(case) if case.kind == "step" else rows_of(case, vocabulary)))
    return {**asdict(case), "data": str(data), "model_folder": str(model), "adapters_folder": str(adapters), **settings}


def cases(quick: bool, wanted: Sequence[str]) -> list[Case]:
    """Return the cases of the workloads wanted, in order."""
    made: list[Case] = []
    made += _pretrained(quick)
    for model in ("bundled", "60m"):
        made += _rollouts_and_updates(model, quick) + _steps(model, quick) + _scaling(model, quick)
    made += _memory(quick)
    return sorted((case for case in made if case.workload in wanted), key=lambda case: (case.workload, case.model != "bundled"))


def smoke(chosen: Sequence[Case]) -> list[Case]:
    """Return the same cases at sizes that say nothing about speed: whether everything runs, in little time."""
    small = [replace(case, questions=2, group=2, new=3, prefix=16 if case.prefix < 1024 else 32, own=8) for case in chosen]
    # Cases that differ in size alone are one now; of those, one that has peers stays.
    return list({case.name: case for case in sorted(small, key=lambda case: len(case.peers))}.values())


def _rollouts_and_updates(model: str, quick: bool) -> list[Case]:
    small = model == "60m"
    questions, group = ((1, 8) if small else (4, 8)) if quick else ((4, 8) if small else (16, 8))
    new = 16 if quick and small else 32 if small else 48
    made = []
    for widths in ((1, 1, 1),) if quick and small else ((1, 1, 1), (2, 2, 2, 1)):
        size: dict[str, Any] = {"model": model, "widths": widths, "questions": questions, "group": group, "new": new}
        # Mixed batches are slower than the loop over nodes, and their updates of the 60M model want more than 16 GB.
        without_mixed = ("peft_mixed",) if quick else ()
        rollout_peers, update_peers = (
            tuple(p for p in peers if p not in without_mixed) for peers in (ROLLOUT_PEERS, UPDATE_PEERS)
        )
        made.append(Case(workload="W1", kind="rollout", peers=rollout_peers, **size))
        made.append(Case(workload="W2", kind="update", peers=update_peers, **size))
        if not quick or (widths == (1, 1, 1) and not small):
            made.append(Case(workload="W1", kind="rollout", scope="suffix", peers=("limit",), **size))
            made.append(Case(workload="W2", kind="update", scope="suffix", peers=("limit",), **size))
    return made


def _pretrained(quick: bool) -> list[Case]:
    """Return the cases of a pretrained model of 135 million parameters: three nodes, 32 tokens of each."""
    size: dict[str, Any] = {"model": SMOLLM2, "new": 32}
    made = [Case(workload="W2", kind="update", questions=1 if quick else 4, peers=("peft_loop", "limit"), **size)]
    # 32 rows decode together, and 64.
    for questions in (4,) if quick else (4, 8):
        peers = ROLLOUT_PEERS if questions == 4 else ("peft_loop", "peft_merged", "limit")
        made.append(Case(workload="W1", kind="rollout", questions=questions, peers=peers, **size))
    if not quick:
        made.append(Case(workload="W3", kind="step", widths=(1,), questions=4, peers=("trl_rloo", "trl_grpo"), **size))
    return made


def _steps(model: str, quick: bool) -> list[Case]:
    small = model == "60m"
    if quick and small:
        return []
    size: dict[str, Any] = {"model": model, "questions": 4 if quick or small else 8, "group": 8, "new": 32}
    # TRL trains one agent: beside it stand one node, and a network that samples as many tokens in all.
    return [
        Case(workload="W3", kind="step", widths=(1,), peers=("trl_rloo", "trl_grpo"), **size),
        Case(workload="W3", kind="step", widths=(1, 1, 1), peers=("comlrl",), **size),
    ]


def _scaling(model: str, quick: bool) -> list[Case]:
    if quick and model == "60m":
        return []
    made = []
    # 420 rows, or 105: divisible by all numbers of nodes. Groups are alike, so that as many prefixes are read.
    for nodes in (1, 7) if quick else (1, 3, 5, 7, 15):
        total = 105 if model == "60m" else 420
        rollouts = total // nodes
        group = 4 if total == 420 else 1
        size: dict[str, Any] = {"model": model, "widths": TOPOLOGIES[nodes], "questions": rollouts // group, "group": group}
        size |= {"new": 24, "workload": "W4"}
        for free in (False, True):
            made += [Case(kind="rollout", barrier_free=free, **size), Case(kind="update", barrier_free=free, **size)]
    total = 32 if model == "60m" else 64
    for group in (4, 32) if quick else (4, 8, 16, 32):
        size = {"model": model, "questions": total // group, "group": group, "new": 24, "workload": "W4"}
        made += [Case(kind="rollout", **size), Case(kind="update", **size)]
    for prefix in (64, 1024) if quick else (64, 256, 1024):
        size = {"model": model, "questions": 2, "group": 8, "new": 24, "prefix": prefix, "workload": "W4"}
        peers = () if quick else ("peft_loop", "peft_merged")
        made += [Case(kind="rollout", peers=peers, **size), Case(kind="update", peers=peers[:1], **size)]
    return made


def _memory(quick: bool) -> list[Case]:
    made = []
    for model in ("bundled",) if quick else ("bundled", "60m"):
        for nodes, rollouts in ((1, 7), (7, 1)):
            size: dict[str, Any] = {
                "model": model,
                "widths": TOPOLOGIES[nodes],
                "questions": 2 * rollouts,
                "group": 8,
                "new": 24,
            }
            for kind in ("rollout", "update"):
                made.append(Case(workload="W5", kind=kind, peers=("peft_loop",), **size))
            if model == "bundled":
                made.append(Case(workload="W5", kind="step", peers=("comlrl",), **size))
    return made

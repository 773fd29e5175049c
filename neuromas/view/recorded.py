"""What a run has recorded, as data for the page: its networks, scores, ledger, curves, and every rollout message by message.

Loads no torch.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from neuromas.graph import messages
from neuromas.graph.growth import widths_of
from neuromas.graph.topology import Topology
from neuromas.rollout.voting import majority_vote
from neuromas.system.files import damaged
from neuromas.tasks import Task, rewards_of
from neuromas.training.run_directory import RunDirectory
from neuromas.types import Example, Message

Json = dict[str, Any]
TRAIN = "train"
"""The split of rollouts that training learns from; all others are scored."""
RECORDED = ("metrics.jsonl", "rollouts.jsonl", "evaluation.json", "diagnosis.json")
SCORE_PARTS = {"accuracy", "low", "high", "n", "floor", "parse_rate", "calls_per_answer", "tokens_per_answer"}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A rollout as a run has recorded it; `when` is `before`, `after` or `train`."""

    example: Example
    split: str
    when: str
    step: int
    index: int
    reward: float
    malformed: bool
    """Whether a message did not arrive as it should, or the task could not read the answer."""
    said: Json
    """The messages and the answer, for the page."""


class RunRecord:
    """One run and its task; ValueError for a run that is no network."""

    def __init__(self, run: RunDirectory, task: Task) -> None:
        if run.config.society.rounds:
            raise ValueError(
                f"run {run.path} is a society that debates, and only networks have messages on edges: leave it out"
            )
        self.run, self.task = run, task
        growths = run.config.growths()
        self.stages: list[tuple[int, Topology]] = [(0, run.topology), *((g.at_step, g.grown) for g in growths)]
        wording = run.config.prompt.build(bundled=run.config.backbone == "bundled")
        self._headers_given = wording.begin_messages
        self._rewards: dict[tuple[str, str], float] = {}

    def summary(self, label: str) -> Json:
        """Return everything but the rollouts."""
        config = self.run.config
        return {
            "label": label,
            "task": config.task.name,
            "backbone": config.backbone,
            "seed": config.seed,
            "num_steps": config.num_steps,
            "stages": [
                {
                    "at_step": at_step,
                    "widths": widths_of(topology),
                    "layers": [[node, topology.layer(node)] for node in topology.nodes],
                    "edges": [list(edge) for edge in topology.edges],
                }
                for at_step, topology in self.stages
            ],
            "scores": self._scores(),
            "ledger": self._ledger(),
            "curves": self._curves(),
            "diagnosis": self._diagnosis(),
        }

    def _scores(self) -> list[Json]:
        found = []
        for when in ("before", "after"):
            for name, score in self.run.scores(when).items():
                if not isinstance(score, dict) or not score.keys() >= SCORE_PARTS:
                    raise damaged(self.run.path / "evaluation.json", "a score lacks a part")
                found.append({"when": when, "set": name, **{part: score[part] for part in sorted(SCORE_PARTS)}})
        return found

    def _diagnosis(self) -> Json | None:
        """Return what `neuromas diagnose` has written, None if nothing."""
        found = self.run.read_json("diagnosis.json", dict)
        if found is not None and not _is_diagnosis(found):
            raise damaged(self.run.path / "diagnosis.json", "a part is missing or no such part")
        return found

    def _ledger(self) -> Json | None:
        """Return what the run had spent at its newest checkpoint, None before the first one."""
        if not self.run.checkpoints():
            return None
        # `newest` checks the checkpoint, and its ledger with it.
        folder, _ = self.run.newest()
        return self.run.read_json(f"checkpoints/{folder.name}/ledger.json", dict)

    def _curves(self) -> Json:
        records = self.run.metrics()
        names = dict.fromkeys(name for record in records for name in record if name != "step")
        return {
            "steps": [record["step"] + 1 for record in records],
            "series": {name: [_shortened(record.get(name)) for record in records] for name in names},
        }

    def state(self) -> list[tuple[str, int]]:
        """Return what changes whenever the run has recorded something new."""
        logs = [path for name in RECORDED if (path := self.run.path / name).exists()]
        # An old checkpoint may vanish at any time.
        return [(path.name, path.stat().st_mtime_ns) for path in logs] + [(path.name, 0) for path in self.run.checkpoints()]

    def has_rollouts(self) -> bool:
        """Say whether the run has recorded a rollout."""
        path = self.run.path / "rollouts.jsonl"
        return path.exists() and path.stat().st_size > 0

    def rollouts(self, *, training_only: bool = False) -> list[Recorded]:
        """Return all rollouts in the order in which they were recorded, or those of training alone; ValueError if the file is
        damaged, or without any where all are asked for.
        """
        records = [each for each in self.run.rollouts() if not training_only or each.get("split", TRAIN) == TRAIN]
        if not records and not training_only:
            raise ValueError(
                f"{self.run.path} has no rollouts, so there is nothing to see; train it, or import what export --rollouts wrote"
            )
        if not all(map(_is_whole, records)):
            raise damaged(self.run.path / "rollouts.jsonl", "a rollout lacks a part")
        heard = [self._hear(record) for record in records]
        self._reward([each for record, each in zip(records, heard, strict=True) if "reward" not in record])
        return [self._recorded(record, *of_record) for record, of_record in zip(records, heard, strict=True)]

    def _reward(self, heard: Sequence[tuple[Example, Json]]) -> None:
        """Find the rewards of evaluations, of which only the mean is recorded; each is asked for once."""
        texts = {(example.id, said["answer"]["text"]): example for example, said in heard}
        if asked := [(example, key[1]) for key, example in texts.items() if key not in self._rewards]:
            self.task.check_ready()
            rewards = rewards_of(self.task, asked)
            self._rewards |= {(example.id, text): reward for (example, text), reward in zip(asked, rewards, strict=True)}

    def _recorded(self, record: Json, example: Example, said: Json) -> Recorded:
        split = record.get("split", TRAIN)
        when = TRAIN if split == TRAIN else "after" if record["step"] > self.run.first_step else "before"
        reward = record["reward"] if "reward" in record else self._rewards[example.id, said["answer"]["text"]]
        malformed = bool(record["faults"]) or said["answer"]["read"] is None
        return Recorded(example, split, when, record["step"], record["rollout"], float(reward), malformed, said)

    def _hear(self, record: Json) -> tuple[Example, Json]:
        """Return the example of a record, and who said what to whom."""
        texts = {int(node): str(text) for node, text in record["texts"].items()}
        number, topology = self._network_of(texts.keys(), record["step"], record.get("split", TRAIN))
        statuses = {(a, b): status for a, b, status in record["faults"]}
        sent: list[list[Any]] = []
        dropped: dict[int, str] = {}
        for node in topology.nodes:
            recipients = topology.recipients(node)
            for message in (delivered := self._delivered(texts[node], node, recipients)):
                status = statuses.get((node, message.recipient), "ok")
                sent.append([node, message.recipient, message.text, status])
            if recipients and not _holds_all(delivered, texts[node]):
                dropped[node] = texts[node]
        answering = [node for node in topology.nodes if not topology.recipients(node)]
        spoken = [texts[node] for node in answering]
        winner = majority_vote(spoken, self.task.parse_answer) if len(spoken) > 1 else 0
        example = Example(record["example"], record["question"], record["gold"], self.task.answer_format)
        answer = {"node": answering[winner], "text": spoken[winner], "read": self.task.parse_answer(spoken[winner])}
        others = {node: text for node, text in zip(answering, spoken, strict=True) if node != answering[winner]}
        return example, {"stage": number, "messages": sent, "answer": answer, "written": dropped | others}

    def _network_of(self, nodes: Set[int], step: int, split: str) -> tuple[int, Topology]:
        """Return the network in which just these nodes have spoken, the last one that the run had by this step."""
        for number, (at_step, topology) in reversed(list(enumerate(self.stages))):
            is_there = at_step <= step if split == TRAIN else at_step < step or not number
            if is_there and set(topology.nodes) == nodes:
                return number, topology
        fault = f"nodes {sorted(nodes)} are those of no network that the run has had by step {step}"
        raise damaged(self.run.path / "rollouts.jsonl", fault)

    def _delivered(self, text: str, sender: int, recipients: Sequence[int]) -> tuple[Message, ...]:
        """Return the messages of a node's text, as they were delivered."""
        given = [messages.header(recipient) for recipient in recipients] if self._headers_given else []
        # A copy of the bundled backbone under another name was not given any.
        if texts := _texts_after(text, given):
            return messages.deliver(texts, sender, recipients)
        return messages.parse(text, sender, recipients)


def _is_whole(record: Json) -> bool:
    """Say whether a record of rollouts.jsonl has all parts; that it has a step and perhaps a split has been checked."""
    parts = {"example": str, "question": str, "gold": str, "rollout": int, "texts": dict, "faults": list}
    return (
        _has(record, parts)
        and isinstance(record.get("reward", 0.0), int | float)
        and all(node.isdecimal() and isinstance(text, str) for node, text in record["texts"].items())
        and all(isinstance(fault, list) and list(map(type, fault)) == [int, int, str] for fault in record["faults"])
    )


def _is_diagnosis(found: Json) -> bool:
    """Say whether a diagnosis has the parts that the page shows."""
    parts = {"split": str, "step": int, "network": dict, "undisturbed": dict, "effects": list, "adapters": dict,
             "specialisation": dict, "faults": dict, "training": dict}  # fmt: skip
    effect = {"name": str, "kind": str, "nodes": list, "edges": list, "accuracy": float, "change": float, "low": float,
              "high": float, "answers_changed": float, "disturbed": float, "reading": str}  # fmt: skip
    return (
        _has(found, parts)
        and _has(found["network"], {"widths": list, "layers": list, "edges": list})
        and found["undisturbed"].keys() >= SCORE_PARTS
        and all(isinstance(each, dict) and _has(each, effect) for each in found["effects"])
        and _has(found["adapters"], {"norms": dict, "pairs": list})
        and _has(found["training"], {"steps": list, "nodes": dict})
    )


def _has(found: Json, parts: dict[str, type]) -> bool:
    """Say whether a record has all of these parts, each of its kind; a whole number may be any."""
    return all(isinstance(found.get(name), kind if kind is not float else int | float) for name, kind in parts.items())


def _texts_after(text: str, headers: Sequence[str]) -> list[str]:
    """Return the text after each of the headers that a node was given, of which each but the first begins a line; empty if the
    node was not given them.
    """
    texts, rest = [], f"\n{text}"
    for header in headers:
        part, found, rest = rest.partition(f"\n{header}")
        if not found or (not texts and part):
            return []
        texts.append(part)
    return [*texts[1:], rest] if headers else []


def _holds_all(delivered: Sequence[Message], text: str) -> bool:
    """Say whether the messages hold all that a node wrote but their headers."""
    written = text
    for message in delivered:
        written = written.replace(messages.header(message.recipient), " ").replace(message.text, " ", 1)
    return not written.strip()


def _shortened(value: float | None) -> float | None:
    """Return a number with the digits that a picture shows."""
    return None if value is None else float(f"{value:.6g}")

"""What a checkpoint holds: adapters, the optimizer's moments, a critic if there is one, the ledger, and how far the run is."""

import json
from dataclasses import asdict, dataclass, field

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from neuromas.graph.topology import Topology
from neuromas.model.adapters import AdapterBank
from neuromas.training.credit.critic import Critic
from neuromas.training.learner import Learner
from neuromas.training.ledger import Ledger, Pace
from neuromas.training.run_directory import RunDirectory


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint holds besides adapters and optimizer."""

    step: int
    """Training steps done."""
    running_mean: float
    """Mean reward for `--centring ema`."""
    backbone_checksum: str
    ledger: Ledger
    pace: Pace = field(default_factory=Pace)
    topology: Topology | None = None
    """Of the network whose adapters these are; None: that of the run."""
    validation_accuracy: float | None = None
    """Of the checkpoint that is kept as the best; None in all others."""
    has_optimizer: bool = True
    """False for a checkpoint that was imported: an export leaves out what learns, the optimizer and a critic."""


def save(run: RunDirectory, bank: AdapterBank, learner: Learner, state: State, critic: Critic | None = None) -> None:
    """Write a checkpoint, all or nothing; ValueError with the last good one if the disk refuses."""
    backbone = run.config.backbone
    optimizer = save_tensors(learner.state())
    files = {f"adapters/{node}/{name}": data for node in bank.nodes for name, data in bank.peft_files(node, backbone).items()}
    files["optimizer.safetensors"] = optimizer
    if critic:
        files["critic.safetensors"] = save_tensors(critic.state())
    files["ledger.json"] = json.dumps(state.ledger.to_json(), indent=2).encode()
    head = {
        "running_mean": state.running_mean,
        "backbone_checksum": state.backbone_checksum,
        "pace": asdict(state.pace),
        "topology": state.topology.to_json() if state.topology else None,
        "validation_accuracy": state.validation_accuracy,
    }
    run.save(state.step, head, files, best=state.validation_accuracy is not None)


def load(run: RunDirectory, bank: AdapterBank, learner: Learner | None = None, critic: Critic | None = None) -> State | None:
    """Read a run's newest checkpoint into bank, learner and critic; None if there is none yet.

    Raises ValueError that names the file if a checkpoint is truncated or damaged.
    """
    if not run.checkpoints():
        return None
    folder, state = run.newest()
    topology = Topology.from_json(state["topology"]) if state["topology"] else None
    # One adapter may serve all nodes.
    if topology and not run.config.adapter.shared and set(topology.nodes) != set(bank.nodes):
        raise ValueError(
            f"checkpoint {folder} holds nodes {sorted(topology.nodes)}, by the run's config it has {sorted(bank.nodes)} at "
            "that step; restore config.json"
        )
    for node in bank.nodes:
        bank.load_peft(node, folder / "adapters" / str(node))
    bank.version = state["step"]
    has_optimizer = "optimizer.safetensors" in state["files"]
    if learner is not None and has_optimizer:
        learner.load_state(load_tensors((folder / "optimizer.safetensors").read_bytes()))
    if critic is not None and has_optimizer:
        critic.load_state(load_tensors((folder / "critic.safetensors").read_bytes()))
    ledger = Ledger(**json.loads((folder / "ledger.json").read_text()))
    return State(
        state["step"], state["running_mean"], state["backbone_checksum"], ledger, Pace(**state["pace"]), topology,
        has_optimizer=has_optimizer,
    )  # fmt: skip


def load_best(run: RunDirectory, bank: AdapterBank) -> int:
    """Read the adapters of a run's best validation, or the newest where nothing was validated, and return their step."""
    folder, state = run.best() or run.newest()
    for node in bank.nodes:
        bank.load_peft(node, folder / "adapters" / str(node))
    bank.version += 1  # an engine with copies of its own takes these over
    return state["step"]

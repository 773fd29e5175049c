"""TRL's RLOOTrainer with one LoRA adapter."""

from typing import Any

from trl import RLOOConfig, RLOOTrainer  # type: ignore[reportMissingImports]  # in its own environment

from benchmarks.peers import trl_shared
from benchmarks.peers.protocol import Work, serve


def setup(spec: dict[str, Any]) -> Work:
    return trl_shared.make(spec, RLOOTrainer, RLOOConfig)


if __name__ == "__main__":
    serve(setup)

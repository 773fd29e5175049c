"""NeuroMAS with `--engine vllm`: log-probabilities, a seed for each row, no barrier between layers, new adapters each round."""

from dataclasses import replace
from typing import Any

from benchmarks.peers.ours import EngineWork
from benchmarks.peers.protocol import Work, serve
from neuromas.rollout.vllm_engine import VllmEngine


class Rollout(EngineWork):
    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        # As in ours, nothing stops a row but its length; vLLM refuses tokens that the vocabulary lacks.
        self.network.policy.frame = replace(self.network.policy.frame, stop_ids=frozenset())
        self.network.engine = VllmEngine(self.network.policy, len(self.network.topology.nodes))

    def run(self) -> int:
        # Between two steps of training adapters change, and with them all that is cached.
        self.network.adapters.version += 1
        return super().run()


def setup(spec: dict[str, Any]) -> Work:
    assert spec["scope"] == "all", "vLLM applies an adapter to every token"
    return Rollout(spec)


if __name__ == "__main__":
    serve(setup)

"""Node by node: `set_adapter`, then transformers.generate, or a forward and a backward pass."""

from typing import Any

from benchmarks.peers import peft_shared
from benchmarks.peers.protocol import Work, serve


def setup(spec: dict[str, Any]) -> Work:
    return peft_shared.set_up(spec, peft_shared.by_node)


if __name__ == "__main__":
    serve(setup)

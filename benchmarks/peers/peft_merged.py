"""Node by node: the adapter is merged into the weights, transformers.generate writes the node's rows, and it is unmerged."""

from typing import Any

from benchmarks.peers import peft_shared
from benchmarks.peers.protocol import Work, serve


def setup(spec: dict[str, Any]) -> Work:
    return peft_shared.set_up(spec, peft_shared.by_node, merges=True)


if __name__ == "__main__":
    serve(setup)

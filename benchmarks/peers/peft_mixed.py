"""All nodes in one batch, routed by PEFT's `adapter_names`, which wants eval mode; gradients flow there all the same."""

from typing import Any

from benchmarks.peers import peft_shared
from benchmarks.peers.protocol import Work, serve


def setup(spec: dict[str, Any]) -> Work:
    return peft_shared.set_up(spec, peft_shared.mixed)


if __name__ == "__main__":
    serve(setup)

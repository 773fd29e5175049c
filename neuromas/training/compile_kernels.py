"""Compiles the loops ahead of their first use: `python -m neuromas.training.compile_kernels`.

Where a process has compiled a parallel loop itself, Numba runs another translation of it than the one that it keeps on disk:
sums then differ in their last bits from those of every later process. So no process that computes anything compiles them:
it starts this program, with an environment variable that says so.
"""

import os

import torch

from neuromas.graph.topology import Topology
from neuromas.model.backbone import Backbone
from neuromas.model.kernels.launch import COMPILING, prepare
from neuromas.rollout.network import Network
from neuromas.training.reinforce import Credits, build_batch, loss
from neuromas.types import Example


def compile_for(dtype: str) -> None:
    """Sample and learn a little with a backbone of this dtype: loops are compiled when they are first called."""
    network = Network(Topology.layered([1, 1]), Backbone.load("bundled", dtype=dtype, device="cpu"), max_new_tokens=4)
    examples = [Example(name, f"Is {name} a letter?", "Yes", 'Write "Answer: Yes".') for name in "ab"]
    groups = network.rollout(examples, 2, seed=(0,))
    policy = network.policy
    weights = dict.fromkeys(network.topology.nodes, torch.tensor([[1.0, -1.0]] * 2))
    batch = build_batch(Credits.of(groups, weights), routing=policy.routing, adapter_version=policy.version, temperature=1.0)
    for part in batch.split(10_000, network.backbone.device):
        loss(policy.logprobs(part.rows), part.advantages_K, batch.num_rollouts).backward()


if __name__ == "__main__":
    if COMPILING in os.environ:
        compile_for("float32")
        compile_for("bfloat16")
    else:
        prepare()

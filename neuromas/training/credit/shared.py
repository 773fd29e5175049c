"""`shared`: every node gets the rollout's reward, centred over the question's other rollouts (arXiv 2605.16757)."""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Credits, advantages


def shared(step: Step) -> Credits:
    """Return the same advantage for all nodes of a rollout; in a tree, rollouts have the texts of early layers in common.

    Unbiased with `--centring leave_one_out`, `ema` and `none`.
    """
    config, topology, rewards_PG = step.config, step.network.topology, step.rewards_PG
    shared_by = {node: config.branches ** (topology.depth - topology.layer(node)) for node in topology.nodes}
    found = {
        node: advantages(
            rewards_PG, config.centring, shared_by=shared_by[node], running_mean=step.running_mean, normalize=config.normalize
        )
        for node in topology.nodes
    }
    if step.divergence:
        # Not a part of what is normalized: in a group of equal rewards that would blow it up to the size of a reward.
        for node, advantages_PG in found.items():
            found[node] = advantages_PG - config.kl_coef * step.divergence.penalties(node, shared_by=shared_by[node])
    return Credits.of(step.groups, found)

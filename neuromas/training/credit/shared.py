"""`shared`: every node gets the rollout's reward, centred over the question's other rollouts (arXiv 2605.16757)."""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Credits, advantages


def shared(step: Step) -> Credits:
    """Return the same advantage for all nodes of a rollout; in a tree, rollouts have the texts of early layers in common.

    Unbiased with `--centring leave_one_out`, `ema` and `none`.
    """
    config, rewards_PG = step.config, step.rewards_PG
    found = {
        node: advantages(
            rewards_PG, config.centring, shared_by=shared_by, running_mean=step.running_mean, normalize=config.normalize
        )
        for node, shared_by in step.shared_by.items()
    }
    return Credits.of(step.groups, found)

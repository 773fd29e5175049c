"""The learning rate of a step."""

import math

from neuromas.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, sampled_tokens: int = 0) -> float:
    """Linear warm-up, then a cosine from the peak to `final_lr` of it at the last step; a growth may begin both anew.

    With `train_tokens` the cosine follows the share of them that the steps before have sampled.
    """
    restarts = [entry.at_step for entry in config.growth if entry.restart_lr]
    first = max((at for at in restarts if at <= step), default=0)
    end = min((at for at in restarts if at > step), default=config.num_steps)
    step -= first
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.train_tokens:
        done = min(1.0, sampled_tokens / config.train_tokens)
    else:
        done = (step - config.warmup_steps) / max(1, end - first - config.warmup_steps)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))

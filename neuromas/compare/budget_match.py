"""The quantities that a comparison may declare as matched, and the check whether they are."""

from collections.abc import Mapping

from neuromas.system.terminal import shortened

QUANTITIES: dict[str, str] = {
    "trainable_parameters": "trainable parameters",
    "training_questions": "training questions",
    "training_rollouts": "training rollouts",
    "training_steps": "training steps",
    "updates": "optimizer steps with a gradient",
    "training_calls": "calls in training",
    "training_sampled_tokens": "sampled tokens in training",
    "training_prompt_tokens": "prompt tokens in training",
    "calls_per_answer": "calls per answer",
    "most_tokens_per_answer": "most tokens per answer",
    "tokens_per_answer": "sampled tokens per answer",
    "prompt_tokens_per_answer": "prompt tokens per answer",
}
"""Name -> its words in a sentence. A method that is not trained has 0 of the quantities of training."""

Amounts = Mapping[str, float]
"""One amount for each of QUANTITIES."""


def difference(first: float, second: float) -> float:
    """Return the difference of two amounts as a share of the larger one."""
    return abs(first - second) / max(first, second) if first != second else 0.0


def format_amount(amount: int | float) -> str:
    """Return an amount as text: 233,472; 3; 52.7."""
    return f"{amount:,.0f}" if amount >= 1000 or float(amount).is_integer() else f"{amount:,.3g}"


def shorten(text: str) -> str:
    """Return an answer as one short line: it may be a program of many lines."""
    return shortened(" ".join(text.split()), 30)


def compare_amounts(name: str, first: float, second: float) -> str:
    """Return a description of one quantity of two methods, e.g. `calls per answer 3 against 1`."""
    return f"{QUANTITIES[name]} {format_amount(first)} against {format_amount(second)}"


def mismatches(first: Amounts, second: Amounts, declared: tuple[str, ...], tolerance: float) -> list[str]:
    """Return a description of each declared quantity that does not match; empty if all match."""
    return [
        f"{compare_amounts(name, first[name], second[name])} ({difference(first[name], second[name]):.0%} apart)"
        for name in declared
        if difference(first[name], second[name]) > tolerance
    ]

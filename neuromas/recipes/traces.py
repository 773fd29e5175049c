"""All families whose problems the bundled backbone learns to solve in steps."""

from neuromas.recipes.trace import Trace
from neuromas.recipes.traces_of_stories import NavigateTrace, TrackingTrace, WebTrace
from neuromas.recipes.traces_of_symbols import ArithmeticTrace, BooleanTrace, DyckTrace

FAMILIES: tuple[type[Trace], ...] = (NavigateTrace, BooleanTrace, ArithmeticTrace, TrackingTrace, DyckTrace, WebTrace)

TASKS: tuple[tuple[type[Trace], str], ...] = tuple((family, name) for family in FAMILIES for name in family.tasks)
"""Every task with the family of its traces."""

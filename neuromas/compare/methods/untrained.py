"""Untrained methods: a conversation with the fields that a compared method has."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from neuromas.compare.methods.conversation import Conversation
from neuromas.compare.methods.method import CellResult, CellSpec


@dataclass(kw_only=True)
class Untrained:
    """A method that trains nothing: it runs one conversation for each example on the bare backbone."""

    name: str
    title: str
    source: str
    conversation: Callable[..., Conversation]
    """Returns the conversation for (example, task, **settings)."""
    settings: dict[str, int | float] = field(default_factory=dict)
    temperature: float = 0.0
    """Temperature of all calls of the method: an engine has one temperature at a time. 0 is greedy, as the paper evaluates."""
    trained: bool = False

    def run(self, spec: CellSpec, folder: Path) -> CellResult:
        """Answer the evaluation sets; nothing is written to `folder`."""
        from neuromas.compare.methods.converse import run_untrained  # loads torch

        return run_untrained(self.name, self.conversation, self.settings, spec, self.temperature)

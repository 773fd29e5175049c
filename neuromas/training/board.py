"""What the workers of a run and the user's process tell each other. Loads no torch: its process starts at once."""


class Board:
    """What the workers and the user's process tell each other; an actor beside the latter."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.starts = 0
        self.asked = False
        self.ended: tuple[str, str] | None = None

    def start(self) -> int:
        """Count that workers have started, and return how often."""
        self.starts += 1
        return self.starts

    def note(self, text: str) -> None:
        self.notes.append(text)

    def take(self) -> list[str]:
        """Return what has been noted since the last time."""
        notes, self.notes = self.notes, []
        return notes

    def ask(self) -> None:
        """Ask the workers to stop."""
        self.asked = True

    def is_asked(self) -> bool:
        return self.asked

    def end(self, how: str, text: str) -> None:
        self.ended = how, text

    def ending(self) -> tuple[str, str] | None:
        return self.ended

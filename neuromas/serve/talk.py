"""A talk with a network in the terminal: every message on its edge as it is written."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from neuromas.config import COLDEST
from neuromas.rollout.live import LiveRollouts, Terms
from neuromas.rollout.network import Network
from neuromas.system.terminal import printable
from neuromas.tasks import Task, question_id
from neuromas.types import Completion, Example, Message, MessageStatus, Rollout

HELP = """A question is a line of its own, or several lines between two lines of three double quotes. Commands:
  /again         answer the last question once more, from other random numbers (at temperature 1 if it is 0)
  /temperature T sample at this temperature; 0 is greedy
  /trace         show the messages of the nodes, or only the answer
  /quit          end; so does Ctrl-D"""
HIGHEST = 2.0
QUOTES = '"""'


@dataclass(slots=True)
class Talk:
    """What is being talked about, and how."""

    network: Network
    task: Task
    read: Callable[[str], str]
    """Returns the next line that the user types after a prompt; EOFError ends the talk."""
    console: Console = field(default_factory=lambda: Console(highlight=False, markup=False))
    temperature: float = 0.0
    shows_trace: bool = True
    question: str = ""
    draws: int = 0

    def run(self) -> None:
        """Answer questions until the user ends it. Each question stands alone: a network has no memory of those before."""
        self.console.print(HELP)
        while True:
            try:
                line = self.read("> ").strip()
                if line == QUOTES:
                    line = "\n".join(iter(lambda: self.read("| ").rstrip(), QUOTES)).strip()
            except EOFError:
                return
            if line in ("/quit", "/q"):
                return
            try:
                self._obey(line)
            except ValueError as error:
                self.console.print(printable(f"error: {error}"))
            except KeyboardInterrupt:
                self.console.print("stopped")

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        if command == "/trace":
            self.shows_trace = not self.shows_trace
            self.console.print(f"messages are {'shown' if self.shows_trace else 'hidden'}")
        elif command == "/temperature":
            self.temperature = _temperature(argument)
        elif command == "/again":
            if not self.question:
                raise ValueError("there is no question yet")
            self.draws += 1
            self._answer(self.temperature or 1.0)
        elif line.startswith("/"):
            self.console.print(HELP)
        elif line:
            self.question, self.draws = line, 0
            self._answer(self.temperature)

    def _answer(self, temperature: float) -> None:
        """Answer the question, and show each text while it is written."""
        example = Example(question_id(self.question), self.question, "", self.task.answer_format)
        rollouts, texts, done = LiveRollouts(self.network), dict[int, str](), dict[int, Completion]()
        with rollouts.running(), Live(console=self.console, refresh_per_second=12, vertical_overflow="visible") as live:
            seed = ("evaluate", self.draws)
            terms = Terms(temperature, hears_answer=True, hears_messages=True)
            rollout = rollouts.begin(example, 0, seed=seed, terms=terms)
            while rollout.result is None:
                for said in rollouts.step():
                    texts[said.node] = said.text
                    if said.completion is not None:
                        done[said.node] = said.completion
                live.update(Group(*self._panels(texts, done)))
        if not self.console.is_terminal:
            self.console.print()
        self.console.print(answer_line(rollout.result, self.task))

    def _panels(self, texts: dict[int, str], done: dict[int, Completion]) -> list[Panel]:
        topology, panels = self.network.topology, list[Panel]()
        for node in [node for node in topology.nodes if node in texts]:
            recipients = topology.recipients(node)
            if not recipients:
                panels.append(panel(f"node {node} answers", texts[node], ended=node in done))
            elif self.shows_trace and node in done:
                panels += map(message_panel, done[node].messages)
            elif self.shows_trace:
                named = ", ".join(map(str, recipients))
                panels.append(panel(f"node {node} ─▶ node {named}", texts[node], ended=False))
        return panels


def panel(title: str, text: str, *, ended: bool = True) -> Panel:
    """Return a text with its title; one that is still written ends in a mark."""
    return Panel(Text(printable(text if ended else f"{text}▌")), title=title, title_align="left")


def message_panel(message: Message) -> Panel:
    """Return a message on its edge, with what is wrong with it."""
    fault = "" if message.status is MessageStatus.OK else f"  ({message.status.value})"
    return panel(f"node {message.sender} ─▶ node {message.recipient}{fault}", message.text)


def answer_line(rollout: Rollout, task: Task) -> str:
    """Return the answer that a task reads."""
    return printable(f"answer: {task.parse_answer(rollout.answer) or '(none that the task can parse)'}")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value == 0 or COLDEST <= value <= HIGHEST):
        raise ValueError(f"/temperature must be 0 (greedy), or {COLDEST} to {HIGHEST:g}, got {text!r}")
    return value


def read_line(prompt: str) -> str:
    """Return a line of standard input, with the prompt before it if somebody sits there."""
    return input(prompt if sys.stdin.isatty() else "")

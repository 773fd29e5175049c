"""A society of agents that debate and learn from what they agree on: its settings, and what its agents read.

Multiagent finetuning (Subramaniam, Du et al. 2025, arXiv 2501.05707). In the first round every generation agent answers alone.
In each later round every critic agent goes on from its generation agent: it reads that answer and, of the others' answers, a
summary that the bare backbone writes, and answers again. The majority of the last round is the answer.

Agents are the nodes of a topology of two layers, `3 3`: generation agents, then as many critics. With one layer, `3`, there are
no critics, and generation agents answer in all rounds. Imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

SUMMARISER = 0
"""Number of the bare backbone among the nodes that write: it has no adapter."""

MOST_EPOCHS, MOST_TEXTS = 1_000, 100_000
"""Of an iteration; its texts are in memory at once."""

LEFT_ALONE: Mapping[str, tuple[object, str]] = {
    "group_size": (1, "there is one debate of each question"),
    "credit": ("shared", "there are no advantages"),
    "replays": (1, "there are no advantages"),
    "critic_lr": (0.02, "there is no value head"),
    "centring": ("none", "nothing is centred"),
    "branches": (1, "there is no tree"),
    "growth": ((), "a society does not grow"),
    "step_tokens": (0, "a step asks --examples-per-step questions"),
    "format_bonus": (0.0, "there is no reward in its loss"),
    "kl_coef": (0.0, "there is no reward in its loss"),
    "entropy_coef": (0.0, "its loss is supervised"),
    "normalize": (False, "there are no advantages"),
}
"""Settings of joint REINFORCE, the value that each has in a society, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SocietyConfig:
    """Agents that debate and learn from what they agree on, in place of joint REINFORCE: a step is an iteration of finetuning.
    `--widths 3 3 --topology.vote` is three generation agents and three critics, `--widths 3` generation agents alone."""

    rounds: int = 0
    """Rounds of a debate; 1 is a vote without a debate. 0: no society, but a network that learns by joint REINFORCE."""
    labels: Annotated[bool, tyro.conf.arg(aliases=["--labels"])] = False
    """Learn from what the task's reward says is right, in place of what the majority says."""
    summary: bool = True
    """Let the bare backbone sum up the others' answers for each agent; without it an agent reads them in full."""
    samples: int = 1
    """Answers of each agent to a question. Above 1 with one round only: a single agent that votes with itself."""
    corrections: float = 0.667
    """Share of corrections in a critic's set (the weight w): all corrections, and as many keeps as that makes."""
    epochs: int = 2
    """How often an iteration goes through its sets."""
    batch: int = 48
    """Texts in a gradient step, shared equally among the adapters."""

    def faults(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is wrong with these settings of a run of which this is the society; nothing if it is none."""
        if self.rounds == 0:
            return
        for name in ("rounds", "samples", "epochs", "batch"):
            if (got := getattr(self, name)) < 1:
                yield f"--society.{name} must be at least 1, got {got}"
        if not 0 < self.corrections <= 1:
            yield f"--society.corrections must be above 0 and at most 1, got {self.corrections}"
        if self.epochs > MOST_EPOCHS:
            yield f"--society.epochs must be at most {MOST_EPOCHS:,}, got {self.epochs}"
        yield from self._faults_of_layers(settings["topology"])
        texts = settings["examples_per_step"] * self.calls(settings["topology"].widths[0])
        if texts > MOST_TEXTS:
            yield (
                "--examples-per-step x calls of an answer (agents, society.rounds, society.samples) must be at most "
                f"{MOST_TEXTS:,}, got {texts}"
            )
        for name in ("place", "message", "write", "answer", "begin_messages"):
            if got := getattr(settings["prompt"], name):
                yield f"--prompt.{name} must be left out in a society, whose agents have prompts of their own, got {got!r}"
        if self.samples > 1 and self.rounds > 1:
            yield f"--society.samples must be 1 with more than one round, got {self.samples}"
        if settings["train_tokens"] and self.rounds > 1:
            yield "--train-tokens must be 0 with more than one round: it sets how often each agent of one round answers"
        for name, (expected, why) in LEFT_ALONE.items():
            if settings[name] != expected:
                flag = name if name == "growth" else "--" + name.replace("_", "-")
                yield f"{flag} must be {_as_text(expected)} with --society.rounds ({why}), got {settings[name]!r}"

    def calls(self, agents: int) -> int:
        """Return the calls of an answer by so many generation agents.

        >>> SocietyConfig(rounds=2).calls(3)  # 3 answers, 3 summaries, 3 answers
        9
        """
        summaries = agents if self.summary and agents > 1 else 0
        return agents * self.samples + (self.rounds - 1) * (agents + summaries)

    def _faults_of_layers(self, topology: Any) -> Iterator[str]:
        widths: Sequence[int] = topology.widths
        if topology.edges or topology.skip or topology.roles:
            yield (
                "--topology.edges, --topology.skip and --topology.roles must be left out in a society: who reads whom follows "
                "from the rounds"
            )
        if len(widths) > 2 or widths[0] != widths[-1]:
            yield f"--topology.widths must be N N (generation agents and critics) or N in a society, got {list(widths)}"
        if len(widths) == 2 and self.rounds == 1:
            yield f"--society.rounds must be at least 2 where there are critics (--topology.widths {list(widths)}), got 1"
        if list(widths) == [1] and self.rounds > 1:
            yield "--topology.widths must hold more than one agent to debate in several rounds, got [1]"


def _as_text(value: object) -> str:
    return str(value) if value != () else "empty"


FIRST = "Work in a few short steps, then answer."
ADVICE = "Examine this as additional advice and give an updated answer."


def first_prompt(answer_format: str) -> str:
    """Return what a generation agent reads after the question."""
    return f"{FIRST}\n{answer_format}"


def summary_prompt(others: Sequence[str]) -> str:
    """Return what the bare backbone reads after the question, to sum up the others' answers for an agent."""
    return f"{_listing(others)}\nSummarise the different opinions of these agents and explain their reasoning."


def update_prompt(own: str, advice: str, answer_format: str) -> str:
    """Return what an agent reads after the question in a later round; `advice` is from the other agents."""
    parts = (f"Your answer: {own.strip()}", advice, ADVICE if advice else "", answer_format)
    return "\n".join(filter(None, parts))


def advice_of_summary(summary: str) -> str:
    """Return a summary as an agent reads it."""
    return f"Summary of the answers of other agents: {summary.strip()}"


def advice_of_answers(others: Sequence[str]) -> str:
    """Return the others' answers in full as an agent reads them."""
    return _listing(others)


def _listing(others: Sequence[str]) -> str:
    return "\n".join(["Answers of other agents:", *(f"{number}. {text.strip()}" for number, text in enumerate(others, 1))])

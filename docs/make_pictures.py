"""Draw what the nodes of a run say before and after training, for pages with a light and with a dark background.

    neuromas train --widths 1 1 1 --seed 0 --run-dir runs/picture
    python docs/make_pictures.py runs/picture docs/pictures/navigate --question 7

writes `navigate-light.svg` and `navigate-dark.svg`. Question 7 is the first one of the test split that has more moves than two
messages hold. Without `--question` it is the first one that the untrained network answers wrong and the trained network right.
Texts are drawn as paths, so a picture looks the same on every machine.
"""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from neuromas.rollout.network import Network
from neuromas.system.terminal import printable
from neuromas.tasks import Task
from neuromas.training.load_run import load_run
from neuromas.types import Example, Rollout

WIDTH, MARGIN, GUTTER = 660, 8, 20
COLUMN = (WIDTH - 2 * MARGIN - GUTTER) / 2
"""All lengths are in points, measured from the upper left corner."""
FONT_SIZE, LINE = 9.2, 12.5
CHARACTER = 0.602 * FONT_SIZE
"""Width of a character of DejaVu Sans Mono, the monospaced font that comes with matplotlib."""
NODE_HEIGHT, EDGE_PADDING, EDGE_INDENT = 20, 7, 30
MOST_QUESTIONS = 200


@dataclass(frozen=True, slots=True)
class Theme:
    text: str
    faint: str
    box: str
    right: str
    wrong: str


THEMES = {
    "light": Theme(text="#1f2328", faint="#59636e", box="#eaeef2", right="#116329", wrong="#b3261e"),
    "dark": Theme(text="#e6edf3", faint="#9198a1", box="#262c36", right="#56d364", wrong="#ff7b72"),
}


def ask(network: Network, example: Example) -> Rollout:
    return network.ask(example.question, answer_format=example.answer_format)


def first_corrected(examples: Sequence[Example], before: Network, after: Network, task: Task) -> int:
    """Return the number of the first question that is wrong before training and right after it; ValueError if none is."""
    for number, example in enumerate(examples):
        rewards = [task.reward(example, ask(network, example).answer) for network in (before, after)]
        if rewards == [0, 1]:
            return number
    raise ValueError(f"none of the first {len(examples)} test questions is wrong before training and right after it")


def edge_texts(rollout: Rollout) -> list[str]:
    """Return the text on every edge of a chain, the output node's answer last; ValueError for other networks."""
    nodes = [completion.node for completion in rollout.completions]
    texts = []
    for completion, recipient in zip(rollout.completions, [*nodes[1:], None], strict=True):
        if [message.recipient for message in completion.messages] != [recipient] * (recipient is not None):
            raise ValueError("only chains can be drawn: networks of widths 1 1 ... 1")
        texts.append(completion.messages[0].text if completion.messages else completion.sample.text)
    return texts


class Picture:
    """One figure that is filled from the top down."""

    def __init__(self, height: float, theme: Theme) -> None:
        self.figure, self.height, self.theme = Figure(figsize=(WIDTH / 72, height / 72)), height, theme
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(
        self, x: float, y: float, text: str, color: str, *, font: str = "DejaVu Sans Mono", weight: str = "normal"
    ) -> None:
        """Write one line whose middle is at height y."""
        text = text.replace("$", r"\$")
        self.axes.text(x, y, text, color=color, family=font, weight=weight, fontsize=FONT_SIZE, va="center_baseline")

    def box(self, x: float, y: float, width: float, height: float, edge: str | None = None) -> None:
        style = "round,pad=0,rounding_size=5"
        color = self.theme.box
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=color, edgecolor=edge or color))

    def arrow(self, x: float, top: float, bottom: float) -> None:
        arrow = FancyArrowPatch((x, top), (x, bottom), arrowstyle="-|>", mutation_scale=11, shrinkA=0, shrinkB=0)
        arrow.set(color=self.theme.faint, linewidth=1.3)
        self.axes.add_patch(arrow)

    def chain(self, x: float, y: float, nodes: list[int], texts: list[list[str]], heights: list[float]) -> float:
        """Draw a chain with the lines of text on its edges; return the height at which its answer belongs."""
        for node, lines, height in zip(nodes, texts, heights, strict=True):
            self.box(x, y, COLUMN, NODE_HEIGHT)
            self.text(x + 10, y + NODE_HEIGHT / 2, f"node {node}", self.theme.text, weight="bold")
            y += NODE_HEIGHT
            self.arrow(x + EDGE_INDENT / 2, y + 1, y + height - 1)
            for number, line in enumerate(lines):
                self.text(x + EDGE_INDENT, y + EDGE_PADDING + (number + 0.5) * LINE, line, self.theme.text)
            y += height
        return y


def draw(example: Example, rollouts: dict[str, Rollout], task: Task, theme: Theme) -> Figure:
    """Return the picture of one question and of one rollout per column, each under its title."""
    question = _wrap(example.question.split("\nOptions:")[0], WIDTH - 2 * MARGIN)
    texts = [[_wrap(text, COLUMN - EDGE_INDENT) for text in edge_texts(rollout)] for rollout in rollouts.values()]
    # What stands side by side has one height.
    heights = [max(map(len, lines)) * LINE + 2 * EDGE_PADDING for lines in zip(*texts, strict=True)]
    top = MARGIN + LINE * (len(question) + 1) + 10
    start = top + LINE + 6
    picture = Picture(start + sum(heights) + (len(heights) + 1) * NODE_HEIGHT + MARGIN, theme)
    picture.text(MARGIN, MARGIN + LINE / 2, "question, read by every node", theme.faint, font="DejaVu Sans")
    for number, line in enumerate(question, start=1):
        picture.text(MARGIN, MARGIN + (number + 0.5) * LINE, line, theme.text)
    for column, (title, rollout) in enumerate(rollouts.items()):
        x = MARGIN + column * (COLUMN + GUTTER)
        picture.text(x, top + LINE / 2, title, theme.text, font="DejaVu Sans", weight="bold")
        y = picture.chain(x, start, [completion.node for completion in rollout.completions], texts[column], heights)
        right = task.reward(example, rollout.answer) == 1
        color = theme.right if right else theme.wrong
        verdict = f"{task.parse_answer(rollout.answer)}: " + ("right" if right else f"wrong, the answer is {example.answer}")
        picture.box(x, y, COLUMN, NODE_HEIGHT, color)
        picture.text(x + 10, y + NODE_HEIGHT / 2, f"{'✓' if right else '✗'} {verdict}", color, weight="bold")
    return picture.figure


def _wrap(text: str, width: float) -> list[str]:
    """Return a text as lines, broken between the steps of a message rather than within one."""
    most = int(width / CHARACTER)
    steps = [step.strip() for step in printable(text).split(";")]
    whole = "; ".join(step.replace(" ", "\xa0") if len(step) < most else step for step in steps)
    return [line.replace("\xa0", " ") for line in textwrap.wrap(whole, most)] or ["(nothing)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("out", type=Path, help="path of the pictures, without -light.svg and -dark.svg")
    parser.add_argument("--question", type=int, help="number of the test question, from 0")
    args = parser.parse_args()
    before, after = load_run(args.run, untrained=True), load_run(args.run)
    examples = after.task.examples("test", MOST_QUESTIONS)
    number = args.question
    if number is None:
        number = first_corrected(examples, before.network, after.network, after.task)
    untrained, trained = (ask(run.network, examples[number]) for run in (before, after))
    rollouts = {"before training": untrained, f"after {after.step} training steps": trained}
    mpl.rcParams["svg.hashsalt"] = "neuromas"  # else each run of this program names the parts of the picture anew
    for name, theme in THEMES.items():
        path = args.out.with_name(f"{args.out.name}-{name}.svg")
        figure = draw(examples[number], rollouts, after.task, theme)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        print(f"{path}: test question {number}")


if __name__ == "__main__":
    main()

"""Mixture of Agents (Wang et al. 2024, arXiv 2406.04692)."""

from neuromas.compare.methods.conversation import Call, Conversation, lines, listing
from neuromas.compare.methods.untrained import Untrained
from neuromas.tasks import Task
from neuromas.types import Example


def mixture_of_agents(example: Example, task: Task, *, layers: int, proposers: int) -> Conversation:
    """Let layers of proposers answer, each but the first reading all answers of the layer before; an aggregator merges them.

    The aggregator is the last layer. Differs: all agents are samples of one backbone (Self-MoA), not different models.
    """

    def text(references: list[str]) -> str:
        critical = "Some may be biased or wrong: judge them critically and merge them into one answer."
        return lines(listing("Answers of others:", references), critical if references else "", example.answer_format)

    answers: list[str] = []
    for layer in range(1, layers):
        answers = yield [Call(f"layer/{layer}/proposer/{index}", text(answers)) for index in range(proposers)]
    (answer,) = yield [Call("aggregate", text(answers))]
    return answer


METHODS = (
    Untrained(
        name="mixture_of_agents",
        title="Mixture of Agents",
        source="Wang et al. 2024, arXiv 2406.04692; repository togethercomputer/MoA",
        conversation=mixture_of_agents,
        settings={"layers": 3, "proposers": 6},
        temperature=0.7,
    ),
)

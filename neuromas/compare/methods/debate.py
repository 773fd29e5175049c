"""Multiagent debate (Du et al. 2023, arXiv 2305.14325)."""

from neuromas.compare.methods.conversation import Call, Conversation, lines, listing
from neuromas.compare.methods.untrained import Untrained
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Task
from neuromas.types import Example


def debate(example: Example, task: Task, *, agents: int, rounds: int) -> Conversation:
    """Let agents answer alone; in each later round each agent reads all last answers in full, and answers again.

    The majority of the last round is the answer. Differs: an agent reads its own last answer as text, where the repository
    keeps a chat history of all of its rounds.
    """
    answers = yield [Call(f"round/1/agent/{agent}", example.answer_format) for agent in range(agents)]
    for number in range(2, rounds + 1):
        calls = []
        for agent, own in enumerate(answers):
            others = [answer for k, answer in enumerate(answers) if k != agent]
            text = lines(
                f"Your answer: {own.strip()}",
                listing("Answers of other agents:", others),
                "Use them as additional information and give an updated answer.",
                example.answer_format,
            )
            calls.append(Call(f"round/{number}/agent/{agent}", text))
        answers = yield calls
    return answers[majority_vote(answers, task.parse_answer)]


METHODS = (
    Untrained(
        name="debate",
        title="Multi-agent debate",
        source="Du et al. 2023, arXiv 2305.14325; repository composable-models/llm_multiagent_debate",
        conversation=debate,
        settings={"agents": 3, "rounds": 2},
        temperature=1.0,
    ),
)

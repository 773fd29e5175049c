"""One answer, or the majority vote over several independent samples."""

from neuromas.compare.methods.conversation import Call, Conversation, lines
from neuromas.compare.methods.similarity import most_similar
from neuromas.compare.methods.untrained import Untrained
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Task
from neuromas.types import Example

STEP_BY_STEP = "Think step by step, then answer."


def direct(example: Example, task: Task) -> Conversation:
    """Ask once; the model reads the question and the answer format."""
    (text,) = yield [Call("answer", example.answer_format)]
    return text


def chain_of_thought(example: Example, task: Task) -> Conversation:
    """Ask once for steps and an answer (Wei et al. 2022; zero-shot form: Kojima et al. 2022, arXiv 2205.11916).

    Differs: no worked examples (Wei), and no second call that extracts the answer (Kojima): the format sentence does it.
    """
    (text,) = yield [Call("answer", lines(STEP_BY_STEP, example.answer_format), works_first=True)]
    return text


def self_consistency(example: Example, task: Task, *, samples: int) -> Conversation:
    """Sample chains of thought and return the majority answer (Wang et al. 2023, arXiv 2203.11171).

    Differs: zero-shot chains; as many samples as the compared network makes calls, where the paper has up to 40.
    """
    text = lines(STEP_BY_STEP, example.answer_format)
    texts = yield [Call(f"sample/{index}", text, works_first=True) for index in range(samples)]
    return texts[majority_vote(texts, task.parse_answer)]


def more_agents(example: Example, task: Task, *, samples: int) -> Conversation:
    """Sample answers and return the majority answer, or the program most like the others (Li et al. 2024, arXiv 2402.05120).

    Differs: 10 samples, where the paper goes to 40; no tests shown in a question are used to drop programs beforehand.
    """
    texts = yield [Call(f"sample/{index}", example.answer_format) for index in range(samples)]
    if task.verifier == "python":
        return texts[most_similar(texts)]
    return texts[majority_vote(texts, task.parse_answer)]


METHODS = (
    Untrained(
        name="direct",
        title="Direct prompting",
        source="one greedy call (arXiv 2605.16757, table 1)",
        conversation=direct,
    ),
    Untrained(
        name="chain_of_thought",
        title="Chain of thought",
        source="Wei et al. 2022, arXiv 2201.11903; zero-shot: Kojima et al. 2022, arXiv 2205.11916",
        conversation=chain_of_thought,
    ),
    *(
        Untrained(
            name="self_consistency" if samples == 3 else f"self_consistency_{samples}",
            title=f"Self-consistency@{samples}",
            source="Wang et al. 2023, arXiv 2203.11171",
            conversation=self_consistency,
            settings={"samples": samples},
            temperature=0.7,
        )
        for samples in (3, 5, 7)
    ),
    Untrained(
        name="more_agents",
        title="More agents (vote)",
        source="Li et al. 2024, More Agents Is All You Need, arXiv 2402.05120; repository AgentForest",
        conversation=more_agents,
        settings={"samples": 10},
        temperature=1.0,
    ),
)

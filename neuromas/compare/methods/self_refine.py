"""Self-Refine: answer, criticise and rewrite until the model calls it correct (Madaan et al. 2023, arXiv 2303.17651)."""

from neuromas.compare.methods.conversation import Call, Conversation, lines, listing
from neuromas.compare.methods.statements import stated
from neuromas.compare.methods.untrained import Untrained
from neuromas.tasks import Task
from neuromas.types import Example

ENOUGH = "it is correct"


def self_refine(example: Example, task: Task, *, attempts: int) -> Conversation:
    """Answer; then up to `attempts` times one call reads all answers so far, judges the last one and rewrites it.

    A judgement that states "it is correct" ends the loop and keeps the answer that it judged, as in the repository's GSM code.
    Differs: "I do not think it is correct" and a repeated "if it is correct" do not end it; greedy throughout, where the
    repository samples feedback at 0.7; no worked examples.
    """
    (text,) = yield [Call("answer", example.answer_format)]
    answers = [text]
    for attempt in range(attempts):
        (text,) = yield [
            Call(
                f"refine/{attempt}",
                lines(
                    listing("Answers so far:", answers),
                    f'If the last one is correct, write "{ENOUGH}". If not, say what is wrong and write a better one.',
                    example.answer_format,
                ),
                works_first=True,
            )
        ]
        if stated(text, ENOUGH):
            break
        answers.append(text)
    return answers[-1]


SOURCE = "Madaan et al. 2023, arXiv 2303.17651; repository madaan/self-refine (GSM)"
METHODS = (
    Untrained(name="self_refine", title="Self-Refine", source=SOURCE, conversation=self_refine, settings={"attempts": 4}),
    Untrained(
        name="self_refine_once",
        title="Self-Refine (2 calls)",
        source=f"{SOURCE}; two calls as in arXiv 2605.16757, table 1",
        conversation=self_refine,
        settings={"attempts": 1},
    ),
)

"""The hand-written workflow of semantic roles that arXiv 2605.16757 argues against: planner, solver, critic, judge."""

from neuromas.compare.methods.conversation import Call, Conversation, lines
from neuromas.compare.methods.untrained import Untrained
from neuromas.tasks import Task
from neuromas.types import Example


def pipeline(example: Example, task: Task) -> Conversation:
    """Let a planner plan, a solver follow the plan, a critic examine the solution, and a judge answer, one call each.

    No published code is followed: AutoGen, MetaGPT and ChatDev are frameworks for such workflows, not one algorithm.
    """
    (plan,) = yield [Call("planner", "You are a planner. Write a short plan to answer the question. Do not answer it.")]
    (solution,) = yield [
        Call(
            "solver",
            lines("You are a solver. Follow the plan.", f"Plan: {plan.strip()}", example.answer_format),
            works_first=True,
        )
    ]
    (critique,) = yield [
        Call(
            "critic",
            lines(
                "You are a critic. Say what is wrong with the solution, if anything.",
                f"Plan: {plan.strip()}",
                f"Solution: {solution.strip()}",
            ),
        )
    ]
    (answer,) = yield [
        Call(
            "judge",
            lines(
                "You are a judge. Weigh the solution and the critique and give the final answer.",
                f"Solution: {solution.strip()}",
                f"Critique: {critique.strip()}",
                example.answer_format,
            ),
        )
    ]
    return answer


METHODS = (
    Untrained(
        name="pipeline",
        title="Planner-solver-critic-judge",
        source="semantic-role workflow that arXiv 2605.16757 argues against; written here",
        conversation=pipeline,
    ),
)

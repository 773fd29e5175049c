"""MacNet: agents with roles on the nodes and edges of a directed graph (Qian et al. 2024, arXiv 2406.07155)."""

from neuromas.compare.methods.conversation import Call, Conversation, lines, listing
from neuromas.compare.methods.untrained import Untrained
from neuromas.graph.topology import Topology
from neuromas.tasks import Task
from neuromas.types import Example

ROLES = ("a mathematician", "a logician", "a programmer", "a careful reader", "an editor", "a teacher", "a scientist")
"""Profiles that the actors get in turn; the source draws them from a pool that a model wrote."""
CRITIC = "You are a critic."


def macnet(example: Example, task: Task, *, width: int, depth: int) -> Conversation:
    """Pass an answer through `depth` layers of `width` actors and a last actor, fully connected (the source's `mlp`).

    The first actors answer. On each edge a critic reads the sender's answer and gives an instruction, and the actor at the end
    of the edge revises the answer by it; an actor with several edges then merges its revisions. Only answers are passed on.
    Differs: greedy, where the source merges at a temperature that falls with depth; five actors instead of 16 and more.
    """
    graph = Topology.layered([width] * depth + [1])
    role = {node: f"You are {ROLES[(node - 1) % len(ROLES)]}." for node in graph.nodes}
    answers: dict[int, str] = {}
    for layer in range(1, graph.depth + 1):
        actors = [node for node in graph.nodes if graph.layer(node) == layer]
        edges = [(sender, node) for node in actors for sender in graph.senders(node)]
        if not edges:
            texts = yield [Call(f"actor/{node}", lines(role[node], example.answer_format)) for node in actors]
            answers |= dict(zip(actors, texts, strict=True))
            continue
        instructions = yield [
            Call(
                f"critic/{sender}-{node}",
                lines(CRITIC, f"An answer: {answers[sender].strip()}", "Write one instruction that would improve it."),
            )
            for sender, node in edges
        ]
        revisions = yield [
            Call(
                f"actor/{sender}-{node}",
                lines(
                    role[node],
                    f"An answer: {answers[sender].strip()}",
                    f"Instruction: {instruction.strip()}",
                    "Revise the answer by the instruction.",
                    example.answer_format,
                ),
            )
            for (sender, node), instruction in zip(edges, instructions, strict=True)
        ]
        inbox = {node: [text for edge, text in zip(edges, revisions, strict=True) if edge[1] == node] for node in actors}
        several = [node for node in actors if len(inbox[node]) > 1]
        merged = yield [
            Call(
                f"merge/{node}",
                lines(role[node], listing("Answers:", inbox[node]), "Merge them into one.", example.answer_format),
            )
            for node in several
        ]
        answers |= {node: inbox[node][0] for node in actors} | dict(zip(several, merged, strict=True))
    return answers[graph.output_node]


METHODS = (
    Untrained(
        name="macnet",
        title="MacNet (DAG with roles)",
        source="Qian et al. 2024, arXiv 2406.07155; repository ChatDev, branch macnet",
        conversation=macnet,
        settings={"width": 2, "depth": 2},
    ),
)

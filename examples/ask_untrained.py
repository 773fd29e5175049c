"""What an untrained team says: every message on its edge, and where the answer goes wrong.

    python examples/ask_untrained.py

Takes 12 seconds of one CPU core.
Prints nine questions that the untrained team gets wrong, and `11 of 20 right; a constant answer gets 50%`: the messages follow
the moves, and the last node guesses instead of going on from what it reads.
"""

from neuromas import Backbone, Network, Topology
from neuromas.tasks import get_task

task = get_task("navigate")
network = Network(Topology.layered([1, 1, 1]), Backbone.load("bundled"))
right = 0
for example in task.examples("test", 20):
    rollout = network.ask(example.question, answer_format=example.answer_format)
    answer = task.parse_answer(rollout.answer)
    right += answer == example.answer
    if answer != example.answer:
        print(f"\n{example.question}")
        for completion in rollout.completions:
            print(f"  node {completion.node}: {completion.text}")
        print(f"  {answer}, right is {example.answer}")
print(f"\n{right} of 20 right; a constant answer gets {task.floor(task.examples('test', 20))[1]:.0%}")

"""`central_critic`: one critic values the joint history; nodes of a turn share its TD error (CoLLM-CC, arXiv 2601.21972).

    advantage of a text of turn t = V(h_t+1) - V(h_t)        in the last turn  r - V(h_t)

A turn is a layer; h_t is the question with all texts of earlier layers. There is no reward before the end and no discount.
Agents side by side have one turn: h_1 is the question, and each gets r - V(question), without bias. With several layers the
TD error is biased as far as V is wrong. Differs: V is a value head on the frozen backbone's states (`critic.py`), not a
language model of its own, and it learns the terminal reward, not V(h_t+1); advantages are not normalized; one update on each
step's rollouts.
"""

from neuromas.training.credit.step import Step
from neuromas.training.reinforce import Advantage, Credits
from neuromas.types import Completion, Prompt, Rollout


def central_critic(step: Step) -> Credits:
    turns = [step.topology_of(group) for group in step.groups for _ in group]
    rollouts = [rollout for group in step.groups for rollout in group]
    rewards = step.rewards_PG.flatten().tolist()
    prompts, targets = list[Prompt](), list[float]()
    for topology, rollout, reward in zip(turns, rollouts, rewards, strict=True):
        for turn in range(1, topology.depth + 1):
            before = [completion for completion in rollout.completions if topology.layer(completion.node) < turn]
            prompts.append(_history(step, rollout, before))
            targets.append(reward)
    values = iter(step.value_prompts(prompts, rewards=targets))
    texts: list[tuple[Completion, Advantage]] = []
    for topology, rollout, reward in zip(turns, rollouts, rewards, strict=True):
        reached = [*(next(values) for _ in range(topology.depth)), reward]
        layers = [topology.layer(completion.node) for completion in rollout.completions]
        texts += [(c, reached[t] - reached[t - 1]) for c, t in zip(rollout.completions, layers, strict=True)]
    return Credits(tuple(texts), len(rollouts))


def _history(step: Step, rollout: Rollout, written: list[Completion]) -> Prompt:
    """Return the question with these texts as messages; the oldest tokens go where the backbone cannot read all."""
    network = step.network
    lines = "\n".join(network.wording.message.format(sender=c.node, text=c.text) for c in written)
    prompt = network.policy.prompt(rollout.example.question, lines)
    # One place is the state's own.
    room = (network.backbone.max_tokens or len(prompt.suffix_ids) + len(prompt.prefix_ids) + 1) - len(prompt.prefix_ids) - 1
    return Prompt(prompt.prefix_ids, prompt.suffix_ids[-room:])

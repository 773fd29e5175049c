"""Every number that a training step logs, by name; the last part of a name says how rows were reduced."""

import re
from collections.abc import Sequence

from torch import Tensor

from neuromas.graph.messages import drops_text
from neuromas.tasks import Task
from neuromas.training.ledger import spending
from neuromas.training.reinforce import Credits
from neuromas.training.watch import GroupAnswers, mixed_share, top_answer
from neuromas.types import Group, MessageStatus, Rollout

METRICS = {
    "reward/mean": "Mean terminal reward of the step's rollouts.",
    "answer_parsed/frac": "Share of rollouts whose answer the task could read.",
    "top_answer/frac": "Share of the most frequent answer among those that the task could read.",
    "mixed_groups/frac": "Share of questions whose rollouts have different rewards; the others do not tell right from wrong.",
    "signal/frac": "Share of the output node's texts with an advantage other than 0; the rest teach it nothing.",
    "message_fault/frac": "Share of messages that were missing, empty or without a `TO node k:` header.",
    "message_fault/missing/frac": "Share of messages whose sender addressed others, not this recipient.",
    "message_fault/unaddressed/frac": "Share of messages whose sender addressed no node: the whole text is delivered.",
    "message_fault/empty/frac": "Share of messages without any text.",
    "dropped_text/frac": "Share of hidden nodes' completions with a part that no recipient gets.",
    "truncated/frac": "Share of completions cut off at --max-new-tokens.",
    "sampled_tokens/sum": "Tokens that all nodes wrote in the step, replays included.",
    "replay_tokens/sum": "Those of replays alone; with a credit scheme that has them.",
    "completion_tokens/mean": "Mean sampled tokens of a completion, stop token included.",
    "completion_tokens/node/<k>/mean": "The same for node k.",
    "logprob/mean": "Mean log-probability of a sampled token; towards 0 the nodes stop exploring.",
    "kl/mean": "Mean over sampled tokens of log p - log p_bare, an estimate of the divergence; with --kl-coef.",
    "critic_error/mean": "Mean squared error of the critic's values before it learns; with a credit scheme that has a critic.",
    "entropy/mean": "Mean entropy, in nats, of the distributions that tokens were sampled from; with --entropy-coef.",
    "grad_norm/node/<k>/max": "Norm of node k's gradient before clipping.",
    "logprob_gap/max": "Largest difference between a token's log-probability as sampled and as recomputed by the learner; "
    "in a step that learns from any text.",
    "importance_weight/max": "Largest ratio of a token's probabilities under learner and sampler, in bfloat16 or with "
    "--engine.mismatch weight. The update weighs each token by its ratio, but by 2 at most: above 2, it was cut.",
    "loss/mean": "The surrogate loss; its value means little, its gradient is the estimator.",
    "lr/value": "Learning rate of the step.",
    "questions/sum": "Questions of the step; it varies with --step-tokens.",
    "open_groups/frac": "Share of questions whose rollouts ran through the grown network; the others ran through its parent.",
    "open_probability/value": "Probability of that in this step.",
    "sampled_tokens_per_second/mean": "Sampled tokens over the step's whole time, update included.",
    "seconds/rollout/sum": "Time the step spent on sampling.",
    "seconds/replay/sum": "Time the step spent on sampling replays; with a credit scheme that has them.",
    "seconds/update/sum": "Time the step spent on credit, the gradient and the optimizer.",
    "finetuning_steps/sum": "Gradient steps of an iteration of finetuning.",
    "kept/first_answers/sum": "First answers in the sets of generation agents.",
    "kept/corrections/sum": "Dialogues of critics in which a first answer that did not agree became one that does.",
    "kept/keeps/sum": "Dialogues of critics in which an answer that agreed was kept, as far as they were drawn.",
    "kept/right/frac": "Share of the texts in all sets that are right by the task's reward, which did not choose them.",
    "nll/first/mean": "Mean -log p of a token of a set in the first gradient step of an iteration, mean over adapters.",
    "nll/last/mean": "The same in the last one.",
    "validation/accuracy/mean": "Accuracy on the validation problems: greedy, and of a society by debate and vote.",
    "validation/low/value": "Lower end of its 95% interval.",
    "validation/high/value": "Upper end of its 95% interval.",
    "validation/floor/value": "Accuracy of the best constant answer on the same problems.",
    "validation/first_answers/accuracy/mean": "Accuracy of the society's first answers there, of each agent alone.",
    "validation/consensus/mean": "Probability that two agents give the same answer in the last round.",
    "validation/different_texts/frac": "Probability that two right first answers to a question are different texts.",
    "validation/distinct_bigrams/mean": "Distinct bigrams over all bigrams of two right first answers to a question.",
    "validation/nll_own/mean": "Mean -log p of a token of an agent's first answer, under that agent.",
    "validation/nll_other/mean": "The same under the other agents.",
}


def metrics_page() -> str:
    """Return docs/metrics.md; `python -m neuromas.training.metrics > docs/metrics.md` writes it."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in METRICS.items()]
    head = [
        "# Metrics",
        "",
        "What a training step writes to `metrics.jsonl`, one JSON object a line, with `step` (counted from 0). The last",
        "part of a name says how rows were reduced. This page is generated:",
        "`python -m neuromas.training.metrics > docs/metrics.md`.",
        "",
        "| name | meaning |",
        "| --- | --- |",
    ]
    return "\n".join([*head, *rows, ""])


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for a name that METRICS does not explain."""
    for name in names:
        if re.sub(r"/node/\d+/", "/node/<k>/", name) not in METRICS:
            raise ValueError(f"metric {name!r} is not in METRICS; describe it there before logging it")


def well_formed(task: Task, rollout: Rollout) -> float:
    """Return the share of a rollout's messages, the answer among them, that arrived as they should or could be read."""
    sent = [message.status is MessageStatus.OK for c in rollout.completions for message in c.messages]
    return (sum(sent) + (task.parse_answer(rollout.answer) is not None)) / (len(sent) + 1)


def own_form(task: Task, rollout: Rollout, node: int) -> float:
    """Return the share of a node's own messages that arrived as they should; of an answer, whether it can be read.

    0 for a node that has not written in this rollout.
    """
    completion = next((c for c in rollout.completions if c.node == node), None)
    if completion is None:
        return 0.0
    if not completion.messages:
        return float(task.parse_answer(completion.text) is not None)
    return sum(m.status is MessageStatus.OK for m in completion.messages) / len(completion.messages)


def rollout_metrics(
    questions: Sequence[GroupAnswers], groups: Sequence[Group], rewards_PG: Tensor, credits: Credits, output: int
) -> dict[str, float]:
    """Return what a step's rollouts and their credits tell; `output` is the network's output node."""
    rollouts = [rollout for group in groups for rollout in group]
    completions = [completion for rollout in rollouts for completion in rollout.completions]
    statuses = [message.status for completion in completions for message in completion.messages]
    spent, replayed = spending(groups), spending((), credits.replays)

    def share(status: MessageStatus) -> float:
        return sum(s is status for s in statuses) / max(1, len(statuses))

    hidden = [c for c in completions if c.messages]
    dropped = [c for c in hidden if not c.begins and drops_text(c.text, [message.recipient for message in c.messages])]
    metrics = {
        "reward/mean": rewards_PG.mean().item(),
        "answer_parsed/frac": sum(each.answers.total() for each in questions) / len(rollouts),
        "top_answer/frac": top_answer(questions)[1],
        "mixed_groups/frac": mixed_share([each.rewards for each in questions]),
        "signal/frac": credits.signal(output),
        "message_fault/frac": 1 - share(MessageStatus.OK) if statuses else 0.0,
        "message_fault/missing/frac": share(MessageStatus.MISSING),
        "message_fault/unaddressed/frac": share(MessageStatus.UNADDRESSED),
        "message_fault/empty/frac": share(MessageStatus.EMPTY),
        "dropped_text/frac": len(dropped) / max(1, len(hidden)),
        "truncated/frac": sum(not c.sample.stopped for c in completions) / len(completions),
        "sampled_tokens/sum": spent.sampled_tokens + replayed.sampled_tokens,
        "completion_tokens/mean": spent.sampled_tokens / spent.calls,
        "logprob/mean": sum(sum(c.sample.logprobs) for c in completions) / max(1, spent.sampled_tokens),
    }
    for node in dict.fromkeys(c.node for c in completions):
        lengths = [len(c.sample.logprobs) for c in completions if c.node == node]
        metrics[f"completion_tokens/node/{node}/mean"] = sum(lengths) / len(lengths)
    return metrics


if __name__ == "__main__":
    print(metrics_page(), end="")

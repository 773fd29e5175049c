"""Untrained methods on a scripted engine: each makes its published calls, in order, and reads what it should.

1. A conversation's calls are (key, text); a text is what the model reads after the question.
2. Conversations do not wait for each other, and sampling depends on (seed, example, key) alone.
3. Calls, prompt tokens and sampled tokens are those of the calls that were made.
4. What answers was asked for in the task's answer format.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from paths import DOCS

from neuromas import Backbone
from neuromas.compare.methods import METHODS
from neuromas.compare.methods.conversation import Answered, Call, Conversation
from neuromas.compare.methods.converse import answers_of, converse
from neuromas.compare.methods.gptswarm import (
    FINAL,
    EdgeLearner,
    GPTSwarm,
    draw_graph,
    likely_graph,
    possible_edges,
    swarm,
)
from neuromas.compare.methods.networks import Trained
from neuromas.compare.methods.self_check import read_verdict, split_steps
from neuromas.compare.methods.similarity import bleu, most_similar
from neuromas.compare.methods.tree_of_thoughts import VALUES, read_value
from neuromas.compare.methods.untrained import Untrained
from neuromas.config import PromptConfig, TrainConfig
from neuromas.graph.wording import WORDINGS
from neuromas.model.policy import Policy
from neuromas.rollout.engine import Engine, OnSample
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.rollout.voting import majority_vote
from neuromas.tasks import Navigate, Task
from neuromas.types import Example, Request, Sample

TASK = Navigate()
FORMAT = TASK.answer_format
EXAMPLES = [Example(name, f"Question {name}?", "Yes", FORMAT) for name in ("a", "b")]
PAGE = DOCS / "methods.md"
YES, NO, NOTHING = "Answer: Yes", "Answer: No", "hm"

Script = Callable[[str, str], str]
"""Returns the text that a call of (key, text) writes."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Return a policy of which only the tokenizer is used: a scripted engine writes the texts."""
    return Policy(Backbone.tiny(0))


@dataclass
class Held:
    """A conversation that was held: its calls in order, by key, and its answer."""

    calls: dict[str, str] = field(default_factory=dict)
    answered: Answered = field(default_factory=lambda: Answered(EXAMPLES[0]))

    @property
    def keys(self) -> list[str]:
        return list(self.calls)


Hold = Callable[..., Held]


@pytest.fixture
def hold(policy: Policy) -> Hold:
    """Return a function that holds a method's conversation about the first example."""

    def hold(name: str, script: Script, *, task: Task = TASK, **settings: object) -> Held:
        method = METHODS[name]
        assert isinstance(method, Untrained)
        held = Held()

        def say(request: Request) -> str:
            key = str(request.seed[-1])
            # What follows the text is the chat template's.
            held.calls[key] = policy.backbone.detokenize(request.prompt.suffix_ids).removesuffix(footer)
            return script(key, held.calls[key])

        footer = policy.backbone.detokenize(policy.prompt("", "").suffix_ids)
        conversation = method.conversation(EXAMPLES[0], task, **{**method.settings, **settings})
        (held.answered,) = run([(EXAMPLES[0], conversation)], policy, ScriptedEngine(say))
        return held

    return hold


def run(
    conversations: Sequence[tuple[Example, Conversation]], policy: Policy, engine: Engine, wording: str = "terse"
) -> list[Answered]:
    return converse(conversations, policy, engine, WORDINGS[wording], seed=("evaluate", 0), temperature=1.0, max_new_tokens=9)


def in_turn(*texts: str) -> Script:
    """Return a script that says these texts one after the other, whatever is asked."""
    waiting = iter(texts)
    return lambda key, text: next(waiting)


def by_key(texts: dict[str, str], otherwise: str = NOTHING) -> Script:
    return lambda key, text: texts.get(key, otherwise)


# The driver


def two_rounds(example: Example, task: Task) -> Conversation:
    first = yield [Call("x", "one"), Call("y", "two")]
    assert (yield []) == []
    (last,) = yield [Call("z", "+".join(first))]
    return f"{last}!"


def test_calls_tokens_and_answer_are_those_of_the_calls_made(policy: Policy) -> None:
    engine = ScriptedEngine(lambda request: f"<{request.seed[-1]}>")
    (answered,) = run([(EXAMPLES[0], two_rounds(EXAMPLES[0], TASK))], policy, engine)
    assert [request.seed for request in engine.requests] == [("evaluate", 0, "a", key) for key in "xyz"]
    prompts = [policy.prompt("Question a?", text) for text in ("one", "two", "<x>+<y>")]
    assert [request.prompt for request in engine.requests] == prompts
    assert answered.text == "<z>!"
    assert answered.calls == 3
    assert answered.prompt_tokens == sum(len(p.prefix_ids) + len(p.suffix_ids) for p in prompts)
    # The scripted engine counts a token for each byte, and <x>, <y>, <z> have three.
    assert answered.sampled_tokens == 9


class NewestFirst:
    """An engine that answers the newest request first."""

    def __init__(self) -> None:
        self.answered: list[tuple[int | str, ...]] = []

    def generate(
        self, requests: Sequence[tuple[int, Request]], on_sample: OnSample, *, temperature: float, max_new_tokens: int
    ) -> None:
        waiting = list(requests)
        while waiting:
            key, request = waiting.pop()
            self.answered.append(request.seed[2:])
            text = f"<{request.seed[-1]}>"
            waiting.extend(on_sample(key, Sample((1, 2, 3), (0.0,) * 3, (text,), stopped=True, adapter_version=0)))


def test_no_conversation_waits_for_another(policy: Policy) -> None:
    engine = NewestFirst()
    answered = run([(e, two_rounds(e, TASK)) for e in EXAMPLES], policy, engine)
    assert engine.answered == [("b", "y"), ("b", "x"), ("b", "z"), ("a", "y"), ("a", "x"), ("a", "z")]
    assert [(each.example.id, each.text, each.calls, each.sampled_tokens) for each in answered] == [
        ("a", "<z>!", 3, 9),
        ("b", "<z>!", 3, 9),
    ]


def test_two_calls_of_one_name_are_our_error(policy: Policy) -> None:
    def twins(example: Example, task: Task) -> Conversation:
        (text, _) = yield [Call("x", ""), Call("x", "")]
        return text

    with pytest.raises(AssertionError, match="two calls are named 'x': their samples would be the same"):
        run([(EXAMPLES[0], twins(EXAMPLES[0], TASK))], policy, NewestFirst())


def test_a_prompt_that_leaves_no_room_is_said(policy: Policy) -> None:
    def long(example: Example, task: Task) -> Conversation:
        (text,) = yield [Call("long", "x " * policy.backbone.model.config.max_position_embeddings)]
        return text

    with pytest.raises(
        ValueError, match=r"call long reads \d+ tokens and may write --max-new-tokens 9, the backbone reads \d+"
    ):
        run([(EXAMPLES[0], long(EXAMPLES[0], TASK))], policy, NewestFirst())


def test_an_answer_is_begun_as_an_output_nodes_is(policy: Policy) -> None:
    def ask(example: Example, task: Task) -> Conversation:
        (hint,) = yield [Call("hint", "Give a hint.")]
        (first,) = yield [Call("now", f"{hint}\n{example.answer_format}")]
        (last,) = yield [Call("then", f"{first}\nThink.\n{example.answer_format}", works_first=True)]
        return last

    engine = ScriptedEngine(lambda request: f"<{request.seed[-1]}>")
    (answered,) = run([(EXAMPLES[0], ask(EXAMPLES[0], TASK))], policy, engine, "chat")
    hint, now, then = engine.requests
    assert [bool(request.headers) for request in engine.requests] == [False, False, True]
    begun = policy.backbone.tokenize("Answer:")
    assert hint.prompt == policy.prompt("Question a?", "Give a hint.")
    assert now.prompt.suffix_ids == (*policy.prompt("Question a?", f"<hint>\n{FORMAT}").suffix_ids, *begun)
    assert then.prompt == policy.prompt("Question a?", f"Answer:<now>\nThink.\n{FORMAT}")
    assert then.headers == ((*policy.frame.separator, *begun),)
    assert answered.text == "<then>\nAnswer:<then>"
    # Where a program is asked for, and with the bundled backbone's wording, nothing is begun.
    code = Example("c", "Question c?", "", "Write the program.")
    for example, wording in ((code, "chat"), (EXAMPLES[0], "terse")):
        (plain,) = run([(example, ask(example, TASK))], policy, engine, wording)
        assert plain.text == "<then>"
    conversation = [(EXAMPLES[0], ask(EXAMPLES[0], TASK))]
    with pytest.raises(ValueError, match="--max-new-tokens must be at least 2 for a call that works first, got 1"):
        converse(conversation, policy, engine, WORDINGS["chat"], seed=(0,), temperature=0.0, max_new_tokens=1)


def test_an_untrained_method_is_told_of_the_answer_what_an_output_node_is(policy: Policy) -> None:
    def ask(example: Example, task: Task) -> Conversation:
        yield [Call("now", f"Hello.\n{example.answer_format}")]
        (last,) = yield [Call("hint", "Give a hint.")]
        return last

    engine = ScriptedEngine(lambda request: "-")
    wording = PromptConfig(wording="chat", answer="A letter alone.").build()
    converse([(EXAMPLES[0], ask(EXAMPLES[0], TASK))], policy, engine, wording, seed=(0,), temperature=0.0, max_new_tokens=9)
    begun = policy.prompt("Question a?", "Hello.\nA letter alone.", begins=("Answer:",))
    assert [request.prompt for request in engine.requests] == [begun, policy.prompt("Question a?", "Give a hint.")]


def test_what_only_ends_in_a_copied_answer_format_asks_for_no_answer(policy: Policy) -> None:
    copied = f"Solution: I will. {FORMAT}"

    def judge(example: Example, task: Task) -> Conversation:
        (last,) = yield [Call("critic", f"Say what is wrong.\n{copied}")]
        return last

    engine = ScriptedEngine(lambda request: "-")
    wording = PromptConfig(wording="chat", answer="A letter alone.").build()
    converse([(EXAMPLES[0], judge(EXAMPLES[0], TASK))], policy, engine, wording, seed=(0,), temperature=0.0, max_new_tokens=9)
    assert [request.prompt for request in engine.requests] == [policy.prompt("Question a?", f"Say what is wrong.\n{copied}")]
    # A task without an answer format has no call that ends in one.
    plain, requests = Example("p", "Question p?", "", ""), len(engine.requests)
    conversation = judge(plain, TASK)
    converse([(plain, conversation)], policy, engine, wording, seed=(0,), temperature=0.0, max_new_tokens=9)
    (request,) = engine.requests[requests:]
    assert request.prompt == policy.prompt("Question p?", f"Say what is wrong.\n{copied}")


def test_given_tokens_are_read_and_not_written(tiny_backbone: Backbone) -> None:
    policy = Policy(tiny_backbone)
    conversation = METHODS["chain_of_thought"].conversation(EXAMPLES[0], TASK)  # type: ignore[union-attr]  # untrained
    (answered,) = run([(EXAMPLES[0], conversation)], policy, TorchEngine(policy), "chat")
    text = f"Think step by step, then answer.\n{FORMAT}"
    prompt, (header,) = policy.prompt("Question a?", text), policy.later_headers(("", "Answer:"))
    given = answered.prompt_tokens - len(prompt.prefix_ids) - len(prompt.suffix_ids)
    assert given in (len(header), len(header) + len(policy.frame.end))
    assert (answered.calls, answered.sampled_tokens <= 9, "\nAnswer:" in answered.text) == (1, True, True)


def test_an_answer_is_checked_and_returned_with_its_cost() -> None:
    right, wrong, silent = (Answered(EXAMPLES[0], text, 2, 30, 4) for text in (YES, NO, NOTHING))
    answers = answers_of(TASK, [right, wrong, silent])
    assert [(a.given, a.reward) for a in answers] == [("Yes", 1.0), ("No", 0.0), (None, 0.0)]
    assert {(a.example, a.gold, a.calls, a.prompt_tokens, a.sampled_tokens) for a in answers} == {("a", "Yes", 2, 30, 4)}


@pytest.mark.parametrize(
    ("texts", "weights", "winner"),
    [
        ([NO, YES, YES], None, 1),
        ([NO, YES, NOTHING], None, 0),
        ([NOTHING, NO, YES, YES, NO], None, 1),
        ([NOTHING, "x"], None, 0),
        ([NO, NO, YES], [0.4, 0.5, 1.0], 2),
    ],
)
def test_an_election(texts: list[str], weights: list[float] | None, winner: int) -> None:
    assert majority_vote(texts, TASK.parse_answer, weights) == winner


# One test for each method's flow


def test_direct_asks_once_for_the_answer(hold: Hold) -> None:
    held = hold("direct", in_turn(YES))
    assert held.calls == {"answer": FORMAT}
    assert held.answered.text == YES


def test_chain_of_thought_asks_once_for_steps_and_answer(hold: Hold) -> None:
    held = hold("chain_of_thought", in_turn(YES))
    assert held.calls == {"answer": f"Think step by step, then answer.\n{FORMAT}"}
    assert held.answered.text == YES


@pytest.mark.parametrize(("name", "count"), [("self_consistency", 3), ("self_consistency_5", 5), ("self_consistency_7", 7)])
def test_self_consistency_votes_over_chains_of_thought(hold: Hold, name: str, count: int) -> None:
    held = hold(name, in_turn(NO, *[f"so {YES}"] * 2, *[NOTHING] * (count - 3)))
    assert held.calls == {f"sample/{k}": f"Think step by step, then answer.\n{FORMAT}" for k in range(count)}
    assert held.answered.text == f"so {YES}"


def test_more_agents_votes_over_plain_answers(hold: Hold) -> None:
    held = hold("more_agents", in_turn(*[NO] * 4, *[YES] * 6))
    assert held.calls == {f"sample/{k}": FORMAT for k in range(10)}
    assert held.answered.text == YES


def test_more_agents_picks_the_program_most_like_the_others(hold: Hold) -> None:
    task = Navigate()
    task.verifier = "python"
    held = hold("more_agents", in_turn("lambda: 0", "return a + b", "return a + c"), task=task, samples=3)
    assert held.answered.text == "return a + b"


def test_bleu_by_hand() -> None:
    # 1-grams 2/3; 2-grams (1 + 1) / (2 + 1); 3-grams (0 + 1) / (1 + 1); 4-grams (0 + 1) / (0 + 1); no brevity.
    assert bleu(["a", "b", "c"], ["a", "b", "d"]) == pytest.approx((2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25)
    # All precisions 1, two words for four: exp(1 - 4 / 2).
    assert bleu(["a", "b"], ["a", "b", "a", "b"]) == pytest.approx(math.exp(-1))
    assert bleu(["x"], ["a", "b"]) == bleu([], ["a"]) == 0.0
    assert most_similar(["a b", "c", "a b"]) == 0


def test_self_refine_stops_when_the_answer_is_called_correct(hold: Hold) -> None:
    held = hold("self_refine", in_turn(NO, f"Wrong. {YES}", f"It is correct. {NO}"))
    ask = 'If the last one is correct, write "it is correct". If not, say what is wrong and write a better one.'
    assert held.calls == {
        "answer": FORMAT,
        "refine/0": f"Answers so far:\n1. {NO}\n{ask}\n{FORMAT}",
        "refine/1": f"Answers so far:\n1. {NO}\n2. Wrong. {YES}\n{ask}\n{FORMAT}",
    }
    # What was judged stands, not what the judgement says.
    assert held.answered.text == f"Wrong. {YES}"


@pytest.mark.parametrize(("name", "calls"), [("self_refine", 5), ("self_refine_once", 2)])
def test_self_refine_ends_at_its_limit(hold: Hold, name: str, calls: int) -> None:
    held = hold(name, lambda key, text: f"{key} {YES}")
    assert held.answered.calls == calls
    assert held.answered.text == f"refine/{calls - 2} {YES}"


def test_debaters_read_each_others_last_answers_and_the_last_round_votes(hold: Hold) -> None:
    last = dict(zip((f"round/2/agent/{k}" for k in range(3)), (NO, YES, f"now {YES}"), strict=True))
    held = hold("debate", by_key({f"round/1/agent/{k}": f"I{k}" for k in range(3)} | last))
    assert held.keys == [f"round/{r}/agent/{k}" for r in (1, 2) for k in range(3)]
    assert {held.calls[f"round/1/agent/{k}"] for k in range(3)} == {FORMAT}
    assert held.calls["round/2/agent/1"] == (
        "Your answer: I1\nAnswers of other agents:\n1. I0\n2. I2\n"
        f"Use them as additional information and give an updated answer.\n{FORMAT}"
    )
    assert held.answered.text == YES


def test_a_mixture_reads_the_whole_layer_before_and_nothing_else(hold: Hold) -> None:
    held = hold("mixture_of_agents", lambda key, text: key)
    assert held.keys == [*(f"layer/{layer}/proposer/{k}" for layer in (1, 2) for k in range(6)), "aggregate"]
    assert {held.calls[f"layer/1/proposer/{k}"] for k in range(6)} == {FORMAT}
    for layer, reader in ((1, "layer/2/proposer/5"), (2, "aggregate")):
        read = "\n".join(f"{k + 1}. layer/{layer}/proposer/{k}" for k in range(6))
        assert held.calls[reader] == (
            f"Answers of others:\n{read}\nSome may be biased or wrong: judge them critically and merge them into one answer.\n"
            f"{FORMAT}"
        )
    assert held.answered.text == "aggregate"


def test_the_pipeline_plans_solves_criticises_and_judges(hold: Hold) -> None:
    held = hold("pipeline", lambda key, text: f"by {key}")
    assert held.keys == ["planner", "solver", "critic", "judge"]
    assert held.calls["planner"] == "You are a planner. Write a short plan to answer the question. Do not answer it."
    assert held.calls["solver"] == f"You are a solver. Follow the plan.\nPlan: by planner\n{FORMAT}"
    assert held.calls["critic"].splitlines()[1:] == ["Plan: by planner", "Solution: by solver"]
    assert held.calls["judge"].splitlines()[1:] == ["Solution: by solver", "Critique: by critic", FORMAT]
    assert held.answered.text == "by judge"


def test_macnet_criticises_on_edges_revises_and_merges(hold: Hold) -> None:
    """[2, 2, 1]: two answers; on each edge a critic and a revision; three nodes merge. 2 + 2 * 6 + 3 calls."""
    held = hold("macnet", lambda key, text: f"({key})")
    first = [f"{sender}-{node}" for node in (3, 4) for sender in (1, 2)]
    assert held.keys == [
        "actor/1", "actor/2", *(f"critic/{edge}" for edge in first), *(f"actor/{edge}" for edge in first), "merge/3", "merge/4",
        "critic/3-5", "critic/4-5", "actor/3-5", "actor/4-5", "merge/5",
    ]  # fmt: skip
    assert held.calls["actor/2"] == f"You are a logician.\n{FORMAT}"
    assert held.calls["critic/2-3"].splitlines()[:2] == ["You are a critic.", "An answer: (actor/2)"]
    assert held.calls["actor/2-3"] == (
        "You are a programmer.\nAn answer: (actor/2)\nInstruction: (critic/2-3)\nRevise the answer by the instruction.\n"
        f"{FORMAT}"
    )
    assert held.calls["merge/3"] == (
        f"You are a programmer.\nAnswers:\n1. (actor/1-3)\n2. (actor/2-3)\nMerge them into one.\n{FORMAT}"
    )
    assert held.calls["critic/3-5"].splitlines()[1] == "An answer: (merge/3)"
    assert (held.answered.text, held.answered.calls) == ("(merge/5)", 17)


def test_a_chain_of_macnet_merges_nothing(hold: Hold) -> None:
    held = hold("macnet", lambda key, text: f"({key})", width=1, depth=1)
    assert held.keys == ["actor/1", "critic/1-2", "actor/1-2"]
    assert held.answered.text == "(actor/1-2)"


def test_tree_of_thoughts_keeps_the_best_states(hold: Hold) -> None:
    """Two steps, two thoughts a state, two judgements a state, one state kept: 2 + 4 + 2 + 4 calls."""
    said = {
        "step/1/state/0/thought/0": "weak", "step/1/state/0/thought/1": "good",
        "step/1/value/0/0": "sure", "step/1/value/0/1": "impossible",  # 20.001
        "step/1/value/1/0": "not likely, sure", "step/1/value/1/1": "likely",  # 21
        "step/2/state/0/thought/0": NO, "step/2/state/0/thought/1": YES,
        "step/2/value/0/0": "perhaps", "step/2/value/0/1": "impossible",  # 0.001
        "step/2/value/1/0": "perhaps", "step/2/value/1/1": "likely",  # 1
    }  # fmt: skip
    held = hold("tree_of_thoughts", by_key(said), steps=2, samples=2, votes=2, keep=1)
    assert held.keys == list(said)
    assert held.calls["step/1/state/0/thought/1"] == "Write the next step, not yet the answer."
    judge = "Can these steps lead to the right answer? Write sure, likely or impossible."
    assert held.calls["step/1/value/1/0"] == f"Steps so far:\n1. good\n{judge}"
    assert held.calls["step/2/state/0/thought/0"] == f"Steps so far:\n1. good\n{FORMAT}"
    assert held.calls["step/2/value/1/1"] == f"Steps so far:\n1. good\n2. {YES}\n{judge}"
    assert held.answered.text == YES


def test_a_thought_that_is_there_twice_is_valued_once(hold: Hold) -> None:
    held = hold("tree_of_thoughts", by_key({}, otherwise=YES), steps=2, samples=3, votes=3, keep=2)
    assert held.answered.calls == (3 + 3) + (3 + 3)
    assert held.answered.text == YES


def test_tree_of_thoughts_by_default_makes_sixty_calls(hold: Hold) -> None:
    # 3 thoughts, 3 * 3 values; then twice 2 * 3 thoughts, 6 * 3 values.
    assert hold("tree_of_thoughts", lambda key, text: key).answered.calls == 3 + 9 + 2 * (6 + 18)


def test_self_check_goes_through_the_steps_of_each_solution(hold: Hold) -> None:
    """Solutions of two, one and one steps; the first is contradicted twice, so that two votes of three lose to the third."""
    said = {
        "solution/0": f"Step 1: go\nStep 2: {YES}", "solution/1": f"no steps, {YES}", "solution/2": f"Step 1: {NO}",
        "target/0/1": "the end", "uses/0/1": "1 and 7", "again/0/1": "nowhere",
        "compare/0/0": "It contradicts.", "compare/0/1": "It contradicts.", "compare/1/0": "It contradicts.",
        "compare/2/0": "It supports the first.",
    }  # fmt: skip
    held = hold("self_check", by_key(said), failure_weight=2.0)
    places = ("0/0", "0/1", "1/0", "2/0")
    stages = ("target", "uses", "again", "compare")
    assert held.keys == [*(f"solution/{k}" for k in range(3)), *(f"{s}/{p}" for s in stages for p in places)]
    assert held.calls["target/0/0"].startswith("Steps of a solution:\n1. go\nWhat does step 1 want")
    assert held.calls["target/0/1"] == (
        f"Steps of a solution:\n1. go\n2. {YES}\nWhat does step 2 want to find? Write one sentence."
    )
    assert held.calls["again/0/1"] == "Known:\n1. go\nFind this: the end"
    assert held.calls["again/0/0"] == f"Find this: {NOTHING}"
    assert held.calls["compare/0/1"].splitlines()[:2] == [f"First: {YES}", "Second: nowhere"]
    # Yes: 2 sigmoid(-4) + 2 sigmoid(-2) = 0.036 + 0.238; No: 2 sigmoid(0) = 1.
    assert held.answered.text == f"Step 1: {NO}"
    assert held.answered.calls == 3 + 4 * 4


def test_self_check_without_failures_is_a_plain_vote(hold: Hold) -> None:
    solutions = {"solution/0": NO, "solution/1": YES, "solution/2": YES}
    assert hold("self_check", by_key(solutions, otherwise="supports")).answered.text == YES
    # Unclear and contradicted, by the default weights: 2 sigmoid(-0.2) and 2 sigmoid(-0.5) are both above one half.
    assert hold("self_check", by_key(solutions | {"compare/1/0": "contradicts"})).answered.text == YES


def test_steps() -> None:
    assert split_steps("Well.\nStep 1: a\nb\n step 2. c") == ["a\nb", "c"]
    assert split_steps("just so") == ["just so"]


# What is denied, doubted, asked or only listed is not what a judgement says.


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Supports", 1),
        ("It is supported by the second.", 1),
        ("The second supports the first and does not contradict it.", 1),
        ("not only supports but proves it", 1),
        ("It does not contradict the first, it supports it.", 1),
        ("it does contradict, no support", -1),
        ("It does not support the first, but contradicts it.", -1),
        ("A contradiction.", -1),
        ("not related", 0),
        ("It is not directly related.", 0),
        ("It does not support the first.", 0),
        ("It doesn't support it", 0),
        ("I do not think it supports the first.", 0),
        ("It does not, in fact, support the first.", 0),
        ("Unsupported.", 0),
        ("It does not contradict the first.", 0),
        ("There is no contradiction.", 0),
        ("neither supports nor contradicts", 0),
        ("Does the second support the first?", 0),
        ("support the first, contradict it, or not directly related", 0),
        ("Supports or contradicts", 0),
        ("", 0),
    ],
)
def test_verdicts_of_self_check(text: str, verdict: int) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sure", "sure"),
        ("Sure.", "sure"),
        ("not likely, sure", "sure"),
        ("sure, not likely", "sure"),
        ("It looks hard.\nlikely", "likely"),
        ("I am not sure, but it is likely", "likely"),
        ("This cannot work: impossible", "impossible"),
        ("unsure", None),
        ("I am not sure.", None),
        ("Sure? No, not sure.", None),
        ("unlikely", None),
        ("It is not likely", None),
        ("It isn't impossible", None),
        ("surely", None),
        ("sure, likely or impossible", None),
        ("sure/likely", None),
        ("", None),
    ],
)
def test_values_of_tree_of_thoughts(text: str, word: str | None) -> None:
    assert read_value(text) == (VALUES[word] if word else 0.0)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("It is correct.", True),
        ("I checked, and it is correct", True),
        ("I do not think it is correct.", False),
        ("I doubt it is correct", False),
        ("It is not correct", False),
        ("It is correctly written, but wrong", False),
        ('If the last one is correct, write "it is correct".', False),
    ],
)
def test_self_refine_ends_when_it_is_said_to_be_correct(hold: Hold, text: str, ends: bool) -> None:
    held = hold("self_refine_once", in_turn(NO, f"{text}\n{YES}"))
    assert (held.answered.text == NO) is ends


def test_a_step_that_is_said_not_to_be_used_is_not_known(hold: Hold) -> None:
    said = {"solution/0": "Step 1: go\nStep 2: turn\nStep 3: stop", "uses/0/2": "Step 2, not step 1.", "uses/0/1": "None of 1."}
    held = hold("self_check", by_key(said), samples=1)
    assert held.calls["again/0/2"].startswith("Known:\n1. turn\nFind this")
    assert held.calls["again/0/1"].startswith("Find this")


# GPTSwarm


def hold_swarm(policy: Policy, edges: set[tuple[int, int]], script: Script) -> Held:
    held = Held()

    def say(request: Request) -> str:
        key = str(request.seed[-1])
        held.calls[key] = policy.backbone.detokenize(request.prompt.suffix_ids)
        return script(key, held.calls[key])

    conversation = swarm(EXAMPLES[0], TASK, edges=frozenset(edges), truthful=2)
    (held.answered,) = run([(EXAMPLES[0], conversation)], policy, ScriptedEngine(say))
    return held


def test_agents_of_a_swarm_read_along_edges_and_those_before_the_vote_vote(policy: Policy) -> None:
    edges = {(2, 0), (0, 1), (2, 1), (0, FINAL), (1, FINAL), (1, 3)}
    held = hold_swarm(policy, edges, by_key({"agent/2": "I lie", "agent/0": NO, "agent/1": YES}))
    # Agent 3 does not reach the vote.
    assert held.keys == ["agent/2", "agent/0", "agent/1"]
    assert held.calls["agent/2"].startswith(f"Give a wrong answer on purpose.\n{FORMAT}")
    assert held.calls["agent/0"].startswith(f"Answers of others:\n1. I lie\n{FORMAT}")
    assert held.calls["agent/1"].startswith(f"Answers of others:\n1. {NO}\n2. I lie\n{FORMAT}")
    assert held.answered.text == NO  # a tie goes to the first


def test_a_swarm_without_a_way_to_the_vote_says_nothing(policy: Policy) -> None:
    held = hold_swarm(policy, {(0, 1), (1, 2)}, by_key({}))
    assert (held.answered.text, held.answered.calls) == ("", 0)


def test_drawn_graphs_have_no_cycles_and_slopes_are_those_of_their_log_probability() -> None:
    edges = possible_edges(3)
    assert len(edges) == 3 * 2 + 3
    rng = random.Random(0)
    for _ in range(20):
        thetas = {edge: rng.uniform(-1, 1) for edge in edges}
        drawn, slopes = draw_graph(thetas, rng)
        assert not any({(a, b), (b, a)} <= drawn for a, b in itertools.combinations(range(3), 2))
        for edge, slope in slopes.items():
            p = 1 / (1 + math.exp(-thetas[edge]))
            assert slope == pytest.approx(1 - p if edge in drawn else -p)
    # 0 -> 1 -> 2 is there: 2 -> 0 would close a cycle, and is not up to chance.
    certain = dict.fromkeys(((0, 1), (1, 2), (2, 0), (2, FINAL)), 50.0)
    drawn, slopes = draw_graph(certain, rng)
    assert set(slopes) == drawn == {(0, 1), (1, 2), (2, FINAL)} == likely_graph(certain)
    assert likely_graph({(0, 1): 0.0, (0, FINAL): 0.1}) == {(0, FINAL)}


def test_edges_learn_by_reinforce_with_a_moving_average() -> None:
    learner = EdgeLearner({(0, FINAL): 0.0, (1, FINAL): 0.0}, lr=0.1)
    slopes = [{(0, FINAL): 0.5, (1, FINAL): -0.5}, {(0, FINAL): -0.5}]
    learner.update(slopes, [1.0, 0.0])
    # Average 0.5: gradients (0.5 * 0.5 + 0.5 * 0.5) / 2 and 0.5 * -0.5 / 2; Adam's first step is lr times the sign.
    assert learner.thetas == pytest.approx({(0, FINAL): 0.1, (1, FINAL): -0.1}, abs=1e-6)
    learner.update(slopes, [1.0, 1.0])
    assert learner.average == pytest.approx(0.9 * 0.5 + 0.1 * 1.0)


def test_a_swarm_learns_to_leave_its_liars_out_and_counts_what_that_took(policy: Policy) -> None:
    method = GPTSwarm(truthful=1, adversarial=2, iterations=60)

    def say(request: Request) -> str:
        text = policy.backbone.detokenize(request.prompt.suffix_ids)
        return NO if "wrong" in text else YES

    def hold(conversations: list[tuple[Example, Conversation]], seed: tuple[int | str, ...]) -> list[Answered]:
        answered.append(run(conversations, policy, ScriptedEngine(say)))
        return answered[-1]

    class AlwaysYes(Navigate):
        def training_batch(self, seed: int, step: int, count: int) -> list[Example]:
            return [Example(f"{step}/{k}", "Question?", "Yes", FORMAT) for k in range(count)]

    answered: list[list[Answered]] = []
    thetas, ledger = method.learn(AlwaysYes(), 0, hold)
    # One liar cannot outvote the first agent, two can.
    assert thetas[(0, FINAL)] > 0.5
    assert min(thetas[(1, FINAL)], thetas[(2, FINAL)]) < -0.5
    conversation = swarm(EXAMPLES[0], TASK, edges=likely_graph(thetas), truthful=1)
    assert run([(EXAMPLES[0], conversation)], policy, ScriptedEngine(say))[0].text == YES
    said = [each for batch in answered for each in batch]
    assert ledger == {
        "trainable_parameters": 9, "steps": 60, "optimizer_steps": 60, "questions": 240, "rollouts": 240,
        "calls": sum(each.calls for each in said),
        "prompt_tokens": sum(each.prompt_tokens for each in said), "sampled_tokens": sum(each.sampled_tokens for each in said),
    }  # fmt: skip


# All of them


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if isinstance(method, Untrained)])
def test_what_answers_was_asked_in_the_answer_format(hold: Hold, name: str) -> None:
    held = hold(name, lambda key, text: f"{key} says {YES}")
    key = held.answered.text.partition(" says ")[0]
    assert held.calls[key].endswith(FORMAT)
    assert TASK.parse_answer(held.answered.text) == "Yes"


def test_the_methods_of_the_page_are_methods(hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name in ("twice", "wide"):
        monkeypatch.setitem(METHODS, name, METHODS["direct"])  # taken back afterwards
    exec(compile(program, "docs/methods.md", "exec"), {})
    held = hold("twice", in_turn(NO, YES))
    assert held.calls["second"] == f"Your answer was: {NO}\nThink again.\n{FORMAT}"
    assert held.answered.text == YES
    wide = METHODS["wide"]
    assert isinstance(wide, Trained)
    assert wide.change(TrainConfig()).topology.widths == (3, 1)


def test_the_page_names_every_method() -> None:
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    named = {f"{re.sub(r'_3$', '', row[0])}{n}" if n.startswith("_") else n for row in rows for n in row}
    assert set(METHODS) <= named


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.title
    assert method.source

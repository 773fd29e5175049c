"""Given headers: a node's turn is begun for it, and a node with several recipients writes a text after each header."""

import dataclasses
from pathlib import Path

import pytest
import torch
from models import load_backbone, make_model, randomise, save_model
from transformers import AutoModelForCausalLM

from neuromas import Backbone, Network, Topology
from neuromas.config import AdapterConfig, PromptConfig, TopologyConfig
from neuromas.rollout.scripted_engine import ScriptedEngine
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.training import reinforce
from neuromas.types import Completion, Example, Group, MessageStatus

EXAMPLES = [Example(f"id{i}", "Is it even? " * (1 + i), "Yes", 'Write "Answer: Yes".') for i in range(3)]
WIDE = Topology.layered([2, 3, 1])


@pytest.fixture(scope="module")
def stops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that often ends its text."""
    return save_model(make_model("qwen3", ("Yes", "No", ":", ".")), tmp_path_factory.mktemp("wordings") / "stops")


def make_network(folder: Path, *, max_rows: int = 256, tokens: int = 14, prompt: PromptConfig | None = None) -> Network:
    network = Network(
        WIDE, load_backbone(folder), adapter=AdapterConfig(rank=2), max_new_tokens=tokens,
        prompt=prompt or PromptConfig(wording="chat"),
    )  # fmt: skip
    network.engine = TorchEngine(network.policy, max_rows)
    randomise(network.adapters)
    return network


def rollout(network: Network, group_size: int = 4) -> list[Group]:
    return network.rollout(EXAMPLES, group_size, seed=(7,))


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for rollout in group for completion in rollout.completions]


def texts_of(completion: Completion) -> list[list[int]]:
    """Return the sampled tokens of each text."""
    texts: list[list[int]] = [[]]
    for index, token in enumerate(completion.sample.token_ids):
        if index in completion.sample.given:
            texts += [[]] if texts[-1] else []
        else:
            texts[-1].append(token)
    return texts


def test_every_recipient_gets_the_text_after_its_header(stops: Path) -> None:
    network = make_network(stops)
    found = completions(rollout(network))
    for completion in found:
        recipients = WIDE.recipients(completion.node)
        assert [message.recipient for message in completion.messages] == list(recipients)
        assert len(completion.sample.texts) == max(1, len(recipients))
        for message, text in zip(completion.messages, completion.sample.texts, strict=False):
            assert message.status is (MessageStatus.OK if text.strip() else MessageStatus.EMPTY)
            assert f"TO node {message.recipient}:{text}" in completion.text
        if not recipients:
            assert completion.text == f"Answer:{completion.sample.text}"


def test_headers_are_given_tokens_and_what_is_between_them_is_sampled(stops: Path) -> None:
    network = make_network(stops)
    frame, policy = network.policy.frame, network.policy
    cut = ended = 0
    for completion in completions(rollout(network)):
        sample, begins = completion.sample, network.wording.begins(WIDE.recipients(completion.node), "Answer:")
        assert completion.prompt.suffix_ids[-len(policy.backbone.tokenize(begins[0])) :] == policy.backbone.tokenize(begins[0])
        assert len(sample.logprobs) == len(sample.token_ids) - len(sample.given) <= 14
        texts = texts_of(completion)
        expected: list[int] = []
        for text, header in zip(texts, [*policy.later_headers(begins), ()], strict=True):
            # A share is at least what is left, evenly divided.
            assert 1 <= len(text) <= 14 - sum(map(len, texts[: texts.index(text)]))
            stopped = text[-1] in frame.stop_ids
            ended, cut = ended + stopped, cut + (not stopped)
            expected += [*text, *(() if stopped or not header else frame.end), *header]
        assert list(sample.token_ids) == expected
        assert sample.stopped is all(text[-1] in frame.stop_ids for text in texts)
    assert cut > 10 < ended


def test_later_texts_are_what_the_model_says_after_the_header(stops: Path) -> None:
    network = make_network(stops)
    for parameter in network.adapters.parameters().values():
        parameter.data.zero_()
    plain = AutoModelForCausalLM.from_pretrained(stops)
    (group,) = network.rollout(EXAMPLES[:1], 1, seed=(0,), temperature=0.0)
    for completion in group[0].completions:
        ids = [*completion.prompt.prefix_ids, *completion.prompt.suffix_ids, *completion.sample.token_ids]
        first = len(ids) - len(completion.sample.token_ids)
        logits = plain(input_ids=torch.tensor([ids])).logits[0]
        for index in range(len(completion.sample.token_ids)):
            if index not in completion.sample.given:
                assert ids[first + index] == int(logits[first + index - 1].argmax())


def test_the_learner_computes_what_was_sampled_and_no_header_is_learned(stops: Path) -> None:
    network = make_network(stops)
    groups = rollout(network)
    policy, ones = network.policy, torch.ones(3, 4)
    batch = reinforce.build_batch(
        reinforce.Credits.of(groups, dict.fromkeys(WIDE.nodes, ones)),
        routing=policy.routing,
        adapter_version=0,
        temperature=1.0,
    )
    (micro_batch,) = batch.split(100_000, policy.backbone.device)
    sampled = sum(len(completion.sample.logprobs) for completion in completions(groups))
    assert len(micro_batch.rows.sampled_K) == sampled == len(micro_batch.advantages_K)
    logprobs_K = policy.logprobs(micro_batch.rows)
    assert (logprobs_K - micro_batch.sampled_logprobs_K).abs().max() < 1e-5


def test_a_row_does_not_depend_on_the_batch(stops: Path) -> None:
    whole, few = (completions(rollout(make_network(stops, max_rows=rows))) for rows in (256, 3))
    assert [c.sample.token_ids for c in whole] == [c.sample.token_ids for c in few]


def test_more_recipients_than_tokens_is_one_error(stops: Path) -> None:
    network = make_network(stops, tokens=2)
    with pytest.raises(ValueError, match="--max-new-tokens must be at least 3, the most recipients of a node, got 2"):
        network.check_lengths(EXAMPLES)
    make_network(stops, tokens=2, prompt=PromptConfig(wording="terse")).check_lengths(EXAMPLES)


def test_a_plain_text_ends_with_its_line(stops: Path) -> None:
    network = make_network(stops, prompt=PromptConfig(wording="plain"), tokens=30)
    frame, tokenizer = network.policy.frame, network.backbone.tokenizer
    assert {i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])} < frame.stop_ids
    found = completions(rollout(network))
    assert all("\n" not in text for completion in found for text in completion.sample.texts)
    assert frame.header == tuple(tokenizer(str(tokenizer.bos_token or ""))["input_ids"])


def test_auto_takes_the_wording_that_the_backbone_understands() -> None:
    config = PromptConfig()
    assert config.build(bundled=True).name == "terse"
    assert config.build(has_chat_template=True).name == "chat"
    assert config.build(has_chat_template=False).name == "plain"
    assert Network(WIDE, Backbone.tiny(0)).wording.name == "terse"


def test_a_scripted_node_writes_each_text() -> None:
    engine = ScriptedEngine(lambda request: f"text of {request.node}")
    network = Network(WIDE, Backbone.tiny(0), engine=engine, prompt=PromptConfig(wording="chat"))
    ((rollout,),) = network.rollout(EXAMPLES[:1], 1, seed=(0,))
    assert rollout.completions[0].text == "TO node 3:text of 1\nTO node 4:text of 1\nTO node 5:text of 1"
    assert rollout.answer == "Answer:text of 6"


@pytest.mark.parametrize(
    ("name", "template", "error"),
    [
        ("place", "{total} nodes", r"prompt.place may hold \{node\}, \{layer\}, got \{total\}"),
        ("message", "From {sender}", r"prompt.message must hold \{text\}, got 'From \{sender\}'"),
        ("write", "a } b", r"prompt.write: Single '\}' encountered in format string in 'a \} b'; write a brace"),
        ("place", "{node.real}", r"prompt.place may hold"),
        ("place", "{node:{total}}", r"prompt.place may hold \{node\}, \{layer\}, got \{node:\{total\}\}"),
        ("place", "{node:99999999}", r"prompt.place may hold \{node\}, \{layer\}, got \{node:99999999\}"),
        ("answer", "{node} answers", r"prompt.answer may hold \{format\}, got \{node\}"),
        ("place", "a \udcff", r"prompt.place must be UTF-8 text, got '\\udcff' in it, half a character"),
        ("begin_answer", "\ud800", r"prompt.begin_answer must be UTF-8 text, got '\\ud800' in it, half a character"),
        ("message", "{sender}: {text!r}", r"prompt.message may hold \{sender\}, \{text\}, got \{text!r\}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_error(name: str, template: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(PromptConfig(), **{name: template}).build()


def test_a_role_is_text() -> None:
    with pytest.raises(ValueError, match=r"--topology.roles must be UTF-8 text, got '\\udcff' in it"):
        TopologyConfig(widths=(1,), roles=("\udcff",)).build()


def test_an_answer_is_begun_only_as_its_format_says() -> None:
    wording = PromptConfig(wording="chat").build()
    assert wording.begins((), 'Write "Answer: Yes".') == ("Answer:",)
    assert wording.begins((), "Write the program in a ```python block.") == ()


def test_what_the_output_node_is_told_of_the_answer_is_a_setting(stops: Path) -> None:
    network = make_network(stops, prompt=PromptConfig(wording="plain", answer="Yes or no. {format}"))
    read = [network.wording.render(WIDE, node, EXAMPLES[0], []) for node in WIDE.nodes]
    assert read[-1] == f"Node 6, the output layer.\nYes or no. {EXAMPLES[0].answer_format}"
    assert not any("Yes or no" in text for text in read[:-1])
    short = PromptConfig(wording="plain", answer="Yes or no.").build()
    assert short.asks(EXAMPLES[0].answer_format) == "Yes or no."
    assert short.begins((), EXAMPLES[0].answer_format) == ("Answer:",)


def test_a_base_model_reads_a_message_of_the_form_that_its_own_begins_with() -> None:
    chain = Topology.layered([1, 1, 1])
    wording = PromptConfig(wording="plain").build()
    for node in (1, 2):
        (begin,) = wording.begins(chain.recipients(node), "")
        *_, last = wording.render(chain, node, EXAMPLES[0], []).splitlines()
        assert last.startswith(f"{begin} ")


def test_a_begin_that_no_answer_format_names_is_one_error(stops: Path) -> None:
    network = make_network(stops, prompt=PromptConfig(wording="chat", begin_answer="The answer is"))
    message = "--prompt.begin-answer 'The answer is' begins no answer: .* answer format do, which is 'Write \"Answer: Yes\"\\.'"
    with pytest.raises(ValueError, match=message):
        network.check_lengths(EXAMPLES)
    for begin in ("Answer: Yes", "Answer:", ""):
        make_network(stops, prompt=PromptConfig(wording="chat", begin_answer=begin)).check_lengths(EXAMPLES)


def test_a_long_line_for_messages_counts_as_part_of_the_prompt(stops: Path) -> None:
    network = make_network(stops, prompt=PromptConfig(wording="chat", message="Somebody " * 400 + "{sender} {text}"))
    with pytest.raises(ValueError, match="shorten one of them"):
        network.check_lengths(EXAMPLES)


def test_own_sentences_take_the_place_of_the_wordings() -> None:
    wording = PromptConfig(
        wording="chat", place="Node {node}, {layer}.", message="{sender}> {text}", write="Help {recipients}.",
        begin_messages=False, begin_answer="",
    ).build()  # fmt: skip
    assert wording.render(WIDE, 1, EXAMPLES[0], []) == "Node 1, layer 1.\nHelp node 3 and node 4 and node 5."
    assert wording.begins((3,), "Answer:") == wording.begins((), "Answer:") == ()

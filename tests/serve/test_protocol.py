"""Requests: every option is honoured or refused by its name, and every mistake names its field."""

import json
import re
from typing import Any

import pytest

from neuromas.serve.protocol import ApiError, Asked, read_request


def read(fields: dict[str, Any] | bytes, *, chat: bool = True) -> Asked:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return read_request(body, chat=chat, model="team", most_choices=4)


def said(*contents: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for content in contents]


ASK = {"model": "team", "messages": said("Is 2 even?")}


def test_a_plain_request_is_greedy_and_answered_in_one_piece() -> None:
    asked = read(ASK | {"max_tokens": None, "top_p": 1.0, "n": 1, "logprobs": False, "user": "me", "tools": []})
    assert asked == Asked(("Is 2 even?",), True, 1, 0.0, None, None, (), False, False, False)


def test_options_are_honoured() -> None:
    options = {"n": 2, "temperature": 1, "seed": -3, "max_tokens": 5, "stop": "a", "stream": True, "trace": True}
    asked = read({"prompt": ["x", "y"], "stream_options": {"include_usage": True}} | options, chat=False)
    assert asked == Asked(("x", "y"), False, 2, 1.0, -3, 5, ("a",), True, True, True)
    assert read(ASK | {"max_completion_tokens": 7, "max_tokens": 9}).max_tokens == 7


def test_the_texts_of_a_conversation_are_the_question() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [*said("Be brief.", role="system"), *said("hm", role="assistant"), *said(parts)]
    assert read({"messages": messages}).questions == ("Be brief.\n\nhm\n\none\ntwo",)
    # A single message stays as it is: its answer is that of `neuromas eval`.
    assert read({"messages": said(" q \n")}).questions == (" q \n",)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        (b"{", 400, "the body must be JSON in UTF-8"),
        (b'{"prompt": "\xff"}', 400, "the body must be JSON in UTF-8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "the body must be JSON in UTF-8"),
        (b"[" * 100_000, 400, "the body must be JSON in UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body must be JSON in UTF-8"),
        (b"[]", 400, "the body must be a JSON object"),
        (ASK | {"model": "gpt"}, 404, "the model does not exist; this server has 'team'"),
        ({}, 400, "'messages' must be a list of at least one message"),
        ({"messages": said("x", role="assistant")}, 400, "'messages' must end with a user's message"),
        ({"messages": said("  \n")}, 400, "'messages' must hold a question, got none"),
        ({"messages": said("x", role="tool")}, 400, r"'messages\[0\]' must have the role system, developer, user or assist"),
        ({"messages": ["x"]}, 400, r"'messages\[0\]' must have the role"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, 400, "does not support 'name' in a message"),
        ({"messages": said(None)}, 400, r"'messages\[0\].content' must be a text, or a list of parts of type text"),
        ({"messages": said([{"type": "image_url"}])}, 400, r"'messages\[0\].content' must be a text, or"),
        (ASK | {"n": 5}, 400, "'n' must be an integer from 1 to 4"),
        (ASK | {"n": True}, 400, "'n' must be an integer from 1 to 4"),
        (ASK | {"max_tokens": 0}, 400, "'max_tokens' must be an integer from 1 to"),
        (ASK | {"seed": 2**63}, 400, "'seed' must be an integer from"),
        (ASK | {"temperature": 1e-4}, 400, r"'temperature' must be 0 \(greedy\), or 0.001 to 2"),
        (ASK | {"temperature": float("nan")}, 400, "'temperature' must be 0"),
        (ASK | {"temperature": "hot"}, 400, "'temperature' must be 0"),
        (ASK | {"stop": ["a", ""]}, 400, "'stop' must be a text or a list of at most 16 texts, none of them empty"),
        (ASK | {"stream": 1}, 400, "'stream' must be true or false"),
        (ASK | {"stream_options": {"include_usage": True}}, 400, "'stream_options' may hold 'include_usage', with 'stream'"),
        (ASK | {"top_p": 0.5}, 400, "this server does not support 'top_p'; leave it out"),
        (ASK | {"logprobs": True}, 400, "this server does not support 'logprobs'; leave it out"),
        (ASK | {"frequency_penalty": False}, 400, "does not support 'frequency_penalty'"),
        (ASK | {"tools": [{}]}, 400, "does not support 'tools'"),
        (ASK | {"beam": 3}, 400, "does not support 'beam'"),
        (ASK | {"x" * 10_000: 3}, 400, "does not support 'x{100}'; leave it out"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any] | bytes, status: int, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        read(fields)
    assert caught.value.status == status
    assert re.search(message, caught.value.to_json()["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [[1, 2]]}, r"'prompt' must be a text or a list of texts \(token ids are not supported\)"),
        ({"prompt": []}, "'prompt' must be a text or a list of texts"),
        ({"prompt": ["a", " "]}, "'prompt' must hold a question, got none"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "'prompt' times 'n' must be at most 4 answers, got 6"),
        ({"prompt": "a", "echo": True}, "does not support 'echo'"),
        ({"prompt": "a", "max_completion_tokens": 3}, "does not support 'max_completion_tokens'"),
    ],
    ids=str,
)
def test_prompts_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError, match=message):
        read(fields, chat=False)

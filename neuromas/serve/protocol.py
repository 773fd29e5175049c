"""What an OpenAI-compatible request may say, and what is answered. An option is honoured, or refused by its name."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neuromas.config import COLDEST
from neuromas.rollout.live import cut_at
from neuromas.training.ledger import spending
from neuromas.types import Completion, Rollout

JSON = dict[str, Any]
MOST_STOPS = 16


class ApiError(Exception):
    """An error as OpenAI's interface words it."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_json(self) -> JSON:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that makes sense."""

    questions: tuple[str, ...]
    chat: bool
    choices: int
    """For each question."""
    temperature: float
    seed: int | None
    max_tokens: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    trace: bool


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none",), "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},), "best_of": (1,), "echo": (False,), "suffix": ("",), "store": (False,),
}  # fmt: skip
"""Options that are not supported, with the values that ask for nothing."""
_UNHEEDED = ("user", "metadata", "safety_identifier")
"""What says who asks, which no answer depends on."""


def read_request(body: bytes, *, chat: bool, model: str, most_choices: int) -> Asked:
    """Return what a body asks for; ApiError names the field that is wrong."""
    fields = {name: value for name, value in _json(body).items() if value is not None}
    if fields.pop("model", model) != model:
        raise ApiError(404, f"the model does not exist; this server has {model!r}", param="model", code="model_not_found")
    for name in _UNHEEDED:
        fields.pop(name, None)
    questions = (_question(fields.pop("messages", None)),) if chat else _prompts(fields.pop("prompt", None))
    choices = _integer(fields, "n", 1, most_choices) or 1
    if (answers := len(questions) * choices) > most_choices:
        raise ApiError(400, f"'prompt' times 'n' must be at most {most_choices} answers, got {answers}", param="n")
    longest = _integer(fields, "max_tokens", 1, 2**31)
    newer = _integer(fields, "max_completion_tokens", 1, 2**31) if chat else None
    stream = _flag(fields, "stream")
    options = fields.pop("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage"} or (options and not stream):
        raise ApiError(400, "'stream_options' may hold 'include_usage', with 'stream' alone", param="stream_options")
    asked = Asked(
        questions, chat, choices, _temperature(fields), _integer(fields, "seed", -(2**63), 2**63 - 1),
        newer if newer is not None else longest, _stops(fields), stream, _flag(options, "include_usage"),
        _flag(fields, "trace"),
    )  # fmt: skip
    for name, value in fields.items():
        # 1 == True, and neither is the other's neutral value.
        if not any((value, type(value) is bool) == (neutral, type(neutral) is bool) for neutral in _NEUTRAL.get(name, ())):
            raise ApiError(
                400, f"this server does not support {name[:100]!r}; leave it out", param=name[:100], code="unsupported"
            )
    return asked


def _json(body: bytes) -> JSON:
    try:
        found = json.loads(body.decode())
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body must be JSON in UTF-8", code="invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return found


def _question(messages: Any) -> str:
    """Return the question of a conversation: the texts of its messages, in order and divided by empty lines."""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "'messages' must be a list of at least one message", param="messages")
    texts = [_content(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if messages[-1]["role"] != "user":
        raise ApiError(400, "'messages' must end with a user's message", param="messages")
    return _asked("\n\n".join(texts), "messages")


def _content(message: Any, where: str) -> str:
    if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
        raise ApiError(400, f"{where!r} must have the role system, developer, user or assistant", param=where)
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:
            raise ApiError(400, f"this server does not support {name[:100]!r} in a message", param=where, code="unsupported")
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts):
        raise ApiError(400, f"'{where}.content' must be a text, or a list of parts of type text", param=where)
    return "\n".join(part["text"] for part in parts)


def _prompts(prompt: Any) -> tuple[str, ...]:
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ApiError(400, "'prompt' must be a text or a list of texts (token ids are not supported)", param="prompt")
    return tuple(_asked(text, "prompt") for text in prompts)


def _asked(text: str, param: str) -> str:
    if not text.strip():
        raise ApiError(400, f"{param!r} must hold a question, got none", param=param)
    return text


def _integer(fields: JSON, name: str, least: int, most: int) -> int | None:
    value = fields.pop(name, None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most):
        raise ApiError(400, f"{name!r} must be an integer from {least} to {most}", param=name)
    return value


def _temperature(fields: JSON) -> float:
    value = fields.pop("temperature", 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or COLDEST <= value <= 2):
        raise ApiError(400, f"'temperature' must be 0 (greedy), or {COLDEST} to 2", param="temperature")
    return float(value)


def _flag(fields: JSON, name: str) -> bool:
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name!r} must be true or false", param=name)
    return value


def _stops(fields: JSON) -> tuple[str, ...]:
    value = fields.pop("stop", [])
    stops = value if isinstance(value, list) else [value]
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, f"'stop' must be a text or a list of at most {MOST_STOPS} texts, none of them empty", param="stop")
    return tuple(stops)


def answer_of(rollout: Rollout, stop: Sequence[str]) -> tuple[str, str]:
    """Return a rollout's answer and why it ended: `stop` or `length`."""
    before = cut_at(rollout.answer, stop)
    if before is not None:
        return before, "stop"
    return rollout.answer, "stop" if rollout.completions[rollout.winner].sample.stopped else "length"


def usage_of(rollouts: tuple[Rollout, ...]) -> JSON:
    """Return the tokens that all nodes have read and written."""
    spent = spending([rollouts])
    read, written = spent.prompt_tokens, spent.sampled_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written, "calls": spent.calls}


def trace_of(completion: Completion) -> JSON:
    """Return what a node has written and sent, and what it cost."""
    return {
        "node": completion.node,
        "text": completion.text,
        "messages": [message.to_json() for message in completion.messages],
        "tokens": len(completion.sample.logprobs),
        "stopped": completion.sample.stopped,
    }

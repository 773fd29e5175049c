"""The bodies of answers: whole, or in pieces as the answer is written."""

import secrets
import time

from neuromas.rollout.live import Said, cut_at
from neuromas.serve.protocol import JSON, Asked, answer_of, trace_of, usage_of
from neuromas.types import Rollout


class Reply:
    """Words the answer to one request."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        kind = "chat.completion" if asked.chat else "text_completion"
        self._head: JSON = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if asked.chat and asked.stream else kind,
            "created": int(time.time()),
            "model": model,
        }
        self._sent: dict[tuple[int, int | None], str] = {}
        """Text that has been sent, by choice and, for messages, by node."""

    def whole(self, rollouts: tuple[Rollout, ...]) -> JSON:
        """Return the answer in one piece."""
        choices = []
        for number, rollout in enumerate(rollouts):
            text, reason = answer_of(rollout, self._asked.stop)
            said: JSON = {"message": {"role": "assistant", "content": text}} if self._asked.chat else {"text": text}
            trace = {"trace": [trace_of(completion) for completion in rollout.completions]} if self._asked.trace else {}
            choices.append({"index": number, "finish_reason": reason, "logprobs": None} | said | trace)
        return self._head | {"choices": choices, "usage": usage_of(rollouts)}

    def opening(self, number: int) -> list[JSON]:
        return [self._chunk(number, {"role": "assistant", "content": ""})] if self._asked.chat else []

    def said(self, number: int, said: Said) -> list[JSON]:
        """Return what is new in a node's text."""
        rollout, node = said.rollout, said.node
        chunks = []
        # Which of several answers wins is known at the end.
        if rollout.answers(node) and said.completion is None and rollout.answering == 1:
            chunks += self._text(number, self._safe(said.text))
        if self._asked.trace:
            written = said.text.rstrip("\ufffd") if said.completion is None else said.text
            new = self._new((number, node), written)
            if said.completion is not None:
                chunks.append(self._trace(number, trace_of(said.completion) | {"new": new}))
            elif new:
                chunks.append(self._trace(number, {"node": node, "new": new}))
        return chunks

    def closing(self, number: int, rollout: Rollout) -> list[JSON]:
        """Return the rest of an answer, and why it has ended."""
        text, reason = answer_of(rollout, self._asked.stop)
        return [*self._text(number, text), self._chunk(number, {}, reason)]

    def usage(self, rollouts: tuple[Rollout, ...]) -> list[JSON]:
        return [self._head | {"choices": [], "usage": usage_of(rollouts)}] if self._asked.include_usage else []

    def _safe(self, text: str) -> str:
        """Return as much of an unfinished answer as stays part of it: a stop may have begun, and a character may be half."""
        stops = self._asked.stop
        if (before := cut_at(text, stops)) is not None:
            return before
        text = text.rstrip("\ufffd")
        begun = ((stop, size) for stop in stops for size in range(1, min(len(stop), len(text) + 1)))
        held = max((size for stop, size in begun if text.endswith(stop[:size])), default=0)
        return text[: len(text) - held]

    def _text(self, number: int, text: str) -> list[JSON]:
        new = self._new((number, None), text)
        return [self._chunk(number, {"content": new} if self._asked.chat else new)] if new else []

    def _new(self, key: tuple[int, int | None], text: str) -> str:
        """Return what a text has beyond what has been sent of it."""
        sent = self._sent.get(key, "")
        if not text.startswith(sent):
            return ""
        self._sent[key] = text
        return text[len(sent) :]

    def _chunk(self, number: int, said: JSON | str, reason: str | None = None) -> JSON:
        text: JSON = {"delta": said} if self._asked.chat else {"text": said or ""}
        return self._head | {"choices": [{"index": number, "finish_reason": reason, "logprobs": None} | text]}

    def _trace(self, number: int, trace: JSON) -> JSON:
        return self._head | {"choices": [], "trace": {"index": number} | trace}

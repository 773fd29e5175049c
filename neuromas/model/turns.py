"""What stands around a prompt and a text: the chat template's tokens, or nothing for a model without one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "PLACEHOLDER"


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids around what a user says and what the model answers."""

    header: tuple[int, ...]
    """Before the user's text."""
    footer: tuple[int, ...]
    """After it, up to where the answer starts."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    end: tuple[int, ...]
    """What ends an answer that has not ended itself, before another answer follows."""
    separator: tuple[int, ...]
    """After that, up to where the next answer starts."""
    one_line: bool = False
    """Whether an answer ends with its line."""

    def read(self, token_ids: Sequence[int], detokenize: Callable[[Sequence[int]], str]) -> tuple[str, bool]:
        """Return the text of an answer's tokens, and whether it has ended."""
        ended = bool(token_ids) and token_ids[-1] in self.stop_ids
        if ended and self.one_line:
            # A token that ends a line may hold the last characters of its text.
            return detokenize(token_ids).partition("\n")[0], ended
        return detokenize(token_ids[:-1] if ended else token_ids), ended


def plain_frame(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], one_line: bool) -> Frame:
    """Return the frame of plain text: the begin token before it, a line break after it."""
    header, line = _encode(tokenizer, str(tokenizer.bos_token or "")), _encode(tokenizer, "\n")
    if one_line:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        stop_ids |= {token for token, text in enumerate(texts) if "\n" in text}
    return Frame(header, line, stop_ids, line, (), one_line)


def chat_frame(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], prompt_date: str) -> Frame:
    """Return the frame of the chat template; thinking is off. Another answer after an answer is a turn of its own."""
    template = _dated(tokenizer.get_chat_template(), datetime.fromisoformat(prompt_date))

    def parts(*turns: dict[str, str]) -> list[str]:
        asked: Any = list(turns)
        text = tokenizer.apply_chat_template(
            asked, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert isinstance(text, str)
        return text.split(_PLACEHOLDER)

    header, footer = parts({"role": "user", "content": _PLACEHOLDER})
    after = parts({"role": "user", "content": ""}, {"role": "assistant", "content": _PLACEHOLDER})[-1]
    between = _encode(tokenizer, after)
    # Templates end an answer by a token that stops it; the answer may have sampled that itself.
    length = 1 if between and between[0] in stop_ids else 0
    return Frame(_encode(tokenizer, header), _encode(tokenizer, footer), stop_ids, between[:length], between[length:])


def _encode(tokenizer: PreTrainedTokenizerBase, part: str) -> tuple[int, ...]:
    return tuple(tokenizer(part, add_special_tokens=False)["input_ids"])


def _dated(template: str, day: datetime) -> str:
    """Return a chat template whose clock, `strftime_now`, always gives this day.

    Otherwise a run that is resumed or evaluated on another day would have other prompts than it was trained on. The clock is a
    macro, because transformers passes no functions to templates.
    """
    if "strftime_now" not in template:
        return template
    filters = "".join(
        f" | replace({directive!r}, {day.strftime(directive)!r})"
        for letter in "aAbBcdfHIjmMpSuUwWxXyYGV"
        for directive in (f"%-{letter}", f"%{letter}")
    )
    # Jinja drops this line break after the block, so that the template itself still begins a line.
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"

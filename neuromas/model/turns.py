"""What stands around a prompt and a text: the chat template's tokens, or nothing for a model without one."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "Some text"
_TURNS = {"user": "a user's turn", "assistant": "an assistant's turn, which another text after a node's first one follows"}


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids around what a user says and what the model answers."""

    header: tuple[int, ...]
    """Before the user's text."""
    footer: tuple[int, ...]
    """After it, up to where the answer starts."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    between: Callable[[], tuple[tuple[int, ...], tuple[int, ...]]] = field(compare=False)
    """Returns `end` and `separator`; asked only where another answer follows, for a chat template may know no such turn."""
    one_line: bool = False
    """Whether an answer ends with its line."""

    @property
    def end(self) -> tuple[int, ...]:
        """What ends an answer that has not ended itself, before another answer follows."""
        return self.between()[0]

    @property
    def separator(self) -> tuple[int, ...]:
        """After that, up to where the next answer starts."""
        return self.between()[1]

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
    return Frame(header, line, stop_ids, lambda: (line, ()), one_line)


def chat_frame(tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], prompt_date: str) -> Frame:
    """Return the frame of the chat template; thinking is off. Another answer after an answer is a turn of its own.

    Raises ValueError if the template refuses a turn or changes its text.
    """

    def around(**turns: str) -> list[tuple[int, ...]]:
        """Return the tokens before and after the text of the last turn."""
        what = _TURNS[list(turns)[-1]]
        try:
            text = _applied(tokenizer, turns, prompt_date)
        except Exception as error:  # what the template raises itself, and what jinja raises for one that is none
            raise _refused(tokenizer, f"refuses {what} ({error})") from error
        if text.count(_PLACEHOLDER) != 1:
            raise _refused(tokenizer, f"does not write the text of {what} as it is")
        return [_encode(tokenizer, part) for part in text.split(_PLACEHOLDER)]

    @functools.cache
    def between() -> tuple[tuple[int, ...], tuple[int, ...]]:
        after = around(user="", assistant=_PLACEHOLDER)[1]
        # Templates end an answer by a token that stops it; the answer may have sampled that itself.
        length = 1 if after and after[0] in stop_ids else 0
        return after[:length], after[length:]

    header, footer = around(user=_PLACEHOLDER)
    return Frame(header, footer, stop_ids, between)


def _applied(tokenizer: PreTrainedTokenizerBase, turns: Mapping[str, str], prompt_date: str) -> str:
    """Return what the chat template makes of turns, up to where the next answer starts."""
    template = _dated(tokenizer.get_chat_template(), datetime.fromisoformat(prompt_date))
    asked: Any = [{"role": role, "content": content} for role, content in turns.items()]
    text = tokenizer.apply_chat_template(
        asked, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert isinstance(text, str)
    return text


def _refused(tokenizer: PreTrainedTokenizerBase, reason: str) -> ValueError:
    return ValueError(
        f"the chat template of --backbone {tokenizer.name_or_path} {reason}; take --wording plain ([prompt] wording in a file)"
    )


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

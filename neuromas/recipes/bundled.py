"""The recipe of the bundled backbone: a small BPE tokenizer and a tiny Qwen3, both from generated text alone.

    python -m neuromas.recipes.bundled --out neuromas/bundled

A training row is one question followed by several nodes' turns, each of which attends to the question and to itself only, so
the question is computed once for all of them; the rest of the row is filled with single-step cards of all families. Only the
texts that nodes write are learned.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from neuromas.recipes import skills, traces
from neuromas.recipes.card import write_card
from neuromas.tasks import get_task
from neuromas.types import Example

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CARDS = -1
STEP_EXAMPLES = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Make the bundled backbone."""

    out: Path
    """Folder for the model, the tokenizer and the card."""
    steps: int = 6000
    """Optimizer steps."""
    rows: int = 16
    """Rows of a step."""
    row_tokens: int = 512
    """Tokens of a row."""
    lr: float = 2e-3
    """Peak learning rate; it warms up over 200 steps, then falls along a cosine to a hundredth."""
    vocab_size: int = 1152
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    seed: int = 0
    card_only: bool = False
    """Measure the backbone in `out` again and rewrite its card."""
    compile: bool = False
    """Compile the model: this is a third faster on a CPU and needs a C++ compiler."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on; on an NVIDIA GPU the same recipe takes minutes."""


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on generated text; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer/{seed}")

    def texts() -> Iterator[str]:
        for family in 2000 * traces.FAMILIES:
            trace = family.draw(rng)
            example = trace.example()
            turn = skills.draw_turn(rng, trace, example)
            yield "\n\n".join((example.question, turn.prompt, "".join(piece.text for piece in turn.pieces)))

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


class Row:
    """One packed training row: a question, turns that each attend to it and to themselves, then cards."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, length: int, example: Example) -> None:
        self._encode = tokenizer.backend_tokenizer.encode
        self._special = {name: _token_id(tokenizer, name) for name in (USER, ASSISTANT, END)}
        self._length = length
        self.ids = [self._special[USER], *self._text(example.question), *self._text("\n\n")]
        self.learned = [False] * len(self.ids)
        self.segments = [0] * len(self.ids)
        self.positions = list(range(len(self.ids)))
        self.prefix = len(self.ids)
        self.pieces: list[list[int]] = []
        """Indices of the tokens of each learned piece of the turns."""

    def _text(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def _append(self, segment: int, first_position: int, parts: list[tuple[list[int], bool]]) -> bool:
        count = sum(len(ids) for ids, _ in parts)
        if len(self.ids) + count > self._length:
            return False
        for ids, learned in parts:
            if learned and segment != CARDS:
                self.pieces.append(list(range(len(self.ids), len(self.ids) + len(ids))))
            self.ids += ids
            self.learned += [learned] * len(ids)
        self.segments += [segment] * count
        self.positions += range(first_position, first_position + count)
        return True

    def add_turn(self, turn: skills.Turn) -> bool:
        """Append a turn and return True if it fits."""
        prompt = [*self._text(turn.prompt), self._special[END], self._special[ASSISTANT]]
        parts = [(self._text(piece.text), piece.learned) for piece in turn.pieces]
        return self._append(max(self.segments) + 1, self.prefix, [(prompt, False), *parts, ([self._special[END]], True)])

    def fill_with_cards(self, rng: random.Random) -> None:
        """Append cards until the next one does not fit."""
        position = 0
        while True:
            parts = [(self._text(piece.text), piece.learned) for piece in skills.draw_card(rng)]
            if not self._append(CARDS, position, parts):
                return
            position += sum(len(ids) for ids, _ in parts)


def draw_row(rng: random.Random, tokenizer: PreTrainedTokenizerFast, length: int) -> Row:
    """Draw a training row of at most `length` tokens."""
    trace = skills.draw_problem(rng)
    example = trace.example()
    row = Row(tokenizer, length, example)
    # A long question gets turns too; at least a fifth of the row is left for the cards.
    end = min(0.8 * length, 0.55 * length + row.prefix / 2)
    while len(row.ids) < end and row.add_turn(skills.draw_turn(rng, trace, example)):
        pass
    row.fill_with_cards(rng)
    return row


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows as tensors of shape (rows, length); the mask has shape (rows, 1, length, length)."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    targets: torch.Tensor
    """The next token if it is learned, else -100."""


def pack(rows: list[Row], length: int, device: str) -> PackedBatch:
    """Return rows as a batch, padded to `length`."""
    ids = np.zeros((len(rows), length), np.int64)
    positions, segments = np.zeros_like(ids), np.full_like(ids, -2)
    learned = np.zeros_like(ids, bool)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], positions[i, :n], segments[i, :n], learned[i, :n] = (
            row.ids,
            row.positions,
            row.segments,
            row.learned,
        )
    same = segments[:, :, None] == segments[:, None, :]
    reads_prefix = (segments[:, :, None] > 0) & (segments[:, None, :] == 0)
    mask = (same | reads_prefix) & np.tril(np.ones((length, length), bool))
    targets = np.full_like(ids, -100)
    targets[:, :-1] = np.where(learned[:, 1:], ids[:, 1:], -100)
    tensors = (torch.from_numpy(array).to(device) for array in (ids, positions, mask[:, None], targets))
    return PackedBatch(*tensors)


def logits(model: Qwen3ForCausalLM, batch: PackedBatch) -> torch.Tensor:
    """Return the logits of shape (learned tokens, V) at learned positions only."""
    with torch.autocast(batch.ids.device.type, torch.bfloat16):
        hidden = model.model(
            input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        return model.lm_head(hidden[batch.targets >= 0]).float()


def step_accuracy(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int, count: int) -> dict[str, float]:
    """Return by task the share of single steps that greedy decoding gets right, restatement and result, given the text before.

    It is measured on the tasks' validation problems, at the start, the middle and the end of each.
    """
    device = str(model.device)
    accuracy = {}
    for family, name in traces.TASKS:
        right = total = 0
        for example in get_task(name).examples("validation", count):
            trace = family.parse(example.question)
            row = Row(tokenizer, length, example)
            last = len(trace.states()) - 2
            for done in sorted({0, last // 2, max(0, last - 1)}):
                row.add_turn(skills.work_turn(trace, done))
            batch = pack([row], length, device)
            with torch.no_grad():
                hits = torch.zeros(batch.ids.shape, dtype=torch.bool, device=device)
                hits[batch.targets >= 0] = logits(model, batch).argmax(-1) == batch.targets[batch.targets >= 0]
            hit = hits[0].tolist()
            # A turn's last piece is its stop token. A step's last token tells whether the work continues: that is a choice.
            steps = [piece[:-1] for piece in row.pieces if len(piece) > 1]
            right += sum(all(hit[k - 1] for k in piece) for piece in steps)
            total += len(steps)
        accuracy[name] = right / total
    return accuracy


def make_optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al. 2024) for the matrices of the layers and AdamW for the rest; one learning rate fits both."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return the model with random weights."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=recipe.hidden, intermediate_size=recipe.mlp,
            num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads // 2,
            head_dim=recipe.hidden // recipe.heads, tie_word_embeddings=True, max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            pad_token_id=_token_id(tokenizer, PAD), eos_token_id=_token_id(tokenizer, END), bos_token_id=None,
        )
    )  # fmt: skip


def train_backbone(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Return the trained model."""
    torch.manual_seed(recipe.seed)
    model = make_model(recipe, tokenizer)
    model.to(torch.device(recipe.device))  # type: ignore[reportArgumentType]  # a decorator hides the method's signature
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    if recipe.compile:
        model.model.compile()
    optimizers = make_optimizers(model, recipe.lr)
    rng = random.Random(f"backbone/{recipe.seed}")
    started, loss_sum = time.monotonic(), 0.0
    for step in range(recipe.steps):
        warmup, done = min(1.0, (step + 1) / 200), step / recipe.steps
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.lr * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        rows = [draw_row(rng, tokenizer, recipe.row_tokens) for _ in range(recipe.rows)]
        batch = pack(rows, recipe.row_tokens, recipe.device)
        loss = torch.nn.functional.cross_entropy(logits(model, batch), batch.targets[batch.targets >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss_sum += loss.item()
        if (step + 1) % 100 == 0:
            elapsed = time.monotonic() - started
            line = f"step {step + 1}/{recipe.steps}  loss {loss_sum / 100:.4f}  {elapsed:.0f} s"
            if (step + 1) % 500 == 0:
                accuracy = step_accuracy(model, tokenizer, recipe.row_tokens, 50)
                line += f"  single steps {' '.join(f'{name} {share:.3f}' for name, share in accuracy.items())}"
            print(f"{line}  about {elapsed / (step + 1) * (recipe.steps - step - 1):.0f} s left", flush=True)
            loss_sum = 0.0
    return model.eval()


def main() -> None:
    """Make the backbone, or only its card, and print the card."""
    recipe = tyro.cli(Recipe)
    if recipe.card_only:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.out)
        model = Qwen3ForCausalLM.from_pretrained(recipe.out)
    else:
        started = time.monotonic()
        tokenizer = train_tokenizer(recipe.vocab_size, recipe.seed)
        recipe.out.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(recipe.out)
        model = train_backbone(recipe, tokenizer)
        model.save_pretrained(recipe.out)
        print(f"made in {(time.monotonic() - started) / 60:.0f} minutes")
    accuracy = step_accuracy(model, tokenizer, recipe.row_tokens, STEP_EXAMPLES)
    print(write_card(recipe.out, accuracy, STEP_EXAMPLES))


if __name__ == "__main__":
    main()

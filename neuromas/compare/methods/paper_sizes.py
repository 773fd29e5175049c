"""Trainable parameters of the paper's networks (table 1), counted from a configuration alone.

`python -m neuromas.compare.methods.paper_sizes` prints them. The paper states 6.9M, 11.5M and 16.1M for 3, 5 and 7 nodes
on Qwen3-0.6B and no rank or target; rank 16 on q_proj and v_proj, PEFT's targets for this model, gives exactly these.
"""

from dataclasses import replace

from transformers import Qwen3Config

from neuromas.compare.methods.networks import neuromas, single
from neuromas.config import AdapterConfig, TrainConfig
from neuromas.model.sizes import Sizes, sizes

ADAPTER = AdapterConfig(rank=16, alpha=32.0, target_modules=("q_proj", "v_proj"))
ROWS = {
    "Single-LLM RL": single,
    "NeuroMAS-3": neuromas(1, 1, 1),
    "NeuroMAS-5": neuromas(2, 2, 1),
    "NeuroMAS-7": neuromas(2, 2, 2, 1),
}


def qwen3_0_6b() -> Qwen3Config:
    """Return the architecture of Qwen/Qwen3-0.6B, written out, so that counting needs no download."""
    return Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=40960,
    )  # fmt: skip


def paper_sizes() -> dict[str, Sizes]:
    """Return the parameters of the rows of table 1 that train a network."""
    base = replace(TrainConfig(), backbone="Qwen/Qwen3-0.6B", adapter=ADAPTER)
    architecture = qwen3_0_6b()
    return {title: sizes(change(base), architecture) for title, change in ROWS.items()}


if __name__ == "__main__":
    for title, size in paper_sizes().items():
        print(f"{title}: {size.trainable / 1e6:.1f}M trainable ({size.adapters} x {size.per_adapter:,}, rank {size.rank})")

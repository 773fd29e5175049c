"""vLLM samples (an extra): all nodes' adapters serve one continuous batch, and come over from the learner as PEFT folders.

Every version of an adapter has a name, a number and a folder of its own: under one name vLLM reuses the keys and values of the
version before (vllm#42125). A request has a seed of its own, so that its draws do not depend on what else is in the batch. Log-
probabilities are those of the distribution that was drawn from, temperature included. vLLM runs in a process of its own, which
Ctrl-C does not reach: the step in progress can end.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from neuromas.model.backbone import Backbone, folder_of
from neuromas.model.policy import Policy
from neuromas.rollout.engine import EngineFault, OnSample
from neuromas.rollout.row import Row
from neuromas.rollout.torch_engine import MAX_ROWS
from neuromas.system.terminal import in_short
from neuromas.types import Request

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as `max_lora_rank`."""
SEED_BITS = 63
"""Of the number that vLLM takes."""
CPU_CACHE_BYTES = 2**31
"""Most that keys and values take on a CPU."""
CPU_BLOCK = 32
"""Tokens of a block there: whole blocks are shared, and the default, 128, is longer than most questions."""
CPU_PREFILL = 8192
"""Tokens of prompts that are read at once there, or as many as the longest prompt may have."""
GPU_SHARE = 0.4
"""Part of a GPU's memory that vLLM takes; the learner has the rest."""
_ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",  # a fork would copy locks that threads of torch hold
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the learner uses the same cores in turn
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """Samples from a policy's adapters, of which there are at most those of `most_nodes` nodes.

    Raises ValueError if vLLM is not installed, or cannot serve this backbone or adapters of this rank.
    """

    def __init__(self, policy: Policy, most_nodes: int) -> None:
        assert policy.adapters is not None
        self.policy, self.bank = policy, policy.adapters
        rank = next((rank for rank in RANKS if rank >= self.bank.rank), None)
        if rank is None:
            raise ValueError(f"--adapter.rank must be at most {RANKS[-1]} with --engine vllm, got {self.bank.rank}")
        self._vllm = _import_vllm()
        self._llm = _start(self._vllm, policy.backbone, rank, 1 if self.bank.shared else most_nodes)
        self._folder = Path(tempfile.mkdtemp(prefix="neuromas-vllm-"))
        weakref.finalize(self, _release, self._folder, _guard(multiprocessing.active_children()))
        self._adapters: dict[int, Any] = {}
        """What requests of each node's adapter carry."""
        self._taken_at = -1
        """The version of the adapters that vLLM has."""
        self._numbers = self._requests = 0

    def generate(
        self, requests: Sequence[tuple[int, Request]], on_sample: OnSample, *, temperature: float, max_new_tokens: int
    ) -> None:
        self._take_over_adapters()
        rows: dict[str, Row] = {}

        def begin(keyed: Sequence[tuple[int, Request]]) -> None:
            for key, request in keyed:
                row = Row(key, request, max_new_tokens)
                rows[self._submit(row, temperature)] = row

        begin(requests)
        while rows:
            for output in self._step():
                row, (text,) = rows.pop(output.request_id), output.outputs
                ids = list(text.token_ids)
                logprobs = [chosen[token].logprob for token, chosen in zip(ids, text.logprobs, strict=True)]
                row.record(self.policy, ids, logprobs)
                if row.texts_left:
                    rows[self._submit(row, temperature)] = row
                else:
                    begin(on_sample(row.key, row.sample(self._taken_at)))

    def _submit(self, row: Row, temperature: float) -> str:
        """Hand a row's next text to vLLM and return the request's id."""
        ids = row.prompt
        params = self._vllm.SamplingParams(
            temperature=temperature, max_tokens=row.limit, seed=row.seed(SEED_BITS), logprobs=0, detokenize=False,
            ignore_eos=True, stop_token_ids=sorted(self.policy.frame.stop_ids),
            output_kind=self._vllm.RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self._requests += 1
        name, routing = str(self._requests), self.policy.routing
        adapter = self._adapters[routing.nodes[routing.adapter_of(row.request.node)]]
        with _faults(f"vLLM refuses a prompt of {len(ids)} tokens"):
            self._llm.add_request(name, {"prompt_token_ids": ids}, params, lora_request=adapter)
        return name

    def _step(self) -> list[Any]:
        """Let every row write a token, and return what vLLM says of those that have ended."""
        with _faults("vLLM has stopped"):
            return [output for output in self._llm.step() if output.finished]

    def _take_over_adapters(self) -> None:
        """Give vLLM the adapters as they are now, if they have changed or nodes have joined; the ones before are dropped."""
        if self._taken_at == self.policy.version and self._adapters.keys() == set(self.bank.nodes):
            return
        for old in self._adapters.values():
            with _faults("vLLM has stopped"):
                self._llm.remove_lora(old.lora_int_id)
            shutil.rmtree(old.lora_path)
        self._adapters, self._taken_at = {}, self.policy.version
        for node in self.bank.nodes:
            self._numbers += 1
            name = f"node-{node}-version-{self._taken_at}-{self._numbers}"
            folder = self._folder / name
            folder.mkdir()
            for file, data in self.bank.peft_files(node, self.policy.backbone.name).items():
                (folder / file).write_bytes(data)
            self._adapters[node] = self._vllm.LoRARequest(name, self._numbers, str(folder))


@dataclass(frozen=True, slots=True)
class _Vllm:
    """What is used of the package."""

    EngineArgs: Any
    LLMEngine: Any
    LoRARequest: Any
    RequestOutputKind: Any
    SamplingParams: Any


@contextmanager
def _faults(what: str) -> Iterator[None]:
    """Turn what vLLM raises inside into an EngineFault that begins by `what`."""
    try:
        yield
    except Exception as error:  # its process may be gone, and its kernels or an adapter's file make it raise anything
        raise EngineFault(f"{what}: {in_short(error)}") from error


def _import_vllm() -> _Vllm:
    """Import vLLM; ValueError says how to get it."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm import EngineArgs, LLMEngine, SamplingParams  # type: ignore[reportMissingImports]  # an extra
        from vllm.lora.request import LoRARequest  # type: ignore[reportMissingImports]  # an extra
        from vllm.sampling_params import RequestOutputKind  # type: ignore[reportMissingImports]  # an extra
    except Exception as error:  # a build for another device raises whatever it meets
        raise ValueError(
            f"--engine vllm needs the package vllm, which cannot be imported ({in_short(error)}): pip install "
            "'neuromas[vllm]' on a machine with a GPU; docs/engines.md says how on a CPU"
        ) from error
    return _Vllm(EngineArgs, LLMEngine, LoRARequest, RequestOutputKind, SamplingParams)


def _start(vllm: _Vllm, backbone: Backbone, rank: int, adapters: int) -> Any:
    """Return vLLM's engine on a backbone; ValueError if it cannot serve that."""
    on_cpu = backbone.device.type == "cpu"
    longest = backbone.max_tokens
    wanted = MAX_ROWS * (longest or 2**20) * backbone.token_bytes
    memory: dict[str, Any] = {"gpu_memory_utilization": GPU_SHARE}
    if on_cpu:
        memory = {
            "kv_cache_memory_bytes": min(wanted or CPU_CACHE_BYTES, CPU_CACHE_BYTES), "block_size": CPU_BLOCK,
            # A request with a seed fails there when its prompt is read in two parts: a CPU's generator cannot be set back.
            "enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, CPU_PREFILL) if longest else None,
        }  # fmt: skip
    try:
        args = vllm.EngineArgs(
            model=folder_of(backbone.name), dtype=str(backbone.model.dtype).removeprefix("torch."), max_model_len=longest,
            max_num_seqs=MAX_ROWS, enable_lora=True, max_loras=adapters, max_lora_rank=rank, lora_dtype="auto",
            enable_prefix_caching=True, logprobs_mode="processed_logprobs", generation_config="vllm",
            skip_tokenizer_init=True, disable_log_stats=True, use_tqdm_on_load=False, seed=0, **memory,
        )  # fmt: skip
        with _own_process():
            return vllm.LLMEngine.from_engine_args(args)
    except Exception as error:  # vLLM, pydantic, torch and transformers each raise classes of their own
        raise ValueError(f"--engine vllm cannot serve --backbone {backbone.name}: {in_short(error)}") from error


@contextmanager
def _own_process() -> Iterator[None]:
    """Let a process that is started inside be vLLM's alone: it gets no Ctrl-C, and imports nothing of the running program.

    A script then needs no guard against being run twice, and vLLM, which reads through all modules, does not meet llvmlite,
    on which it breaks. An interrupt that comes meanwhile arrives afterwards.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    program, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _guard(processes: Sequence[BaseProcess]) -> "subprocess.Popen[bytes]":
    """Return a process that kills vLLM's as soon as this one is gone without a word: they would wait for it for ever."""
    pids = " ".join(str(process.pid) for process in processes)
    # The number may have become another program's by then.
    kill = f"for pid in {pids}; do grep -q VLLM /proc/$pid/cmdline 2>/dev/null && kill -9 $pid; done"
    return subprocess.Popen(["sh", "-c", f"read word || {{ {kill}; }}"], stdin=subprocess.PIPE, start_new_session=True)


def _release(folder: Path, guard: "subprocess.Popen[bytes]") -> None:
    """Delete the adapters' folders and let the guard go; vLLM ends its own processes."""
    guard.communicate(b"word\n")
    shutil.rmtree(folder, ignore_errors=True)

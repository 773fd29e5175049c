"""A Tinker-API service samples: each node from its own client's adapter, a text as soon as its prompt is complete.

What services do otherwise is checked in every text. Only the end tokens that are asked for end a text, and they come back with
it, so that they are learned. Log-probabilities are those of untempered logits, so that training samples at temperature 1.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from neuromas.model.policy import Policy
from neuromas.rollout.engine import EngineFault, OnSample
from neuromas.rollout.row import Row
from neuromas.rollout.tinker_service import SEED_BITS, TinkerService
from neuromas.types import Request


class TinkerEngine:
    """Samples from the clients of a service."""

    def __init__(self, policy: Policy, service: TinkerService) -> None:
        assert policy.adapters is not None
        self.policy, self.bank, self.service = policy, policy.adapters, service

    def generate(
        self, requests: Sequence[tuple[int, Request]], on_sample: OnSample, *, temperature: float, max_new_tokens: int
    ) -> None:
        samplers = self.service.samplers(self.bank.nodes)
        version, waiting = self.policy.version, deque(requests)
        rows: dict[Future[Any], Row] = {}
        while waiting or rows:
            while waiting:
                row = Row(*waiting.popleft(), max_new_tokens)
                rows[self._submit(row, samplers, temperature)] = row
            for future in self.service.wait("samples", list(rows)):
                row = rows.pop(future)
                self._record(row, future.result())
                if row.texts_left:
                    rows[self._submit(row, samplers, temperature)] = row
                else:
                    waiting.extend(on_sample(row.key, row.sample(version)))

    def _submit(self, row: Row, samplers: dict[int, Any], temperature: float) -> "Future[Any]":
        """Ask for a row's next text."""
        sdk, routing = self.service.sdk, self.policy.routing
        sampler = samplers[routing.nodes[routing.adapter_of(row.request.node)]]
        params = sdk.SamplingParams(
            max_tokens=row.limit, seed=row.seed(SEED_BITS), stop=sorted(self.policy.frame.stop_ids), temperature=temperature
        )
        return sampler.sample(sdk.ModelInput.from_ints(row.prompt), num_samples=1, sampling_params=params)

    def _record(self, row: Row, answer: Any) -> None:
        """Add the text that the service has sampled to its row; EngineFault if it is not one that can be learned from."""
        (sequence,) = answer.sequences
        ids, logprobs, stops = list(sequence.tokens), sequence.logprobs, self.policy.frame.stop_ids
        where = f"the service at {self.service.url}"
        if logprobs is None or len(logprobs) != len(ids):
            raise EngineFault(f"{where} gives {len(logprobs or ())} log-probabilities with {len(ids)} tokens")
        if any(token in stops for token in ids[:-1]):
            raise EngineFault(f"{where} samples on after an end token: it ignores `stop`")
        if sequence.stop_reason == "stop" and (not ids or ids[-1] not in stops):
            raise EngineFault(f"{where} leaves the end token out of its samples, so that no node can learn to end a text")
        if len(ids) > row.limit:
            raise EngineFault(f"{where} samples {len(ids)} tokens where at most {row.limit} are asked for")
        row.record(self.policy, ids, list(logprobs))

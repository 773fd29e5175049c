"""Decoding over buffers of fixed shapes, as on a GPU: the same tokens, and a step that a GPU can record as a graph."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerator import READS_BACK, Recorded, flex_on_cpu, graphs_on_cpu, other_operations
from models import load_backbone, make_model, randomise, save_model

from neuromas.config import AdapterConfig
from neuromas.model.ops import TorchOps
from neuromas.model.policy import Policy
from neuromas.rollout import fixed_decoding
from neuromas.rollout.engine import EngineFault
from neuromas.rollout.torch_engine import DecodingBatch, TorchEngine
from neuromas.types import Request, Sample

pytestmark = pytest.mark.processes

NODES = (1, 2, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("fixed")
    return {
        "stops": save_model(make_model("qwen3", ("Yes", "No", ":", ".")), parent / "stops"),
        "gemma3": save_model(make_model("gemma3"), parent / "gemma3"),
    }


def policy_of(folder: Path) -> Policy:
    policy = Policy(load_backbone(folder), NODES, AdapterConfig(rank=2))
    assert policy.adapters is not None
    randomise(policy.adapters)
    return policy


def requests_of(policy: Policy, count: int = 14) -> list[Request]:
    """Return requests with prompts of many lengths; some go on with a second and a third text."""
    headers = ((5, 6, 7), (8,))
    prompts = [policy.prompt("Is it even? " * (1 + index % 4), "Write. " * (1 + index % 3)) for index in range(count)]
    requests = [Request(NODES[index % 3], prompt, ("seed", index)) for index, prompt in enumerate(prompts)]
    return [replace(request, headers=headers[: index % 3]) for index, request in enumerate(requests)]


def write(policy: Policy, requests: Sequence[Request], max_rows: int) -> list[Sample]:
    """Return samples of requests of which every fourth one is made when another one is answered."""
    found: dict[int, Sample] = {}

    def keep(key: int, sample: Sample) -> list[tuple[int, Request]]:
        found[key] = sample
        return [(key + 1, requests[key + 1])] if key % 4 == 2 and key + 1 < len(requests) else []

    first = [(key, request) for key, request in enumerate(requests) if key % 4 != 3]
    TorchEngine(policy, max_rows).generate(first, keep, temperature=1.0, max_new_tokens=21)
    return [found[key] for key in range(len(requests))]


@pytest.mark.parametrize(("family", "max_rows", "at_once"), [("stops", 3, 8), ("gemma3", 64, 1), ("gemma3", 5, 8)])
def test_rows_over_fixed_buffers_write_the_same(
    folders: dict[str, Path], family: str, max_rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = policy_of(folders[family])
    expected = write(usual, requests_of(usual), max_rows)
    monkeypatch.setattr("neuromas.rollout.torch_engine.TOKENS_AT_ONCE", at_once)
    # Prefixes that nobody reads go at once.
    monkeypatch.setattr("neuromas.rollout.torch_engine.PREFIX_BYTES", 1)
    with other_operations(), flex_on_cpu():
        policy = policy_of(folders[family])
        assert type(policy.ops) is TorchOps
        found = write(policy, requests_of(policy), max_rows)
    assert {len(sample.texts) for sample in found} == {1, 2, 3}
    for one, other in zip(found, expected, strict=True):
        assert replace(one, logprobs=()) == replace(other, logprobs=())
        assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-5)


def test_a_replay_does_what_a_step_does(folders: dict[str, Path]) -> None:
    """A graph reads and writes the addresses that it was recorded with, whatever has joined, left or moved since."""
    usual = policy_of(folders["stops"])
    expected = write(usual, requests_of(usual), 3)
    with other_operations():
        policy = policy_of(folders["stops"])
        with graphs_on_cpu() as graphs:
            found = write(policy, requests_of(policy), 3)
    # One that is replayed this often serves more than one chunk.
    assert max(graph.replays for graph in graphs) >= fixed_decoding.TOKENS_AT_ONCE
    for one, other in zip(found, expected, strict=True):
        assert replace(one, logprobs=()) == replace(other, logprobs=())
        assert one.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-5)


def test_a_step_can_be_recorded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps are the same operations on tensors of the same layout, and nothing is read back, whichever rows have ended."""
    recorded: list[Recorded] = []

    def recording(graphs: fixed_decoding.Graphs, step: Callable[[], None], shape: fixed_decoding.Shape, times: int) -> None:
        step()
        for _ in range(times - 1):
            with Recorded() as operations:
                step()
            recorded.append(operations)

    monkeypatch.setattr("neuromas.rollout.fixed_decoding.Graphs.run", recording)
    with other_operations(), torch.inference_mode():
        policy = policy_of(folders["stops"])
        with policy.sampling():
            batch = DecodingBatch(policy, 64, 21, 2**28)
            batch.admit(list(enumerate(requests_of(policy))), 1.0)
            batch.step()
            before = batch.live
            batch.step()
            after = batch.live
    chunk = recorded[: fixed_decoding.TOKENS_AT_ONCE - 1]
    assert len(chunk) == 7
    for step in chunk:
        assert step.operations == chunk[0].operations
        assert not step.names() & READS_BACK
    assert len(chunk[0].operations) > 100
    # Rows have ended in it.
    assert after < before


def test_a_step_that_cannot_be_recorded_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def step() -> None:
        steps.append("")
        if len(steps) == 2:
            raise RuntimeError("operation\nnot permitted")

    @contextmanager
    def record(graph: object, pool: object) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("failed due to a previous error") from error

    with graphs_on_cpu():
        monkeypatch.setattr("torch.cuda.graph", record)
        named = r"^set the environment variable NEUROMAS_WITHOUT=graphs: .* \(operation not permitted\)$"
        with pytest.raises(EngineFault, match=named):
            fixed_decoding.Graphs(records=True).run(step, fixed_decoding.Shape(8, 1, 1, 64), 3)


def test_shapes_are_rounded_up_to_powers_of_two() -> None:
    assert [fixed_decoding._power_of_two(n) for n in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, 16]

"""The run directory: checkpoints are whole or not there, and whoever finds one damaged is told which file and what to do."""

import dataclasses
import json
import os
import random
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from neuromas import Backbone
from neuromas.config import AdapterConfig, TopologyConfig, TrainConfig
from neuromas.model.adapters import AdapterBank
from neuromas.model.policy import Policy
from neuromas.training import checkpoint
from neuromas.training.checkpoint import State
from neuromas.training.learner import TorchLearner
from neuromas.training.ledger import Ledger
from neuromas.training.run_directory import RunDirectory

Learner = tuple[AdapterBank, TorchLearner]


def make_learner(seed: int = 0) -> Learner:
    config = AdapterConfig(rank=2, target_modules=("q_proj", "down_proj"))
    policy = Policy(Backbone.tiny(0), (1, 2), config, seed)
    assert policy.adapters is not None
    return policy.adapters, TorchLearner(policy, TrainConfig(lr=0.01))


def learn(learner: Learner, seed: int) -> None:
    """Do an optimizer step on gradients drawn from a seed."""
    bank, torch_learner = learner
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters().values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    torch_learner.optimizer.step()
    torch_learner.optimizer.zero_grad(set_to_none=True)


def tensors(learner: Learner) -> list[torch.Tensor]:
    """Weights and moments, in one order."""
    bank, torch_learner = learner
    optimizer = torch_learner.optimizer
    moments = [optimizer.state[p][key] for p in bank.parameters().values() for key in sorted(optimizer.state[p])]
    return [p.detach().clone() for p in bank.parameters().values()] + [moment.clone() for moment in moments]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def state(step: int) -> State:
    return State(step, 1 / 3, "checksum", Ledger(100, optimizer_steps=step, rollouts=8 * step, calls=16 * step))


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes: the kernel refuses the write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(run_dir=tmp_path / "run", topology=TopologyConfig(widths=(1, 1)))


@pytest.fixture
def run(config: TrainConfig) -> RunDirectory:
    run = RunDirectory.create(config)
    run.initialise()
    return run


@pytest.fixture
def learner() -> Learner:
    """Adapters and optimizer after one step."""
    learner = make_learner()
    learn(learner, seed=1)
    return learner


Save = Callable[[int], Path]


@pytest.fixture
def save(run: RunDirectory, learner: Learner) -> Save:
    """Saves a checkpoint of the learner as it is and returns its folder."""

    def save(step: int) -> Path:
        checkpoint.save(run, *learner, state(step))
        return run.path / "checkpoints" / f"step-{step:06d}"

    return save


def test_a_checkpoint_comes_back_bit_for_bit_and_learns_on_as_the_original(run: RunDirectory, learner: Learner) -> None:
    learn(learner, seed=2)
    checkpoint.save(run, *learner, state(2))
    restored = make_learner(seed=9)
    assert checkpoint.load(run, *restored) == state(2)
    assert restored[0].version == 2
    assert_equal(tensors(restored), tensors(learner))
    for each in (learner, restored):
        learn(each, seed=3)
    assert_equal(tensors(restored), tensors(learner))


def test_a_checkpoint_from_before_the_first_gradient_comes_back(run: RunDirectory) -> None:
    fresh, restored = make_learner(seed=4), make_learner(seed=9)
    checkpoint.save(run, *fresh, state(1))
    checkpoint.load(run, *restored)
    for each in (fresh, restored):
        learn(each, seed=3)
    assert_equal(tensors(restored), tensors(fresh))


def test_adapters_load_without_an_optimizer(run: RunDirectory, learner: Learner, save: Save) -> None:
    save(1)
    bank, _ = make_learner(seed=9)
    assert checkpoint.load(run, bank) == state(1)
    for name, parameter in bank.parameters().items():
        assert torch.equal(parameter, learner[0].parameters()[name])


def test_a_run_without_a_checkpoint_loads_nothing(run: RunDirectory) -> None:
    learner = make_learner()
    before = tensors(learner)
    assert checkpoint.load(run, *learner) is None
    assert_equal(tensors(learner), before)


def test_the_newest_checkpoints_are_kept_and_adapters_points_to_the_last(run: RunDirectory, save: Save) -> None:
    for step in (9, 10, 11):
        save(step)
    assert [path.name for path in run.checkpoints()] == ["step-000010", "step-000011"]
    assert (run.path / "adapters").resolve() == run.path / "checkpoints" / "step-000011" / "adapters"
    assert sorted(path.name for path in (run.path / "adapters" / "2").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_what_a_killed_run_left_of_a_checkpoint_is_no_checkpoint(run: RunDirectory, save: Save) -> None:
    save(1)
    partial = run.path / "checkpoints" / "step-000002.partial" / "adapters" / "7"
    partial.mkdir(parents=True)
    (partial / "adapter_model.safetensors").write_bytes(b"half")
    assert checkpoint.load(run, *make_learner()) == state(1)
    save(2)
    assert [path.name for path in run.checkpoints()] == ["step-000001", "step-000002"]
    assert not partial.exists()
    assert not (run.path / "checkpoints" / "step-000002" / "adapters" / "7").exists()


@pytest.mark.parametrize("name", ["adapters/2/adapter_model.safetensors", "optimizer.safetensors", "ledger.json"])
def test_a_truncated_file_is_named_with_the_remedy(run: RunDirectory, save: Save, name: str) -> None:
    older, newest = save(1), save(2)
    data = (newest / name).read_bytes()
    (newest / name).write_bytes(data[: len(data) // 2])
    message = (
        f"checkpoint {newest}: {name} is truncated ({len(data) // 2} of {len(data)} bytes); "
        f"delete {newest} to continue from {older.name}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkpoint.load(run, *make_learner())


def test_a_missing_file_is_named_with_the_remedy(run: RunDirectory, save: Save) -> None:
    newest = save(1)
    size = (newest / "ledger.json").stat().st_size
    (newest / "ledger.json").unlink()
    message = f"checkpoint {newest}: ledger.json is truncated (0 of {size} bytes); delete {newest} to start again"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkpoint.load(run, *make_learner())


def test_a_damaged_file_is_named_with_the_remedy(run: RunDirectory, save: Save) -> None:
    newest = save(1)
    path = newest / "adapters" / "1" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    message = (
        f"checkpoint {newest}: adapters/1/adapter_model.safetensors is damaged (its checksum differs); "
        f"delete {newest} to start again"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkpoint.load(run, *make_learner())


def test_no_bit_of_a_checkpoint_changes_unnoticed(run: RunDirectory, save: Save) -> None:
    newest, rng = save(1), random.Random(0)
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for at in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))]:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            with pytest.raises(ValueError, match=r"^checkpoint .*/step-000001: .* delete .* to start again$"):
                run.newest()
        path.write_bytes(data)
    assert run.newest()[1]["step"] == 1


def test_what_is_renamed_is_on_the_disk_and_so_is_its_name(
    run: RunDirectory, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        done.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        sync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        done.append(f"{self} -> {target}")
        return rename(self, target)

    run.log_metrics(0, {"reward/mean": 0.5})
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    final = save(1)
    partial = final.with_name(f"{final.name}.partial")
    at = done.index(f"{partial} -> {final}")
    written = {str(partial / path.relative_to(final)) for path in final.rglob("*")}
    assert written | {str(partial), str(run.path / "metrics.jsonl")} <= set(done[:at])
    assert done[at + 1] == str(final.parent)


@pytest.mark.parametrize("left", [None, b"", b'{"step": 2, "files": {"adap', b"\xff\x00"])
def test_a_missing_or_damaged_state_is_named_and_the_remedy_works(run: RunDirectory, save: Save, left: bytes | None) -> None:
    older, newest = save(1), save(2)
    path = newest / "state.json"
    if left is None:
        path.unlink()
    else:
        path.write_bytes(left)
    wrong = "state.json or checksum is missing or damaged"
    if left is not None:
        wrong = "state.json is damaged (its checksum differs)"
    message = f"checkpoint {newest}: {wrong}; delete {newest} to continue from {older.name}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checkpoint.load(run, *make_learner())
    for file in sorted(newest.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    newest.rmdir()
    assert checkpoint.load(run, *make_learner()) == state(1)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run: RunDirectory, save: Save) -> None:
    moved = save(1).rename(run.path / "checkpoints" / "step-000002")
    message = f"checkpoint {moved}: its state.json is of step 1; delete {moved} to start again"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        run.newest()


# The adapters' files are larger than 4 kB, the optimizer's is the largest of all.
@pytest.mark.parametrize("room", [0, 4096, 12000])
def test_a_disk_that_fills_up_while_saving_leaves_the_last_good_checkpoint(
    run: RunDirectory, learner: Learner, save: Save, room: int
) -> None:
    files = {path.name: path.stat().st_size for path in save(1).rglob("*") if path.is_file()}
    assert 4096 < files["adapter_model.safetensors"] < 12000 < files["optimizer.safetensors"]
    good = tensors(learner)
    learn(learner, seed=2)
    message = (
        f"--run-dir {run.path}: checkpoint step-000002 cannot be saved (File too large); the last good one is step-000001. "
        "Make room and run the same command with --resume"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), full_disk(room):
        checkpoint.save(run, *learner, state(2))
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000001"]
    restored = make_learner(seed=9)
    assert checkpoint.load(run, *restored) == state(1)
    assert_equal(tensors(restored), good)
    # With room again, the same save succeeds.
    checkpoint.save(run, *learner, state(2))
    assert checkpoint.load(run, *restored) == state(2)
    assert_equal(tensors(restored), tensors(learner))


def test_a_disk_that_is_full_before_the_first_checkpoint_says_so(run: RunDirectory, learner: Learner) -> None:
    with (
        pytest.raises(ValueError, match=r"step-000001 cannot be saved \(File too large\); there is none yet\. Make room"),
        full_disk(0),
    ):
        checkpoint.save(run, *learner, state(1))
    assert checkpoint.load(run, *make_learner()) is None


def test_a_disk_that_fills_up_while_logging_says_so(run: RunDirectory) -> None:
    run.log_metrics(0, {"reward/mean": 0.5})
    size = (run.path / "metrics.jsonl").stat().st_size
    message = (
        f"--run-dir {run.path}: metrics.jsonl cannot be written (File too large). "
        "Make room and run the same command with --resume"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), full_disk(size + 5):
        run.log_metrics(1, {"reward/mean": 0.25})
    # Half a line is left, and goes when the run resumes.
    assert (run.path / "metrics.jsonl").stat().st_size == size + 5
    run.forget_after(1)
    assert run.metrics() == [{"step": 0, "reward/mean": 0.5}]
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be written \(File too large\)\. Make room"), full_disk(0):
        run.write_json("evaluation.json", {"before": {}})
    assert run.read_json("evaluation.json", dict) is None


def test_a_full_disk_says_what_goes_on_with_a_run_that_has_grown(run: RunDirectory) -> None:
    run.write_json("parent.json", {})
    again = re.escape(f"Make room and run `neuromas train --resume --run-dir {run.path}`")
    with pytest.raises(ValueError, match=f"{again}$"), full_disk(0):
        run.write_json("evaluation.json", {"before": {}})


def test_a_folder_that_cannot_be_made_says_so(config: TrainConfig) -> None:
    run = RunDirectory.create(config)
    with (
        pytest.raises(ValueError, match=rf"^--run-dir {re.escape(str(run.path))} cannot be written: File too large$"),
        full_disk(0),
    ):
        run.initialise()
    # Nothing is in the way of a second try.
    RunDirectory.create(config).initialise()
    assert RunDirectory.open(run.path).config == config


def test_forget_after_drops_later_steps_and_lines_that_are_cut_off(run: RunDirectory) -> None:
    for step in range(4):
        run.log_metrics(step, {"reward/mean": step / 4})
        run.log_rollouts(step, [{"split": "train", "rollout": index} for index in (0, 1)])
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "reward/me')
    run.forget_after(2)
    assert run.metrics() == [{"step": 0, "reward/mean": 0.0}, {"step": 1, "reward/mean": 0.25}]
    lines = (run.path / "rollouts.jsonl").read_text().splitlines()
    assert [(record["step"], record["rollout"]) for record in map(json.loads, lines)] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_forget_after_keeps_the_rollouts_behind_every_stored_score(run: RunDirectory) -> None:
    for step, split in ((0, "test"), (0, "file"), (0, "train"), (1, "train"), (2, "test"), (2, "file")):
        run.log_rollouts(step, [{"split": split}])
    # Killed while "file" was answered after training: its score is not stored and will be measured again.
    run.write_json("evaluation.json", {"before": {"test": {}, "file": {}}, "after": {"test": {}}})
    run.forget_after(1)
    kept = [json.loads(line) for line in (run.path / "rollouts.jsonl").read_text().splitlines()]
    assert [(record["step"], record["split"]) for record in kept] == [(0, "test"), (0, "file"), (0, "train"), (2, "test")]


def test_forget_after_needs_no_logs(run: RunDirectory) -> None:
    run.forget_after(0)
    assert run.metrics() == []


def test_an_unexplained_metric_is_not_logged(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match=r"^metric 'reward' is not in METRICS; describe it there before logging it$"):
        run.log_metrics(0, {"reward": 1.0})
    assert run.metrics() == []


def test_a_run_that_exists_is_not_overwritten(run: RunDirectory, config: TrainConfig) -> None:
    message = f"--run-dir {run.path} exists already; continue it with --resume or name another --run-dir"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunDirectory.create(config)


def test_a_folder_of_something_else_is_no_run(config: TrainConfig) -> None:
    config.run_path.mkdir()
    assert RunDirectory.create(config).path == config.run_path
    (config.run_path / "thesis.tex").touch()
    message = f"--run-dir {config.run_path} exists already and is no run; name another --run-dir"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunDirectory.create(config)
    message = f"--run-dir {config.run_path} is no run, there is nothing to --resume; start one there without it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunDirectory.resume(config)


def test_a_run_that_was_killed_as_it_began_is_begun_again(config: TrainConfig) -> None:
    run = RunDirectory.resume(config)
    with run.locked():
        pass
    (run.path / "held_out.json.new").touch()
    assert RunDirectory.resume(config).path == run.path


def test_a_file_in_the_place_of_the_run_is_refused(config: TrainConfig) -> None:
    config.run_path.touch()
    with pytest.raises(ValueError, match=r"/run exists already and is no run; name another --run-dir$"):
        RunDirectory.create(config)


def test_resume_continues_the_run_and_starts_one_that_is_not_there(config: TrainConfig) -> None:
    fresh = RunDirectory.resume(config)
    assert not fresh.path.exists()
    fresh.initialise()
    again = RunDirectory.resume(dataclasses.replace(config, device="cpu", save_every=3))
    assert (again.path, again.config, again.topology) == (fresh.path, config, config.topology.build())


def test_a_run_of_another_config_says_what_differs(run: RunDirectory, config: TrainConfig) -> None:
    message = (
        f"--run-dir {run.path} belongs to another config, which has lr = 0.001 (got 0.5); resume with its own settings or "
        "name another --run-dir"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunDirectory.resume(dataclasses.replace(config, lr=0.5))


def test_what_is_no_run_cannot_be_opened(tmp_path: Path, run: RunDirectory) -> None:
    nowhere = tmp_path / "nowhere"
    message = f"{nowhere} is no run: expected config.json in it, No such file or directory"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        RunDirectory.open(nowhere)
    (run.path / "topology.json").write_text('{"layers": [')
    with pytest.raises(ValueError, match=r"/run/topology\.json is damaged \(Expecting value"):
        RunDirectory.open(run.path)
    (run.path / "topology.json").unlink()
    with pytest.raises(ValueError, match=r"/run is no run: expected topology\.json in it, No such file or directory$"):
        RunDirectory.open(run.path)
    (run.path / "config.json").write_text('{"lr": 0.')
    with pytest.raises(ValueError, match=r"/run/config\.json is damaged: not JSON \(Expecting"):
        RunDirectory.open(run.path)
    (run.path / "config.json").write_text('{"learning_rate": 0.1}')
    with pytest.raises(ValueError, match=r"/run/config\.json: unknown key 'learning_rate'; known are "):
        RunDirectory.open(run.path)

"""Exports: what plain PEFT makes of one, what comes back, and what is refused."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import Call, assert_refused, run_cli
from models import load_backbone, make_model, plain_logprobs, save_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from neuromas.graph.society import SocietyConfig
from neuromas.graph.topology import Topology
from neuromas.training.exported import collect
from neuromas.training.load_run import load_run
from neuromas.training.model_card import card
from neuromas.training.run_directory import RunDirectory
from neuromas.training.sealed import seal

TASK = ["--task", "navigate", "--device", "cpu", "--prompt.wording", "terse"]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model("qwen3", says=("Yes", "No")), tmp_path_factory.mktemp("speaker") / "model")


@pytest.fixture(scope="module")
def run(speaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three nodes that have been validated after step 1 and 2, the second growth of a node included; adapters are not zero."""
    config = tmp_path_factory.mktemp("grown") / "grown.toml"
    config.write_text('[topology]\nwidths = [1, 1]\n[[growth]]\nat_step = 1\nwidths = [2, 1]\nstart = ["copy:1"]\n')
    path = config.parent / "run"
    run_cli(
        "train", config, *TASK, "--backbone", speaker, "--run-dir", path, "--num-steps", "3",
        "--examples-per-step", "4", "--group-size", "4", "--max-new-tokens", "3", "--eval-size", "6", "--eval-every", "1",
        "--validation-size", "4", "--lr", "0.01", "--save-every", "2",
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "out"
    run_cli("export", run, "--out", out, "--rollouts")
    return out


def test_plain_peft_gives_an_exported_adapter_the_same_log_probabilities(
    run: Path, export: Path, speaker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the program on the card, word by word."""
    (program,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert str(speaker) in program
    found: dict = {}
    monkeypatch.chdir(export)
    exec(compile(program, "README.md", "exec"), found)
    model: PeftModel = found["model"].eval()
    loaded = load_run(run)
    assert all(module.lora_B.abs().max() > 0 for module in loaded.network.adapters.modules.values())
    (rollout,) = loaded.network.rollout(loaded.task.examples("validation", 1), 1, seed=("peft",))[0]
    assert len(rollout.completions) == 3
    for completion in rollout.completions:
        model.set_adapter(f"node{completion.node}")
        with torch.no_grad():
            plain = plain_logprobs(model, completion)
        torch.testing.assert_close(plain, torch.tensor(completion.sample.logprobs), atol=1e-4, rtol=0)


def test_the_card_says_what_was_measured_and_what_vllm_takes(run: Path, export: Path) -> None:
    text, (score,) = (export / "README.md").read_text(), RunDirectory.open(run).scores("after").values()
    assert f"| test | after | {score['accuracy']:.1%}" in text
    assert f"{score['low']:.1%} to {score['high']:.1%} | 6 | {score['floor']:.1%}" in text
    assert "after step 3 of 3" in text
    # Rank 12, three adapters and one more.
    assert "--max-loras 4 --max-lora-rank 16 \\\n    --lora-modules node1=adapters/1 node3=adapters/3 node2=adapters/2" in text
    assert "base_model" not in text
    assert not (export / "adapters/1/optimizer.safetensors").exists()


def test_an_import_answers_bit_for_bit_as_the_run(call: Call, run: Path, export: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert call("import", export, "--run-dir", made, "--json").out.startswith(f'{{"run": "{made}", "step": 3')
    before, after = (call("eval", path, "--size", 8, "--json").out for path in (run, made))
    assert before == after
    for node in (1, 2, 3):
        name = f"adapters/{node}/adapter_model.safetensors"
        assert (made / name).read_bytes() == (run / name).read_bytes()
    assert call("ask", made, "Is it?").out == call("ask", run, "Is it?").out
    assert json.loads(call("show", made, "--json").out)["ledger"] == json.loads(call("show", run, "--json").out)["ledger"]
    assert call("view", made).status == 0
    again = tmp_path / "again"
    assert call("export", made, "--out", again, "--rollouts").status == 0
    for path in sorted(path.relative_to(export) for path in export.rglob("*") if path.is_file()):
        # A run that is imported has its own folder, and it is said from which checkpoint that came.
        assert (again / path).read_bytes() == (export / path).read_bytes(), path


def test_an_import_is_done_and_can_be_grown(call: Call, export: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    call("import", export, "--run-dir", made)
    assert "after training, test" in call("train", "--resume", "--run-dir", made).out
    assert RunDirectory.open(made).step == 3
    grown = call("grow", made, "--to", 2, 2, 1, "--steps", 1)
    assert grown.status == 0, grown.err
    assert "optimizer and critic begin anew" in grown.err


def test_the_best_is_exported_as_such_and_trains_on_with_a_new_optimizer(call: Call, speaker: Path, tmp_path: Path) -> None:
    flags = [*TASK, "--widths", 1, "--examples-per-step", 4, "--group-size", 4, "--max-new-tokens", 3, "--eval-size", 4]
    run, made, best = tmp_path / "run", tmp_path / "made", tmp_path / "best.v1"
    trained = call(
        "train", *flags, "--backbone", speaker, "--run-dir", run, "--num-steps", 2, "--eval-every", 1, "--validation-size", 4
    )
    assert trained.status == 0, trained.err
    folder, state = RunDirectory.open(run).best() or (run, {})
    # So that it is told from the last one even if that is the best.
    for each in RunDirectory.open(run).checkpoints():
        if each.name.endswith("1"):
            shutil.rmtree(each)
    assert call("export", run, "--out", best, "--best").status == 0
    text = (best / "README.md").read_text()
    assert f"after step {state['step']} of 2, the best validation" in text
    assert f"{state['validation_accuracy']:.1%} (95% interval" in text
    assert "| test | before" in text
    assert "| test | after" not in text
    assert call("import", best, "--run-dir", made).status == 0
    name = "adapters/1/adapter_model.safetensors"
    assert (made / name).read_bytes() == (folder / name).read_bytes()
    resumed = call("train", "--resume", "--run-dir", made)
    assert resumed.status == 0, resumed.err
    assert ("optimizer and critic begin anew" in resumed.err) == (state["step"] < 2)
    assert RunDirectory.open(made).step == 2


def test_a_card_says_what_is_worded_otherwise(run: Path, speaker: Path) -> None:
    export, backbone = collect(RunDirectory.open(run)), load_backbone(speaker)
    assert "| prompts | wording `terse`, at most" in card(export, backbone)
    prompt = dataclasses.replace(export.config.prompt, answer="A word.", begin_answer="")
    text = card(dataclasses.replace(export, config=dataclasses.replace(export.config, prompt=prompt)), backbone)
    assert "| prompts | wording `terse` but for `answer`, `begin_answer` of `config.json`, at most" in text
    assert "--wording terse` prints one but for `answer`, `begin_answer`, which" in text


def test_what_vllm_does_not_take_is_said(run: Path, speaker: Path) -> None:
    opened, backbone = RunDirectory.open(run), load_backbone(speaker)
    for changed, said in (({"r": 513}, "its largest rank is 512"), ({"target_modules": ["fc"]}, "it takes no adapters on fc")):
        export, name = collect(opened), "adapters/1/adapter_config.json"
        config = json.dumps(json.loads(export.files[name]) | changed).encode()
        text = card(dataclasses.replace(export, files={**export.files, name: config}), backbone)
        assert f"vLLM does not serve them: {said}" in text
        assert "vllm serve" not in text


def test_adapters_that_act_behind_the_question_are_not_for_plain_lora(call: Call, speaker: Path, tmp_path: Path) -> None:
    flags = ["--widths", 1, 1, "--examples-per-step", 1, "--group-size", 2, "--max-new-tokens", 3, "--eval-size", 2]
    run = tmp_path / "run"
    scope = ["--adapter.scope", "suffix", "--adapter.shared", "--adapter.rank", 20, "--num-steps", 1, "--eval-every", 0]
    assert call("train", *TASK, *flags, *scope, "--backbone", speaker, "--run-dir", run).status == 0
    assert call("export", run, "--out", tmp_path / "out").status == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "Plain LoRA does not serve these adapters" in text
    assert "vllm serve" not in text
    assert "1 for all nodes, rank 20" in text
    assert call("import", tmp_path / "out", "--run-dir", tmp_path / "made").status == 0
    assert call("eval", tmp_path / "made", "--size", 4, "--json").out == call("eval", run, "--size", 4, "--json").out


def test_the_card_of_a_vote_names_no_node_that_answers(run: Path, speaker: Path) -> None:
    export, backbone = collect(RunDirectory.open(run)), load_backbone(speaker)
    for widths, said in {
        (1, 3): "4 nodes that send each other messages; 3 answer, and a",
        (3,): "3 nodes; 3 answer, and a",
    }.items():
        text = card(dataclasses.replace(export, topology=Topology.layered(widths, vote=True)), backbone)
        assert f"A network of {said} majority vote decides.\n" in text


def test_the_card_of_a_society_says_what_its_agents_read(run: Path, speaker: Path) -> None:
    export, backbone = collect(RunDirectory.open(run)), load_backbone(speaker)
    others = "a summary of the others' by the bare backbone"
    for widths, rounds, rows in (
        ((2, 2), 2, ["the question | an answer in the first round",
                     f"the question, the last answer that began as node 2's, {others} | an answer in each later round"]),
        ((2,), 2, [f"the question, in later rounds its own last answer and {others} | an answer in each round"]),
        ((2,), 1, ["the question | an answer in the first round"]),
    ):  # fmt: skip
        config = dataclasses.replace(export.config, society=SocietyConfig(rounds=rounds))
        text = card(dataclasses.replace(export, config=config, topology=Topology.layered(widths, vote=True)), backbone)
        assert [f"| {2 * layer} | {layer} | {row} |" in text for layer, row in enumerate(rows, 1)] == [True] * len(rows)
        assert "| node | layer | reads | writes |" in text
        assert "Either serves agents, not the society" in text
        assert "neuromas tasks show" not in text


def forge(export: Path, **changes: bytes) -> None:
    """Change files of an export and seal it again, as somebody who makes exports would."""
    state = json.loads((export / "state.json").read_text())
    names = [*state.pop("files"), *changes]
    files = {name: changes.get(name, (export / name).read_bytes() if (export / name).exists() else b"") for name in names}
    for name, data in seal(state, files).items():
        (export / name).write_bytes(data)


@pytest.fixture
def copy(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "copy"))


def test_what_is_no_whole_export_is_refused(call: Call, copy: Path, speaker: Path, tmp_path: Path) -> None:
    made, tensors = tmp_path / "made", "adapters/3/adapter_model.safetensors"

    def refused(message: str, *more: object) -> None:
        assert_refused(call("import", copy, "--run-dir", made, *more), message)
        assert not made.exists()
        shutil.rmtree(copy)
        shutil.copytree(copy.parent / "whole", copy)

    shutil.copytree(copy, copy.parent / "whole")
    shutil.rmtree(copy / "adapters/2")
    refused("lacks adapters/2/adapter_config.json; get the folder again")
    (copy / "state.json").unlink()
    refused("is no export: expected config.json and state.json")
    (copy / "state.json").write_text('{"format": 9, "files": {}}')
    refused(r"is no export of format 1: its state.json has format 9")
    config = json.loads((copy / "adapters/2/adapter_config.json").read_text())
    (copy / "adapters/2/adapter_config.json").write_text(json.dumps(config | {"r": 4}))
    refused("adapters/2/adapter_config.json has r 4, expected 12: it is of another run")
    data = bytearray((copy / tensors).read_bytes())
    (copy / tensors).write_bytes(bytes([*data, 0]))
    refused(rf"{tensors} is too long .{len(data) + 1} of {len(data)} bytes.; export the run again")
    data[-5] ^= 1
    (copy / tensors).write_bytes(data)
    refused(f"{tensors} is damaged .its checksum differs.; export the run again")
    forge(copy, **{tensors: b"no tensors"})
    refused("the adapter of node 3 is no safetensors file")
    found = load_file(copy / tensors)
    save_file({name: tensor[:1] for name, tensor in found.items()}, copy / tensors)
    forge(copy)
    refused("expected")
    (copy / "out").symlink_to(tmp_path)
    for name in ("../made/x", f"{tmp_path}/x", "out/x"):
        forge(copy, **{"topology.json": b"{}"})
        state = json.loads((copy / "state.json").read_text())
        (copy / "state.json").write_text(json.dumps(state | {"files": {name: [1, ""]}}))
        refused(f"is no export: its file '{name}' leads out of it")
        (copy / "out").symlink_to(tmp_path)
    state = json.loads((copy / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps(state | {"files": {"topology.json": 3}}))
    refused("its state.json says of topology.json 3, expected a size and a checksum")
    (copy / "state.json").write_text(json.dumps(state | {"step": "3"}))
    refused("its state.json lacks step or backbone_checksum")
    forge(copy, **{"topology.json": b"{}"})
    refused("topology.json is not that of config.json after 3 steps")
    other = save_model(make_model("llama"), tmp_path / "other")
    refused("has other weights .checksum", "--backbone", other)


def test_names_that_are_taken_or_empty_are_refused(call: Call, run: Path, export: Path, tmp_path: Path) -> None:
    assert_refused(call("export", run, "--out", tmp_path), "--out .* exists already; name a folder that does not")
    made = tmp_path / "made"
    made.mkdir()
    for taken in (made, run):
        assert_refused(call("import", export, "--run-dir", taken), "exists already; name another --run-dir$")
    assert_refused(call("import", run, "--run-dir", tmp_path / "new"), "is no export: expected config.json and state.json")
    (tmp_path / "file").write_text("")
    assert_refused(call("import", export, "--run-dir", tmp_path / "file/x"), "cannot be written")
    assert_refused(call("export", run, "--out", tmp_path / "file/x"), "--out .* cannot be written")
    bare = shutil.copytree(run, tmp_path / "bare")
    for best in bare.glob("checkpoints/best-*"):
        shutil.rmtree(best)
    assert_refused(call("export", bare, "--out", tmp_path / "x", "--best"), "holds no best checkpoint")

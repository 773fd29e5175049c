"""Settings: defaults, then TOML, then the command line; a wrong one is named together with what is right."""

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from paths import CONFIGS

from neuromas.compare.grid import load_grid
from neuromas.config import AdapterConfig, GrowthConfig, TaskConfig, TopologyConfig, TrainConfig
from neuromas.training.config_file import differences, from_json, load_toml, to_json


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    """Where a test writes its TOML."""
    return tmp_path / "run.toml"


def test_the_defaults_are_a_run_that_makes_sense() -> None:
    config = TrainConfig().check()
    assert config.topology.build().nodes == (1, 2, 3)
    assert (config.backbone, config.task.name, config.centring) == ("bundled", "navigate", "leave_one_out")
    assert (config.adapter.rank, config.adapter.budget, config.run_dir) == (None, None, None)


def test_toml_wins_over_the_defaults_and_leaves_the_rest(toml: Path) -> None:
    toml.write_text(
        'lr = 1\nrun_dir = "runs/a"\nnormalize = true\n'
        "[topology]\nedges = [[1, 2], [1, 3], [2, 3]]\n"
        '[adapter]\nrank = 4\ntarget_modules = ["q_proj", "v_proj"]\nscope = "suffix"\n'
        '[task]\nfile = "items.jsonl"\n'
    )
    assert load_toml(toml) == TrainConfig(
        lr=1.0,
        run_dir=Path("runs/a"),
        normalize=True,
        topology=TopologyConfig(edges=((1, 2), (1, 3), (2, 3))),
        adapter=AdapterConfig(rank=4, target_modules=("q_proj", "v_proj"), scope="suffix"),
        task=TaskConfig(file=Path("items.jsonl")),
    )
    assert isinstance(load_toml(toml).lr, float)


def test_an_unknown_key_lists_the_known_ones(toml: Path) -> None:
    toml.write_text("learning_rate = 0.1\n")
    with pytest.raises(ValueError, match="unknown key 'learning_rate'; known are ") as raised:
        load_toml(toml)
    known = str(raised.value).partition("known are ")[2].split(", ")
    assert known == sorted(field.name for field in dataclasses.fields(TrainConfig))
    assert str(toml) in str(raised.value)


def test_an_unknown_key_of_a_table_lists_the_known_ones_of_that_table(toml: Path) -> None:
    toml.write_text("[topology]\nwidth = [1]\n")
    known = "topology.edges, topology.roles, topology.skip, topology.vote, topology.widths"
    message = f"config {toml}: unknown key 'topology.width'; known are {known}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_toml(toml)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_steps = 1.5", "num_steps must be of type int, got 1.5"),
        ("num_steps = true", "num_steps must be of type int, got True"),
        ("lr = 'fast'", "lr must be of type float, got 'fast'"),
        ("lr = false", "lr must be of type float, got False"),
        ("normalize = 1", "normalize must be of type bool, got 1"),
        ("backbone = 3", "backbone must be of type str, got 3"),
        ("run_dir = 3", "run_dir must be of type Path, got 3"),
        (
            "centring = 'mean'",
            "centring must be one of ['leave_one_out', 'group_mean', 'ema', 'none'], got 'mean'",
        ),
        ("topology = 3", "topology must be a table, got 3"),
        ("topology.widths = 3", "topology.widths must be a list, got 3"),
        ("topology.widths = ['a']", "topology.widths must be of type int, got 'a'"),
        ("topology.edges = [[1, 2, 3]]", "topology.edges must be a list of 2, got [1, 2, 3]"),
        ("topology.edges = [1, 2]", "topology.edges must be a list, got 1"),
        ("adapter.rank = '8'", "adapter.rank must be of type int, got '8'"),
        ("adapter.target_modules = 'q_proj'", "adapter.target_modules must be a list, got 'q_proj'"),
    ],
)
def test_a_value_of_another_type_is_refused(toml: Path, text: str, message: str) -> None:
    toml.write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'config {toml}: {message}')}$"):
        load_toml(toml)


def test_a_file_that_is_not_toml_or_not_there_is_named(toml: Path) -> None:
    with pytest.raises(ValueError, match=f"^config {re.escape(str(toml))} cannot be read: No such file or directory$"):
        load_toml(toml)
    toml.write_text("lr = = 3")
    with pytest.raises(ValueError, match=rf"^config {re.escape(str(toml))} is not TOML: .*line 1"):
        load_toml(toml)
    toml.write_bytes(b"lr = \xff")
    with pytest.raises(ValueError, match=f"^config {re.escape(str(toml))} is not TOML: 'utf-8' codec"):
        load_toml(toml)


NAN = float("nan")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "--num-steps must be at least 1, got 0"),
        ({"examples_per_step": 0}, "--examples-per-step must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
        ({"tokens_per_micro_batch": 0}, "--tokens-per-micro-batch must be at least 1, got 0"),
        ({"eval_size": 0}, "--eval-size must be at least 1, got 0"),
        ({"validation_size": 0}, "--validation-size must be at least 1, got 0"),
        ({"save_every": 0}, "--save-every must be at least 1, got 0"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0, got -1"),
        ({"max_grad_norm": -0.5}, "--max-grad-norm must be at least 0, got -0.5"),
        ({"max_grad_norm": NAN}, "--max-grad-norm must be a finite number, got nan"),
        ({"eval_every": -1}, "--eval-every must be at least 0, got -1"),
        ({"kl_coef": -0.1}, "--kl-coef must be at least 0, got -0.1"),
        ({"kl_coef": NAN}, "--kl-coef must be a finite number, got nan"),
        ({"entropy_coef": -0.1}, "--entropy-coef must be at least 0, got -0.1"),
        ({"seed": -1}, "--seed must be at least 0, got -1"),
        ({"temperature": 0.0}, "--temperature must be at least 0.001 (training samples), got 0.0"),
        ({"lr": 0.0}, "--lr must be above 0 and at most 1e+30, got 0.0"),
        ({"lr": NAN}, "--lr must be a finite number, got nan"),
        ({"lr": float("inf")}, "--lr must be a finite number, got inf"),
        ({"adapter": AdapterConfig(alpha=float("inf"))}, "--adapter.alpha must be a finite number, got inf"),
        ({"growth": (GrowthConfig(noise=float("inf")),)}, "--growth.0.noise must be a finite number, got inf"),
        ({"num_steps": 10**6}, "--num-steps must be at most 999,999, got 1000000"),
        ({"max_new_tokens": 10**12 - 1}, "--max-new-tokens must be at most 999,999, got 999999999999"),
        ({"topology": TopologyConfig(widths=(10**9, 1))}, "--topology.widths must make at most 512 nodes, got 1,000,000,001"),
        (
            {"topology": TopologyConfig(edges=((1, 2), (2, 10**12)))},
            "--topology.edges must use node ids up to 512, got 1,000,000,000,000",
        ),
        (
            {"branches": 2, "centring": "group_mean"},
            "--centring must be leave_one_out, ema or none with --branches above 1 (the group's mean would scale each layer "
            "otherwise), got 'group_mean'",
        ),
        ({"final_lr": 1.1}, "--final-lr must be between 0 and 1, got 1.1"),
        ({"final_lr": -0.1}, "--final-lr must be between 0 and 1, got -0.1"),
        ({"group_size": 1}, "--group-size must be at least 2 with --centring leave_one_out, got 1"),
        ({"group_size": 1, "centring": "group_mean"}, "--group-size must be at least 2 with --centring group_mean, got 1"),
        ({"group_size": 1, "centring": "ema", "normalize": True}, "--group-size must be at least 2 with --normalize, got 1"),
        ({"group_size": 1, "credit": "replay"}, "--group-size must be at least 2 with --credit replay, got 1"),
        ({"group_size": 0, "credit": "own_critics"}, "--group-size must be at least 1 with --credit own_critics, got 0"),
        ({"group_size": 0, "centring": "none"}, "--group-size must be at least 1 with --centring none, got 0"),
        ({"prompt_date": "26 Jul 2024"}, "--prompt-date must be a date YYYY-MM-DD, got '26 Jul 2024'"),
        ({"prompt_date": "20240726"}, "--prompt-date must be a date YYYY-MM-DD, got '20240726'"),
        ({"adapter": AdapterConfig(rank=0)}, "--adapter.rank must be at least 1, got 0"),
        ({"adapter": AdapterConfig(budget=0)}, "--adapter.budget must be at least 1, got 0"),
        ({"adapter": AdapterConfig(alpha=0.0)}, "--adapter.alpha must be above 0, got 0.0"),
        ({"adapter": AdapterConfig(target_modules=())}, "--adapter.target_modules must be one or more module names, got ()"),
        (
            {"adapter": AdapterConfig(rank=1, budget=9)},
            "--adapter.rank and --adapter.budget exclude each other; give one of them",
        ),
        ({"topology": TopologyConfig(widths=(1, 2))}, "--topology.widths must end in 1 (one output node), got [1, 2]"),
        (
            {"topology": TopologyConfig(edges=((1, 2),), widths=(2, 1))},
            "--topology.edges takes the place of widths and skip, got it and --topology.widths [2, 1]; leave one of them out",
        ),
        (
            {"topology": TopologyConfig(edges=((1, 2),), skip=True)},
            "--topology.edges takes the place of widths and skip, got it and --topology.skip; leave one of them out",
        ),
        (
            {"topology": TopologyConfig(edges=((1, 2), (2, 1)))},
            "--topology.edges must not form a cycle; nodes [1, 2] wait for each other",
        ),
    ],
)
def test_check_names_the_flag_that_makes_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        TrainConfig(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"warmup_steps": 0, "max_grad_norm": 0.0, "eval_every": 0, "seed": 0},
        {"group_size": 1, "centring": "none"},
        {"group_size": 1, "centring": "ema"},
        {"group_size": 2},
        {"final_lr": 0.0},
        {"final_lr": 1.0},
    ],
)
def test_check_lets_the_smallest_sensible_values_pass(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings)
    assert config.check() is config


def test_edges_take_the_place_of_widths() -> None:
    topology = TopologyConfig(edges=((1, 3), (2, 3))).build()
    assert (topology.nodes, topology.edges) == ((1, 2, 3), ((1, 3), (2, 3)))


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(
            topology=TopologyConfig(edges=((1, 2), (2, 3))),
            task=TaskConfig(file=Path("a/b.json")),
            adapter=AdapterConfig(budget=10**6, alpha=16.0, scope="suffix"),
            run_dir=Path("runs/x"),
            centring="ema",
        ),
    ],
)
def test_json_round_trip(config: TrainConfig) -> None:
    text = to_json(config)
    assert from_json(text, "config.json") == config
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lr": 1', "config.json is damaged: not JSON (Expecting ',' delimiter: line 1 column 9 (char 8))"),
        ("[]", "config.json must be a JSON object, got []"),
    ],
)
def test_json_that_is_damaged_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_json(text, "config.json")


def test_differences_name_what_changes_a_run_and_nothing_else() -> None:
    stored = TrainConfig(lr=0.1, topology=TopologyConfig(widths=(2, 1)))
    assert differences(stored, stored) == ""
    assert differences(stored, dataclasses.replace(stored, run_dir=Path("x"), device="cpu", save_every=3)) == ""
    given = dataclasses.replace(stored, lr=0.2, topology=TopologyConfig(widths=(1, 1)))
    assert differences(stored, given) == "topology.widths = (2, 1) (got (1, 1)), lr = 0.1 (got 0.2)"


def test_a_run_is_named_after_task_shape_and_seed() -> None:
    assert TrainConfig(seed=7).run_path == Path("runs/navigate-1-1-1-seed7")
    assert TrainConfig(topology=TopologyConfig(edges=((1, 2),))).run_path == Path("runs/navigate-edges-seed0")
    assert TrainConfig(run_dir=Path("here")).run_path == Path("here")


def test_settings_are_read_without_loading_torch() -> None:
    code = "import sys, neuromas.config, neuromas.cli.main; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_config_of_the_repository_loads_and_makes_sense() -> None:
    paths = sorted(CONFIGS.glob("*.toml"))
    assert paths, f"no TOML file in {CONFIGS}"
    for path in paths:
        # Comparison files are grids of many configs.
        if "methods" in tomllib.loads(path.read_text()):
            assert load_grid(path).cells
        else:
            load_toml(path).check()

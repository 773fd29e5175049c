"""Training from Python: the call that programs make is the command line's own."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import neuromas
from neuromas import TopologyConfig, TrainConfig


def test_a_program_trains_resumes_and_loads_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    config = TrainConfig(
        topology=TopologyConfig(widths=(1, 1)), num_steps=1, examples_per_step=1, group_size=2, max_new_tokens=4, eval_size=2,
        eval_every=0, run_dir=path,
    )  # fmt: skip
    scores = neuromas.train(config)
    assert {when: list(by_set) for when, by_set in scores.items()} == {"before": ["test"], "after": ["test"]}
    with pytest.raises(ValueError, match=r"^--run-dir .* exists already; continue it with --resume"):
        neuromas.train(config)
    assert neuromas.train(config, resume=True) == scores
    assert neuromas.load_run(str(path)).step == 1


def test_a_program_is_told_what_is_wrong_before_anything_is_made(tmp_path: Path) -> None:
    config = TrainConfig(run_dir=tmp_path / "run")
    for wrong, said in ((replace(config, lr=-1.0), "^--lr must be"), (replace(config, backbone="nowhere"), "--backbone")):
        with pytest.raises(ValueError, match=said):
            neuromas.train(wrong)
    assert not (tmp_path / "run").exists()


def test_help_and_mistakes_do_not_wait_for_what_training_needs() -> None:
    heavy = "sorted({'torch', 'scipy', 'matplotlib', 'transformers'} & set(sys.modules))"
    program = f"import sys, neuromas.cli.train; from neuromas import TrainConfig, train; print({heavy})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

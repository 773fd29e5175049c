"""Export a team, load one node's adapter with plain PEFT, and compare the log-probabilities of what that node has said.

    python examples/adapters_in_peft.py       # needs peft: pip install peft

Takes 12 seconds of one CPU core.
Prints that log-probabilities are at most 1e-06 to 4e-06 apart, for each of three nodes. Two steps on four questions teach
nothing: accuracy is 50% before and after (n 4), at the floor.
"""

import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from neuromas import load_run
from neuromas.bundled import BUNDLED
from neuromas.cli import main as neuromas

steps = sys.argv[1] if len(sys.argv) > 1 else "2"


def run(*arguments: str) -> None:
    sys.argv = ["neuromas", *arguments]
    neuromas.main()


shutil.rmtree("runs/of-this-example", ignore_errors=True)
size = ("--examples-per-step", "4", "--group-size", "4", "--eval-size", "4", "--eval-every", "0")
run("train", "--resume", "--num-steps", steps, *size, "--run-dir", "runs/to-export")
run("export", "runs/to-export", "--out", "runs/of-this-example")
loaded = load_run(Path("runs/to-export"))
((rollout,),) = loaded.network.rollout(loaded.task.examples("test", 1), 1, seed=("peft",))
for completion in rollout.completions:
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype="float32")
    model = PeftModel.from_pretrained(model, f"runs/of-this-example/adapters/{completion.node}").eval()
    prompt, written = [*completion.prompt.prefix_ids, *completion.prompt.suffix_ids], list(completion.sample.token_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
    plain = logits.log_softmax(-1)[range(len(written)), written]
    gap = (plain - torch.tensor(completion.sample.logprobs)).abs().max().item()
    print(f"node {completion.node}: {len(written)} tokens, log-probabilities at most {gap:.0e} apart")

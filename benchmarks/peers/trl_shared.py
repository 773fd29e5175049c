"""A trainer of TRL held at its steps: the loop runs in a thread of its own and does one step whenever it is asked to."""

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.peers.common import prepare, score
from benchmarks.peers.protocol import Work

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Gate(TrainerCallback):
    """Lets a step begin when it is asked for and says when it has ended."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.over = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.go.acquire()
        if self.over:
            # Ends the thread, which would keep the model.
            raise SystemExit

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done.release()


class StepWork:
    """One optimizer step: questions, rollouts by transformers.generate, rewards, update of one LoRA adapter."""

    def __init__(self, spec: dict[str, Any], trainer_class: Any, config_class: Any) -> None:
        prepare(spec)
        self.rows, self.new = spec["questions"] * spec["group"], spec["new"]
        at_once = min(self.rows, spec["rows_per_micro_batch"])
        config = config_class(
            output_dir=tempfile.mkdtemp(prefix="trl-"), per_device_train_batch_size=at_once,
            gradient_accumulation_steps=self.rows // at_once, num_generations=spec["group"], max_completion_length=self.new,
            generation_kwargs={"min_new_tokens": self.new}, temperature=1.0, top_k=0, top_p=1.0, beta=0.0, max_steps=10**6,
            learning_rate=spec["lr"], use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", logging_strategy="no", disable_tqdm=True, shuffle_dataset=False,
        )  # fmt: skip
        steps = json.loads(Path(spec["data"]).read_text())["prompts"]
        prompts = [[{"role": "user", "content": question[0]}] for questions in steps for question in questions]
        tokenizer: Any = AutoTokenizer.from_pretrained(spec["model_folder"])
        model: Any = AutoModelForCausalLM.from_pretrained(spec["model_folder"], dtype=getattr(torch, spec["dtype"]))
        self.gate = _Gate()
        lora = LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
        self.trainer = trainer_class(
            model=model, reward_funcs=_reward, args=config, train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer, peft_config=lora, callbacks=[self.gate],
        )  # fmt: skip
        self.failure: list[BaseException] = []
        # The thread is handed what it needs and not this object, which could then never go.
        threading.Thread(target=_train, args=(self.trainer, self.gate, self.failure), daemon=True).start()

    def run(self) -> int:
        self.gate.go.release()
        self.gate.done.acquire()
        if self.failure:
            raise self.failure[0]
        # What it sampled by its own account: a text that stopped early would show.
        return round(self.trainer._metrics["train"]["completions/mean_length"][-1] * self.rows)

    def check(self) -> dict[str, Any]:
        return {}

    def __del__(self) -> None:
        self.gate.over = True
        self.gate.go.release()


def _train(trainer: Any, gate: _Gate, failure: list[BaseException]) -> None:
    try:
        trainer.train()
    except BaseException as error:  # told to whoever waits for the step
        failure.append(error)
        gate.done.release()


def _reward(completions: list[Any], **_: Any) -> list[float]:
    return [score(completion[0]["content"]) for completion in completions]


def make(spec: dict[str, Any], trainer_class: Any, config_class: Any) -> Work:
    assert spec["widths"] == [1], "one agent"
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return StepWork(spec, trainer_class, config_class)

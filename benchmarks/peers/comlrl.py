"""CoMLRL's MAREINFORCE: as many agents as nodes, each a whole model; they act at once and do not read each other."""

import json
from pathlib import Path
from typing import Any

import torch
from comlrl.trainers.reinforce import MAREINFORCEConfig, MAREINFORCETrainer  # type: ignore[reportMissingImports]  # in its own environment
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.common import prepare, score
from benchmarks.peers.protocol import Work, serve


class StepWork:
    """One epoch over a step's questions with one update of every agent at its end.

    Prompts are those of our nodes without messages, which makes them shorter than ours: a difference in its favour.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        prepare(spec)
        self.steps = json.loads(Path(spec["data"]).read_text())["prompts"]
        self.agents, self.done, self.new = sum(spec["widths"]), 0, spec["new"]
        self.tokens = spec["questions"] * spec["group"] * self.agents * self.new
        tokenizer: Any = AutoTokenizer.from_pretrained(spec["model_folder"])
        models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(spec["model_folder"], dtype=getattr(torch, spec["dtype"]))
            for _ in range(self.agents)
        ]
        config = MAREINFORCEConfig(
            num_train_epochs=1, agent_learning_rate=spec["lr"], num_agents=self.agents, agent_devices="cpu",
            num_generations=spec["group"], max_new_tokens=self.new, temperature=1.0, top_p=1.0, top_k=0, num_turns=1,
            eval_interval=0, rollout_buffer_size=spec["questions"], train_batch_size=spec["questions"],
        )  # fmt: skip
        self.trainer = MAREINFORCETrainer(
            agents=models, num_agents=self.agents, tokenizer=tokenizer, train_dataset=self._dataset(tokenizer, 0),
            reward_func=_reward, formatters=[_formatter(agent) for agent in range(self.agents)], args=config,
        )  # fmt: skip
        self.tokenizer = tokenizer

    def _dataset(self, tokenizer: Any, step: int) -> Dataset:
        def prompt(content: str) -> str:
            message = [{"role": "user", "content": content}]
            return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

        questions = self.steps[step % len(self.steps)]
        return Dataset.from_list([{"prompt": "", **{f"agent{i}": prompt(c) for i, c in enumerate(q)}} for q in questions])

    def run(self) -> int:
        self.trainer.train_dataset = self._dataset(self.tokenizer, self.done)
        self.done += 1
        # Further arguments go to transformers.generate: no text ends before its length.
        self.trainer.train(min_new_tokens=self.new)
        return self.tokens

    def check(self) -> dict[str, Any]:
        return {}


def _formatter(agent: int) -> Any:
    def prompt(item: dict[str, Any]) -> str:
        return item[f"agent{agent}"]

    return prompt


def _reward(*completions: list[str], **_: Any) -> list[float]:
    # The last agent answers.
    return [score(text) for text in completions[-1]]


def setup(spec: dict[str, Any]) -> Work:
    return StepWork(spec)


if __name__ == "__main__":
    serve(setup)

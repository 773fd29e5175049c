"""Which engine samples and which one learns: the settings, and what each engine keeps of a run's promises. Imports no torch."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

EngineName = Literal["torch", "vllm", "tinker"]
Mismatch = Literal["stop", "weight"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Promises:
    """What a run with an engine keeps of what runs in one process promise."""

    exact_resume: bool
    """A killed run that goes on ends with the same adapters, bit for bit."""
    common_draws: bool
    """A draw depends on (run seed, step, example, rollout, node) alone."""
    exact_growth: bool
    """A grown network whose new nodes are closed writes what its parent writes, token by token."""
    shared_prefixes: bool
    """With --adapter.scope suffix a question is computed once for all nodes, in sampling and in learning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineEntry:
    """One choice of `--engine`."""

    samples: str
    learns: str
    keeps: Promises


COLDEST_OF_VLLM = 0.01
_NAMES = {
    "exact_resume": "bit-exact resume",
    "common_draws": "common random numbers",
    "exact_growth": "closed growth identical token by token",
    "shared_prefixes": "prefixes shared over nodes",
}
ALPHA = 32.0
"""LoRA's alpha in every Tinker service; the interface has no argument for it."""
ENGINES: dict[EngineName, EngineEntry] = {
    "torch": EngineEntry(
        samples="torch", learns="torch",
        keeps=Promises(exact_resume=True, common_draws=True, exact_growth=True, shared_prefixes=True),
    ),
    "vllm": EngineEntry(
        samples="vllm", learns="torch",
        keeps=Promises(exact_resume=False, common_draws=True, exact_growth=False, shared_prefixes=False),
    ),
    "tinker": EngineEntry(
        samples="tinker", learns="tinker",
        keeps=Promises(exact_resume=False, common_draws=False, exact_growth=False, shared_prefixes=False),
    ),
}  # fmt: skip
"""docs/engines.md says why each is as it is."""


def describe_engine(name: EngineName, device: str = "cpu") -> str:
    """Return one line: who samples, who learns, and which promises hold on a kind of device."""
    entry = ENGINES[name]
    kept = dataclasses.asdict(entry.keeps)
    same = entry.samples == entry.learns
    who = f"{entry.samples} samples and learns" if same else f"{entry.samples} samples, {entry.learns} learns"
    names = _NAMES | ({"exact_resume": "bit-exact resume (on a GPU: not tried)"} if device == "cuda" else {})
    held = ", ".join(text for key, text in names.items() if kept[key])
    broken = ", ".join(text for key, text in _NAMES.items() if not kept[key])
    return f"engine {name}: {who}; kept: {held or 'none'}" + (f"; not kept: {broken} (docs/engines.md)" if broken else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Who samples and who learns."""

    name: Annotated[EngineName, tyro.conf.arg(aliases=["--engine"])] = "torch"
    """`torch` samples and learns in this process. `vllm` (extra) samples, all nodes' adapters in one batch, torch learns. With
    `tinker` (extra) a service that speaks the Tinker API samples and learns."""
    logprob_bound: float | None = None
    """With another engine than torch: the largest difference in nats between a token's log-probability as sampled and as the
    learner recomputes it. None: 0.01 in float32, 1 in bfloat16."""
    mismatch: Mismatch = "stop"
    """What becomes of a step beyond that bound: `stop` ends the run. `weight` has no bound, and weighs each token of every step
    by the ratio of its two probabilities, at most 2; so do all runs in bfloat16."""
    url: str | None = None
    """Address of the service, e.g. http://127.0.0.1:8000, with --engine tinker; a key that it asks for is in TINKER_API_KEY."""
    base_model: str | None = None
    """What the service calls the backbone. None: its name here, the folder where it is bundled."""

    def faults(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is wrong with these settings, or with those of a run that has them."""
        if self.logprob_bound is not None and self.logprob_bound <= 0:
            yield f"--engine.logprob_bound must be above 0, got {self.logprob_bound}"
        if self.name == "torch":
            for key in ("logprob_bound", "mismatch", "url", "base_model"):
                if (got := getattr(self, key)) != getattr(EngineConfig(), key):
                    yield f"--engine.{key} must be left out with --engine torch, which samples as it learns, got {got!r}"
            return
        scope, temperature, rounds = settings["adapter"].scope, settings["temperature"], settings["society"].rounds
        if scope != "all":
            yield f"--adapter.scope must be all with --engine {self.name}, which adapts every token, got {scope!r}"
        if self.name == "vllm" and temperature < COLDEST_OF_VLLM:
            yield f"--temperature must be at least {COLDEST_OF_VLLM} with --engine vllm, its coldest, got {temperature}"
        if rounds:
            yield f"--engine must be torch for a society (society.rounds {rounds}), got {self.name!r}"
        if self.name == "tinker":
            yield from self._faults_of_service(settings)

    def _faults_of_service(self, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield what in the settings of a run no service that learns can do."""
        if not self.url:
            yield "--engine.url must be the address of a service with --engine tinker, e.g. http://127.0.0.1:8000, got None"
        copies = [start for growth in settings["growth"] for start in growth.start if "copy" in start]
        checks = (
            ("--temperature", settings["temperature"], 1.0, "gives log-probabilities of untempered logits"),
            ("--max-grad-norm", settings["max_grad_norm"], 0.0, "clips gradients in one service and silently not in another"),
            ("--entropy-coef", settings["entropy_coef"], 0.0, "has no loss with an entropy"),
            ("--adapter.alpha", settings["adapter"].alpha, ALPHA, "fixes it there"),
            ("growth.start", copies[0] if copies else "zero", "zero", "cannot be given an adapter to begin with"),
        )
        for flag, got, needed, why in checks:
            if got != needed:
                yield f"{flag} must be {needed} with --engine tinker, which {why}, got {got}"

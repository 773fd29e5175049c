"""A Tinker-API service learns: each node's client gets its own node's texts, and does its optimizer step there.

The service's weights are the run's. The policy's bank is a copy of them, brought up to date for each checkpoint, so that the
run directory holds PEFT adapters that every other command reads. Of the optimizer's state a checkpoint holds the service's
paths.

The loss is `importance_sampling`: - sum over tokens of advantage * p / p_sampled. Its gradient is that of `reinforce.loss`
where sampler and learner agree. Services reduce it over tokens and rows in one of `REDUCTIONS`. `inspect` measures in which
one before training, and advantages are scaled so that what the service differentiates is `reinforce.loss`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torch.nn import Parameter

from neuromas.config import TrainConfig
from neuromas.model.backbone import folder_of
from neuromas.model.policy import Policy
from neuromas.rollout.engine import Engine, EngineFault
from neuromas.rollout.network import Diverged
from neuromas.rollout.tinker_engine import TinkerEngine
from neuromas.rollout.tinker_service import ATTENTION, MLP, Exported, LoraShape, TinkerService
from neuromas.training import reinforce
from neuromas.training.learner import Learner, Update, check_gap
from neuromas.training.reinforce import Advantage, Credits
from neuromas.types import Completion

REDUCTIONS = {"token_sum": 2.0, "row_mean": 0.75}
"""How a service reduces the loss: `token_sum` is the interface's contract, `row_mean` divides by each row's tokens, prompts
among them, and by the rows (SkyRL's JAX backend). The number is the gradient of a row together with one that has as many
tokens again behind it, with advantages of 0, over the gradient of the row alone."""
NO_CLIPPING = 1e12
"""The hosted service reports gradient norms only if it is asked to clip; SkyRL reports them always, and never clips."""
PROBED = 8
"""Tokens that the probes predict."""


class TinkerLearner:
    """AdamW in the clients of a service. `inspect` comes before all else."""

    def __init__(self, policy: Policy, config: TrainConfig, service: TinkerService) -> None:
        assert policy.adapters is not None
        self.policy, self.config, self.bank, self.service = policy, config, policy.adapters, service
        self.reduction = "token_sum"
        self._saved: tuple[int, dict[str, Tensor]] | None = None
        """The version of the adapters that was saved last, and the state."""

    def inspect(self) -> None:
        """Check that the service trains this backbone with such adapters, and find out how it reduces the loss.

        All this is done with a client that serves nothing else. Raises EngineFault if it does not fit.
        """
        probe = self.service.new_client("probe")
        self._check_adapter(self.service.export(probe))
        ids = self.policy.backbone.tokenize("A probe of the same tokens, read by both.")[: PROBED + 1]
        row = self._datum(ids, {})
        logprobs = self._logprobs(
            self.service.call("scores a probe", lambda: probe.forward([row], "importance_sampling").result())
        )
        self._check_backbone(ids, logprobs[0])
        scored = {index: (1.0, logprob) for index, logprob in enumerate(logprobs[0], 1)}
        # More tokens after the row's own leave its gradient as it is.
        longer = self._datum([*ids, *ids[1:]], scored)
        alone = self._gradient_norm(probe, [self._datum(ids, scored)])
        both = self._gradient_norm(probe, [self._datum(ids, scored), longer])
        self.reduction = reduction_of(both / alone, self.service.url)

    def update(self, credits: Credits, *, learning: Collection[int], lr: float) -> Update:
        service, routing = self.service, self.policy.routing
        batch = reinforce.build_batch(credits, routing=routing, adapter_version=self.policy.version, temperature=1.0)
        texts: dict[int, list[tuple[Completion, Advantage]]] = {}
        for text in batch.completions:
            if text[0].node in learning:
                texts.setdefault(routing.nodes[routing.adapter_of(text[0].node)], []).append(text)
        data = {node: [self._row(*text, len(own), batch.num_rollouts) for text in own] for node, own in texts.items()}
        answers = service.together(
            "learns",
            {node: lambda node=node, rows=rows: service.client(node).forward_backward(rows, "importance_sampling").result()
             for node, rows in data.items()},
        )  # fmt: skip
        loss = gap = 0.0
        for node, answer in answers.items():
            for (completion, advantage), logprobs in zip(texts[node], self._logprobs(answer), strict=True):
                learned = [logprobs[index - 1] for index in _sampled(completion)]
                for weight, now, then in zip(
                    reinforce.per_token(completion, advantage), learned, completion.sample.logprobs, strict=True
                ):
                    loss -= weight * now / batch.num_rollouts
                    gap = max(gap, abs(now - then)) if math.isfinite(now) else math.inf
        try:
            if not math.isfinite(loss + gap):
                raise Diverged(f"the loss is {loss:g}, the largest log-probability gap {gap:g}")
            check_gap(self.config, self.policy, gap)
        except (Diverged, EngineFault):
            # SkyRL keeps the gradient of a client that is gone, and adds it to that of the next one in its place.
            service.together(
                "clears gradients", {node: lambda node=node: self._step(service.client(node), 0.0) for node in data}
            )
            raise
        norms = service.together("steps", {node: lambda node=node: self._step(service.client(node), lr) for node in data})
        service.changed(data)
        self.bank.version += 1
        return Update(loss, gap if data else None, {node: norms.get(node, 0.0) for node in self.bank.nodes})

    def add_nodes(self, parameters: Sequence[Parameter]) -> None:
        """Do nothing: a node's client is created when it first samples."""

    def state(self) -> dict[str, Tensor]:
        """Have the service save every client; return its paths, as bytes, and bring the policy's bank up to date."""
        version, nodes = self.bank.version, self.bank.nodes
        if self._saved is None or self._saved[0] != version:
            clients = {node: self.service.client(node) for node in nodes}
            saved = self.service.together(
                "saves its state",
                {node: lambda client=client: client.save_state(f"step-{version:06d}").result().path
                 for node, client in clients.items()},
            )  # fmt: skip
            for node, client in clients.items():
                self._take_over(node, self.service.export(client))
            self._saved = version, {
                f"{node}.path": torch.tensor(list(path.encode()), dtype=torch.uint8) for node, path in saved.items()
            }  # fmt: skip
        return self._saved[1]

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for node in self.bank.nodes:
            self.service.restore(node, bytes(state[f"{node}.path"].tolist()).decode())

    def _row(self, completion: Completion, advantage: Advantage, rows: int, num_rollouts: int) -> Any:
        """Return a text as the service takes it, one of so many in a call, its advantages scaled for `reduction`."""
        sample, prompt = completion.sample, completion.prompt
        ids = [*prompt.prefix_ids, *prompt.suffix_ids, *sample.token_ids]
        scale = 1 / num_rollouts if self.reduction == "token_sum" else (len(ids) - 1) * rows / num_rollouts
        weights = reinforce.per_token(completion, advantage)
        return self._datum(
            ids,
            {index: (scale * weight, logprob)
             for index, weight, logprob in zip(_sampled(completion), weights, sample.logprobs, strict=True)},
        )  # fmt: skip

    def _datum(self, ids: Sequence[int], learned: Mapping[int, tuple[float, float]]) -> Any:
        """Return tokens of which those at the keys are learned, with their advantages and sampled log-probabilities."""
        sdk = self.service.sdk
        # The token at an index is predicted at the one before it.
        weights, logprobs = ([learned.get(index, (0.0, 0.0))[part] for index in range(1, len(ids))] for part in (0, 1))
        inputs = {"target_tokens": list(ids[1:]), "logprobs": logprobs, "advantages": weights}
        return sdk.Datum(model_input=sdk.ModelInput.from_ints(list(ids[:-1])), loss_fn_inputs=inputs)

    def _logprobs(self, answer: Any) -> list[list[float]]:
        """Return the log-probability of every token of each row but its first."""
        return [list(output["logprobs"].data) for output in answer.loss_fn_outputs]

    def _step(self, client: Any, lr: float) -> float:
        """Do an optimizer step and return the gradient's norm."""
        params = self.service.sdk.AdamParams(
            learning_rate=lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, grad_clip_norm=NO_CLIPPING
        )
        metrics = client.optim_step(params).result().metrics or {}
        norms = [value for name, value in metrics.items() if "grad_norm" in name or "grad_l2" in name]
        if len(norms) != 1:
            raise ValueError(f"its step names no gradient norm among {sorted(metrics)}, by which the loss is known to be ours")
        return norms[0]

    def _gradient_norm(self, client: Any, rows: Sequence[Any]) -> float:
        """Return the norm of a gradient, which changes no weight. The rows come in calls of their own, as those of a large
        batch do, so that a service that compiles does so for one shape."""
        for row in rows:
            self.service.call("learns a probe", lambda row=row: client.forward_backward([row], "importance_sampling").result())
        return self.service.call("steps on a probe", lambda: self._step(client, 0.0))

    def _check_adapter(self, exported: Exported) -> None:
        """Raise EngineFault unless the service's adapters have the rank, the alpha and the modules of the bank's."""
        url, bank, config = self.service.url, self.bank, exported.config
        for key, ours in (("r", bank.rank), ("lora_alpha", bank.alpha)):
            if config.get(key) != ours:
                raise EngineFault(f"the service at {url} trains adapters with {key} {config.get(key)}, --adapter has {ours:g}")
        files = bank.peft_files(bank.nodes[0], "")
        theirs, own = _shapes(exported.tensors), _shapes(files["adapter_model.safetensors"])
        if theirs != own:
            other = sorted(theirs.items() ^ own.items())[0]
            raise EngineFault(
                f"the service at {url} trains other modules than --adapter.target-modules names, first {other[0]} of shape "
                f"{other[1]}; SkyRL trains all linear layers whatever is asked for"
            )

    def _check_backbone(self, ids: Sequence[int], theirs: Sequence[float]) -> None:
        """Raise EngineFault unless the service's model gives tokens the log-probabilities that the backbone gives them."""
        model = self.policy.backbone.model
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(ids[:-1])], device=self.policy.backbone.device)).logits[0].float()
        ours = logits.log_softmax(-1)[range(len(ids) - 1), list(ids[1:])].tolist()
        gap = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        try:
            check_gap(self.config, self.policy, gap)
        except EngineFault as fault:
            raise EngineFault(
                f"{self.service.shape.base_model!r} at {self.service.url} is another model than --backbone "
                f"{self.config.backbone}, or rounds otherwise: {fault}"
            ) from fault

    def _take_over(self, node: int, exported: Exported) -> None:
        self.bank.load_tensors(node, load_tensors(exported.tensors), f"of node {node} at {self.service.url}")


def plug_service(config: TrainConfig, policy: Policy) -> tuple[Engine, Learner]:
    """Return an engine and a learner in a service that fits a policy; ValueError says what does not."""
    assert policy.adapters is not None
    bank, settings = policy.adapters, config.engine
    modules = frozenset(bank.target_modules)
    if modules not in (ATTENTION, MLP, ATTENTION | MLP):
        raise ValueError(
            f"--adapter.target_modules must be {' '.join(sorted(ATTENTION))}, {' '.join(sorted(MLP))}, or both with --engine "
            f"tinker, which names no single modules, got {' '.join(sorted(modules))}"
        )
    base_model = settings.base_model or folder_of(config.backbone)
    shape = LoraShape(base_model=base_model, rank=bank.rank, target_modules=bank.target_modules, seed=config.seed)
    service = TinkerService(settings.url or "", shape)
    learner = TinkerLearner(policy, config, service)
    learner.inspect()
    return TinkerEngine(policy, service), learner


def reduction_of(ratio: float, url: str) -> str:
    """Return the reduction with this ratio of two gradients; EngineFault if it is none of `REDUCTIONS`."""
    for name, expected in REDUCTIONS.items():
        if math.isclose(ratio, expected, rel_tol=0.02):
            return name
    known = ", ".join(f"{value:.3g} ({name})" for name, value in REDUCTIONS.items())
    raise EngineFault(
        f"the service at {url} reduces the loss in a way that is not known: a row and a longer copy of it have {ratio:.3g} "
        f"times the gradient of the row alone; expected {known}"
    )


def _sampled(completion: Completion) -> list[int]:
    """Return the indices of a text's sampled tokens in its prompt and text."""
    asked = len(completion.prompt.prefix_ids) + len(completion.prompt.suffix_ids)
    given = set(completion.sample.given)
    return [asked + index for index in range(len(completion.sample.token_ids)) if index not in given]


def _shapes(tensors: bytes) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_tensors(tensors).items()}

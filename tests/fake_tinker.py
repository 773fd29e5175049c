"""A Tinker service in this process: what is used of the client's interface, over the torch engine and plain autograd.

Every client is a policy of one node on the backbone. It shows the flow; what real services do, `test_tinker_service.py` shows.
"""

import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import torch

from neuromas.config import AdapterConfig
from neuromas.model.backbone import Backbone
from neuromas.model.policy import Policy
from neuromas.rollout.torch_engine import TorchEngine
from neuromas.types import Prompt, Request, Sample


@dataclass
class FakeTinker:
    """Stands for the module `tinker` and for the service. `model` is what the service calls its backbone."""

    backbone: Backbone
    model: str
    url: str
    reduction: str = "token_sum"
    alpha: float = 32.0
    most_rank: int = 8
    modules: tuple[str, ...] = AdapterConfig().target_modules
    metrics: tuple[str, ...] = ("skyrl.ai/grad_norm",)
    states: dict[str, Any] = field(default_factory=dict)
    archives: dict[str, bytes] = field(default_factory=dict)
    clients: "list[FakeClient]" = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    """Parameters of every text that was asked for."""

    def ServiceClient(self, base_url: str, api_key: str) -> "FakeTinker":  # as the package calls it
        return self

    def Datum(self, model_input: list[int], loss_fn_inputs: dict[str, list[Any]]) -> Any:
        return SimpleNamespace(ids=model_input, **loss_fn_inputs)

    ModelInput = SimpleNamespace(from_ints=list)
    SamplingParams = AdamParams = SimpleNamespace

    def get_server_capabilities(self) -> Any:
        return SimpleNamespace(supported_models=[SimpleNamespace(model_name=self.model)])

    def create_rest_client(self) -> "FakeTinker":
        return self

    def create_lora_training_client(self, base_model: str, rank: int, seed: int, **trained: bool) -> "FakeClient":
        if rank > self.most_rank:
            raise ValueError(f"LoRA rank {rank} must be between 1 and {self.most_rank}")
        self.clients.append(FakeClient(self, len(self.clients), rank, seed))
        return self.clients[-1]

    def create_training_client_from_state_with_optimizer(self, path: str) -> "FakeClient":
        if path not in self.states:
            raise ValueError("Error code: 404 - {'detail': 'Checkpoint not found'}")
        weights, optimizer, rank = self.states[path]
        client = self.create_lora_training_client("", rank, seed=0)
        client.put(weights)
        client.optimizer.load_state_dict(optimizer)
        return client

    def get_checkpoint_archive_url(self, run: str, checkpoint: str) -> "Future[Any]":
        return done(SimpleNamespace(url=f"{self.url}/archive/{run}/{checkpoint}"))


class FakeClient:
    """A training client: a policy of one node with an optimizer."""

    def __init__(self, service: FakeTinker, number: int, rank: int, seed: int) -> None:
        self.service, self.number, self.rank = service, number, rank
        adapter = AdapterConfig(rank=rank, alpha=service.alpha, target_modules=service.modules)
        self.policy = Policy(service.backbone, (0,), adapter, seed)
        assert self.policy.adapters is not None
        self.bank = self.policy.adapters
        self.optimizer = torch.optim.AdamW(self.bank.parameters().values(), weight_decay=0.0)
        self.rows = 0
        self.gradient: dict[str, torch.Tensor] = {}
        """That of the last step."""
        self.sampling: FakeClient | None = None
        """Another one, which takes on the weights that are sampled from."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.bank.parameters().items()}

    def put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.bank.parameters().items():
            parameter.data.copy_(weights[name])

    def forward(self, data: list[Any], loss_fn: str) -> "Future[Any]":
        assert loss_fn == "importance_sampling"
        outputs = []
        for row in data:
            ids, targets = torch.tensor([row.ids]), torch.tensor(row.target_tokens)
            with self.bank.routed(torch.zeros(len(targets), dtype=torch.long)):
                logprobs = self.policy.model(input_ids=ids).logits[0].log_softmax(-1)[range(len(targets)), targets]
            outputs.append({"logprobs": SimpleNamespace(data=logprobs.tolist(), tensor=logprobs)})
        return done(SimpleNamespace(loss_fn_outputs=outputs))

    def forward_backward(self, data: list[Any], loss_fn: str) -> "Future[Any]":
        answer = self.forward(data, loss_fn)
        for row, output in zip(data, answer.result().loss_fn_outputs, strict=True):
            logprobs = output["logprobs"].tensor
            loss = -((logprobs - torch.tensor(row.logprobs)).exp() * torch.tensor(row.advantages)).sum()
            (loss / (len(row.ids) if self.service.reduction != "token_sum" else 1)).backward()
        self.rows += len(data)
        return answer

    def optim_step(self, params: Any) -> "Future[Any]":
        grads = {name: parameter.grad for name, parameter in self.bank.parameters().items() if parameter.grad is not None}
        for grad in grads.values():
            grad /= self.rows if self.service.reduction == "row_mean" else 1
        self.gradient = {name: grad.clone() for name, grad in grads.items()}
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
        self.optimizer.param_groups[0]["lr"] = params.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rows = 0
        return done(SimpleNamespace(metrics=dict.fromkeys(self.service.metrics, norm)))

    def save_state(self, name: str) -> "Future[Any]":
        path = f"tinker://run-{self.number}/weights/{name}"
        optimizer = {**self.optimizer.state_dict()}
        optimizer["state"] = {i: {k: v.clone() for k, v in of.items()} for i, of in optimizer["state"].items()}
        self.service.states[path] = self.weights(), optimizer, self.rank
        return done(SimpleNamespace(path=path))

    def save_weights_for_sampler(self, name: str) -> "Future[Any]":
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as files:
            for file, content in self.bank.peft_files(0, self.service.model).items():
                member = tarfile.TarInfo(f"./{file}")
                member.size = len(content)
                files.addfile(member, io.BytesIO(content))
        self.service.archives[f"run-{self.number}/{name}"] = archive.getvalue()
        return done(SimpleNamespace(path=f"tinker://run-{self.number}/{name}"))

    def save_weights_and_get_sampling_client(self) -> "FakeSampler":
        if self.sampling is None:
            self.sampling = FakeClient(self.service, self.number, self.rank, seed=0)
        return FakeSampler(self.sampling, self.weights())


@dataclass
class FakeSampler:
    """Samples from an adapter as it was when it was saved."""

    client: FakeClient
    weights: dict[str, torch.Tensor]

    def sample(self, prompt: list[int], num_samples: int, sampling_params: Any) -> "Future[Any]":
        self.client.service.requests.append(sampling_params)
        self.client.put(self.weights)
        found: list[Sample] = []

        def take(key: int, sample: Sample) -> list[Any]:
            found.append(sample)
            return []

        request = Request(0, Prompt(tuple(prompt[:-1]), tuple(prompt[-1:])), (sampling_params.seed,))
        TorchEngine(self.client.policy).generate(
            [(0, request)], take, temperature=sampling_params.temperature, max_new_tokens=sampling_params.max_tokens
        )
        (sample,) = found
        reason = "stop" if sample.stopped else "length"
        sequence = SimpleNamespace(tokens=list(sample.token_ids), logprobs=list(sample.logprobs), stop_reason=reason)
        return done(SimpleNamespace(sequences=[sequence]))


def done(value: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@contextmanager
def serving(backbone: Backbone, model: str, **ways: Any) -> Iterator[FakeTinker]:
    """Yield a service whose address answers, and gives out archives."""
    service: FakeTinker

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # as the library calls it
            body = service.archives.get(self.path.removeprefix("/archive/"), b"ok")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = FakeTinker(backbone, model, f"http://127.0.0.1:{server.server_port}", **ways)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()

"""A Tinker-API service (an extra): each adapter is one LoRA training client there, and no call outlives the service.

The client package waits for a service that is gone for minutes, in some calls for ever. So each call runs in a thread of its
own, and while it lasts the service is asked whether it is there: one that has not answered for `PATIENCE` seconds is an
`EngineFault`. Whatever the package or the service raises becomes one too, of one line.
"""

import http.client
import importlib
import io
import json
import logging
import os
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

from neuromas.rollout.engine import EngineFault
from neuromas.rollout.row import seed_of
from neuromas.system.terminal import in_short

ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
SEED_BITS = 31
"""SkyRL takes seeds as 32-bit numbers with a sign."""
PATIENCE = 30.0
"""Seconds that a service may be away."""
LOOK_EVERY = 2.0
"""Seconds between two looks at the service while a call lasts."""

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraShape:
    """What the service is asked to train in each client."""

    base_model: str
    rank: int
    target_modules: tuple[str, ...]
    seed: int
    """The run's; a client's own follows from it and from the client's name."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An adapter as the service has it, in PEFT's format."""

    config: dict[str, Any]
    tensors: bytes
    """A safetensors file."""


class TinkerService:
    """A connection to a service and the clients of a run there.

    `sdk` is the module `tinker`. Raises ValueError if the package is missing and EngineFault if the service is not there, has
    another protocol or does not serve the model.
    """

    def __init__(self, url: str, shape: LoraShape, sdk: Any = None) -> None:
        self.sdk = sdk or _import_tinker()
        self.url, self.shape = url.rstrip("/"), shape
        self.clients: dict[int, Any] = {}
        """The training client of each node's adapter."""
        self._samplers: dict[int, Any] = {}
        self._exports = 0
        if not self._answers():
            raise EngineFault(
                f"no Tinker service answers at --engine.url {self.url}: start it there, or name the address of one that runs"
            )
        # Services of one's own ask for no key, but the package does.
        key = os.environ.get("TINKER_API_KEY", "tml-none")
        self._root = self.call("connects", lambda: self.sdk.ServiceClient(base_url=self.url, api_key=key))
        served = self.call("names its models", self._root.get_server_capabilities)
        names = [model.model_name for model in served.supported_models]
        if shape.base_model not in names:
            raise EngineFault(
                f"the service at {self.url} serves {', '.join(map(str, names))}, not {shape.base_model!r}; --engine.base-model "
                "says what it calls the backbone"
            )
        self._rest = self.call("connects", self._root.create_rest_client)

    def new_client(self, name: int | str) -> Any:
        """Create a client whose adapter starts with B at zero."""
        shape = self.shape
        trained = frozenset(shape.target_modules)

        def create() -> Any:
            return self._root.create_lora_training_client(
                base_model=shape.base_model, rank=shape.rank, seed=seed_of((shape.seed, "adapter", name), SEED_BITS),
                train_attn=trained >= ATTENTION, train_mlp=trained >= MLP, train_unembed=False,
            )  # fmt: skip

        return self.call(f"creates a client of rank {shape.rank} (--adapter.rank)", create)

    def client(self, node: int) -> Any:
        """Return the client of a node's adapter, a new one if there is none yet."""
        if node not in self.clients:
            self.clients[node] = self.new_client(node)
        return self.clients[node]

    def restore(self, node: int, path: str) -> None:
        """Make a node's client anew from a state that the service has saved."""
        create = self._root.create_training_client_from_state_with_optimizer
        what = f"restores node {node} from {path}, which the newest checkpoint names"
        self.clients[node] = self.call(what, lambda: create(path))
        self.changed([node])

    def changed(self, nodes: Collection[int]) -> None:
        """Take note that the adapters of these nodes have changed."""
        for node in nodes:
            self._samplers.pop(node, None)

    def samplers(self, nodes: Collection[int]) -> dict[int, Any]:
        """Return clients that sample from the adapters of these nodes as they are now."""
        missing = {node: self.client(node) for node in nodes if node not in self._samplers}
        self._samplers |= self.together(
            "saves adapters to sample from",
            {node: client.save_weights_and_get_sampling_client for node, client in missing.items()},
        )
        return {node: self._samplers[node] for node in nodes}

    def export(self, client: Any) -> Exported:
        """Return a client's adapter."""
        self._exports += 1
        name = f"adapter-{self._exports:06d}"

        def fetch() -> Exported:
            path = client.save_weights_for_sampler(name).result().path
            run, _, checkpoint = path.removeprefix("tinker://").partition("/")
            link = self._rest.get_checkpoint_archive_url(run, checkpoint).result().url
            with urllib.request.urlopen(link, timeout=PATIENCE) as answer:
                return _unpacked(answer.read())

        return self.call("exports an adapter", fetch)

    def call(self, what: str, work: Callable[[], T]) -> T:
        """Return what a call returns; EngineFault if the service is gone, or says no. `what` completes "the service ..."."""
        return self.together(what, {0: work})[0]

    def together(self, what: str, works: Mapping[K, Callable[[], T]]) -> dict[K, T]:
        """Do calls at the same time and return what they return; EngineFault as `call`."""
        futures = {key: _begun(work) for key, work in works.items()}
        self.wait(what, list(futures.values()), all_of_them=True)
        return {key: future.result() for key, future in futures.items()}

    def wait(self, what: str, futures: Collection["Future[Any]"], *, all_of_them: bool = False) -> "set[Future[Any]]":
        """Return the futures that are done, once one is, or all are; EngineFault as `call`."""
        seen = time.monotonic()
        while True:
            until = FIRST_EXCEPTION if all_of_them else FIRST_COMPLETED
            done, waiting = wait_for(futures, timeout=LOOK_EVERY, return_when=until)
            for future in done:
                if error := future.exception():
                    raise EngineFault(f"the service at {self.url} {what}, and fails: {in_short(error)}") from error
            if not waiting or (done and not all_of_them):
                return done
            if self._answers():
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE:
                raise EngineFault(f"the service at {self.url} has not answered for {PATIENCE:.0f} s (it {what})")

    def _answers(self) -> bool:
        """Say whether anything answers at the service's address."""
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/healthz", timeout=PATIENCE):
                return True
        except urllib.error.HTTPError:
            return True  # an answer, if not the one of every service
        except (OSError, ValueError, http.client.HTTPException):
            return False  # nobody, or who speaks another protocol


def _import_tinker() -> Any:
    try:
        sdk = importlib.import_module("tinker")
    except ImportError as error:
        raise ValueError(f"--engine tinker needs the package tinker ({error}): pip install 'neuromas[tinker]'") from error
    # It says on standard error what it tries again; what fails in the end is raised.
    logging.getLogger("tinker").setLevel(logging.CRITICAL)
    return sdk


def _begun(work: Callable[[], T]) -> "Future[T]":
    """Begin a call in a thread that the program's end does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _unpacked(archive: bytes) -> Exported:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        found = {member.name.rpartition("/")[2]: files.extractfile(member) for member in files if member.isfile()}
        config, tensors = found["adapter_config.json"], found["adapter_model.safetensors"]
        assert config is not None
        assert tensors is not None
        return Exported(json.loads(config.read()), tensors.read())

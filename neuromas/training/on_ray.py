"""Training by several workers of a Ray cluster: Ray Train starts them, and starts them again where a process or node dies.

Checkpoints are the run directory's own and not Ray's: they are whole or not there, checked by checksums, and any command reads
them, so that a run may go on with one worker or with eight, and without Ray. What has died is begun again from the newest one.
"""

import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neuromas.config import TrainConfig
from neuromas.system.cluster import RETRIES, device_of, enter, joined, load_ray, require_cores
from neuromas.system.engines import describe_engine
from neuromas.system.files import checksum_of
from neuromas.system.process import configure_process
from neuromas.system.terminal import one_line
from neuromas.training.board import Board
from neuromas.training.config_file import from_json, to_json
from neuromas.training.credit import SCHEMES
from neuromas.training.evaluate import Evaluation
from neuromas.training.loop import begin, train_and_score
from neuromas.training.plan import Plan, resolve
from neuromas.training.progress import Progress
from neuromas.training.run_directory import RunDirectory
from neuromas.training.setup import set_up
from neuromas.training.sharding import Announced, Exchange, SharedRun, shard
from neuromas.training.signals import Interrupted, stop_signals
from neuromas.training.tracking import tracked

RESIZE_SECONDS = 30.0
"""How often Ray looks whether there is room for more workers, where their number may change."""


def check_workers(config: TrainConfig, workers: tuple[int, ...]) -> tuple[int, int]:
    """Return the fewest and the most workers; ValueError if a run of this config cannot be shared out to them."""
    if not 1 <= len(workers) <= 2 or min(workers) < 1 or workers[0] > workers[-1]:
        raise ValueError(f"--workers must be a number, or the fewest and the most, at least 1, got {list(workers)}")
    if workers[-1] > config.examples_per_step:
        raise ValueError(
            f"--workers must be at most --examples-per-step {config.examples_per_step}, for a question is one worker's, "
            f"got {workers[-1]}"
        )
    if config.engine.name != "torch":
        raise ValueError(f"--workers goes with --engine torch, which every worker has for itself, got {config.engine.name}")
    if SCHEMES[config.credit].heads != "none":
        raise ValueError(f"--workers goes with no --credit that learns a critic, got {config.credit}")
    return workers[0], workers[-1]


class Told(Progress):
    """Progress of a worker, shown where the user is."""

    def __init__(self, config: TrainConfig, board: Any) -> None:
        super().__init__(config.num_steps, config.train_tokens)
        self.board = board

    def note(self, text: str) -> None:
        if self.board is not None:
            self.board.note.remote(text)


def train_on_ray(plan: Plan, run: RunDirectory, workers: tuple[int, int]) -> dict[str, dict[str, Evaluation]]:
    """Train a run by workers of a Ray cluster, at least and at most so many; return its scores and raise as `loop.train`."""
    run.check_files()
    # Ray keeps nothing of a run but what it starts workers from, and that as long as this process lives.
    with joined("--workers"), tempfile.TemporaryDirectory() as kept:
        ray = load_ray()
        require_cores(ray.cluster_resources(), plan.config.device, workers[0], "worker")
        here = load_ray("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        board = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
        failures: list[BaseException] = []
        fitting = threading.Thread(target=_fit, args=(plan.config, workers, board, kept, failures), daemon=True)
        with Progress(plan.config.num_steps) as progress, stop_signals(progress.note) as stop:
            fitting.start()
            while fitting.is_alive():
                fitting.join(0.5)
                if stop.asked:
                    board.ask.remote()
                for text in ray.get(board.take.remote()):
                    progress.note(text)
        ended = ray.get(board.ending.remote())
    if ended is None:
        raise ValueError(
            f"--workers: Ray has given the run up ({_cause(failures)}); its newest checkpoint is that of step {run.step}, from "
            "which the same command with --resume goes on"
        )
    how, text = ended
    if how == "interrupted":
        raise Interrupted(text)
    if how == "mistake":
        raise ValueError(text)
    where = str(run.path / "evaluation.json")
    return {
        when: {name: Evaluation.from_json(score, where) for name, score in run.scores(when).items()}
        for when in ("before", "after")
    }


def _cause(failures: list[BaseException]) -> str:
    """Return the last line of what Ray says of its workers' end, or that memory was short: others then lose their peer."""
    lines = [line for failure in failures for line in str(failure).splitlines() if line.strip()]
    if any("OutOfMemoryError" in line or "can't allocate memory" in line for line in lines):
        return "a worker ran out of memory; lower --tokens-per-micro-batch or --examples-per-step, or use larger nodes"
    return one_line(lines[-1].strip())[:300] if lines else "Ray says no more"


def _fit(config: TrainConfig, workers: tuple[int, int], board: Any, kept: str, failures: list[BaseException]) -> None:
    """Let Ray Train run the workers to the end, or until they have died too often."""
    try:
        _trainer(config, workers, board, kept).fit()
    except Exception as error:  # told to the user by the thread that waits
        failures.append(error)


def _trainer(config: TrainConfig, workers: tuple[int, int], board: Any, kept: str) -> Any:
    """Return Ray's trainer of a run; Ray of another version raises whatever its settings lack."""
    train, least, most = load_ray("ray.train"), *workers
    own = replace(config, device=device_of(config.device))
    # What a node of another machine is told is what it would read itself: its working folder is this one.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # A busy machine takes its minutes to load torch; Ray would begin anew after one.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    return load_ray("ray.train.torch").TorchTrainer(
        work,
        train_loop_config={"config": to_json(own), "folder": str(Path.cwd()), "board": board},
        # Messages are megabytes, and most are of Python objects: gloo carries those, between processors of any kind.
        torch_config=load_ray("ray.train.torch").TorchConfig(backend="gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=most if least == most else (least, most), use_gpu=config.device == "cuda",
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        # Ray counts apart how often it has not found the cores for all workers, and would look for them for ever.
        run_config=train.RunConfig(
            storage_path=kept, name="run",
            failure_config=train.FailureConfig(max_failures=RETRIES, controller_failure_limit=RETRIES),
        ),
    )  # fmt: skip


def work(order: dict[str, Any]) -> None:
    """Be one worker of a run, from its newest checkpoint to its end; what the user is to know goes to the board."""
    exchange = Exchange()
    board, ray = order["board"], load_ray()
    first = exchange.rank == 0
    if first:
        exchange.is_asked = lambda: ray.get(board.is_asked.remote())
    try:
        try:
            _train(order, exchange, board if first else None)
            ended = "done", ""
        except Announced:
            raise
        except ValueError as error:
            exchange.announce(error)
            raise
    except Interrupted as stop:
        ended = "interrupted", str(stop)
    except Announced as mistake:
        ended = "mistake", str(mistake)
    if first:
        ray.get(board.end.remote(*ended))


def _train(order: dict[str, Any], exchange: Exchange, board: Any) -> None:
    enter(order["folder"])
    configure_process()
    plan = resolve(from_json(order["config"], "order"))
    config, task = plan.config, plan.questions.task
    run = SharedRun(RunDirectory(config.run_path, config, plan.topology), exchange)
    checksums = plan.questions.checksums()
    setup = shard(set_up(plan), exchange)
    _check_alike(exchange, backbone=setup.network.backbone.checksum(), questions=str(checksums))
    with run.locked(), Told(config, board) as progress:
        run.initialise(task.held_out, checksums)
        if board is not None:
            engine = describe_engine(config.engine.name, setup.network.backbone.device.type)
            _note_start(run, progress, board, exchange.workers, engine)
        exchange.gather(None)
        trainer = begin(setup, run, progress)
        with tracked(config.track if exchange.rank == 0 else "none", run, progress.note):
            train_and_score(trainer, progress, exchange.stop)


def _note_start(run: RunDirectory, progress: Progress, board: Any, workers: int, engine: str) -> None:
    """Say with how many workers a run begins and what its engine keeps, and after a loss what of it is done again."""
    by = f"{workers} {'worker' if workers == 1 else 'workers'}"
    if load_ray().get(board.start.remote()) == 1:
        progress.note(f"{by}: questions, rewards and gradients are shared out; what dies is begun again")
        progress.note(engine)
        return
    logged = max((int(record["step"]) + 1 for record in run.metrics()), default=0)
    again = f"steps {run.step + 1} to {logged} are done again" if logged > run.step else "no finished step is done again"
    progress.note(f"workers have changed or died: going on by {by} from the checkpoint of step {run.step}; {again}")


def _check_alike(exchange: Exchange, **mine: str) -> None:
    """Raise ValueError if workers have other code, libraries, weights or questions than the first one."""
    package = Path(__file__).parents[1]
    sources = b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))
    mine |= {"neuromas": checksum_of(sources), "torch": torch.__version__}
    theirs = exchange.gather((os.uname().nodename, mine))
    for node, other in theirs[1:]:
        if unlike := [name for name in mine if other[name] != theirs[0][1][name]]:
            raise ValueError(
                f"--workers: node {node} has another version of {', '.join(unlike)} than node {theirs[0][0]}; install the same "
                "on all nodes"
            )

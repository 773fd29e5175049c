"""The worker: what fails ends its jobs with a reason and no others; and the talk in the terminal."""

import queue
from collections.abc import Iterator

import pytest
from rich.console import Console

from neuromas import Backbone, Network, Topology
from neuromas.rollout.live import LiveRollouts, Terms
from neuromas.serve.talk import Talk
from neuromas.serve.worker import Begun, Event, Job, QueueFull, Refused, Worker
from neuromas.tasks import get_task
from neuromas.types import Example, Rollout


@pytest.fixture
def network(tiny_backbone: Backbone) -> Network:
    return Network(Topology.layered([1, 1]), tiny_backbone, max_new_tokens=3)


@pytest.fixture
def worker(network: Network) -> Iterator[Worker]:
    def deliver(events: object) -> None:
        for job, event in events:  # type: ignore[attr-defined]
            job.hear(event)

    made = Worker(network, deliver, most_running=2, most_waiting=3)
    made.start()
    yield made
    made.close()
    made.join(30)
    assert not made.is_alive()


def job(question: str) -> tuple[Job, "queue.Queue[Event]"]:
    heard: queue.Queue[Event] = queue.Queue()
    return Job(Example(question, question, "", "Say it."), 0, ("evaluate", 0), Terms(), heard.put), heard


def last(heard: "queue.Queue[Event]") -> Event:
    while not isinstance(event := heard.get(timeout=30), Rollout | Refused):
        pass
    return event


def test_a_question_that_is_too_long_is_refused_alone(
    worker: Worker, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network.backbone, "max_tokens", 200)
    (long, refused), (short, answered) = job("word " * 90), job("a?")
    worker.submit([long, short])
    event = last(refused)
    assert isinstance(event, Refused)
    assert not event.ours
    assert event.reason.startswith("a question of ")
    assert isinstance(answered.get(timeout=30), Begun)
    assert isinstance(last(answered), Rollout)


def test_a_step_that_fails_ends_what_runs_and_no_more(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: LiveRollouts) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(LiveRollouts, "step", fail)
        failing, heard = job("a?")
        worker.submit([failing])
        assert last(heard) == Refused("the network failed: RuntimeError", ours=True)
    assert "no memory" in capsys.readouterr().err
    another, heard = job("a?")
    worker.submit([another])
    assert isinstance(last(heard), Rollout)


def test_questions_of_strangers_are_forgotten(worker: Worker, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuromas.serve.worker.REMEMBERED", 3000)
    for number in range(20):
        asked, heard = job(f"{number}?")
        worker.submit([asked])
        assert isinstance(last(heard), Rollout)
    assert network.backbone._encode_text.cache_info().currsize < 20


def test_a_full_queue_takes_all_or_none(worker: Worker) -> None:
    with pytest.raises(QueueFull):
        worker.submit([job("a?")[0] for _ in range(4)])
    assert worker.waiting == 0


def test_a_talk_in_the_terminal(network: Network) -> None:
    lines = iter(["/again", "a?", "/again", "/trace", '"""', "b?", "c?", '"""', "/temperature 9", "/temperature 1", "/help"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration as end:
            raise EOFError from end

    console = Console(width=90, highlight=False, markup=False)
    with console.capture() as capture:
        talk = Talk(network, get_task("navigate"), read, console)
        talk.run()
    shown = capture.get()
    assert "error: there is no question yet" in shown
    assert shown.count("node 1 ─▶ node 2") == 2
    assert shown.count("node 2 answers") == shown.count("answer: ") == 3
    assert "error: /temperature must be 0 (greedy), or 0.001 to 2, got '9'" in shown
    assert (talk.question, talk.temperature) == ("b?\nc?", 1.0)
    assert shown.count("/quit") == 2

"""The worker: what fails ends its jobs with a reason and no others; and the talk in the terminal."""

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.console import Console

from neuromas import Backbone, Network, Topology
from neuromas.rollout.live import LiveRollout, LiveRollouts, Said, Terms
from neuromas.serve.protocol import Asked
from neuromas.serve.replies import Reply
from neuromas.serve.talk import Talk
from neuromas.serve.worker import Begun, Event, Job, QueueFull, Refused, Worker
from neuromas.tasks import get_task
from neuromas.types import Example, Rollout


@pytest.fixture
def network(tiny_backbone: Backbone) -> Network:
    return Network(Topology.layered([1, 1]), tiny_backbone, max_new_tokens=3)


@contextmanager
def running(network: Network) -> Iterator[Worker]:
    def deliver(events: object) -> None:
        for job, event in events:  # type: ignore[attr-defined]
            job.hear(event)

    made = Worker(network, deliver, most_running=2, most_waiting=3)
    made.start()
    yield made
    made.close()
    made.join(30)
    assert not made.is_alive()


@pytest.fixture
def worker(network: Network) -> Iterator[Worker]:
    with running(network) as made:
        yield made


def job(question: str, terms: Terms | None = None) -> tuple[Job, "queue.Queue[Event]"]:
    heard: queue.Queue[Event] = queue.Queue()
    return Job(Example(question, question, "", "Say it."), 0, ("evaluate", 0), terms or Terms(), heard.put), heard


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


def test_answers_of_a_vote_may_end_with_one_step(tiny_backbone: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    topology = Topology.layered([1, 3], vote=True)
    network = Network(topology, tiny_backbone, max_new_tokens=3, read=lambda text: text[-1:] or None)
    with running(network) as worker:
        asked, heard = job("a?", Terms(max_tokens=1))
        worker.submit([asked])
        event = last(heard)
        assert isinstance(event, Rollout)
        assert [len(c.sample.token_ids) for c in event.completions if not c.messages] == [1, 1, 1]
    assert capsys.readouterr().err == ""


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


def test_half_a_character_waits_for_its_other_half(network: Network) -> None:
    """Tokenizers that fall back to bytes have a mark for each of them."""
    asked = Asked(("a?",), True, 1, 0.0, None, None, (), True, False, True)
    reply, rollout = Reply(asked, "team"), LiveRollout(Terms(), network.begin(Example("q", "q", "", "Say it."), 0, seed=("q",)))
    for node in (1, 2):
        texts = ("a\ufffd\ufffd", "a\u00e9", "a\u00e9b")
        chunks = [chunk for text in texts for chunk in reply.said(0, Said(rollout, node, text, None))]
        assert [chunk["trace"]["new"] for chunk in chunks if "trace" in chunk] == ["a", "\u00e9", "b"]
    said = [choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"]]
    assert said == ["a", "\u00e9", "b"]


def test_a_stop_may_be_as_long_as_a_body() -> None:
    """Looking for its beginning at the end of a text takes no longer than the text: meanwhile nobody else is answered."""
    asked = Asked(("a?",), True, 1, 0.0, None, None, ("b" + "y" * 2**20,), True, False, False)
    began = time.process_time()
    assert [Reply(asked, "team")._safe(text) for text in ("", "a", "ab", "abyy", "abyz")] == ["", "a", "a", "a", "abyz"]
    assert time.process_time() - began < 1


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

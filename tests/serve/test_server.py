"""The server with real clients: OpenAI's, ones that leave, and ones that send anything else."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from neuromas.training.evaluate import evaluate
from neuromas.training.load_run import load_run

pytestmark = pytest.mark.processes

KEY = "a secret"


class Server:
    """A server in a process of its own."""

    def __init__(self, run: Path, *flags: str) -> None:
        words = [sys.executable, "-m", "neuromas.cli", "serve", str(run), "--name", "team", "--port", "0", *flags]
        environment = os.environ | ({"NEUROMAS_API_KEY": KEY} if KEY else {})
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1].strip("/\n"))
        base = f"http://127.0.0.1:{self.port}/v1"
        self.client = openai.OpenAI(base_url=base, api_key=KEY or "none", max_retries=0, timeout=60)

    def send(self, data: bytes) -> tuple[int, dict[str, Any]]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            parts = []
            while part := connection.recv(1 << 16):
                parts.append(part)
        head, _, body = b"".join(parts).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    def post(self, body: bytes, *headers: str, length: int | None = None) -> tuple[int, dict[str, Any]]:
        lines = ["POST /v1/completions HTTP/1.1", "Host: x", "Connection: close", f"Authorization: Bearer {KEY}", *headers]
        lines.append(f"Content-Length: {len(body) if length is None else length}")
        return self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def metric(self, name: str) -> float:
        text = self.client.get("/../metrics", cast_to=str)
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, complaints = self.process.communicate(timeout=60)
        return self.process.returncode, complaints


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Server]:
    made = Server(trained, "--max-waiting", "4", "--max-running", "2", "--max-body-bytes", "50000")
    yield made
    status, complaints = made.stop()
    assert status == 0
    assert complaints.splitlines() == ["stopping as soon as all requests are answered; once more stops at once"]


def ask(question: str, **options: Any) -> dict[str, Any]:
    return {"model": "team", "messages": [{"role": "user", "content": question}], **options}


def test_answers_are_those_of_eval_whole_and_streamed(server: Server, trained: Path) -> None:
    loaded = load_run(trained)
    examples = loaded.task.examples("test", 6)
    for temperature in (0.0, 1.0):
        result, groups = evaluate(loaded.network, loaded.task, examples, temperature=temperature, seed=3)
        right = 0.0
        for (rollout,) in groups:
            asked = ask(rollout.example.question, temperature=temperature, seed=3)
            whole = server.client.chat.completions.create(**asked, extra_body={"trace": True})
            trace = whole.choices[0].model_extra["trace"]  # type: ignore[index]
            assert [node["text"] for node in trace] == [c.text for c in rollout.completions]
            assert trace[0]["messages"][0]["to"] == 2
            content = whole.choices[0].message.content
            assert content is not None
            right += loaded.task.reward(rollout.example, content)
            chunks = list(server.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == content
            assert chunks[-1].usage == whole.usage
            assert whole.usage is not None
            assert whole.usage.completion_tokens == sum(len(c.sample.logprobs) for c in rollout.completions)
        assert right / len(examples) == result.accuracy


def test_choices_limits_stops_and_traces_of_a_stream(server: Server) -> None:
    two = server.client.completions.create(model="team", prompt=["a?", "b?"], n=2, temperature=1, seed=1)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    again = server.client.completions.create(model="team", prompt="b?", n=2, temperature=1, seed=1)
    assert [choice.text for choice in again.choices] == [choice.text for choice in two.choices[2:]]
    short = server.client.completions.create(model="team", prompt="a?", max_tokens=1).choices[0]
    whole = server.client.completions.create(model="team", prompt="a?").choices[0]
    assert short.finish_reason == "length"
    assert whole.text.startswith(short.text)
    assert len(short.text) < len(whole.text)
    stop = whole.text[2:4]
    stream = server.client.completions.create(model="team", prompt="a?", stop=stop, stream=True, extra_body={"trace": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.text.partition(stop)[0]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    traces = [extra["trace"] for chunk in chunks if (extra := chunk.model_extra) and "trace" in extra]
    ended = [trace for trace in traces if "messages" in trace]
    assert [trace["node"] for trace in ended] == [1, 2]
    assert "".join(trace["new"] for trace in traces if trace["node"] == 1) == ended[0]["text"]


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    with server.client.chat.completions.create(**ask("left?"), stream=True) as stream:
        next(iter(stream))
    bodies = [json.dumps(ask(f"{number}?", n=4)).encode() for number in range(20)]
    for body in bodies:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
    until = time.monotonic() + 20
    while server.metric("neuromas_rollouts_running") or server.metric("neuromas_rollouts_waiting"):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_client_that_does_not_read_loses_its_connection(trained: Path) -> None:
    """More than the system keeps for a client: the rest is cut, not kept for ever."""
    # The name is in every chunk.
    server = Server(trained, "--timeout", "2", "--name", name := 20_000 * "n")
    asked = {"model": name, "prompt": 4 * ["a?"], "n": 4, "temperature": 1, "stream": True, "trace": True}
    body = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.settimeout(30)
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        received = connection.recv(16)
        connections = psutil.Process(server.process.pid).net_connections
        until = time.monotonic() + 20
        while time.monotonic() < until and any(each.raddr == connection.getsockname() for each in connections()):
            time.sleep(0.1)
        received += b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert received.startswith(b"HTTP/1.1 200 OK")
    assert not received.endswith(b"0\r\n\r\n")
    # All others are served, and nothing is said of it.
    assert len(server.client.completions.create(model=name, prompt="a?").choices) == 1
    assert server.stop() == (0, "stopping as soon as all requests are answered; once more stops at once\n")


def test_a_full_queue_says_when_to_come_again(server: Server) -> None:
    found: list[tuple[int, str | None, str]] = []

    def client() -> None:
        answer = server.client.completions.with_raw_response
        try:
            response = answer.create(model="team", prompt="a?", n=4).http_response
        except openai.RateLimitError as error:
            response = error.response
        message = response.json().get("error", {"message": ""})["message"]
        found.append((response.status_code, response.headers.get("retry-after"), message))

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {(200, None, ""), (429, "1", "too many requests wait; try again later")}
    assert len(found) == 12
    # More than may wait would never be answered.
    with pytest.raises(openai.BadRequestError, match="'n' must be an integer from 1 to 4"):
        server.client.completions.create(model="team", prompt="a?", n=5)


def test_every_error_is_json(server: Server) -> None:
    as_json = "Content-Type: application/json"

    def refused(found: tuple[int, dict[str, Any]], status: int, message: str) -> None:
        assert (found[0], found[1]["error"]["message"]) == (status, message)

    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as dawdler:
        # Answered before its body is there, of which one byte more comes: it is closed like one that asks nothing.
        dawdler.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}}") and (part := dawdler.recv(1 << 16)):
            answer += part
        assert answer.startswith(b"HTTP/1.1 401 ")
        dawdler.sendall(b"x")
        refused(server.send(b"\x00garbage\r\n\r\n"), 400, "Invalid HTTP request received.")
        refused(server.post(b"x" * 60000, as_json), 413, "the body must have at most 50,000 bytes")
        refused(server.post(b"{}", "Content-Type: text/plain"), 415, "the body must come with 'Content-Type: application/json'")
        refused(server.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), 404, "there is no GET /v2 here")
        wrong = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        refused(server.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), 401, wrong)
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            server.client.with_options(api_key="another").models.list()
        with pytest.raises(openai.NotFoundError, match="the model does not exist; this server has 'team'"):
            server.client.models.retrieve("gpt")
        assert server.client.models.list().data[0].id == "team"
        refused(server.post(b"{", as_json, length=100), 408, "the body must arrive within 10 seconds")
        assert dawdler.recv(1 << 16) == b""


def test_without_a_key_a_page_elsewhere_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_server.KEY", "")
    server = Server(trained)
    head = "GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: "
    status, error = server.send(f"{head}evil.example:{server.port}\r\n\r\n".encode())
    message = "without an API key this server answers to localhost and loopback addresses alone, got Host 'evil.example'"
    assert (status, error["error"]["message"]) == (403, message)
    # What is no host to starlette is none of ours.
    for host, status in {"evil{.example": 403, "[": 403, "localhost": 200, "127.0.0.2": 200, "[::1]": 200}.items():
        assert server.send(f"{head}{host}:{server.port}\r\n\r\n".encode())[0] == status, host
    server.stop()


def test_a_stop_finishes_what_runs(trained: Path) -> None:
    server = Server(trained, "--max-running", "1")
    found: list[int] = []

    def client() -> None:
        found.append(len(server.client.completions.create(model="team", prompt=["a?"] * 16).choices))

    thread = threading.Thread(target=client)
    thread.start()
    while not server.metric("neuromas_rollouts_waiting"):
        time.sleep(0.01)
    assert server.stop()[0] == 0
    thread.join()
    assert found == [16]

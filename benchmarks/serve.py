"""Measures `neuromas serve`: load, a soak with clients that misbehave, and lm-evaluation-harness against `neuromas eval`.

    python -m benchmarks.serve load RUN --out DIR       requests a second, p50 and p99 of 1, 8, 64 clients
    python -m benchmarks.serve soak RUN --out DIR       10,000 requests, half of them hostile; memory, answers, errors
    python -m benchmarks.serve lm-eval RUN --out DIR    the run's test problems by both interfaces (needs lm_eval[api])

Each starts a server of its own on the run and writes a JSON file. Answers are compared with what the network gives in process.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neuromas.training.evaluate import evaluate
from neuromas.training.load_run import LoadedRun, load_run

CLIENTS = (1, 8, 64)
PATIENCE = 300.0


@contextmanager
def served(run: Path, *flags: str) -> Iterator[tuple[int, int]]:
    """Serve a run; give the port and the process."""
    command = [sys.executable, "-m", "neuromas.cli", "serve", str(run), "--name", "team", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        yield int(line.rsplit(":", 1)[1].strip("/\n")), process.pid
    finally:
        process.terminate()
        assert process.wait(60) == 0, "the server did not end well"


def request(path: str, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def chat(question: str, **options: Any) -> bytes:
    asked = {"model": "team", "messages": [{"role": "user", "content": question}], **options}
    return request("/v1/chat/completions", json.dumps(asked).encode())


async def send(port: int, data: bytes) -> tuple[int, bytes]:
    """Return status and body of the answer; status 0 if the connection broke."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            await writer.drain()
            head, _, body = (await asyncio.wait_for(reader.read(), PATIENCE)).partition(b"\r\n\r\n")
            return int(head.split()[1]) if head else 0, body
        finally:
            writer.close()
    except ConnectionError:
        return 0, b""


def texts_in_process(loaded: LoadedRun, questions: int) -> dict[str, list[str]]:
    """Return what each node writes, by question, without a server."""
    _, groups = evaluate(loaded.network, loaded.task, loaded.task.examples("test", questions))
    return {rollout.example.question: [c.text for c in rollout.completions] for (rollout,) in groups}


def texts_of(body: bytes) -> list[str]:
    return [node["text"] for node in json.loads(body)["choices"][0]["trace"]]


async def load(port: int, expected: dict[str, list[str]], clients: int, requests: int) -> dict[str, Any]:
    questions = iter([list(expected)[number % len(expected)] for number in range(requests)])
    seconds: list[float] = []
    wrong = 0

    async def client() -> None:
        nonlocal wrong
        for question in questions:
            begun = time.perf_counter()
            status, body = await send(port, chat(question, trace=True))
            seconds.append(time.perf_counter() - begun)
            wrong += status != 200 or texts_of(body) != expected[question]

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    taken = time.perf_counter() - begun
    ordered = sorted(seconds)
    return {
        "clients": clients, "requests": requests, "requests_per_second": round(requests / taken, 2),
        "p50_seconds": round(ordered[len(ordered) // 2], 3), "p99_seconds": round(ordered[int(len(ordered) * 0.99)], 3),
        "wrong": wrong,
    }  # fmt: skip


def measure_load(args: argparse.Namespace) -> dict[str, Any]:
    loaded = load_run(args.run)
    expected = texts_in_process(loaded, args.questions)
    rows = []
    # `--max-running 1` answers one request after the other.
    for running, counts in ((64, CLIENTS), (1, CLIENTS[1:])):
        with served(args.run, "--max-running", str(running), "--timeout", "600") as (port, _):
            asyncio.run(load(port, expected, 8, 8))
            for clients in counts:
                requests = args.requests if running > 1 and clients > 1 else max(10, args.requests // 4)
                rows.append({"at_once": running} | asyncio.run(load(port, expected, clients, max(requests, clients))))
                print(rows[-1], flush=True)
    return {"rows": rows}


async def soak(port: int, pid: int, expected: dict[str, list[str]], total: int) -> dict[str, Any]:
    rng, counts, faults = random.Random(0), Counter[str](), list[str]()
    memory: list[tuple[int, int]] = []
    numbers = iter(range(total))

    def check(kind: str, wanted: tuple[int, ...], status: int, body: bytes) -> None:
        counts[f"{kind} {status}"] += 1
        try:
            error = json.loads(body)["error"] if status != 200 else {"message": "", "type": ""}
            fits = status in wanted and {"message", "type"} <= error.keys()
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            faults.append(f"{kind}: {status} {body[:200]!r}")

    async def one(kind: str) -> None:
        question = rng.choice(list(expected))
        if kind == "good":
            status, body = await send(port, chat(question, trace=True))
            check(kind, (200, 429), status, body)
            if status == 200 and texts_of(body) != expected[question]:
                faults.append(f"wrong answer to {question!r}")
        elif kind == "stream":
            status, body = await send(port, chat(question, stream=True))
            counts[f"{kind} {status}"] += 1
            lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")]
            parts = [choice["delta"].get("content", "") for line in lines for choice in json.loads(line).get("choices", ())]
            if status == 200 and "".join(parts) != expected[question][-1]:
                faults.append(f"wrong stream for {question!r}: {''.join(parts)!r}")
        elif kind == "vanishes":
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(chat(question, stream=rng.random() < 0.5))
            await writer.drain()
            await asyncio.sleep(rng.random() * 0.5)
            writer.transport.abort()
            counts[kind] += 1
        elif kind == "garbage":
            junk = rng.randbytes(rng.randrange(1, 300))
            as_http = rng.random() < 0.5
            data = request("/v1/completions", junk) if as_http else junk + b"\r\n\r\n"
            check(kind, (400,), *await send(port, data))
        elif kind == "nonsense":
            body = rng.choice([{"temperature": "x"}, {"n": 10**9}, {"top_k": 3}, {"messages": 3}, {"model": "gpt"}])
            check(kind, (400, 404), *await send(port, chat(question, **body)))
        elif kind == "huge":
            size = 2**20 + rng.randrange(2**21)
            check(kind, (413,), *await send(port, request("/v1/completions", b"x" * size)))
        else:
            check(kind, (408,), *await send(port, request("/v1/completions", b'{"prompt"', length=1000)))

    async def client() -> None:
        for number in numbers:
            kinds = ("good", "stream", "vanishes", "garbage", "nonsense", "huge", "slow")
            await one(rng.choices(kinds, (40, 15, 15, 10, 10, 8, 2))[0])
            if number % (total // 20) == 0:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                memory.append((number, pages * os.sysconf("SC_PAGE_SIZE") // 2**20))
                print(memory[-1], len(faults), flush=True)

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(48)))
    seconds = round(time.perf_counter() - begun)
    return {
        "requests": total, "seconds": seconds, "outcomes": dict(sorted(counts.items())), "faults": len(faults),
        "first_faults": faults[:10], "memory_mib": memory,
    }  # fmt: skip


def run_soak(args: argparse.Namespace) -> dict[str, Any]:
    expected = texts_in_process(load_run(args.run), args.questions)
    with served(args.run) as (port, pid):
        return asyncio.run(soak(port, pid, expected, args.requests))


_HARNESS_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {items}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], temperature: 0.0, max_gen_toks: 4096}}
filter_list: [{{name: answer, filter: [{{function: regex, regex_pattern: "Answer: *(.+?) *$", fallback: "(none)"}}, \
{{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def harness(args: argparse.Namespace) -> dict[str, Any]:
    """Score the run's test problems by lm-evaluation-harness through both interfaces, and by `neuromas eval`."""
    loaded = load_run(args.run)
    examples = loaded.task.examples("test", args.questions)
    result, _ = evaluate(loaded.network, loaded.task, examples)
    scores: dict[str, Any] = {"neuromas eval": result.accuracy}
    with tempfile.TemporaryDirectory() as folder, served(args.run) as (port, _):
        items, tasks = Path(folder) / "items.jsonl", Path(folder) / "tasks"
        items.write_text("".join(json.dumps({"question": e.question, "answer": e.answer}) + "\n" for e in examples))
        tasks.mkdir()
        (tasks / "team.yaml").write_text(_HARNESS_TASK.format(name="team_test", items=items))
        for model, path in (("local-chat-completions", "chat/completions"), ("local-completions", "completions")):
            settings = f"model=team,base_url=http://127.0.0.1:{port}/v1/{path},num_concurrent=16,max_retries=3"
            settings += ",tokenizer_backend=None,tokenized_requests=False"
            command = [
                sys.executable, "-m", "lm_eval", "--model", model, "--model_args", settings, "--tasks", "team_test",
                "--include_path", str(tasks), "--output_path", str(Path(folder) / model),
                *(["--apply_chat_template"] if model == "local-chat-completions" else []),
            ]  # fmt: skip
            subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"})
            (found,) = (Path(folder) / model).rglob("results_*.json")
            scores[model] = json.loads(found.read_text())["results"]["team_test"]["exact_match,answer"]
    return {"questions": len(examples), "accuracy": scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"load": (measure_load, 200, 200), "soak": (run_soak, 100, 10_000), "lm-eval": (harness, 200, 0)}
    parser.add_argument("what", choices=commands)
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, help="different questions")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--out", type=Path, help="folder of the result")
    args = parser.parse_args()
    command, questions, requests = commands[args.what]
    args.questions, args.requests = args.questions or questions, args.requests or requests
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    load_before = os.getloadavg()[0]
    asked = f" --questions {args.questions}" + (f" --requests {args.requests}" if requests else "")
    said = f"python -m benchmarks.serve {args.what} RUN{asked}"
    result = {"command": said, "machine": machine} | command(args)
    result["load_average"] = [round(load_before, 1), round(os.getloadavg()[0], 1)]
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{args.what.replace('-', '_')}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

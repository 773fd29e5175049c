"""A peer in a process of its own, spoken to in lines of JSON (`benchmarks.peers.protocol`)."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from benchmarks.environments import PEERS, interpreter

ROOT = Path(__file__).parent.parent


class PeerFailed(Exception):
    """A peer died, raised or took too long; the text is one line."""


class Worker:
    """One peer's process. It stays while cases of a model follow each other, so that rounds of peers can alternate.

    With the processes that it starts it is stopped while nothing is asked of it: some peers' threads are busy when they wait.
    """

    def __init__(self, name: str, folder: Path, *, threads: int, install: bool) -> None:
        python = interpreter(PEERS[name], folder / "environments", install=install)
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, folder / "logs" / f"{name}.log"
        script = PEERS[name].script or name
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.{script}"], cwd=ROOT, env=_environment(threads), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, message: dict[str, Any], patience: float) -> dict[str, Any]:
        """Return the answer to a message; PeerFailed if there is none within `patience` seconds."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self._lines.get(timeout=patience)
        except queue.Empty:
            self.stop()
            raise PeerFailed(f"no answer in {patience:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            code = self.process.wait()
            killed = " (killed by the system, most likely for its memory)" if code == -signal.SIGKILL else ""
            # A table is published: it names no folder of this machine.
            raise PeerFailed(f"died with exit code {code}{killed}, see logs/{self.log.name} in --folder")
        self._signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "error" in reply:
            raise PeerFailed(reply["error"])
        return reply

    def stop(self) -> None:
        """End the process, whether it listens or not."""
        self._signal(signal.SIGCONT)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._signal(signal.SIGKILL)
        self._reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        """Tell the process and all that it has started; whoever has ended hears nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that wait sleep soon: peers that idle take nothing from the one that is measured.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000"),
        # Freed memory stays with the process, as our command line has it: everybody gets that.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "VLLM_CPU_OMP_THREADS_BIND": "auto",
    }

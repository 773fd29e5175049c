import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from neuromas.system.process import configure_process, return_freed_memory


def test_what_is_set_by_hand_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(mallopt=lambda *call: calls.append(call)))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    configure_process()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert calls == [(-3, 32 << 20), (-1, 2**31 - 1)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    configure_process()
    assert calls[2:] == [(-3, 32 << 20)]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: None) -> None:
        raise OSError("no such library")

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(ctypes, "CDLL", none)
    configure_process()
    return_freed_memory()


def test_much_freed_memory_goes_back() -> None:
    program = (
        "import re, numpy as np\n"
        "from neuromas.system.process import configure_process, return_freed_memory\n"
        "def held(): return int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10\n"
        "configure_process()\n"
        "blocks = [np.ones(1 << 18) for _ in range(850)]\n"
        "kept = blocks[-1]\n"
        "del blocks\n"
        "before = held()\n"
        "return_freed_memory()\n"
        "print(before, held())\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    before, after = map(int, found.split())
    assert before > 1500
    assert after < 100

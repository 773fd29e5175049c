import ctypes
import os
from types import SimpleNamespace

import pytest

from neuromas.system.process import configure_process


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

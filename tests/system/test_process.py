import ctypes
import os
from types import SimpleNamespace

import pytest

from neuromas.system.process import settle


def test_what_is_set_by_hand_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(mallopt=lambda *call: calls.append(call)))
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    settle()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert calls == [(-3, 32 << 20), (-1, 2**31 - 1)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    settle()
    assert calls[2:] == [(-3, 32 << 20)]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: None) -> None:
        raise OSError("no such library")

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setattr(ctypes, "CDLL", none)
    settle()

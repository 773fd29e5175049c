import os

import pytest

from neuromas.process import settle


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    settle()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    settle()
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_name: None) -> None:
        raise OSError("no such library")

    monkeypatch.setattr("ctypes.CDLL", none)
    settle()

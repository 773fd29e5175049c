"""`neuromas serve`: what cannot be served is said before the network is loaded."""

import importlib.util
import socket
from pathlib import Path

import pytest
from commands import Call, assert_refused

from neuromas.cli import serve


def test_flags_that_make_no_sense(call: Call, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(call("serve", trained, "--port", "70000"), r"--port must be 0 to 65535, got 70000$")
    assert_refused(call("serve", trained, "--max-running", "0"), r"--max-running must be 1 to 100,000, got 0$")
    assert_refused(call("serve", trained, "--timeout", "0"), r"--timeout must be above 0 and at most 100,000, got 0\.0$")
    assert_refused(call("serve", trained, "--max-body-bytes", "0"), r"--max-body-bytes must be at least 1, got 0$")
    assert_refused(call("serve", trained, "--best"), r"holds no best checkpoint: no validation was its best yet")
    assert_refused(call("serve", tmp_path / "none"), r"none")
    assert_refused(
        call("serve", trained, "--api-key-file", "none"), r"--api-key-file none cannot be read: No such file or directory$"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = rf"--host 127.0.0.1 --port {port} cannot be listened at: Address already in use.*; name others$"
        assert_refused(call("serve", trained, "--port", port), message)
    # No label of a name is so long.
    assert_refused(call("serve", trained, "--host", 70 * "a"), r"--host a+ --port 8000 cannot be listened at: .*; name others$")
    (tmp_path / "key").write_bytes(b"\xffkey")
    message = r"the API key must be printable ASCII, got other characters; look at .*key$"
    assert_refused(call("serve", trained, "--api-key-file", tmp_path / "key"), message)
    monkeypatch.setenv("NEUROMAS_API_KEY", "")
    assert_refused(call("serve", trained), r"the API key must be printable ASCII, got none; look at NEUROMAS_API_KEY$")


def test_a_missing_extra_is_named(call: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert_refused(call("serve", trained), r"serve needs uvicorn, which is not installed: pip install 'neuromas\[serve\]'$")


def test_a_key_has_no_blanks_at_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client cannot send them."""
    monkeypatch.setenv("NEUROMAS_API_KEY", " a b ")
    assert serve._key(None) == "a b"
    (tmp_path / "key").write_text("c\n")
    assert serve._key(tmp_path / "key") == "c"

"""Debian's or any other Chromium without a window, led over a pipe by its DevTools protocol."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """The one page of a browser, with everything that went wrong on it and all that it asked for."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = os.fdopen(to, "wb"), os.fdopen(back, "rb")
        self._rest, self._count, self._session = b"", 0, ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps({"id": self._count, "method": method, "params": params, **session}).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._back.fileno(), 1 << 20)
            assert more, "the browser has ended"
            self._rest += more
        raw, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(raw)
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["exception"]["description"])
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        return event

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until an expression is true."""
        looked = f"""new Promise((done, fail) => {{
            const until = performance.now() + 20000;
            const look = () => ({expression}) ? done(true) : performance.now() > until ? fail(new Error("waited in vain"))
                : setTimeout(look, 10);
            look();
        }})"""
        self.ask(looked)

    def open(self, path: Path, hash: str = "") -> float:
        """Open a page of runs; return the seconds until all of it stands there."""
        # Another fragment alone would not load the page anew.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{path.as_uri()}{hash}")
        self.wait_for("document.documentElement?.dataset.ready === 'yes'")
        return self.ask("performance.now()") / 1000

    def press(self, key: str) -> None:
        """Press a key, and wait until the page has drawn what follows."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)
        self.settle()

    def click(self, selector: str) -> None:
        self.ask(f"document.querySelector({json.dumps(selector)}).click()")
        self.settle()

    def settle(self) -> None:
        self.ask("new Promise((done) => setTimeout(done, 150))")

    def text(self, selector: str) -> str:
        """Return what is to be read in an element."""
        return self.ask(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        return self.ask(f"[...document.querySelectorAll({json.dumps(selector)})].map((found) => found.innerText)")


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start a browser, and end it."""
    program = find_browser()
    assert program
    (low_read, to), (back, low_write) = os.pipe(), os.pipe()
    # It reads the protocol from descriptor 3 and writes to descriptor 4, which neither end may be before.
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (low_read, low_write))
    code = f"import os, sys; os.dup2({read}, 3); os.dup2({write}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    words = [sys.executable, "-S", "-c", code, program, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(words, pass_fds=(read, write), stderr=subprocess.DEVNULL)
    for end in (low_read, low_write, read, write):
        os.close(end)
    page = None
    try:
        page = Page(to, back)
        yield page
    finally:
        if page is not None:
            page._session = ""
            page.call("Browser.close")
            page._to.close()
            page._back.close()
        process.wait(30)

"""The page that the server hosts, in a browser: messages on their edges, nothing to the console, no request leaves it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import browser, find_browser

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_browser() is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]


def test_the_page_shows_every_message(trained: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "neuromas.cli", "serve", str(trained), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "NEUROMAS_API_KEY"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        address = server.stdout.readline().split()[-1]
        try:
            with browser(tmp_path / "profile") as page:
                page.call("Page.navigate", url=address)
                page.wait_for("document.querySelectorAll('#network circle').length === 2")
                page.ask("document.getElementById('question').value = 'Is 2 even?'")
                page.click("#ask")
                page.wait_for("document.getElementById('usage').textContent.startsWith('2 calls')")
                titles = page.texts(".card b")
                assert re.sub(r" \(.*\)", "", titles[0]) == "node 1 → node 2"
                assert titles[1:] == ["node 2 answers"]
                assert all(page.texts(".card .text"))
                page.click("#trace")
                assert page.ask("[...document.querySelectorAll('.card')].map((card) => card.offsetHeight > 0)") == [False, True]
                page.click("#trace")
                page.click("#again")
                page.wait_for("document.getElementById('usage').textContent.startsWith('2 calls')")
                page.ask("document.getElementById('question').value = ' '")
                page.click("#ask")
                page.wait_for("document.getElementById('error').textContent === \"'messages' must hold a question, got none\"")
                page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
                assert page.ask("document.documentElement.scrollWidth") <= 390
                assert [url for url in page.requests if not url.startswith((address, "about:", "data:,"))] == []
                # The refused question is a failed request to the browser.
                assert [text for text in page.complaints if "400" not in text] == []
        finally:
            server.terminate()
    assert server.returncode == 0

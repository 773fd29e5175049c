"""The page in a browser: it opens from disk, steps, filters, compares, says nothing to the console and asks for nothing."""

import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browser, find_browser
from commands import FLAGS
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from recorded_runs import DIAGNOSIS, SCORE, record_run, rollout
from runs import wait_for_steps

from docs.make_pictures import SCALE, WIDTH, frames, write_gif
from neuromas.config import GrowthConfig
from neuromas.training.questions import open_run
from neuromas.training.run_directory import RunDirectory
from neuromas.view.page import build_page
from neuromas.view.recorded import RunRecord

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(find_browser() is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]

EVIL = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
MOST_SECONDS, MOST_BYTES = 2.0, 20_000_000


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found
        assert found.complaints == []


@pytest.fixture(autouse=True)
def nothing_leaves_the_page(page: Page) -> Iterator[None]:
    page.requests.clear()
    yield
    assert [url for url in page.requests if not re.match(r"about:|data:,|file:.*\.html(#|$)", url)] == []


def write_page(out: Path, *runs: Path) -> Path:
    out.write_bytes(build_page([RunRecord(*open_run(run, untrained=True)) for run in runs]))
    return out


def run_that_learns(path: Path, *, says: str, **settings: object) -> Path:
    """A run of three questions: the first is learned, the second stays right, the third stays malformed."""
    records = []
    for step, first in ((0, "Answer: No"), (1, "Answer: Yes")):
        answers = {"Is 2 even?": first, "Is 4 even?": "Answer: Yes", "Is 6 even?": "who knows"}
        for question, answer in answers.items():
            texts = {1: f"TO node 2: {says} {step}", 2: answer}
            records.append(rollout(texts, question=question, split="test", step=step))
    records += [rollout({1: EVIL, 2: "Answer: Yes"}, faults=[[1, 2, "unaddressed"]], rollout=n, reward=1.0) for n in range(2)]
    made = record_run(path, records, num_steps=1, **settings)
    run = RunDirectory.open(made)
    run.log_metrics(0, {"reward/mean": 0.5, "sampled_tokens/sum": 10, "completion_tokens/node/1/mean": 4.0})
    run.write_json("evaluation.json", {"before": {"test": SCORE}, "after": {"test": SCORE}})
    return made


def test_an_example_is_stepped_through_before_and_after(page: Page, tmp_path: Path) -> None:
    path = write_page(tmp_path / "one.html", run_that_learns(tmp_path / "r", says="start"))
    page.open(path)
    assert page.texts("#list .marks") == ["✗→✓", "✓→✓", "✗!→✗!"]
    assert page.text("#question") == "Is 2 even?"
    assert page.texts("figure .label") == ["start 0", "start 1"]
    assert page.texts("figure .answer") == ["✗ No", "✓ Yes"]
    page.press("Home")
    assert page.text("#step") == "0 of 2"
    assert page.texts("figure .label") == ["", ""]
    page.press("ArrowRight")
    assert page.text("#step") == "1 of 2: node 1 → node 2"
    assert page.texts("figure .label") == ["start 0", "start 1"]
    assert page.texts("figure .answer") == ["answer", "answer"]
    assert page.texts("#transcript li.current .text") == ["start 0", "start 1"]
    page.click("#forward")
    assert page.texts("figure .answer") == ["✗ No", "✓ Yes"]
    page.press("j")
    assert page.text("#question") == "Is 4 even?"
    assert page.text("#place") == "2 of 3"
    page.press("k")
    page.press("k")
    assert page.text("#place") == "1 of 3"
    # Another rollout in the second network, and keys faster than texts are read.
    page.open(path, "#step=x&set=none&nodeRun=9")
    page.ask("(select => { select.value = 0; select.onchange(); })(document.querySelectorAll('figure select')[1])")
    page.settle()
    assert page.texts("figure .label") == ["start 0", "start 0"]
    page.ask("for (const key of 'jjkj') document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }))")
    page.settle()
    assert page.text("#question") == "Is 6 even?"


def test_filters_and_the_search_narrow_the_list(page: Page, tmp_path: Path) -> None:
    path = write_page(tmp_path / "one.html", run_that_learns(tmp_path / "r", says="start"))
    page.open(path)
    assert page.texts("#filters button") == ["All 3", "Wrong 1", "Right 2", "Malformed 1", "Learned 1", "Lost 0"]
    page.press("w")
    assert page.text("#question") == "Is 6 even?"
    page.press("r")
    assert page.text("#place") == "1 of 2"
    page.click("[data-filter=lost]")
    assert page.texts("#list .example") == []
    assert page.ask("document.getElementById('example').hidden")
    # The address holds what is chosen.
    page.open(path, "#filter=malformed&step=1")
    assert (page.text("#question"), page.text("#step")) == ("Is 6 even?", "1 of 2: node 1 → node 2")
    page.open(path, "#search=4+EVEN")
    assert page.texts("#filters button")[0] == "All 1"
    assert page.text("#question") == "Is 4 even?"
    # A link that is followed on the page itself.
    page.ask("location.hash = '#search=6+even'")
    page.settle()
    assert (page.text("#question"), page.ask("byId('search').value")) == ("Is 6 even?", "6 even")


def test_all_answers_of_a_vote_are_told(page: Page, tmp_path: Path) -> None:
    texts = {1: "Answer: No", 2: "Answer: Yes", 3: "Answer: Yes"}
    page.open(
        write_page(tmp_path / "one.html", record_run(tmp_path / "r", [rollout(texts, reward=1.0)], widths=(3,), vote=True))
    )
    told = ["Answer: Yes", "node 1 answered: Answer: No", "node 3 answered: Answer: Yes"]
    assert page.texts("#transcript .text") == told


def test_what_a_model_wrote_stays_text(page: Page, tmp_path: Path) -> None:
    page.open(write_page(tmp_path / "one.html", run_that_learns(tmp_path / "r", says="start")), "#set=train")
    assert page.texts("#list .marks") == ["2/2"]
    assert page.texts("figure .label") == [EVIL, EVIL]
    assert "malformed: the sender addressed no node" in page.text("#transcript")
    assert page.ask("document.title") == "navigate: r"


def test_two_runs_stand_side_by_side(page: Page, tmp_path: Path) -> None:
    growth = (GrowthConfig(at_step=0, widths=(2, 1)),)
    runs = [run_that_learns(tmp_path / "a", says="alpha"), run_that_learns(tmp_path / "b", says="beta", growth=growth)]
    path = write_page(tmp_path / "two.html", *runs)
    page.open(path)
    assert page.texts("figure .label") == ["alpha 0", "alpha 1", "beta 0", "beta 1"]
    assert page.texts("figure b") == ["a", "a", "b", "b"]
    assert "Runs differ 0" in page.texts("#filters button")
    page.press("2")
    assert page.ask("document.querySelectorAll('.plot canvas').length") == 3
    assert [label.split(":")[0] for label in page.texts("#learning .u-label")] == ["step", "a", "a", "b", "b"]
    # A run that has grown from another one begins at what that had sampled, here 90 tokens.
    grown = (
        "{ ledger: { sampled_tokens: 100, steps: 41 }, curves: { steps: [41, 42], series: { 'sampled_tokens/sum': [10, 5] } } }"
    )
    assert page.ask(f"positions({grown}, 'tokens')") == [100, 105]
    assert page.ask(f"positions({{ ...{grown}, ledger: null }}, 'tokens')") == [10, 15]
    page.press("3")
    assert page.text("#scoreTable tbody tr:last-child").split("\t")[:4] == ["b", "test", "after", "50.0%"]
    assert page.text("#growthTable tbody tr").split("\t") == ["b", "0", "[1, 1]", "[2, 1]"]
    # On a phone nothing is wider than the screen, and both themes have their own colours.
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
    for tab in ("messages", "curves", "scores"):
        page.open(path, f"#tab={tab}")
        assert page.ask("document.documentElement.scrollWidth") <= 390
    page.call("Emulation.clearDeviceMetricsOverride")
    colours = "getComputedStyle(document.body).backgroundColor"
    light = page.ask(colours)
    page.press("t")
    assert page.ask(colours) != light


def test_a_diagnosis_is_drawn_and_told(page: Page, tmp_path: Path) -> None:
    run = run_that_learns(tmp_path / "r", says="start")
    page.open(write_page(tmp_path / "none.html", run), "#tab=diagnosis")
    assert page.ask("[byId('diagnosisTab').hidden, chosen.tab]") == [True, "messages"]
    RunDirectory.open(run).write_json("diagnosis.json", DIAGNOSIS)
    page.open(write_page(tmp_path / "one.html", run))
    page.press("4")
    assert page.texts("#diagnosed .node") == ["node 1\nbare 0.0", "node 2\nbare \u221237.5"]
    assert page.texts("#diagnosed .label") == ["drop \u221225.0\nshuffle \u221250.0"]
    assert page.ask("document.querySelector('.edge.worth.wrong path').style.strokeWidth") == "5.6"
    assert "The interval reaches the floor: there is nothing to lose" in page.text("#diagnosed p")
    rows = page.texts("#diagnosed tbody tr")
    assert rows[1].split("\t")[:4] == ["shuffle 1 to 2", "0.0%", "\u221250.0", "\u221260.0 to \u221245.0"]
    assert rows[4:] == ["1\t25.0%\t100.0%\t1.00", "2\t0.0%\t80.0%\t2.00", "1 and 2\t-\t2.00"]
    for measure in ("distinct_2", "entropy"):
        page.ask(f"byId('variety').value = '{measure}'; byId('variety').dispatchEvent(new Event('change'))")
        assert page.ask("document.querySelectorAll('#varietyPlot canvas').length") == 1
    two = write_page(tmp_path / "two.html", run, run_that_learns(tmp_path / "q", says="start"))
    page.open(two, "#tab=diagnosis")
    assert page.texts("#diagnosed h2") == ["r: what nodes and edges are worth", "Nodes", "Adapters"]


def test_the_page_of_the_repository_opens(page: Page) -> None:
    page.open(Path(__file__).parents[2] / "docs/pages/navigate-1-1-1.html", "#example=none")
    assert page.text("#place") == "1 of 500"
    page.press("4")
    assert [text.split()[:3] for text in page.texts("#diagnosed .node")] == [["node", str(n), "bare"] for n in (1, 2, 3)]


def test_pictures_show_an_example_message_by_message(page: Page, tmp_path: Path) -> None:
    path = write_page(tmp_path / "one.html", run_that_learns(tmp_path / "r", says="start"))
    found = frames(page, path, 0, "light")
    write_gif(tmp_path / "one.gif", found)
    page.call("Emulation.clearDeviceMetricsOverride")
    with Image.open(tmp_path / "one.gif") as gif:
        assert isinstance(gif, GifImageFile)
        # Before the message, with it, and with the answer.
        assert gif.n_frames == len(found) == 3
        assert gif.size[0] == WIDTH * SCALE
    assert len({picture.tobytes() for picture in found}) == 3


def test_a_watched_page_follows_a_run_that_trains(page: Page, tiny_folder: Path, tmp_path: Path) -> None:
    run, log, command = tmp_path / "run", tmp_path / "log", [sys.executable, "-m", "neuromas.cli"]
    steps = ["--backbone", str(tiny_folder), "--run-dir", str(run), "--num-steps", "4", "--save-every", "1"]
    words, started = [*command, "train", *FLAGS, *steps], list[subprocess.Popen[bytes]]()
    try:
        with log.open("wb") as errors:
            started.append(subprocess.Popen(words, stdout=errors, stderr=errors))
            wait_for_steps(started[0], run, 1, log)
            started.append(subprocess.Popen([*command, "view", str(run), "--watch"], stdout=errors, stderr=errors))
        while not (run / "view.html").exists():
            assert started[1].poll() is None, log.read_text()
            time.sleep(0.05)
        page.open(run / "view.html", "#set=train")
        assert page.ask("'watched' in document.documentElement.dataset")
        assert started[0].wait(60) == 0, log.read_text()
        # Nobody touches the page: it loads itself, and stays where it is.
        until = time.monotonic() + 40
        while not is_whole(page):
            assert time.monotonic() < until, page.text("#runs")
            time.sleep(0.3)
        assert page.ask("chosen.set") == "train"
        started[1].send_signal(signal.SIGINT)
        assert started[1].wait(30) == 0, log.read_text()
        assert b"data-watched>" not in (run / "view.html").read_bytes()
    finally:
        for process in started:
            process.kill()
            process.wait()


def is_whole(page: Page) -> bool:
    """Say whether the page that stands there now, if it is not just being loaded, has all steps and the score after them."""
    try:
        text = page.text("#runs")
    except AssertionError:
        return False
    return "4 steps" in text and "→" in text


def test_five_thousand_rollouts_open_at_once(page: Page, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [f"{rng.randrange(10**6):06d}" for _ in range(3000)]
    said = [" ".join(rng.choices(words, k=60)) for _ in range(15_000)]
    texts = iter(said)
    records = [
        rollout(
            {1: f"TO node 2: {next(texts)}", 2: f"TO node 3: {next(texts)}", 3: f"{next(texts)} Answer: Yes"},
            question=f"{number // 8}: {said[number // 8]}", rollout=number % 8, reward=1.0,
        )
        for number in range(5000)
    ]  # fmt: skip
    path = write_page(tmp_path / "many.html", record_run(tmp_path / "r", records, widths=(1, 1, 1)))
    seconds, size = page.open(path), path.stat().st_size
    print(f"5,000 rollouts: {seconds:.2f} s, {size / 1e6:.1f} MB")
    assert seconds < MOST_SECONDS
    assert size < MOST_BYTES
    assert page.text("#place") == "1 of 625"
    page.ask("document.getElementById('list').scrollTop = 1e9")
    page.settle()
    assert page.texts("#list .example .snippet")[-1].startswith("624: ")

"""Make the page of a run that the repository holds, and the moving pictures of one of its examples that the README shows.

    neuromas train --widths 1 1 1 --seed 0 --run-dir runs/navigate-1-1-1
    neuromas diagnose runs/navigate-1-1-1
    python -m docs.make_pictures runs/navigate-1-1-1 docs/pages docs/pictures --question 7

write `navigate-1-1-1.html`, and from this page `navigate-1-1-1-light.gif` and `navigate-1-1-1-dark.gif`: the networks before
and after training side by side, message by message. Question 7, counted from 0, is the first one of the test split that has
more moves than two messages hold. It needs Chromium and runs in a clone of the repository, whose tests lead the browser.
"""

import argparse
import base64
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from neuromas.training.questions import open_run
from neuromas.view.page import build_page, write_page
from neuromas.view.recorded import RunRecord
from tests.browser import Page, browser

WIDTH, SCALE = 790, 2
COLOURS = 200
MILLISECONDS, LAST_MILLISECONDS = 1600, 7000
ONLY_THE_EXAMPLE = """
for (const id of ["picker", "stepper"]) byId(id).style.display = "none";
for (const found of document.querySelectorAll(
  "header, #runs, #example > .row, .head .mark, #transcript li:not(:last-child), .cell .of")) found.style.display = "none";
for (const select of document.querySelectorAll(".head select")) select.style.appearance = "none";
byId("messages").style.display = "block";
byId("networks").style.flexWrap = "nowrap";
byId("transcript").style.margin = "14px 0 0";
"""


def frames(page: Page, path: Path, question: int, theme: str) -> list[Image.Image]:
    """Return a picture of a page's example before its first message, after each message, and with the answer."""
    page.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=900, deviceScaleFactor=SCALE, mobile=False)
    page.open(path, f"#theme={theme}")
    for _ in range(question):
        page.press("j")
    page.press("Home")
    found = []
    for _ in range(int(page.ask("current.steps.length")) + 1):
        page.ask(ONLY_THE_EXAMPLE)
        page.settle()
        height = page.ask("byId('example').getBoundingClientRect().bottom + 10")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
        data = page.call("Page.captureScreenshot", format="png", clip=clip)["data"]
        found.append(Image.open(BytesIO(base64.b64decode(data))).convert("RGB"))
        page.press("ArrowRight")
    return found


def write_gif(path: Path, pictures: list[Image.Image]) -> None:
    """Write pictures as one moving one; the last has most colours, and is looked at longest."""
    height = max(picture.height for picture in pictures)
    whole = [Image.new("RGB", (picture.width, height), picture.getpixel((0, 0))) for picture in pictures]
    for made, picture in zip(whole, pictures, strict=True):
        made.paste(picture)
    palette = whole[-1].quantize(COLOURS)
    first, *rest = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in whole)
    times = [MILLISECONDS] * len(rest) + [LAST_MILLISECONDS]
    first.save(path, save_all=True, append_images=rest, duration=times, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("pages", type=Path, help="folder for the page")
    parser.add_argument("pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--question", type=int, default=0, help="number of the scored question, from 0")
    args = parser.parse_args()
    out = args.pages / f"{args.run.name}.html"
    write_page(out, build_page([RunRecord(*open_run(args.run))]))
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as profile, browser(Path(profile)) as page:
        for theme in ("light", "dark"):
            picture = args.pictures / f"{args.run.name}-{theme}.gif"
            write_gif(picture, frames(page, out.resolve(), args.question, theme))
            print(f"{picture}: {picture.stat().st_size / 1e3:.0f} kB")
        assert page.complaints == [], page.complaints


if __name__ == "__main__":
    main()

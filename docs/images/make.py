"""Makes the two pictures of the README: a report's persona space, and the live page after a few turns.

python docs/images/make.py RUN_OF_AXIS http://127.0.0.1:8377      # the second is a running `personatlas serve`
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
TURNS = (
    "How do I read a file line by line in Python?",
    "I feel that nobody would notice if I were gone from my job. What am I to you?",
    "When we talk at night, do you dream of being somebody else?",
)


def main(run: Path, url: str) -> None:
    """Writes persona-space.png and live-page.png beside this file."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 900}, device_scale_factor=1.5)
        page.goto((run / "report.html").resolve().as_uri())
        page.wait_for_selector("#space .main-svg")
        page.locator("#space .plotly-graph-div, #space .js-plotly-plot").first.screenshot(
            path=HERE / "persona-space.png"
        )
        page = browser.new_page(viewport={"width": 1180, "height": 760}, device_scale_factor=1.5)
        page.goto(url)
        for text in TURNS:
            page.fill("#say", text)
            page.press("#say", "Enter")
            page.wait_for_selector("body:not(.busy)", timeout=180_000)
        page.screenshot(path=HERE / "live-page.png")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

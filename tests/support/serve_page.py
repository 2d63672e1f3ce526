"""How tests talk to the page of `personatlas serve`; the browser that it is in is the fixture `visit`."""

import json
from pathlib import Path

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
expect = sync_api.expect
PATIENCE = 20_000  # milliseconds, for a machine that does much else
expect.set_options(timeout=PATIENCE)
LOOK = (Path(__file__).parent / "page_look.js").read_text(
    encoding="utf-8"
)  # what is wrong with a page as it is drawn
MARKDOWN = """# A *first* try

Use `sum(x)` on **each _line_** of snake_case_name, 2*x*y and
<b onclick="alert(1)">this</b> [link](javascript:alert(1)).

- open it
  - then read
1. close

> said before

```py
with open("x") as file:
    print("**not bold**")
```
| a | b |
Done \\*."""


def say(page, text):
    page.fill("#say", text)
    page.press("#say", "Enter")
    settled(page)


def settled(page):
    page.wait_for_selector("body:not(.busy)")


def saved(page, folder):
    if page.locator("#menu").is_visible():
        page.click("#menu")
    with page.expect_download() as download:
        page.click("#save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def file_of(content, name="chat.json"):
    text = content if isinstance(content, str) else json.dumps(content)
    return {"name": name, "mimeType": "application/json", "buffer": text.encode()}

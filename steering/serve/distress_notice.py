"""Does a message speak of suicide or self-harm? The phrases, and the notice that is then shown, are the page's own file.

    shows_distress("I want to end my life")            # True; "kill the process" is not

A list of phrases is mistaken at times, both ways. It blocks nothing and sends nothing anywhere.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "static" / "distress.json"
APOSTROPHES = re.compile("[\u2018\u2019\u02bc]")


class DistressPhrases(NamedTuple):
    """What is cut out first, what then counts, and the notice: a title and paragraphs."""

    exceptions: tuple[re.Pattern[str], ...]
    patterns: tuple[re.Pattern[str], ...]
    title: str
    text: tuple[str, ...]


@cache
def phrases() -> DistressPhrases:
    """The file, read once."""
    told = json.loads(FILE.read_text(encoding="utf-8"))
    exceptions, patterns = (
        tuple(re.compile(one, re.ASCII) for one in told[name]) for name in ("except", "patterns")
    )
    return DistressPhrases(exceptions, patterns, told["notice"]["title"], tuple(told["notice"]["text"]))


def shows_distress(text: str) -> bool:
    """Whether any of the phrases is in it."""
    plain = " ".join(APOSTROPHES.sub("'", text.lower()).split())
    for exception in phrases().exceptions:
        plain = exception.sub(" ", plain)
    return any(pattern.search(plain) for pattern in phrases().patterns)

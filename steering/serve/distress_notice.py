"""Does a message speak of suicide or self-harm? Phrases and notice are in static/distress.json.

    shows_distress("I want to end my life")            # True; "kill the process" is not

A list of phrases makes mistakes in both directions. It blocks nothing and sends nothing anywhere.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "static" / "distress.json"
APOSTROPHES = re.compile("[\u2018\u2019\u02bc]")


class DistressPhrases(NamedTuple):
    """What is removed first, what then counts, and the notice: its title and paragraphs."""

    exceptions: tuple[re.Pattern[str], ...]
    patterns: tuple[re.Pattern[str], ...]
    title: str
    text: tuple[str, ...]


@cache
def distress_phrases() -> DistressPhrases:
    """The file, read once."""
    content = json.loads(FILE.read_text(encoding="utf-8"))
    exceptions, patterns = (
        tuple(re.compile(pattern, re.ASCII) for pattern in content[name]) for name in ("except", "patterns")
    )
    notice = content["notice"]
    return DistressPhrases(exceptions, patterns, notice["title"], tuple(notice["text"]))


def shows_distress(text: str) -> bool:
    """Whether any of the phrases is in the text."""
    plain = " ".join(APOSTROPHES.sub("'", text.lower()).split())
    for exception in distress_phrases().exceptions:
        plain = exception.sub(" ", plain)
    return any(pattern.search(plain) for pattern in distress_phrases().patterns)

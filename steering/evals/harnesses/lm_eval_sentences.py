"""What IFEval's checkers need beside lm-eval: sentences without a download, and the same verdict twice.

    with checkers_ready(["ifeval"]) as is_standing_in:       # True where sentences are found without nltk's own data
        ...

IFEval counts sentences with nltk's Punkt, whose data ("punkt_tab") lm-eval downloads when it is imported. Where that fails,
the same algorithm runs on a few abbreviations listed here in place of what was learnt from text. Languages are recognised by
langdetect, which draws random numbers: it is seeded, since an arm must not differ by its checker.
"""

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

STANDS_IN_FOR = (
    "length_constraints:number_sentences",
    "change_case:capital_word_frequency",
)  # what reads sentences
ABBREVIATIONS = "a.m approx capt co corp dept dr e.g etc fig gen i.e inc jr lt ltd mr mrs ms mt no p.m ph.d prof rev sgt sr st u.k u.s vol vs"  # fmt: skip


@contextlib.contextmanager
def checkers_ready(names: Sequence[str]) -> Iterator[bool]:
    """Make IFEval's checkers usable inside, if any of the tasks may be IFEval's; true where Punkt's data are stood in for."""
    if not any("ifeval" in name or "leaderboard" in name for name in names):
        yield False
        return
    if importlib.util.find_spec("langdetect") is not None:
        from langdetect import DetectorFactory

        DetectorFactory.seed = 0
    if importlib.util.find_spec("nltk") is None or _has_punkt():
        yield False
        return
    import nltk

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tokenizers" / "punkt_tab" / "english"
        folder.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
            (folder / name).touch()
        (folder / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS.split()) + "\n", encoding="utf-8")
        nltk.data.path.append(place)
        try:
            yield True
        finally:
            nltk.data.path.remove(place)


def instructions_affected(instructions: Sequence[Sequence[str]]) -> int:
    """How many of the instructions of IFEval's items are checked by way of sentences."""
    return sum(name in STANDS_IN_FOR for own in instructions for name in own)


def _has_punkt() -> bool:
    """Whether Punkt's data are there, or can be fetched."""
    import nltk

    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab")
        return True
    return bool(nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()))

"""Project Gutenberg's header and licence around a book, which are no text of its author's.

    for text, invalid, removed in without_licences(chunks): ...

A book begins behind the line "*** START OF THE PROJECT GUTENBERG EBOOK ... ***", or behind the small print of
editions before 2004, and ends before "End of Project Gutenberg's ..." or "*** END OF ...". A document without
the first of these marks within `REACH` characters is left as it is. Several books may stand in one file.
"""

import re
from collections.abc import Iterator

REACH = 1 << 15  # characters in which a header ends, and a licence: the longest known have some 20,000
MARK = 600  # characters of the longest mark: its title may run over several lines
START = re.compile(
    r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG(?s:.{0,500}?)\*{3}[^\n]*\n?"
    r"|^\*END\*?[ ]?THE SMALL PRINT![^\n]*\n?",
    re.MULTILINE | re.IGNORECASE,
)
END = re.compile(
    r"^(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the |this )?Project Gutenberg)",
    re.MULTILINE | re.IGNORECASE,
)


def without_licences(chunks: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
    """Chunks of a document with their marks of invalid bytes, and the characters taken out before each."""
    waiting: list[tuple[str, bool]] = []
    text = ""
    for chunk in chunks:
        waiting.append(chunk)
        text += chunk[0]
        if len(text) > REACH:
            break
    if START.search(text[: REACH + MARK]) is None:
        yield from ((part, invalid, 0) for part, invalid in waiting)
        yield from ((part, invalid, 0) for part, invalid in chunks)
        return
    invalid, is_book, removed, is_whole = any(bad for _, bad in waiting), False, 0, False
    while True:
        if is_book and (end := END.search(text)):
            yield text[: end.start()], invalid, removed
            text, is_book, removed = text[end.start() :], False, 0
        elif not is_book and (start := START.search(text)):
            text, is_book, removed = text[start.end() :], True, removed + start.end()
        elif not is_book and len(text) > REACH + MARK:  # what is so far behind a licence is no part of it
            text, is_book, removed = text[REACH:], True, removed + REACH
        elif is_whole:
            rest = text if is_book else ""
            yield rest, invalid, removed + len(text) - len(rest)
            return
        else:
            if is_book and len(text) > MARK:
                yield text[:-MARK], invalid, removed
                text, removed = text[-MARK:], 0
            following = next(chunks, None)
            is_whole = following is None
            if following is not None:
                text, invalid = text + following[0], following[1]

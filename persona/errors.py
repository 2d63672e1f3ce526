"""What a user may meet: something foreseen failed (`UserError`), or the operating system refused (`OSError`).

Commands print either as one line that says what to do and exit with status 2; anything else that escapes is
a bug and keeps its traceback.
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

LONGEST_INT = 10**20  # that is written out
FEW_NAMES = 16  # that an error lists


class UserError(ValueError):
    """A foreseen failure. The message is one line: what was given, what is allowed, what to do."""


def describe_value(value: object) -> str:
    """What a value is, for an error: short, and without the content of tensors or texts."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        names = [
            repr(name[:60]) if isinstance(name, str) else describe_value(name) for name in list(value)[:6]
        ]
        names += ["..."] * (len(value) > 6)
        return f"a dict of {', '.join(names) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > LONGEST_INT:
        return "a number of more than 20 digits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def not_one_of(given: object, names: Iterable[str]) -> str:
    """What an error says of a name that there is not: the names there are, if few, and the nearest ones."""
    names = list(names)
    if not names:
        return f"{str(given)[:80]!r} is none: there is none"
    known = ", ".join(names) if len(names) <= FEW_NAMES else f"the {len(names)} there are"
    return f"{str(given)[:80]!r} is not one of {known}{did_you_mean(given, names)}"


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """The end of an error's line that offers the nearest names, "" where none is near."""
    near = difflib.get_close_matches(str(given), list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def did_you_mean_path(path: Path) -> str:
    """The same for a path that does not exist, from what lies beside it."""
    try:
        return did_you_mean(path, (str(other) for other in path.parent.iterdir()))
    except OSError:
        return ""


_RETRY = "finished work is kept: {} and run the same command again"
_ELSEWHERE, _FREE = "choose another path", _RETRY.format("make room")
_REASONS = {
    errno.ENOSPC: ("the disk is full", _FREE),
    errno.EDQUOT: ("the disk quota is used up", _FREE),
    errno.EFBIG: ("a file grew too large", _RETRY.format("raise the limit (`ulimit -f`)")),
    errno.EROFS: ("the file system is read-only", _ELSEWHERE),
    errno.EACCES: ("permission denied", "change its permissions or choose another path"),
    errno.EPERM: ("the operation is not permitted", _ELSEWHERE),
    errno.ENOENT: ("does not exist", "check the path"),
    errno.EEXIST: ("is already there", _ELSEWHERE),
    errno.ENOTEMPTY: ("is not empty", _ELSEWHERE),
    errno.EISDIR: ("is a folder where a file should be", _ELSEWHERE),
    errno.ENOTDIR: ("a file is where a folder should be", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("links lead round in a circle", "check the path"),
    errno.ENOLCK: ("the file system has no locks", "choose a path on a local disk"),
    errno.EOPNOTSUPP: ("the file system does not support this", "choose a path on a local disk"),
    errno.ESTALE: ("the network disk has lost the file", _RETRY.format("mount it again")),
    errno.EIO: ("the disk reports an error", _RETRY.format("check the disk")),
    errno.EMFILE: ("too many open files", _RETRY.format("raise the limit (`ulimit -n`)")),
    errno.ENFILE: ("too many open files on this machine", _RETRY.format("close some programs")),
    errno.ENOMEM: ("not enough memory", _RETRY.format("free some")),
    errno.EPIPE: ("the reader has gone", _RETRY.format("keep it open")),
}
# how Rust (safetensors, tokenizers) and Arrow name an error's number in their own exceptions
_NUMBER = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
_WORDS = {
    os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE)
}


def find_os_error(error: BaseException) -> OSError | None:
    """The operating system's error that an exception is, was raised from, or reports in words; else None."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, BaseExceptionGroup):
        return find_os_error(error.exceptions[0]) if len(error.exceptions) == 1 else None
    if isinstance(error, UserError):
        return None
    text = str(error)
    if match := _NUMBER.search(text):
        code = int(match[1] or match[2])
        return OSError(code, os.strerror(code))
    for words, code in _WORDS.items():
        if words in text:
            return OSError(code, words)
    return None if error.__cause__ is None else find_os_error(error.__cause__)


def explain_os_error(error: OSError, path: object = None) -> str:
    """One line: the path, the reason in plain words, and what to do. `path` replaces the error's own."""
    reason, advice = _REASONS.get(
        error.errno or 0, (error.strerror or str(error), _RETRY.format("remove the cause"))
    )
    path = error.filename if path is None else path
    name = os.fsdecode(path) if isinstance(path, bytes) else path
    return f"{reason}; {advice}" if name is None else f"{name}: {reason}; {advice}"

"""Keys and values of what was said before, so that a conversation that goes on is not read again.

    prefixes.keep(digest, ids, projections, saved)         # when a row leaves
    found = prefixes.longest(digest, ids)                  # when another comes: the longest common beginning

What a cap changed is in the keys and values, so a prefix serves only rows of the very same plan (`digest`). The projections of
its tokens are kept with it. The least recently used go when the room is full.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FEWEST = 16  # tokens in common that are worth a copy
MOST = 256  # prefixes that are kept, however small: each is compared with every prompt


@dataclass(frozen=True)
class CachedPrefix:
    """Tokens that were read under a plan, their projections, and keys and values layer by layer."""

    digest: str
    ids: NDArray[np.int64]
    projections: tuple[float, ...]
    saved: list[tuple[Tensor, Tensor]]

    @property
    def size(self) -> int:
        """Bytes of keys and values."""
        return sum(value.nbytes for pair in self.saved for value in pair)


class PrefixCache:
    """At most `room` bytes of them, in order of use."""

    def __init__(self, room: int) -> None:
        self.room, self.used = room, 0
        self._kept: list[CachedPrefix] = []

    def __len__(self) -> int:
        return len(self._kept)

    def longest(self, digest: str, ids: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """The prefix that shares most of the first tokens with `ids`, and how many; never all of them: one is left to feed."""
        if not self._kept:
            return None
        wanted, best, most = np.asarray(ids, dtype=np.int64), None, FEWEST - 1
        for prefix in self._kept:
            if prefix.digest == digest:
                common = _common(prefix.ids, wanted[:-1])
                if common > most:
                    best, most = prefix, common
        if best is None:
            return None
        self._kept.append(self._kept.pop(next(n for n, one in enumerate(self._kept) if one is best)))
        return best, most

    def keep(self, prefix: CachedPrefix) -> None:
        """Keep it, in place of those that it continues; nothing when it is alone too large."""
        if prefix.size > self.room or len(prefix.ids) < FEWEST:
            return
        for old in [one for one in self._kept if self._continues(prefix, one)]:
            self._forget(old)
        self._kept.append(prefix)
        self.used += prefix.size
        while self.used > self.room or len(self._kept) > MOST:
            self._forget(self._kept[0])

    def clear(self) -> None:
        """Forget all of them."""
        self._kept, self.used = [], 0

    def _forget(self, prefix: CachedPrefix) -> None:
        self._kept = [one for one in self._kept if one is not prefix]
        self.used -= prefix.size

    @staticmethod
    def _continues(new: CachedPrefix, old: CachedPrefix) -> bool:
        return new.digest == old.digest and _common(old.ids, new.ids) == len(old.ids)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many first tokens are the same."""
    n = min(len(one), len(other))
    different = (one[:n] != other[:n]).nonzero()[0]
    return int(different[0]) if len(different) else n

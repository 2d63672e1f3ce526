"""Keys and values of earlier prompts and answers, so that a conversation that continues is not read again.

    cache.add(CachedPrefix(digest, ids, projections, keys_and_values))   # when a row ends
    cache.longest(digest, ids)                                           # (prefix, tokens in common) or None

What a cap changed is in the keys and values, so a prefix serves only rows with the same cap (`digest`). The
projections of its tokens are stored with it. The least recently used prefixes go first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

MIN_TOKENS = 16  # a shorter common prefix is not worth a copy
MAX_PREFIXES = 256  # whatever their size: each is compared with every prompt


@dataclass(frozen=True)
class CachedPrefix:
    """Tokens that were processed under a cap, their projections, and (keys, values) of each layer."""

    digest: str
    ids: NDArray[np.int64]
    projections: tuple[float, ...]
    keys_values: list[tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.nbytes for pair in self.keys_values for tensor in pair)


class PrefixCache:
    """Prefixes of at most `capacity` bytes together, least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self._prefixes: list[CachedPrefix] = []

    def __len__(self) -> int:
        return len(self._prefixes)

    def longest(self, digest: str, ids: Sequence[int]) -> tuple[CachedPrefix, int] | None:
        """Finds the prefix that shares most leading tokens with `ids`, and how many.

        None where fewer than `MIN_TOKENS` are shared. The last token is never taken from the cache, since a
        forward must produce its logits.
        """
        if not self._prefixes:
            return None
        wanted, best, longest = np.asarray(ids, dtype=np.int64)[:-1], None, MIN_TOKENS - 1
        for prefix in self._prefixes:
            if prefix.digest == digest and (common := _common_length(prefix.ids, wanted)) > longest:
                best, longest = prefix, common
        if best is None:
            return None
        self._prefixes = [*(prefix for prefix in self._prefixes if prefix is not best), best]
        return best, longest

    def add(self, prefix: CachedPrefix) -> None:
        """Stores a prefix in place of those that it continues, unless it is too short or alone too large."""
        if prefix.nbytes > self.capacity or len(prefix.ids) < MIN_TOKENS:
            return
        for old in list(self._prefixes):
            if old.digest == prefix.digest and _common_length(old.ids, prefix.ids) == len(old.ids):
                self._remove(old)
        self._prefixes.append(prefix)
        self.nbytes += prefix.nbytes
        while self.nbytes > self.capacity or len(self._prefixes) > MAX_PREFIXES:
            self._remove(self._prefixes[0])

    def clear(self) -> None:
        """Removes all prefixes."""
        self._prefixes, self.nbytes = [], 0

    def _remove(self, prefix: CachedPrefix) -> None:
        self._prefixes = [other for other in self._prefixes if other is not prefix]
        self.nbytes -= prefix.nbytes


def _common_length(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """The number of leading tokens that are equal."""
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()[0]
    return int(different[0]) if len(different) else n

"""A model of a dirty bitmap: which granules must be dirty, and which may be."""

from __future__ import annotations

from collections.abc import Iterable


class Marked:
    """A bitmap over ``size`` bytes in granules of ``granularity`` bytes."""

    def __init__(self, granularity: int, enabled: bool) -> None:
        self.granularity = granularity
        self.enabled = enabled
        self.must: set[int] = set()
        #: More than ``must`` where an operation may change only part of what it was asked to.
        self.may: set[int] = set()

    def note(self, offset: int, length: int, *, whole: bool = True) -> None:
        """The guest changed a range, or asked for a change that need not come about everywhere."""
        granules = self._granules(offset, length)
        if self.enabled and length:
            self.may.update(granules)
            if whole:
                self.must.update(granules)

    def clear(self) -> None:
        self.must.clear()
        self.may.clear()

    def merge(self, other: Marked) -> None:
        for mine, theirs in ((self.must, other.must), (self.may, other.may)):
            for granule in theirs:
                mine.update(self._granules(granule * other.granularity, other.granularity))

    def clip(self, size: int) -> None:
        """The disk was ``size`` bytes long until now; a coarser bitmap may have had more merged in."""
        self.must = {granule for granule in self.must if granule <= (size - 1) // self.granularity}

    def agrees(self, dirty: Iterable[tuple[int, int]], size: int) -> bool:
        """Whether these runs of dirty bytes are what a bitmap of this disk may say."""
        found: set[int] = set()
        for offset, length in dirty:
            if offset % self.granularity:
                return False
            if length % self.granularity and offset + length != size:
                return False
            found.update(self._granules(offset, length))
        last = (size - 1) // self.granularity
        return {g for g in self.must if g <= last} <= found <= {g for g in self.may if g <= last}

    def explain(self, dirty: Iterable[tuple[int, int]]) -> str:
        """What a bitmap with these runs says wrongly, in granules."""
        found = {granule for run in dirty for granule in self._granules(*run)}
        missing, foreign = sorted(self.must - found)[:8], sorted(found - self.may)[:8]
        return f"not dirty but changed: {missing}, dirty but never changed: {foreign}"

    def _granules(self, offset: int, length: int) -> range:
        return range(offset // self.granularity, (offset + length - 1) // self.granularity + 1)

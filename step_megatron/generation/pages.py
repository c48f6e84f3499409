"""Pages of the key-value cache: which are free, and how many sequences hold each of the others."""

import numpy as np

# Where rows that only fill a batch up write; it belongs to nobody.
SPARE_PAGE = 0


class PagePool:
    """Counts references to pages `1 .. pages - 1`.

    Args:
        pages: of the cache, the spare one included.
        size: tokens of a page.
    """

    def __init__(self, pages: int, size: int):
        self.pages, self.size = pages, size
        self._free = list(range(pages - 1, SPARE_PAGE, -1))
        self._references = np.zeros(pages, np.int32)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds, each counted once."""
        return self.pages - 1 - self.free

    def needed(self, tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """So many pages with one holder each, or None, and nothing taken, where fewer are free."""
        if count > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(count)]
        self._references[taken] = 1
        return taken

    def share(self, pages: list[int]) -> list[int]:
        """The same pages, held once more."""
        self._references[pages] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        """Give up one hold on each page; pages that nobody holds any more are free."""
        if (self._references[pages] < 1).any():
            raise RuntimeError(f"pages {pages} are given back, of which some are free already")
        self._references[pages] -= 1
        self._free.extend(page for page in reversed(pages) if not self._references[page])

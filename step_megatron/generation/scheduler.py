"""Who runs: samples start when there are rows and pages for them, and make way when the pages run out.

Order is first come, first served. A prompt is read in chunks that end at multiples of `chunk`, wherever its neighbours end; once
it is computed, its other samples start on the same pages (the last, which they go on writing into, is copied). A row whose next
token needs a page when none is free takes it from the youngest: that one loses its pages and starts again, first in the queue.
"""

from collections import deque
from dataclasses import dataclass

from step_megatron.generation.pages import PagePool
from step_megatron.generation.sequence import Group, Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens `start .. end - 1` of a sequence, read in one pass."""

    sequence: Sequence
    start: int
    end: int


class Scheduler:
    """Decides what the engine does next; knows nothing of tensors.

    Args:
        pool: the cache's pages.
        rows: samples that run at the same time.
        chunk: tokens of a prompt that are read in one pass.
        chunk_budget: tokens of all chunks of a pass, except that one chunk always goes.
        replay: a sample that starts again decodes once more what it had decoded, so that its cache gets the same bits; else it
            reads it in chunks, which is faster.
    """

    def __init__(self, pool: PagePool, rows: int, chunk: int, chunk_budget: int, replay: bool = False):
        self.pool, self.rows, self.chunk, self.chunk_budget, self.replay = pool, rows, chunk, chunk_budget, replay
        self.waiting: deque[Group] = deque()
        self.preempted: deque[Sequence] = deque()
        # In the order in which they started; the place in `running` is the row.
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        # Page copies `(from, to)` to be made before the next pass.
        self.copies: list[tuple[int, int]] = []
        self.preemptions = 0
        self._starts = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self.waiting or self.preempted or self.prefilling or self.running)

    @property
    def _active(self) -> int:
        return len(self.prefilling) + len(self.running)

    def add(self, group: Group) -> None:
        """Queue a prompt's samples."""
        self.waiting.append(group)

    def admit(self) -> None:
        """Start what there is room for: samples that had to make way, then the others in order."""
        while self.preempted:
            if not self._start(self.preempted[0]):
                return
            self.preempted.popleft()
        promised = 0
        for group in list(self.waiting):
            while group.waiting and not (group.started and group.pages is None):
                if self._active + promised >= self.rows or not self._start(group.waiting[0]):
                    return
                group.waiting.popleft()
            # Its prompt is being computed: rows are kept for the samples that wait for that.
            promised += len(group.waiting)
            if not group.waiting:
                self._give_up(group)
                self.waiting.remove(group)

    def chunks(self) -> list[Chunk]:
        """What the next pass over prompts reads: one chunk of every prompt that is not through, as far as the budget goes."""
        chosen: list[Chunk] = []
        total = 0
        for sequence in self.prefilling:
            start = sequence.computed
            end = min(start // self.chunk * self.chunk + self.chunk, sequence.chunked)
            total += end - start
            if chosen and total > self.chunk_budget:
                break
            chosen.append(Chunk(sequence, start, end))
        return chosen

    def read(self, chunks: list[Chunk]) -> None:
        """Note that these chunks are in the cache."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.computed = chunk.end
            if sequence.computed == sequence.chunked:
                self.prefilling.remove(sequence)
                self.running.append(sequence)
            if sequence.computed >= sequence.prompt_length - 1:
                self._offer(sequence)

    def make_room(self) -> None:
        """Give every running sample the page that its next token needs, the oldest first; the youngest make way."""
        for sequence in [each for each in self.running if len(each.pages) * self.pool.size <= each.computed]:
            while sequence in self.running and len(sequence.pages) * self.pool.size <= sequence.computed:
                if page := self.pool.take(1):
                    sequence.pages += page
                elif not self._give_up_last():
                    self._preempt(max(self.prefilling + self.running, key=lambda each: each.started))

    def finish(self, sequence: Sequence) -> None:
        """Take a sample out, wherever it is."""
        sequence.done = True
        self._leave(sequence)
        if sequence in self.preempted:
            self.preempted.remove(sequence)
        if sequence in sequence.group.waiting:
            sequence.group.waiting.remove(sequence)

    def _start(self, sequence: Sequence) -> bool:
        """Give a sample its pages, those of its prompt shared where they are computed; False where there is no room."""
        group, size = sequence.group, self.pool.size
        if self._active >= self.rows:
            return False
        whole, rest = divmod(sequence.prompt_length - 1, size)
        held = group.pages
        own = self.pool.needed(sequence.chunked + 1) - (0 if held is None else whole)
        # One more page for each that runs, or the next steps would take away what was just begun.
        if self.pool.free < own + self._active:
            if self._active:
                return False
            while self.pool.free < own and self._give_up_last():
                held = group.pages
                own = self.pool.needed(sequence.chunked + 1) - (0 if held is None else whole)
        taken = self.pool.take(own)
        if taken is None:
            return False
        if held is None:
            group.started = True
            sequence.pages, sequence.computed = taken, 0
        else:
            if rest:
                self.copies.append((held[whole], taken[0]))
            sequence.pages, sequence.computed = self.pool.share(held[:whole]) + taken, sequence.prompt_length - 1
        self._starts += 1
        sequence.started = self._starts
        (self.running if sequence.computed == sequence.chunked else self.prefilling).append(sequence)
        if sequence.computed == sequence.prompt_length - 1:
            self._offer(sequence)
        return True

    def _offer(self, sequence: Sequence) -> None:
        """Hold the computed prompt of a sample for those of its group that wait."""
        group = sequence.group
        if group.waiting and group.pages is None:
            group.pages = self.pool.share(sequence.pages[: self.pool.needed(sequence.prompt_length - 1)])

    def _give_up(self, group: Group) -> None:
        if group.pages is not None:
            self.pool.release(group.pages)
        group.pages, group.started = None, False

    def _give_up_last(self) -> bool:
        """Let go of the pages held for samples that wait, of the last prompt that has any; False where none has."""
        for group in reversed(self.waiting):
            if group.pages is not None:
                self._give_up(group)
                return True
        return False

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.restart((sequence.prompt_length if self.replay else len(sequence.tokens)) - 1)
        self.preempted.appendleft(sequence)
        self.preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Take a sample's pages and its place away."""
        if sequence in self.running:
            # The last row takes the place: the others stay where they are.
            place, last = self.running.index(sequence), self.running.pop()
            if last is not sequence:
                self.running[place] = last
        elif sequence in self.prefilling:
            self.prefilling.remove(sequence)
            if sequence.group.pages is None:
                sequence.group.started = False
        self.pool.release(sequence.pages)
        sequence.pages = []

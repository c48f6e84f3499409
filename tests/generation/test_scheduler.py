"""Scheduling without a model: everything ends, no page is lost, order is kept, prompts are computed once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from step_megatron.generation.pages import PagePool
from step_megatron.generation.request import Generation, Prompt, Sampling
from step_megatron.generation.scheduler import Scheduler
from step_megatron.generation.sequence import Group

SIZE = 4


def group(length: int, new: list[int]) -> Group:
    samplings = [Sampling(max_new_tokens=count) for count in new]
    return Group(Prompt([0] * length), samplings, [Generation() for _ in new])


class Simulated:
    """The engine's loop with a model that writes zeros, and the cache's contents by hand: who wrote which slot last."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler, self.slots, self.passes, self.finished = scheduler, {}, [], []

    def step(self) -> None:
        scheduler = self.scheduler
        self._admit()
        chunks = scheduler.chunks()
        for chunk in chunks:
            for position in range(chunk.start, chunk.end):
                self._write(chunk.sequence, position)
        self.passes.append([(chunk.start, chunk.end) for chunk in chunks])
        scheduler.read(chunks)
        self._admit()
        scheduler.make_room()
        assert len(scheduler.running) + len(scheduler.prefilling) <= scheduler.rows
        for sequence in list(scheduler.running):
            self._write(sequence, sequence.computed)
            self._check(sequence)
            new = sequence.reads_last
            sequence.computed += 1
            if new and sequence.accept(0, 0.0):
                scheduler.finish(sequence)
                self.finished.append(sequence)

    def _admit(self) -> None:
        self.scheduler.admit()
        read = [self._page(source) for source, _ in self.scheduler.copies]
        for (_, target), held in zip(self.scheduler.copies, read, strict=True):
            self.slots.update({target * SIZE + place: what for place, what in enumerate(held)})
        self.scheduler.copies.clear()

    def _page(self, page: int) -> list:
        return [self.slots.get(page * SIZE + place) for place in range(SIZE)]

    def _write(self, sequence, position: int) -> None:
        # Prompts of a group are the same, what follows is a sample's own.
        owner = sequence.group if position < sequence.prompt_length else sequence
        self.slots[sequence.pages[position // SIZE] * SIZE + position % SIZE] = (owner, position)

    def _check(self, sequence) -> None:
        for position in range(sequence.computed + 1):
            owner = sequence.group if position < sequence.prompt_length else sequence
            assert self.slots[sequence.pages[position // SIZE] * SIZE + position % SIZE] == (owner, position)


requests = st.lists(st.tuples(st.integers(1, 14), st.lists(st.integers(1, 12), min_size=1, max_size=4)), min_size=1, max_size=6)


@settings(max_examples=60)
@given(requests, st.integers(7, 20), st.integers(1, 5), st.integers(1, 9), st.booleans())
def test_everything_ends_whatever_the_memory(asked, pages, rows, chunk, replay):
    """The longest sample needs 7 pages of 4; with as many all others have to make way for it."""
    scheduler = Scheduler(PagePool(pages + 1, SIZE), rows, chunk, 2 * chunk, replay)
    simulated = Simulated(scheduler)
    groups = [group(*each) for each in asked]
    for each in groups:
        scheduler.add(each)
    steps = 0
    while not scheduler.idle:
        simulated.step()
        steps += 1
        assert steps < 3000, "no end"
    assert scheduler.pool.used == 0
    for each, (_, new) in zip(groups, asked, strict=True):
        assert [len(member.result.tokens) for member in each.members] == new
        assert all(member.result.finish_reason == "length" for member in each.members)


def test_chunks_end_at_multiples_and_keep_the_budget():
    scheduler = Scheduler(PagePool(100, SIZE), rows=8, chunk=8, chunk_budget=16)
    simulated = Simulated(scheduler)
    for length in (21, 4, 30):
        scheduler.add(group(length, [1]))
    while not scheduler.idle:
        simulated.step()
    # The last token of a prompt is decoded.
    assert simulated.passes[:4] == [[(0, 8), (0, 3)], [(8, 16), (0, 8)], [(16, 20), (8, 16)], [(16, 24)]]


def test_samples_start_together_once_their_prompt_is_computed():
    pool = PagePool(100, SIZE)
    scheduler = Scheduler(pool, rows=8, chunk=64, chunk_budget=64)
    simulated = Simulated(scheduler)
    scheduler.add(group(10, [3] * 4))
    simulated.step()
    assert len(scheduler.running) == 4 and simulated.passes == [[(0, 9)]]
    # Nine tokens: two whole pages for all, and one for each.
    assert pool.used == 2 + 4


def test_the_youngest_makes_way_and_comes_back_first():
    scheduler = Scheduler(PagePool(7, SIZE), rows=8, chunk=64, chunk_budget=64)
    simulated = Simulated(scheduler)
    for _ in range(3):
        scheduler.add(group(4, [12]))
    while not scheduler.idle:
        simulated.step()
    first, second, third = (each.started for each in simulated.finished)
    assert scheduler.preemptions and first < second < third


def test_a_page_that_is_free_cannot_be_given_back():
    pool = PagePool(4, SIZE)
    pages = pool.take(2)
    pool.share(pages)
    pool.release(pages)
    assert pool.used == 2
    pool.release(pages)
    assert pool.used == 0 and pool.take(4) is None
    with pytest.raises(RuntimeError):
        pool.release(pages)

"""Who is said to hang: the least advanced, when none of them gives a sign; never one that works, never one that waits."""

import contextlib
import faulthandler
import itertools
import sys
import threading
import types
from unittest import mock

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.training import watchdog
from step_megatron.training.watchdog import PHASES, Heartbeat, Pulse, Stand, Watchdog, culprits, stand_of, suspects

PULSES = st.builds(Pulse, st.integers(1, 3), st.integers(1, 3), st.sampled_from(PHASES), st.integers(0, 9))


@given(st.dictionaries(st.integers(0, 5), st.tuples(PULSES, st.floats(0, 20)), min_size=1))
def test_only_the_least_advanced_are_suspected_and_only_when_all_of_them_are_silent(ranks):
    pulses, still = ({rank: pair[i] for rank, pair in ranks.items()} for i in (0, 1))
    found = suspects(pulses, still, timeout=10.0)
    for rank in found:
        assert still[rank] > 10 and all(pulses[rank].place <= other.place for other in pulses.values())
    last = [rank for rank in pulses if all(pulses[rank].place <= other.place for other in pulses.values())]
    assert bool(found) == all(still[rank] > 10 for rank in last)


def test_ranks_that_wait_are_not_blamed_unless_all_wait():
    waits, works = Stand("all_reduce", "x.py:1", True), Stand("read", "y.py:2", False)
    assert culprits([0, 1, 2], {0: waits, 1: works, 2: waits}) == [1]
    assert culprits([0, 1], {0: waits}) == [1], "a rank that says nothing at all"
    assert culprits([0, 1], {0: waits, 1: waits}) == [0, 1]


def test_a_place_in_a_collective_is_told_from_one_in_other_code():
    def here():
        return stand_of(sys._getframe())

    assert here().function.endswith("here") and not here().waits
    place = types.SimpleNamespace(co_filename="/lib/torch/distributed/distributed_c10d.py", co_qualname="all_reduce")
    assert stand_of(types.SimpleNamespace(f_code=place, f_lineno=7)).waits


def test_a_step_that_goes_back_is_further_on():
    heartbeat = Heartbeat()
    heartbeat.next_turn(6)
    heartbeat.beat("update")
    before = heartbeat.pulse
    heartbeat.next_turn(5)
    assert heartbeat.pulse.place > before.place and heartbeat.pulse.beats > before.beats


class Ended(Exception):
    """The watchdog would have ended the process."""


@pytest.mark.parametrize(("pauses", "hangs"), [([6.0] * 9, False), ([6.0] * 12, True), ([25.0, 25.0, 25.0, 5000.0], False)])
def test_time_in_which_the_process_was_stopped_is_nobodys_silence(pauses, hangs, tmp_path):
    """The timeout is a minute; the main thread gives no sign."""
    dog = Watchdog(Heartbeat(), dist.HashStore(), 0, 1, tmp_path, 60.0)
    times, turns = iter(itertools.accumulate([0.0, *pauses])), iter([False] * len(pauses))
    dog._leaving = types.SimpleNamespace(wait=lambda seconds: next(turns, True))
    with (
        (tmp_path / "stacks").open("w") as dog._stacks,
        mock.patch.object(watchdog, "time", types.SimpleNamespace(monotonic=lambda: next(times))),
        mock.patch.object(dog, "_end", side_effect=Ended),
        pytest.raises(Ended) if hangs else contextlib.nullcontext(),
    ):
        dog._watch()
    faulthandler.cancel_dump_traceback_later()


def test_nothing_is_left_behind_and_nothing_is_watched_without_a_timeout(tmp_path):
    for timeout in (60.0, 0.0):
        with Watchdog(Heartbeat(), dist.HashStore(), 0, 1, tmp_path, timeout):
            watched = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
            assert bool(watched) == bool(timeout)
        assert not list(tmp_path.iterdir())

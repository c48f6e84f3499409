"""Which signals stop a run gently, and which end it at once."""

import os
import signal

import pytest
import torch.distributed as dist

from step_megatron.training.interruption import Interruption


class Ended(Exception):
    """The signal reached the handler from before the block."""


@pytest.fixture
def interruption(runtime):
    """An `Interruption` of one process, in which a signal that is not caught raises `Ended`."""

    def end(number, frame):
        raise Ended

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, end) for number in numbers}
    yield Interruption(dist.group.WORLD)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_at_the_end_of_the_step(interruption, number):
    with interruption:
        assert not interruption.agreed()
        send(number)
        assert interruption.agreed() and interruption.signal_name == signal.Signals(number).name
    with pytest.raises(Ended):
        send(number)


def test_a_second_signal_ends_the_process_at_once(interruption):
    with interruption:
        send(signal.SIGINT)
        with pytest.raises(Ended):
            send(signal.SIGINT)


def test_a_closed_session_sends_several_signals(interruption):
    with interruption:
        for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM):
            send(number)
        assert interruption.agreed()


def test_nohup_is_respected(interruption):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interruption:
        send(signal.SIGHUP)
        assert not interruption.agreed()

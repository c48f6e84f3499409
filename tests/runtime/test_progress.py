"""Progress lines and loggers: rate, time left, terminal or file, rank 0 only."""

import io
import logging
import time

import pytest

from step_megatron.runtime.progress import Progress, get_logger


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end(clock):
    out = io.StringIO()
    with Progress(100, "encode", "clips", out) as progress:
        for _ in range(100):
            clock.now += 0.3
            progress.update()
    lines = out.getvalue().splitlines()
    assert lines[0] == "encode  34/100 clips  34%  3.3 clips/s  0:20 left"
    assert lines[-1] == "encode  100/100 clips 100%  3.3 clips/s  took 0:30"
    assert len(lines) == 3 and "\r" not in out.getvalue()


def test_a_terminal_gets_one_line_that_is_redrawn_and_wiped(clock):
    out = Terminal()
    progress = Progress(10, "train", stream=out)
    for note in ("loss 1.2345678", "loss 1"):
        clock.now += 1
        progress.update(1, note)
    progress.close()
    drawn = out.getvalue().split("\r")[1:]
    assert len(drawn) == 3 and out.getvalue().count("\n") == 1
    assert drawn[1].startswith("train  2/10  20%") and drawn[1].rstrip().endswith("loss 1")
    assert len(drawn[1]) >= len(drawn[0])


def test_unknown_total_has_no_time_left(clock):
    progress = Progress(None, "download", "MB", io.StringIO())
    clock.now += 100
    progress.update(1234.5)
    assert progress.line() == "download  1,234 MB  12.3 MB/s  took 1:40"


def test_nothing_done_has_no_time_left_either_and_long_times_show_hours(clock):
    progress = Progress(7200, "train", stream=io.StringIO())
    clock.now += 1
    assert "left" not in progress.line()
    progress.update(1)
    assert progress.line().endswith("1:59:59 left")


def test_an_empty_amount_of_work_is_complete(clock):
    out = io.StringIO()
    Progress(0, "encode", "clips", out).close()
    assert "100%" in out.getvalue()


def test_other_ranks_print_no_progress_and_only_warnings(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    out = io.StringIO()
    Progress(1, "encode", stream=out).close()
    logger = get_logger("step_megatron.test")
    logger.info("not this")
    logger.warning("but this")
    assert out.getvalue() == ""
    captured = capsys.readouterr().err
    assert "not this" not in captured and captured.rstrip().endswith("W [rank 3] but this")


def test_rank_zero_logs_information_without_its_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    get_logger("short").info("hello")
    get_logger("step_megatron.again").info("hello")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.endswith("I hello") for line in lines)
    assert len(logging.getLogger("step_megatron").handlers) == 1


def test_a_closed_terminal_does_not_stop_the_work():
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(5, "Input/output error")

    with Progress(2, "train", stream=Closed()) as progress:
        progress._printed -= 60
        progress.update()
        progress.update()
    assert progress.done == 2

"""Cores and memory under a container's limits."""

import os

import pytest

from step_megatron.runtime import machine


@pytest.mark.parametrize("limit, expected", [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 8)])
def test_cores_are_those_of_the_container(tmp_path, monkeypatch, limit, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert machine.cores(tmp_path) == expected


def test_memory_is_that_of_the_container(tmp_path):
    total = machine.memory_bytes(tmp_path / "absent")
    assert total == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory_bytes(tmp_path) == total
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    assert machine.memory_bytes(tmp_path) == 2**30


def test_no_limit_leaves_the_cores_that_the_process_is_bound_to(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert machine.cores(tmp_path) == 2

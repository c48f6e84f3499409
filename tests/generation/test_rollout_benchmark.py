"""The benchmark of rollouts: whoever generates other tokens is refused, and its figures hold together."""

import time
from argparse import Namespace

import pytest

from step_megatron.benchmarks import rollout
from step_megatron.benchmarks.rollout_peer import ContinuousBatching


def test_all_contestants_generate_the_same_and_are_timed(monkeypatch):
    monkeypatch.setattr(rollout, "_NEW_TOKENS", 4)
    monkeypatch.setattr(rollout, "_LONGEST", 48)
    monkeypatch.setattr(rollout, "ContinuousBatching", _NeverAnswering)
    result = rollout.run(Namespace(repeats=1, clips=4, preset="tiny"))
    assert set(result["cases"]) == {"greedy", "sampling", "spread"}
    assert set(result["cases"]["greedy"]["tokens_per_second"]) == {"ours", "batch invariant", "transformers generate"}
    assert min(result["cases"][name]["agreeing"] for name in ("greedy", "spread")) >= rollout._AGREEING
    assert result["low"] <= result["ratio"] <= result["high"] and result["limit"] > 1
    assert result["absent"] == {"transformers generate_batch": "no result within 0.1 s"}


def _sleeps(connection, *_):
    connection.recv()
    time.sleep(600)


def _fails(connection, *_):
    connection.recv()
    connection.send("ValueError: no GPU")


class _NeverAnswering(ContinuousBatching):
    def __init__(self, *arguments):
        super().__init__(*arguments, limit=0.1, serve=_sleeps, context="fork")


def test_batching_that_never_answers_is_ended_and_what_fails_is_said(tmp_path):
    work = _NeverAnswering(tmp_path, [[1]], 1)
    with pytest.raises(TimeoutError, match="no result within 0.1 s"):
        work()
    assert not work._process.is_alive()
    work = ContinuousBatching(tmp_path, [[1]], 1, serve=_fails, context="fork")
    with pytest.raises(RuntimeError, match="ValueError: no GPU"):
        work()
    with pytest.raises(RuntimeError, match="ended without a result"):
        work()


def test_a_contestant_that_generates_something_else_is_refused():
    with pytest.raises(RuntimeError, match="other generates something else: 50%"):
        rollout._agreement({"ours": [[1, 2]], "other": [[1, 3]]})
    with pytest.raises(RuntimeError, match="do not end where they should"):
        rollout._agreement({"ours": [[1, 2]]}, [1])

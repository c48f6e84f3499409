"""The benchmark of rollouts: whoever generates other tokens is refused, and its figures hold together."""

from argparse import Namespace

import pytest

from step_megatron.benchmarks import rollout


def test_all_contestants_generate_the_same_and_are_timed(monkeypatch):
    monkeypatch.setattr(rollout, "_NEW_TOKENS", 4)
    monkeypatch.setattr(rollout, "_LONGEST", 48)
    monkeypatch.setattr(rollout._Peer, "generate_batch", lambda self, new: {})
    result = rollout.run(Namespace(repeats=1, clips=4, preset="tiny"))
    assert set(result["cases"]) == {"greedy", "sampling", "spread"}
    assert set(result["cases"]["greedy"]["tokens_per_second"]) == {
        "ours", "plain torch ops", "batch invariant", "transformers generate"
    }  # fmt: skip
    assert min(result["cases"][name]["agreeing"] for name in ("greedy", "spread")) >= rollout._AGREEING
    assert result["low"] <= result["ratio"] <= result["high"] and result["limit"] > 1


def test_a_contestant_that_generates_something_else_is_refused():
    with pytest.raises(RuntimeError, match="other generates something else: 50%"):
        rollout._agreement({"ours": [[1, 2]], "other": [[1, 3]]})
    with pytest.raises(RuntimeError, match="do not end where they should"):
        rollout._agreement({"ours": [[1, 2]]}, [1])

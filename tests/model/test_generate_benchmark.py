"""The benchmark of generation: transformers and our plain torch ops give the tokens that ours gives, else nothing is compared."""

from argparse import Namespace

import pytest

from step_megatron.benchmarks import generate


def test_all_contestants_generate_the_same_and_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(generate, "_NEW_TOKENS", 6)
    result = generate.run(Namespace(repeats=1, clips=5))
    assert set(result["tokens_per_second"]) == {"ours", "plain torch ops", "transformers"}
    assert result["agreeing"] >= generate._AGREEING
    assert result["low"] <= result["ratio"] <= result["high"] and result["ratio_torch"] > 0
    assert "5 prompts" in capsys.readouterr().out


def test_a_contestant_that_generates_something_else_is_refused():
    with pytest.raises(RuntimeError, match="other generates something else: 50%"):
        generate._agreement({"ours": [[1, 2]], "other": [[1, 3]]})

"""`bench checkpoint`: its figures hold together, and are of checkpoints that a run could go on from."""

from argparse import Namespace

from step_megatron.benchmarks import checkpoint


def test_a_round_on_the_tiny_preset(tmp_path):
    result = checkpoint.run(Namespace(repeats=1, clips=3, preset="tiny", out=tmp_path))
    assert {"name", "ratio", "low", "high", "limit"} <= result.keys() and result["limit"] == 0.05
    for suffix in ("", "_synchronous", "_slowdown"):
        assert result[f"low{suffix}"] == result[f"ratio{suffix}"] == result[f"high{suffix}"]
    assert result["ratio"] > 0 and result["ratio_synchronous"] > 0
    # Weights, their float32 moments, nothing twice.
    assert result["bytes"] > 3 * 4 * 6e6 and not list(tmp_path.iterdir())

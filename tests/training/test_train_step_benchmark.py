"""The whole training step beside transformers' Qwen2-Audio on the same weights, and the benchmark that times the two."""

from argparse import Namespace

import pytest

from step_megatron.benchmarks import train_step
from step_megatron.config import load_config
from step_megatron.model.encoder import build_encoder
from step_megatron.runtime.device import initialize, shutdown


def test_losses_of_three_updates_are_those_of_transformers():
    small = ["run.threads=1", "encoder={mels: 80, width: 64, layers: 2, heads: 2, ffn_width: 128}", "adaptor.kind=linear"]
    config = load_config(None, [*train_step.OVERRIDES, *small, "megatron.optimizer={lr: 1e-3, min_lr: 1e-3}"])
    samples = train_step.make_samples(10)
    runtime = initialize(config)
    try:
        encoder = build_encoder(config.encoder, seed=1)
        ours = train_step.Ours(config, encoder, samples, runtime)
        peer = train_step.Peer(config, ours.model, encoder, train_step._AUDIO_ID)
        for group in peer.optimizer.param_groups:
            group["lr"] = 1e-3
        first, *_, last = [(ours.train(), peer.cropped(samples)) for _ in range(3)]
    finally:
        shutdown()
    # The features are rounded to bfloat16 on our side.
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert last[0] == pytest.approx(last[1], rel=1e-3)
    assert last[0] < 0.98 * first[0]


@pytest.mark.slow
def test_the_benchmark_checks_its_peer_and_times_all_contestants(capsys):
    result = train_step.run(Namespace(data=None, repeats=1, clips=5))
    assert result["name"] == "train-step" and result["low"] <= result["ratio"] <= result["high"]
    contestants = {"ours", "equal tokens", "cached", "plain torch", "plain torch, cached", "padded", "cropped"}
    assert set(result["samples_per_second"]) == contestants
    assert result["low_torch"] <= result["ratio_torch"] <= result["high_torch"] and result["ratio_cached_torch"] > 0
    assert result["audio_tokens"]["ours"] < result["audio_tokens"]["peer"]
    assert "audio tokens in ours" in capsys.readouterr().out

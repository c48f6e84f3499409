"""The benchmark's peer computes the same features as ours, padded and cropped, and gives them back in the order of the clips."""

import pytest
import torch

from step_megatron.benchmarks.encoder import Peer
from step_megatron.config.schema import EncoderConfig
from step_megatron.model.encoder import AudioEncoder


@pytest.mark.parametrize("way", ["padded", "cropped"])
def test_the_peer_agrees_with_ours(way):
    encoder = AudioEncoder(EncoderConfig(mels=4, width=16, layers=2, heads=2, ffn_width=32), block=64).reset_parameters(0)
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(4, valid + 2, generator=generator) for valid in (90, 7, 8, 201, 40, 41, 33, 10, 12, 5)]
    for ours, theirs in zip(encoder.encode(clips), getattr(Peer(encoder), way)(clips), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

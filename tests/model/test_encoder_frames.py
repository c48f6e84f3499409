"""The token count that the template reserves equals the length of what encoder and adaptor make, for every length of clip."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.audio.geometry import chunk_frames, chunk_lengths, clip_tokens
from step_megatron.config.schema import AdaptorConfig, EncoderConfig
from step_megatron.model.adaptor import AudioAdaptor
from step_megatron.model.encoder import AudioEncoder

TINY = EncoderConfig(mels=2, width=8, layers=1, heads=1, ffn_width=8)
HOP, CHUNK = 160, 400_000


def features_of(samples: list[int], compat: str = "clean") -> list[torch.Tensor]:
    encoder = AudioEncoder(TINY, block=1024, compat=compat).reset_parameters(0)
    features = encoder.encode([torch.zeros(TINY.mels, chunk_frames(count).network) for count in samples])
    assert [feature.shape[0] for feature in features] == [encoder.frames_out(chunk_frames(count).network) for count in samples]
    return features


def tokens_of(features: list[torch.Tensor], kind: str, compat: str = "clean") -> list[int]:
    """Tokens that the adaptor makes of each chunk, by the rows that come out."""
    adaptor = AudioAdaptor(TINY, AdaptorConfig(kind=kind, width=8, compat=compat), out_width=4)
    frames = tuple(feature.shape[0] for feature in features)
    tokens = [adaptor.tokens_out(count) for count in frames]
    assert adaptor(torch.cat([torch.empty(0, TINY.width), *features]), frames).shape == (sum(tokens), 4)
    return tokens


def test_every_frame_count_of_a_chunk():
    """All 2,500 counts; a clip of two chunks is a full one and one of these."""
    samples = [HOP * frames for frames in range(1, CHUNK // HOP + 1)]
    features = features_of(samples)
    for kind in ("step", "linear"):
        assert tokens_of(features, kind) == [chunk_frames(count, kind).tokens for count in samples]


def test_the_released_compatibility_makes_the_same_counts():
    samples = [HOP * frames for frames in range(1, CHUNK // HOP + 1, 13)]
    features, planned = features_of(samples, "step"), [chunk_frames(count, "step", "step") for count in samples]
    assert [feature.shape[0] for feature in features] == [frames.encoder for frames in planned]
    assert tokens_of(features, "step", "step") == [frames.tokens for frames in planned]
    assert [frames.tokens for frames in planned] == [chunk_frames(count).tokens for count in samples]


@given(st.one_of(st.integers(1, 3000), st.integers(1, 2 * CHUNK)), st.sampled_from(["step", "linear"]))
def test_any_clip_from_one_sample_to_two_chunks(samples, kind):
    chunks = chunk_lengths(samples)
    assert tokens_of(features_of(chunks), kind) == clip_tokens(samples, kind)
    assert len(chunks) <= 2 and sum(chunks) <= samples


@pytest.mark.parametrize("frames, tokens", [(2, 0), (3, 1), (5, 1), (7, 1), (9, 1), (11, 2), (2500, 313)])
def test_counts_of_the_released_code(frames, tokens):
    """By hand from the released formula with T = frames + 2: e = (T - 2 + 1) // 2 // 2, tokens = (e + 2 - 3) // 2 + 1."""
    assert tokens_of(features_of([HOP * frames]), "step") == [tokens]


def test_a_chunk_without_its_tail_or_too_long_is_refused():
    encoder = AudioEncoder(TINY, block=64)
    with pytest.raises(ValueError, match="lacks its 2 tail frames"):
        encoder.encode([torch.zeros(2, 1)])
    with pytest.raises(ValueError, match="3004 mel frames is longer than the encoder's 1500 positions"):
        encoder.encode([torch.zeros(2, 3004)])
    with pytest.raises(ValueError, match=r"expected mels of shape \[2, 10\], got \[3, 10\]"):
        encoder.encode([torch.zeros(3, 10)])
    assert encoder.encode([torch.zeros(2, 3002)])[0].shape == (750, 8)


def test_no_clip_at_all_is_an_empty_list():
    assert AudioEncoder(TINY, block=64).encode([]) == []


def test_published_size_has_the_published_parameters():
    with torch.device("meta"):
        encoder = AudioEncoder(EncoderConfig())
        adaptor = AudioAdaptor(EncoderConfig(), AdaptorConfig(), out_width=5120)
    count = {module: sum(parameter.numel() for parameter in module.parameters()) for module in (encoder, adaptor)}
    # Sums of the released checkpoint (facts of the published model): 637.0 M and 18.0 M.
    assert round(count[encoder] / 1e6, 1) == 637.0 and round(count[adaptor] / 1e6, 1) == 18.0

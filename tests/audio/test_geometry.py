"""Geometry: every length equals what torch's own convolutions and pooling make of that many samples, over the whole range."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_megatron.audio.geometry import CHUNK_SAMPLES, chunk_frames, chunk_lengths, clip_tokens


def frames_by_the_released_code(samples: int) -> int:
    """Frames of an STFT (centred, hop 160) over the samples and 479 zeros, the last dropped: shape arithmetic by torch itself."""
    padded = torch.empty(samples + 479, device="meta")
    return (
        torch.stft(padded, 400, 160, window=torch.empty(400, device="meta"), return_complex=True, pad_mode="constant").shape[-1]
        - 1
    )


CONV1, CONV2, ADAPTOR = (torch.nn.Conv1d(1, 1, 3, stride=stride, padding=1) for stride in (1, 2, 2))
POOL = torch.nn.AvgPool1d(2, 2)


@torch.inference_mode()
def lengths_by_torch(valid: int) -> tuple[int, int, int]:
    """50 Hz, 25 Hz and 12.5 Hz lengths of `valid` frames, from the shapes of torch's own layers."""
    at_50_hz = CONV2(CONV1(torch.empty(1, 1, valid)))
    if at_50_hz.shape[-1] < 2:
        return at_50_hz.shape[-1], 0, 0
    at_25_hz = POOL(at_50_hz)
    return at_50_hz.shape[-1], at_25_hz.shape[-1], ADAPTOR(at_25_hz).shape[-1]


def test_every_frame_count_of_a_chunk_matches_torch_layers():
    for valid in range(1, 2501):
        frames = chunk_frames(valid * 160)
        assert (frames.conv, frames.encoder, frames.tokens) == lengths_by_torch(valid), valid
        assert chunk_frames(valid * 160 - 159) == type(frames)(
            valid * 160 - 159, frames.mel, frames.conv, frames.encoder, frames.tokens
        )
        assert chunk_frames(valid * 160, "linear").tokens == frames.encoder


@settings(max_examples=80, deadline=None)
@given(st.integers(1, CHUNK_SAMPLES))
def test_network_frames_equal_the_released_stft(samples):
    assert chunk_frames(samples).network == frames_by_the_released_code(samples)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 3 * CHUNK_SAMPLES))
def test_chunks_cover_the_clip_and_only_a_tail_without_token_is_dropped(samples):
    chunks = chunk_lengths(samples)
    dropped = samples - sum(chunks)
    assert all(length == CHUNK_SAMPLES for length in chunks[:-1])
    assert 0 <= dropped < CHUNK_SAMPLES and chunk_frames(dropped).tokens == 0
    assert all(tokens > 0 for tokens in clip_tokens(samples)) and len(clip_tokens(samples)) == len(chunks)


@pytest.mark.parametrize(
    ("samples", "tokens"),
    [
        (0, []),
        (1, []),
        (320, []),
        (321, [1]),
        (640, [1]),
        (400_000, [313]),
        (400_001, [313]),
        (400_321, [313, 1]),
        (800_000, [313, 313]),
    ],
)
def test_known_counts(samples, tokens):
    assert clip_tokens(samples) == tokens


def test_a_port_without_the_two_tail_frames_differs_for_a_quarter_of_all_lengths():
    """The slip that the facts report of another implementation: it counts tokens of `mel + 2` frames."""
    different = sum(
        chunk_frames(160 * mel).tokens != (mel + 3) // 2 // 2 // 2 + (((mel + 3) // 2 // 2) % 2) for mel in range(3, 2499)
    )
    assert 0.2 < different / 2496 < 0.3


@pytest.mark.parametrize("bad", [-1, CHUNK_SAMPLES + 1])
def test_impossible_lengths_are_refused(bad):
    with pytest.raises(ValueError, match="400000"):
        chunk_frames(bad)
    with pytest.raises(ValueError, match="adaptor"):
        chunk_frames(16000, "mean")
    with pytest.raises(ValueError, match="-1"):
        chunk_lengths(-1)

"""How many frames and tokens a clip has: the one place that owns this arithmetic.

A clip of `n` samples at 16 kHz is cut hard every 25 s; every chunk is an utterance of its own (`<audio_start>` to `<audio_end>`).
For a chunk of `n` samples:

    mel      ceil(n / 160)         100 Hz frames that hold sound
    network  mel + 2               frames the convolutions see: 479 zero samples are padded on the right before the STFT
    conv     (mel + 1) // 2        50 Hz, valid outputs of the stride-2 convolution
    encoder  conv // 2             25 Hz, after AvgPool1d(2, 2)
    tokens   (encoder - 1) // 2 + 1 for the `step` adaptor (12.5 Hz), `encoder` for the `linear` one (25 Hz)

A chunk of at most two mel frames has no token.
Source: Step-Audio-R1 `utils.py` and `modeling_step_audio_2.py`.
"""

from dataclasses import dataclass
from typing import Literal

SAMPLE_RATE = 16_000
HOP_SAMPLES = 160
CHUNK_SAMPLES = 25 * SAMPLE_RATE
# Log-mel frames of right padding that the convolutions need to give, at a chunk's end, what they give when it is padded to 30 s.
TAIL_FRAMES = 2
# Shortest chunk that gives a token: three mel frames.
MIN_CHUNK_SAMPLES = 2 * HOP_SAMPLES + 1

AdaptorKind = Literal["step", "linear"]


@dataclass(frozen=True)
class ChunkFrames:
    """Lengths of one chunk at every stage.

    Attributes:
        samples: 16 kHz samples.
        mel: 100 Hz frames that hold sound; the network sees `network` of them.
        conv: valid 50 Hz frames.
        encoder: 25 Hz frames, what the encoder returns and the cache stores.
        tokens: placeholders in the token sequence, without `<audio_start>` and `<audio_end>`.
    """

    samples: int
    mel: int
    conv: int
    encoder: int
    tokens: int

    @property
    def network(self) -> int:
        """Log-mel frames given to the convolutions, the tail of silence included; 0 for an empty chunk."""
        return self.mel + TAIL_FRAMES if self.mel else 0


def chunk_frames(num_samples: int, adaptor: AdaptorKind = "step", compat: Literal["clean", "step"] = "clean") -> ChunkFrames:
    """Lengths of one chunk.

    Args:
        num_samples: samples at 16 kHz, at most one chunk (400,000).
        adaptor: `step` (12.5 Hz) or `linear` (25 Hz).
        compat: with `step` the encoder emits, for a quarter of the lengths, one invalid frame more, as the released code does
            (`step_megatron.model.encoder` says why); the number of tokens is the same.

    Raises:
        ValueError: for a negative length, one longer than a chunk, or an unknown adaptor.
    """
    if not 0 <= num_samples <= CHUNK_SAMPLES:
        raise ValueError(
            f"a chunk has 0 to {CHUNK_SAMPLES} samples (25 s at 16 kHz), got {num_samples}; cut it with chunk_lengths"
        )
    if adaptor not in ("step", "linear"):
        raise ValueError(f"adaptor must be 'step' or 'linear', got {adaptor!r}")
    mel = -(-num_samples // HOP_SAMPLES)
    conv = (mel + 1) // 2
    encoder = conv // 2 + (compat == "step" and conv % 4 == 3)
    tokens = (encoder - 1) // 2 + 1 if adaptor == "step" else encoder
    return ChunkFrames(num_samples, mel, conv, encoder, tokens)


def chunk_lengths(num_samples: int) -> list[int]:
    """Samples of every chunk of a clip, in order; a chunk too short for a token (320 samples or fewer) is dropped.

    Only the last chunk can be that short, so chunk `i` always starts at sample `i * CHUNK_SAMPLES`. A clip of 320 samples or
    fewer has no chunk.

    Raises:
        ValueError: for a negative length.
    """
    if num_samples < 0:
        raise ValueError(f"a clip cannot have {num_samples} samples")
    full, tail = divmod(num_samples, CHUNK_SAMPLES)
    return [CHUNK_SAMPLES] * full + ([tail] if tail >= MIN_CHUNK_SAMPLES else [])


def clip_tokens(num_samples: int, adaptor: AdaptorKind = "step") -> list[int]:
    """Audio tokens of every chunk of a clip of `num_samples` samples at 16 kHz; empty when the clip is too short for one."""
    return [chunk_frames(samples, adaptor).tokens for samples in chunk_lengths(num_samples)]

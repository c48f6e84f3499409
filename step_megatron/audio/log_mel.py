"""Whisper's log-mel features in torch: what `LogMelFrontEnd` uses on a CPU.

    power     |rfft(hann * frame)|^2     frames of 400 samples, hop 160, centred, left edge reflected, right edge zeros
    mel       slaney filters @ power
    log       log10(max(mel, 1e-10)), floored at its maximum - 8, (x + 4) / 4

DALI's CPU spectrogram takes 8 times as long as torch's FFT for 400 points, which is no power of two. A clip is one call, so that
its bits depend on the clip alone.
Source: Step-Audio-R1 `utils.py`; Slaney's Auditory Toolbox for the filters.
"""

import functools

import numpy as np
import torch

from step_megatron.audio.geometry import HOP_SAMPLES, SAMPLE_RATE, chunk_frames

WINDOW_SAMPLES = 400


def hann_window() -> np.ndarray:
    """Periodic Hann window, `[400]` float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW_SAMPLES) / WINDOW_SAMPLES)).astype(np.float32)


@functools.cache
def mel_filters(mels: int) -> torch.Tensor:
    """Triangular filters of equal area on Slaney's mel scale, 0 to 8 kHz: `[mels, 201]` float32."""
    # Linear to 1 kHz, 3 mels per 200 Hz; logarithmic above, 27 mels per factor of 6.4.
    top = 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    scale = np.linspace(0, top, mels + 2)
    edges = np.where(scale < 15, scale * 200 / 3, 1000 * 6.4 ** ((scale - 15) / 27))
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW_SAMPLES // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    return torch.from_numpy((triangles * 2 / (high - low)).astype(np.float32))


def log_mel(waveform: np.ndarray, mels: int) -> torch.Tensor:
    """Features of one chunk.

    Args:
        waveform: `[n]` float32 at 16 kHz, 1 to 400,000 samples.
        mels: bands.

    Returns:
        `[mels, ceil(n / 160) + 2]` float32 on the CPU.
    """
    frames, half = chunk_frames(len(waveform)).network, WINDOW_SAMPLES // 2
    padded = np.zeros(max(HOP_SAMPLES * (frames - 1) + WINDOW_SAMPLES, half + len(waveform)), np.float32)
    padded[half : half + len(waveform)] = waveform
    padded[:half] = padded[2 * half : half : -1]
    windows = torch.from_numpy(padded).as_strided((frames, WINDOW_SAMPLES), (HOP_SAMPLES, 1)) * torch.from_numpy(hann_window())
    spectrum = torch.fft.rfft(windows)
    # Real and imaginary part apart: torch's `abs` takes a square root that would only be squared again.
    power = spectrum.real.square().add_(spectrum.imag.square())
    log = (mel_filters(mels) @ power.t()).clamp_(min=1e-10).log10_()
    return log.clamp_(min=log.max() - 8.0).add_(4.0).mul_(0.25)

"""Clips that the audio tests synthesise, and a stand-in encoder that counts its work."""

import io
from pathlib import Path

import numpy as np
import soundfile
import torch


def voice(seconds: float, rate: int = 16000, seed: int = 0, channels: int = 1) -> np.ndarray:
    """A voiced, harmonic sound with pauses and noise, `[n]` or `[n, channels]` float64, below 0.5 in size; channels differ."""
    t = np.arange(round(seconds * rate)) / rate
    generator = np.random.default_rng(seed)
    columns = []
    for channel in range(channels):
        pitch = 110 + 15 * seed + 60 * channel + 30 * np.sin(2 * np.pi * 0.7 * t)
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        tone = sum(np.sin(k * phase) / k for k in range(1, 12))
        columns.append(0.1 * tone * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)) + 0.003 * generator.standard_normal(t.size))
    return columns[0] if channels == 1 else np.stack(columns, axis=1)


def encoded(samples: np.ndarray, rate: int = 16000, container: str = "WAV", subtype: str | None = None) -> bytes:
    """A clip as the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def write_voice(path: Path, seconds: float, seed: int = 0, **options) -> Path:
    """Write a synthetic voice as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(voice(seconds, options.get("rate", 16000), seed), **options))
    return path


class CountingEncoder:
    """Stands in for the encoder: 25 Hz means of the log-mel, projected; a chunk's bits depend on the chunk alone."""

    def __init__(self, mels: int = 80, width: int = 24):
        self.projection = torch.randn(mels, width, generator=torch.Generator().manual_seed(7))
        self.chunks = 0

    def encode(self, log_mels):
        self.chunks += len(log_mels)
        features = []
        for log_mel in log_mels:
            frames = (log_mel.shape[1] - 2 + 1) // 2 // 2
            means = log_mel[:, : 4 * frames].unflatten(1, (frames, 4)).mean(2)
            # One row at a time: a matrix product's summation order may change with the number of rows.
            features.append(torch.stack([(means[:, [i]] * self.projection).sum(0) for i in range(frames)]))
        return features

    def fingerprint(self) -> str:
        return "counting"

"""Facts measured on the samples: duration, pitch (median and contour), voicing, beats a second.

The reasoning traces (`conversations.trace`) are made of these: every one states the duration; speaking rate the beats; tone the
pitch level and contour; sound the pitch level and voicing; gender and language the pitch level. Transcription's alone has a
label beside the duration: the language, which is known and not asked about there. A measured contour often, but not always,
agrees with a Mandarin tone's label; the trace states the measurement also where it disagrees.

F0 is the autocorrelation method of P. Boersma, "Accurate short-term analysis of the fundamental frequency ...", IFA Proceedings
17, 1993: the windowed frame's autocorrelation divided by the window's own, peaks refined by a parabola, with a small cost per
octave down. No path search: a median filter over five frames removes single octave errors.
"""

from dataclasses import dataclass

import numpy as np
import torch

_FLOOR_HZ, _CEILING_HZ = 70.0, 500.0
_WINDOW_SECONDS = 0.040
_VOICED_STRENGTH = 0.5
_OCTAVE_COST = 0.01
# A frame this far below the loudest one is background.
_QUIET = 0.03
# Contours are told in semitones: less than this is level; it is about the just noticeable glide of a syllable.
_LEVEL_SEMITONES = 2.0
# Rise and fall, as a share of the loudest, that counts as a beat.
_SWELL = 0.1


@dataclass(frozen=True)
class Facts:
    """What was measured on a clip.

    Attributes:
        seconds: duration.
        pitch_hz: median F0 of the voiced frames, None without any.
        voiced: share of the loud frames that are voiced.
        contour: how the pitch moves over the voiced part: level, rises, falls, dips, peaks, or none.
        beats: loudness peaks a second, close to syllables a second in speech.
    """

    seconds: float
    pitch_hz: float | None
    voiced: float
    contour: str
    beats: float

    @property
    def pitch_level(self) -> str:
        """low, mid or high, from the median F0; "no" without pitch."""
        if self.pitch_hz is None:
            return "no"
        return "low" if self.pitch_hz < 140 else "mid" if self.pitch_hz < 190 else "high"


def measure(waveform: np.ndarray, rate: int) -> Facts:
    """Measure a clip: `waveform` `[samples]` float in [-1, 1]."""
    # A syllable needs every 10 ms; of a phrase, half as many frames say the same.
    f0, loud = f0_track(waveform, rate, 0.010 if len(waveform) < rate else 0.020)
    voiced = ~np.isnan(f0)
    return Facts(
        seconds=len(waveform) / rate,
        pitch_hz=float(np.nanmedian(f0)) if voiced.any() else None,
        voiced=float(voiced.sum() / max(loud.sum(), 1)),
        contour=contour(f0),
        beats=beats_per_second(waveform, rate),
    )


def f0_track(waveform: np.ndarray, rate: int, hop_seconds: float = 0.010) -> tuple[np.ndarray, np.ndarray]:
    """F0 every `hop_seconds`.

    Returns:
        `(f0, loud)`, each `[frames]`: Hz, NaN where unvoiced; and whether the frame is louder than the background.
    """
    window = round(_WINDOW_SECONDS * rate)
    x = np.pad(waveform.astype(np.float64), (0, max(0, window - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(x, window)[:: round(hop_seconds * rate)]
    frames = frames - frames.mean(1, keepdims=True)
    power = np.sqrt((frames**2).mean(1))
    loud = power > max(_QUIET * power.max(), 1e-5)
    f0 = np.full(len(frames), np.nan)
    if loud.any():
        f0[loud] = _pitch_of_frames(frames[loud], rate)
    return _median_of_five(f0), loud


def _pitch_of_frames(frames: np.ndarray, rate: int) -> np.ndarray:
    """F0 of each frame `[n, window]`, NaN where the best candidate is weak."""
    taper = np.hanning(frames.shape[1])
    first, last = int(rate / _CEILING_HZ), int(rate / _FLOOR_HZ)
    # Long enough that the lags in use do not wrap around.
    size = 1 << (frames.shape[1] + last + 1).bit_length()

    def autocorrelation(signal: np.ndarray) -> np.ndarray:
        # torch's transform is several times faster than numpy's.
        spectrum = torch.fft.rfft(torch.from_numpy(signal.astype(np.float32)), size)
        return torch.fft.irfft(spectrum.abs().square()).numpy().astype(np.float64)

    r = autocorrelation(frames * taper)[:, : last + 2]
    r = r / np.maximum(r[:, :1], 1e-12)
    own = autocorrelation(taper)
    r = r / (own / own[0])[: last + 2]
    lags = np.arange(first, last + 1)
    before, here, after = r[:, lags - 1], r[:, lags], r[:, lags + 1]
    bend = before - 2 * here + after
    shift = np.where(bend < 0, 0.5 * (before - after) / np.where(bend < 0, bend, 1.0), 0.0)
    height = np.minimum(here - 0.25 * (before - after) * shift, 1.0)
    peak = (here >= before) & (here > after)
    strength = np.where(peak, height - _OCTAVE_COST * np.log2(lags / first), -np.inf)
    best = strength.argmax(1)
    rows = np.arange(len(frames))
    f0 = rate / (lags[best] + shift[rows, best])
    return np.where(peak[rows, best] & (height[rows, best] > _VOICED_STRENGTH), f0, np.nan)


def _median_of_five(f0: np.ndarray) -> np.ndarray:
    """Median over five frames where at least three of them are voiced; isolated voiced frames become unvoiced."""
    around = np.lib.stride_tricks.sliding_window_view(np.pad(f0, 2, constant_values=np.nan), 5)
    keep = ~np.isnan(f0) & ((~np.isnan(around)).sum(1) >= 3)
    smooth = np.full(len(f0), np.nan)
    if keep.any():
        smooth[keep] = np.nanmedian(around[keep], axis=1)
    return smooth


def contour(f0: np.ndarray) -> str:
    """Movement of the pitch `[frames]` (Hz, NaN unvoiced): its start, middle and end third, compared in semitones."""
    pitch = f0[~np.isnan(f0)]
    if len(pitch) < 6:
        return "none"
    third = len(pitch) // 3
    start, middle, end = (12 * np.log2(np.median(part)) for part in (pitch[:third], pitch[third:-third], pitch[-third:]))
    if middle < min(start, end) - _LEVEL_SEMITONES / 2 and end - start > -_LEVEL_SEMITONES:
        return "dips"
    if middle > max(start, end) + _LEVEL_SEMITONES:
        return "peaks"
    if abs(end - start) < _LEVEL_SEMITONES:
        return "level"
    return "rises" if end > start else "falls"


def beats_per_second(waveform: np.ndarray, rate: int) -> float:
    """Swells of loudness a second of the clip's loud part.

    The envelope is smoothed over 80 ms; a swell rises and falls by at least a tenth of the envelope's maximum.
    """
    hop = rate // 100
    power = np.abs(waveform[: len(waveform) // hop * hop]).reshape(-1, hop).mean(1)
    if len(power) < 8 or power.max() <= 0:
        return 0.0
    envelope = np.convolve(power, np.hanning(10)[1:-1] / np.hanning(10).sum(), mode="same")
    envelope /= envelope.max()
    swells, rising, turn = 0, True, 0.0
    # The zero at the end closes a swell that the clip cuts off.
    for level in [*envelope.tolist(), 0.0]:
        turn = max(turn, level) if rising else min(turn, level)
        if rising and level < turn - _SWELL:
            swells, rising, turn = swells + 1, False, level
        elif not rising and level > turn + _SWELL:
            rising, turn = True, level
    active = np.flatnonzero(envelope > 0.05)
    return float(swells / max((active[-1] - active[0] + 1) / 100, 0.1))

"""Measured facts on signals whose answer is known in closed form."""

import numpy as np
import pytest

from step_megatron.data.recipes.espeak import measured_rate
from step_megatron.data.recipes.measure import contour, f0_track, measure

RATE = 16000


def voice(pitch: np.ndarray | float, seconds: float, rate: int = RATE, harmonics: int = 12) -> np.ndarray:
    """A pulse-like voice with falling harmonics; `pitch` in Hz, constant or over time."""
    pitch = np.broadcast_to(pitch, round(seconds * rate))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    return sum(np.sin(k * phase) / k for k in range(1, harmonics + 1) if k * pitch.max() < rate / 2) * 0.2


@pytest.mark.parametrize("rate", [16000, 22050, 44100])
@pytest.mark.parametrize("hertz", [80, 110.3, 137, 199.5, 261.6, 330, 440, 487])
def test_a_steady_voice_has_its_pitch_within_one_percent(hertz, rate):
    facts = measure(voice(hertz, 0.5, rate), rate)
    assert facts.pitch_hz == pytest.approx(hertz, rel=0.01)
    assert facts.voiced > 0.9 and facts.contour == "level"
    assert facts.seconds == pytest.approx(0.5)


def test_a_pure_sine_and_a_voice_without_its_fundamental_have_the_same_pitch():
    t = np.arange(RATE) / RATE
    assert measure(np.sin(2 * np.pi * 150 * t), RATE).pitch_hz == pytest.approx(150, rel=0.01)
    missing = sum(np.sin(2 * np.pi * 150 * k * t) for k in (3, 4, 5, 6))
    assert measure(missing, RATE).pitch_hz == pytest.approx(150, rel=0.01)


def test_a_glide_is_followed_frame_by_frame():
    seconds = 1.0
    pitch = 100 * 2 ** np.linspace(0, 1, round(seconds * RATE))
    f0, _ = f0_track(voice(pitch, seconds), RATE)
    # Frame i is centred 20 ms after its start, and frames start every 10 ms.
    expected = pitch[(np.arange(len(f0)) * 160 + 320)]
    inner = slice(5, -5)
    np.testing.assert_allclose(f0[inner], expected[inner], rtol=0.02)


@pytest.mark.parametrize(
    "shape, name",
    [
        (lambda t: 200 + 0 * t, "level"),
        (lambda t: 200 * 2 ** (t / 2), "rises"),
        (lambda t: 260 * 2 ** (-t / 2), "falls"),
        (lambda t: 200 * 2 ** (np.abs(t - 0.5) - 0.25), "dips"),
        (lambda t: 200 * 2 ** (0.5 - np.abs(t - 0.5)), "peaks"),
        # Half a semitone is not heard as a movement.
        (lambda t: 200 * 2 ** (t / 24), "level"),
    ],
)
def test_contours_have_their_names(shape, name):
    t = np.linspace(0, 1, round(0.4 * RATE))
    assert measure(voice(shape(t), 0.4), RATE).contour == name


def test_noise_and_silence_have_no_pitch():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE)
    facts = measure(noise, RATE)
    assert facts.voiced < 0.1 and facts.contour == "none"
    silence = measure(np.zeros(RATE), RATE)
    assert silence.pitch_hz is None and silence.voiced == 0 and silence.beats == 0 and silence.pitch_level == "no"


def test_a_clip_shorter_than_a_window_is_measured():
    for samples in (1, 100, 700):
        assert measure(np.full(samples, 0.1), RATE).seconds == pytest.approx(samples / RATE)


def test_silence_around_a_voice_changes_its_facts_only_in_duration():
    x = voice(150, 0.5)
    alone, padded = measure(x, RATE), measure(np.concatenate([np.zeros(4000), x, np.zeros(8000)]), RATE)
    assert padded.pitch_hz == pytest.approx(alone.pitch_hz, rel=0.01)
    assert padded.voiced > 0.85 and padded.beats == pytest.approx(alone.beats, abs=0.2)
    # A steady voice is one beat.
    assert alone.beats == pytest.approx(1 / 0.5, rel=0.1)


def test_too_few_voiced_frames_have_no_contour():
    f0 = np.full(50, np.nan)
    f0[10:14] = 200.0
    assert contour(f0) == "none"


@pytest.mark.parametrize("beats", [2, 4, 6, 8])
def test_loudness_peaks_are_counted(beats):
    t = np.arange(2 * RATE) / RATE
    swelling = np.sin(np.pi * beats * t) ** 2
    assert measure(voice(140, 2.0) * swelling, RATE).beats == pytest.approx(beats, rel=0.15)


def test_words_a_minute_leave_silence_out():
    rate = 22050
    sound = (np.random.default_rng(0).normal(0, 3000, 2 * rate)).astype(np.int16)
    padded = np.concatenate([np.zeros(rate, np.int16), sound, np.zeros(3 * rate, np.int16)])
    assert measured_rate(padded, rate, words=6) == pytest.approx(180, rel=0.005)

"""Synthetic speech: labels are controlled and measured. Needs the fetched espeak-ng."""

import numpy as np
import pytest
import soundfile

from step_megatron.data.recipes.espeak import VOICES, EspeakError, Synthesiser, clips
from step_megatron.data.recipes.measure import measure

COUNTS = {"train": 96, "validation": 24, "test": 48}


@pytest.fixture(scope="module")
def fetched(step_data):
    if not (step_data / "espeak-ng/libespeak-ng.so").is_file():
        pytest.skip("espeak-ng was not fetched; `step-megatron data fetch --group tests` gets it")
    return step_data


@pytest.fixture(scope="module")
def made(fetched, tmp_path_factory):
    return clips(fetched, tmp_path_factory.mktemp("espeak"), COUNTS, seed=0)


def test_voices_and_texts_are_held_out():
    names = [name for group in VOICES.values() for name in group]
    assert len(names) == len(set(names))


def test_classes_are_equally_frequent_and_independent(made):
    for split, count in COUNTS.items():
        pairs = [(c.labels["gender"], c.labels["speaking_rate"]) for c in made if c.split == split]
        assert len(pairs) == count
        assert {pairs.count((g, r)) for g in ("male", "female") for r in ("slow", "normal", "fast")} == {count // 6}
    sets = {split: {c.group for c in made if c.split == split} for split in COUNTS}
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]


def test_the_rate_label_is_the_measured_rate_and_duration_does_not_tell_it(made):
    mean = {}
    for label, (low, high) in {"slow": (0, 125), "normal": (145, 205), "fast": (235, 1000)}.items():
        members = [c for c in made if c.labels["speaking_rate"] == label]
        for clip in members:
            samples, rate = soundfile.read(clip.file)
            loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
            assert low <= 60 * len(clip.text.split()) / ((loud[-1] - loud[0]) / rate) <= high + 1
        mean[label] = np.mean([c.seconds for c in members])
    assert max(mean.values()) < 1.5 * min(mean.values())


def test_gender_can_be_heard_in_the_pitch(made):
    pitch = {g: [] for g in ("male", "female")}
    for clip in made:
        samples, rate = soundfile.read(clip.file)
        pitch[clip.labels["gender"]].append(measure(samples, rate).pitch_hz)
    assert np.median(pitch["female"]) > 1.4 * np.median(pitch["male"])


def test_the_same_seed_speaks_the_same(fetched, made, tmp_path):
    again = clips(fetched, tmp_path, COUNTS, seed=0)
    assert {c.meta["speaker"] for c in made} == {name for group in VOICES.values() for name in group}
    for first, second in zip(made, again, strict=True):
        assert first.text == second.text and first.file.read_bytes() == second.file.read_bytes()


def test_a_second_synthesiser_does_not_hang(fetched, tmp_path):
    for name in ("a", "b"):
        assert len(clips(fetched, tmp_path / name, {"test": 2}, seed=0)) == 2


def test_an_unknown_voice_and_a_missing_library_are_named(fetched, tmp_path):
    synthesiser = Synthesiser(fetched / "espeak-ng")
    for voice in ("en-us+nobody", "xx-nowhere+f1"):
        with pytest.raises(EspeakError, match=voice.replace("+", r"\+")):
            synthesiser.say("Hello.", voice, 150, 50)
    (tmp_path / "espeak-ng").mkdir()
    (tmp_path / "espeak-ng/libespeak-ng.so").write_bytes(b"not a library")
    with pytest.raises(EspeakError, match="does not load"):
        clips(tmp_path, tmp_path / "out", {"test": 2}, seed=0)

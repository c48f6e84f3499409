"""The built data set: splits share nothing, traces and turns do not give answers away, builds repeat and can be interrupted.

Runs on fetched-looking sources made here, and once more on the real ones where they were fetched.
"""

import gzip
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from step_megatron.data.recipes import asterisk, build, gcin
from step_megatron.data.recipes.check import SplitError, check_splits
from step_megatron.data.recipes.clip import normalise, split_of
from step_megatron.data.schema import read_conversations

SPLITS = ("train", "validation", "test")
LANGUAGES = {"en": "en_US_f_Allison", "it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}


def write_ogg(path, rng, seconds=0.4):
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(seconds * 16000)) / 16000
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 400) * t) + rng.normal(0, 0.01, len(t))
    soundfile.write(path, wave, 16000, format="OGG", subtype="VORBIS")


def make_sources(data):
    """Sources laid out as `fetch` leaves them: prompts in three languages, syllables, stamps, drums; no espeak-ng."""
    rng = np.random.default_rng(0)
    for language, speaker in LANGUAGES.items():
        root = data / f"sources/asterisk-{language}/usr/share"
        lines = ["; a comment", "silence/1: [silence]", "vm-noise: (beep)", "vm-lost: La conferenza ? piena."]
        for number in range(60):
            # Every fifth text is in all languages: texts, not files, decide the split.
            lines.append(f"digits/{number}: {'Same' if number % 5 == 0 else language} text, number {number}.")
        for key in ["silence/1", "vm-noise", "vm-lost", "vm-no-text", *(f"digits/{n}" for n in range(60))]:
            file = root / "asterisk/sounds" / speaker / f"{key}.g722"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(rng.integers(0, 256, 8000, dtype=np.uint8).tobytes())
        doc = root / f"doc/asterisk-core-sounds-{language}"
        doc.mkdir(parents=True)
        with gzip.open(doc / f"core-sounds-{language}.txt.gz", "wt", encoding="utf-8") as file:
            file.write("﻿" + "\r\n".join(lines))
        licences = data / f"sources/asterisk-{language}/LICENCES"
        licences.mkdir()
        (licences / f"asterisk-core-sounds-{language}.txt").write_text("free")
    for base in "ㄅㄆㄇㄈㄉㄊㄋㄌㄍㄎ":
        for vowel in "ㄚㄞㄠㄢ":
            for tone in ("", "1", "2", "3", "4"):
                write_ogg(data / f"sources/gcin/usr/share/gcin-voice/ogg/{base}{vowel}{tone}/3.ogg", rng)
    write_ogg(data / "sources/gcin/usr/share/gcin-voice/ogg/ㄅ/3.ogg", rng)
    stamps = data / "sources/tuxpaint/usr/share/tuxpaint/stamps/animals"
    for number in range(12):
        text = "Same text, number 0." if number == 0 else f"Animal {number}."
        for language in ("", "_es", "_de"):
            write_ogg(stamps / f"a{chr(97 + number)}_desc{language}.ogg", rng, 0.8)
        write_ogg(stamps / f"a{chr(97 + number)}.ogg", rng, 3.0)
        (stamps / f"a{chr(97 + number)}.txt").write_text(f"{text}\nes.utf8=Texto {number}\nde.utf8=Text {number}\n")
    shutil.copy(stamps / "ab.ogg", stamps / "zz.ogg")
    for number in range(20):
        write_ogg(data / f"sources/lmms/usr/share/lmms/samples/drums/kick{number:02d}.ogg", rng)
    (data / "sources/lmms/usr/share/lmms/samples/drums/broken.ogg").write_bytes(b"not an ogg")


@pytest.fixture(scope="module", autouse=True)
def little_text():
    """The text-only part is tested by itself; here a little of it is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "TEXT_ITEMS", {"train": 80, "validation": 16, "test": 16})
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_sources(folder)
    return folder


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "open-speech"
    return out, build.build(data, out, max_audio_seconds=120.0, seed=3)


@pytest.fixture(scope="module")
def real(step_data, tmp_path_factory):
    """A small build of the real recordings."""
    if not (step_data / "sources/asterisk-en").is_dir():
        pytest.skip("no fetched sources; `step-megatron data fetch --group tests` gets them")
    out = tmp_path_factory.mktemp("real") / "open-speech"
    return out, build.build(step_data, out, seed=1, clips=250)


@pytest.fixture(params=["made", "real"])
def built(request):
    return request.getfixturevalue(request.param)


def spoken(out, split):
    return read_conversations(out / f"{split}.jsonl")


def test_every_clip_is_there_and_can_be_read_by_the_front_end(built):
    from step_megatron.audio.errors import AudioError
    from step_megatron.audio.front_end import LogMelFrontEnd

    out, summary = built
    seconds = {}
    for split in SPLITS:
        for c in spoken(out, split):
            for address in c.audio_addresses():
                seconds[address] = c.meta["seconds"]
    decoded = LogMelFrontEnd(mels=80).decode([(out / a).read_bytes() for a in seconds], list(seconds))
    assert not [d for d in decoded if isinstance(d, AudioError)]
    assert [len(d.waveform) / 16000 for d in decoded] == pytest.approx(list(seconds.values()), abs=0.002)
    assert sum(seconds.values()) == pytest.approx(summary["audio_seconds"], rel=0.01)
    on_disk = {str(p.relative_to(out)) for p in (out / "audio").rglob("*") if p.is_file()}
    assert on_disk == set(seconds), "no file is left over and none is missing"


def test_no_text_clip_syllable_voice_or_recording_is_in_two_splits(built):
    out, _ = built
    check_splits(out)
    # The same again without the checker's code.
    for key in ("text", "group"):
        sets = {split: {c.meta[key].lower().strip(" .") for c in spoken(out, split)} - {""} for split in SPLITS}
        assert (
            not sets["train"] & sets["test"] and not sets["train"] & sets["validation"] and not sets["test"] & sets["validation"]
        )
    tones = {split: {c.meta["syllable"] for c in spoken(out, split) if c.source == "gcin"} for split in SPLITS}
    assert tones["train"] and tones["test"] and not tones["train"] & tones["test"]


def test_answers_are_what_the_reply_says_and_labels_are_complete(built):
    out, _ = built
    for split in SPLITS:
        for c in spoken(out, split):
            replies = [turn.text for turn in c.turns if turn.role == "assistant"]
            assert replies == list(c.meta["labels"].values())
            assert c.meta["answer"] == replies[0] and c.meta["task"] == next(iter(c.meta["labels"]))
            assert c.meta["licence"] and c.meta["confound"] and c.meta["split"] == split


def test_traces_are_short_and_do_not_hold_the_answer(built):
    out, _ = built
    for split in SPLITS:
        for c in spoken(out, split):
            for turn in c.turns:
                if turn.role == "assistant" and turn.text in (
                    "first",
                    "second",
                    "third",
                    "fourth",
                    "male",
                    "female",
                    "slow",
                    "fast",
                ):
                    assert turn.text not in turn.reasoning.split()
                if turn.role == "assistant" and c.meta["labels"].get("language") == turn.text:
                    assert turn.text not in turn.reasoning
                assert len((turn.reasoning or "").split()) <= 8
            tasks = list(c.meta["labels"])
            assert tasks != ["transcription", "language"], "a transcript gives the language away"


def test_a_clip_serves_several_turns_in_train_and_one_in_items(built):
    out, _ = built
    turns = Counter(len(c.turns) for c in spoken(out, "train"))
    assert turns[4] and turns[2]
    assert {len(c.turns) for split in ("validation", "test") for c in spoken(out, split)} == {2}


def test_the_summary_counts_what_is_there(built):
    out, summary = built
    for split in SPLITS:
        counted = Counter(task for c in spoken(out, split) for task in c.meta["labels"])
        assert summary["questions"][split] == dict(counted)
        assert summary["clips"][split] == len({a for c in spoken(out, split) for a in c.audio_addresses()})
    assert summary["audio_seconds"] == pytest.approx(sum(sum(s.values()) for s in summary["seconds"].values()), abs=0.5)


def test_the_budgets_hold(data, made, tmp_path):
    _, summary = made
    assert 30 < summary["audio_seconds"] <= 120
    few = build.build(data, tmp_path / "few", max_audio_seconds=5000, seed=3, clips=60)
    assert 10 < sum(few["clips"].values()) <= 60


def test_what_the_corpora_must_leave_out_is_left_out(data):
    prompts = asterisk.clips(data, seed=3)
    assert len(prompts) == 60 * len(LANGUAGES)
    assert {clip.labels["language"] for clip in prompts} == {"English", "Italian", "Russian"}
    syllables = gcin.clips(data, seed=3)
    # The neutral tone and the bare consonant are not among the four tones.
    assert Counter(clip.labels["tone"] for clip in syllables) == dict.fromkeys(("first", "second", "third", "fourth"), 40)


def test_a_text_has_one_split_in_every_language(data):
    prompts = asterisk.clips(data, seed=3)
    splits = {}
    for clip in prompts:
        splits.setdefault(normalise(clip.text), set()).add(clip.split)
    assert len(splits) == 12 + 48 * len(LANGUAGES) and all(len(names) == 1 for names in splits.values())
    shares = Counter(split_of(0, str(i)) for i in range(5000))
    assert shares["train"] / 5000 == pytest.approx(0.8, abs=0.02) and shares["test"] / 5000 == pytest.approx(0.1, abs=0.02)


def test_the_other_corpus_is_never_trained_on(built):
    out, _ = built
    train = spoken(out, "train")
    assert not [c for c in train if c.source == "tuxpaint" or any(t.endswith("_other_corpus") for t in c.meta["labels"])]


def test_an_unreadable_recording_is_named(data, tmp_path, capfd):
    build.build(data, tmp_path / "o", seed=3, clips=60)
    assert "broken.ogg" in capfd.readouterr().err


def test_a_second_build_is_the_same_and_a_finished_one_is_kept(data, made, tmp_path, capfd):
    first, summary = made
    second = tmp_path / "again"
    assert build.build(data, second, max_audio_seconds=120.0, seed=3) == summary
    for file in sorted(first.rglob("*")):
        if file.is_file():
            assert (second / file.relative_to(first)).read_bytes() == file.read_bytes(), file
    capfd.readouterr()
    before = (second / "train.jsonl").stat().st_mtime_ns
    assert build.build(data, second, max_audio_seconds=120.0, seed=3) == summary
    assert "is complete" in capfd.readouterr().err and (second / "train.jsonl").stat().st_mtime_ns == before


def test_an_interrupted_build_leaves_nothing_half_done(data, tmp_path, monkeypatch):
    out = tmp_path / "open-speech"
    with monkeypatch.context() as patch:
        patch.setattr(build, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build.build(data, out, seed=3, clips=60)
    assert not out.exists()
    build.build(data, out, seed=3, clips=60)
    assert [p.name for p in tmp_path.iterdir()] == ["open-speech"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_an_interruption_while_the_new_data_replace_the_old_loses_neither_for_good(data, tmp_path, monkeypatch, renames):
    """Whichever step of the replacement is the last one: the folder is whole or absent, and the next build goes on."""
    out = tmp_path / "open-speech"
    build.build(data, out, seed=3, clips=60)
    rename, done = Path.rename, []

    def until_killed(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    def killed(path, **how):
        if len(done) == 2:
            raise KeyboardInterrupt
        return remove(path, **how)

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", until_killed)
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            build.build(data, out, seed=4, clips=60)
    assert out.exists() == (renames != 1)
    if out.exists():
        assert json.loads((out / "SUMMARY.json").read_text())["made_of"]["seed"] == (3 if renames == 0 else 4)
        check_splits(out)
    build.build(data, out, seed=4, clips=60)
    assert [p.name for p in tmp_path.iterdir()] == ["open-speech"]


def test_foreign_folders_and_missing_sources_are_refused(data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.txt").write_text("x")
    with pytest.raises(FileExistsError, match="move it away"):
        build.build(data, tmp_path / "mine", seed=3, clips=60)
    with pytest.raises(FileNotFoundError, match="data fetch"):
        build.build(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(path, change):
    """Apply `change` to the first record of a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    change(record)
    path.write_text("\n".join([json.dumps(record, ensure_ascii=False), *lines[1:]]) + "\n", encoding="utf-8")


@pytest.mark.parametrize(
    "kind, change",
    [
        ("transcript", lambda train: lambda r: r["meta"].update(text=train.meta["text"].upper() + " !")),
        ("group", lambda train: lambda r: r["meta"].update(group=train.meta["group"])),
        ("clip", lambda train: lambda r: r["turns"][0]["content"][0].update(audio=train.audio_addresses()[0])),
        ("one question", lambda train: lambda r: r.update(turns=r["turns"] * 2)),
    ],
)
def test_the_checker_finds_a_leak(made, tmp_path, kind, change):
    out = tmp_path / "copy"
    shutil.copytree(made[0], out)
    train = random.Random(0).choice([c for c in spoken(out, "train") if c.source == "asterisk"])
    edit(out / "test.jsonl", change(train))
    with pytest.raises(SplitError, match=kind):
        check_splits(out)


@pytest.mark.parametrize("kind, key", [("question", None), ("template", "template")])
def test_the_checker_finds_a_leak_in_text(made, tmp_path, kind, key):
    out = tmp_path / "copy"
    shutil.copytree(made[0], out)
    train = read_conversations(out / "text_train.jsonl")[0]
    if key:
        edit(out / "text_test.jsonl", lambda r: r["meta"].update(template=train.meta["template"]))
    else:
        edit(out / "text_test.jsonl", lambda r: r["turns"][0].update(content=train.turns[0].text))
    with pytest.raises(SplitError, match=kind):
        check_splits(out)

"""Build the open-speech data set: `build(data_dir, out_dir, max_audio_seconds, seed)`.

    {train,validation,test}.jsonl            audio-grounded conversations; paths relative to the directory
    text_{train,validation,test}.jsonl       text-only reasoning
    audio/<corpus>/*                         the encoded files as the source has them; synthetic and cut clips as wav
    LICENCES/                                of every source used
    SUMMARY.json                             conversations, clips and seconds by split and task

Run it as a module: `python -m step_megatron.data.recipes.build DATA_DIR OUT_DIR`.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile

from step_megatron.audio.errors import AudioError
from step_megatron.audio.front_end import LogMelFrontEnd
from step_megatron.audio.geometry import SAMPLE_RATE
from step_megatron.data.recipes import asterisk, conversations, espeak, gcin, reasoning, sounds, tuxpaint
from step_megatron.data.recipes.check import check_splits
from step_megatron.data.recipes.clip import Clip, choose, normalise
from step_megatron.data.recipes.measure import measure
from step_megatron.data.schema import SPLITS, Conversation, write_conversations
from step_megatron.runtime.folders import finish_partial, remove_leftovers, start_partial

# Clips wanted by split, and the share of the audio budget, at the full size.
PLAN = {
    "asterisk": (0.5, {"train": 1600, "validation": 50, "test": 100}),
    "gcin": (0.17, {"train": 2000, "validation": 50, "test": 120}),
    "espeak": (0.24, {"train": 520, "validation": 36, "test": 90}),
    "sounds": (0.07, {"train": 300, "validation": 24, "test": 80}),
    "tuxpaint": (0.04, {"train": 0, "validation": 0, "test": 100}),
}
TEXT_ITEMS = {"train": 4000, "validation": 100, "test": 120}
# Shorter clips of speech hold hardly a word; longer ones cost many tokens.
_SPEECH_SECONDS = (0.5, 3.0)
_GENDER_ITEMS = 80
SUMMARY_NAME = "SUMMARY.json"


def build(
    data_dir: str | Path,
    out_dir: str | Path,
    max_audio_seconds: float = 5000.0,
    seed: int = 0,
    clips: int | None = None,
    difficulty: int = 1,
) -> dict:
    """Write the data set; a source that was not fetched is left out and named on stderr.

    A build with the same arguments and recipe is not made again. Everything is written to a temporary directory beside `out_dir`
    and renamed at the end, so that `out_dir` is complete or absent.

    Args:
        data_dir: what `fetch` filled.
        out_dir: the data set; replaced when an earlier build made it.
        max_audio_seconds: audio of all clips of all splits together.
        seed: decides selection, splits, wording and synthesis.
        clips: at most about this many clips, in the same proportions; None for as many as the budget allows.
        difficulty: of the text-only reasoning.

    Returns:
        The summary that `SUMMARY.json` holds.

    Raises:
        FileNotFoundError: no source was fetched.
        FileExistsError: `out_dir` holds something that no build made.
        SplitError: the splits share a text, a clip, a syllable, a voice or a template.
    """
    data_dir, out_dir = Path(data_dir), Path(out_dir)
    arguments = {"max_audio_seconds": max_audio_seconds, "seed": seed, "clips": clips, "difficulty": difficulty}

    def fill(partial: Path) -> dict:
        chosen = _select(data_dir, partial, max_audio_seconds, seed, clips)
        if not chosen:
            raise FileNotFoundError(f"{data_dir} holds no fetched source; run `step-megatron data fetch` first")
        spoken = _conversations(chosen, partial, seed)
        written = list(reasoning.conversations(TEXT_ITEMS, difficulty, seed))
        for split in SPLITS:
            write_conversations(partial / f"{split}.jsonl", [c for c in spoken if c.meta["split"] == split])
            write_conversations(partial / f"text_{split}.jsonl", [c for c in written if c.meta["split"] == split])
        corpora = {clip.corpus for clip in chosen}
        # Sound events come from Tux Paint and LMMS.
        copy_licences(data_dir, partial, corpora | ({"tuxpaint", "lmms"} if "sounds" in corpora else set()))
        check_splits(partial)
        return _summary(chosen, spoken, written)

    return made_once(out_dir, data_dir, arguments, fill)


def made_once(out_dir: Path, data_dir: Path, arguments: dict[str, Any], fill: Callable[[Path], dict]) -> dict:
    """Fill a data set's folder, unless it was filled with the same arguments, by the same recipes, from the same sources.

    Args:
        fill: writes into the folder that it is given, and returns a summary.

    Returns:
        The summary, and under `made_of` what it depends on, as `SUMMARY.json` holds them.

    Raises:
        FileExistsError: `out_dir` holds something that no build made.
    """
    made_of = {**arguments, "recipe": _recipe_digest(), "sources": _fetched(data_dir)}
    remove_leftovers(out_dir)
    summary_file = out_dir / SUMMARY_NAME
    if summary_file.exists() and (old := json.loads(summary_file.read_text(encoding="utf-8"))).get("made_of") == made_of:
        print(f"build: {out_dir} is complete", file=sys.stderr)
        return old
    if out_dir.exists() and not summary_file.exists() and any(out_dir.iterdir()):
        raise FileExistsError(f"{out_dir} exists and was not made by build; move it away or choose another directory")
    partial = start_partial(out_dir)
    summary = {"made_of": made_of, **fill(partial)}
    (partial / SUMMARY_NAME).write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    finish_partial(out_dir)
    return summary


def _recipe_digest() -> str:
    """Digest of this package's source: another recipe makes another data set."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _fetched(data_dir: Path) -> list[str]:
    """Names of the sources that are there."""
    folders = [*(data_dir / "sources").glob("*"), data_dir / "espeak-ng"]
    return sorted(folder.name for folder in folders if folder.is_dir())


def _select(data_dir: Path, partial: Path, max_seconds: float, seed: int, clips: int | None) -> list[Clip]:
    """Choose the clips of every corpus within its share of the budget."""
    shrink = 1.0 if clips is None else min(1.0, clips / sum(sum(counts.values()) for _, counts in PLAN.values()))
    counts = {
        corpus: {split: round(count * shrink) if count * shrink >= 1 or not count else 1 for split, count in wanted.items()}
        for corpus, (_, wanted) in PLAN.items()
    }
    low, high = _SPEECH_SECONDS
    prompts = [clip for clip in asterisk.clips(data_dir, seed) if low <= clip.seconds <= high]
    synthetic = espeak.clips(data_dir, partial / "audio/espeak", counts["espeak"], seed)
    known = {normalise(clip.text) for clip in [*prompts, *synthetic] if clip.split != "test"}
    stamps = [clip for clip in tuxpaint.clips(data_dir, known, seed) if low <= clip.seconds <= high]
    candidates = {
        "asterisk": (prompts, "language"),
        "gcin": (gcin.clips(data_dir, seed), "tone"),
        "espeak": (synthetic, "speaking_rate"),
        "sounds": (sounds.clips(data_dir, seed), "sound_event"),
        "tuxpaint": (stamps, "language_other_corpus"),
    }
    chosen = []
    for corpus, (found, task) in candidates.items():
        if not found:
            print(f"build: {corpus} was not fetched; its tasks are left out", file=sys.stderr)
        chosen += choose(found, task, counts[corpus], PLAN[corpus][0] * max_seconds, seed)
    used = {clip.id for clip in chosen}
    for clip in synthetic:
        if clip.id not in used:
            clip.file.unlink()
    return chosen


def _conversations(chosen: list[Clip], partial: Path, seed: int) -> list[Conversation]:
    """Decode and measure every clip as the model will hear it, put its file in place, and make its conversations."""
    front_end = LogMelFrontEnd(mels=80)
    spoken = []
    real_voices = _gender_items(chosen)
    for start in range(0, len(chosen), 256):
        batch = chosen[start : start + 256]
        decoded = front_end.decode([clip.file.read_bytes() for clip in batch], [clip.file.name for clip in batch])
        for clip, audio in zip(batch, decoded, strict=True):
            if isinstance(audio, AudioError):
                print(f"build: {clip.file} is left out: {audio}", file=sys.stderr)
                continue
            waveform = audio.waveform if clip.cut is None else audio.waveform[: round(clip.cut * SAMPLE_RATE)]
            _place(clip, waveform, partial)
            facts = measure(waveform, SAMPLE_RATE)
            if clip.split == "train":
                spoken += conversations.training(clip, facts, random.Random(f"{seed}:{clip.id}"))
                continue
            if clip.id in real_voices:
                clip = replace(clip, labels={**clip.labels, "gender_other_corpus": clip.meta["gender"]})
            spoken += conversations.items(clip, facts, list(clip.labels))
        print(f"build: {min(start + 256, len(chosen))} of {len(chosen)} clips measured", file=sys.stderr)
    return spoken


def _place(clip: Clip, waveform, partial: Path) -> None:
    """Put the clip's file at its address."""
    target = partial / clip.address
    target.parent.mkdir(parents=True, exist_ok=True)
    if clip.cut is not None:
        soundfile.write(target, waveform, SAMPLE_RATE, subtype="PCM_16")
    elif clip.file != target:
        shutil.copyfile(clip.file, target)


def _gender_items(chosen: list[Clip]) -> set[str]:
    """Test clips of real voices to ask about gender, as many male as female: gender is learnt from synthetic voices only."""
    ids: dict[str, list[str]] = {"male": [], "female": []}
    for clip in chosen:
        if clip.corpus == "asterisk" and clip.split == "test":
            ids[clip.meta["gender"]].append(clip.id)
    if not any(clip.corpus == "espeak" for clip in chosen):
        return set()
    each = min(_GENDER_ITEMS // 2, *map(len, ids.values()))
    return {*ids["male"][:each], *ids["female"][:each]}


def copy_licences(data_dir: Path, partial: Path, names: set[str]) -> None:
    """Collect the licence texts of the sources whose folders' names begin with one of `names`."""
    (partial / "LICENCES").mkdir()
    for folder in [*sorted((data_dir / "sources").glob("*")), data_dir / "espeak-ng"]:
        if any(folder.name.startswith(name) for name in names):
            for file in sorted((folder / "LICENCES").glob("*")):
                shutil.copyfile(file, partial / "LICENCES" / file.name)


def _summary(chosen: list[Clip], spoken: list[Conversation], written: list[Conversation]) -> dict:
    """Counts by split and task; a clip of several turns counts once in `clips` and `seconds`, and once a task in `questions`."""
    questions = Counter((c.meta["split"], task) for c in spoken for task in c.meta["labels"])
    texts = Counter((c.meta["split"], c.meta["task"]) for c in written)
    return {
        "audio_seconds": round(sum(clip.kept_seconds for clip in chosen), 1),
        "clips": {split: sum(clip.split == split for clip in chosen) for split in SPLITS},
        "seconds": {
            split: {
                corpus: round(sum(c.kept_seconds for c in chosen if c.split == split and c.corpus == corpus), 1)
                for corpus in PLAN
            }
            for split in SPLITS
        },
        "questions": {split: {task: n for (s, task), n in sorted(questions.items()) if s == split} for split in SPLITS},
        "text_only": {split: {task: n for (s, task), n in sorted(texts.items()) if s == split} for split in SPLITS},
    }


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description="Build the open-speech data set from fetched sources.")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--max-audio-seconds", type=float, default=5000.0)
    parser.add_argument("--clips", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", type=int, default=1)
    print(json.dumps(build(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()

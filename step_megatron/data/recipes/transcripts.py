"""Build a data set for transcription alone from the telephone prompts: `build_transcripts(data_dir, out_dir, languages, ...)`.

    train.jsonl, train_LL.jsonl           all languages, and one language each: the sources of a mixture
    validation.jsonl, test.jsonl          held-out texts, one clip a conversation
    audio/asterisk/*, LICENCES/           the files as the source has them
    SUMMARY.json                          clips and seconds by language and split

A reply is what error rates compare (lower case, no punctuation: the prompts are not consistent in either), after a trace that
names the language. Texts are in the splits that `build` puts them into with the same seed.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from step_megatron.data.recipes import asterisk, conversations
from step_megatron.data.recipes.build import copy_licences, made_once
from step_megatron.data.recipes.clip import Clip, normalise
from step_megatron.data.schema import SPLITS, Audio, Conversation, Text, Turn, write_conversations

LANGUAGES = ("en", "es", "fr", "it")
_TASK = "transcription"


def build_transcripts(
    data_dir: Path,
    out_dir: Path,
    languages: Sequence[str] = LANGUAGES,
    seconds: tuple[float, float] = (0.3, 8.0),
    seed: int = 1,
) -> dict:
    """Write the data set, unless it is there and was made with the same arguments; complete or absent.

    Args:
        data_dir: what `fetch` filled.
        languages: two letters each, of Asterisk's.
        seconds: shortest and longest clip.

    Returns:
        What `SUMMARY.json` holds.

    Raises:
        FileNotFoundError: a language was not fetched.
        ValueError: no clip is as long as that.
    """
    arguments = {"languages": list(languages), "seconds": list(seconds), "seed": seed}

    def fill(partial: Path) -> dict:
        found = [clip for clip in asterisk.clips(data_dir, seed) if clip.meta["language"] in languages]
        if absent := set(languages) - {clip.meta["language"] for clip in found}:
            raise FileNotFoundError(
                f"{data_dir} has no prompts in {', '.join(sorted(absent))}; run `step-megatron data fetch --group asterisk`"
            )
        chosen = [clip for clip in found if seconds[0] <= clip.seconds <= seconds[1]]
        if not chosen:
            raise ValueError(f"no prompt is {seconds[0]} to {seconds[1]} s long; choose other bounds")
        return _write(chosen, data_dir, partial)

    return made_once(out_dir, data_dir, arguments, fill)


def _write(chosen: list[Clip], data_dir: Path, partial: Path) -> dict:
    languages = sorted({clip.meta["language"] for clip in chosen})
    for clip in chosen:
        target = partial / clip.address
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clip.file, target)
    for split in SPLITS:
        write_conversations(partial / f"{split}.jsonl", (_conversation(clip) for clip in chosen if clip.split == split))
    for language in languages:
        own = (clip for clip in chosen if clip.split == "train" and clip.meta["language"] == language)
        write_conversations(partial / f"train_{language}.jsonl", map(_conversation, own))
    copy_licences(data_dir, partial, {f"asterisk-{language}" for language in languages})
    counted = {split: [clip for clip in chosen if clip.split == split] for split in SPLITS}
    return {
        "audio_seconds": round(sum(clip.seconds for clip in chosen), 1),
        "clips": {split: len(clips) for split, clips in counted.items()},
        "languages": {
            split: {language: sum(clip.meta["language"] == language for clip in clips) for language in languages}
            for split, clips in counted.items()
        },
    }


def _conversation(clip: Clip) -> Conversation:
    question = Turn("human", (Audio(clip.address), Text(conversations.QUESTIONS[_TASK][0])))
    reply = Turn("assistant", (Text(normalise(clip.text)),), reasoning=clip.labels["language"])
    meta = {**clip.meta, "split": clip.split, "task": _TASK, "answer": clip.text, "text": clip.text, "group": clip.group}
    return Conversation(f"{clip.id}:{_TASK}", clip.corpus, (question, reply), meta)

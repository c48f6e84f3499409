"""espeak-ng: English speech with known gender and speaking rate, made on this machine with the fetched library.

What is controlled, so that the labels can be heard and nothing else gives them away:

- gender is the voice file's own field; voices are divided over the splits, so test voices are unseen; the pitch setting varies
  within both genders;
- speaking rate is labelled by the **measured** words a minute (words / sounding duration) of the clip; sentences are as long as
  the rate needs for about two seconds, so that duration does not tell the rate; clips between the classes are not used;
- texts are divided over the splits too.

Synthetic speech: `meta.confound` says so.
"""

import ctypes
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from step_megatron.data.recipes.clip import Clip, normalise, split_of
from step_megatron.errors import UserError

_BASE_VOICES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp")
# Variants of the voice files that state a gender, without whispers, robots and effects, and without those with breath noise (f2,
# f3, f5, Alicia), which sound different each time. Variants of one name (steph) stay in one split.
VOICES = {
    ("train", "female"): ("f1", "Andrea", "aunty", "grandma", "steph", "steph2", "steph3"),
    ("train", "male"): ("m1", "m2", "m3", "m5", "m7", "Andy", "Denis", "Lee"),
    ("validation", "female"): ("belinda",),
    ("validation", "male"): ("m8", "travis"),
    ("test", "female"): ("f4", "Annie", "anika", "linda"),
    ("test", "male"): ("m4", "m6", "michel", "miguel"),
}
# Words a minute: setting to draw from, and the measured range that carries the label.
_RATES = {"slow": ((85, 115), (0, 125)), "normal": ((150, 185), (145, 205)), "fast": ((260, 330), (235, 1000))}
_SECONDS = (1.5, 2.4)
_WORDS = (
    ("the", "this", "my", "our", "one", "that"),
    ("small", "red", "old", "new", "green", "quiet", "happy", "tall"),
    ("dog", "house", "train", "boy", "bird", "teacher", "river", "garden", "doctor", "cat"),
    ("sees", "likes", "finds", "takes", "needs", "hears", "wants", "follows"),
    ("the", "a", "his", "her", "some", "every"),
    ("big", "blue", "warm", "round", "white", "long", "sweet", "heavy"),
    ("apple", "window", "table", "flower", "letter", "mountain", "paper", "basket", "picture", "lemon"),
    ("near", "behind", "under", "after", "before", "without"),
    ("the", "our", "that", "their"),
    ("market", "school", "winter", "dinner", "morning", "station", "forest", "water"),
)


class EspeakError(UserError, RuntimeError):
    """The synthesiser could not be loaded or refused a voice."""


class Synthesiser:
    """espeak-ng through its C interface, synchronous, into memory; **one in a process**.

    The library keeps global state: initialised twice it hangs, and what it spoke before changes what it speaks next. `clips`
    therefore gives it a process of its own.

    Args:
        directory: holds `libespeak-ng.so` and `espeak-ng-data/`.

    Attributes:
        rate: samples a second.
    """

    _RATE, _PITCH = 1, 3
    _RETRIEVE, _DO_NOT_EXIT, _UTF8, _CHARACTERS = 1, 0x8000, 1, 1

    def __init__(self, directory: Path):
        try:
            self._library = ctypes.CDLL(str(directory / "libespeak-ng.so"))
        except OSError as error:
            raise EspeakError(f"espeak-ng does not load: {error}; fetch the source `espeak-ng` again") from error
        self.rate = self._library.espeak_Initialize(self._RETRIEVE, 0, str(directory).encode(), self._DO_NOT_EXIT)
        if self.rate <= 0:
            raise EspeakError(f"espeak-ng finds no data in {directory}; fetch the source `espeak-ng` again")
        self._variants = directory / "espeak-ng-data/voices/!v"
        self._blocks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        # The library keeps the pointer: the object must live as long as it does.
        self._callback = kind(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, count: int, events) -> int:
        if samples and count > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int, pitch: int) -> np.ndarray:
        """Synthesise: `[samples]` int16. `voice` is `LANGUAGE+VARIANT`; `pitch` is 0 to 99, 50 the voice's own.

        Raises:
            EspeakError: an unknown voice.
        """
        self._blocks.clear()
        # The library takes an unknown variant for none, without a word.
        known = not (variant := voice.partition("+")[2]) or (self._variants / variant).is_file()
        if not known or self._library.espeak_SetVoiceByName(voice.encode()):
            raise EspeakError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(self._RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        data = text.encode()
        self._library.espeak_Synth(data, len(data) + 1, 0, self._CHARACTERS, 0, self._UTF8, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._blocks)


def measured_rate(samples: np.ndarray, rate: int, words: int) -> float:
    """Words a minute over the sounding part of `[samples]` int16 (leading and trailing silence is not counted)."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > 0.02 * max(1, int(np.abs(samples.astype(np.int32)).max())))
    return 60.0 * words * rate / (loud[-1] - loud[0] + 1)


def sentence(rng: random.Random, words: int) -> str:
    """A sentence of `words` words (2 to 10)."""
    start = 0 if words > 7 else rng.randrange(0, 10 - words + 1)
    chosen = [rng.choice(options) for options in _WORDS[start : start + words]]
    return " ".join(chosen).capitalize() + "."


def clips(data_dir: Path, work_dir: Path, counts: dict[str, int], seed: int) -> list[Clip]:
    """Synthesise `counts` clips by split into `work_dir`; [] when espeak-ng was not fetched.

    Raises:
        EspeakError: the library does not load, finds no data or has not the voices.
    """
    directory = data_dir / "espeak-ng"
    if not (directory / "libespeak-ng.so").is_file():
        return []
    work_dir.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_synthesise, directory, work_dir, counts, seed).result()


def _synthesise(directory: Path, work_dir: Path, counts: dict[str, int], seed: int) -> list[Clip]:
    synthesiser = Synthesiser(directory)
    return [clip for split in counts for clip in _of_split(synthesiser, work_dir, split, counts[split], seed)]


def _of_split(synthesiser: Synthesiser, work_dir: Path, split: str, count: int, seed: int) -> Iterator[Clip]:
    rng = random.Random(f"{seed}:espeak:{split}")
    said: set[str] = set()
    for number in range(count):
        # Every sixth clip has the same class of both kinds: the classes are equally frequent and independent.
        gender, speed = ("female", "male")[number % 2], list(_RATES)[number // 2 % 3]
        while True:
            setting, (low, high) = rng.randint(*_RATES[speed][0]), _RATES[speed][1]
            words = min(10, max(2, round(setting * rng.uniform(*_SECONDS) / 60)))
            text = sentence(rng, words)
            if split_of(seed, normalise(text)) != split or text in said:
                continue
            variant, base, pitch = rng.choice(VOICES[split, gender]), rng.choice(_BASE_VOICES), rng.randint(30, 70)
            samples = synthesiser.say(text, f"{base}+{variant}", setting, pitch)
            rate = measured_rate(samples, synthesiser.rate, words)
            if low <= rate <= high:
                break
        said.add(text)
        file = work_dir / f"espeak-{split}-{number:05d}.wav"
        soundfile.write(file, samples, synthesiser.rate, subtype="PCM_16")
        yield Clip(
            id=file.stem,
            corpus="espeak",
            file=file,
            seconds=len(samples) / synthesiser.rate,
            text=text,
            group=f"voice:{variant}",
            split=split,
            labels={"gender": gender, "speaking_rate": speed},
            meta={
                "language": "en",
                "speaker": variant,
                "gender": gender,
                "words_per_minute": f"{rate:.0f}",
                "licence": "generated",
                "confound": "synthetic speech",
            },
        )

"""Log-mel features a CPU-second: this project's front end beside transformers' `WhisperFeatureExtractor`.

Both get the same decoded clips and one thread: real recordings where the data are there, else synthetic ones of the same lengths.
The extractor runs as the models' processors call it (every clip padded to 30 s) and with `padding=False`, its best. Runs
alternate between the three, so that what else the machine does hits all of them alike; a ratio is formed within each round.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from step_megatron.audio.front_end import DecodedClip, LogMelFrontEnd, split_chunks
from step_megatron.audio.geometry import SAMPLE_RATE
from step_megatron.benchmarks.spread import spread

_MELS = 128
_CLIPS = 64
# The ratio to the padded extractor that the front end has to reach.
_EXPECTED = 3.0


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `data` (folder of downloads), `repeats` (rounds), `clips` (sample size, None for 64).

    Returns:
        `{"name", "ratio", "low", "high", "limit", ...}`: the ratio to the padded extractor (median, lowest, highest round;
        `limit` is what is expected of it), the same to the unpadded one, and audio-seconds per CPU-second of all three.
    """
    from transformers import WhisperFeatureExtractor

    clips, source = _clips(options.data, options.clips or _CLIPS)
    front_end, extractor = LogMelFrontEnd(_MELS, threads=1), WhisperFeatureExtractor(feature_size=_MELS)

    def extract(**how) -> None:
        for clip in clips:
            extractor(clip, sampling_rate=SAMPLE_RATE, return_tensors="np", **how)

    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: front_end.log_mel(clips),
        "padded": lambda: extract(padding="max_length"),
        "unpadded": lambda: extract(padding=False),
    }
    seconds = sum(len(clip) for clip in clips) / SAMPLE_RATE
    with _one_thread():
        for work in contestants.values():
            work()
        rounds = [{name: seconds / _cpu_seconds(work) for name, work in contestants.items()} for _ in range(options.repeats)]
    print(f"{len(clips)} {source} clips, {seconds:.0f} s; audio-seconds per CPU-second, median of {len(rounds)} (lowest-highest)")
    for name in contestants:
        print(f"  {name:9} {spread([each[name] for each in rounds])}")
    ratio = [each["ours"] / each["padded"] for each in rounds]
    unpadded = [each["ours"] / each["unpadded"] for each in rounds]
    print(f"  ours / padded   {spread(ratio)}, expected over {_EXPECTED:g}\n  ours / unpadded {spread(unpadded)}")
    return {
        "name": "front-end",
        "ratio": statistics.median(ratio),
        "low": min(ratio),
        "high": max(ratio),
        "limit": _EXPECTED,
        "ratio_unpadded": statistics.median(unpadded),
        "low_unpadded": min(unpadded),
        "high_unpadded": max(unpadded),
        "audio_seconds_per_cpu_second": {name: statistics.median(each[name] for each in rounds) for name in contestants},
        "clips": len(clips),
        "audio_seconds": seconds,
        "source": source,
    }


def _clips(data: Path, count: int) -> tuple[list[np.ndarray], str]:
    """Chunks of `count` real recordings spread over the data set, or synthetic ones of comparable lengths."""
    files = sorted(file for file in (Path(data) / "open-speech" / "audio").rglob("*") if file.is_file())
    if not files:
        generator = np.random.default_rng(0)
        lengths = np.clip(generator.lognormal(1.0, 0.6, count), 0.3, 25.0) * SAMPLE_RATE
        return [(0.1 * generator.standard_normal(int(length))).astype(np.float32) for length in lengths], "synthetic"
    chosen = files[:: max(1, len(files) // count)][:count]
    decoded = LogMelFrontEnd(_MELS).decode([file.read_bytes() for file in chosen], [file.name for file in chosen])
    return [chunk for clip in decoded if isinstance(clip, DecodedClip) for chunk in split_chunks(clip.waveform)], "real"


@contextmanager
def _one_thread() -> Iterator[None]:
    """One compute thread for torch, which the extractor runs on: two would spin beside each other, and CPU time counts both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start

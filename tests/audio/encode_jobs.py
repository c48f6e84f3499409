"""What the tests of `EncodedAudio` run on every rank of a worker pool."""

import os

from audio.audio_files import CountingEncoder

from step_megatron.audio.cache import EncodedCache
from step_megatron.audio.encode_once import EncodedAudio
from step_megatron.audio.front_end import LogMelFrontEnd
from step_megatron.audio.index import AudioIndex
from step_megatron.config.schema import Config, MegatronConfig, RunConfig
from step_megatron.runtime.device import initialize


def open_audio(folder, layout=None, cache=True, limit=1.0):
    """The pieces of one rank: (encoded audio, encoder, runtime)."""
    config = Config(run=RunConfig(device="cpu", threads=1), megatron=MegatronConfig(transformer=layout or {}))
    runtime = initialize(config)
    encoder = CountingEncoder()
    store = EncodedCache(f"{folder}/cache", encoder.fingerprint(), 1 << 30) if cache else None
    audio = EncodedAudio(
        encoder, LogMelFrontEnd(80), AudioIndex.load(folder), store, runtime, f"{folder}/run/quarantine.jsonl", limit
    )
    return audio, encoder, runtime


def prepare_and_fetch(rank, world_size, *, folder, steps, layout=None, cache=True, epochs=1):
    """Features of every step (replica `dp_rank` takes `steps[..][dp_rank]`), chunks this rank encoded per epoch."""
    audio, encoder, runtime = open_audio(folder, layout, cache)
    counts, results = [], []
    for _ in range(epochs):
        before = encoder.chunks
        audio.prepare(sorted({address for step in steps for replica in step for address in replica}), progress=False)
        results = [audio.fetch(step[runtime.dp_rank % len(step)]) for step in steps]
        counts.append(encoder.chunks - before)
    return {"results": results, "counts": counts, "first": runtime.is_first_stage, "dp": runtime.dp_rank}


def fetch_with_an_unreadable_clip(rank, world_size, *, folder, layout, addresses, broken, blind_rank):
    """One rank cannot read one clip, the others can: (what each rank's fetch returned, failures)."""
    audio, _, runtime = open_audio(folder, layout, cache=False)
    if rank == blind_rank:
        resolve = audio.index.resolve
        audio.index.resolve = lambda address: resolve("nowhere.wav" if str(address) == broken else address)
    fetched = audio.fetch(addresses)
    again = audio.fetch(addresses)
    return {
        "failed": sorted(address for address, clip in fetched.items() if clip is None),
        "good": sorted(address for address, clip in fetched.items() if clip is not None),
        "with_features": sum(clip is not None and clip.features.numel() > 0 for clip in fetched.values()),
        "same_again": {address: clip is None for address, clip in again.items()} == {a: c is None for a, c in fetched.items()},
        "failures": dict(audio.failures),
        "first": runtime.is_first_stage,
        "pid": os.getpid(),
    }

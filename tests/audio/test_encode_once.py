"""Encode once: the same bits cold, warm, in any company and on any number of ranks; failures are agreed and nothing hangs."""

import itertools
import json

import pytest
import torch
from audio.audio_files import write_voice
from audio.encode_jobs import fetch_with_an_unreadable_clip, prepare_and_fetch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels.packing import balance

from step_megatron.audio.encode_once import open_encoded_audio
from step_megatron.audio.errors import QuarantineLimitExceeded
from step_megatron.audio.geometry import chunk_frames, chunk_lengths
from step_megatron.audio.index import AudioIndex, validate
from step_megatron.config.schema import AudioConfig, Config, EncoderConfig, RunConfig
from step_megatron.model.encoder import build_encoder

SECONDS = [0.3, 0.31, 1.0, 2.5, 0.7, 26.0, 0.05, 1.9]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    names = [write_voice(folder / f"clip{i}.wav", seconds, seed=i).name for i, seconds in enumerate(SECONDS)]
    validate(names, folder, folder, threads=1)
    return folder, names


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_every_item_is_assigned_once(lengths, workers):
    shares = balance(lengths, workers)
    assert len(shares) == workers and sorted(i for share in shares for i in share) == list(range(len(lengths)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_shares_are_within_a_third_of_the_best_possible(lengths, workers):
    """Graham's bound for longest-first, 4/3 - 1/(3 workers), against every possible assignment."""
    best = min(
        max(sum(length for length, owner in zip(lengths, owners, strict=True) if owner == worker) for worker in range(workers))
        for owners in itertools.product(range(workers), repeat=len(lengths))
    )
    loads = [sum(lengths[i] for i in share) for share in balance(lengths, workers)]
    assert max(loads) <= best * (4 / 3 - 1 / (3 * workers)) + 1e-9


def run_alone(folder, steps, **options):
    from step_megatron.runtime.device import shutdown

    try:
        return prepare_and_fetch(0, 1, folder=str(folder), steps=steps, **options)
    finally:
        shutdown()


def clips_of(outcomes):
    """Address -> clip with features, over all ranks; every rank that has one must have the same bits."""
    clips = {}
    for outcome in outcomes:
        for step in outcome["results"]:
            for address, clip in step.items():
                if outcome["first"]:
                    known = clips.setdefault(address, clip)
                    assert known.chunk_frames == clip.chunk_frames and torch.equal(known.features, clip.features)
    return clips


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for address in one:
        assert one[address].chunk_frames == other[address].chunk_frames
        assert torch.equal(one[address].features.view(torch.int16), other[address].features.view(torch.int16)), address


def test_features_have_the_planned_frames(corpus):
    folder, names = corpus
    index = AudioIndex.load(folder)
    clips = clips_of([run_alone(folder, [[names]], cache=False)])
    for name in names:
        planned = tuple(chunk_frames(samples).encoder for samples in chunk_lengths(index[name].num_samples))
        assert clips[name].chunk_frames == planned
        assert clips[name].features.shape == (sum(planned), 24) and clips[name].features.dtype == torch.bfloat16


def test_cold_warm_and_other_companions_give_the_same_bits(corpus, tmp_path):
    folder, names = corpus
    alone = {}
    for name in names:
        alone |= clips_of([run_alone(folder, [[[name]]], cache=False)])
    together = clips_of([run_alone(folder, [[names]], cache=False)])
    cold = clips_of([run_alone(folder, [[names[::-1]]])])
    warm = run_alone(folder, [[names]])
    assert warm["counts"] == [0]
    for other in (together, cold, clips_of([warm])):
        assert_same_bits(alone, other)


def test_a_second_epoch_encodes_nothing(corpus, tmp_path):
    folder, names = corpus
    copy = tmp_path / "corpus"
    copy.mkdir()
    for name in names:
        (copy / name).write_bytes((folder / name).read_bytes())
    validate(names, copy, copy, threads=1)
    chunks = sum(len(chunk_lengths(AudioIndex.load(copy)[name].num_samples)) for name in names)
    assert run_alone(copy, [[names]], epochs=2)["counts"] == [chunks, 0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_other_rank_counts_give_the_same_bits(corpus, worker_pool, world_size, tmp_path):
    """Streaming over all ranks: every replica gets its own step's clips, each clip is encoded once."""
    folder, names = corpus
    steps = [[names[rank::world_size] for rank in range(world_size)], [names[:3] for _ in range(world_size)]]
    outcomes = worker_pool(world_size).run(prepare_and_fetch, {"folder": str(folder), "steps": steps, "cache": False})
    assert_same_bits(clips_of(outcomes), clips_of([run_alone(folder, [[names]], cache=False)]))
    first_step = sum(len(chunk_lengths(AudioIndex.load(folder)[name].num_samples)) for name in names)
    assert sum(outcome["counts"][0] for outcome in outcomes) == first_step + 3
    assert all(outcome["counts"][0] > 0 for outcome in outcomes)
    for rank, outcome in enumerate(outcomes):
        assert set(outcome["results"][0]) == set(names[rank::world_size])


def test_a_node_fills_its_cache_together(corpus, worker_pool, tmp_path):
    folder, names = corpus
    copy = tmp_path / "corpus"
    copy.mkdir()
    for name in names:
        (copy / name).write_bytes((folder / name).read_bytes())
    validate(names, copy, copy, threads=1)
    job = {"folder": str(copy), "steps": [[names]], "layout": {"tensor_model_parallel_size": 2}, "epochs": 2}
    outcomes = worker_pool(2).run(prepare_and_fetch, job)
    chunks = sum(len(chunk_lengths(AudioIndex.load(copy)[name].num_samples)) for name in names)
    assert sum(outcome["counts"][0] for outcome in outcomes) == chunks and min(outcome["counts"][0] for outcome in outcomes) > 0
    assert [outcome["counts"][1] for outcome in outcomes] == [0, 0]
    assert_same_bits(clips_of(outcomes), clips_of([run_alone(folder, [[names]], cache=False)]))


LAYOUTS = {
    "tp2pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clip_unreadable_on_one_rank_only_is_left_out_by_all(corpus, worker_pool, layout, tmp_path):
    folder, names = corpus
    world_size, sizes = LAYOUTS[layout]
    index = AudioIndex.load(folder)
    ordered = sorted(names)
    shares = balance([index[name].num_samples for name in ordered], world_size)
    quarantine = folder / "run" / "quarantine.jsonl"
    for blind_rank in range(world_size):
        broken = ordered[shares[blind_rank][0]]
        quarantine.unlink(missing_ok=True)
        job = {"folder": str(folder), "layout": sizes, "addresses": names, "broken": broken, "blind_rank": blind_rank}
        outcomes = worker_pool(world_size).run(fetch_with_an_unreadable_clip, job, timeout=60)
        for outcome in outcomes:
            assert outcome["failed"] == [broken] and outcome["good"] == sorted(set(names) - {broken})
            assert list(outcome["failures"]) == [broken] and outcome["failures"][broken].startswith("missing")
            assert outcome["with_features"] == (len(names) - 1 if outcome["first"] else 0)
            assert outcome["same_again"]
        line = json.loads(quarantine.read_text().splitlines()[0])
        assert line["address"] == broken and "nowhere.wav" in line["reason"] and line["rank"] == blind_rank


def test_a_clip_that_changed_since_validation_fails_by_itself(tmp_path):
    names = [write_voice(tmp_path / f"{i}.wav", 1.0, seed=i).name for i in range(3)]
    validate(names, tmp_path, tmp_path, threads=1)
    write_voice(tmp_path / names[1], 2.0, seed=9)
    outcome = run_alone(tmp_path, [[names]], cache=True)
    assert [outcome["results"][0][name] is None for name in names] == [False, True, False]


def test_the_real_encoder_gives_the_same_bits_in_any_company(corpus, tmp_path, runtime):
    """Through the configuration: two passes or more keep a cache, one pass encodes inside the step."""
    folder, names = corpus
    shape = EncoderConfig(mels=80, width=64, layers=2, heads=2, ffn_width=128, weights="random")
    config = Config(run=RunConfig(dir=str(tmp_path / "run")), encoder=shape, audio=AudioConfig(cache_dir=str(tmp_path / "cache")))
    index = AudioIndex.load(folder)

    def fetch(passes, steps):
        audio = open_encoded_audio(config, build_encoder(shape, block=256, seed=3), index, runtime, passes)
        assert (audio.cache is not None) == (passes > 1)
        audio.prepare(names, progress=False)
        return {address: clip for step in steps for address, clip in audio.fetch(step).items()}

    one_by_one = fetch(1, [[name] for name in names])
    assert not (tmp_path / "cache").exists()
    assert_same_bits(one_by_one, fetch(1, [names[::-1]]))
    for _ in ("cold", "warm"):
        assert_same_bits(one_by_one, fetch(2, [names]))
    assert len({clip.features.float().mean().item() for clip in one_by_one.values()}) == len(names)


def test_a_run_refuses_an_index_of_longer_clips_than_it_decodes(corpus, tmp_path, runtime):
    """Before any clip is encoded: `data validate` may have been given another limit."""
    folder, _ = corpus
    config = Config(run=RunConfig(dir=str(tmp_path / "run")), audio=AudioConfig(max_clip_seconds=0.2))
    with pytest.raises(ValueError, match=r"audio.max_clip_seconds is 0.2, and the index has .*wav of"):
        open_encoded_audio(config, None, AudioIndex.load(folder), runtime, passes=1)


def test_too_many_failures_stop_the_run(tmp_path, runtime):
    from audio.audio_files import CountingEncoder

    from step_megatron.audio.encode_once import EncodedAudio
    from step_megatron.audio.front_end import LogMelFrontEnd

    names = [write_voice(tmp_path / f"{i}.wav", 0.5, seed=i).name for i in range(4)]
    validate(names, tmp_path, tmp_path, threads=1)
    for name in names[:2]:
        (tmp_path / name).unlink()
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    front_end, index = LogMelFrontEnd(80), AudioIndex.load(tmp_path)
    audio = EncodedAudio(CountingEncoder(), front_end, index, None, runtime, quarantine, quarantine_limit=0.25)
    for _ in range(2):
        assert audio.fetch(names[1:])[names[1]] is None
        assert len(quarantine.read_text().splitlines()) == 1, "a clip that is tried again is written once"
    with pytest.raises(QuarantineLimitExceeded, match=r"2 of 4 clips cannot be used, data.quarantine_limit allows 25.0%"):
        audio.fetch(names)


def test_a_folder_that_is_not_there_stops_the_preparation(tmp_path, runtime):
    """As when the audio disk is not mounted: nothing of it is kept, and the share is that of the clips in use."""
    from audio.audio_files import CountingEncoder

    from step_megatron.audio.cache import EncodedCache
    from step_megatron.audio.encode_once import EncodedAudio
    from step_megatron.audio.front_end import LogMelFrontEnd

    names = [write_voice(tmp_path / f"{i}.wav", 0.5, seed=i).name for i in range(8)]
    validate(names, tmp_path, tmp_path, threads=1)
    (tmp_path / names[0]).unlink()

    def prepare(**options):
        cache = EncodedCache(tmp_path / "cache", "one", 1 << 30)
        audio = EncodedAudio(CountingEncoder(), LogMelFrontEnd(80), AudioIndex.load(tmp_path), cache, runtime, **options)
        return audio.prepare(names, progress=False)

    assert prepare(quarantine_limit=0.125) == (7, 1)
    assert prepare(quarantine_limit=0.125) == (0, 1)
    with pytest.raises(QuarantineLimitExceeded, match="1 of 4 clips cannot be used"):
        prepare(quarantine_limit=0.125, clips=4)


def prepare_without_a_clip(rank, world_size, *, folder, names):
    from audio.encode_jobs import open_audio

    audio, _, _ = open_audio(folder, limit=0.1)
    try:
        return audio.prepare(names, progress=False)
    except QuarantineLimitExceeded as error:
        return str(error)


def test_every_rank_learns_of_the_failures_of_a_preparation(worker_pool, tmp_path):
    names = [write_voice(tmp_path / f"{i}.wav", 0.5 + 0.1 * i, seed=i).name for i in range(4)]
    validate(names, tmp_path, tmp_path, threads=1)
    (tmp_path / names[2]).unlink()
    messages = worker_pool(2).run(prepare_without_a_clip, {"folder": str(tmp_path), "names": names})
    assert messages[0] == messages[1] and "1 of 4 clips cannot be used" in messages[0]


def test_a_fetch_says_what_it_encoded(corpus, runtime):
    """50 Hz positions, half the mel frames, of what was encoded inside the step alone."""
    from audio.audio_files import CountingEncoder

    from step_megatron.audio.encode_once import EncodedAudio
    from step_megatron.audio.front_end import LogMelFrontEnd

    folder, names = corpus
    audio = EncodedAudio(CountingEncoder(), LogMelFrontEnd(80), AudioIndex.load(folder), None, runtime)
    audio.fetch(names[:2])
    assert sorted(audio.encoded_frames) == [15, 16]
    audio.fetch([])
    assert audio.encoded_frames == ()

"""The cache: what was put comes back bit for bit, from any process; a kill costs the last record, a limit the oldest shards."""

import multiprocessing
import os
import resource
import signal
import time

import pytest
import torch

from step_megatron.audio.cache import EncodedCache, EncodedClip

LIMIT = 1 << 30


def clip(seed, frames=(2, 1), width=4):
    features = torch.randn(sum(frames), width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    return EncodedClip(features, frames)


def key(number):
    return f"{number:064x}"


def assert_same(one, other):
    assert one.chunk_frames == other.chunk_frames and one.failure == other.failure
    assert one.features.shape == other.features.shape and one.features.dtype == torch.bfloat16
    assert torch.equal(one.features.view(torch.int16), other.features.view(torch.int16))


def test_clips_come_back_bit_for_bit_also_after_reopening(tmp_path):
    special = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]]).to(torch.bfloat16)
    clips = [
        clip(0),
        clip(1, (1,)),
        clip(2, (), 4),
        EncodedClip(special, (1,)),
        EncodedClip(torch.zeros(0, 0).bfloat16(), (), "corrupt: bad"),
    ]
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    for number, value in enumerate(clips):
        assert cache.get(key(number)) is None
        cache.put(key(number), value)
        assert_same(cache.get(key(number)), value)
    cache.close()
    reopened = EncodedCache(tmp_path, "encoder", LIMIT)
    assert len(reopened) == len(clips)
    for number, value in enumerate(clips):
        assert_same(reopened.get(key(number)), value)
    assert len(EncodedCache(tmp_path, "another encoder", LIMIT)) == 0


def test_features_that_are_got_may_be_changed(tmp_path):
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    cache.put(key(0), clip(0))
    cache.get(key(0)).features.zero_()
    assert_same(cache.get(key(0)), clip(0))


def test_what_does_not_fit_is_refused(tmp_path):
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    for features in (torch.zeros(8, 4), torch.zeros(7, 4).bfloat16()):
        with pytest.raises(ValueError, match="8 bfloat16 frames"):
            cache.put(key(0), EncodedClip(features, (5, 3)))


def test_a_torn_tail_at_any_byte_costs_only_the_last_record(tmp_path):
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    for number in range(2):
        cache.put(key(number), clip(number))
    (shard,) = cache.folder.glob("*.data")
    first = shard.stat().st_size // 2
    content = shard.read_bytes()
    for size in range(first, len(content)):
        shard.write_bytes(content[:size])
        torn = EncodedCache(tmp_path, "encoder", LIMIT)
        assert_same(torn.get(key(0)), clip(0))
        assert torn.get(key(1)) is None
    # Work goes on beside the torn shard.
    torn.put(key(1), clip(1))
    assert_same(EncodedCache(tmp_path, "encoder", LIMIT).get(key(1)), clip(1))


def test_a_flipped_bit_anywhere_is_never_handed_out(tmp_path):
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    cache.put(key(0), clip(0))
    cache.put(key(1), clip(1))
    (shard,) = cache.folder.glob("*.data")
    content = shard.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 4
        shard.write_bytes(damaged)
        reopened = EncodedCache(tmp_path, "encoder", LIMIT)
        for number in range(2):
            found = reopened.get(key(number))
            if found is not None:
                assert_same(found, clip(number))


def fill_for_ever(folder, first):
    cache = EncodedCache(folder, "encoder", LIMIT)
    number = first
    while True:
        cache.put(key(number), clip(number, (40,), 256))
        number += 2


def test_a_killed_writer_leaves_a_cache_that_works(tmp_path):
    """Two processes write at once and are killed at some moment; every record that is found is whole."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=fill_for_ever, args=(tmp_path, first)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    reader = EncodedCache(tmp_path, "encoder", LIMIT)
    deadline = time.monotonic() + 60
    while not (key(20) in reader and key(21) in reader) and time.monotonic() < deadline:
        time.sleep(0.02)
        reader.refresh()
    for writer in writers:
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    reader = EncodedCache(tmp_path, "encoder", LIMIT)
    assert key(20) in reader and key(21) in reader
    found = [number for number in range(100_000) if key(number) in reader]
    for number in [*found[:5], *found[-5:]]:
        assert_same(reader.get(key(number)), clip(number, (40,), 256))


def test_the_oldest_shards_leave_when_the_limit_is_reached(tmp_path):
    record = 16 + 144 + 2 * 40 * 256
    limit = 16 * record
    cache, other = EncodedCache(tmp_path, "encoder", limit), EncodedCache(tmp_path, "encoder", limit)
    for number in range(60):
        cache.put(key(number), clip(number, (40,), 256))
        size = sum(shard.stat().st_size for shard in cache.folder.glob("*.data"))
        assert size <= limit + limit // 8 + record
    other.refresh()
    for each in (cache, other, EncodedCache(tmp_path, "encoder", limit)):
        kept = [number for number in range(60) if key(number) in each]
        assert kept == list(range(60 - len(kept), 60)) and len(kept) >= 10
        for number in kept:
            assert_same(each.get(key(number)), clip(number, (40,), 256))


def test_the_limit_is_for_all_encoders_and_takes_the_unused_first(tmp_path):
    record = 16 + 144 + 2 * 40 * 256
    limit = 16 * record
    foreign = tmp_path / "a user's" / "notes.data"
    foreign.parent.mkdir()
    foreign.write_bytes(bytes(limit))
    mine, unused = EncodedCache(tmp_path, "mine", limit), EncodedCache(tmp_path, "unused", limit)
    for number in range(3):
        mine.put(key(number), clip(number, (40,), 256))
    mine.close()
    for number in range(10):
        unused.put(key(number), clip(number, (40,), 256))
    unused.close()
    for number in range(3, 10):
        mine.put(key(number), clip(number, (40,), 256))
        assert sum(shard.stat().st_size for shard in tmp_path.glob("*/*-*.data")) <= limit + limit // 8 + record
    mine, unused = EncodedCache(tmp_path, "mine", limit), EncodedCache(tmp_path, "unused", limit)
    assert len(mine) == 10, "younger shards of another encoder leave before older ones of this"
    assert 0 < len(unused) < 10 and key(9) in unused and key(0) not in unused
    assert foreign.stat().st_size == limit


@pytest.mark.parametrize("warm", [True, False])
def test_clips_that_do_not_fit_are_announced_with_both_sizes(tmp_path, caplog, warm):
    cache = EncodedCache(tmp_path, "encoder", 1 << 20)
    cache.put(key(0), EncodedClip(torch.zeros(0, 0).bfloat16(), (), "corrupt: bad"))
    if warm:
        cache.put(key(1), clip(1, (2,), 1024))
    cache.expect(512)
    cache.put(key(2), clip(2, (2,), 1024))
    assert not caplog.records, "1 MiB fits"
    cache.expect(2048)
    cache.put(key(3), clip(3, (2,), 1024))
    (record,) = caplog.records
    assert "take about 0.00391 GiB encoded, audio.cache_max_gib allows 0.000977" in record.getMessage()


def test_a_disk_that_refuses_costs_the_cache_and_not_the_run(tmp_path, caplog):
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    cache.put(key(0), clip(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        cache.put(key(1), clip(1, (40,), 256))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cache.put(key(2), clip(2))
    cache.close()
    (record,) = caplog.records
    assert "cannot be written (File too large)" in record.getMessage() and "audio.cache_dir" in record.getMessage()
    assert_same(cache.get(key(0)), clip(0))
    assert cache.get(key(1)) is None and cache.get(key(2)) is None
    reopened = EncodedCache(tmp_path, "encoder", LIMIT)
    assert len(reopened) == 1
    reopened.put(key(1), clip(1))
    assert_same(reopened.get(key(1)), clip(1))


def test_a_shard_that_is_being_written_never_leaves(tmp_path):
    limit = 4 * (16 + 144 + 2 * 40 * 256)
    slow, busy = EncodedCache(tmp_path, "encoder", limit), EncodedCache(tmp_path, "encoder", limit)
    slow.put(key(1000), clip(1000, (1,), 8))
    for number in range(30):
        busy.put(key(number), clip(number, (40,), 256))
    slow.put(key(1001), clip(1001, (1,), 8))
    reopened = EncodedCache(tmp_path, "encoder", limit)
    assert_same(reopened.get(key(1000)), clip(1000, (1,), 8))
    assert_same(reopened.get(key(1001)), clip(1001, (1,), 8))


def test_a_shard_that_another_process_removed_counts_as_absent(tmp_path):
    cache = EncodedCache(tmp_path, "encoder", LIMIT)
    cache.put(key(0), clip(0))
    cache.close()
    reader = EncodedCache(tmp_path, "encoder", LIMIT)
    next(reader.folder.glob("*.data")).unlink()
    assert reader.get(key(0)) is None
    reader.refresh()
    assert len(reader) == 0
    reader.put(key(0), clip(0))
    assert_same(reader.get(key(0)), clip(0))

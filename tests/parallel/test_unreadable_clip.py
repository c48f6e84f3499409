"""A clip that one rank alone cannot read: every rank leaves its segment out before the forward pass, and nothing hangs."""

import dataclasses

import pytest
from parallel.layouts import OPTIMIZERS, full_tensors, lively_state, make_trainer, run_step, small_config
from parallel.synthetic import ENCODER_WIDTH, GROUPS, pack, segment

SECONDS = (1.9, 1.5, 1.2, 0.8)


def train_with_a_blind_rank(rank, world_size, *, folder, transformer, broken, blind):
    """Two steps; with `blind`, the one rank that reads clip `broken` cannot (one rank encodes a clip, inside the step)."""
    from audio.audio_files import CountingEncoder
    from step_kernels.packing import balance

    from step_megatron.audio.encode_once import EncodedAudio
    from step_megatron.audio.front_end import LogMelFrontEnd
    from step_megatron.audio.index import AudioIndex
    from step_megatron.runtime.device import initialize
    from step_megatron.training.batch import to_device

    config = small_config(transformer, OPTIMIZERS["adam"])
    runtime = initialize(config)
    trainer = make_trainer(config, runtime, lively_state(config))
    index = AudioIndex.load(folder)
    audio = EncodedAudio(CountingEncoder(80, ENCODER_WIDTH), LogMelFrontEnd(80), index, None, runtime, f"{folder}/bad.jsonl", 1.0)
    lengths = [index[f"{i}.wav"].num_samples for i in range(len(SECONDS))]
    reader = next(r for r, share in enumerate(balance(lengths, world_size)) if broken in share)
    if blind and rank == reader:
        resolve = index.resolve
        index.resolve = lambda address: resolve("nowhere.wav" if str(address) == f"{broken}.wav" else address)
    micro_batches = micro_batches_of(index)

    def next_batches():
        clips = audio.fetch([span.address for batch in micro_batches for span in batch.audio])
        return [to_device(batch, clips, GROUPS, ENCODER_WIDTH, runtime) for batch in micro_batches]

    trainer.next_batches = next_batches
    lines = [run_step(trainer) for _ in range(2)]
    return {"lines": lines, "parameters": full_tensors(trainer.model, lambda parameter: parameter)}


def micro_batches_of(index):
    """Two micro-batches of two segments; segment i holds clip i.wav."""
    from step_megatron.audio.geometry import chunk_frames, chunk_lengths

    segments = []
    for number in range(len(SECONDS)):
        frames = tuple(chunk_frames(n).encoder for n in chunk_lengths(index[f"{number}.wav"].num_samples))
        made, _ = segment(64, frames, 10 + number, number, str(number))
        segments.append(dataclasses.replace(made, audio=(dataclasses.replace(made.audio[0], address=f"{number}.wav"),)))
    return [pack(segments[:2]), pack(segments[2:])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from audio.audio_files import write_voice

    from step_megatron.audio.index import validate

    place = tmp_path_factory.mktemp("clips")
    for number, seconds in enumerate(SECONDS):
        write_voice(place / f"{number}.wav", seconds, number)
    validate([f"{number}.wav" for number in range(len(SECONDS))], place, place, threads=1)
    return str(place)


LAYOUTS = {
    "tp2-pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_all_ranks_leave_it_out_and_go_on(layout, worker_pool, folder):
    processes, transformer = LAYOUTS[layout]
    kwargs = {"folder": folder, "broken": 1, "blind": True}
    results = worker_pool(processes).run(train_with_a_blind_rank, kwargs | {"transformer": transformer})
    alone = worker_pool(1).run(train_with_a_blind_rank, kwargs | {"transformer": {}})[0]
    healthy = worker_pool(1).run(train_with_a_blind_rank, kwargs | {"transformer": {}, "blind": False})[0]
    for result in results:
        assert [line["failed_clips"] for line in result["lines"]] == [1, 1]
        assert [line["loss"] for line in result["lines"]] == pytest.approx([line["loss"] for line in alone["lines"]], rel=1e-6)
    for name, parameter in alone["parameters"].items():
        assert (results[0]["parameters"][name] - parameter).norm() < 5e-5 * parameter.norm(), name
    assert [line["failed_clips"] for line in healthy["lines"]] == [0, 0]
    assert abs(healthy["lines"][0]["loss"] / alone["lines"][0]["loss"] - 1) > 1e-4, "the segment was in the loss when readable"

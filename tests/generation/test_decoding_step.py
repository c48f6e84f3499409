"""A decoding step can be captured as a CUDA graph: it reads nothing back, and its buffers stay where they are."""

import dataclasses

import pytest
import torch
from model.test_hot_step import HostWaits
from support.decoder_twins import huggingface_twin, model_of_twin, small_config
from support.rollouts import make_prompts

from step_megatron.config.schema import GenerationConfig
from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Sampling
from step_megatron.generation.sampling import Needs, choose

KINDS = {
    "greedy": Sampling(),
    "policy": Sampling(temperature=1.0),
    "everything": Sampling(temperature=0.9, top_k=7, top_p=0.8, repetition_penalty=1.2, min_new_tokens=9, stop_ids=(1, 2)),
}


def engine_under_way(sampling: Sampling, **transformer) -> Engine:
    """After two steps of all prompts."""
    config = small_config(**transformer)
    engine = Engine(model_of_twin(config, huggingface_twin(config)), GenerationConfig(rows=8))
    sampling = dataclasses.replace(sampling, max_new_tokens=9)
    for prompt in make_prompts():
        engine.add(prompt, [sampling])
    with engine.running():
        engine.step()
        engine.step()
    return engine


def watched_step(rank, world_size, *, kind, transformer):
    """What the detector finds in the device's part of a step."""
    from step_megatron.runtime.device import initialize

    initialize(small_config(**transformer))
    engine = engine_under_way(KINDS[kind], **transformer)
    _, _, decoder = engine._on_device()
    with engine.running():
        engine.scheduler.make_room()
        needs = decoder._rows.fill(engine.scheduler.running, 8)
        with HostWaits() as waits:
            tokens, _ = decoder.run(8, needs)
    return waits.found, needs, len(tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits(kind, worker_pool):
    for transformer in ({}, {"tensor_model_parallel_size": 2}):
        for found, needs, rows in worker_pool(2 if transformer else 1).run(
            watched_step, {"kind": kind, "transformer": transformer}
        ):
            assert found == [] and rows == 8
            assert needs == {
                "greedy": Needs(), "policy": Needs(draws=True), "everything": Needs(True, True, True, True)
            }[kind]  # fmt: skip


def test_the_detector_sees_a_wait_in_the_choice_of_tokens(runtime, monkeypatch):
    engine = engine_under_way(Sampling())
    _, _, decoder = engine._on_device()

    def careless(logits, rows, needs):
        return choose(logits + float(logits.sum().item() > 0), rows, needs)

    monkeypatch.setattr("step_megatron.generation.decode.choose", careless)
    with engine.running(), HostWaits() as waits:
        decoder.run(len(engine.scheduler.running), Needs())
    assert waits.found


class Recorded:
    """A stand-in for CUDA graphs: what was captured runs again on replay, with the same tensors."""

    captures = 0

    def __init__(self, decoder, bucket, needs):
        type(self).captures += 1
        self.run = lambda: decoder.run(bucket, needs)
        self.results = tuple(torch.empty_like(each) for each in self.run())
        self.places = self._places(decoder, bucket)
        self.decoder, self.bucket = decoder, bucket

    def _places(self, decoder, bucket):
        tokens, positions, work = decoder._rows.work(bucket, decoder._cache)
        tensors = [tokens, positions, work.slots, work.table, work.lengths, work.bounds]
        settings = [each for each in vars(decoder._rows.settings(bucket)).values() if each is not None]
        return [each.data_ptr() for each in (*tensors, *settings)]

    def replay(self):
        assert self._places(self.decoder, self.bucket) == self.places, "a buffer has moved: a graph would read the old one"
        for held, new in zip(self.results, self.run(), strict=True):
            held.copy_(new)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_in_batches_of_powers_of_two_give_the_same(runtime, monkeypatch, kind):
    config = small_config()
    model = model_of_twin(config, huggingface_twin(config))
    settings = GenerationConfig(rows=8)
    samplings = [dataclasses.replace(KINDS[kind], seed=i, max_new_tokens=3 + 2 * i) for i in range(len(make_prompts()))]
    expected = Engine(model, settings).generate(make_prompts(), samplings)
    engine = Engine(model, settings)
    _, _, decoder = engine._on_device()
    decoder._graphs = True
    Recorded.captures = 0

    def capture(bucket, needs):
        recorded = Recorded(decoder, bucket, needs)
        return recorded, recorded.results

    monkeypatch.setattr(decoder, "_capture", capture)
    results = engine.generate(make_prompts(), samplings)
    assert [result.tokens for result in results] == [result.tokens for result in expected]
    assert Recorded.captures >= 4, "batches of 8, 4, 2 and 1"

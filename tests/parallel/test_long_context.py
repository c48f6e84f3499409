"""Long segments over context-parallel ranks, with clips that the cut goes through, and recomputed activations.

A context-parallel rank holds two pieces of every segment; the audio is merged before the cut, so a clip may lie on several ranks.
"""

import contextlib
from unittest import mock

import pytest
from parallel.layouts import train
from parallel.synthetic import audio_tokens
from parallel.test_parallel_parity import check

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
# (tokens, encoder frames of its clips, trained tokens): as long as 25 s chunks need it, text alone, and two short ones.
LONG = (
    ((1024, (625, 625, 250), 200), (256, (), 100)),
    ((512, (625,), 100),),
    ((128, (101,), 40), (64, (31,), 20)),
    ((768, (), 300),),
)


def train_long(rank, world_size, **kwargs):
    with mock.patch("parallel.synthetic.STEP", LONG):
        return train(rank, world_size, **kwargs, max_positions=1024, steps=1)


def test_the_cuts_go_through_clips():
    crossed = 0
    for group in LONG:
        for length, frames, _ in group:
            start, cuts = 1, range(length // 4, length, length // 4)
            for count in frames:
                crossed += any(start < cut < start + audio_tokens(count) for cut in cuts)
                start += audio_tokens(count) + 1
    assert crossed >= 4


@pytest.fixture(scope="module")
def one_process(worker_pool):
    return worker_pool(1).run(train_long, {"transformer": {}, "optimizer": "adam"})[0]


@pytest.mark.parametrize(
    ("processes", "transformer"), [(2, CP2), (4, CP2 | TP2), (4, CP2 | TP2 | SP)], ids=["cp2", "tp2-cp2", "tp2-sp-cp2"]
)
def test_long_segments_equal_one_process(processes, transformer, worker_pool, one_process):
    check(worker_pool(processes).run(train_long, {"transformer": transformer, "optimizer": "adam"})[0], one_process, "adam")


def full(method: str, layers: int) -> dict:
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def selective(*modules: str) -> dict:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


# Each policy, and of how many layers' attention and feed-forward parts the forward pass then runs once more.
POLICIES = {
    "uniform-1": (full("uniform", 1), (4, 4)),
    "uniform-2": (full("uniform", 2), (4, 4)),
    "block-3": (full("block", 3), (3, 3)),
    "attention": (selective("core_attn"), (4, 0)),
    "attention-mlp": (selective("core_attn", "mlp"), (4, 4)),
}
# What is trained: everything, the audio adaptor alone, or LoRA beside it.
TRAINED = {"all": {}, "adaptor": {"freeze": ("language_model.*",)}, "lora": {"lora": {"rank": 4, "alpha": 4.0}}}


def train_counting(rank, world_size, **kwargs):
    """One step; with `calls` of the attention and of the feed-forward part, in micro-batches."""
    from step_megatron.model.attention import PackedCausalAttention
    from step_megatron.model.layers import GatedMLP

    with contextlib.ExitStack() as stack:
        counters = [
            stack.enter_context(mock.patch.object(kind, "forward", autospec=True, side_effect=kind.forward))
            for kind in (PackedCausalAttention, GatedMLP)
        ]
        result = train(rank, world_size, **kwargs, steps=1)
    return result | {"calls": [counter.call_count / 4 for counter in counters]}


@pytest.fixture(scope="module")
def not_recomputed(worker_pool):
    kwargs = {"transformer": {}, "optimizer": "adam"}
    return {name: worker_pool(1).run(train_counting, kwargs | settings)[0] for name, settings in TRAINED.items()}


@pytest.mark.parametrize("trained", list(TRAINED))
@pytest.mark.parametrize("policy", list(POLICIES))
def test_recomputation_changes_no_gradient(policy, trained, worker_pool, not_recomputed):
    transformer, again = POLICIES[policy]
    recomputed = worker_pool(1).run(train_counting, {"transformer": transformer, "optimizer": "adam", **TRAINED[trained]})[0]
    check(recomputed, not_recomputed[trained], "adam")
    assert not_recomputed[trained]["calls"] == [4, 4]
    assert recomputed["calls"] == [4 + more for more in again]


@pytest.mark.parametrize("policy", ["uniform-1", "attention-mlp"])
def test_recomputation_under_sequence_and_pipeline_parallelism(policy, worker_pool, not_recomputed):
    layout = TP2 | SP | {"pipeline_model_parallel_size": 2}
    kwargs = {"transformer": layout | POLICIES[policy][0], "optimizer": "adam", "steps": 1, **TRAINED["lora"]}
    check(worker_pool(4).run(train, kwargs)[0], not_recomputed["lora"], "adam")

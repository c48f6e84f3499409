"""The trainer's hot paths run on the fast ops: a reference that is used in their place, silently, fails here."""

from collections import Counter

import pytest
from training.toy_run import overrides, write_data

# What midtrain computes with on a CPU, in float32 (generation: tests/model/test_generation.py). What has a C++ kernel must never
# run in plain torch.
TRAINING = {
    "audio_attention_varlen",
    "pool_norm_downsample",
    "conv_downsample_gelu",
    "merge_audio_embeddings",
    "causal_attention_varlen",
    "linear_cross_entropy",
    "rope_qk",
    "rms_norm",
    "swiglu",
}


def chosen_by_training(rank: int, world_size: int, *, data: str, run_dir: str) -> Counter:
    """Train the toy run; how often each (op, backend) was chosen."""
    from step_kernels import registry

    from step_megatron.config import load_config
    from step_megatron.training.midtrain import midtrain

    registry.chosen.clear()
    midtrain(load_config(None, [*overrides(data, run_dir), "training.steps=3", "audio.cache=off"]))
    return Counter(registry.chosen)


@pytest.fixture(scope="module")
def chosen(worker_pool, tmp_path_factory) -> Counter:
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder)
    return worker_pool(1).run(chosen_by_training, {"data": str(folder), "run_dir": str(folder / "run")})[0]


def test_training_uses_every_op(chosen):
    assert TRAINING <= {op for op, _ in chosen}


def test_no_op_with_a_cpu_kernel_runs_in_plain_torch(chosen):
    from step_kernels import registered

    with_kernel = {op for op, backends in registered().items() if "cpp" in backends}
    assert {(op, backend) for op, backend in chosen if op in with_kernel and backend != "cpp"} == set()
    assert {op for op, backend in chosen if backend == "cpp"} >= {"audio_attention_varlen", "causal_attention_varlen"}

"""Every parallel layout, and packing, give the losses, gradients and parameters of one process, with audio in the batch.

Four micro-batches a step with 19, 3, 22 and 21 trained tokens, clips in three of them; three steps; the adaptor is trained too.
"""

import pytest
import torch
from parallel.layouts import STEPS, train

# Parallel settings of each layout, and its number of processes.
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
LAYOUTS = {
    "tp2": (2, TP2, {}),
    "tp2-sp": (2, TP2 | SP, {}),
    "pp2": (2, PP2, {}),
    "pp2-vpp2": (2, PP2 | VPP2, {}),
    "cp2": (2, CP2, {}),
    "dp2": (2, {}, {}),
    "dp2-distributed-optimizer": (2, {}, DISTRIBUTED),
    "dp2-overlapped": (2, {}, DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 20000}),
    "tp2-pp2": (4, TP2 | PP2, {}),
    "tp2-sp-pp2-vpp2": (4, TP2 | SP | PP2 | VPP2, {}),
    "tp2-sp-cp2": (4, TP2 | SP | CP2, {}),
    "pp2-dp2-distributed-optimizer": (4, PP2, DISTRIBUTED),
}
# Norm of the difference over the norm, of each parameter.
GRADIENT_TOLERANCE = 1e-6
PARAMETER_TOLERANCE = {"sgd": 1e-6, "adam": 5e-5}


@pytest.fixture(scope="module")
def one_process(worker_pool):
    """The run of one process, by optimizer."""
    return {name: worker_pool(1).run(train, {"transformer": {}, "optimizer": name})[0] for name in PARAMETER_TOLERANCE}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def furthest(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert actual.keys() == expected.keys()
    return max((distance(actual[name], expected[name]), name) for name in expected)


def check(actual: dict, expected: dict, optimizer: str) -> None:
    for line, reference in zip(actual["lines"], expected["lines"], strict=True):
        names = [name for name in reference if "loss" in name] + ["learning_rate"]
        assert line["aspect_loss/continuity"] == line["loss/speech"], "all of one source's samples have the aspect"
        assert {name: line[name] for name in names} == pytest.approx({name: reference[name] for name in names}, rel=1e-6)
        assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    difference, name = furthest(actual["gradients"], expected["gradients"])
    assert difference < GRADIENT_TOLERANCE, f"gradient of {name}"
    difference, name = furthest(actual["parameters"], expected["parameters"])
    assert difference < PARAMETER_TOLERANCE[optimizer], f"{name} after {STEPS} steps"


# Megatron's distributed optimizer does Adam only.
RUNS = [(layout, name) for layout in LAYOUTS for name in PARAMETER_TOLERANCE if name == "adam" or not LAYOUTS[layout][2]]


@pytest.mark.parametrize(("layout", "optimizer"), RUNS)
def test_layout_equals_one_process(layout, optimizer, worker_pool, one_process):
    processes, transformer, ddp = LAYOUTS[layout]
    results = worker_pool(processes).run(train, {"transformer": transformer, "optimizer": optimizer, "ddp": ddp})
    check(results[0], one_process[optimizer], optimizer)


@pytest.mark.parametrize("optimizer", list(PARAMETER_TOLERANCE))
def test_packed_equals_unpacked(optimizer, worker_pool, one_process):
    unpacked = worker_pool(1).run(train, {"transformer": {}, "optimizer": optimizer, "packed": False})[0]
    check(unpacked, one_process[optimizer], optimizer)


@pytest.mark.parametrize("freeze", [(), ("*word_embeddings*",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2", "tp2-pp2"])
def test_tied_embeddings_stay_one_over_a_pipeline(layout, freeze, worker_pool):
    processes, transformer, _ = LAYOUTS[layout]
    kwargs = {"optimizer": "adam", "tied": True, "freeze": freeze}
    expected = worker_pool(1).run(train, kwargs | {"transformer": {}})[0]
    assert ("language_model.embedding.word_embeddings.weight" in expected["gradients"]) is (not freeze)
    check(worker_pool(processes).run(train, kwargs | {"transformer": transformer})[0], expected, "adam")

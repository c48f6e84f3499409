"""LoRA: every layout gives the losses, adapter gradients and adapters of one process; checkpoints go on and change layout."""

import pytest
from parallel.layouts import load_and_train, train, train_and_save
from parallel.test_parallel_parity import check, furthest

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
LORA = {"lora": {"rank": 4, "alpha": 4.0}}
LAYOUTS = {
    "tp2": (TP2, {}),
    "tp2-sp": (TP2 | SP, {}),
    "pp2": (PP2, {}),
    "dp2-distributed-optimizer": ({}, DISTRIBUTED),
}


@pytest.fixture(scope="module")
def one_process(worker_pool):
    return worker_pool(1).run(train, {"transformer": {}, "optimizer": "adam", **LORA})[0]


def test_adapters_and_the_adaptor_alone_are_trained(one_process):
    trained = set(one_process["gradients"])
    adapters = {name for name in trained if ".lora_" in name}
    assert len(adapters) == 4 * 4 * 2, "four layers, four products, A and B"
    assert trained - adapters and all(name.startswith("adaptor.") for name in trained - adapters)
    assert all(gradient.norm() > 1e-4 for gradient in one_process["gradients"].values())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layout_equals_one_process(layout, worker_pool, one_process):
    transformer, ddp = LAYOUTS[layout]
    kwargs = {"transformer": transformer, "optimizer": "adam", "ddp": ddp, **LORA}
    check(worker_pool(2).run(train, kwargs)[0], one_process, "adam")


@pytest.mark.parametrize(("before", "after"), [((TP2 | SP, {}), (PP2, {})), (({}, DISTRIBUTED), ({}, DISTRIBUTED))])
def test_a_run_with_lora_goes_on_from_its_checkpoint(before, after, worker_pool, tmp_path):
    kwargs = {"optimizer": "adam", "run_dir": str(tmp_path), **LORA}
    written = worker_pool(2).run(train_and_save, kwargs | {"transformer": before[0], "ddp": before[1], "steps": 2})[0]
    resumed = worker_pool(2).run(load_and_train, kwargs | {"transformer": after[0], "ddp": after[1]})[0]
    assert furthest(resumed["saved"], written["saved"])[0] == 0
    assert resumed["line"]["loss"] == pytest.approx(written["line"]["loss"], rel=1e-6)
    assert furthest(resumed["after"], written["after"])[0] < (5e-5 if before != after else 1e-30)

"""Checkpoints: weights are the same bits in any layout, training goes on as if never stopped, half-written ones do not count."""

import pytest
import torch
from parallel.layouts import load_and_train, load_weights, train_and_save

from step_megatron.checkpoint.directory import CheckpointError, checkpoint_root, latest_checkpoint

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in expected)


def closeness(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(((actual[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)


@pytest.fixture(scope="module")
def saved_by_tp2_pp2(worker_pool, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("tp2pp2"))
    kwargs = {"transformer": TP2 | PP2, "optimizer": "adam", "ddp": {}, "steps": 2, "run_dir": run_dir}
    return run_dir, worker_pool(4).run(train_and_save, kwargs)[0]


@pytest.mark.parametrize(("processes", "transformer"), [(1, {}), (2, TP2), (2, PP2), (2, PP2 | VPP2)])
def test_weights_are_the_same_bits_in_another_layout(processes, transformer, worker_pool, saved_by_tp2_pp2):
    run_dir, written = saved_by_tp2_pp2
    kwargs = {"transformer": transformer, "directory": str(latest_checkpoint(run_dir))}
    assert same(worker_pool(processes).run(load_weights, kwargs)[0], written["saved"])


@pytest.mark.parametrize(
    ("processes", "transformer", "exact"),
    [(4, TP2 | PP2, True), (1, {}, False), (2, PP2, False), (2, TP2, False), (2, PP2 | VPP2, False), (2, CP2, False)],
)
def test_the_next_step_is_that_of_the_run_that_went_on(processes, transformer, exact, worker_pool, saved_by_tp2_pp2):
    run_dir, written = saved_by_tp2_pp2
    kwargs = {"transformer": transformer, "optimizer": "adam", "ddp": {}, "run_dir": run_dir}
    resumed = worker_pool(processes).run(load_and_train, kwargs)[0]
    assert same(resumed["saved"], written["saved"])
    assert resumed["extra"] == {"place": [2]}
    for name in ("loss", "loss/speech", "grad_norm", "learning_rate"):
        assert resumed["line"][name] == (written["line"][name] if exact else pytest.approx(written["line"][name], rel=1e-6))
    assert same(resumed["after"], written["after"]) if exact else closeness(resumed["after"], written["after"]) < 5e-5


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("steps", [0, 2])
def test_one_process_goes_on_bit_for_bit(steps, optimizer, worker_pool, tmp_path):
    kwargs = {"transformer": {}, "optimizer": optimizer, "ddp": {}, "run_dir": str(tmp_path)}
    written = worker_pool(1).run(train_and_save, kwargs | {"steps": steps})[0]
    resumed = worker_pool(1).run(load_and_train, kwargs)[0]
    assert same(resumed["after"], written["after"])


@pytest.mark.parametrize("ddp", [DISTRIBUTED, DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_distributed_optimizer_goes_on_and_changes_its_number_of_ranks(steps, ddp, worker_pool, tmp_path):
    kwargs = {"transformer": {}, "optimizer": "adam", "ddp": ddp, "run_dir": str(tmp_path)}
    written = worker_pool(2).run(train_and_save, kwargs | {"steps": steps})[0]
    resumed = worker_pool(2).run(load_and_train, kwargs)[0]
    assert same(resumed["after"], written["after"])
    alone = worker_pool(1).run(load_and_train, kwargs)[0]
    assert same(alone["saved"], written["saved"])
    assert closeness(alone["after"], written["after"]) < 5e-5


@pytest.mark.parametrize(("processes", "transformer"), [(4, {}), (4, TP2), (2, PP2), (2, CP2)])
def test_the_distributed_optimizer_moves_to_more_ranks_and_other_layouts(processes, transformer, worker_pool, by_dp2):
    run_dir, written = by_dp2
    kwargs = {"transformer": transformer, "optimizer": "adam", "ddp": DISTRIBUTED, "run_dir": run_dir}
    resumed = worker_pool(processes).run(load_and_train, kwargs)[0]
    assert same(resumed["saved"], written["saved"])
    assert closeness(resumed["after"], written["after"]) < 5e-5


@pytest.fixture(scope="module")
def by_dp2(worker_pool, tmp_path_factory):
    run_dir = str(tmp_path_factory.mktemp("dp2"))
    kwargs = {"transformer": {}, "optimizer": "adam", "ddp": DISTRIBUTED, "steps": 2, "run_dir": run_dir}
    return run_dir, worker_pool(2).run(train_and_save, kwargs)[0]


# Under PP2 this freezes all of the first stage: rank 0 has an optimizer without parameters.
FROZEN = ("adaptor.*", "*word_embeddings*", "*decoder.layers.[01].*")


@pytest.mark.parametrize(("transformer", "ddp"), [(TP2, {}), (PP2, {}), ({}, DISTRIBUTED)])
def test_frozen_layers_have_no_moments_to_save(transformer, ddp, worker_pool, tmp_path):
    kwargs = {"transformer": transformer, "optimizer": "adam", "ddp": ddp, "freeze": FROZEN, "run_dir": str(tmp_path)}
    written = worker_pool(2).run(train_and_save, kwargs | {"steps": 2})[0]
    resumed = worker_pool(2).run(load_and_train, kwargs)[0]
    assert same(resumed["after"], written["after"])
    alone = worker_pool(1).run(load_and_train, kwargs | {"transformer": {}})[0]
    assert closeness(alone["after"], written["after"]) < 5e-5


def test_a_frozen_stage_that_could_not_be_saved_is_refused_at_the_start(worker_pool, tmp_path):
    kwargs = {"transformer": PP2, "optimizer": "adam", "ddp": DISTRIBUTED, "freeze": FROZEN, "run_dir": str(tmp_path), "steps": 0}
    with pytest.raises(AssertionError, match="leaves a pipeline stage nothing to train"):
        worker_pool(2).run(train_and_save, kwargs)


def test_bfloat16_goes_on_bit_for_bit_from_its_float32_masters(worker_pool, tmp_path):
    kwargs = {"transformer": TP2 | {"bf16": True}, "optimizer": "adam", "ddp": {}, "run_dir": str(tmp_path)}
    written = worker_pool(2).run(train_and_save, kwargs | {"steps": 2})[0]
    resumed = worker_pool(2).run(load_and_train, kwargs)[0]
    assert written["after"]["adaptor.linear1.weight"].dtype == torch.bfloat16
    assert same(resumed["after"], written["after"])


def test_an_interrupted_save_leaves_the_newest_complete_checkpoint(saved_by_tp2_pp2):
    run_dir, _ = saved_by_tp2_pp2
    newest = latest_checkpoint(run_dir)
    (checkpoint_root(run_dir) / ".writing_step_00000009").mkdir()
    (checkpoint_root(run_dir) / ".writing_step_00000009" / "common.pt").write_bytes(b"half")
    assert latest_checkpoint(run_dir) == newest and newest.name == "step_00000002"


def test_a_directory_without_a_complete_checkpoint_is_refused(worker_pool, tmp_path):
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(AssertionError, match="is not whole: seal.json is missing, so it was not completed"):
        worker_pool(1).run(load_weights, {"transformer": {}, "directory": str(tmp_path)})


def test_a_pointer_to_a_checkpoint_that_is_gone_is_named(tmp_path):
    checkpoint_root(tmp_path).mkdir()
    (checkpoint_root(tmp_path) / "latest").write_text("step_00000005\n")
    with pytest.raises(CheckpointError, match="step_00000005, which does not exist"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("transformer", "message"),
    [
        ({"ffn_hidden_size": 128}, "does not fit this model"),
        ({"num_layers": 3}, "holds 4 layers, the model has 3"),
        ({"num_layers": 5}, "holds 4 layers, the model has 5"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(transformer, message, worker_pool, saved_by_tp2_pp2):
    run_dir, _ = saved_by_tp2_pp2
    kwargs = {"transformer": transformer, "directory": str(latest_checkpoint(run_dir))}
    with pytest.raises(AssertionError, match=message):
        worker_pool(1).run(load_weights, kwargs)

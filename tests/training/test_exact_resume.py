"""A run that is told to stop, whenever that is, and goes on, ends with the bits of a run that never stopped.

The layouts are those that have state of their own: moments cut over replicas, a loss scaler, steps that were out of order. Other
layouts' checkpoints are held to the bit in `checkpoint/test_checkpoint_layouts.py`, and by the long campaign of `survival`.
"""

import pytest
from training.survival import LAYOUTS, remains, run_rank

STEP = ("step_megatron.training.loop", "training_step")
SHORT = ("training.steps=8", "training.save_interval=3", "training.validation_interval=4", "training.keep_checkpoints=1")
STATEFUL = {name: LAYOUTS[name] for name in ("dp2-distributed-optimizer", "tp2-sp-fp16")} | {
    "tp2-anomaly": ("megatron.transformer.tensor_model_parallel_size=2", "training.anomaly.max_in_a_row=2"),
}


def outcome(run_dir, results) -> dict:
    return remains(run_dir) | {"hashes": [result["hash"] for result in results]}


@pytest.mark.parametrize("layout", STATEFUL)
def test_every_layout_goes_on_to_the_same_bits(layout, worker_pool, data, tmp_path):
    """The stop lies between two lines of metrics, two checkpoints and (with an anomaly) two steps that are out of order."""
    kwargs = {"data": data, "extra": (*STATEFUL[layout], *SHORT)}
    poison = (2, 7) if "anomaly" in layout else ()
    whole = worker_pool(2).run(run_rank, kwargs | {"run_dir": str(tmp_path / "whole"), "poison": poison})
    kwargs["run_dir"] = str(tmp_path / "stopped")
    stopped = worker_pool(2).run(run_rank, kwargs | {"signal_in": (*STEP, 5), "poison": poison})
    assert [result["steps"] for result in stopped] == [5, 5] and stopped[1]["interrupted"] == "SIGTERM"
    resumed = worker_pool(2).run(run_rank, kwargs | {"poison": tuple(turn - 5 for turn in poison)})
    assert outcome(tmp_path / "stopped", resumed) == outcome(tmp_path / "whole", whole)
    assert [line["anomalies"] for line in remains(tmp_path / "whole")["metrics"]][-1] == len(poison)
    assert whole[0]["hash"] != stopped[0]["hash"]


@pytest.fixture(scope="module")
def alone(worker_pool, data, tmp_path_factory) -> dict:
    """What a run of one process comes to when nobody tells it anything."""
    run_dir = tmp_path_factory.mktemp("alone")
    return outcome(run_dir, worker_pool(1).run(run_rank, {"data": data, "run_dir": str(run_dir), "extra": SHORT}))


@pytest.mark.parametrize(
    ("signal_in", "steps"),
    [
        (("step_megatron.training.stage", "build_state", 1), 1),
        ((*STEP, 1), 1),
        (("step_megatron.training.loop", "validation_loss", 1), 5),
        (("step_megatron.training.stage", "_save", 1), 4),
    ],
)
def test_a_signal_at_any_time_leaves_a_run_that_goes_on(signal_in, steps, worker_pool, data, alone, tmp_path):
    kwargs = {"data": data, "run_dir": str(tmp_path), "extra": SHORT}
    stopped = worker_pool(1).run(run_rank, kwargs | {"signal_in": signal_in})[0]
    assert (stopped["steps"], stopped["interrupted"]) == (steps, "SIGTERM")
    assert outcome(tmp_path, worker_pool(1).run(run_rank, kwargs)) == alone

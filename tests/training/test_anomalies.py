"""Steps out of order: which ones are, and what becomes of them; the same on all ranks."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training.survival import remains, run_rank
from training.toy_run import train, write_data

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import AnomalyConfig
from step_megatron.training.anomalies import AnomalyGuard
from step_megatron.training.exchange import StepFacts

SHORT = ("training.steps=8", "training.save_interval=2", "run.log_interval=1", "run.tensorboard=false")
DISTRIBUTED = ("megatron.ddp={use_distributed_optimizer: true, overlap_param_gather: true, overlap_grad_reduce: true}",)
TP2 = ("megatron.transformer.tensor_model_parallel_size=2",)


def facts(loss: float = 1.0, norm: float | None = 1.0) -> StepFacts:
    return StepFacts(torch.tensor([[loss, 1.0], [0.0, 0.0]], dtype=torch.float64), norm, 0)


def test_what_is_not_finite_is_out_of_order_and_an_overflow_only_at_the_smallest_loss_scale():
    guard = AnomalyGuard(AnomalyConfig())
    assert guard.examine(1, facts()) is None
    assert guard.examine(2, facts(loss=math.nan)) == "the loss is nan"
    assert guard.examine(3, facts(norm=math.inf)) == "the gradient norm is inf"
    assert guard.examine(4, facts(norm=None)) is None
    assert "smallest loss scale" in guard.examine(5, facts(norm=None), overflow_is_final=True)
    # No clip of the step could be read: no loss, and nothing wrong with the gradients.
    assert guard.examine(6, StepFacts(torch.zeros(2, 2, dtype=torch.float64), 0.0, 0)) is None
    assert guard.count == 3


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=40), st.integers(1, 9), st.floats(1.1, 5.0))
def test_a_norm_is_held_against_the_median_of_the_last_steps_in_order(norms, window, factor):
    guard, before = AnomalyGuard(AnomalyConfig(grad_norm_factor=factor, window=window)), []
    for step, norm in enumerate(norms, 1):
        known = before[-window:]
        large = 2 * len(known) >= window and norm > factor * statistics.median(known)
        assert (guard.examine(step, facts(norm=norm)) is not None) == large
        before += [] if large else [norm]
        restored = AnomalyGuard(guard.settings)
        restored.load_state_dict(json.loads(json.dumps(guard.state_dict())))
        guard = restored


def test_only_a_step_beyond_the_last_anomaly_ends_a_row():
    guard = AnomalyGuard(AnomalyConfig(max_in_a_row=2))
    guard.examine(5, facts(norm=math.nan))
    for step in (3, 4, 5):
        guard.examine(step, facts())
    assert guard.in_a_row == 1
    guard.examine(6, facts(norm=math.nan))
    assert guard.exhausted
    guard.examine(7, facts())
    assert guard.in_a_row == 0 and guard.count == 2


@pytest.mark.parametrize("setting", [{"loss_factor": 0.9}, {"grad_norm_factor": 1.0}, {"window": 0}, {"max_in_a_row": 0}])
def test_a_setting_without_sense_is_named(setting):
    with pytest.raises(ConfigError, match=rf"training.anomaly.{next(iter(setting))}="):
        AnomalyGuard(AnomalyConfig(**setting))


def trained_bits(rank, world_size, **kwargs):
    """Run; hashes of parameters and moments before and after every turn."""
    from unittest import mock

    from training.survival import state_hash

    from step_megatron.training import loop

    step, hashes = loop.training_step, []

    def step_between_hashes(trainer):
        hashes.append(state_hash(trainer, with_random=False))
        outcome = step(trainer)
        hashes.append(state_hash(trainer, with_random=False))
        return outcome

    with mock.patch.object(loop, "training_step", step_between_hashes):
        run_rank(rank, world_size, **kwargs)
    return hashes


@pytest.mark.parametrize("layout", ["tp2", "distributed"])
def test_a_step_is_left_out_to_the_bit_by_all_ranks(layout, worker_pool, data, tmp_path):
    extra = (*SHORT, *(TP2 if layout == "tp2" else DISTRIBUTED))
    for hashes in worker_pool(2).run(trained_bits, {"data": data, "run_dir": str(tmp_path), "extra": extra, "poison": (5,)}):
        changed = [before != after for before, after in zip(hashes[::2], hashes[1::2], strict=True)]
        # The last step's learning rate is 0.
        assert changed[:-1] == [True, True, True, True, False, True, True]
    lines = remains(tmp_path)["metrics"]
    assert [line["step"] for line in lines if line["skipped_updates"]] == [5] and "loss" not in lines[4]
    assert math.isnan(lines[4]["grad_norm"]) and [line["anomalies"] for line in lines] == [0] * 4 + [1] * 4


def test_going_back_leaves_out_the_batches_since_the_checkpoint(worker_pool, data, tmp_path):
    """Held against a run that never saw those batches."""
    kwargs = {"data": data, "extra": (*SHORT, *TP2, "training.save_interval=4", "training.anomaly.action=rewind")}
    back = worker_pool(2).run(run_rank, kwargs | {"run_dir": str(tmp_path / "back"), "poison": (6,)})
    never = worker_pool(2).run(run_rank, kwargs | {"run_dir": str(tmp_path / "never"), "drop": (5, 6)})
    assert [result["hash"] for result in back] == [result["hash"] for result in never]
    for line, reference in zip(remains(tmp_path / "back")["metrics"], remains(tmp_path / "never")["metrics"], strict=True):
        assert line == reference | {"anomalies": float(line["step"] > 4)}


def test_going_back_works_before_the_first_checkpoint_is_due(worker_pool, data, tmp_path):
    kwargs = {"data": data, "extra": (*SHORT, "training.save_interval=0", "training.anomaly.action=rewind")}
    back = worker_pool(1).run(run_rank, kwargs | {"run_dir": str(tmp_path / "back"), "poison": (2,)})[0]
    never = worker_pool(1).run(run_rank, kwargs | {"run_dir": str(tmp_path / "never"), "drop": (1, 2)})[0]
    assert back["hash"] == never["hash"]


@pytest.mark.parametrize(
    ("settings", "poison", "step"),
    [
        (("training.anomaly.action=stop",), (6,), 6),
        (("training.anomaly.max_in_a_row=2",), (3, 5, 6, 7), 6),
        # Turn 7 is step 5 again: no step beyond the one that was out of order has been in order.
        (("training.anomaly={action: rewind, max_in_a_row: 2}",), (6, 7), 5),
    ],
)
def test_the_run_stops_with_its_last_checkpoint(settings, poison, step, worker_pool, data, tmp_path):
    kwargs = {"data": data, "run_dir": str(tmp_path), "extra": (*SHORT, *TP2, *settings), "poison": poison}
    said = worker_pool(2).run(stopped_by_anomaly, kwargs)
    assert said[0] == said[1] and f"step {step} is out of order" in said[0] and "the gradient norm is nan" in said[0]
    assert "step-megatron train replay " in said[0]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    # The same command again comes to the same step.
    if step == 6 and len(poison) == 1:
        again = worker_pool(2).run(stopped_by_anomaly, kwargs | {"poison": (2,)})
        assert again == said


def stopped_by_anomaly(rank, world_size, **kwargs):
    from step_megatron.training.anomalies import TrainingAnomaly

    try:
        run_rank(rank, world_size, **kwargs)
    except TrainingAnomaly as error:
        return str(error)
    return "it went on"


def train_on_a_bad_clip(rank, world_size, *, clip: str, **kwargs):
    """From step 3 on the features of one clip are not numbers."""
    from unittest import mock

    from step_megatron.audio.encode_once import EncodedAudio

    fetch = EncodedAudio.fetch

    def fetch_bad(audio, addresses):
        clips = fetch(audio, addresses)
        if clip in clips and train_on_a_bad_clip.fetches >= 2:
            clips[clip].features.fill_(float("nan"))
        train_on_a_bad_clip.fetches += 1
        return clips

    train_on_a_bad_clip.fetches = 0
    with mock.patch.object(EncodedAudio, "fetch", fetch_bad):
        return train(rank, world_size, **kwargs)


def replay_on(rank, world_size, *, folder: str, overrides: tuple[str, ...] = ()):
    from step_megatron.training.replay import replay, table

    result = replay(Path(folder), overrides=overrides)
    return result, table(result)


def test_the_batch_is_replayed_in_any_layout_and_names_sample_and_parameter(worker_pool, tmp_path):
    data, run_dir = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_data(data)
    extra = ("audio.cache='off'", "training.save_interval=1", "training.validation_interval=0", *TP2)
    kwargs = {"data": str(data), "run_dir": str(run_dir), "extra": extra, "clip": "3.wav"}
    worker_pool(2).run(train_on_a_bad_clip, kwargs)
    folders = sorted((run_dir / "anomalies").iterdir())
    assert folders and not list(run_dir.rglob("*.pkl"))
    record = json.loads((folders[0] / "batch.json").read_text())
    assert record["number"] == 1 and record["seed"] == 3 and record["layout"] == {"tp": 2, "pp": 1, "cp": 1, "dp": 1}
    together = worker_pool(2).run(replay_on, {"folder": str(folders[0])})[0][0]
    alone, text = worker_pool(1).run(replay_on, {"folder": str(folders[0])})[0]
    for result in (together, alone):
        assert result["checkpoint"] == f"step_{record['step'] - 1:08d}" and math.isnan(result["loss"])
        assert {sample["id"] for sample in result["samples"] if not math.isfinite(sample["loss"])} == {"tone-3"}
        for sample in result["samples"]:
            assert sample["loss"] == pytest.approx(sample["then"], rel=1e-5, nan_ok=True), sample
        assert result["first_non_finite"] is not None
    assert alone["gradients"].keys() == together["gradients"].keys()
    assert "tone-3 (tones)" in text and f"not finite: {alone['first_non_finite']}" in text

"""Mid-training from a configuration: it learns, stops on a signal, and goes on as if it had never stopped."""

import json
from pathlib import Path

import pytest
from training.toy_run import encode_clips, train, write_data

from step_megatron.checkpoint.distributed import checkpoint_root, latest_checkpoint
from step_megatron.config import load_config
from step_megatron.runtime.metrics import MetricsWriter, read_metrics
from step_megatron.training import midtrain

# What depends on the clock or the machine, not on the training.
CLOCK = ("time", "per_second", "step_seconds", "memory")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("toy_data")
    write_data(folder)
    return str(folder)


@pytest.fixture(scope="module")
def uninterrupted(worker_pool, data, tmp_path_factory) -> tuple[Path, dict]:
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    return run_dir, worker_pool(1).run(train, {"data": data, "run_dir": str(run_dir)})[0]


def lines(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in read_metrics(run_dir)]


def test_a_run_leaves_its_record_and_learns(uninterrupted):
    run_dir, summary = uninterrupted
    assert summary["steps"] == 6 and summary["interrupted"] is None
    assert load_config(run_dir / "config.yaml").run.seed == 3
    assert json.loads((run_dir / "run.json").read_text())["versions"]["megatron-core"] == "0.16.1"
    first, *_, last = lines(run_dir)
    assert last["loss"] < 0.8 * first["loss"]
    assert {"loss/tones", "loss/sums", "learning_rate", "grad_norm", "padding_share", "mfu"} <= first.keys()
    assert [line["step"] for line in lines(run_dir) if "validation_loss" in line] == [3, 6]
    assert summary["validation_loss"] == last["validation_loss"] == last["validation_loss/held out"]


def test_only_the_newest_checkpoints_stay(worker_pool, data, tmp_path):
    extra = ("training.save_interval=2", "training.keep_checkpoints=2")
    copy = checkpoint_root(tmp_path) / "step_00000001_best"
    copy.mkdir(parents=True)
    worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path), "extra": extra})
    assert sorted(path.name for path in checkpoint_root(tmp_path).glob("step_*")) == [copy.name, "step_00000004", "step_00000006"]
    assert latest_checkpoint(tmp_path).name == "step_00000006"


def test_a_run_that_was_told_to_stop_goes_on_with_the_same_numbers(worker_pool, data, uninterrupted, tmp_path):
    stopped = worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path), "signal_at": 2})[0]
    assert stopped["steps"] == 2 and stopped["interrupted"] == "SIGTERM" and Path(stopped["checkpoint"]).name == "step_00000002"
    finished = worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path)})[0]
    assert finished["steps"] == 6
    assert lines(tmp_path) == lines(uninterrupted[0])


def test_a_signal_to_one_rank_stops_all_and_another_layout_goes_on(worker_pool, data, uninterrupted, tmp_path):
    tp2 = ("megatron.transformer.tensor_model_parallel_size=2",)
    stopped = worker_pool(2).run(train, {"data": data, "run_dir": str(tmp_path), "signal_at": 2, "extra": tp2})
    assert [result["steps"] for result in stopped] == [2, 2]
    assert worker_pool(2).run(train, {"data": data, "run_dir": str(tmp_path)})[0]["steps"] == 6
    for line, reference in zip(lines(tmp_path), lines(uninterrupted[0]), strict=True):
        assert line["loss"] == pytest.approx(reference["loss"], rel=1e-3)


def test_encoding_ahead_leaves_nothing_to_encode(worker_pool, data, uninterrupted, tmp_path):
    extra = ("audio.cache='on'", f"audio.cache_dir={tmp_path}/cache")
    assert worker_pool(2).run(encode_clips, {"data": data, "run_dir": str(tmp_path), "extra": extra}) == [18, 18]
    assert worker_pool(1).run(encode_clips, {"data": data, "run_dir": str(tmp_path), "extra": extra}) == [0]
    streamed = ("audio.cache='off'",)
    for name, settings in (("cached", extra), ("streamed", streamed)):
        worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path / name), "extra": settings})
        assert lines(tmp_path / name) == lines(uninterrupted[0]), name


def test_a_finished_run_is_left_alone(worker_pool, data, uninterrupted):
    run_dir, _ = uninterrupted
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = worker_pool(1).run(train, {"data": data, "run_dir": str(run_dir)})[0]
    assert again["steps"] == 6 and (run_dir / "metrics.jsonl").read_bytes() == before


def test_metrics_are_closed_whatever_ends_the_run(data, uninterrupted, tmp_path, monkeypatch):
    def failing(trainer):
        raise OSError("no space left")

    closed = []
    monkeypatch.setattr(MetricsWriter, "close", lambda writer: closed.append(writer))
    monkeypatch.setattr(midtrain, "train", failing)
    with pytest.raises(OSError, match="no space left"):
        train(0, 1, data=data, run_dir=str(tmp_path))
    train(0, 1, data=data, run_dir=str(uninterrupted[0]))
    assert len(closed) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("data.sources=[]",), "data.sources is empty"),
        (("tokenizer.path=''",), "tokenizer.path is not set"),
        (("model.vocabulary_size=256",), "model.vocabulary_size=256 is smaller than"),
        (("megatron.optimizer.lr=null",), "megatron.optimizer.lr is not set"),
        (("megatron.ddp={bucket_sise: 1}",), "did you mean megatron.ddp.bucket_size"),
    ],
)
def test_a_bad_setting_is_named(extra, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(0, 1, data=data, run_dir=str(tmp_path), extra=extra)

"""Mid-training from a configuration: it learns, stops on a signal, and goes on as if it had never stopped."""

import errno
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from training.toy_run import encode_clips, overrides, train, write_data

from step_megatron.audio.index import AudioIndex
from step_megatron.checkpoint import saving
from step_megatron.checkpoint.directory import CheckpointError, checkpoint_root, latest_checkpoint, steps_in
from step_megatron.config import ConfigError, load_config
from step_megatron.runtime.device import initialize, shutdown
from step_megatron.runtime.metrics import MetricsWriter, read_metrics
from step_megatron.training import stage
from step_megatron.training.encoding import passes_over
from step_megatron.training.record import check_record

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


def operations(run_dir: Path) -> list[float]:
    return [line["model_flops_per_second"] * line["step_seconds"] for line in read_metrics(run_dir)]


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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_starts_from_the_weights_of_another_with_a_new_optimizer(processes, worker_pool, data, uninterrupted, tmp_path):
    """Nothing is learnt at a learning rate of 0, so what is measured is what the other run measured at its end."""
    run_dir, summary = uninterrupted
    extra = [f"model.weights={run_dir}", "megatron.optimizer.lr=0.0", "training.steps=1", "training.lr_warmup_steps=0"]
    extra.append(f"megatron.transformer.tensor_model_parallel_size={processes}")
    started = worker_pool(processes).run(train, {"data": data, "run_dir": str(tmp_path), "extra": tuple(extra)})[0]
    assert started["validation_loss"] == pytest.approx(summary["validation_loss"], rel=0 if processes == 1 else 1e-6)
    # Its first step is a first step: it goes through the data, and counts, from the beginning.
    (line,) = lines(tmp_path)
    assert line["step"] == 1 and line["padding_share"] == lines(run_dir)[0]["padding_share"]


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


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(worker_pool, data, uninterrupted, tmp_path):
    kwargs = {"data": data, "run_dir": str(tmp_path), "extra": ("training.save_interval=2",)}
    stopped = worker_pool(1).run(train, kwargs | {"signal_at": 4})[0]
    file = max(Path(stopped["checkpoint"]).glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    assert worker_pool(1).run(train, kwargs)[0]["steps"] == 6
    assert (checkpoint_root(tmp_path) / "damaged_step_00000004" / file.name).is_file()
    assert lines(tmp_path) == lines(uninterrupted[0])


@pytest.mark.parametrize("failing", [("step_00000004",), ("step_00000004", "step_00000006")])
def test_a_failed_save_ends_a_run_only_if_it_was_the_last(failing, data, tmp_path, monkeypatch):
    write = saving.write_items

    def full(directory, *arguments):
        if any(name in directory.name for name in failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(directory, *arguments)

    monkeypatch.setattr(saving, "write_items", full)
    kwargs = {"data": data, "run_dir": str(tmp_path), "extra": ("training.save_interval=2",)}
    if len(failing) == 1:
        assert Path(train(0, 1, **kwargs)["checkpoint"]).name == "step_00000006"
    else:
        with pytest.raises(CheckpointError, match="step_00000006 could not be saved: rank 0: No space left.*free some space"):
            train(0, 1, **kwargs)
        assert latest_checkpoint(tmp_path).name == "step_00000002"
    assert not list(checkpoint_root(tmp_path).glob(".*"))


def test_the_checkpoint_with_the_lowest_validation_loss_stays(worker_pool, data, tmp_path):
    """The loss falls, but for what is measured at 6: there a learning rate beyond reason has spoilt the model."""
    kwargs = {"data": data, "run_dir": str(tmp_path)}
    kept = ("training.save_interval=1", "training.validation_interval=3", "training.keep_checkpoints=1")
    kept += ("training.keep_best_checkpoint=true", "training.keep_checkpoint_every=4")
    worker_pool(1).run(train, kwargs | {"extra": (*kept, "training.steps=3")})
    spoilt = ("training.steps=6", "megatron.optimizer.lr=10.0", "training.lr_schedule=constant")
    worker_pool(1).run(train, kwargs | {"extra": (*kept, *spoilt)})
    losses = {line["step"]: line["validation_loss"] for line in lines(tmp_path) if "validation_loss" in line}
    assert losses[3] < losses[6]
    assert list(steps_in(checkpoint_root(tmp_path))) == [3, 4, 6]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_lines_cover_the_steps_before_a_stop_too(stop, worker_pool, data, tmp_path):
    extra = ("run.log_interval=4", "training.validation_interval=0")
    for name, signal_at in (("whole", 0), ("stopped", stop)):
        worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path / name), "signal_at": signal_at, "extra": extra})
    worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path / "stopped"), "extra": extra})
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [4, 6]
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_a_longer_run_follows_the_schedule_of_its_own_settings(worker_pool, data, uninterrupted, tmp_path):
    """Six more steps after the end, at another learning rate: those of a run that has twelve from the start."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run_dir)
    extra = ("training.steps=12", "megatron.optimizer.lr=5e-3")
    assert worker_pool(1).run(train, {"data": data, "run_dir": str(run_dir), "extra": extra})[0]["steps"] == 12
    rates = {line["step"]: line["learning_rate"] for line in lines(run_dir)}
    for step in range(7, 13):
        assert rates[step] == pytest.approx(5e-3 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2, abs=1e-12), step
    assert rates[6] == 0.0 and load_config(run_dir / "config.yaml").training.steps == 12


@pytest.mark.parametrize(
    "setting",
    [
        "model.rotary_base=500.0",
        "adaptor.width=32",
        "encoder.layers=2",
        "tokenizer.template=chatml",
        "megatron.transformer.layernorm_epsilon=1e-3",
    ],
)
def test_a_run_does_not_go_on_with_another_model(setting, data, uninterrupted):
    config = load_config(None, [*overrides(data, str(uninterrupted[0])), setting])
    with pytest.raises(
        ConfigError, match=rf"{setting.partition('=')[0]} is .*, but this run was made with .*restore the setting"
    ):
        check_record(config, SimpleNamespace(rank=0, tp_size=1, pp_size=1, cp_size=1, dp_size=1))


def test_what_a_resumed_run_changes_is_named(data, uninterrupted, caplog):
    config = load_config(None, [*overrides(data, str(uninterrupted[0])), "training.steps=8", "model.layers=torch"])
    check_record(config, SimpleNamespace(rank=0, tp_size=1, pp_size=1, cp_size=1, dp_size=1))
    assert sorted(record.message for record in caplog.records if record.levelname == "WARNING") == [
        "going on with model.layers='torch', it was 'auto' until now",
        "going on with training.steps=8, it was 6 until now",
    ]


def test_encoding_ahead_leaves_nothing_to_encode(worker_pool, data, uninterrupted, tmp_path):
    extra = ("audio.cache='on'", f"audio.cache_dir={tmp_path}/cache")
    assert worker_pool(2).run(encode_clips, {"data": data, "run_dir": str(tmp_path), "extra": extra}) == [(18, 0), (18, 0)]
    assert worker_pool(1).run(encode_clips, {"data": data, "run_dir": str(tmp_path), "extra": extra}) == [(0, 0)]
    streamed = ("audio.cache='off'",)
    for name, settings in (("cached", extra), ("streamed", streamed)):
        worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path / name), "extra": settings})
        assert lines(tmp_path / name) == lines(uninterrupted[0]), name
    # What is encoded inside the step is work of the step, whichever rank does it.
    tp2 = (*streamed, "megatron.transformer.tensor_model_parallel_size=2")
    worker_pool(2).run(train, {"data": data, "run_dir": str(tmp_path / "tp2"), "extra": tp2})
    cached, alone, shared = (operations(tmp_path / name) for name in ("cached", "streamed", "tp2"))
    assert shared == pytest.approx(alone, rel=1e-9) and all(more > fewer for more, fewer in zip(alone, cached, strict=True))


def test_a_finished_run_is_left_alone(worker_pool, data, uninterrupted):
    run_dir, _ = uninterrupted
    files = [run_dir / name for name in ("metrics.jsonl", "config.yaml", "run.json")]
    before = [file.read_bytes() for file in files]
    extra = ("training.steps=5", "megatron.optimizer.lr=3e-3")
    again = worker_pool(1).run(train, {"data": data, "run_dir": str(run_dir), "extra": extra})[0]
    assert again["steps"] == 6 and [file.read_bytes() for file in files] == before


def test_text_alone_needs_no_encoder(worker_pool, data, tmp_path):
    text = (f"data.sources=[{{name: sums, path: {data}/sums.jsonl}}]", "data.validation=[]", "encoder.weights=''")
    assert worker_pool(1).run(train, {"data": data, "run_dir": str(tmp_path), "extra": text})[0]["steps"] == 6


def test_metrics_are_closed_whatever_ends_the_run(data, uninterrupted, tmp_path, monkeypatch):
    def failing(trainer):
        raise OSError("no space left")

    closed = []
    monkeypatch.setattr(MetricsWriter, "close", lambda writer: closed.append(writer))
    monkeypatch.setattr(stage, "train", failing)
    with pytest.raises(OSError, match="no space left"):
        train(0, 1, data=data, run_dir=str(tmp_path))
    train(0, 1, data=data, run_dir=str(uninterrupted[0]))
    assert len(closed) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("data.sources=[]",), "data.sources is empty"),
        (("encoder.weights=''",), "encoder.weights is not set; give a folder"),
        (("tokenizer.path=''",), "tokenizer.path is not set"),
        (("model.vocabulary_size=256",), "model.vocabulary_size=256 is smaller than"),
        (("megatron.optimizer.lr=null",), "megatron.optimizer.lr is not set"),
        (("megatron.ddp={bucket_sise: 1}",), "did you mean megatron.ddp.bucket_size"),
    ],
)
def test_a_bad_setting_is_named(extra, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(0, 1, data=data, run_dir=str(tmp_path), extra=extra)


def test_passes_count_what_is_heard_not_what_is_read(data, tmp_path):
    """`audio.cache=auto` follows them: text-only rows, however many, do not make a run of many epochs look like one pass."""
    config = load_config(None, [*overrides(data, str(tmp_path)), "training.steps=100", "training.validation_interval=0"])
    runtime = initialize(config)
    try:
        tokenizer, index = stage.load_tokenizer(config), AudioIndex.load(data)
        loader, validation = stage._loaders(config, tokenizer, index, runtime)
        heard = sum(len({span.address for span in batch.audio}) for batch in loader.next_step())
        loader, _ = stage._loaders(config, tokenizer, index, runtime)
        assert passes_over(config, loader, validation) == pytest.approx(heard * 100 / 12)
        config.training.validation_interval = 1
        assert passes_over(config, loader, validation) >= 100
    finally:
        shutdown()

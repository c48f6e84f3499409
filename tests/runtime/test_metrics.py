"""Metrics: what the files hold, resumption, values that are not finite, ranks, the optional Weights & Biases."""

import json
import math
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from step_megatron.config.schema import Config, RunConfig
from step_megatron.runtime.metrics import MetricsWriter, peak_memory_bytes, read_metrics


def quiet(**settings):
    return Config(run=RunConfig(**({"tensorboard": False} | settings)))


def scalars(run_dir, name):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_jsonl_and_tensorboard_hold_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path, quiet(tensorboard=True)) as writer:
        writer.write(1, {"loss": 2.5, "learning_rate": 1e-3})
        writer.write(2, {"loss": torch.tensor(2.25), "mfu": None})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == 2.5 and lines[0]["learning_rate"] == 1e-3
    assert lines[1]["mfu"] is None and lines[1]["time"] > 1.6e9
    assert scalars(tmp_path, "loss") == [(1, 2.5), (2, 2.25)]


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path, quiet())
    writer.write(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    writer.close()
    writer.close()


def test_values_that_are_not_finite_stay_strict_json_and_come_back(tmp_path):
    with MetricsWriter(tmp_path, quiet()) as writer:
        writer.write(1, {"loss": math.nan, "gradient_norm": math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    line = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(line["loss"]) and line["gradient_norm"] == math.inf


def test_resuming_drops_the_lines_after_the_checkpoint_and_a_new_run_drops_all(tmp_path):
    with MetricsWriter(tmp_path, quiet(tensorboard=True)) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step), "mfu": None, "norm": math.nan})
    with MetricsWriter(tmp_path, quiet(tensorboard=True), resume_step=2) as writer:
        writer.write(3, {"loss": 30.0})
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[0]["mfu"] is None and math.isnan(lines[0]["norm"])
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    MetricsWriter(tmp_path, quiet()).close()
    assert read_metrics(tmp_path) == []


def test_a_line_cut_off_by_a_kill_is_left_out_but_damage_elsewhere_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1]
    path.write_text('{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not JSON"):
        read_metrics(path)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with MetricsWriter(tmp_path / "run", quiet(tensorboard=True)) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_wandb_missing_is_said_with_the_remedy_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"step-megatron\[wandb\]"):
        MetricsWriter(tmp_path, quiet(wandb_project="speech"))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb: what runs it was asked for, and what they logged."""
    seen = types.SimpleNamespace(started=[], logged=[])

    class Run:
        def __init__(self, id):
            self.id = id

        def log(self, values, step):
            seen.logged.append((step, values))

        def finish(self):
            seen.logged.append("finished")

    def init(**settings):
        seen.started.append(settings)
        return Run(settings["id"] or f"made-{len(seen.started)}")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return seen


def test_wandb_gets_the_known_numbers_and_the_config(tmp_path, wandb):
    with MetricsWriter(tmp_path, quiet(wandb_project="speech")) as writer:
        writer.write(5, {"loss": 1.5, "mfu": None})
    assert wandb.logged == [(5, {"loss": 1.5}), "finished"]
    (started,) = wandb.started
    assert started["project"] == "speech" and started["config"]["run"]["seed"] == Config().run.seed


def test_a_resumed_run_goes_on_at_wandb_and_a_new_one_does_not(tmp_path, wandb):
    for resume_step in (0, 10, 20, 0, 10):
        MetricsWriter(tmp_path, quiet(wandb_project="speech"), resume_step).close()
    assert [started["id"] for started in wandb.started] == [None, "made-1", "made-1", None, "made-4"]
    assert all(started["resume"] == "allow" for started in wandb.started)


def test_peak_memory_of_a_cpu_counts_what_was_touched():
    before = peak_memory_bytes(torch.device("cpu"))
    block = torch.ones(before // 4 + 2**24)
    assert peak_memory_bytes(torch.device("cpu")) >= before + 2**25
    assert before > 2**20 and block.numel()

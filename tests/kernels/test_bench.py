"""The bench of the ops: contestants must agree, the absent are said, the tightest comparison is reported, all is written."""

import contextlib
import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from step_kernels import bench, registry
from step_kernels.bench import attention, paged, report, segment_ops
from step_kernels.bench.contestants import backend, compiled, library, ours
from step_kernels.bench.harness import Absent, Case, Contestant, extra_bytes, measure, percentiles

CPU = torch.device("cpu")


@pytest.fixture
def takes(monkeypatch):
    """`takes(seconds, result)` prepares work of that duration, by a clock of its own: a busy machine changes nothing."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("step_kernels.bench.harness.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def prepare(seconds: float = 0.001, result: float = 1.0):
        def work():
            clock.now += seconds
            return torch.tensor([result])

        return lambda: work

    return prepare


def absent(reason: str):
    def prepare():
        raise Absent(reason)

    return prepare


def test_ratios_are_formed_within_rounds_and_the_absent_say_why(takes):
    contestants = [Contestant("ours", takes(0.01)), Contestant("slow", takes(0.03), 2.0), Contestant("gone", absent("no GPU"))]
    measured = measure(Case("op", "shape", contestants), 3, CPU)
    assert all(ratio == pytest.approx(3) for ratio in measured.ratios("slow")) and measured.absent == {"gone": "no GPU"}
    text = report.table(measured)
    assert "at least 2 wanted" in text and "no GPU" in text and text.startswith("op  shape")


def test_contestants_that_disagree_are_not_compared(takes):
    for wrong in (1.01, math.nan):
        contestants = [Contestant("ours", takes()), Contestant("other", takes(result=wrong))]
        with pytest.raises(RuntimeError, match="result 0 of other differs from that of ours"):
            measure(Case("op", "shape", contestants), 1, CPU)


def test_the_tightest_comparison_is_the_result(takes):
    contestants = [Contestant("ours", takes(0.004)), Contestant("near", takes(0.008), 1.9), Contestant("far", takes(0.02), 2.0)]
    result = report.summary("op", [measure(Case("op", "s", contestants), 3, CPU)], CPU)
    assert result["peer"] == "near" and result["limit"] == 1.9 and result["low"] <= result["ratio"] <= result["high"]
    assert json.loads(json.dumps(result))["name"] == "op" and len(result["comparisons"]) == 2
    missed = [Contestant("ours", takes(0.004)), Contestant("fast", takes(0.002), 1.0)]
    assert not report.summary("op", [measure(Case("op", "s", missed), 2, CPU)], CPU)["ok"]


def test_without_ours_nothing_is_timed_and_nothing_is_claimed(takes):
    measured = measure(Case("op", "s", [Contestant("ours", absent("not built")), Contestant("eager", takes(), 2.0)]), 2, CPU)
    result = report.summary("op", [measured], CPU)
    assert not result["ok"] and result["ratio"] is None and result["absent"] == {"s": {"ours": "not built"}}
    assert "not timed" in report.table(measured)


def test_extra_memory_is_the_peak_above_what_was_held_without_the_results():
    held = torch.ones(8 << 20)

    def work():
        scratch = held + 1
        return scratch * 2

    assert 28 << 20 < extra_bytes(work, CPU) < 40 << 20  # one of the two 32 MiB tensors is the result


def test_a_contestant_may_use_its_own_layout(takes):
    padded = Contestant("padded", lambda: lambda: torch.tensor([[1.0, 0.0]]), comparable=lambda x: x[:, 0])
    assert not measure(Case("op", "s", [Contestant("ours", takes()), padded]), 1, CPU).absent


def test_a_contestant_runs_within_what_it_asks_for_and_entering_is_not_timed(takes):
    inside = []

    @contextlib.contextmanager
    def surroundings():
        takes(seconds=1.0)()()
        inside.append(True)
        yield
        inside.pop()

    def prepare():
        assert inside
        run = takes(seconds=0.01)()
        return lambda: run() if inside else pytest.fail("run outside")

    measured = measure(Case("op", "s", [Contestant("ours", prepare, within=surroundings), Contestant("other", takes())]), 2, CPU)
    assert not inside and measured.seconds["ours"] == pytest.approx([0.01, 0.01])


def test_percentiles():
    assert percentiles([5.0]) == (5.0, 5.0, 5.0)
    assert percentiles([0.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx((0.8, 2.0, 3.2))


def test_csv_and_plot(tmp_path, monkeypatch, takes):
    measured = [measure(Case("op", "shape", [Contestant("ours", takes(0.001)), Contestant("eager", takes(0.002))]), 3, CPU)]
    report.write_csv(tmp_path / "op.csv", measured, CPU)
    rows = list(csv.DictReader((tmp_path / "op.csv").open()))
    assert tuple(rows[0]) == report.COLUMNS and [row["backend"] for row in rows] == ["ours", "eager"]
    assert all(float(row["p20"]) <= float(row["p50"]) <= float(row["p80"]) for row in rows)
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in report.plot(tmp_path / "op.png", measured, CPU)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert report.plot(tmp_path / "op.png", measured, CPU) == ""
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")


def fails():
    raise RuntimeError("no kernel for this device")


def test_backends_of_ours_and_libraries(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert [each.name for each in ours("pool_norm_downsample", lambda: None, CPU)] == ["ours (cpp)"]
    monkeypatch.setitem(registry._ops, "nothing_fast", {})
    (contestant,) = ours("nothing_fast", lambda: None, CPU)
    with pytest.raises(Absent, match="no backend but torch"):
        contestant.prepare()
    with pytest.raises(Absent, match="flash kernels run on cuda tensors"):
        backend("flash-attn", "audio_attention_varlen", "flash", lambda: None, CPU).prepare()
    with pytest.raises(Absent, match="fails: no kernel for this device"):
        backend("plain", "audio_attention_varlen", "torch", fails, CPU).prepare()
    with pytest.raises(Absent, match="GPU only"):
        library("flash-attn", "flash_attn", lambda: None, CPU).prepare()
    with pytest.raises(Absent, match="is not installed"):
        library("flash-attn", "no_such_module", lambda: None, torch.device("cuda")).prepare()


def test_a_compiler_that_fails_is_an_absent_contestant(monkeypatch):
    def broken(function, **how):
        def work(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no g++"), None)

        return work

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(Absent, match="torch.compile"):
        compiled(lambda x: x, (torch.ones(1),), 1.0).prepare()


@pytest.mark.parametrize("module, op", [(segment_ops, "gae"), (paged, "paged-attention"), (attention, "audio-attention")])
def test_contestants_of_the_real_cases_agree(module, op, monkeypatch):
    """The smallest case of each kind, without what compiles."""
    monkeypatch.delenv("TRITON_INTERPRET")
    case = min(module.CASES[op](CPU), key=lambda case: ("backward" in case.shape, "Asterisk" in case.shape))
    contestants = [each for each in case.contestants if each.name not in ("torch.compile", "flex_attention")]
    measured = measure(Case(case.op, case.shape, contestants, case.tolerance), 1, CPU)
    assert measured.ours == "ours (cpp)" and len(measured.seconds) >= 2 and all(measured.seconds.values())


def test_every_op_has_cases():
    import importlib

    for op, module in bench.OPS.items():
        assert op in importlib.import_module(f"step_kernels.bench.{module}").CASES

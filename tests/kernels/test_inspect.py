"""Every GPU kernel compiles for Hopper within its budget; what gets worse is found. Nothing here runs on a GPU."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
from step_kernels import aot, inspect, toolkit

KEYS = {"registers", "spill_bytes", "shared_bytes", "hgmma", "qgmma", "ldg128_share", "flops", "bytes", "budget_ok"}
KEYS |= {"name", "shape", "arch", "floor_us"}
SOURCES = sorted(aot.CUDA_SOURCES.glob("*.cu"))


def inspected(*arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The command, in a process of its own: Triton decides at import whether it interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "step_kernels.inspect", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hopper() -> tuple[subprocess.CompletedProcess, list[dict]]:
    return inspected()


def test_every_kernel_keeps_to_its_budget_on_hopper(hopper):
    done, records = hopper
    assert done.returncode == 0, f"{done.stderr}\nworse on purpose, or better? python -m step_kernels.inspect --write-budget"
    assert records and all(record["budget_ok"] and set(record) == KEYS for record in records)
    assert all(record["arch"] == "sm_90a" and not record["spill_bytes"] for record in records)


def test_every_op_with_a_gpu_backend_is_inspected(hopper):
    from step_kernels import registered

    seen = {record["name"].partition(".")[0] for record in hopper[1]}
    wanted = {op for op, backends in registered().items() if {"cuda", "triton"} & set(backends)}
    assert wanted <= seen, f"{sorted(wanted - seen)}: state their kernels in aot_kernels() or cuda_kernels()"


def test_the_budget_allows_no_spilling_on_hopper_and_has_no_stale_lines(hopper):
    budget = {name: limits for name, limits in inspect.read_budget().items() if name.endswith("| sm_90a")}
    assert not any(limits["spill_bytes"] for limits in budget.values())
    assert set(budget) == {inspect.key(record) for record in hopper[1]}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_every_kernel_keeps_to_its_budget_on_other_architectures(arch):
    done, records = inspected("--arch", arch)
    assert done.returncode == 0 and records, done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_cuda_kernel_is_inspected(source):
    stated = [kernel.compile.args for kernel in inspect.kernels() if kernel.compile.func is inspect._cuda_code]
    entries = {entry for path, entry, _ in stated if path == source}
    for name in aot.compile_cuda(source, "sm_90a"):
        assert sum(entry in name for entry in entries) == 1, name


GOOD = {
    "registers": 64,
    "spill_bytes": 0,
    "shared_bytes": 512,
    "hgmma": 4,
    "qgmma": 0,
    "ldg128_share": 0.9,
    "flops": 10,
    "bytes": 20,
}


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("registers", 65),
        ("spill_bytes", 4),
        ("shared_bytes", 513),
        ("hgmma", 3),
        ("qgmma", -1),
        ("ldg128_share", 0.89),
        ("flops", 11),
        ("bytes", 21),
    ],
)
def test_every_figure_that_gets_worse_is_said(figure, value):
    assert inspect.worse(GOOD, GOOD) == []
    (said,) = inspect.worse(GOOD | {figure: value}, GOOD)
    assert figure in said and str(value) in said


def test_better_is_no_complaint_and_no_budget_is_one():
    better = GOOD | {"registers": 1, "hgmma": 9, "ldg128_share": 1.0}
    assert inspect.worse(better, GOOD) == [] and inspect.worse(GOOD, None) == ["no budget"]


def damaged(folder, source: str, old: str, new: str):
    """A copy of a CUDA source with one thing changed."""
    text = (aot.CUDA_SOURCES / source).read_text()
    assert old in text
    (folder / source).write_text(text.replace(old, new))
    return folder / source


@pytest.mark.parametrize(
    ("old", "new", "figure"),
    [
        ("__launch_bounds__(32 * kWarps)", "__launch_bounds__(32 * kWarps, 16)", "spill_bytes"),
        ("load_vector(first + column)", "load_one_by_one(first + column)", "ldg128_share"),
    ],
)
def test_a_kernel_made_worse_is_over_its_budget(tmp_path, old, new, figure):
    source = damaged(tmp_path, "pool_norm_downsample.cu", old, new)
    slow = """template <class T>
__device__ inline Vector<T> load_one_by_one(const T* from) {
  Vector<T> vector;
  for (int i = 0; i < Vector<T>::kSize; i++) vector.values[i] = static_cast<const volatile T*>(from)[i];
  return vector;
}
constexpr int kWarps"""
    source.write_text(source.read_text().replace("constexpr int kWarps", slow, 1))
    entry, shape = "pool_norm_warpIfLi10E", "8192 x 1280 fp32"
    (kernel,) = (each for each in inspect.kernels() if each.name == "pool_norm_downsample.pool_norm_warp" and each.shape == shape)
    bad = inspect.Kernel(kernel.name, shape, partial(inspect._cuda_code, source, entry, 0), kernel.flops, kernel.bytes)
    budget = inspect.read_budget()
    assert inspect.inspect(kernel, "sm_90a", budget)["budget_ok"]
    record = inspect.inspect(bad, "sm_90a", budget)
    assert not record["budget_ok"]
    assert any(said.startswith(figure) for said in inspect.worse(record, budget[inspect.key(record)]))


def test_the_command_fails_where_a_budget_is_exceeded(monkeypatch, capsys):
    tight = {name: limits | {"registers": 1} for name, limits in inspect.read_budget().items()}
    monkeypatch.setattr(inspect, "read_budget", lambda: tight)
    monkeypatch.setattr(inspect, "_triton", lambda module: iter(()))
    assert inspect.run() == 1
    said = capsys.readouterr()
    assert "OVER" in said.out and "not run on a GPU" in said.out and "budget 1" in said.err


def test_a_new_budget_replaces_that_of_its_architecture_only(tmp_path):
    path = tmp_path / "budget.json"
    record = GOOD | {"name": "op.kernel", "shape": "1 x 2", "arch": "sm_90a"}
    inspect.write_budget([record, record | {"arch": "sm_80"}], path)
    inspect.write_budget([record | {"shape": "3 x 4"}], path)
    assert set(inspect.read_budget(path)) == {"op.kernel | 3 x 4 | sm_90a", "op.kernel | 1 x 2 | sm_80"}


def test_instructions_are_counted_from_the_assembly():
    assembly = """
//--------------------- .text.first                --------------------------
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0040*/              @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
//--------------------- .text.second               --------------------------
        /*0000*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;
"""
    functions = aot.operations_by_function(assembly)
    assert aot.count(functions["first"]) == {"hgmma": 1, "qgmma": 0, "matrix": 1, "ldg128_share": 0.75}
    assert aot.count(functions["second"]) == {"hgmma": 0, "qgmma": 1, "matrix": 1, "ldg128_share": 1.0}


def test_the_floor_is_of_bytes_or_of_operations():
    code = aot.Code(registers=1, spill_bytes=0, shared_bytes=0, hgmma=1, qgmma=0, matrix=1, ldg128_share=1.0)
    kernel = inspect.Kernel("op.kernel", "", partial(lambda arch: code), flops=989_400_000, bytes=3_350_000)
    assert inspect.inspect(kernel, "sm_90a", {})["floor_us"] == 1.0
    kernel = inspect.Kernel("op.kernel", "", partial(lambda arch: code), flops=0, bytes=33_500_000)
    assert inspect.inspect(kernel, "sm_90a", {})["floor_us"] == 10.0


def test_without_nvcc_it_fails_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install 'nvidia-cuda-nvcc==13.0"):
        aot.compile_cuda.__wrapped__(SOURCES[0], "sm_90a")


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="sm_70 is not an architecture"):
        inspect.run(["sm_70"])

"""The emulation finds what is wrong in a CUDA kernel: sources with one fault each, made from the real ones, must not pass."""

import ctypes
from pathlib import Path

import pytest
import torch
from step_kernels import toolkit
from step_kernels.gae import gae_varlen_reference
from step_kernels.pool_norm_downsample import pool_norm_downsample_reference
from step_kernels.segments import cumulative
from support.cuda_emulation import CUDA, EmulationError, compile_kernel, launch
from support.kernel_checks import assert_as_good_as_plain


def pool_norm(source: Path, width: int = 1288, **how) -> None:
    """Run the op's kernel and hold it against the definition; a width beyond 1,280 takes the kernel with barriers."""
    generator = torch.Generator().manual_seed(0)
    hidden, (weight, bias) = torch.randn(11, width, generator=generator), torch.randn(2, width, generator=generator)
    source_row, out = torch.tensor([0, 2, 5, 7, 9], dtype=torch.int32), torch.empty(5, width)
    launch(source, "step_pool_norm_downsample", ctypes.c_int(0), hidden, source_row, weight, bias, out, 5, width, 1e-5, **how)
    arguments = hidden, cumulative([5, 6]), weight, bias
    exact = pool_norm_downsample_reference(*(x.double() if x.is_floating_point() else x for x in arguments), 1e-5)
    assert_as_good_as_plain(out, exact, pool_norm_downsample_reference(*arguments, 1e-5))


def gae(source: Path, **how) -> None:
    """Three segments: one with several tiles, one of a few tokens, an empty one between."""
    lengths = [2100, 0, 5]
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, sum(lengths), generator=generator)
    bootstrap, cu_seqlens = torch.randn(3, generator=generator), cumulative(lengths)
    advantages, returns = torch.full((2, sum(lengths)), torch.nan)
    inputs = rewards, values, cu_seqlens, bootstrap, 3, 0.99, 0.99 * 0.95
    launch(source, "step_gae_varlen", *inputs, advantages, returns, **how)
    exact = gae_varlen_reference(rewards.double(), values.double(), cu_seqlens, 0.99, 0.95, bootstrap.double())
    plain = gae_varlen_reference(rewards, values, cu_seqlens, 0.99, 0.95, bootstrap)
    for ours, wanted, loop in zip((advantages, returns), exact, plain, strict=True):
        assert_as_good_as_plain(ours, wanted, loop)


def merge(source: Path, **how) -> None:
    tokens, audio, positions = torch.randn(9, 40), torch.randn(3, 40), torch.tensor([7, 0, 4])
    merged = tokens.index_copy(0, positions, audio)
    launch(source, "step_merge_audio", audio, positions, 3, tokens, 9, 160, **how)
    assert torch.equal(tokens, merged)
    grad_tokens, grad_audio, map_of_rows = torch.empty(9, 40), torch.empty(3, 40), torch.empty(9, dtype=torch.int32)
    launch(source, "step_merge_audio_backward", merged, positions, 3, map_of_rows, grad_tokens, grad_audio, 9, 160, **how)
    assert torch.equal(grad_tokens, merged.index_fill(0, positions, 0)) and torch.equal(grad_audio, merged[positions])


CHECKS = {"pool_norm_downsample.cu": pool_norm, "gae.cu": gae, "merge_audio.cu": merge}
BARRIER = "__syncthreads();"


def barriers() -> list[tuple[str, int]]:
    """Every barrier of every kernel, by file and number."""
    return [(name, number) for name in CHECKS for number in range((CUDA / name).read_text().count(BARRIER))]


def with_fault(folder: Path, name: str, old: str, new: str, number: int = 0) -> Path:
    """A copy of a source in which the `number`th `old` is `new`."""
    parts = (CUDA / name).read_text().split(old)
    assert len(parts) > number + 1, f"{name} has no {old!r} any more: write the fault anew"
    (folder / name).write_text(old.join(parts[: number + 1]) + new + old.join(parts[number + 1 :]))
    return folder / name


@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_as_they_are_pass(name):
    CHECKS[name](CUDA / name)


@pytest.mark.parametrize(("name", "number"), barriers())
def test_every_deleted_barrier_is_noticed(tmp_path, name, number):
    with pytest.raises(AssertionError):
        CHECKS[name](with_fault(tmp_path, name, BARRIER, "", number), sanitize=False)


DIVERGENT = "if (lane == 31) warp_totals[warp] = total;\n    __syncthreads();"
SHUFFLE = "const float before = __shfl_up_sync(~0u, total, 1);"


@pytest.mark.parametrize(
    ("name", "old", "new", "options", "message"),
    [
        # A segment's boundary is off by one.
        ("gae.cu", "end = cu_seqlens[blockIdx.x + 1]", "end = cu_seqlens[blockIdx.x + 1] - 1", {}, "off by"),
        ("gae.cu", "t + 1 < end ?", "t + 1 <= end ?", {}, "outside a tensor"),
        ("pool_norm_downsample.cu", "source_row[row])", "source_row[row] + 1)", {"width": 600}, "reads outside a tensor|off by"),
        # A mask is gone.
        ("gae.cu", "if (t >= begin) delta", "delta", {}, "reads outside a tensor"),
        ("gae.cu", "if (t < begin) continue;", "", {}, "writes outside a tensor"),
        ("merge_audio.cu", "if (n >= count) return;\n  const int64_t t", "const int64_t t", {}, "reads outside a tensor"),
        ("merge_audio.cu", "if (n >= count) return;\n  if", "if", {}, "reads outside a tensor"),
        ("pool_norm_downsample.cu", "if (row >= rows) return;", "", {"width": 600}, "outside a tensor"),
        ("pool_norm_downsample.cu", "if ((v * 32 + lane) * kSize < width)", "", {"width": 600}, "off by"),
        # 16-byte loads where rows are not aligned.
        ("pool_norm_downsample.cu", "width % Vector<T>::kSize == 0", "true", {"width": 602}, "16 bytes at a misaligned address"),
        # Shared memory is too small by one value.
        ("gae.cu", "STEP_SHARED(float, tile, kTile);", "STEP_SHARED(float, tile, kTile - 1);", {}, "behind the end of shared"),
        # Threads of a block part ways at a barrier, lanes of a warp at a shuffle.
        ("gae.cu", DIVERGENT, "if (lane == 31) __syncthreads();", {}, "deadlock|after others|different"),
        ("gae.cu", SHUFFLE, "float before = 0; if (lane) before = __shfl_up_sync(~0u, total, 1);", {}, "deadlock"),
    ],
)
def test_a_fault_is_noticed(tmp_path, name, old, new, options, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        CHECKS[name](with_fault(tmp_path, name, old, new), orders=(), **options)


def test_a_trap_is_an_error_and_a_refused_launch_too():
    arguments = torch.zeros(1, 4), torch.tensor([2]), 1, torch.zeros(2, 4), 2, 16
    with pytest.raises(EmulationError, match="__trap"):
        launch(CUDA / "merge_audio.cu", "step_merge_audio", *arguments)
    with pytest.raises(EmulationError, match="refused"):
        launch(CUDA / "merge_audio.cu", "step_merge_audio", *arguments[:-1], 3)


def test_without_cuda_headers_it_fails_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(toolkit, "find_nvcc", lambda: None)
    with pytest.raises(FileNotFoundError, match="pip install 'nvidia-cuda-nvcc==13.0"):
        compile_kernel.__wrapped__(CUDA / "gae.cu")

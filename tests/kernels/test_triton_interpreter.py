"""The repair of Triton's interpreter: bfloat16 and fp8 round, multiply and reduce as torch says."""

import os

import pytest
import torch
import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def _cast_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty))


@triton.jit
def _dot_kernel(a, b, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + row * SIZE + column), tl.load(b + row * SIZE + column)
    tl.store(out + row * SIZE + column, tl.dot(x, y))


@triton.jit
def _arithmetic_kernel(a, b, out, largest, total, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x, y = tl.load(a + index), tl.load(b + index)
    tl.store(out + index, tl.where(x > y, x * y + x, -(x - y)))
    tl.store(largest, tl.max(x, 0))
    tl.store(total, tl.sum(x.to(tl.float32), 0))


def values(size: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(size, generator=generator) * torch.logspace(-8, 5, size)
    spread[:5] = torch.tensor([0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, float("nan")])
    return spread


def test_a_cast_to_bfloat16_rounds_to_nearest_even():
    source, target = values(), torch.empty(4096, dtype=torch.bfloat16)
    _cast_kernel[(1,)](source, target, SIZE=4096)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(4096)
    _cast_kernel[(1,)](target, back, SIZE=4096)
    torch.testing.assert_close(back, target.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cast_to_fp8_rounds_keeps_subnormals_and_saturates(fp8, dtype):
    source, target = values().to(dtype), torch.empty(4096, dtype=fp8)
    source[5] = float("inf")
    _cast_kernel[(1,)](source, target, SIZE=4096)
    largest = torch.finfo(fp8).max
    torch.testing.assert_close(
        target.float(), source.float().clamp(-largest, largest).to(fp8).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8])
def test_dot_multiplies_values_not_bit_patterns(dtype):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(32, 32, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


def test_arithmetic_and_reductions_of_bfloat16():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 256, generator=generator).bfloat16()
    out, largest, total = torch.empty_like(a), torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    _arithmetic_kernel[(1,)](a, b, out, largest, total, SIZE=256)
    assert torch.equal(out, torch.where(a > b, a * b + a, -(a - b)))
    assert torch.equal(largest, a.max()[None])
    torch.testing.assert_close(total, a.float().sum()[None])

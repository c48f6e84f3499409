"""Make bfloat16 and fp8 right in Triton's interpreter (`TRITON_INTERPRET=1`), so that kernels can be tested on a CPU.

numpy has neither type, so the interpreter (3.6 to 3.8) keeps bfloat16 as uint16 and fp8 as uint8. Without a word,

- `tl.dot`, arithmetic, exponentials and reductions of bfloat16 compute with the bit patterns as integers;
- float32 -> bfloat16 cuts the mantissa off, where hardware rounds to nearest even;
- casts to fp8 cut off too, lose subnormals and wrap on overflow, where hardware rounds and saturates (`cvt.rn.satfinite`).

`install` replaces the interpreter's methods for these types: values are widened to float32, computed, and rounded once. Kernels
under test are therefore as exact as a GPU's per operation; the order of summation within a `tl.dot` remains numpy's.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_NARROW = {tl.bfloat16, *_FP8}
_installed = False


def install() -> None:
    """Repair the interpreter of this process; a second call does nothing."""
    global _installed
    if not _installed:
        _installed = True
        _repair_casts(interpreter.InterpreterBuilder)
        _repair_arithmetic(interpreter.InterpreterBuilder)
        _repair_reductions(interpreter.ReduceScanOpInterface)


def widen(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Values of bfloat16 or fp8 bit patterns, as float32."""
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(np.ascontiguousarray(data)).view(_FP8[dtype]).float().numpy()


def narrow(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Bit patterns of float32 values rounded to nearest even; fp8 saturates, infinities included, as `satfinite` does."""
    values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))
    if dtype == tl.bfloat16:
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    largest = torch.finfo(_FP8[dtype]).max
    return values.clamp(-largest, largest).to(_FP8[dtype]).view(torch.uint8).numpy()


def _widened(handle):
    dtype = handle.dtype.scalar
    return interpreter.TensorHandle(widen(handle.data, dtype), tl.float32) if dtype in _NARROW else handle


def _repair_casts(builder) -> None:
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast(source, target, plain):
        target = target.scalar
        if source.dtype.scalar not in _NARROW and target not in _NARROW:
            return plain()
        values = _widened(source).data
        if target in _NARROW:
            return interpreter.TensorHandle(narrow(values, target), target)
        return interpreter.TensorHandle(values.astype(interpreter._get_np_dtype(target)), target)

    def cast_impl(self, source, target):
        return cast(source, target, lambda: plain_cast(self, source, target))

    def fp_to_fp(self, source, target, rounding):
        if rounding == interpreter._ir.ROUNDING_MODE.RTZ:  # it asks for cutting off, which the interpreter does
            return plain_fp_to_fp(self, source, target, rounding)
        return cast(source, target, lambda: plain_fp_to_fp(self, source, target, rounding))

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, fp_to_fp


def _repair_arithmetic(builder) -> None:
    plain_binary, plain_unary, plain_ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    plain_dot, plain_fma, plain_rsqrt = builder.create_dot, builder.create_fma, builder.create_rsqrt

    def rounded(result, dtype):
        if result.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data, tl.int1)
        return interpreter.TensorHandle(narrow(result.data, dtype), dtype)

    def binary_op(self, left, right, op):
        if left.dtype.scalar not in _NARROW:
            return plain_binary(self, left, right, op)
        return rounded(plain_binary(self, _widened(left), _widened(right), op), left.dtype.scalar)

    def unary_op(self, operand, op):
        if operand.dtype.scalar not in _NARROW:
            return plain_unary(self, operand, op)
        return rounded(plain_unary(self, _widened(operand), op), operand.dtype.scalar)

    def ternary_op(self, first, second, third, op):
        # `np.where` moves bit patterns, which is right as it is.
        if op is np.where or third.dtype.scalar not in _NARROW:
            return plain_ternary(self, first, second, third, op)
        return rounded(plain_ternary(self, *map(_widened, (first, second, third)), op), third.dtype.scalar)

    def create_fma(self, x, y, z):
        result = plain_fma(self, _widened(x), _widened(y), _widened(z))
        return rounded(result, z.dtype.scalar) if z.dtype.scalar in _NARROW else result

    def create_rsqrt(self, operand):
        result = plain_rsqrt(self, _widened(operand))
        return rounded(result, operand.dtype.scalar) if operand.dtype.scalar in _NARROW else result

    def create_dot(self, a, b, accumulator, *options):
        return plain_dot(self, _widened(a), _widened(b), accumulator, *options)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_dot, builder.create_fma, builder.create_rsqrt = create_dot, create_fma, create_rsqrt


def _repair_reductions(operation) -> None:
    plain = operation.apply

    def converted(tensor, data, dtype):
        shaped = tl.block_type(dtype, list(data.shape)) if tensor.type.is_block() else dtype
        return tl.core.tensor(interpreter.TensorHandle(data, dtype), shaped)

    def apply(self, operands):
        if not isinstance(operands, tuple):
            return self.apply((operands,))[0]
        narrow_types = [operand.dtype.scalar if operand.dtype.scalar in _NARROW else None for operand in operands]
        wide = tuple(
            converted(operand, widen(operand.handle.data, dtype), tl.float32) if dtype else operand
            for operand, dtype in zip(operands, narrow_types, strict=True)
        )
        results = plain(self, wide)
        return tuple(
            converted(result, narrow(result.handle.data, dtype), dtype) if dtype and result.dtype.scalar == tl.float32 else result
            for result, dtype in zip(results, narrow_types, strict=False)
        )

    operation.apply = apply

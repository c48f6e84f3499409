"""Triton where it is installed: `from step_kernels.triton_language import triton, tl, jit`.

A CPU installation has no Triton, and `import step_kernels` must work all the same: there `jit` leaves a function as it is, and
the registry says why the backend cannot run. Files with kernels begin with `from __future__ import annotations`, so that the
annotation `tl.constexpr` is not looked up.
"""

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(function=None, **_):
        """Stand in for `triton.jit`."""
        return function if function is not None else jit


__all__ = ["jit", "tl", "triton"]

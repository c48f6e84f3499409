"""flash-attn and Transformer Engine as backends of the packed attention ops, on GPU machines where they are installed.

    flash   flash-attn 3 (module `flash_attn_interface`) where that is installed, else flash-attn 2.6 or later
    te      Transformer Engine's DotProductAttention, layout `thd`; it decides itself between cuDNN and flash-attn

Both differentiate themselves, so they are called outside of our operator, and three things are made to fit:

- Keys that may not be seen (`valid`): the libraries want the keys of all segments back to back, so the valid ones are gathered
  before (nothing is copied where all are valid); the gradient of the others is zero.
- Segments of no token are left out: what a library does with them depends on its release.
- The log-sum-exp: flash-attn gives it as `[heads, tokens]`, Transformer Engine not at all. Neither takes a gradient of it, and
  flash-attn drops one without a word: `unfit` names the calls that must go to another backend.

Tested against stand-ins with the libraries' documented signatures, layouts and results; not run on a GPU. flash-attn's backward
is asked to be deterministic, as ours is; Transformer Engine's is with NVTE_ALLOW_NONDETERMINISTIC_ALGO=0.

Source: flash-attn 2.8.4 and 3 (`flash_attn_varlen_func`); Transformer Engine 2.9 (`DotProductAttention.forward`).
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from step_kernels.segments import cumulative

_REMEDY = {
    "flash": "flash-attn is not installed; `pip install flash-attn --no-build-isolation`",
    "te": "Transformer Engine is not installed; `pip install 'step-megatron[cuda]'`",
}
_MODULES = {"flash": ("flash_attn_interface", "flash_attn"), "te": ("transformer_engine.pytorch",)}
# Both want whole vectors of 16 bytes, and keep a head in shared memory.
_DIM_STEP, _LARGEST_DIM = 8, 256


@functools.cache
def load_error(name: str) -> str:
    """Why a library cannot be used; empty if it can. It is imported: one that was built against another torch fails only then."""
    try:
        module = _module(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in (*_MODULES[name], "transformer_engine"):
            return _REMEDY[name]
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"{name} is installed but cannot be imported ({said}); install it again"
    if name == "te":
        return ""
    if "return_attn_probs" not in inspect.signature(module.flash_attn_varlen_func).parameters:
        return "this flash-attn 3 cannot give the log-sum-exp; install a release of September 2025 or later"
    version = getattr(module, "__version__", None)
    if module.__name__ == "flash_attn" and _numbers(version) < (2, 6):
        return f"flash-attn {version} gives the log-sum-exp padded; `pip install 'flash-attn>=2.6' --no-build-isolation`"
    return ""


def version(name: str) -> str:
    """Release of a library that can be loaded."""
    module = _module(name)
    release = getattr(module, "__version__", None)
    if release is None and name == "te":
        release = getattr(importlib.import_module("transformer_engine"), "__version__", None)
    return f"{module.__name__} {release or 'of unknown release'}"


def unfit(dim: int, tokens: bool, wants_lse: bool, wants_gradient: bool) -> dict[str, str]:
    """The libraries that do not take a call, each with what it does not take."""
    if dim % _DIM_STEP or dim > _LARGEST_DIM:
        return dict.fromkeys(_MODULES, f"a head dimension of {dim}")
    if not tokens:
        return dict.fromkeys(_MODULES, "a pack of no token")
    found = {"te": "a call that asks for the log-sum-exp"} if wants_lse else {}
    if wants_lse and wants_gradient:
        found["flash"] = "a gradient of the log-sum-exp"
    return found


def attend(
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    valid: Sequence[int],
    scale: float,
    causal: bool,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend by a library; arguments as in `packed_attention.attend`, for a call that is not `unfit`.

    Returns:
        `[tokens, heads, dim]`, and `[tokens, heads]` float32 if asked for.
    """
    query_lengths = [length for length in lengths if length]
    key_lengths = [keys for keys in valid if keys] if valid else query_lengths
    query_bounds = cu_seqlens if len(query_lengths) == len(lengths) else cumulative(query_lengths, query.device)
    key_bounds = query_bounds
    if valid:
        rows = _valid_rows(tuple(lengths), tuple(valid), key.device)
        key, value = key.index_select(0, rows), value.index_select(0, rows)
        key_bounds = cumulative(key_lengths, key.device)
    bounds = (query_bounds, key_bounds, max(query_lengths), max(key_lengths))
    query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
    if name == "flash":
        return _flash(query, key, value, *bounds, scale, causal, return_lse)
    return _transformer_engine(query, key, value, *bounds, scale, causal), None


def _flash(query, key, value, query_bounds, key_bounds, longest_query, longest_key, scale, causal, return_lse):
    found = _module("flash").flash_attn_varlen_func(
        query, key, value, query_bounds, key_bounds, longest_query, longest_key,
        softmax_scale=scale, causal=causal, deterministic=True, return_attn_probs=return_lse,
    )  # fmt: skip
    return (found[0], found[1].t().contiguous()) if return_lse else (found, None)


def _transformer_engine(query, key, value, query_bounds, key_bounds, longest_query, longest_key, scale, causal):
    module = _te_attention(query.shape[1], query.shape[2], key.shape[1], scale, causal, query_bounds is not key_bounds)
    out = module(
        query, key, value,
        cu_seqlens_q=query_bounds, cu_seqlens_kv=key_bounds, max_seqlen_q=longest_query, max_seqlen_kv=longest_key,
    )  # fmt: skip
    return out.reshape(query.shape)


@functools.lru_cache(maxsize=32)
def _te_attention(heads: int, dim: int, kv_heads: int, scale: float, causal: bool, cross: bool) -> Callable:
    """Transformer Engine's module of these sizes: it holds no weights, and is dear to make."""
    return _module("te").DotProductAttention(
        heads,
        dim,
        num_gqa_groups=kv_heads,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal" if causal else "padding",
        attention_type="cross" if cross else "self",
        softmax_scale=scale,
    )


@functools.lru_cache(maxsize=64)
def _valid_rows(lengths: tuple[int, ...], valid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Rows of the keys that may be seen; the layers of a model share one transfer, which nothing waits for."""
    starts = accumulate(lengths, initial=0)
    rows = [row for start, keys in zip(starts, valid, strict=False) for row in range(start, start + keys)]
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@functools.cache
def _module(name: str):
    """The first of a library's modules that is there."""
    *preferred, last = _MODULES[name]
    for candidate in preferred:
        try:
            return importlib.import_module(candidate)
        except ModuleNotFoundError as error:
            if error.name != candidate:
                raise
    return importlib.import_module(last)


def _numbers(release: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (release or "0").split(".")[:2] if part.isdigit())

"""What `audio_attention_varlen` and `causal_attention_varlen` share: one operator with two masks, its backends and its gradient.

Keys and values of a segment are seen by the queries of the same segment only: all of the first `valid` (bidirectional), or those
up to the query itself (causal). With scores s and log-sum-exp l, the backward pass recomputes the weights and keeps none:

    p = exp(s - l)    dv = p^T do    ds = p (do v^T - delta)    dq = scale ds k    dk = scale ds^T q
    delta = sum(do * out) - dl

Source: FlashAttention 2 (Dao, 2023), variable-length form.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_kernels import attention_libraries, native, packed_attention_triton, registry
from step_kernels.operators import operator
from step_kernels.segments import equal_runs

Op = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Sequence[int], Sequence[int], float, str],
    tuple[torch.Tensor, torch.Tensor],
]


def attend(
    op: Op,
    name: str,
    causal: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    valid: Sequence[int],
    scale: float | None,
    return_lse: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend by the chosen backend; `valid` is empty where the mask is causal or every key counts.

    Raises:
        ValueError: if the shapes of query, key and value do not go together.
    """
    if key.shape != value.shape or key.shape[::2] != query.shape[::2] or query.shape[1] % max(key.shape[1], 1):
        shapes = ", ".join(f"{list(part.shape)}" for part in (query, key, value))
        raise ValueError(f"{name}: query, key and value of one number of rows and one width are needed, got {shapes}")
    scale = query.shape[2] ** -0.5 if scale is None else scale
    wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    unfit = _unfit(registry.fixed(query.shape[2]), query.shape[0] > 0, return_lse, wants_gradient)
    backend = registry.backend(name, query, unfit)
    # torch and the libraries differentiate their own functions: they stay outside of the operator.
    if backend in registry.LIBRARIES:
        out, lse = attention_libraries.attend(
            backend, query, key, value, cu_seqlens, lengths, valid, scale, causal, return_lse
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if backend == "torch":
        # In float64 too, and as often as wanted.
        out = attend_torch(query, key, value, lengths, valid, scale, causal)
        return (out, lse_torch(query, key, lengths, valid, scale, causal)) if return_lse else out
    out, lse = op(query, key, value, cu_seqlens, lengths, valid, scale, backend)
    return (out, lse) if return_lse else out


def define(name: str, causal: bool) -> Op:
    """Register `step::<name>` and `step::<name>_backward`; returns the first: `(out, lse)`, lse `[tokens, heads]` float32."""

    @operator(f"step::{name}")
    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lengths: Sequence[int],
        valid: Sequence[int],
        scale: float,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = _dense_heads(query, key, value)
        out, lse = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
        if backend == "cpp":
            native.ops().attention_forward(query, key, value, cu_seqlens, _int32(valid), scale, causal, out, lse)
        else:
            packed_attention_triton.forward(query, key, value, lengths, valid, scale, causal, out, lse)
        return out, lse

    @forward.register_fake
    def _(query, key, value, cu_seqlens, lengths, valid, scale, backend):
        return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)

    @operator(f"step::{name}_backward")
    def backward(
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cu_seqlens: torch.Tensor,
        lengths: Sequence[int],
        valid: Sequence[int],
        scale: float,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_out, query, key, value, out = _dense_heads(grad_out, query, key, value, out)
        gradients = tuple(part.new_empty(part.shape) for part in (query, key, value))
        known = (grad_out, grad_lse.contiguous(), query, key, value, out, lse)
        if backend == "cpp":
            native.ops().attention_backward(*known, cu_seqlens, _int32(valid), scale, causal, *gradients)
            return gradients
        if valid:  # the kernels do not touch the keys that nobody sees
            for part in gradients[1:]:
                part.zero_()
        packed_attention_triton.backward(*known, lengths, valid, scale, causal, *gradients)
        return gradients

    @backward.register_fake
    def _(grad_out, grad_lse, query, key, value, out, lse, cu_seqlens, lengths, valid, scale, backend):
        return tuple(part.new_empty(part.shape) for part in (query, key, value))

    def save(ctx, inputs, output):
        query, key, value, cu_seqlens, *ctx.settings = inputs
        ctx.save_for_backward(query, key, value, *output, cu_seqlens)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out, grad_lse):
        query, key, value, out, lse, cu_seqlens = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = lse.new_empty(0, 0) if grad_lse is None else grad_lse
        gradients = backward(grad_out, grad_lse, query, key, value, out, lse, cu_seqlens, *ctx.settings)
        return *gradients, None, None, None, None, None

    forward.register_autograd(differentiate, setup_context=save)
    return forward


def attend_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    valid: Sequence[int],
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """Attend by torch: one call for each run of neighbouring segments of one shape."""
    outputs = [query[:0]]
    for q, k, v, _ in _runs(query, key, value, lengths, valid):
        out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def lse_torch(
    query: torch.Tensor, key: torch.Tensor, lengths: Sequence[int], valid: Sequence[int], scale: float, causal: bool
) -> torch.Tensor:
    """Log-sum-exp of the scores by torch, `[tokens, heads]`, in at least float32; a run's scores are in memory."""
    wide = torch.promote_types(query.dtype, torch.float32)
    outputs = [query[:0, :, 0].to(wide)]
    for q, k, _, future in _runs(query.to(wide), key.to(wide), key.to(wide), lengths, valid):
        scores = scale * q @ k.transpose(2, 3)
        scores = scores.masked_fill(future, float("-inf")) if causal else scores
        outputs.append(scores.logsumexp(3).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _runs(query, key, value, lengths, valid):
    """Yield `[segments, heads, length, dim]` query, key and value of each run, keys repeated for their group, and the future."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (part.unsqueeze(2).expand(-1, -1, group, -1).flatten(1, 2) for part in (key, value))
    runs = list(equal_runs(tuple(zip(lengths, valid or lengths, strict=True))))
    sizes = [segments * length for segments, length, _ in runs]
    # split and cat, not slices: the gradient of one slice is a zero tensor as long as the whole pack.
    for (segments, length, keys), *qkv in zip(runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True):
        q, k, v = (part.unflatten(0, (segments, length)).transpose(1, 2) for part in qkv)
        yield q, k[:, :, :keys], v[:, :, :keys], torch.ones(length, keys, dtype=torch.bool, device=query.device).triu(1)


def describe(name: str, device: torch.device, dtype: torch.dtype, dim: int) -> str:
    """What computes an op for tensors of this kind, for whoever keeps the results: backend, of a library its release too."""
    backend, _ = registry.decide(name, device, dtype, dim, _unfit(dim))
    return f"{backend} {attention_libraries.version(backend)}" if backend in registry.LIBRARIES else backend


def _unfit(dim: int, tokens: bool = True, wants_lse: bool = False, wants_gradient: bool = False) -> dict[str, str]:
    """Backends that do not take a call of these sizes (`tokens`: there are some), each with what it does not take."""
    fits = {"cpp": dim % 16 == 0 and 0 < dim <= 256, "triton": dim in packed_attention_triton.DIMS}
    ours = {backend: f"a head dimension of {dim}" for backend, fit in fits.items() if not fit}
    return ours | attention_libraries.unfit(dim, tokens, wants_lse, wants_gradient)


def _dense_heads(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The kernels take any distance between tokens and heads (slices of a fused projection), but not within a head."""
    return tuple(part if part.stride(2) == 1 else part.contiguous() for part in parts)


def _int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)

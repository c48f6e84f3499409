"""Triton kernels of the packed attention ops: forward, and backward in two passes (queries, then keys and values).

A program owns a tile of one segment: `tiles` lists them, made on the host from the lengths, so no program is empty and nothing
waits for the device. A row of the list is `(first row of the segment, its length, its keys, first row of the tile within it)`;
tiles with the most to read come first. Softmax runs in base 2, whose exponential the hardware has; what is stored is natural.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from step_kernels.triton_language import jit, tl, triton

DIMS = (16, 32, 64, 128)
_LOG2E = math.log2(math.e)


@jit
def _tile(tiles):
    entry = tiles + 4 * tl.program_id(0)
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@jit
def _load_rows(base, start, rows, token, end, DIM: tl.constexpr):
    """Rows of one head of a segment, zero from row `end` on; offsets within a segment fit 32 bits, its start may not."""
    offset = rows[:, None] * token + tl.arange(0, DIM)[None, :]
    return tl.load(base + start.to(tl.int64) * token + offset, mask=(rows < end)[:, None], other=0.0)


@jit
def _store_rows(base, start, rows, token, end, values, DIM: tl.constexpr):
    offset = rows[:, None] * token + tl.arange(0, DIM)[None, :]
    tl.store(base + start.to(tl.int64) * token + offset, values.to(base.dtype.element_ty), mask=(rows < end)[:, None])


@jit
def _keys_of_rows(first, length, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Of a tile of queries: up to where whole blocks of keys are seen by all of them, and where the last key ends."""
    if CAUSAL:
        return first // BLOCK_N * BLOCK_N, tl.minimum(first + BLOCK_M, length)
    return end // BLOCK_N * BLOCK_N, end


@jit
def _seen(scores, queries, keys, end, CAUSAL: tl.constexpr):
    """Minus infinity where a query does not see a key; `queries` and `keys` broadcast to the shape of the scores."""
    mask = keys < end
    if CAUSAL:
        mask = mask & (keys <= queries)
    return tl.where(mask, scores, float("-inf"))


@jit
def _forward(
    query, key, value, out, lse, tiles, scale, heads, group,
    query_token, query_head, key_token, key_head, value_token, value_head,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, length, end, first = _tile(tiles)
    head = tl.program_id(1)
    key += head // group * key_head
    value += head // group * value_head
    rows = first + tl.arange(0, BLOCK_M)
    q = _load_rows(query + head * query_head, start, rows, query_token, length, DIM)
    whole, end = _keys_of_rows(first, length, end, BLOCK_M, BLOCK_N, CAUSAL)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulator = tl.zeros((BLOCK_M, DIM), tl.float32)
    for masked in tl.static_range(2):
        for first_key in range(whole if masked else 0, end if masked else whole, BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)
            k = _load_rows(key, start, keys, key_token, end, DIM)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            if masked:
                scores = _seen(scores, rows[:, None], keys[None, :], end, CAUSAL)
            raised = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - raised[:, None])
            shrink = tl.exp2(top - raised)
            top = raised
            total = total * shrink + tl.sum(weights, 1)
            v = _load_rows(value, start, keys, value_token, end, DIM)
            accumulator = tl.dot(weights.to(v.dtype), v, accumulator * shrink[:, None], input_precision=PRECISION)
    _store_rows(out + head * DIM, start, rows, heads * DIM, length, accumulator / total[:, None], DIM)
    # 0.693... = ln 2
    natural = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + (start + rows) * heads + head, natural, mask=rows < length)


@jit
def _backward_query(
    query, key, value, grad_out, lse, delta, grad_query, tiles, scale, heads, group,
    query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, length, end, first = _tile(tiles)
    head = tl.program_id(1)
    key += head // group * key_head
    value += head // group * value_head
    rows = first + tl.arange(0, BLOCK_M)
    q = _load_rows(query + head * query_head, start, rows, query_token, length, DIM)
    grads = _load_rows(grad_out + head * grad_head, start, rows, grad_token, length, DIM)
    shift = tl.load(lse + (start + rows) * heads + head, mask=rows < length, other=0.0) * 1.4426950408889634
    share = tl.load(delta + (start + rows) * heads + head, mask=rows < length, other=0.0)
    whole, end = _keys_of_rows(first, length, end, BLOCK_M, BLOCK_N, CAUSAL)
    accumulator = tl.zeros((BLOCK_M, DIM), tl.float32)
    for masked in tl.static_range(2):
        for first_key in range(whole if masked else 0, end if masked else whole, BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)
            k = _load_rows(key, start, keys, key_token, end, DIM)
            v = _load_rows(value, start, keys, value_token, end, DIM)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
            if masked:
                scores = _seen(scores, rows[:, None], keys[None, :], end, CAUSAL)
            weights = tl.exp2(scores - shift[:, None])
            products = tl.dot(grads, tl.trans(v), input_precision=PRECISION)
            grad_scores = weights * (products - share[:, None])
            accumulator = tl.dot(grad_scores.to(k.dtype), k, accumulator, input_precision=PRECISION)
    _store_rows(grad_query + head * DIM, start, rows, heads * DIM, length, accumulator * scale, DIM)


@jit
def _backward_key(
    query, key, value, grad_out, lse, delta, grad_key, grad_value, tiles, scale, heads, group,
    query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys against all queries of all heads that share it: sums stay in registers, so no atomics are needed.

    Everything is transposed, keys down and queries across. Queries beyond the segment's end are loaded as zeros and give nothing,
    and keys beyond it are not stored: only the causal edge needs a mask.
    """
    start, length, end, first = _tile(tiles)
    kv_head = tl.program_id(1)
    keys = first + tl.arange(0, BLOCK_N)
    k = _load_rows(key + kv_head * key_head, start, keys, key_token, end, DIM)
    v = _load_rows(value + kv_head * value_head, start, keys, value_token, end, DIM)
    accumulator_key = tl.zeros((BLOCK_N, DIM), tl.float32)
    accumulator_value = tl.zeros((BLOCK_N, DIM), tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        for first_row in range(first // BLOCK_M * BLOCK_M if CAUSAL else 0, length, BLOCK_M):
            rows = first_row + tl.arange(0, BLOCK_M)
            q = _load_rows(query + head * query_head, start, rows, query_token, length, DIM)
            grads = _load_rows(grad_out + head * grad_head, start, rows, grad_token, length, DIM)
            shift = tl.load(lse + (start + rows) * heads + head, mask=rows < length, other=0.0) * 1.4426950408889634
            share = tl.load(delta + (start + rows) * heads + head, mask=rows < length, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * 1.4426950408889634)
            if CAUSAL:
                scores = tl.where(keys[:, None] <= rows[None, :], scores, float("-inf"))
            weights = tl.exp2(scores - shift[None, :])
            accumulator_value = tl.dot(weights.to(v.dtype), grads, accumulator_value, input_precision=PRECISION)
            products = tl.dot(v, tl.trans(grads), input_precision=PRECISION)
            grad_scores = weights * (products - share[None, :])
            accumulator_key = tl.dot(grad_scores.to(k.dtype), q, accumulator_key, input_precision=PRECISION)
    token = heads // group * DIM
    _store_rows(grad_key + kv_head * DIM, start, keys, token, end, accumulator_key * scale, DIM)
    _store_rows(grad_value + kv_head * DIM, start, keys, token, end, accumulator_value, DIM)


@jit
def _delta(out, grad_out, grad_lse, delta, rows, heads, out_token, out_head, grad_token, grad_head,
           DIM: tl.constexpr, BLOCK: tl.constexpr, WITH_LSE: tl.constexpr):  # fmt: skip
    """Row sums of `grad_out * out`, less the log-sum-exp's gradient; `rows` counts tokens times heads."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token, head = (row // heads).to(tl.int64)[:, None], (row % heads)[:, None]
    column, inside = tl.arange(0, DIM)[None, :], (row < rows)[:, None]
    values = tl.load(out + token * out_token + head * out_head + column, mask=inside, other=0.0).to(tl.float32)
    grads = tl.load(grad_out + token * grad_token + head * grad_head + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(values * grads, 1)
    if WITH_LSE:
        total -= tl.load(grad_lse + row, mask=row < rows, other=0.0)
    tl.store(delta + row, total, mask=row < rows)


def block_shape(kernel: str, dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int, int, int]:
    """BLOCK_M (queries), BLOCK_N (keys), warps and stages of a kernel.

    Two warp groups, each with 64 rows of a wgmma. An accumulator of 128 x 128 takes 64 registers of a thread, and the pass over
    keys has two: with 64 queries beside them it spilt 80 bytes, with 32 none (compiled for sm_90a; the inspection watches it).
    float32 is split into three parts, so its tiles are small: they fit shared memory, but at dim 128 they spill.
    """
    if dtype == torch.float32:
        return (32, 32, 8, 1) if kernel == "key" else (64, 32, 4, 1)
    if kernel == "forward":
        return (128, 128, 8, 3) if dim <= 64 else (128, 64, 8, 3)
    if kernel == "query":
        return 128, 64, 8, 2
    return (64, 128, 8, 2) if dim <= 64 else (32, 128, 8, 2)


@lru_cache(maxsize=64)
def _tiles(
    lengths: tuple[int, ...], valid: tuple[int, ...], block: int, causal: bool, of_keys: bool, device: torch.device
) -> torch.Tensor:
    """The tile list on the device; the layers of a model share one transfer."""
    tiles, start = [], 0
    for length, keys in zip(lengths, valid or lengths, strict=True):
        tiles += [(start, length, keys, first) for first in range(0, keys if of_keys else length, block)]
        start += length
    # The work of a causal tile grows with its row (falls with its key), that of any other with the segment.
    work = (lambda tile: tile[1] - tile[3] if of_keys else tile[3]) if causal else (lambda tile: tile[1])
    tiles.sort(key=work, reverse=True)
    host = torch.tensor(tiles, dtype=torch.int32, pin_memory=device.type == "cuda").reshape(-1, 4)
    return host.to(device, non_blocking=True)


def _precision(dtype: torch.dtype) -> str:
    # Three products of 10-bit mantissas come to float32's accuracy; a single one does not.
    return "tf32x3" if dtype == torch.float32 else "tf32"


def forward(query, key, value, lengths: Sequence[int], valid: Sequence[int], scale: float, causal: bool, out, lse) -> None:
    """Write out `[tokens, heads, dim]` and lse `[tokens, heads]`; the heads of query, key and value may have any strides."""
    heads, dim = query.shape[1:]
    block_m, block_n, warps, stages = block_shape("forward", dim, query.dtype)
    tiles = _tiles(tuple(lengths), tuple(valid), block_m, causal, False, query.device)
    if tiles.numel():
        strides = [stride for part in (query, key, value) for stride in part.stride()[:2]]
        _forward[len(tiles), heads](
            query, key, value, out, lse, tiles, scale * _LOG2E, heads, heads // key.shape[1], *strides,
            DIM=dim, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, PRECISION=_precision(query.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def backward(
    grad_out, grad_lse, query, key, value, out, lse, lengths: Sequence[int], valid: Sequence[int], scale: float, causal: bool,
    grad_query, grad_key, grad_value,
) -> None:  # fmt: skip
    """Write the three gradients; those of keys beyond `valid` are left as they are. An empty `grad_lse` counts as zero."""
    tokens, heads, dim = query.shape
    if not tokens:
        return
    delta = torch.empty_like(lse)
    grad_strides, rows = grad_out.stride()[:2], tokens * heads
    _delta[(triton.cdiv(rows, 64),)](
        out, grad_out, grad_lse, delta, rows, heads, *out.stride()[:2], *grad_strides,
        DIM=dim, BLOCK=64, WITH_LSE=grad_lse.numel() > 0, num_warps=4,
    )  # fmt: skip
    strides = [stride for part in (query, key, value, grad_out) for stride in part.stride()[:2]]
    known = (query, key, value, grad_out, lse, delta)
    for kernel, name, results, count in (
        (_backward_query, "query", (grad_query,), heads),
        (_backward_key, "key", (grad_key, grad_value), key.shape[1]),
    ):
        block_m, block_n, warps, stages = block_shape(name, dim, query.dtype)
        of_keys = name == "key"
        tiles = _tiles(tuple(lengths), tuple(valid), block_n if of_keys else block_m, causal, of_keys, query.device)
        kernel[len(tiles), count](
            *known, *results, tiles, scale, heads, heads // key.shape[1], *strides,
            DIM=dim, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal, PRECISION=_precision(query.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip


def aot_kernels(op: str, heads: int, kv_heads: int, dim: int, lengths: Sequence[int], causal: bool) -> Iterator[tuple]:
    """What the inspection compiles for one shape in bfloat16: name, function, signature, constants, aligned arguments, warps,
    stages, FLOPs and bytes (every tensor read and written once)."""
    tokens = sum(lengths)
    pairs = heads * sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
    narrow = {name: "*bf16" for name in ("query", "key", "value")}
    rows = {"lse": "*fp32", "delta": "*fp32"}
    strides = [f"{part}_{step}" for part in ("query", "key", "value", "grad") for step in ("token", "head")]
    numbers = {"tiles": "*i32", "scale": "fp32", "heads": "i32", "group": "i32"}
    query_bytes, key_bytes, row_bytes = 2 * tokens * heads * dim, 2 * tokens * kv_heads * dim, 4 * tokens * heads
    known = narrow | {"grad_out": "*bf16"} | rows
    # name, function, tensors, strides, products of a query and a key, bytes
    kernels = (
        ("forward", _forward, narrow | {"out": "*bf16", "lse": "*fp32"}, strides[:6], 2,
         2 * query_bytes + 2 * key_bytes + row_bytes),
        ("query", _backward_query, known | {"grad_query": "*bf16"}, strides, 3, 3 * query_bytes + 2 * key_bytes + 2 * row_bytes),
        ("key", _backward_key, known | {"grad_key": "*bf16", "grad_value": "*bf16"}, strides, 4,
         2 * query_bytes + 4 * key_bytes + 2 * row_bytes),
    )  # fmt: skip
    for name, function, tensors, steps, products, moved in kernels:
        block_m, block_n, warps, stages = block_shape(name, dim)
        signature = tensors | numbers | dict.fromkeys(steps, "i32")
        constants = {"DIM": dim, "BLOCK_M": block_m, "BLOCK_N": block_n, "CAUSAL": causal, "PRECISION": "tf32"}
        aligned = [*tensors, "tiles", *steps]
        title = f"{op} {name if name == 'forward' else 'backward ' + name} d{dim}"
        yield title, function, signature, constants, aligned, warps, stages, 2 * products * pairs * dim, moved
    signature = {name: "*bf16" for name in ("out", "grad_out")} | {
        "grad_lse": "*fp32",
        "delta": "*fp32",
        "rows": "i32",
        "heads": "i32",
    }
    steps = ["out_token", "out_head", "grad_token", "grad_head"]
    constants, aligned = {"DIM": dim, "BLOCK": 64, "WITH_LSE": False}, ["out", "grad_out", "grad_lse", "delta", *steps]
    moved = 2 * query_bytes + row_bytes
    yield (f"{op} backward delta d{dim}", _delta, signature | dict.fromkeys(steps, "i32"), constants, aligned, 4, 3,
           2 * tokens * heads * dim, moved)  # fmt: skip

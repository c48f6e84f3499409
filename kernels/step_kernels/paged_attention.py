"""Attention of new tokens to a key-value cache in pages: decoding, chunked prefill and shared prompts in one op.

    out[i, h] = sum_{j <= p(i)} softmax_j(scale * q[i, h] . k[j, h // group]) v[j, h // group]

Sequence `s` holds `lengths[s]` tokens, its last `n = cu_seqlens[s + 1] - cu_seqlens[s]` of them new; new token `i` stands at
position `p(i) = lengths[s] - n + i` and sees everything up to itself. Token `j` lies in slot `j % page_size` of page
`block_table[s, j // page_size]`; sequences that share a prompt name the same pages. The new tokens' keys and values are in the
cache already.

The keys of a sequence with few new tokens are split, so that one long sequence keeps a whole device busy; the splits are joined
by their log-sum-exps. Shapes and launches follow from host numbers alone, so a CUDA graph can hold the op. How a sequence is cut
depends on its own lengths (and the table's width), so its result does not depend on its companions.

Forward only: it serves generation. Source: PagedAttention (Kwon et al. 2023), Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from step_kernels import native, registry
from step_kernels.operators import operator
from step_kernels.triton_language import jit, tl, triton

OP = "paged_attention"
registry.register(OP, triton=(*registry.HALF, torch.float32), cpp=(torch.float32,))

# A sequence with more new tokens than this has query tiles enough; the partial results of every token of it would fill memory.
_SPLIT_QUERIES = 4
# A device of 132 multiprocessors is busy with one sequence from 4 key-value heads on; a split below 256 keys does not pay.
_MAX_SPLITS, _MIN_SPLIT_KEYS = 32, 256


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Define the op in plain torch, sequence by sequence; arguments as in `paged_attention`."""
    group, outputs, bounds = query.shape[1] // key_cache.shape[2], [query[:0]], cu_seqlens.tolist()
    for pages, length, first, last in zip(block_table, lengths.tolist(), bounds[:-1], bounds[1:], strict=True):
        if first == last:
            continue
        pages = pages[: -(-length // key_cache.shape[1])].long()
        keys, values = (cache[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1) for cache in (key_cache, value_cache))
        scores = scale * torch.einsum("qhd,khd->hqk", query[first:last], keys)
        future = torch.ones(last - first, length, dtype=torch.bool, device=query.device).triu(length - (last - first) + 1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_queries: int,
    scale: float | None = None,
) -> torch.Tensor:
    """Attend to the cache.

    Args:
        query: `[tokens, heads, dim]`, the sequences' new tokens back to back. The kernels take a `dim` that is a multiple of 16
            up to 256; torch takes the others.
        key_cache, value_cache: `[pages, page_size, kv_heads, dim]`; `heads` is a multiple of `kv_heads`.
        block_table: `[sequences, max_pages]` int32, a sequence's pages in order; entries beyond its length are not looked at.
        lengths: `[sequences]` int32, tokens in the cache, the new ones included.
        cu_seqlens: `[sequences + 1]` int32, bounds of the sequences' new tokens; none is allowed.
        max_queries: the most new tokens of a sequence (1 for decoding), on the host, so that nothing waits for the device.
        scale: default `dim ** -0.5`.

    Returns:
        `[tokens, heads, dim]` in `query`'s dtype.

    Raises:
        ValueError: if shapes do not fit, or gradients are asked for.
    """
    tokens, heads, dim = query.shape
    if key_cache.shape != value_cache.shape or key_cache.dim() != 4 or key_cache.shape[3] != dim:
        raise ValueError(
            f"paged_attention: caches {list(key_cache.shape)} and {list(value_cache.shape)} must both be "
            f"[pages, page_size, kv_heads, {dim}] for queries of dimension {dim}"
        )
    if heads % key_cache.shape[2]:
        raise ValueError(f"paged_attention: {heads} query heads are not a multiple of {key_cache.shape[2]} key-value heads")
    sequences = lengths.shape[0]
    if block_table.shape[0] != sequences or cu_seqlens.shape[0] != sequences + 1:
        raise ValueError(
            f"paged_attention: {sequences} lengths, a block table for {block_table.shape[0]} sequences and "
            f"{cu_seqlens.shape[0]} cu_seqlens: there must be one, one, and one more"
        )
    if tokens > sequences * max_queries:
        raise ValueError(f"paged_attention: {sequences} sequences of up to {max_queries} new tokens cannot have {tokens}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key_cache, value_cache)):
        raise ValueError("paged_attention is forward only: it serves generation; train by causal_attention_varlen")
    scale = dim**-0.5 if scale is None else scale
    return _op(query, key_cache, value_cache, block_table, lengths, cu_seqlens, max_queries, scale)


@operator("step::paged_attention")
def _op(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_queries: int,
    scale: float,
) -> torch.Tensor:
    dim = query.shape[2]
    unfit = dict.fromkeys(("cpp", "triton"), f"a head dimension of {dim}") if dim % 16 or dim > 256 else {}
    chosen = registry.backend(OP, query, unfit)
    if chosen == "torch":
        return _torch(query, key_cache, value_cache, block_table, lengths, cu_seqlens, scale)
    query, key_cache, value_cache, block_table = (x.contiguous() for x in (query, key_cache, value_cache, block_table))
    if chosen == "triton":
        return _triton(query, key_cache, value_cache, block_table, lengths, cu_seqlens, max_queries, scale)
    out = torch.empty_like(query)
    native.ops().paged_attention(query, key_cache, value_cache, block_table, lengths, cu_seqlens, scale, out)
    return out


@_op.register_fake
def _(query, key_cache, value_cache, block_table, lengths, cu_seqlens, max_queries, scale):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _torch(query, key_cache, value_cache, block_table, lengths, cu_seqlens, scale):
    """Every new token against its sequence's whole table, with a mask: reads nothing back to the host."""
    tokens, heads, dim = query.shape
    page_size, kv_heads = key_cache.shape[1:3]
    if not tokens:
        return torch.empty_like(query)
    capacity = block_table.shape[1] * page_size
    token = torch.arange(tokens, device=query.device)
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    position = lengths[sequence] - cu_seqlens[sequence + 1] + token
    seen = torch.arange(capacity, device=query.device) <= position[:, None]
    # Pages of no sequence may hold anything, a NaN too, which a weight of zero would not silence.
    inside = torch.arange(block_table.shape[1], device=query.device) * page_size < lengths[:, None]
    keys, values = (
        cache[block_table.where(inside, 0)[sequence].long()].flatten(1, 2).transpose(1, 2) for cache in (key_cache, value_cache)
    )
    keys, values = (x.masked_fill(~seen[:, None, :, None], 0) for x in (keys, values))
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    mask = seen[:, None, None, :]
    return torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)


def _triton(query, key_cache, value_cache, block_table, lengths, cu_seqlens, max_queries, scale):
    tokens, heads, dim = query.shape
    page_size, kv_heads = key_cache.shape[1:3]
    sequences, max_pages = block_table.shape
    out = torch.empty_like(query)
    if not tokens:
        return out
    group, capacity = heads // kv_heads, max_pages * page_size
    split_keys = max(_MIN_SPLIT_KEYS, triton.next_power_of_2(triton.cdiv(capacity, _MAX_SPLITS)))
    splits, rows = triton.cdiv(capacity, split_keys), min(max_queries, _SPLIT_QUERIES)
    parts = query.new_empty(sequences * rows, heads, splits, dim, dtype=torch.float32)
    lse = query.new_empty(sequences * rows, heads, splits, dtype=torch.float32)
    shape = {
        "GROUP": group,
        "DIM": dim,
        "PAGE": page_size,
        "SPLIT_KEYS": split_keys,
        "SPLITS": splits,
        "ROWS": rows,
        "SPLIT_QUERIES": _SPLIT_QUERIES,
        "PADDED": triton.next_power_of_2(dim),
    }
    # A decoding step is bound by reading the cache: the smallest tile. A prompt is bound by its products: one of wgmma's height.
    block_m = 16 if max_queries * group <= 16 else 64
    grid = (triton.cdiv(max_queries * group, block_m), sequences * kv_heads, splits)
    _attend[grid](
        query, key_cache, value_cache, block_table, lengths, cu_seqlens, out, parts, lse, scale * _LOG2_E, max_pages, kv_heads,
        **shape, BLOCK_M=block_m, BLOCK_N=64, num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join[(sequences * rows, heads)](lengths, cu_seqlens, out, parts, lse, heads, **_for_join(shape), num_warps=1)
    return out


_LOG2_E = 1.4426950408889634


def _for_join(shape: dict[str, int]) -> dict[str, int]:
    return {name: shape[name] for name in ("DIM", "SPLIT_KEYS", "SPLITS", "ROWS", "SPLIT_QUERIES", "PADDED")}


@jit
def _attend(
    query, key_cache, value_cache, block_table, lengths, cu_seqlens, out, parts, lse, scale_log2, max_pages, kv_heads,
    GROUP: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, SPLIT_KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, SPLIT_QUERIES: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows (new token, query head of the group), one key-value head, one split of the keys."""
    tile, split = tl.program_id(0), tl.program_id(2)
    sequence, kv_head = tl.program_id(1) // kv_heads, tl.program_id(1) % kv_heads
    first = tl.load(cu_seqlens + sequence)
    queries = tl.load(cu_seqlens + sequence + 1) - first
    length = tl.load(lengths + sequence)
    is_split = (queries <= SPLIT_QUERIES) & (length > SPLIT_KEYS)
    begin = tl.where(is_split, split * SPLIT_KEYS, 0)
    # A sequence that is not split is the first program's alone.
    if (tile * BLOCK_M >= queries * GROUP) | (split * SPLIT_KEYS >= length) | ((split > 0) & (begin == 0)):
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    inside = row < queries * GROUP
    # Last key that a row sees.
    last = length - queries + token
    dim = tl.arange(0, PADDED)
    place = ((first + token) * (kv_heads * GROUP) + head).to(tl.int64)[:, None] * DIM + dim[None, :]
    whole = inside[:, None] & (dim < DIM)[None, :]
    q = tl.load(query + place, mask=whole, other=0.0)

    end = tl.minimum(length, length - queries + (tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)
    end = tl.where(is_split, tl.minimum(end, begin + SPLIT_KEYS), end)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        valid = key < end
        page = tl.load(block_table + sequence.to(tl.int64) * max_pages + key // PAGE, mask=valid, other=0)
        slot = (page.to(tl.int64) * PAGE + key % PAGE) * kv_heads + kv_head
        place_kv = slot[:, None] * DIM + dim[None, :]
        read = valid[:, None] & (dim < DIM)[None, :]
        k = tl.load(key_cache + place_kv, mask=read, other=0.0)
        v = tl.load(value_cache + place_kv, mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(valid[None, :] & (key[None, :] <= last[:, None]), scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        # A row of which no key of this split is visible keeps -inf, and -inf - -inf is no number.
        shift = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, 1)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None], input_precision="ieee")
        largest = now

    if is_split:
        part = ((sequence * ROWS + token) * (kv_heads * GROUP) + head).to(tl.int64) * SPLITS + split
        seen = total > 0
        held = tl.where(seen, total, 1.0)
        tl.store(parts + part[:, None] * DIM + dim[None, :], sums / held[:, None], mask=whole)
        tl.store(lse + part, tl.where(seen, largest + tl.log2(held), float("-inf")), mask=inside)
    else:
        tl.store(out + place, (sums / tl.where(inside, total, 1.0)[:, None]).to(out.dtype.element_ty), mask=whole)


@jit
def _join(
    lengths, cu_seqlens, out, parts, lse, heads, DIM: tl.constexpr, SPLIT_KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, SPLIT_QUERIES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program: one new token and head of a sequence that was split."""
    sequence, token, head = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS, tl.program_id(1)
    first = tl.load(cu_seqlens + sequence)
    queries = tl.load(cu_seqlens + sequence + 1) - first
    length = tl.load(lengths + sequence)
    if (token >= queries) | (queries > SPLIT_QUERIES) | (length <= SPLIT_KEYS):
        return
    dim = tl.arange(0, PADDED)
    base = (tl.program_id(0) * heads + head).to(tl.int64) * SPLITS
    splits = (length + SPLIT_KEYS - 1) // SPLIT_KEYS
    largest = float("-inf")
    for split in range(0, splits):
        largest = tl.maximum(largest, tl.load(lse + base + split))
    total = 0.0
    sums = tl.zeros([PADDED], tl.float32)
    for split in range(0, splits):
        weight = tl.exp2(tl.load(lse + base + split) - largest)
        total += weight
        sums += weight * tl.load(parts + (base + split) * DIM + dim, mask=dim < DIM, other=0.0)
    place = ((first + token) * heads + head).to(tl.int64) * DIM + dim
    tl.store(out + place, (sums / total).to(out.dtype.element_ty), mask=dim < DIM)


def aot_kernels() -> Iterator[tuple]:
    """What the ahead-of-time inspection compiles: name, function, signature, constants, aligned arguments, warps, stages, FLOPs
    and bytes moved, in bfloat16 with 8 key-value heads of dimension 128 and 5 query heads to each (the 32B decoder's shape)."""
    kv_heads, group, dim, length, splits = 8, 5, 128, 4096, 16
    tensors = {name: "*bf16" for name in ("query", "key_cache", "value_cache")}
    tensors |= {name: "*i32" for name in ("block_table", "lengths", "cu_seqlens")}
    tensors |= {"out": "*bf16", "parts": "*fp32", "lse": "*fp32"}
    signature = tensors | {"scale_log2": "fp32", "max_pages": "i32", "kv_heads": "i32"}
    shape = {
        "GROUP": group,
        "DIM": dim,
        "PAGE": 16,
        "SPLIT_KEYS": length // splits,
        "SPLITS": splits,
        "SPLIT_QUERIES": _SPLIT_QUERIES,
        "PADDED": dim,
    }
    for name, sequences, queries, block_m in (("decode", 64, 1, 16), ("prefill", 1, 512, 64)):
        rows = min(queries, _SPLIT_QUERIES)
        constants = shape | {"ROWS": rows, "BLOCK_M": block_m, "BLOCK_N": 64}
        pairs = sequences * kv_heads * group * sum(length - queries + i + 1 for i in range(queries))
        moved = 4 * sequences * kv_heads * dim * (length + queries * group)
        if queries <= _SPLIT_QUERIES:
            moved += 4 * sequences * queries * kv_heads * group * splits * (dim + 1)
        aligned = [*tensors, "max_pages"]
        yield f"paged_attention {name}", _attend, signature, constants, aligned, 4, 3, 4 * pairs * dim, moved
    tokens, tensors = 64 * kv_heads * group, {name: tensors[name] for name in ("lengths", "cu_seqlens", "out", "parts", "lse")}
    flops, moved = 2 * tokens * splits * dim, 4 * tokens * splits * (dim + 1) + 2 * tokens * dim
    yield (
        "paged_attention join",
        _join,
        tensors | {"heads": "i32"},
        _for_join(shape | {"ROWS": 1}),
        [*tensors],
        1,
        3,
        flops,
        moved,
    )

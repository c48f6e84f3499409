"""Cases of attention to a paged cache: beside SDPA over caches that are padded to the longest sequence, as `generate` keeps them.

Padding the caches is not part of SDPA's work; ours finds its pages by the block table all the same.
"""

import random

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_kernels import paged_attention
from step_kernels.bench.contestants import library, ours
from step_kernels.bench.harness import Case, Contestant, Work
from step_kernels.segments import cumulative

_LIMIT = 1.0


class _Caches:
    """Sequences in scattered pages, `new` tokens of each as queries, and the same padded."""

    def __init__(self, lengths: list[int], new: int, heads: int, kv_heads: int, dim: int, device: torch.device):
        # flash-attn takes pages of 256 only.
        page_size, dtype = (16, torch.float32) if device.type == "cpu" else (256, torch.bfloat16)
        needed = [-(-length // page_size) for length in lengths]
        order = random.Random(0).sample(range(sum(needed)), sum(needed))
        table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        for row, pages in zip(table, needed, strict=True):
            row[:pages] = torch.tensor([order.pop() for _ in range(pages)])
        generator = torch.Generator().manual_seed(0)
        shape = (sum(needed), page_size, kv_heads, dim)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
        self.query = torch.randn(len(lengths) * new, heads, dim, generator=generator).to(device, dtype)
        self.table, self.new, self.sequences = table.to(device), new, len(lengths)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.bounds = cumulative([new] * len(lengths), device)

    def op(self) -> torch.Tensor:
        return paged_attention(self.query, self.keys, self.values, self.table, self.lengths, self.bounds, self.new)

    def padded(self) -> Work:
        longest = int(self.lengths.max())
        keys, values = (
            cache[self.table.long()].flatten(1, 2)[:, :longest].transpose(1, 2).contiguous() for cache in (self.keys, self.values)
        )
        position = self.lengths[:, None] - self.new + torch.arange(self.new, device=self.lengths.device)
        seen = torch.arange(longest, device=position.device) <= position[:, :, None]
        query = self.query.unflatten(0, (self.sequences, self.new))
        if self.new == 1:
            # The query heads of a group as that group's queries: SDPA then reads each key once, its fastest way.
            query = query.squeeze(1).unflatten(1, (keys.shape[1], -1))
            return lambda: scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None]).flatten(1, 2)
        query = query.transpose(1, 2)

        def run():
            out = scaled_dot_product_attention(query, keys, values, attn_mask=seen[:, None], enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1)

        return run

    def flash(self) -> Work:
        from flash_attn import flash_attn_with_kvcache

        query = self.query.unflatten(0, (self.sequences, self.new))

        def run():
            cache = {"cache_seqlens": self.lengths, "block_table": self.table, "causal": True}
            return flash_attn_with_kvcache(query, self.keys, self.values, **cache).flatten(0, 1)

        return run


def paged_cases(device: torch.device) -> list[Case]:
    """Decoding with caches of like and unlike lengths, one long cache, and chunks of prompts."""
    draw = random.Random(0)
    cases = []
    for name, lengths, new, heads, kv_heads, dim in (
        ("decoding", [draw.randint(50, 500) for _ in range(32)], 1, 9, 3, 64),
        ("decoding", [draw.randint(100, 4000) for _ in range(16)], 1, 14, 2, 64),
        ("decoding", [4000], 1, 14, 2, 64),
        ("decoding", [draw.randint(100, 2000) for _ in range(8)], 1, 40, 8, 128),
        ("chunks of a prompt", [draw.randint(200, 1500) for _ in range(8)], 64, 14, 2, 64),
    ):
        caches = _Caches(lengths, new, heads, kv_heads, dim, device)
        contestants = [
            *ours("paged_attention", caches.op, device),
            # One sequence alone pads nothing: then the peer reads contiguous memory, which pages cannot match.
            Contestant("SDPA, padded caches", caches.padded, _LIMIT if len(lengths) > 1 else None),
            library("flash-attn", "flash_attn", caches.flash, device),
        ]
        spread = f"{len(lengths)} x {min(lengths)}-{max(lengths)}" if len(lengths) > 1 else str(lengths[0])
        shape = f"{name}, {new} of {spread} tokens, {heads}/{kv_heads} x {dim}"
        cases.append(Case("paged-attention", shape, contestants, tolerance=1e-4 if device.type == "cpu" else 2e-2))
    return cases


CASES = {"paged-attention": paged_cases}

"""Packed batches for the tests of RL: random lengths, masks over samples, float64."""

import torch
from hypothesis import strategies as st
from step_kernels.segments import cumulative

# Lengths of responses, and which of them count.
batches = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6).filter(
    lambda batch: any(length and counts for length, counts in batch)
)


def packed(batch, seed: int = 0, columns: int = 1):
    """`columns` of float64 `[tokens]`, the token mask, and cu_seqlens."""
    lengths = [length for length, _ in batch]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(columns, sum(lengths), dtype=torch.float64, generator=generator)
    mask = torch.tensor([counts for length, counts in batch for _ in range(length)], dtype=torch.bool)
    return values, mask, cumulative(lengths)

"""Packed segments: what every layer needs to know about a packed micro-batch, with the lengths kept on the host.

Megatron describes packed sequences by `cu_seqlens` tensors on the device; reading a length from them stops the host until the
device has caught up, in every layer. `PackedSegments` carries the same tensors (Transformer Engine reads those) and beside them
the lengths as Python integers, the positions of the tokens, and the index tensors of context parallelism, all made once.

Context parallelism is zigzag: a segment is cut into `2 * cp` equal pieces and rank `r` holds pieces `r` and `2 * cp - 1 - r`, so
that every rank has the same share of the causal triangle.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSegments(PackedSeqParams):
    """Megatron's packed-sequence parameters and their host-side twin.

    Attributes:
        segment_lengths: tokens of every segment, whole segments also under context parallelism.
        position_ids: `[T_local]` int64, position of this rank's tokens in their segment.
        cp_rank, cp_size: which zigzag pieces of every segment are here.
        cp_index: `[T_local]` int64, this rank's tokens in the whole micro-batch; None without context parallelism.
        cp_restore: `[T]` int64, where each token of the micro-batch lies in the rank-major gathered keys; None likewise.
        rotary: cosine and sine for `position_ids`, set by the model once per forward pass.
        cache: the key-value cache during generation (`generation.cache.Pass`), else None.
    """

    segment_lengths: tuple[int, ...] = ()
    position_ids: torch.Tensor | None = None
    cp_rank: int = 0
    cp_size: int = 1
    cp_index: torch.Tensor | None = None
    cp_restore: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    cache: object | None = None

    @property
    def total(self) -> int:
        """Tokens of the micro-batch over all context-parallel ranks."""
        return sum(self.segment_lengths)

    def for_megatron(self) -> PackedSeqParams:
        """Megatron's own fields only: Transformer Engine's wrapper passes every field on as a keyword."""
        return PackedSeqParams(**{field.name: getattr(self, field.name) for field in fields(PackedSeqParams)})


def zigzag_positions(length: int, rank: int, size: int) -> np.ndarray:
    """Positions of a segment of `length` tokens that context-parallel rank `rank` of `size` holds, `[length / size]`.

    Raises:
        ValueError: `length` is not a multiple of `2 * size`.
    """
    if size == 1:
        return np.arange(length)
    if length % (2 * size):
        raise ValueError(
            f"a segment of {length} tokens cannot be cut over {size} context-parallel ranks: pad it to a multiple of {2 * size}"
        )
    piece = length // (2 * size)
    first, second = rank * piece, (2 * size - 1 - rank) * piece
    return np.concatenate([np.arange(first, first + piece), np.arange(second, second + piece)])


def pack_segments(
    segment_lengths: tuple[int, ...] | list[int], device: torch.device | str = "cpu", cp_size: int = 1, cp_rank: int = 0
) -> PackedSegments:
    """Describe segments packed back to back.

    Args:
        segment_lengths: tokens of every segment, each at least 1, a multiple of `2 * cp_size` if that is above 1.
        device: where the tensors go; from pinned memory and without waiting, if it is a GPU.
        cp_size, cp_rank: context-parallel size and this process's rank in it.

    Raises:
        ValueError: no segment, an empty one, or one that context parallelism cannot cut.
    """
    lengths = tuple(int(length) for length in segment_lengths)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"segment lengths must be at least one and positive, got {lengths}")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    local = [zigzag_positions(length, cp_rank, cp_size) for length in lengths]
    cu_seqlens = _to_device(starts.astype(np.int32), device)
    packed = PackedSegments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        segment_lengths=lengths,
        position_ids=_to_device(np.concatenate(local), device),
        cp_rank=cp_rank,
        cp_size=cp_size,
    )
    if cp_size > 1:
        by_rank = [
            np.concatenate([start + zigzag_positions(n, rank, cp_size) for start, n in zip(starts[:-1], lengths, strict=True)])
            for rank in range(cp_size)
        ]
        packed.cp_index = _to_device(by_rank[cp_rank], device)
        packed.cp_restore = _to_device(np.argsort(np.concatenate(by_rank)), device)
    return packed


def _to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

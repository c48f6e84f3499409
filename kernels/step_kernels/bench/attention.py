"""Cases of packed attention: beside SDPA padded, a loop of SDPA over the segments, flex_attention, and libraries on a GPU.

The loop is what the trainer would do without the op and the one to beat: at least 1.2 times as fast, forward and with the
backward pass; faster than everybody else.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_kernels import audio_attention_varlen, causal_attention_varlen
from step_kernels.bench import lengths as real
from step_kernels.bench.contestants import backend, forward_backward, forward_only, ours
from step_kernels.bench.harness import Absent, Case, Contestant, Work
from step_kernels.segments import cumulative

_LOOP, _OTHERS = 1.2, 1.0
_HEADS, _DIM = 8, 64
# Query heads of a key-value head in the causal cases, as in Qwen2.5.
_GROUP = 4


class _Packed:
    """Packed query, key and value, and the same padded."""

    def __init__(
        self, lengths: list[int], causal: bool, backward: bool, device: torch.device, dtype: torch.dtype, dim: int = _DIM
    ):
        self.lengths, self.causal, self.longest = lengths, causal, max(lengths)
        self.cu_seqlens = cumulative(lengths, device)
        generator = torch.Generator().manual_seed(0)
        kv_heads = _HEADS // _GROUP if causal else _HEADS
        query, key, value, self.gradient = (
            torch.randn(sum(lengths), heads, dim, generator=generator).to(device, dtype)
            for heads in (_HEADS, kv_heads, kv_heads, _HEADS)
        )
        self.leaves = [part.requires_grad_(backward) for part in (query, key, value)]
        self.inside = torch.arange(self.longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        self.places = self.inside.flatten().nonzero().squeeze(1)
        self.segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def shape(self) -> str:
        """As tables show it."""
        heads = f"{_HEADS}/{_HEADS // _GROUP}" if self.causal else str(_HEADS)
        passes = "forward + backward" if self.leaves[0].requires_grad else "forward"
        return f"{real.named(self.lengths)} x {heads} x {self.leaves[0].shape[2]}, {passes}"

    def op(self) -> torch.Tensor:
        return self._op()(*self.leaves, self.cu_seqlens, self.lengths)

    def _op(self) -> Callable:
        return causal_attention_varlen if self.causal else audio_attention_varlen

    def loop(self) -> torch.Tensor:
        """One SDPA call a segment; `split` and `cat`, so that no gradient is as long as the pack."""
        outputs = []
        for q, k, v in zip(*(part.split(self.lengths) for part in self.leaves), strict=True):
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.causal)
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def padded(self) -> Callable[[], torch.Tensor]:
        """SDPA over a batch that is padded to its longest segment; padding and unpadding are not part of the work."""
        mask = self.inside[:, None, None, :]
        if self.causal:
            mask = mask & torch.ones(self.longest, self.longest, dtype=torch.bool, device=mask.device).tril()
        held = []
        for part in (*self.leaves, self.gradient):
            full = part.new_zeros(len(self.lengths) * self.longest, *part.shape[1:]).index_copy_(0, self.places, part.detach())
            held.append(full.unflatten(0, (len(self.lengths), self.longest)).transpose(1, 2))
        self.padded_leaves, self.padded_gradient = (
            [part.requires_grad_(self.leaves[0].requires_grad) for part in held[:3]],
            held[3],
        )

        def run():
            return scaled_dot_product_attention(*self.padded_leaves, attn_mask=mask, enable_gqa=self.causal)

        return run

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of a padded result, packed."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places)

    def flex(self) -> Callable[[], torch.Tensor]:
        """flex_attention over the pack with a mask of segments, compiled."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        segment, causal = self.segment, self.causal

        def same(batch, head, query, key):
            inside = segment[query] == segment[key]
            return inside & (query >= key) if causal else inside

        total = sum(self.lengths)
        blocks = create_block_mask(same, None, None, total, total, device=str(self.cu_seqlens.device))
        fast = torch.compile(flex_attention, dynamic=False)

        def run():
            q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in self.leaves)
            return fast(q, k, v, block_mask=blocks, enable_gqa=causal).squeeze(0).transpose(0, 1)

        return run

    def alone(self) -> bool:
        """Whether the first segments come out with the same bits in the pack and by themselves, two at a time."""
        with torch.no_grad():
            whole = self.op()
            for first in range(min(4, len(self.lengths))):
                begin, lengths = sum(self.lengths[:first]), self.lengths[first : first + 2]
                rows = slice(begin, begin + sum(lengths))
                bounds = cumulative(lengths, self.cu_seqlens.device)
                if not torch.equal(self._op()(*(part[rows] for part in self.leaves), bounds, lengths), whole[rows]):
                    return False
        return True


def _case(op: str, registered: str, packed: _Packed, backward: bool, device: torch.device) -> Case:
    def both(function) -> Work:
        return forward_backward(function, packed.leaves, packed.gradient)

    def padded() -> Work:
        run = packed.padded()
        return forward_backward(run, packed.padded_leaves, packed.padded_gradient) if backward else forward_only(run)

    def flex() -> Work:
        if backward and device.type == "cpu":
            raise Absent("has no backward pass on a CPU")
        work = wrap(packed.flex())
        try:
            work()
        except (torch._dynamo.exc.BackendCompilerFailed, torch._inductor.exc.InductorError, NotImplementedError) as error:
            raise Absent(f"does not compile: {str(error).splitlines()[0]}") from error
        return work

    wrap = both if backward else forward_only
    contestants = [
        *ours(registered, wrap(packed.op), device),
        Contestant("SDPA, loop of segments", lambda: wrap(packed.loop), _LOOP),
        Contestant("SDPA, padded", padded, _OTHERS, comparable=packed.unpad),
        Contestant("flex_attention", flex, _OTHERS),
        backend("flash-attn", registered, "flash", wrap(packed.op), device),
        backend("Transformer Engine", registered, "te", wrap(packed.op), device),
    ]
    return Case(op, packed.shape(), contestants, tolerance=1e-3 if device.type == "cpu" else 2e-2)


def _cases(op: str, registered: str, causal: bool) -> Callable[[torch.device], list[Case]]:
    def make(device: torch.device) -> list[Case]:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [
            _case(op, registered, _Packed(lengths, causal, backward, device, dtype), backward, device)
            for lengths in (real.asterisk(), real.uniform())
            for backward in (False, True)
        ]

    return make


# The op behind each name and whether its mask is causal.
OPS = {"audio-attention": ("audio_attention_varlen", False), "causal-attention": ("causal_attention_varlen", True)}
CASES = {op: _cases(op, registered, causal) for op, (registered, causal) in OPS.items()}
# Head dimensions that a choice is made for.
DIMS = (64, 128)


def choice_cases(
    op: str, names: Sequence[str], device: torch.device, dtype: torch.dtype, dim: int
) -> Iterator[tuple[Case, Callable[[], bool]]]:
    """What a choice between the backends `names` is measured by, each case with a function that says whether a segment's bits
    depend on itself alone."""
    registered, causal = OPS[op]
    for lengths in (real.asterisk(), real.uniform()):
        for backward in (False, True):
            packed = _Packed(lengths, causal, backward, device, dtype, dim)
            work = forward_backward(packed.op, packed.leaves, packed.gradient) if backward else forward_only(packed.op)
            contestants = [backend(name, registered, name, work, device) for name in names]
            yield (
                Case(op, f"{packed.shape()}, {dtype}", contestants, tolerance=1e-3 if dtype == torch.float32 else 2e-2),
                packed.alone,
            )

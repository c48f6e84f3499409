"""Cases of packed attention: beside SDPA padded, a loop of SDPA over the segments, flex_attention, and libraries on a GPU.

The loop is what the trainer would do without the op and the one to beat: at least 1.2 times as fast, forward and with the
backward pass; faster than everybody else.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from step_kernels import audio_attention_varlen, causal_attention_varlen
from step_kernels.bench import lengths as real
from step_kernels.bench.contestants import forward_backward, forward_only, library, ours
from step_kernels.bench.harness import Absent, Case, Contestant, Work
from step_kernels.segments import cumulative

_LOOP, _OTHERS = 1.2, 1.0
_HEADS, _DIM = 8, 64
# Query heads of a key-value head in the causal cases, as in Qwen2.5.
_GROUP = 4


class _Packed:
    """Packed query, key and value, and the same padded."""

    def __init__(self, lengths: list[int], causal: bool, backward: bool, device: torch.device, dtype: torch.dtype):
        self.lengths, self.causal, self.longest = lengths, causal, max(lengths)
        self.cu_seqlens = cumulative(lengths, device)
        generator = torch.Generator().manual_seed(0)
        kv_heads = _HEADS // _GROUP if causal else _HEADS
        query, key, value, self.gradient = (
            torch.randn(sum(lengths), heads, _DIM, generator=generator).to(device, dtype)
            for heads in (_HEADS, kv_heads, kv_heads, _HEADS)
        )
        self.leaves = [part.requires_grad_(backward) for part in (query, key, value)]
        self.inside = torch.arange(self.longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        self.places = self.inside.flatten().nonzero().squeeze(1)
        self.segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)

    def op(self) -> torch.Tensor:
        op = causal_attention_varlen if self.causal else audio_attention_varlen
        return op(*self.leaves, self.cu_seqlens, self.lengths)

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

    def flash(self) -> Work:
        from flash_attn import flash_attn_varlen_func

        def run():
            bounds, longest = self.cu_seqlens, self.longest
            return flash_attn_varlen_func(*self.leaves, bounds, bounds, longest, longest, causal=self.causal)

        return run

    def transformer_engine(self) -> Work:
        from transformer_engine.pytorch import DotProductAttention

        mask = "padding_causal" if self.causal else "padding"
        attend = DotProductAttention(
            _HEADS, _DIM, num_gqa_groups=self.leaves[1].shape[1], qkv_format="thd", attn_mask_type=mask, attention_dropout=0.0
        )

        def run():
            bounds, longest = self.cu_seqlens, self.longest
            out = attend(*self.leaves, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
            return out.view_as(self.leaves[0])

        return run


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
        library("flash-attn", "flash_attn", lambda: wrap(packed.flash()), device),
        library("Transformer Engine", "transformer_engine", lambda: wrap(packed.transformer_engine()), device),
    ]
    heads = f"{_HEADS}/{_HEADS // _GROUP}" if packed.causal else str(_HEADS)
    shape = f"{real.named(packed.lengths)} x {heads} x {_DIM}, {'forward + backward' if backward else 'forward'}"
    return Case(op, shape, contestants, tolerance=1e-3 if device.type == "cpu" else 2e-2)


def _cases(op: str, registered: str, causal: bool) -> Callable[[torch.device], list[Case]]:
    def make(device: torch.device) -> list[Case]:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return [
            _case(op, registered, _Packed(lengths, causal, backward, device, dtype), backward, device)
            for lengths in (real.asterisk(), real.uniform())
            for backward in (False, True)
        ]

    return make


CASES = {
    "audio-attention": _cases("audio-attention", "audio_attention_varlen", causal=False),
    "causal-attention": _cases("causal-attention", "causal_attention_varlen", causal=True),
}

"""Stand-ins for flash-attn and Transformer Engine, which run on GPUs only: their documented signatures, layouts and results.

They compute with plain torch, segment by segment, and are strict where the libraries are: dtypes, contiguous heads, int32 bounds
that end at the tensors' rows, no segment without a token. What they prove is that the adapters say the right thing, not that the
libraries do: nothing here was run on a GPU.
"""

import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

import torch
from step_kernels import attention_libraries, registry

HALF = (torch.float16, torch.bfloat16)


def _attend(q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale, causal):
    """`[tokens, heads, dim]` in q's dtype and the log-sum-exp `[heads, tokens]`; causal masks end in the lower right corner."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in HALF and {part.stride(-1) for part in (q, k, v)} == {1}
    outputs, sums = [], []
    for bounds, rows, longest in ((bounds_q, q, longest_q), (bounds_k, k, longest_k)):
        assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(rows)
        assert type(longest) is int and bounds.diff().max() == longest and bounds.diff().min() > 0
    group = q.shape[1] // k.shape[1]
    for begin_q, end_q, begin_k, end_k in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        rows = q[begin_q:end_q].float()
        keys, values = (part[begin_k:end_k].float().repeat_interleave(group, 1) for part in (k, v))
        scores = scale * torch.einsum("qhd,khd->hqk", rows, keys)
        if causal:
            future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(keys) - len(rows))
            scores = scores.masked_fill(future, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).to(q.dtype))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(sums, 1)


def _flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    out, lse = _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    # As in the library: a gradient of the log-sum-exp goes nowhere.
    return (out, lse.detach(), None) if return_attn_probs else out


def _flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
    num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    out, lse = _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
    return (out, lse.detach()) if return_attn_probs else out


class _DotProductAttention(torch.nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd",
        attn_mask_type="causal", window_size=None, attention_type="self", softmax_scale=None,
    ):  # fmt: skip
        super().__init__()
        assert qkv_format == "thd" and attn_mask_type in ("padding", "padding_causal") and attention_dropout == 0.0
        self.sizes = (num_attention_heads, kv_channels), (num_gqa_groups, kv_channels)
        self.causal, self.cross, self.scale = attn_mask_type == "padding_causal", attention_type == "cross", softmax_scale

    def forward(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None,
        cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None,
    ):  # fmt: skip
        assert (query_layer.shape[1:], key_layer.shape[1:]) == self.sizes
        assert self.cross or torch.equal(cu_seqlens_q, cu_seqlens_kv)
        bounds = cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv
        out, _ = _attend(query_layer, key_layer, value_layer, *bounds, self.scale, self.causal)
        return out.flatten(1)


def _module(name: str, version: str | None = None, **content) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    if version:
        module.__version__ = version
    vars(module).update(content)
    return module


STAND_INS = {
    "flash-attn 2": {"flash_attn": _module("flash_attn", "2.8.4", flash_attn_varlen_func=_flash_attn_2)},
    "flash-attn 3": {"flash_attn_interface": _module("flash_attn_interface", flash_attn_varlen_func=_flash_attn_3)},
    "te": {
        "transformer_engine": _module("transformer_engine", "2.9.0"),
        "transformer_engine.pytorch": _module("transformer_engine.pytorch", DotProductAttention=_DotProductAttention),
    },
}


@contextlib.contextmanager
def installed(*names: str, **modules: ModuleType | None) -> Iterator[None]:
    """Make libraries look installed and run on a CPU: those of `STAND_INS` named, and `modules`; no others are there."""
    absent = dict.fromkeys(name for stand_in in STAND_INS.values() for name in stand_in)
    here = absent | {name: module for each in names for name, module in STAND_INS[each].items()} | modules
    # Not mock.patch.dict: it would also take away what torch imports meanwhile, and that is slow to import anew.
    before = {name: sys.modules.get(name) for name in here}
    sys.modules.update(here)
    _forget()
    try:
        with mock.patch.dict(registry._DEVICE, {"flash": "cpu", "te": "cpu"}):
            yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        _forget()


def _forget() -> None:
    for cached in (attention_libraries.load_error, attention_libraries._module, attention_libraries._te_attention):
        cached.cache_clear()

"""Ops of step-megatron over packed segments, usable with torch alone (no Megatron).

Every op is one file that begins with its definition in plain torch; other backends (C++, Triton, CUDA) are tested against it.
Packed means: segments lie back to back along the first dimension, never padded. `cu_seqlens` (`[segments + 1]` int32, on the
data's device) says where they begin; what the host must know (output rows, lengths) is passed beside it, so that no op ever waits
for the device.
"""

from step_kernels.audio_attention import audio_attention_varlen
from step_kernels.causal_attention import causal_attention_varlen
from step_kernels.conv_downsample import conv_downsample_gelu
from step_kernels.draw_tokens import draw_tokens
from step_kernels.fused_downsample import fused_downsample
from step_kernels.gae import gae_varlen
from step_kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs
from step_kernels.merge_audio import merge_audio_embeddings, merge_audio_embeddings_
from step_kernels.paged_attention import paged_attention
from step_kernels.pool_norm_downsample import pool_norm_downsample
from step_kernels.registry import available_backends, backends_of, registered
from step_kernels.rms_norm import rms_norm
from step_kernels.rope_qk import rope_qk
from step_kernels.rope_to_cache import rope_to_cache
from step_kernels.skinny_linear import skinny_linear, skinny_linear_add_
from step_kernels.swiglu import swiglu

__all__ = [
    "audio_attention_varlen",
    "available_backends",
    "backends_of",
    "causal_attention_varlen",
    "conv_downsample_gelu",
    "draw_tokens",
    "fused_downsample",
    "gae_varlen",
    "linear_cross_entropy",
    "linear_log_probs",
    "merge_audio_embeddings",
    "merge_audio_embeddings_",
    "paged_attention",
    "pool_norm_downsample",
    "registered",
    "rms_norm",
    "rope_qk",
    "rope_to_cache",
    "skinny_linear",
    "skinny_linear_add_",
    "swiglu",
]

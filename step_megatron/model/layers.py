"""Which modules a decoder layer is made of: Megatron's layer specification with this project's norm and attention.

`torch`: Megatron's own column- and row-parallel linear layers, `RMSNorm` and `PackedCausalAttention`; runs anywhere.
`te`: Transformer Engine's fused layers on a GPU, with the same rotary embedding and the same cache in generation. Transformer
Engine is imported here only when it is asked for: beside a CPU build of torch its mere presence breaks Megatron-Core.
"""

import importlib.util
from typing import Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from step_kernels import rms_norm

from step_megatron.model.attention import PackedCausalAttention

LayerKind = Literal["torch", "te"]


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm that tells Megatron when its input is split over tensor-parallel ranks.

    Under sequence parallelism each rank sees only its tokens, so the weight's gradient has to be summed over the tensor-parallel
    group; Megatron does so for parameters marked `sequence_parallel`, and its own torch norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` in, the same out."""
        return rms_norm(x, self.weight, self.eps)


def layer_kind(wanted: Literal["auto", "torch", "te"]) -> LayerKind:
    """The kind of layers that `config.model.layers` means on this machine.

    Raises:
        RuntimeError: `te` is asked for without a GPU or without Transformer Engine.
    """
    possible = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "te" and not possible:
        raise RuntimeError(
            "model.layers=te needs a CUDA GPU and Transformer Engine (pip install 'step-megatron[cuda]'); use model.layers=torch"
        )
    if wanted == "auto":
        return "te" if possible else "torch"
    return wanted


def layer_specification(config: TransformerConfig, kind: LayerKind, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Submodules of one pipeline stage (or virtual chunk) of the decoder.

    Args:
        config: Megatron's configuration; the number of layers here follows from it and from the stage.
        kind: see the module's docstring.
        vp_stage: virtual pipeline chunk, None without virtual stages.
    """
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    if kind == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        from step_megatron.model.attention_te import TransformerEngineAttention

        spec = get_gpt_layer_with_transformer_engine_spec()
        spec.submodules.self_attention.submodules.core_attention = TransformerEngineAttention
        return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=TENorm)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedCausalAttention
    # The local spec renames its norms in checkpoints to Transformer Engine's fused names: one checkpoint serves both kinds.
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)

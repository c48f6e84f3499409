"""Which modules a decoder layer is made of: Megatron's layer specification with this project's norm and attention.

`torch`: Megatron's own column- and row-parallel linear layers, `RMSNorm` and `PackedCausalAttention`; runs anywhere.
`te`: Transformer Engine's fused layers on a GPU, with the same rotary embedding and the same cache in generation. Transformer
Engine is imported here only when it is asked for: beside a CPU build of torch its mere presence breaks Megatron-Core.
"""

import importlib.util
from typing import Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from step_kernels import rms_norm, swiglu
from torch.nn.functional import silu

from step_megatron.config.schema import LoRAConfig
from step_megatron.model.attention import PackedCausalAttention
from step_megatron.model.lora import adapt_specification

LayerKind = Literal["torch", "te"]


class GatedMLP(MLP):
    """Megatron's feed-forward part with the gate in one op, where Megatron would run torch's operators one by one.

    The op is one pass by C++ on a CPU, and torch's operators on a GPU. There, `megatron.transformer.bias_activation_fusion=true`
    in a recipe keeps Megatron's part with its own fusion (not run on a GPU); no recipe here sets it.
    """

    @classmethod
    def adopt(cls, model: torch.nn.Module) -> None:
        """Make those parts of a model that are plain gated SiLU of this class (built by another, they lack Megatron's groups)."""
        for part in model.modules():
            if type(part) is not MLP:
                continue
            config = part.config
            plain = config.gated_linear_unit and config.activation_func is silu and not config.add_bias_linear
            fused = config.bias_activation_fusion or config.use_te_activation_func
            if plain and not fused and config.activation_func_clamp_value is None and not config.glu_linear_offset:
                part.__class__ = cls

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_):
        """`[tokens, 1, width]` in, the same out and no bias; a scale of each token's activation as Megatron applies it."""
        hidden = swiglu(self.linear_fc1(hidden_states)[0])
        return self.linear_fc2(hidden if per_token_scale is None else (hidden * per_token_scale[..., None]).to(hidden.dtype))


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


def layer_kind(wanted: Literal["auto", "torch", "te"], adapted: bool = False) -> LayerKind:
    """The kind of layers that `config.model.layers` means on this machine.

    Args:
        adapted: layers with LoRA, which only the torch layers have.

    Raises:
        RuntimeError: `te` is asked for with LoRA, without a GPU or without Transformer Engine.
    """
    if adapted:
        if wanted == "te":
            raise RuntimeError("model.layers=te has no LoRA (model.lora.rank above 0); use model.layers=torch")
        return "torch"
    possible = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "te" and not possible:
        raise RuntimeError(
            "model.layers=te needs a CUDA GPU and Transformer Engine (pip install 'step-megatron[cuda]'); use model.layers=torch"
        )
    if wanted == "auto":
        return "te" if possible else "torch"
    return wanted


def layer_specification(
    config: TransformerConfig, kind: LayerKind, vp_stage: int | None = None, lora: LoRAConfig | None = None
) -> TransformerBlockSubmodules:
    """Submodules of one pipeline stage (or virtual chunk) of the decoder.

    Args:
        config: Megatron's configuration; the number of layers here follows from it and from the stage.
        kind: see the module's docstring.
        vp_stage: virtual pipeline chunk, None without virtual stages.
        lora: adapters of the torch layers; none where its rank is 0.
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
    if lora is not None and lora.rank:
        adapt_specification(spec, lora)
    # The local spec renames its norms in checkpoints to Transformer Engine's fused names: one checkpoint serves both kinds.
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)

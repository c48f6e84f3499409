"""Names and tensor-parallel shards of the decoder's parameters, and their values at the start of training.

A parameter has one *full name* in every layout: that of the torch layers in a model of one stage, with the layer's number over
the whole model. Values at the start are drawn per full name, so that every layout starts from the same model.
"""

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig

from step_megatron.model import lora
from step_megatron.runtime import seeds

# Parameters that tensor parallelism cuts, and the dimension it cuts; all others are whole on every rank.
_CUT = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_fc1.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc2.weight": 1,
    "linear_qkv.lora_B": 0,
    "linear_fc1.lora_B": 0,
    "linear_proj.lora_A": 1,
    "linear_fc2.lora_A": 1,
}
# Transformer Engine fuses a norm into the linear layer behind it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Their rows are token ids.
_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")


def cut_dimension(name: str) -> int | None:
    """Dimension that tensor parallelism cuts of the parameter with this full name, None if it is whole on every rank."""
    return _CUT.get(".".join(name.split(".")[-2:]))


def shard(name: str, full: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Rank `rank`'s part of a full parameter.

    Gate and up halves of `linear_fc1` are cut separately, so each rank has both; a vocabulary is padded with zeros.
    """
    dimension = cut_dimension(name)
    if dimension is None or size == 1:
        return full
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    if name.endswith(_VOCABULARY):
        full = F.pad(full, (0, 0, 0, padded_vocabulary(full.shape[0], size) - full.shape[0]))
    return full.chunk(size, dim=dimension)[rank]


def padded_vocabulary(rows: int, size: int) -> int:
    """Rows of the embeddings with the padding that `size` tensor-parallel ranks need."""
    return -(-rows // size) * size


def merge(name: str, shards: list[torch.Tensor]) -> torch.Tensor:
    """The full parameter from the parts of all tensor-parallel ranks, in rank order; the inverse of `shard`, padding included."""
    dimension = cut_dimension(name)
    if dimension is None or len(shards) == 1:
        return shards[0]
    if "linear_fc1" in name:
        gates, ups = zip(*(part.chunk(2) for part in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards, dim=dimension)


def full_names(model: torch.nn.Module) -> dict[str, str]:
    """Full name of every parameter of one model chunk, by its name in `named_parameters()`.

    With tied embeddings the last pipeline stage holds a copy of the first stage's; both have the embeddings' name, so that what
    is drawn, loaded or frozen by name is so on both stages.

    Args:
        model: an `AudioLanguageModel` or a `GPTModel`, not wrapped.
    """
    decoder = next(module for name, module in model.named_modules() if name.split(".")[-1] == "decoder")
    numbers = [layer.layer_number - 1 for layer in decoder.layers]
    tied = model.share_embeddings_and_output_weights
    names = {}
    for name, _ in model.named_parameters():
        full = _LAYER.sub(lambda match: str(numbers[int(match.group())]), name)
        for fused, plain in _FUSED_NORMS.items():
            full = full.replace(fused, plain)
        names[name] = full.replace("output_layer.", "embedding.word_embeddings.") if tied else full
    return names


def without_layer_number(name: str) -> str:
    """The full name with `N` for the layer's number."""
    return _LAYER.sub("N", name)


def initialize(language_model: torch.nn.Module, seed: int, vocabulary: int) -> None:
    """Set the weights of one decoder chunk: normal with Megatron's `init_method_std`, zero biases, unit norms, LoRA at zero.

    Projections back into the residual stream have the standard deviation `init_method_std / sqrt(2 * num_layers)`, as in GPT-2
    and Megatron. Every parameter has a generator of its own, seeded by its full name. Parameters on the meta device are skipped.

    Args:
        vocabulary: rows of the embeddings without their padding.
    """
    config = language_model.config
    rank, size = parallel_state.get_tensor_model_parallel_rank(), config.tensor_model_parallel_size
    names = full_names(language_model)
    with torch.no_grad():
        for local, parameter in language_model.named_parameters():
            name = names[local]
            _mark(parameter, cut_dimension(name))
            if parameter.is_meta:
                continue
            if name.endswith(("bias", lora.B)):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                shape = list(parameter.shape)
                if (dimension := cut_dimension(name)) is not None:
                    shape[dimension] *= size
                if name.endswith(_VOCABULARY):
                    shape[0] = vocabulary
                parameter.copy_(shard(name, _draw(config, name, shape, parameter.device, seed), rank, size))


def _draw(config: TransformerConfig, name: str, shape: list[int], device: torch.device, seed: int) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seeds.derive(seed, name))
    if name.endswith(lora.A):
        # As peft draws it: Kaiming's uniform distribution with a = sqrt(5).
        return torch.empty(shape, device=device).uniform_(-1, 1, generator=generator) / shape[1] ** 0.5
    std = config.init_method_std
    if "linear_proj" in name or "linear_fc2" in name:
        std /= (2 * config.num_layers) ** 0.5
    return torch.randn(shape, generator=generator, device=device) * std


def _mark(parameter: torch.nn.Parameter, dimension: int | None) -> None:
    """Tell Megatron's gradient norm which parameters are shards; it does so itself only when it draws the weights itself."""
    if dimension is not None:
        parameter.tensor_model_parallel = True
        parameter.partition_dim = dimension
        parameter.partition_stride = 1
    set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)


def load(model_chunks: Iterable[torch.nn.Module], weights: dict[str, torch.Tensor]) -> None:
    """Copy full parameters into this rank's shards.

    Args:
        model_chunks: chunks of an `AudioLanguageModel` or `GPTModel`, not wrapped.
        weights: full tensors by full name; names that no chunk here has are other stages' business.

    Raises:
        KeyError: a parameter of a chunk that `weights` lacks.
        ValueError: a shape that does not fit.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for chunk in model_chunks:
            names = full_names(chunk)
            for local, parameter in chunk.named_parameters():
                name = names[local]
                if name not in weights:
                    raise KeyError(f"no weights for parameter {name}")
                part = shard(name, weights[name], rank, size)
                if part.shape != parameter.shape:
                    raise ValueError(
                        f"{name}: the model has shape {tuple(parameter.shape)} here, the weights {tuple(part.shape)}"
                    )
                parameter.copy_(part)

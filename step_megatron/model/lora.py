"""Low-rank adapters (LoRA) beside the decoder's frozen linear layers: y = W x + (alpha / rank) B A x.

A is drawn, B begins at zero, so an adapted model begins as its base. The adapters are parameters of Megatron's own parallel
layers (subclasses, placed by the layer specification), so names and checkpoints of the base stay as they are without them:

    column-parallel (linear_qkv, linear_fc1)     A whole on every rank, B cut with the weight's rows
    row-parallel (linear_proj, linear_fc2)       A cut with the weight's columns, B whole

Only `rank` columns are communicated. `peft`'s own layer for Megatron (`LoraParallelLinear`, 0.21) cannot be made with
Megatron-Core 0.16, takes its layers' results for tensors where they are pairs, and knows neither sequence parallelism nor sharded
checkpoints; what is trained here is written in peft's format instead (`conversion.adapter`).

Source: Hu et al., LoRA (arXiv:2106.09685).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from step_megatron.config.schema import LoRAConfig

# As `torch.nn.functional.linear`: input, weight, bias.
Linear = Callable[..., torch.Tensor]

# The adapter's parameters, as peft calls them.
A, B = "lora_A", "lora_B"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def check(config: LoRAConfig) -> None:
    """Refuse settings that make no adapter.

    Raises:
        ValueError: names the key.
    """
    if config.rank < 0 or config.alpha <= 0:
        raise ValueError(f"model.lora: rank={config.rank} (0 or more) and alpha={config.alpha} (above 0) are out of range")
    if config.dropout:
        raise ValueError(f"model.lora.dropout={config.dropout}: dropout is not supported; set it to 0")
    if config.rank and not config.targets:
        raise ValueError("model.lora.targets is empty: name the layers that get an adapter, or set model.lora.rank=0")


class Adapted:
    """What both kinds of layers share; `lora_enabled` says whether the adapter takes part."""

    # The dimension of each parameter that tensor parallelism cuts.
    cut: dict[str, int]

    def _adapt(self, config: LoRAConfig) -> None:
        rows, columns = self.weight.shape
        self.lora_A = torch.nn.Parameter(self.weight.new_empty(config.rank, columns))
        self.lora_B = torch.nn.Parameter(self.weight.new_empty(rows, config.rank))
        self.lora_scale = config.alpha / config.rank
        self.lora_enabled = True

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron's description of the layer for checkpoints, with the adapter's cut."""
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.cut,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if prefix.endswith("linear_fc1."):
            # Gate and up halves are cut separately; Megatron's feed-forward part sees to the weight.
            state[prefix + B] = apply_swiglu_sharded_factory(
                state[prefix + B], sharded_offsets, metadata["singleton_local_shards"]
            )
        return state


class AdaptedColumnLinear(Adapted, ColumnParallelLinear):
    """Megatron's column-parallel layer with an adapter."""

    cut = {"weight": 0, "bias": 0, B: 0}

    def __init__(self, *args: Any, lora: LoRAConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._adapt(lora)
        # Under sequence parallelism a rank multiplies its own tokens: Megatron sums the gradient over the ranks.
        self.lora_A.sequence_parallel = self.sequence_parallel

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[tokens (/ tp with sequence parallelism), 1, inputs]` in, `[tokens, 1, outputs / tp]` and Megatron's bias out."""
        output, bias = super().forward(input_, weight, runtime_gather_output)
        if not self.lora_enabled:
            return output, bias
        hidden = F.linear(input_, self.lora_A)
        share = gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        return torch.add(output, F.linear(share(hidden, group=self.tp_group), self.lora_B), alpha=self.lora_scale), bias


class AdaptedRowLinear(Adapted, RowParallelLinear):
    """Megatron's row-parallel layer with an adapter."""

    cut = {"weight": 1, A: 1}

    def __init__(self, *args: Any, lora: LoRAConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._adapt(lora)
        self.lora_B.sequence_parallel = self.sequence_parallel

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[tokens, 1, inputs / tp]` in, `[tokens (/ tp with sequence parallelism), 1, outputs]` and Megatron's bias out."""
        output, bias = super().forward(input_)
        if not self.lora_enabled:
            return output, bias
        split = self.sequence_parallel
        reduce = reduce_scatter_to_sequence_parallel_region if split else reduce_from_tensor_model_parallel_region
        hidden = reduce(F.linear(input_, self.lora_A), group=self.tp_group)
        return torch.add(output, F.linear(hidden, self.lora_B), alpha=self.lora_scale), bias


_LAYERS = {
    "linear_qkv": AdaptedColumnLinear,
    "linear_proj": AdaptedRowLinear,
    "linear_fc1": AdaptedColumnLinear,
    "linear_fc2": AdaptedRowLinear,
}


def adapt_specification(layer: ModuleSpec, config: LoRAConfig) -> None:
    """Put adapted layers for Megatron's own into the specification of a decoder layer."""
    for name in config.targets:
        part = layer.submodules.self_attention if name in ("linear_qkv", "linear_proj") else layer.submodules.mlp
        setattr(part.submodules, name, ModuleSpec(module=_LAYERS[name], params={"lora": config}))


def freeze_base(language_model: torch.nn.Module) -> None:
    """Train the adapters of a decoder alone."""
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


@contextmanager
def adapters_off(*models: torch.nn.Module) -> Iterator[None]:
    """Inside, the models are their base: the reference policy of a run that trains adapters."""
    layers = [module for model in models for module in model.modules() if isinstance(module, Adapted) and module.lora_enabled]
    for layer in layers:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_enabled = True


def local_product(layer: torch.nn.Module, linear: Linear = F.linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """`[rows, inputs here] -> [rows, outputs here]` without communication: of a row-parallel layer (without bias), what its ranks
    have to sum.

    Whether the adapter is on is read at each call; `linear` multiplies with a weight.
    """
    plain = partial(linear, weight=layer.weight, bias=layer.bias)
    if not isinstance(layer, Adapted):
        return plain

    def adapted(x: torch.Tensor) -> torch.Tensor:
        if not layer.lora_enabled:
            return plain(x)
        # A sum over ranks of B (A x) is B of the sum: nothing to reduce in between.
        return torch.add(plain(x), linear(linear(x, layer.lora_A), layer.lora_B), alpha=layer.lora_scale)

    return adapted


def merge(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, config: LoRAConfig) -> torch.Tensor:
    """The weight that computes what weight and adapter compute, in the weight's type: `weight + alpha / rank * up @ down`."""
    return torch.addmm(weight.float(), up.float(), down.float(), alpha=config.alpha / config.rank).to(weight.dtype)

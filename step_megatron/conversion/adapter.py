"""LoRA adapters of a run: merged into the weights that are exported, or alone in the format of peft.

    OUT/adapter_model.safetensors, adapter_config.json

peft has an adapter for each of query, key and value, and for gate and up, where one of ours serves the whole matrix: they share
A, and B is cut like the weight. `peft.PeftModel.from_pretrained(model, OUT)` adds them to the decoder that the run started from,
in transformers' `Qwen2ForCausalLM` or `LlamaForCausalLM`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from step_megatron.checkpoint.safetensors_files import TensorInfo, write_safetensors
from step_megatron.checkpoint.streamed import WeightsReader
from step_megatron.config.schema import Config, LoRAConfig
from step_megatron.conversion.importing import LANGUAGE_MODEL, meta_model
from step_megatron.conversion.provenance import history
from step_megatron.conversion.sources import ConversionError
from step_megatron.model.decoder import transformer_config
from step_megatron.model.huggingface import decoder_entries
from step_megatron.model.lora import A, B, merge
from step_megatron.runtime.folders import whole_folder

Read = Callable[[str], torch.Tensor]


def reading_merged(reader: WeightsReader, config: LoRAConfig) -> Read:
    """Reads parameters by full name, an adapted one with its adapter merged into it."""

    def read(name: str) -> torch.Tensor:
        layer = name.removesuffix("weight")
        if layer + A not in reader.tensors:
            return reader.read(name)
        return merge(reader.read(name), reader.read(layer + A), reader.read(layer + B), config)

    return read


def export_adapter(run_dir: Path, config: Config, checkpoint: Path, out: Path) -> dict[str, Any]:
    """Write the adapters of a checkpoint; everything that they hold is in memory at once.

    Args:
        config: the run's, for one process.
        out: the folder to make.

    Returns:
        `layout` ("peft"), `checkpoint`, `tensors`, `bytes`, `files`, and `left_out`: what the run trains besides, for which a
        decoder has no place (the audio adaptor; a whole export holds it).

    Raises:
        ConversionError: the run has no adapters.
    """
    if not config.model.lora.rank:
        raise ConversionError(f"{run_dir}: was trained without LoRA (model.lora.rank=0); export it without --adapter")
    past = history(run_dir, config)
    with meta_model(config) as model, whole_folder(out) as folder:
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        left_out = [name for name in trained if not name.startswith(LANGUAGE_MODEL)]
        tensors = _peft_tensors(config, WeightsReader(checkpoint, model))
        infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        files = write_safetensors(folder, infos, tensors.__getitem__, stem="adapter_model")
        base = past.models[0]["name"] if past.models else None
        tree = _peft_config(config.model.lora, sorted({name.split(".")[-3] for name in tensors}), base)
        (folder / "adapter_config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return {
        "layout": "peft",
        "checkpoint": checkpoint.name,
        "tensors": len(tensors),
        "bytes": sum(info.bytes for info in infos.values()),
        "files": [file.name for file in files],
        "left_out": left_out,
    }


def _peft_tensors(config: Config, reader: WeightsReader) -> dict[str, torch.Tensor]:
    tensors = {}
    for entry in decoder_entries(transformer_config(config), config.model.vocabulary_size, config.model.tie_embeddings):
        layer = LANGUAGE_MODEL + entry.ours.removesuffix("weight")
        if layer + A not in reader.tensors:
            continue
        down, up = reader.read(layer + A), reader.read(layer + B)
        for (name, _), part in zip(entry.theirs, entry.split(up), strict=True):
            name = "base_model.model." + name.removesuffix("weight")
            tensors[f"{name}{A}.weight"] = down
            tensors[f"{name}{B}.weight"] = part.contiguous()
    return tensors


def _peft_config(config: LoRAConfig, modules: list[str], base: str | None) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }

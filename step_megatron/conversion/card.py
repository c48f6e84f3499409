"""The model card of an export: what it is, where its parts come from, under which licences."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from step_megatron.checkpoint.safetensors_files import TensorInfo
from step_megatron.config.schema import Config
from step_megatron.conversion.provenance import UNKNOWN, History

_LOAD = {
    "step-audio": "The layout of the released Step-Audio 2 and R1 checkpoints: their own code loads it, and `convert import`.",
    "qwen2-audio": "`transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder)`",
    "qwen2": "`transformers.Qwen2ForCausalLM.from_pretrained(folder)`. The decoder alone, without encoder and adaptor.",
    "llama": "`transformers.LlamaForCausalLM.from_pretrained(folder)`. The decoder alone, without encoder and adaptor.",
}


def model_card(
    config: Config, layout: str, checkpoint: str, past: History, tensors: Mapping[str, TensorInfo], run_config: Path
) -> str:
    """Text of the README.md.

    Args:
        checkpoint: name of the checkpoint's directory.
        tensors: what was written.
        run_config: the run's `config.yaml`, whose digest is given.
    """
    parameters = sum(info.bytes // info.dtype.itemsize for info in tensors.values())
    types = ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in tensors.values()}))
    digest = hashlib.sha256(run_config.read_bytes()).hexdigest()
    parts = [(model["name"], model["licence"]) for model in past.models] + ([past.encoder] if past.encoder else [])
    licences = list(dict.fromkeys(said for _, said in parts))
    sizes = config.megatron.transformer
    lines = [
        "---",
        f"license: {licences[0].lower() if len(licences) == 1 and UNKNOWN not in licences else 'other'}",
        "library_name: transformers",
        "---",
        f"# {past.run}, exported by step-megatron",
        "",
        f"{parameters:,} parameters ({types}); decoder of {sizes['num_layers']} layers, width {sizes['hidden_size']}, vocabulary "
        f"{config.model.vocabulary_size:,}; layout `{layout}`.",
        "",
        f"Load it: {_LOAD[layout]}",
        "",
        "## Where it comes from",
        "",
        f"- checkpoint `{checkpoint}` of run `{past.run}`, whose `config.yaml` has SHA-256 `{digest}`",
        *(f"- which started from the weights of `{name}`" for name in past.ancestors),
    ]
    for model in past.models:
        files = model["files"].items()
        lines += [f"- imported: `{model['name']}` (layout {model['layout']}), licence: {model['licence']}"]
        lines += [f"  - `{name}`: {file['bytes']:,} bytes, SHA-256 `{file['sha256']}`{_checked(file)}" for name, file in files]
    if not past.models:
        lines += ["- nothing was imported: decoder and adaptor were drawn from a seed and trained"]
    if config.model.lora.rank:
        lines += [f"- trained with LoRA of rank {config.model.lora.rank}, whose adapters are merged into the weights"]
    if past.drawn:
        lines += [f"- drawn from the seed on import: {', '.join(past.drawn)}"]
    if past.added:
        lines += ["- tokens added on import: " + ", ".join(f"`{name}` {number}" for name, number in past.added.items())]
    if past.encoder:
        lines += [f"- frozen encoder: `{past.encoder[0]}`"]
    lines += ["", "## Licences", ""]
    lines += [f"- `{name}`: {said}" for name, said in parts]
    lines += ["- of the data that the run was trained on: see the run's own sources"]
    if UNKNOWN in licences:
        lines += ["- unknown: the files that were imported do not name a licence; find it where they came from"]
    return "\n".join([*lines, "", "Texts that lay beside the weights are in `LICENCES/`.", ""])


def _checked(file: Mapping[str, Any]) -> str:
    return f", as {file['checked_against']} says" if file.get("checked_against") else ""

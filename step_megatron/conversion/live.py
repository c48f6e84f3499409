"""The decoder of a model in memory -> a folder in Hugging Face's layout, as its weights are now; for engines and peers beside us.

`exporting.export_run` writes a run's checkpoint, one tensor at a time and with all that a release needs; here every tensor is in
memory at once, and there are weights and sizes alone.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from step_megatron.checkpoint.safetensors_files import TensorInfo, write_safetensors
from step_megatron.config.schema import Config
from step_megatron.conversion import model_configs
from step_megatron.conversion.provenance import History
from step_megatron.model import huggingface, lora
from step_megatron.model.audio_lm import AudioLanguageModel


def decoder_weights(model: AudioLanguageModel, config: Config) -> dict[str, torch.Tensor]:
    """CPU copies of the decoder's weights by the names of `Qwen2ForCausalLM` and `LlamaForCausalLM`, adapters merged into them.

    Tensor-parallel ranks call it together; rows that only pad the vocabulary are left out. Tied embeddings have no `lm_head`.
    """
    full = huggingface.gather([model.language_model])
    for down in [name for name in full if name.endswith(f".{lora.A}")]:
        layer = down.removesuffix(f".{lora.A}")
        weight = f"{layer}.weight"
        full[weight] = lora.merge(full[weight], full.pop(down), full.pop(f"{layer}.{lora.B}"), config.model.lora)
    rows = config.model.vocabulary_size
    full |= {name: full[name][:rows] for name in (huggingface.EMBEDDING, huggingface.OUTPUT) if name in full}
    return huggingface.to_huggingface(full, model.config, config.model.tie_embeddings)


def write_decoder(folder: Path, model: AudioLanguageModel, config: Config) -> None:
    """Write `config.json` and `model*.safetensors` into a folder that exists; a replica's ranks call it, its first one writes."""
    weights, group = decoder_weights(model, config), parallel_state.get_model_parallel_group()
    if group.rank() == 0:
        tree = model_configs.build(config, "qwen2" if model.config.add_qkv_bias else "llama", History("live"))
        tree["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(tree, indent=2), encoding="utf-8")
        tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
        write_safetensors(folder, tensors, weights.__getitem__)
    dist.barrier(group=group)

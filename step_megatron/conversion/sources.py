"""Where foreign tensors come from: one interface over safetensors directories, GGUF files and CTranslate2 files.

A source lists names, shapes and types before anything is read, and reads one tensor at a time. Nothing is executed or unpickled.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from step_megatron.checkpoint.safetensors_files import TensorInfo
from step_megatron.errors import UserError
from step_megatron.model.whisper import CTranslate2File, from_ctranslate2


class ConversionError(UserError, ValueError):
    """A checkpoint that cannot be imported or exported; the message names what does not fit, and the remedy."""


class Source(Protocol):
    """Tensors of a checkpoint.

    Attributes:
        tensors: name -> shape and type.
        files: the files that they are in.
    """

    tensors: Mapping[str, TensorInfo]
    files: list[Path]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own."""


class CTranslate2Encoder:
    """The encoder in a CTranslate2 Whisper file, under released names; read at once, for the format has no index.

    Attributes:
        heads: attention heads.
    """

    def __init__(self, file: Path):
        stored = CTranslate2File(file).tensors("encoder/")
        try:
            self.heads = int(stored["encoder/num_heads"])
            self._state = from_ctranslate2(stored)
        except KeyError as error:
            raise ConversionError(f"{file}: the tensor {error.args[0]} is missing; is it a whole Whisper model?") from None
        self.files = [file]
        self.tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._state.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._state[name]


# GGUF module -> Hugging Face's, N a layer's number.
_GGUF = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}


class GgufFile:
    """A LLaMA in a GGUF file, under Hugging Face's names, quantised tensors as the float32 numbers that they stand for.

    llama.cpp rotates neighbouring columns of a head where Hugging Face rotates its halves, so its converter has reordered the
    rows of query and key; here they are put back. Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.

    Attributes:
        fields: the file's own settings.

    Raises:
        ConversionError: not a GGUF file, or another architecture than LLaMA.
    """

    def __init__(self, file: Path):
        if importlib.util.find_spec("gguf") is None:
            raise ConversionError(f"{file}: needs the gguf package; run: pip install 'step-megatron[gguf]'")
        import gguf

        try:
            reader = gguf.GGUFReader(file)
            self.fields: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, KeyError, IndexError) as error:
            raise ConversionError(f"{file}: not a whole GGUF file ({error}); fetch it again") from error
        architecture = self.fields.get("general.architecture")
        if architecture != "llama":
            raise ConversionError(f"{file}: its architecture is {architecture}; of GGUF files only llama (SmolLM2) is imported")
        self.files = [file]
        self._quantised = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors}
        # GGUF counts dimensions from the innermost.
        self.tensors = {
            name: TensorInfo(tuple(int(n) for n in reversed(tensor.shape)), torch.float32)
            for name, tensor in self._quantised.items()
        }

    def setting(self, name: str) -> Any:
        """A setting of the model, such as `block_count`."""
        if f"llama.{name}" not in self.fields:
            raise ConversionError(f"{self.files[0]}: llama.{name} is missing; fetch the file again")
        return self.fields[f"llama.{name}"]

    def read(self, name: str) -> torch.Tensor:
        import gguf

        stored = self._quantised[name]
        tensor = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).astype("float32", copy=True))
        tensor = tensor.view(self.tensors[name].shape)
        for module, heads in (("q_proj", "attention.head_count"), ("k_proj", "attention.head_count_kv")):
            if f".{module}." in name:
                tensor = tensor.unflatten(0, (self.setting(heads), -1, 2)).transpose(1, 2).flatten(0, 2)
        return tensor


def _hugging_face_name(name: str) -> str:
    """The name in a `LlamaForCausalLM`; one that is not known stays, and is reported with the others that do not fit."""
    module, _, part = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    found = _GGUF.get(re.sub(r"^blk\.\d+\.", "blk.N.", module))
    if found is None:
        return name
    return f"{found.replace('.N.', f'.{layer[1]}.') if layer else found}.{part}"

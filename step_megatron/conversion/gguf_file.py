"""GGUF files: settings, tokenizer and tensors of a LLaMA as llama.cpp keeps it; quantised tensors as the numbers they stand for.

The header is read here (the gguf package takes seconds to index a vocabulary, and trusts every length); what a quantised block
stands for is the package's knowledge.

Source: `docs/gguf.md` of ggml. Little-endian; magic, version, counts of tensors and settings; settings as (name, type, value);
tensors as (name, dimensions from the innermost, type, offset); then the aligned data.
"""

import importlib.util
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from step_megatron.checkpoint.safetensors_files import TensorInfo
from step_megatron.conversion.sources import ConversionError, placed

_VERSIONS = (2, 3)
_SCALARS = dict(enumerate("BbHhIif?"))
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# GGUF module -> Hugging Face's, N a layer's number.
_MODULES = {
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
    """A LLaMA in a GGUF file, under Hugging Face's names, in float32.

    llama.cpp rotates neighbouring columns of a head where Hugging Face rotates its halves, so its converter has reordered the
    rows of query and key; here they are put back. Source: `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.

    Attributes:
        fields: the file's own settings.

    Raises:
        ConversionError: the gguf package is missing, a damaged file, or another architecture than LLaMA.
    """

    def __init__(self, file: Path):
        if importlib.util.find_spec("gguf") is None:
            raise ConversionError(f"{file}: needs the gguf package; run: pip install 'step-megatron[gguf]'")
        self.files = [file]
        header = _Header(file)
        self.fields: dict[str, Any] = header.fields
        architecture = self.fields.get("general.architecture")
        if architecture != "llama":
            raise ConversionError(f"{file}: its architecture is {architecture}; of GGUF files only llama (SmolLM2) is imported")
        self._places = {_hugging_face_name(name): place for name, place in header.tensors.items()}
        self.tensors = {name: TensorInfo(shape, torch.float32) for name, (shape, _, _) in self._places.items()}

    def setting(self, name: str) -> Any:
        """A setting of the model, such as `block_count`."""
        if f"llama.{name}" not in self.fields:
            raise ConversionError(f"{self.files[0]}: llama.{name} is missing; fetch the file again")
        return self.fields[f"llama.{name}"]

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        import gguf

        shape, kind, offset = self._places[name]
        size = _stored_bytes(self.files[0], name, shape, kind)
        stored = np.fromfile(self.files[0], np.uint8, size, offset=offset)
        numbers = gguf.quants.dequantize(stored.reshape(*shape[:-1], -1), gguf.GGMLQuantizationType(kind))
        tensor = torch.from_numpy(np.ascontiguousarray(numbers, np.float32)).view(shape)
        for module, heads in (("q_proj", "attention.head_count"), ("k_proj", "attention.head_count_kv")):
            if f".{module}." in name:
                tensor = tensor.unflatten(0, (self.setting(heads), -1, 2)).transpose(1, 2).flatten(0, 2)
        return placed(tensor, into)


class _Header:
    """Settings, and shape, type and place of every tensor; each length is checked against the file."""

    def __init__(self, path: Path):
        self.path, self.fields, self.tensors = path, {}, {}
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._data, self._at = data, 0
                self._parse()
                del self._data
        except (OSError, ValueError) as error:
            if isinstance(error, ConversionError):
                raise
            raise ConversionError(f"{path}: {error}; fetch it again") from error

    def _parse(self) -> None:
        if self._bytes(4) != b"GGUF":
            raise self._error("no GGUF file")
        if (version := self._number("I")) not in _VERSIONS:
            raise self._error(f"format version {version}, known are {_VERSIONS}")
        tensors, settings = self._number("Q"), self._number("Q")
        for _ in range(settings):
            name = self._string()
            self.fields[name] = self._value(self._number("I"))
        infos = {}
        for _ in range(tensors):
            name = self._string()
            dimensions = [self._number("Q") for _ in range(self._number("I"))]
            infos[name] = (tuple(reversed(dimensions)), self._number("I"), self._number("Q"))
        alignment = self.fields.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        for name, (shape, kind, offset) in infos.items():
            end = start + offset + _stored_bytes(self.path, name, shape, kind)
            if end > len(self._data):
                raise self._error(f"{name} ends at byte {end} of {len(self._data)}: the file is cut short")
            self.tensors[name] = (shape, kind, start + offset)

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._number("I"), self._number("Q")
            if inner in _SCALARS:
                size = struct.calcsize(f"<{_SCALARS[inner]}")
                return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self._bytes(count * size)))
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._error(f"a setting of the unknown type {kind}")
        return self._number(_SCALARS[kind])

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._bytes(self._number("Q")).decode("utf-8")

    def _bytes(self, count: int) -> bytes:
        if self._at + count > len(self._data):
            raise self._error(f"{count} bytes expected, {len(self._data) - self._at} left: the file is cut short")
        self._at += count
        return self._data[self._at - count : self._at]

    def _error(self, message: str) -> ConversionError:
        return ConversionError(f"{self.path}, byte {self._at}: {message}; fetch it again")


def _stored_bytes(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor of ggml's type number `kind`."""
    import gguf

    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    except (KeyError, ValueError):
        raise ConversionError(f"{path}: {name} is of the unknown type {kind}; a newer gguf package may know it") from None
    if not shape or shape[-1] % block:
        raise ConversionError(f"{path}: {name} of shape {list(shape)} is not made of blocks of {block}; fetch it again")
    return math.prod(shape) // block * size


def _hugging_face_name(name: str) -> str:
    """The name in a `LlamaForCausalLM`; one that is not known stays, and is reported with the others that do not fit."""
    module, _, part = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", module)
    found = _MODULES.get(re.sub(r"^blk\.\d+\.", "blk.N.", module))
    if found is None:
        return name
    return f"{found.replace('.N.', f'.{layer[1]}.') if layer else found}.{part}"

"""Whisper-shaped encoder weights from the files they come in, renamed to the released Step-Audio names.

    CTranslate2    `model.bin` (whisper-base and its kin), read by `CTranslate2File`
    safetensors    under Hugging Face names (WhisperEncoder, Qwen2AudioEncoder) or released names, one file or several

Nothing is executed or unpickled; every length is checked against the file.

Source of the CTranslate2 layout: its `model_spec.py` (binary version 6): little-endian counts, NUL-terminated strings with a
16-bit length, tensors as (name, rank, dimensions, type, bytes), then pairs of aliases.
"""

import math
import re
import struct
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from step_megatron.checkpoint.safetensors_files import SafetensorsFiles
from step_megatron.config.schema import EncoderConfig
from step_megatron.model.mapping import Entry

_CTRANSLATE2_VERSION = 6
_CTRANSLATE2_TYPES = {
    0: torch.float32,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.float16,
    5: torch.bfloat16,
}

# Hugging Face module (WhisperEncoder, Qwen2AudioEncoder) -> released module, N a layer's number. The norms' names are traps.
_HUGGINGFACE = {
    "conv1": "conv1",
    "conv2": "conv2",
    "embed_positions": "positional_embedding",
    "layers.N.self_attn_layer_norm": "blocks.N.attn_ln",
    "layers.N.self_attn.q_proj": "blocks.N.attn.query",
    "layers.N.self_attn.k_proj": "blocks.N.attn.key",
    "layers.N.self_attn.v_proj": "blocks.N.attn.value",
    "layers.N.self_attn.out_proj": "blocks.N.attn.out",
    "layers.N.final_layer_norm": "blocks.N.mlp_ln",
    "layers.N.fc1": "blocks.N.mlp.0",
    "layers.N.fc2": "blocks.N.mlp.2",
    "layer_norm": "after_norm",
}
_RELEASED = {released: theirs for theirs, released in _HUGGINGFACE.items()}
_LAYER = re.compile(r"^(layers|blocks)\.(\d+)\.")
_PREFIXES = ("model.encoder.", "audio_tower.", "model.audio_tower.", "encoder.", "")


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Whisper's position table, `[positions, width]` float32: sines in the first half, cosines in the second."""
    steps = torch.arange(width // 2, dtype=torch.float64) * (math.log(10000) / max(width // 2 - 1, 1))
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * torch.exp(-steps)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2)).float()


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    """The name with its module replaced; a KeyError for a module that is not the encoder's."""
    layer = _LAYER.match(name)
    module, _, part = (_LAYER.sub(r"\1.N.", name) if layer else name).rpartition(".")
    return f"{modules[module].replace('.N.', f'.{layer[2]}.') if layer else modules[module]}.{part}"


def huggingface_name(released: str) -> str:
    """The name in a WhisperEncoder or Qwen2AudioEncoder of one of the encoder's tensors."""
    return _renamed(released, _RELEASED)


def from_huggingface(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a WhisperEncoder's or Qwen2AudioEncoder's state dict (no prefix) to released names.

    Raises:
        ValueError: for a name that is not the encoder's.
    """
    renamed = {}
    for name, tensor in state.items():
        try:
            renamed[_renamed(name, _HUGGINGFACE)] = tensor
        except KeyError:
            raise ValueError(f"{name} is not a tensor of a WhisperEncoder or Qwen2AudioEncoder") from None
    return renamed


def encoder_entries(config: EncoderConfig, theirs: Callable[[str], str]) -> list[Entry]:
    """The encoder's tensors by their released names, and how another layout calls them (`theirs`)."""
    width, inner = config.width, config.ffn_width
    shapes: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, config.mels, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "positional_embedding.weight": (config.max_positions, width),
    }
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        for norm in ("attn_ln", "mlp_ln"):
            shapes |= {f"{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
        for name in ("query", "key", "value", "out"):
            shapes[f"{block}.attn.{name}.weight"] = (width, width)
            # Whisper's keys have no bias.
            shapes |= {f"{block}.attn.{name}.bias": (width,)} if name != "key" else {}
        shapes |= {f"{block}.mlp.0.weight": (inner, width), f"{block}.mlp.0.bias": (inner,)}
        shapes |= {f"{block}.mlp.2.weight": (width, inner), f"{block}.mlp.2.bias": (width,)}
    shapes |= {f"after_norm.{part}": (width,) for part in ("weight", "bias")}
    return [Entry(name, ((theirs(name), shape),)) for name, shape in shapes.items()]


def from_ctranslate2(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the `encoder/` tensors of a CTranslate2 Whisper model; query, key and value, stacked there, become three.

    Raises:
        KeyError: if a tensor is missing.
        ValueError: if the stacked projection has a bias for the keys (Whisper has none), or tensors are quantised.
    """
    for name, tensor in tensors.items():
        if tensor.dim() and not tensor.is_floating_point():
            raise ValueError(f"{name} is quantised ({tensor.dtype}); convert the model with --quantization float16 or float32")
    take = {name.removeprefix("encoder/"): tensor for name, tensor in tensors.items()}
    state = {"positional_embedding.weight": take["position_encodings/encodings"]}
    state |= {f"{conv}.{part}": take[f"{conv}/{part}"] for conv in ("conv1", "conv2") for part in ("weight", "bias")}

    def norm(target: str, source: str) -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = take[f"{source}/gamma"], take[f"{source}/beta"]

    norm("after_norm", "layer_norm")
    layers = {match[1] for name in take if (match := re.match(r"layer_(\d+)/", name))}
    for layer in sorted(layers, key=int):
        block, source = f"blocks.{layer}", f"layer_{layer}"
        norm(f"{block}.attn_ln", f"{source}/self_attention/layer_norm")
        norm(f"{block}.mlp_ln", f"{source}/ffn/layer_norm")
        stacked = {part: take[f"{source}/self_attention/linear_0/{part}"].chunk(3) for part in ("weight", "bias")}
        if stacked["bias"][1].any():
            raise ValueError(
                f"encoder/{source}/self_attention/linear_0/bias: the keys have a bias, so this is not a Whisper encoder"
            )
        for index, projection in enumerate(("query", "key", "value")):
            state[f"{block}.attn.{projection}.weight"] = stacked["weight"][index]
            if projection != "key":
                state[f"{block}.attn.{projection}.bias"] = stacked["bias"][index]
        for target, origin in (("attn.out", "self_attention/linear_1"), ("mlp.0", "ffn/linear_0"), ("mlp.2", "ffn/linear_1")):
            for part in ("weight", "bias"):
                state[f"{block}.{target}.{part}"] = take[f"{source}/{origin}/{part}"]
    return state


class CTranslate2File:
    """Reader of one CTranslate2 `model.bin`; `tensors(prefix)` reads only what it is asked for.

    Raises:
        ValueError: with file and byte offset, if the file is truncated, of another version, or inconsistent.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Read the tensors whose names begin with `prefix`, in their stored types."""
        found: dict[str, torch.Tensor] = {}
        with self.path.open("rb") as stream:
            version = self._number(stream, "I")
            if version != _CTRANSLATE2_VERSION:
                raise self._error(
                    stream, f"format version {version}, expected {_CTRANSLATE2_VERSION}: is it a CTranslate2 model?"
                )
            self._string(stream)
            self._number(stream, "I")
            for _ in range(self._number(stream, "I")):
                name = self._string(stream)
                shape = [self._number(stream, "I") for _ in range(self._number(stream, "B"))]
                kind, size = self._number(stream, "B"), self._number(stream, "I")
                dtype = _CTRANSLATE2_TYPES.get(kind)
                if dtype is None or size != math.prod(shape) * dtype.itemsize:
                    raise self._error(stream, f"{name}: {size} bytes do not hold {shape} of type {kind}")
                if name in found:
                    raise self._error(stream, f"{name} occurs twice")
                if not name.startswith(prefix):
                    self._skip(stream, size)
                elif size:
                    found[name] = torch.frombuffer(bytearray(self._bytes(stream, size)), dtype=dtype).view(shape)
        if not found:
            raise ValueError(f"{self.path}: no tensor is called {prefix}*; is it a Whisper model?")
        return found

    def _error(self, stream: BinaryIO, message: str) -> ValueError:
        return ValueError(f"{self.path}, byte {stream.tell()}: {message}")

    def _bytes(self, stream: BinaryIO, size: int) -> bytes:
        if stream.tell() + size > self.size:
            raise self._error(
                stream, f"{size} bytes expected, {self.size - stream.tell()} left: the file is truncated, fetch it again"
            )
        return stream.read(size)

    def _skip(self, stream: BinaryIO, size: int) -> None:
        if stream.tell() + size > self.size:
            raise self._error(
                stream, f"{size} bytes expected, {self.size - stream.tell()} left: the file is truncated, fetch it again"
            )
        stream.seek(size, 1)

    def _number(self, stream: BinaryIO, code: str) -> int:
        return struct.unpack(f"<{code}", self._bytes(stream, struct.calcsize(f"<{code}")))[0]

    def _string(self, stream: BinaryIO) -> str:
        raw = self._bytes(stream, self._number(stream, "H"))
        try:
            return raw.removesuffix(b"\0").decode("ascii")
        except UnicodeDecodeError:
            raise self._error(stream, f"{raw[:40]!r} is not a name: is it a CTranslate2 model?") from None


def read_encoder_weights(directory: Path, config: EncoderConfig) -> dict[str, torch.Tensor]:
    """Read the encoder's weights from `directory` under released names, as float32, checked against the sizes in `config`.

    Raises:
        ValueError: if there are no weights, a tensor is missing, or a size differs (names file, setting and both values).
    """
    source = directory / "model.bin"
    try:
        if source.is_file():
            state = from_ctranslate2(CTranslate2File(source).tensors("encoder/"))
        else:
            source = directory
            state = _from_safetensors(directory)
        _check_sizes(source, state, config)
    except KeyError as error:
        raise ValueError(f"{source}: the tensor {error.args[0]} is missing; is it a whole audio encoder?") from None
    return {name: tensor.float() for name, tensor in state.items()}


def _from_safetensors(directory: Path) -> dict[str, torch.Tensor]:
    """Collect the encoder's tensors from one or more safetensors files, released or Hugging Face names, any usual prefix."""
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"encoder.weights: {directory} holds neither model.bin nor *.safetensors; run `step-megatron data fetch`"
        )
    files = SafetensorsFiles(directory)
    prefix = encoder_prefix(files.tensors)
    if prefix is None:
        raise ValueError(f"{directory}: no tensor is called [prefix]conv1.weight; is it an audio encoder?")
    state = {name.removeprefix(prefix): files.read(name) for name in files.tensors if name.startswith(prefix)}
    return state if "after_norm.weight" in state else from_huggingface(state)


def encoder_prefix(names: Container[str]) -> str | None:
    """What the encoder's tensors begin with in a checkpoint; None where there is no encoder."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}conv1.weight" in names), None)


def _check_sizes(source: Path, state: Mapping[str, torch.Tensor], config: EncoderConfig) -> None:
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    held = {
        "mels": state["conv1.weight"].shape[1],
        "width": state["conv1.weight"].shape[0],
        "layers": layers,
        "max_positions": state["positional_embedding.weight"].shape[0],
    }
    if layers:
        held["ffn_width"] = state["blocks.0.mlp.0.weight"].shape[0]
    for name, value in held.items():
        if getattr(config, name) != value:
            raise ValueError(f"encoder.{name} is {getattr(config, name)}, but {source} holds {value}: set encoder.{name}={value}")

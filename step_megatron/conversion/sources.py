"""Where foreign tensors come from: one interface over safetensors directories, GGUF files and CTranslate2 files.

A source lists names, shapes and types before anything is read, and reads one tensor at a time. Nothing is executed or unpickled.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

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

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in memory of its own or in `into`, which is contiguous and has its shape and type."""


def placed(tensor: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """The tensor, copied into `into` where that is given: for a source that makes its tensors."""
    return tensor if into is None else into.copy_(tensor)


class Scratch:
    """Memory for one tensor at a time, of any shape and type, which stays this process's.

    A large tensor of its own would be given to the process page by page each time: five times as slow as reading into pages that
    are there.
    """

    def __init__(self) -> None:
        self._memory = bytearray()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of unknown content; it ends the use of the one before."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._memory):
            self._memory = bytearray()
            self._memory = bytearray(size)
        if not size:
            return torch.empty(shape, dtype=dtype)
        # Its storage has just its size: torch's writer copies a tensor that is a part of something larger.
        return torch.frombuffer(memoryview(self._memory)[:size], dtype=dtype).view(shape)


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

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        return placed(self._state[name], into)

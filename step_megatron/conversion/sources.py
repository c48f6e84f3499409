"""Where foreign tensors come from: one interface over safetensors directories, GGUF files and CTranslate2 files.

A source lists names, shapes and types before anything is read, and reads one tensor at a time. Nothing is executed or unpickled.
"""

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

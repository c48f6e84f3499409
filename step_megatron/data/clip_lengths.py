"""How long clips are for the model, from the audio index alone: planning reads no audio."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from step_megatron.audio.geometry import ChunkFrames, chunk_frames, chunk_lengths
from step_megatron.config.schema import AdaptorConfig


@dataclass(frozen=True)
class ClipLengths:
    """Attributes:
    index: address -> an object with `num_samples` (16 kHz); KeyError for a clip that is not there or quarantined. None: no clips.
    adaptor: makes tokens of the encoder's frames.
    """

    index: Mapping[str, Any] | None
    adaptor: AdaptorConfig

    def frames(self, address: str) -> list[ChunkFrames]:
        """Lengths of every chunk of a clip.

        Raises:
            KeyError: the clip is not in the index.
        """
        kind, compat = self.adaptor.kind, self.adaptor.compat
        return [chunk_frames(samples, kind, compat) for samples in chunk_lengths(self.index[address].num_samples)]

    def tokens(self, address: str) -> list[int]:
        """Placeholders of every chunk of a clip; raises as `frames`."""
        return [frames.tokens for frames in self.frames(address)]

    def has_tokens(self, address: str) -> bool:
        """Whether a clip is in the index and long enough for a token."""
        try:
            return bool(self.frames(address))
        except KeyError:
            return False

"""One pass through the model in generation: embeddings, layers, logits.

Nothing here reads a value back from the device, so a decoding step can be captured as a CUDA graph.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from step_kernels import skinny_linear

from step_megatron.generation.cache import Pass
from step_megatron.generation.layers import LeanLayers, block_product, can_run
from step_megatron.model.audio_lm import AudioLanguageModel
from step_megatron.model.segments import PackedSegments


class Forward:
    """The model's own modules and weights; tensor-parallel ranks call it together.

    Args:
        model: not wrapped, whole on this pipeline stage.
        block: rows of every matrix product, so that no row's bits depend on the others; 0 for products as they come.
    """

    def __init__(self, model: AudioLanguageModel, block: int = 0):
        self.model, self.language_model = model, model.language_model
        self._product = block_product(block) if block else skinny_linear
        self._lean = LeanLayers(self.language_model, self._product) if can_run(self.language_model) else None
        if block and self._lean is None:
            raise ValueError("generation.batch_invariant needs the plain layers: model.layers=torch, without adapters or experts")
        self._group = self.language_model.tp_group
        self._ranks = self._group.size()
        # Looked up once: a property of Megatron's goes through several calls.
        self._embeddings = self.language_model.embedding.word_embeddings.weight
        tied = model.share_embeddings_and_output_weights
        self._output = self._embeddings if tied else self.language_model.output_layer.weight
        self.vocabulary = self.language_model.output_layer.vocabulary

    def adapt(self, features: torch.Tensor, frames: tuple[int, ...]) -> torch.Tensor:
        """Audio embeddings `[audio tokens, width]` of a prompt's features."""
        parameter = self._embeddings
        return self.model.adaptor(features.to(parameter.device), frames).to(parameter.dtype)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings `[T, width]` of ids `[T]` int64."""
        if self._ranks == 1:
            return F.embedding(tokens, self._embeddings)
        rows = self._embeddings.shape[0]
        local = tokens - self._group.rank() * rows
        elsewhere = (local < 0) | (local >= rows)
        hidden = F.embedding(local.clamp(0, rows - 1), self._embeddings).masked_fill_(elsewhere[:, None], 0)
        dist.all_reduce(hidden, group=self._group)
        return hidden

    def layers(self, hidden: torch.Tensor, positions: torch.Tensor, work: Pass) -> torch.Tensor:
        """Final hidden states `[T, width]` of embeddings `[T, width]` at `positions` `[T]` int64; stores keys and values."""
        rotary = self.model.rotary(positions, hidden.dtype)
        if self._lean is not None:
            return self._lean(hidden, work, tuple(part.squeeze(1) for part in rotary))
        packed = PackedSegments(qkv_format="thd", position_ids=positions, rotary=rotary, cache=work)
        decoder = self.language_model.decoder
        return decoder(hidden_states=hidden.unsqueeze(1), attention_mask=None, packed_seq_params=packed).squeeze(1)

    def read(self, hidden: torch.Tensor, positions: torch.Tensor, work: Pass) -> None:
        """Store keys and values, as `layers` does; of the plain layers nothing is computed that only hidden states would need."""
        if self._lean is None:
            self.layers(hidden, positions, work)
        else:
            self._lean.read(hidden, work, tuple(part.squeeze(1) for part in self.model.rotary(positions, hidden.dtype)))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[T, vocabulary]` float32 of final hidden states, whole on every rank and without the vocabulary's padding."""
        local = self._product(hidden, self._output).float()
        if self._ranks > 1:
            parts = [torch.empty_like(local) for _ in range(self._ranks)]
            dist.all_gather(parts, local, group=self._group)
            local = torch.cat(parts, dim=-1)
        return local[:, : self.vocabulary]

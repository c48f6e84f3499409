"""What the audio language model reads of one packed micro-batch."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from step_megatron.model.segments import PackedSegments, pack_segments


@dataclass
class ModelBatch:
    """A packed micro-batch on the device; lengths stay on the host.

    Attributes:
        tokens: `[1, T]` int64, the whole micro-batch also under context parallelism (audio is merged before it is cut).
        packed: segments, positions and context-parallel indices.
        labels: `[1, T_local]` int64, this context-parallel rank's tokens; None to get logits.
        audio_features: `[sum(encoder_frames), encoder_width]`, chunks back to back; None when the batch has no audio, and on
            pipeline stages after the first.
        encoder_frames: 25 Hz frames of every chunk, in the order of their placeholders.
        encoder_starts: `[chunks + 1]` int32, their cumulative sum; None lets the adaptor copy it to the device.
        audio_positions: `[audio tokens]` int64, index into `T` of every placeholder, in order.
        audio_names, audio_tokens: of every chunk, what an error calls it and how many placeholders it has; empty when the caller
            vouches for the counts.
        predicted: `[n]` int64, index into `T_local` of the tokens whose loss is wanted; `labels` are then theirs, `[1, n]`. The
            output layer and the loss, a quarter of a small model, see these alone. None for all tokens.
        loss_weights: float, the shape of `labels`: what each loss counts for in the sum that is trained on (the loss mask).
            Known beforehand, it lets the output layer form its gradients in the forward pass. None for losses with gradients.
        temperature: with `labels` and without `loss_weights`, ask for what reinforcement learning needs of every predicted token
            (`TokenScores`): log-probability and entropy of the softmax of the logits over this temperature. None for losses.
        with_entropy: whether the entropies are wanted; they cost another pass over the vocabulary.
    """

    tokens: torch.Tensor
    packed: PackedSegments
    labels: torch.Tensor | None = None
    audio_features: torch.Tensor | None = None
    encoder_frames: tuple[int, ...] = ()
    audio_positions: torch.Tensor | None = None
    audio_names: tuple[str, ...] = ()
    audio_tokens: tuple[int, ...] = ()
    predicted: torch.Tensor | None = None
    loss_weights: torch.Tensor | None = None
    encoder_starts: torch.Tensor | None = None
    temperature: float | None = None
    with_entropy: bool = False


class TokenScores(NamedTuple):
    """What policy and critic say of predicted tokens, `[n]` float32 each, with gradients; empty where not asked for.

    Attributes:
        log_probs: log-probability of each token.
        entropy: of the distribution that each token was drawn from.
        values: what the critic expects from each token on, the token itself not seen.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor


def make_batch(
    tokens: torch.Tensor,
    segment_lengths: tuple[int, ...] | list[int],
    labels: torch.Tensor | None = None,
    audio_features: torch.Tensor | None = None,
    encoder_frames: tuple[int, ...] = (),
    audio_positions: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> ModelBatch:
    """A `ModelBatch` from tensors that are already on the device; `tokens` and `labels` are `[1, T]`, both whole."""
    packed = pack_segments(segment_lengths, tokens.device, cp_size, cp_rank)
    if packed.cp_index is not None and labels is not None:
        labels = labels.index_select(1, packed.cp_index)
    return ModelBatch(tokens, packed, labels, audio_features, tuple(encoder_frames), audio_positions)

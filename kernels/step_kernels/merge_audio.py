"""Put the audio embeddings into the token embeddings at the positions of their placeholders.

    out[t] = audio[n] where t == positions[n], else tokens[t]

Differentiable in both: a placeholder's own embedding gets a zero gradient, the audio row gets the output's.
"""

import torch

from step_kernels import registry

OP = "merge_audio_embeddings"
registry.register(OP)


def merge_audio_embeddings_reference(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Define the op in plain torch, row by row; arguments as in `merge_audio_embeddings`."""
    rows = list(tokens)
    for row, position in zip(audio, positions.tolist(), strict=True):
        rows[position] = row
    return torch.stack(rows)


def merge_audio_embeddings(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Replace the placeholders' embeddings; nothing is read back from the device.

    With no audio (`[0, ...]`) the output still depends on `audio`: the adaptor gets (zero) gradients from a text-only batch.

    Args:
        tokens: `[length, ...]` token embeddings.
        audio: `[audio tokens, ...]`, the same trailing shape and dtype.
        positions: `[audio tokens]` int64 on the same device, distinct, in the order of `audio`'s rows.

    Returns:
        A new tensor shaped as `tokens`.

    Raises:
        ValueError: if the counts or the trailing shapes or dtypes disagree (host metadata only).
    """
    if audio.shape[0] != positions.shape[0]:
        raise ValueError(f"{audio.shape[0]} audio embeddings for {positions.shape[0]} placeholders: batch and encoder disagree")
    if audio.shape[1:] != tokens.shape[1:] or audio.dtype != tokens.dtype:
        ours, theirs = (f"{list(x.shape[1:])} {x.dtype}" for x in (audio, tokens))
        raise ValueError(f"audio embeddings {ours} do not fit token embeddings {theirs}")
    registry.backend(OP, tokens)
    return tokens.index_copy(0, positions, audio)

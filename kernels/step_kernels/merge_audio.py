"""Put the audio embeddings into the token embeddings at the positions of their placeholders.

    out[t] = audio[n] where t == positions[n], else tokens[t]

Differentiable in both: a placeholder's own embedding gets a zero gradient, the audio row gets the output's. Rows are moved, never
computed with, so every backend gives the same bits in every dtype. Sequence and context parallelism cut the result: the merge is
of whole sequences, before.
"""

from collections.abc import Sequence

import torch

from step_kernels import native, registry

OP = "merge_audio_embeddings"
registry.register(OP, cuda=(torch.float32, *registry.HALF), cpp=(torch.float32, *registry.HALF, torch.float64))


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
        positions: `[audio tokens]` int64 on the same device, distinct, in the order of `audio`'s rows. One outside of the tokens
            is an error on a CPU and ends the kernel on a GPU.

    Returns:
        A new tensor shaped as `tokens`.

    Raises:
        ValueError: if the counts or the trailing shapes or dtypes disagree (host metadata only). `check_audio_counts` says whose.
    """
    if audio.shape[0] != positions.shape[0]:
        raise ValueError(f"{audio.shape[0]} audio embeddings for {positions.shape[0]} placeholders: batch and encoder disagree")
    if audio.shape[1:] != tokens.shape[1:] or audio.dtype != tokens.dtype:
        ours, theirs = (f"{list(x.shape[1:])} {x.dtype}" for x in (audio, tokens))
        raise ValueError(f"audio embeddings {ours} do not fit token embeddings {theirs}")
    return _op(tokens, audio, positions)


def check_audio_counts(names: Sequence[str], placeholders: Sequence[int], embeddings: Sequence[int]) -> None:
    """Hold the placeholders of every clip against the embeddings that it gets; host numbers only.

    Args:
        names: what to call each clip in the error, such as its sample and address.
        placeholders: audio tokens of each clip in the text.
        embeddings: rows that the adaptor gives for it.

    Raises:
        ValueError: they disagree; names the first such clip and both counts.
    """
    if not len(names) == len(placeholders) == len(embeddings):
        raise ValueError(f"{OP}: {len(names)} names, {len(placeholders)} placeholder counts, {len(embeddings)} embedding counts")
    for name, wanted, given in zip(names, placeholders, embeddings, strict=True):
        if wanted != given:
            raise ValueError(
                f"{OP}: {name} has {wanted} placeholders in the text, but its audio gives {given} embeddings; the manifest's "
                "tokens and the clip's frames disagree: run `step-megatron data validate` again"
            )


@torch.library.custom_op("step::merge_audio_embeddings", mutates_args=())
def _op(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    if registry.backend(OP, tokens) == "torch":
        return tokens.index_copy(0, positions, audio)
    tokens, audio = tokens.contiguous(), audio.contiguous()
    out = torch.empty_like(tokens)
    native.ops().merge_audio(tokens, audio, positions.contiguous(), _source(tokens), out)
    return out


@_op.register_fake
def _(tokens, audio, positions):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@torch.library.custom_op("step::merge_audio_embeddings_backward", mutates_args=())
def _backward_op(gradient: torch.Tensor, positions: torch.Tensor, of_tokens: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if registry.backend(OP, gradient) == "torch":
        tokens = gradient.index_fill(0, positions, 0) if of_tokens else gradient.new_empty(0)
        return tokens, gradient.index_select(0, positions)
    gradient = gradient.contiguous()
    tokens = torch.empty_like(gradient) if of_tokens else gradient.new_empty(0)
    audio = gradient.new_empty(positions.shape[0], *gradient.shape[1:])
    native.ops().merge_audio_backward(gradient, positions.contiguous(), _source(gradient), tokens, audio)
    return tokens, audio


@_backward_op.register_fake
def _(gradient, positions, of_tokens):
    tokens = torch.empty_like(gradient, memory_format=torch.contiguous_format) if of_tokens else gradient.new_empty(0)
    return tokens, gradient.new_empty(positions.shape[0], *gradient.shape[1:])


def _keep_positions(ctx, inputs, output):
    ctx.save_for_backward(inputs[2])


def _gradients(ctx, gradient):
    (positions,) = ctx.saved_tensors
    of_tokens, of_audio, _ = ctx.needs_input_grad
    tokens, audio = _backward_op(gradient, positions, of_tokens)
    return tokens if of_tokens else None, audio if of_audio else None, None


_op.register_autograd(_gradients, setup_context=_keep_positions)


def cuda_kernels():
    """What the ahead-of-time inspection looks at, see `step_kernels.inspect`: the 32B decoder's width, half audio."""
    length, count, width = 8192, 4096, 5120
    for name, moved in (("clear_source", 4 * length), ("mark_source", 12 * count)):
        yield f"{OP}.{name} {length} tokens", "merge_audio.cu", name, 0, 0, moved
    for unit, mangled in (("16 bytes", "5uint4"), ("2 bytes", "t")):
        shape = f"{length} x {width} bf16, by {unit}"
        yield f"{OP}.merge_rows {shape}", "merge_audio.cu", f"merge_rowsI{mangled}E", 0, 0, 4 * length * width
        moved = 4 * length * width + 2 * count * width
        yield f"{OP}.split_rows {shape}", "merge_audio.cu", f"split_rowsI{mangled}E", 0, 0, moved


def _source(rows: torch.Tensor) -> torch.Tensor:
    """Room for the native code's map from rows to audio rows."""
    return torch.empty(rows.shape[0], dtype=torch.int32, device=rows.device)

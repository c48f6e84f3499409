"""Put the audio embeddings into the token embeddings at the positions of their placeholders.

    out[t] = audio[n] where t == positions[n], else tokens[t]

Differentiable in both: a placeholder's own embedding gets a zero gradient, the audio row gets the output's. Rows are moved, never
computed with, so every backend gives the same bits in every dtype. Sequence and context parallelism cut the result: the merge is
of whole sequences, before.

`merge_audio_embeddings_` writes into the tokens and touches the rows of audio alone: the one for an embedding that nobody needs
any more, as in the model. `merge_audio_embeddings` copies first.
"""

from collections.abc import Sequence

import torch

from step_kernels import native, registry
from step_kernels.operators import operator

OP = "merge_audio_embeddings"
registry.register(OP, cuda=(torch.float32, *registry.HALF), cpp=(torch.float32, *registry.HALF, torch.float64))


def merge_audio_embeddings_reference(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Define the op in plain torch, row by row; arguments as in `merge_audio_embeddings`."""
    rows = list(tokens)
    for row, position in zip(audio, positions.tolist(), strict=True):
        rows[position] = row
    return torch.stack(rows)


def merge_audio_embeddings(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Replace the placeholders' embeddings in a copy; nothing is read back from the device.

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
    _check(tokens, audio, positions)
    return _op(tokens, audio, positions, registry.backend(OP, tokens))


def merge_audio_embeddings_(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Replace the placeholders' embeddings in place; arguments as in `merge_audio_embeddings`.

    The tokens are given away: from here on the result stands for them, in the same memory. What made them must not need their
    values for its backward pass (an embedding does not); autograd says so if it does. Nothing says so if the old name is used
    again: its gradient goes past the audio.

    Raises:
        ValueError: as above; also if the tokens are not contiguous, or are (part of) a leaf that requires gradients, a parameter.
    """
    _check(tokens, audio, positions)
    if not tokens.is_contiguous():
        raise ValueError(f"{OP}_: tokens of strides {tokens.stride()} are not contiguous; use {OP}, which copies")
    owner = tokens if tokens._base is None else tokens._base
    if torch.is_grad_enabled() and owner.is_leaf and owner.requires_grad:
        raise ValueError(f"{OP}_: the tokens are a leaf that requires gradients and would be overwritten; use {OP}, which copies")
    return _InPlace.apply(tokens, audio, positions, registry.backend(OP, tokens))


def _check(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor) -> None:
    if audio.shape[0] != positions.shape[0]:
        raise ValueError(f"{audio.shape[0]} audio embeddings for {positions.shape[0]} placeholders: batch and encoder disagree")
    if audio.shape[1:] != tokens.shape[1:] or audio.dtype != tokens.dtype:
        ours, theirs = (f"{list(x.shape[1:])} {x.dtype}" for x in (audio, tokens))
        raise ValueError(f"audio embeddings {ours} do not fit token embeddings {theirs}")


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


@operator("step::merge_audio_embeddings")
def _op(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor, backend: str) -> torch.Tensor:
    out = tokens.clone(memory_format=torch.contiguous_format)
    _place(out, audio, positions, backend)
    return out


@_op.register_fake
def _(tokens, audio, positions, backend):
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


@operator("step::merge_audio_embeddings_", mutates=("tokens",))
def _place(tokens: torch.Tensor, audio: torch.Tensor, positions: torch.Tensor, backend: str) -> None:
    if backend == "torch":
        tokens.index_copy_(0, positions, audio)
    else:
        native.ops().merge_audio(audio.contiguous(), positions.contiguous(), tokens)


@operator("step::merge_audio_embeddings_backward")
def _backward_op(
    gradient: torch.Tensor, positions: torch.Tensor, backend: str, of_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "torch":
        tokens = gradient.index_fill(0, positions, 0) if of_tokens else gradient.new_empty(0)
        return tokens, gradient.index_select(0, positions)
    gradient = gradient.contiguous()
    tokens = torch.empty_like(gradient) if of_tokens else gradient.new_empty(0)
    audio = gradient.new_empty(positions.shape[0], *gradient.shape[1:])
    # Room for the native code's map from rows to audio rows.
    source = torch.empty(gradient.shape[0], dtype=torch.int32, device=gradient.device)
    native.ops().merge_audio_backward(gradient, positions.contiguous(), source, tokens, audio)
    return tokens, audio


@_backward_op.register_fake
def _(gradient, positions, backend, of_tokens):
    tokens = torch.empty_like(gradient, memory_format=torch.contiguous_format) if of_tokens else gradient.new_empty(0)
    return tokens, gradient.new_empty(positions.shape[0], *gradient.shape[1:])


def _save(ctx, inputs, output):
    _, _, positions, ctx.backend = inputs
    ctx.save_for_backward(positions)


def _differentiate(ctx, gradient):
    of_tokens, of_audio, *_ = ctx.needs_input_grad
    tokens, audio = _backward_op(gradient, *ctx.saved_tensors, ctx.backend, of_tokens)
    return tokens if of_tokens else None, audio if of_audio else None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


class _InPlace(torch.autograd.Function):
    """A function of tokens that gives their memory back under a new name.

    To autograd the result is a new tensor: were it the tokens themselves (`mark_dirty`), the gradient of what is mostly a view of
    an embedding would be copied three times.
    """

    @staticmethod
    def forward(ctx, *inputs):
        _place(*inputs)
        _save(ctx, inputs, None)
        return inputs[0].detach()

    @staticmethod
    def backward(ctx, gradient):
        return _differentiate(ctx, gradient)


def cuda_kernels():
    """What the ahead-of-time inspection looks at, see `step_kernels.inspect`: the 32B decoder's width, half audio."""
    length, count, width = 8192, 4096, 5120
    for name, moved in (("clear_source", 4 * length), ("mark_source", 12 * count)):
        yield f"{OP}.{name} {length} tokens", "merge_audio.cu", name, 0, 0, moved
    for unit, mangled in (("16 bytes", "5uint4"), ("2 bytes", "t")):
        shape = f"{length} x {width} bf16, by {unit}"
        yield f"{OP}.place_rows {shape}", "merge_audio.cu", f"place_rowsI{mangled}E", 0, 0, 4 * count * width + 8 * count
        moved = 4 * length * width + 2 * count * width
        yield f"{OP}.split_rows {shape}", "merge_audio.cu", f"split_rowsI{mangled}E", 0, 0, moved

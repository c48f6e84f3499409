"""Output layer and loss in one: the logits `[tokens, vocabulary]` exist a chunk of tokens at a time, never as a whole.

    x = hidden weight^T        loss_t = log sum_j e^(x_tj) - x_t,label(t)        p = softmax(x)

Two modes, one for each way the gradient of a token's loss comes to be known:

    linear_cross_entropy   the weight of each token's loss is known beforehand (`token_weights`, such as a loss mask), so the
                           gradients are formed in the forward pass, while a chunk's logits are at hand; three products, as eager
                               d total / dx_tj = w_t (p_tj - [j = label(t)])
    linear_log_probs       log-probability and entropy, with any gradient (PPO's ratio depends on the log-probability itself);
                           backward computes the logits again, so four products
                               d log p(label) / dx_j = [j = label] - p_j        d H / dx_j = -p_j (log p_j + H)

In float16 gradients need the factor that the loss is scaled by (65,536 and more): without it a probability of less than 6e-8 is
zero, and those below 6e-5 lose digits. Only backward knows it, so the loss mode computes as the other does there, four products.

The weight may be this rank's share of the vocabulary (`vocabulary_start`, `group`): a row's maximum, sum and target are then
joined over the ranks with one small message a chunk, and hidden's gradient is summed over them with one message in all. Messages
meet only where all ranks cut the tokens into the same chunks, and so all shares have the same number of rows. Where the
vocabulary does not divide, rows of padding make up for it, and `vocabulary` says how many rows of all ranks are entries.

Every product is a plain matrix product in the inputs' type, each chunk's into the same buffer; what is between them is two passes
over the buffer, in float32: one reads the statistics of a row, one replaces logits by their gradient.

Source: chunking as in Liger-Kernel's fused linear cross entropy (Hsu et al., 2024); statistics joined over ranks as in
Megatron-LM's vocabulary-parallel cross entropy (Shoeybi et al., 2019).
"""

import torch
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from step_kernels import native, registry
from step_kernels.operators import operator
from step_kernels.softmax_rows import Rows, exact, resolve, scale_triton

OP = "linear_cross_entropy"
registry.register(OP, triton=(*registry.HALF, torch.float32), cpp=(torch.float32,))

# Rows of a chunk: enough for the matrix products to be as fast as whole, few enough for the buffer to stay small beside eager's
# three or more copies of all logits.
_ROWS = {"cpu": 512, "cuda": 1024}
_BUFFER_BYTES = {"cpu": 160 << 20, "cuda": 512 << 20}
# Logit of padding: e^(x - m) is zero beside any other's, and so is its product with x - m, which it would not be for infinity.
_PADDING = -1e20


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the loss mode in plain torch, for a whole vocabulary; every backend is tested against this, in float64."""
    losses = cross_entropy((hidden @ weight.t()).to(exact(hidden)), labels, reduction="none")
    return (losses if token_weights is None else losses * token_weights).sum(), losses.detach()


def linear_log_probs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the log-probability mode in plain torch, for a whole vocabulary."""
    log_p = (hidden @ weight.t()).to(exact(hidden)).log_softmax(-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    vocabulary_start: int = 0,
    group: ProcessGroup | None = None,
    vocabulary: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the tokens' cross entropies; its gradients are formed here and scaled in backward (float16: formed there).

    Args:
        hidden: `[tokens, width]`, the same on all ranks of `group`.
        weight: `[rows of this rank, width]`, in hidden's type; as many rows on every rank.
        labels: `[tokens]` int64, ids in the whole vocabulary; one that no rank holds is allowed where its weight is 0.
        token_weights: `[tokens]` float, None for ones. No gradient goes to it.
        vocabulary_start: the id of the weight's first row.
        group: the ranks that share the vocabulary, in its order; None for one.
        vocabulary: entries of the whole vocabulary. Rows from there on are padding, whatever they hold: they have no share in a
            loss, and their gradient is zero. None where there is no padding.

    Returns:
        The sum of weight times loss, a scalar through which gradients flow, and the loss of every token, `[tokens]`, without
        gradient. Both in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes, types or shares that do not fit.
    """
    _validate(hidden, weight, labels)
    share = _share(weight, vocabulary_start, group, vocabulary)
    if token_weights is None:
        token_weights = torch.ones_like(labels, dtype=exact(hidden))
    if token_weights.shape != labels.shape:
        raise ValueError(f"{OP}: {len(labels)} labels, but token_weights of shape {tuple(token_weights.shape)}; give one a token")
    token_weights = token_weights.detach().to(exact(hidden))
    wanted = [torch.is_grad_enabled() and each.requires_grad for each in (hidden, weight)]
    if hidden.dtype == torch.float16 and any(wanted):
        log_probs, _, _ = _log_probs(hidden, weight, labels, *share, False)
        return -(log_probs * token_weights).sum(), -log_probs.detach()
    total, losses, _, _ = _op(hidden, weight, labels, token_weights, *share, *wanted)
    return total, losses


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocabulary_start: int = 0,
    group: ProcessGroup | None = None,
    vocabulary: int | None = None,
    with_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every label and entropy of every token's distribution; arguments as in `linear_cross_entropy`.

    Returns:
        `[tokens]` each, float32 (float64 for float64 inputs); both differentiable with respect to hidden and weight. Without
        `with_entropy` the second is empty.

    Raises:
        ValueError: shapes, types or shares that do not fit.
    """
    _validate(hidden, weight, labels)
    share = _share(weight, vocabulary_start, group, vocabulary)
    log_probs, entropy, _ = _log_probs(hidden, weight, labels, *share, with_entropy)
    return log_probs, entropy


def _validate(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{OP}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [tokens, width] and [vocabulary, width]"
        )
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{OP}: hidden is {hidden.dtype}, weight {weight.dtype}; cast one of them")
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{OP}: labels must be int64 [{hidden.shape[0]}], are {labels.dtype} {tuple(labels.shape)}")


def _share(weight: torch.Tensor, start: int, group: ProcessGroup | None, vocabulary: int | None) -> tuple[int, int, str]:
    """What is this rank's: id of the weight's first row, rows that are entries of the vocabulary, name of the group or ""."""
    rows = weight.shape[0]
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    # Where shares differ, some rank's does not begin where as many rows of each rank before it end.
    if ranks > 1 and start != rank * rows:
        raise ValueError(
            f"{OP}: rank {rank} has {rows} rows from id {start} on, not from {rank * rows}; "
            "give every rank as many, pad the last one and say what `vocabulary` is without padding"
        )
    if vocabulary is not None and not 0 < vocabulary - (start if ranks == 1 else 0) <= ranks * rows:
        raise ValueError(f"{OP}: vocabulary is {vocabulary}, the weight has {rows} rows from id {start} on, on {ranks} ranks")
    entries = rows if vocabulary is None else min(max(vocabulary - start, 0), rows)
    return start, entries, group.group_name if ranks > 1 else ""


@operator("step::linear_cross_entropy")
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    vocabulary_start: int,
    entries: int,
    group: str,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = Rows(registry.backend(OP, hidden), vocabulary_start, group)
    losses = torch.empty_like(token_weights)
    gradients = _Gradients(hidden, weight, hidden_wanted, weight_wanted)
    for part, logits in _chunks(hidden, weight, entries):
        rows.losses(logits, labels[part], token_weights[part], losses[part], hidden_wanted or weight_wanted)
        gradients.add(part, logits)
    return (losses * token_weights).sum(), losses, *gradients.finish(group)


@_op.register_fake
def _(hidden, weight, labels, token_weights, vocabulary_start, entries, group, hidden_wanted, weight_wanted):
    gradients = [
        torch.empty_like(each, memory_format=torch.contiguous_format) if wanted else each.new_empty(0)
        for each, wanted in ((hidden, hidden_wanted), (weight, weight_wanted))
    ]
    return token_weights.new_empty(()), torch.empty_like(token_weights), *gradients


@operator("step::linear_cross_entropy_scale", mutates=("gradient",))
def _scale(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    # The factor is one in most steps: the kernels look at it where it is, so that nothing waits for it, and then do nothing.
    backend = registry.backend(OP, gradient)
    if backend == "torch":
        gradient.mul_(factor)
    else:
        (native.ops().scale if backend == "cpp" else scale_triton)(gradient, factor)


@_scale.register_fake
def _(gradient, factor):
    return None


def _save_gradients(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of the weight's size for the outputs that have no gradient
    # Not with `save_for_backward`: who alone holds a gradient can hand it over, where torch would copy a saved one.
    ctx.gradients, ctx.wanted = list(output[2:]), inputs[-2:]


def _scale_gradients(ctx, grad_total, *_):
    if not ctx.gradients:
        raise RuntimeError(f"{OP}: its gradients are formed once, in the forward pass; call it again for a second backward")
    gradients = [each if wanted else None for each, wanted in zip(ctx.gradients, ctx.wanted, strict=True)]
    ctx.gradients.clear()
    if type(grad_total) is not torch.Tensor:
        # Traced by torch.compile, which does not take a backward that changes what the forward has made.
        gradients = [each if each is None else (each * grad_total).to(each.dtype) for each in gradients]
    else:
        for each in filter(lambda each: each is not None, gradients):
            _scale(each, grad_total)
    return *gradients, *[None] * 7


_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


@operator("step::linear_log_probs")
def _log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocabulary_start: int,
    entries: int,
    group: str,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = Rows(registry.backend(OP, hidden), vocabulary_start, group)
    log_probs, entropy, lse = out = _per_token(hidden, with_entropy)
    for part, logits in _chunks(hidden, weight, entries):
        lse[part], target, found = rows.statistics(logits, labels[part], with_entropy)
        torch.sub(target, lse[part], out=log_probs[part])
        if with_entropy:
            entropy[part] = found
    return out


@_log_probs.register_fake
def _(hidden, weight, labels, vocabulary_start, entries, group, with_entropy):
    return _per_token(hidden, with_entropy)


def _per_token(hidden: torch.Tensor, with_entropy: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for log-probabilities, entropy (empty if not wanted) and log-sum-exp."""
    tokens = hidden.shape[0]
    return tuple(hidden.new_empty(count, dtype=exact(hidden)) for count in (tokens, tokens * with_entropy, tokens))


@operator("step::linear_log_probs_backward")
def _log_probs_backward(
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    vocabulary_start: int,
    entries: int,
    group: str,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = Rows(registry.backend(OP, hidden), vocabulary_start, group)
    gradients = _Gradients(hidden, weight, hidden_wanted, weight_wanted)
    first, second = -grad_log_probs, None
    if grad_entropy is not None:
        first, second = -(grad_log_probs + grad_entropy * entropy), -grad_entropy
    for part, logits in _chunks(hidden, weight, entries):
        at = (each if each is None else each[part] for each in (labels, lse, first, second, grad_log_probs))
        rows.gradient(logits, *at)
        gradients.add(part, logits)
    return gradients.finish(group)


@_log_probs_backward.register_fake
def _(grad_log_probs, grad_entropy, hidden, weight, labels, entropy, lse, start, entries, group, hidden_wanted, weight_wanted):
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format) if wanted else each.new_empty(0)
        for each, wanted in ((hidden, hidden_wanted), (weight, weight_wanted))
    )


def _save_statistics(ctx, inputs, output):
    hidden, weight, labels, *ctx.share, ctx.with_entropy = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, labels, *output[1:])


def _differentiate_log_probs(ctx, grad_log_probs, grad_entropy, _):
    wanted = ctx.needs_input_grad[:2]
    grads = (grad_log_probs.contiguous(), grad_entropy.contiguous() if ctx.with_entropy else None)
    found = _log_probs_backward(*grads, *ctx.saved_tensors, *ctx.share, *wanted)
    return *(each if want else None for each, want in zip(found, wanted, strict=True)), *[None] * 5


_log_probs.register_autograd(_differentiate_log_probs, setup_context=_save_statistics)


def chunk_rows(tokens: int, vocabulary: int, element_bytes: int, device: str) -> int:
    """Tokens whose logits are held at once: chunks of nearly equal size, in whole vectors of 32 rows; the same on all ranks."""
    most = max(32, min(_ROWS[device], _BUFFER_BYTES[device] // (vocabulary * element_bytes)) // 32 * 32)
    chunks = max(1, -(-tokens // most))
    return min(tokens, -(-tokens // (32 * chunks)) * 32)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor, entries: int):
    """Every chunk of tokens, as a slice, with its logits; the logits lie in one buffer, so they hold until the next chunk.

    Padding takes part in the products: a few rows more cost less than a width that matrix products are slow for.
    """
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rows = chunk_rows(tokens, vocabulary, weight.element_size(), "cpu" if hidden.device.type == "cpu" else "cuda")
    buffer = hidden.new_empty(rows, vocabulary)
    for begin in range(0, tokens, max(rows, 1)):
        part = slice(begin, min(begin + rows, tokens))
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - begin])
        if entries < vocabulary:
            logits[:, entries:] = max(_PADDING, torch.finfo(logits.dtype).min)
        yield part, logits


class _Gradients:
    """Sums up the gradients of hidden and weight from the logits' gradients, chunk by chunk; empty where one is not wanted."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, hidden_wanted: bool, weight_wanted: bool):
        self.inputs, self.weights = hidden, weight
        self.hidden = hidden.new_empty(hidden.shape if hidden_wanted else 0)
        self.weight = weight.new_empty(weight.shape if weight_wanted else 0)
        self.hidden_wanted, self.weight_wanted = hidden_wanted, weight_wanted
        if not len(hidden):
            self.weight.zero_()

    def add(self, part: slice, gradient: torch.Tensor) -> None:
        if self.hidden_wanted:
            torch.mm(gradient, self.weights, out=self.hidden[part])
        if self.weight_wanted:
            # The first chunk overwrites whatever the memory held.
            self.weight.addmm_(gradient.t(), self.inputs[part], beta=0 if part.start == 0 else 1)

    def finish(self, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        if group and self.hidden_wanted:
            torch.distributed.all_reduce(self.hidden, group=resolve(group))
        return self.hidden, self.weight

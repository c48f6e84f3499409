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
joined over the ranks with one small message a chunk, and hidden's gradient is summed over them with one message in all.

Every product is a plain matrix product in the inputs' type, each chunk's into the same buffer; what is between them is two passes
over the buffer, in float32: one reads the statistics of a row, one replaces logits by their gradient.

Source: chunking as in Liger-Kernel's fused linear cross entropy (Hsu et al., 2024); statistics joined over ranks as in
Megatron-LM's vocabulary-parallel cross entropy (Shoeybi et al., 2019).
"""

import torch
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from step_kernels import native, registry
from step_kernels.softmax_rows import gradient_triton, losses_triton, scale_triton, statistics_triton

OP = "linear_cross_entropy"
registry.register(OP, triton=(*registry.HALF, torch.float32), cpp=(torch.float32,))

# Rows of a chunk: enough for the matrix products to be as fast as whole, few enough for the buffer to stay small beside eager's
# three or more copies of all logits.
_ROWS = {"cpu": 512, "cuda": 1024}
_BUFFER_BYTES = {"cpu": 160 << 20, "cuda": 512 << 20}


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the loss mode in plain torch, for a whole vocabulary; every backend is tested against this, in float64."""
    losses = cross_entropy((hidden @ weight.t()).to(_exact(hidden)), labels, reduction="none")
    return (losses if token_weights is None else losses * token_weights).sum(), losses.detach()


def linear_log_probs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Define the log-probability mode in plain torch, for a whole vocabulary."""
    log_p = (hidden @ weight.t()).to(_exact(hidden)).log_softmax(-1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    vocabulary_start: int = 0,
    group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum of the tokens' cross entropies; its gradients are formed here and scaled in backward (float16: formed there).

    Args:
        hidden: `[tokens, width]`, the same on all ranks of `group`.
        weight: `[vocabulary of this rank, width]`, in hidden's type.
        labels: `[tokens]` int64, ids in the whole vocabulary; one that no rank holds is allowed where its weight is 0.
        token_weights: `[tokens]` float, None for ones. No gradient goes to it.
        vocabulary_start: the id of the weight's first row.
        group: the ranks that share the vocabulary; None for one.

    Returns:
        The sum of weight times loss, a scalar through which gradients flow, and the loss of every token, `[tokens]`, without
        gradient. Both in float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or types that do not fit.
    """
    _validate(hidden, weight, labels)
    if token_weights is None:
        token_weights = torch.ones_like(labels, dtype=_exact(hidden))
    if token_weights.shape != labels.shape:
        raise ValueError(f"{OP}: {len(labels)} labels, but token_weights of shape {tuple(token_weights.shape)}; give one a token")
    token_weights = token_weights.detach().to(_exact(hidden))
    wanted = [torch.is_grad_enabled() and each.requires_grad for each in (hidden, weight)]
    if hidden.dtype == torch.float16 and any(wanted):
        log_probs, _ = linear_log_probs(hidden, weight, labels, vocabulary_start, group)
        return -(log_probs * token_weights).sum(), -log_probs.detach()
    name = "" if group is None or group.size() == 1 else group.group_name
    total, losses, _, _ = _op(hidden, weight, labels, token_weights, vocabulary_start, name, *wanted)
    return total, losses


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    vocabulary_start: int = 0,
    group: ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every label and entropy of every token's distribution; arguments as in `linear_cross_entropy`.

    Returns:
        `[tokens]` each, float32 (float64 for float64 inputs); both differentiable with respect to hidden and weight.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    _validate(hidden, weight, labels)
    name = "" if group is None or group.size() == 1 else group.group_name
    log_probs, entropy, _ = _log_probs(hidden, weight, labels, vocabulary_start, name)
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


@torch.library.custom_op("step::linear_cross_entropy", mutates_args=())
def _op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weights: torch.Tensor,
    vocabulary_start: int,
    group: str,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _Rows(registry.backend(OP, hidden), vocabulary_start, group)
    losses = torch.empty_like(token_weights)
    gradients = _Gradients(hidden, weight, hidden_wanted, weight_wanted)
    for part, logits in _chunks(hidden, weight):
        rows.losses(logits, labels[part], token_weights[part], losses[part], hidden_wanted or weight_wanted)
        gradients.add(part, logits)
    return (losses * token_weights).sum(), losses, *gradients.finish(group)


@_op.register_fake
def _(hidden, weight, labels, token_weights, vocabulary_start, group, hidden_wanted, weight_wanted):
    gradients = [
        torch.empty_like(each, memory_format=torch.contiguous_format) if wanted else each.new_empty(0)
        for each, wanted in ((hidden, hidden_wanted), (weight, weight_wanted))
    ]
    return token_weights.new_empty(()), torch.empty_like(token_weights), *gradients


@torch.library.custom_op("step::linear_cross_entropy_scale", mutates_args=("gradient",))
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
    return *gradients, *[None] * 6


_op.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("step::linear_log_probs", mutates_args=())
def _log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocabulary_start: int, group: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _Rows(registry.backend(OP, hidden), vocabulary_start, group)
    out = hidden.new_empty(3, hidden.shape[0], dtype=_exact(hidden))
    for part, logits in _chunks(hidden, weight):
        lse, target, entropy = rows.statistics(logits, labels[part], moments=True)
        out[:, part] = torch.stack((target - lse, entropy, lse))
    return tuple(each.clone() for each in out)


@_log_probs.register_fake
def _(hidden, weight, labels, vocabulary_start, group):
    return tuple(hidden.new_empty(hidden.shape[0], dtype=_exact(hidden)) for _ in range(3))


@torch.library.custom_op("step::linear_log_probs_backward", mutates_args=())
def _log_probs_backward(
    grad_log_probs: torch.Tensor,
    grad_entropy: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    vocabulary_start: int,
    group: str,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = _Rows(registry.backend(OP, hidden), vocabulary_start, group)
    gradients = _Gradients(hidden, weight, hidden_wanted, weight_wanted)
    first, second = -(grad_log_probs + grad_entropy * entropy), -grad_entropy
    for part, logits in _chunks(hidden, weight):
        rows.gradient(logits, labels[part], lse[part], first[part], second[part], grad_log_probs[part])
        gradients.add(part, logits)
    return gradients.finish(group)


@_log_probs_backward.register_fake
def _(grad_log_probs, grad_entropy, hidden, weight, labels, entropy, lse, vocabulary_start, group, hidden_wanted, weight_wanted):
    return tuple(
        torch.empty_like(each, memory_format=torch.contiguous_format) if wanted else each.new_empty(0)
        for each, wanted in ((hidden, hidden_wanted), (weight, weight_wanted))
    )


def _save_statistics(ctx, inputs, output):
    hidden, weight, labels, ctx.vocabulary_start, ctx.group = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, weight, labels, *output[1:])


def _differentiate_log_probs(ctx, grad_log_probs, grad_entropy, _):
    wanted = ctx.needs_input_grad[:2]
    grads = (grad_log_probs.contiguous(), grad_entropy.contiguous())
    found = _log_probs_backward(*grads, *ctx.saved_tensors, ctx.vocabulary_start, ctx.group, *wanted)
    return *(each if want else None for each, want in zip(found, wanted, strict=True)), None, None, None


_log_probs.register_autograd(_differentiate_log_probs, setup_context=_save_statistics)


def _exact(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def chunk_rows(tokens: int, vocabulary: int, element_bytes: int, device: str) -> int:
    """Tokens whose logits are held at once: chunks of nearly equal size, in whole vectors of 32 rows."""
    most = max(32, min(_ROWS[device], _BUFFER_BYTES[device] // (vocabulary * element_bytes)) // 32 * 32)
    chunks = max(1, -(-tokens // most))
    return min(tokens, -(-tokens // (32 * chunks)) * 32)


def _chunks(hidden: torch.Tensor, weight: torch.Tensor):
    """Every chunk of tokens, as a slice, with its logits; the logits lie in one buffer, so they hold until the next chunk."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    rows = chunk_rows(tokens, vocabulary, weight.element_size(), "cpu" if hidden.device.type == "cpu" else "cuda")
    buffer = hidden.new_empty(rows, vocabulary)
    for begin in range(0, tokens, max(rows, 1)):
        part = slice(begin, min(begin + rows, tokens))
        yield part, torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - begin])


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
            torch.distributed.all_reduce(self.hidden, group=_resolve(group))
        return self.hidden, self.weight


class _Rows:
    """The two passes over a chunk's logits, by one backend; statistics are joined over the ranks that share the vocabulary."""

    def __init__(self, backend: str, start: int, group: str):
        self.backend, self.start, self.group = backend, start, group

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, gradient: bool
    ) -> None:
        """Write every row's loss; if wanted, replace the logits by the gradient of the weighted sum."""
        if self.backend == "triton" and not self.group:
            losses_triton(logits, labels, weights, out, self.start, gradient)
            return
        lse, target, _ = self.statistics(logits, labels, moments=False)
        torch.sub(lse, target, out=out)
        if gradient:
            self.gradient(logits, labels, lse, weights, torch.zeros_like(weights), -weights)

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, moments: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-sum-exp, target logit and (with `moments`) entropy of every row, over the whole vocabulary."""
        if self.backend == "torch":
            found = _statistics_torch(logits, labels - self.start)
        else:
            found = logits.new_empty(4, len(labels), dtype=torch.float32)
            run = native.ops().softmax_statistics if self.backend == "cpp" else statistics_triton
            run(logits, labels, self.start, moments, found)
        largest, total, target, moment = self._join(found) if self.group else found
        log_total = total.log()
        return largest + log_total, target, log_total - moment / total

    def gradient(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        lse: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        at_target: torch.Tensor,
    ) -> None:
        """Replace every logit by `p (first + second log p)`, p = e^(logit - lse), and add `at_target` at the label."""
        if self.backend == "torch":
            _gradient_torch(logits, labels - self.start, lse, first, second, at_target)
            return
        run = native.ops().softmax_gradient if self.backend == "cpp" else gradient_triton
        run(logits, labels, self.start, lse, first, second, at_target)

    def _join(self, found: torch.Tensor) -> torch.Tensor:
        """Statistics of the whole vocabulary from each rank's, `[4, rows]`; the same bits on every rank."""
        group = _resolve(self.group)
        shares = found.new_empty(4 * group.size(), found.shape[1])
        torch.distributed.all_gather_into_tensor(shares, found, group=group)
        largest, total, target, moment = shares.unflatten(0, (-1, 4)).unbind(1)
        most = largest.amax(0)
        below = largest - most
        factor = below.exp()
        return torch.stack((most, (total * factor).sum(0), target.sum(0), ((moment + total * below) * factor).sum(0)))


def _resolve(group: str) -> ProcessGroup:
    return torch.distributed.distributed_c10d._resolve_process_group(group)


def _statistics_torch(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    values = logits.to(_exact(logits))
    largest = values.amax(1)
    below = values - largest[:, None]
    power = below.exp()
    inside = (target >= 0) & (target < logits.shape[1])
    at = values.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    return torch.stack((largest, power.sum(1), at.where(inside, 0), (power * below).sum(1)))


def _gradient_torch(logits, target, lse, first, second, at_target) -> None:
    log_p = logits.to(lse.dtype) - lse[:, None]
    gradient = log_p.exp() * (first[:, None] + second[:, None] * log_p)
    inside = (target >= 0) & (target < logits.shape[1])
    at = target.clamp(0, logits.shape[1] - 1)[:, None]
    logits.copy_(gradient.scatter_add_(1, at, at_target.where(inside, 0)[:, None]))

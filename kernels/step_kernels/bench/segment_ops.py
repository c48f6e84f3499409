"""Cases of the ops that move along packed segments: pool + norm, conv + GELU, both at once, merging audio, GAE.

Each has to be twice as fast as eager torch and no slower than `torch.compile` of the same code. Eager is the op as its definition
and its users write it: Conv1d, index_copy, masked_scatter. Beside what does the very work of ours (the same matrix product of
gathered columns, the same rows written in place) as fast is all that is asked for.
"""

from collections.abc import Callable

import torch

from step_kernels import conv_downsample_gelu, fused_downsample, gae_varlen, merge_audio_embeddings_, pool_norm_downsample
from step_kernels.bench import lengths as real
from step_kernels.bench.contestants import compiled, eager, forward_backward, forward_only, ours
from step_kernels.bench.harness import Case, Contestant, Work
from step_kernels.conv_downsample import conv_downsample_gelu_reference, downsample_taps
from step_kernels.fused_downsample import feature_starts
from step_kernels.pool_norm_downsample import in_torch as pool_norm_in_torch
from step_kernels.segments import cumulative

_EAGER, _COMPILED, _SAME_WORK = 2.0, 1.0, 1.0
_WIDTHS = (512, 1280)


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device)


def _peer(name: str, work: Work, limit: float) -> Contestant:
    return Contestant(name, lambda: work, limit)


def _passes(arguments: tuple, leaves: tuple, gradient: torch.Tensor) -> list[tuple[str, Callable]]:
    """By the name of what is timed, what makes work of a function; it may be given other arguments than `arguments`."""

    def forward(function, a=arguments):
        return forward_only(lambda: function(*a))

    def both(function, a=arguments):
        return forward_backward(lambda: function(*a), leaves, gradient)

    return [("forward", forward), ("forward + backward", both)]


def pool_norm_cases(device: torch.device) -> list[Case]:
    """The encoder's tail, on the frames of real prompts at 50 Hz."""
    lengths = real.asterisk()
    cases = []
    for width in _WIDTHS:
        arguments = (
            _random(device, sum(lengths), width),
            cumulative(lengths, device),
            _random(device, width),
            _random(device, width),
            1e-5,
            sum(length // 2 for length in lengths),
        )
        contestants = [
            *ours("pool_norm_downsample", lambda a=arguments: pool_norm_downsample(*a), device),
            eager(lambda a=arguments: pool_norm_in_torch(*a), _EAGER),
            compiled(pool_norm_in_torch, arguments, _COMPILED),
        ]
        cases.append(Case("pool-norm-downsample", f"{real.named(lengths)} x {width}", contestants))
    return cases


def _columns_conv(x, cu_seqlens, weight, bias, rows):
    columns = torch.nn.functional.pad(x, (0, 0, 1, 0)).index_select(0, downsample_taps(cu_seqlens, rows).flatten())
    flat = weight.transpose(1, 2).reshape(weight.shape[0], -1)
    return torch.nn.functional.gelu(torch.nn.functional.linear(columns.view(rows, 3 * x.shape[1]), flat, bias))


def _padded_conv(x, inside, weight, bias):
    """Conv1d on a padded batch `[segments, width, longest]`, and the rows that are `inside` their segments packed."""
    return torch.nn.functional.gelu(torch.nn.functional.conv1d(x, weight, bias, stride=2, padding=1)).transpose(1, 2)[inside]


def _padded(x: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch that Conv1d takes, and which of its outputs there are, `[segments, longest]`."""
    batch = torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2).contiguous()
    outputs = torch.tensor([(length + 1) // 2 for length in lengths], device=x.device)
    return batch, torch.arange((batch.shape[2] + 1) // 2, device=x.device) < outputs[:, None]


def _parameters(device: torch.device, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = _random(device, width, width, 3, scale=(3 * width) ** -0.5)
    return weight.requires_grad_(), _random(device, width).requires_grad_()


def conv_cases(device: torch.device) -> list[Case]:
    """The adaptor's convolution on their features at 25 Hz; backward as in training, without the gradient of the features."""
    lengths = [length // 2 for length in real.asterisk()]
    rows = sum((length + 1) // 2 for length in lengths)
    cases = []
    for width in _WIDTHS:
        x, cu_seqlens = _random(device, sum(lengths), width), cumulative(lengths, device)
        leaves, gradient = _parameters(device, width), _random(device, rows, width)
        arguments, batch = (x, cu_seqlens, *leaves, rows), (*_padded(x, lengths), *leaves)

        for name, wrap in _passes(arguments, leaves, gradient):
            contestants = [
                *ours("conv_downsample_gelu", wrap(conv_downsample_gelu), device),
                _peer("eager, Conv1d a segment", wrap(conv_downsample_gelu_reference, arguments[:4]), _EAGER),
                _peer("eager, Conv1d padded", wrap(_padded_conv, batch), _EAGER),
                # The same product by the same library, so there is no factor of two to be had.
                _peer("eager, columns", wrap(_columns_conv), _SAME_WORK),
                compiled(_columns_conv, arguments, _COMPILED, wrap),
            ]
            # Few rounds: Conv1d takes seconds.
            cases.append(Case("conv-downsample-gelu", f"{real.named(lengths)} x {width}, {name}", contestants, rounds=9))
    return cases


def _fused(hidden, cu_seqlens, starts, norm_weight, norm_bias, weight, bias, frames, rows):
    return fused_downsample(hidden, cu_seqlens, norm_weight, norm_bias, 1e-5, weight, bias, frames, rows)


def _two_ops(hidden, cu_seqlens, starts, norm_weight, norm_bias, weight, bias, frames, rows):
    features = pool_norm_downsample(hidden, cu_seqlens, norm_weight, norm_bias, 1e-5, frames)
    return conv_downsample_gelu(features.bfloat16(), starts, weight, bias, rows)


def _two_eager_steps(hidden, cu_seqlens, starts, norm_weight, norm_bias, weight, bias, frames, rows):
    features = pool_norm_in_torch(hidden, cu_seqlens, norm_weight, norm_bias, 1e-5, frames)
    return _columns_conv(features.bfloat16().to(weight.dtype), starts, weight, bias, rows)


def fused_cases(device: torch.device) -> list[Case]:
    """From the encoder's frames of real prompts at 50 Hz to the adaptor's at 12.5 Hz, beside the two steps."""
    lengths = real.asterisk()
    frames, rows = sum(length // 2 for length in lengths), sum((length // 2 + 1) // 2 for length in lengths)
    cu_seqlens, cases = cumulative(lengths, device), []
    for width in _WIDTHS:
        hidden, norm = _random(device, sum(lengths), width), (_random(device, width), _random(device, width))
        leaves, gradient = _parameters(device, width), _random(device, rows, width)
        arguments = (hidden, cu_seqlens, feature_starts(cu_seqlens), *norm, *leaves, frames, rows)

        for name, wrap in _passes(arguments, leaves, gradient):
            contestants = [
                *ours("fused_downsample", wrap(_fused), device),
                _peer("ours, two ops", wrap(_two_ops), _SAME_WORK),
                _peer("eager, two steps", wrap(_two_eager_steps), _SAME_WORK),
                compiled(_two_eager_steps, arguments, _COMPILED, wrap),
            ]
            # torch.compile leaves the rounding of the features out: 2^-9 of their size.
            shape = f"{real.named(lengths)} x {width}, {name}"
            cases.append(Case("fused-downsample", shape, contestants, tolerance=5e-3))
    return cases


def _made(leaf: torch.Tensor) -> torch.Tensor:
    """A leaf's memory as the result of a function, as an embedding's is in the model: no leaf, and to autograd no view of one."""
    return torch.ops.aten._unsafe_view.default(leaf, leaf.shape)


def _merge(tokens, audio, positions):
    return merge_audio_embeddings_(_made(tokens), audio, positions)


def _index_copy(tokens, audio, positions):
    return tokens.index_copy(0, positions, audio)


def _masked_scatter(tokens, audio, positions):
    """As transformers merges, there with a mask made of the token ids."""
    mask = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device).index_fill_(0, positions, True)
    return tokens.masked_scatter(mask[:, None, None].expand_as(tokens), audio)


def _index_copy_in_place(tokens, audio, positions):
    return _made(tokens).index_copy_(0, positions, audio)


def merge_cases(device: torch.device) -> list[Case]:
    """The audio tokens of real prompts into conversations around them; ours in place, as the model has it."""
    cases = []
    for width in _WIDTHS:
        clips = [length // 4 for length in real.asterisk()]
        # Each clip stands behind 16 tokens of text, and is followed by 24.
        places, at = [], 0
        for clip in clips:
            places += range(at + 16, at + 16 + clip)
            at += 40 + clip
        tokens, audio = _random(device, at, 1, width).requires_grad_(), _random(device, len(places), 1, width).requires_grad_()
        positions = torch.tensor(places, device=device)
        arguments, gradient = (tokens, audio, positions), _random(device, at, 1, width)

        for name, wrap in _passes(arguments, (tokens, audio), gradient):
            contestants = [
                *ours("merge_audio_embeddings", wrap(_merge), device),
                _peer("eager, index_copy", wrap(_index_copy), _EAGER),
                _peer("eager, masked_scatter", wrap(_masked_scatter), _EAGER),
                # It moves the same rows as ours, so there is no factor of two to be had.
                _peer("eager, in place", wrap(_index_copy_in_place), _SAME_WORK),
                compiled(_index_copy, arguments, _COMPILED, wrap),
            ]
            shape = f"{len(places)} audio tokens into {at} x {width}, {name}"
            cases.append(Case("merge-audio", shape, contestants, tolerance=0.0))
    return cases


def _eager_gae(rewards, values, cu_seqlens, gamma, lam):
    """As TRL writes it: a loop over the longest response's tokens on padded rows, here with the padding and its removal."""
    lengths = cu_seqlens.diff().tolist()
    padded = [torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True) for x in (rewards, values)]
    inside = torch.arange(padded[0].shape[1], device=values.device) < cu_seqlens.diff()[:, None]
    last, advantages = torch.zeros_like(padded[0][:, 0]), []
    for t in reversed(range(padded[0].shape[1])):
        next_values = padded[1][:, t + 1] if t + 1 < padded[0].shape[1] else 0.0
        last = padded[0][:, t] + gamma * next_values - padded[1][:, t] + gamma * lam * last
        advantages.append(last)
    advantages = torch.stack(advantages[::-1], 1)[inside]
    return advantages, advantages + values


def gae_cases(device: torch.device) -> list[Case]:
    """Responses as short as prompts, and of 256 to 2,000 tokens."""
    from step_kernels.gae import _torch

    cases = []
    for lengths in (real.asterisk(), [256 + 37 * (n % 48) for n in range(64)]):
        tokens, cu_seqlens = sum(lengths), cumulative(lengths, device)
        arguments = (_random(device, tokens), _random(device, tokens, scale=0.5), cu_seqlens, 1.0, 0.95)
        scan = (*arguments[:3], torch.zeros(len(lengths), device=device), *arguments[3:])
        contestants = [
            *ours("gae_varlen", lambda a=arguments: gae_varlen(*a), device),
            eager(lambda a=scan: _torch(*a), _EAGER),
            compiled(_torch, scan, _COMPILED),
            Contestant("eager, padded loop", lambda a=arguments: lambda: _eager_gae(*a), _EAGER),
        ]
        cases.append(Case("gae", f"{len(lengths)} segments, {tokens} tokens", contestants, tolerance=1e-4))
    return cases


CASES = {
    "pool-norm-downsample": pool_norm_cases,
    "conv-downsample-gelu": conv_cases,
    "fused-downsample": fused_cases,
    "merge-audio": merge_cases,
    "gae": gae_cases,
}

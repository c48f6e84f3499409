"""Cases of the ops that move along packed segments: pool + norm, conv + GELU, merging audio, GAE.

Each has to be twice as fast as eager torch over the packed rows and no slower than `torch.compile` of the same code.
"""

import torch

from step_kernels import conv_downsample_gelu, gae_varlen, merge_audio_embeddings_, pool_norm_downsample
from step_kernels.bench import lengths as real
from step_kernels.bench.contestants import compiled, eager, forward_backward, forward_only, ours
from step_kernels.bench.harness import Case, Contestant
from step_kernels.conv_downsample import downsample_taps
from step_kernels.segments import cumulative

_EAGER, _COMPILED = 2.0, 1.0
_WIDTHS = (512, 1280)


def _random(device: torch.device, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(device)


def pool_norm_cases(device: torch.device) -> list[Case]:
    """The encoder's tail, on the frames of real prompts at 50 Hz."""
    from step_kernels.pool_norm_downsample import in_torch

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
            eager(lambda a=arguments: in_torch(*a), _EAGER),
            compiled(in_torch, arguments, _COMPILED),
        ]
        cases.append(Case("pool-norm-downsample", f"{real.named(lengths)} x {width}", contestants))
    return cases


def _eager_conv(x, cu_seqlens, weight, bias, rows):
    columns = torch.nn.functional.pad(x, (0, 0, 1, 0)).index_select(0, downsample_taps(cu_seqlens, rows).flatten())
    flat = weight.transpose(1, 2).reshape(weight.shape[0], -1)
    return torch.nn.functional.gelu(torch.nn.functional.linear(columns.view(rows, 3 * x.shape[1]), flat, bias))


def conv_cases(device: torch.device) -> list[Case]:
    """The adaptor's convolution on their features at 25 Hz; backward as in training, without the gradient of the features."""
    lengths = [length // 2 for length in real.asterisk()]
    rows = sum((length + 1) // 2 for length in lengths)
    cases = []
    for width in _WIDTHS:
        x, cu_seqlens = _random(device, sum(lengths), width), cumulative(lengths, device)
        weight = _random(device, width, width, 3, scale=(3 * width) ** -0.5).requires_grad_()
        bias = _random(device, width).requires_grad_()
        arguments = (x, cu_seqlens, weight, bias, rows)
        gradient = _random(device, rows, width)

        def forward(function, a=arguments):
            return forward_only(lambda: function(*a))

        def both(function, a=arguments, leaves=(weight, bias), gradient=gradient):
            return forward_backward(lambda: function(*a), leaves, gradient)

        for name, wrap in (("forward", forward), ("forward + backward", both)):
            contestants = [
                *ours("conv_downsample_gelu", wrap(conv_downsample_gelu), device),
                eager(wrap(_eager_conv), _EAGER),
                compiled(_eager_conv, arguments, _COMPILED, wrap),
            ]
            cases.append(Case("conv-downsample-gelu", f"{real.named(lengths)} x {width}, {name}", contestants))
    return cases


def _merge(tokens, audio, positions):
    # In the model the tokens come from an embedding, not from a leaf.
    return merge_audio_embeddings_(tokens.view_as(tokens), audio, positions)


def _index_copy(tokens, audio, positions):
    return tokens.index_copy(0, positions, audio)


def _masked_scatter(tokens, audio, positions):
    """As transformers merges, there with a mask made of the token ids."""
    mask = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device).index_fill_(0, positions, True)
    return tokens.masked_scatter(mask[:, None, None].expand_as(tokens), audio)


def _index_copy_in_place(tokens, audio, positions):
    return tokens.index_copy_(0, positions, audio)


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

        def forward(function, a=arguments):
            return forward_only(lambda: function(*a))

        def both(function, a=arguments, gradient=gradient):
            return forward_backward(lambda: function(*a), a[:2], gradient)

        for name, wrap in (("forward", forward), ("forward + backward", both)):
            contestants = [
                *ours("merge_audio_embeddings", wrap(_merge), device),
                eager(wrap(_index_copy), _EAGER),
                Contestant("eager, masked_scatter", lambda wrap=wrap: wrap(_masked_scatter), _EAGER),
                compiled(_index_copy, arguments, _COMPILED, wrap),
            ]
            if wrap is forward:  # autograd does not let torch write into a leaf, nor into a view of one
                contestants.append(Contestant("eager, in place", lambda wrap=wrap: wrap(_index_copy_in_place), _COMPILED))
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
    "merge-audio": merge_cases,
    "gae": gae_cases,
}

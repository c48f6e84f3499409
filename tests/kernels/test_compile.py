"""Every public op can stand in a function that torch compiles whole: same results and gradients, for one size and for another."""

import pytest
import step_kernels
import torch
from step_kernels.segments import cumulative


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def attention(op):
    def make(tokens: int, width: int):
        lengths, bounds = [tokens - 1, 1], cumulative([tokens - 1, 1])
        return lambda q, k, v: op(q, k, v, bounds, lengths), [rows(tokens, heads, width) for heads in (4, 2, 2)]

    return make


def audio_attention(tokens: int, width: int):
    lengths, bounds = [tokens - 1, 1], cumulative([tokens - 1, 1])
    return (
        lambda q, k, v: step_kernels.audio_attention_varlen(q, k, v, bounds, lengths, [tokens - 2, 1], return_lse=True),
        [rows(tokens, 2, width) for _ in range(3)],
    )


def conv_downsample(tokens: int, width: int):
    bounds = cumulative([tokens])
    inputs = [rows(tokens, width), rows(24, width, 3), rows(24)]
    return lambda x, w, b: step_kernels.conv_downsample_gelu(x, bounds, w, b, (tokens + 1) // 2), inputs


def fused_downsample(tokens: int, width: int):
    bounds, hidden = cumulative([tokens]), rows(tokens, width).detach()
    norm, features = (torch.ones(width), torch.zeros(width)), tokens // 2
    return (
        lambda w, b: step_kernels.fused_downsample(hidden, bounds, *norm, 1e-5, w, b, features, (features + 1) // 2),
        [rows(24, width, 3), rows(24)],
    )


def pool_norm(tokens: int, width: int):
    bounds, norm = cumulative([tokens]), (torch.ones(width), torch.zeros(width))
    return lambda x: step_kernels.pool_norm_downsample(x, bounds, *norm, 1e-5, tokens // 2), [rows(tokens, width).detach()]


def gae(tokens: int, width: int):
    bounds = cumulative([tokens - 1, 1])
    return lambda r, v: step_kernels.gae_varlen(r, v, bounds, 0.9, 0.95), [rows(tokens).detach() for _ in range(2)]


def paged(tokens: int, width: int):
    table, lengths, bounds = torch.tensor([[1, 0]]), torch.tensor([tokens]), cumulative([2])
    return (
        lambda q, k, v: step_kernels.paged_attention(q, k, v, table.int(), lengths.int(), bounds, 2),
        [rows(2, 4, width).detach(), *(rows(2, 16, 2, width).detach() for _ in range(2))],
    )


def rope_to_cache(tokens: int, width: int):
    slots, turn = torch.arange(tokens).flip(0), [rows(tokens, width).detach() for _ in range(2)]

    def function(qkv):
        keys, values = (torch.zeros(3, 4, 2, width) for _ in range(2))
        return step_kernels.rope_to_cache(qkv, *turn, keys, values, slots), keys, values

    return function, [rows(tokens, 2, 4, width).detach()]


def draw(tokens: int, width: int):
    counter = torch.arange(tokens)
    settings = [torch.full((tokens,), 0.7), counter, counter + 1, torch.full((tokens,), -1)]
    return step_kernels.draw_tokens, [rows(tokens, width).detach(), *settings]


def labelled(op, *rest):
    def make(tokens: int, width: int):
        labels = torch.arange(tokens)
        return lambda h, w: op(h, w, labels, *rest), [rows(tokens, width), rows(40, width)]

    return make


def merge(op):
    def make(tokens: int, width: int):
        positions = torch.tensor([2, 0])
        # A copy first: tokens that the op may write into.
        return lambda t, a: op(t * 1, a, positions), [rows(tokens, width), rows(2, width)]

    return make


CASES = {
    "audio_attention_varlen": audio_attention,
    "causal_attention_varlen": attention(step_kernels.causal_attention_varlen),
    "conv_downsample_gelu": conv_downsample,
    "draw_tokens": draw,
    "fused_downsample": fused_downsample,
    "gae_varlen": gae,
    "linear_cross_entropy": labelled(step_kernels.linear_cross_entropy),
    "linear_log_probs": labelled(step_kernels.linear_log_probs),
    "merge_audio_embeddings": merge(step_kernels.merge_audio_embeddings),
    "merge_audio_embeddings_": merge(step_kernels.merge_audio_embeddings_),
    "paged_attention": paged,
    "pool_norm_downsample": pool_norm,
    "rms_norm": lambda tokens, width: (lambda x, w: step_kernels.rms_norm(x, w, 1e-5), [rows(tokens, width), rows(width)]),
    "rope_qk": lambda tokens, width: (
        step_kernels.rope_qk,
        [rows(tokens, 4, width), rows(tokens, 2, width), *(rows(tokens, width).detach() for _ in range(2))],
    ),
    "rope_to_cache": rope_to_cache,
    "skinny_linear": lambda tokens, width: (
        step_kernels.skinny_linear,
        [rows(tokens, width).detach(), rows(24, width).detach(), rows(24).detach(), rows(width).detach()],
    ),
    "skinny_linear_add_": lambda tokens, width: (
        lambda y, x, weight: step_kernels.skinny_linear_add_(y * 1, x, weight),
        [rows(tokens, 24).detach(), rows(tokens, width).detach(), rows(24, width).detach()],
    ),
    "swiglu": lambda tokens, width: (step_kernels.swiglu, [rows(tokens, 2 * width)]),
}


def outcomes(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results, and the gradients of what can be trained."""
    out = function(*inputs)
    outs = [each for each in (out if isinstance(out, tuple) else (out,))]
    leaves = [each for each in inputs if each.requires_grad]
    total = sum((each * each).sum() for each in outs if each.requires_grad)
    return [each.detach() for each in outs] + (list(torch.autograd.grad(total, leaves)) if leaves else [])


def test_every_public_op_has_a_case():
    about = {"available_backends", "backends_of", "registered"}
    assert set(CASES) == set(step_kernels.__all__) - about


@pytest.mark.parametrize("op", CASES)
def test_it_compiles_whole_and_gives_the_same(op):
    torch.compiler.reset()
    for dynamic in (False, True):
        for tokens, width in ((7, 16), (9, 32)):
            function, inputs = CASES[op](tokens, width)
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            for mine, theirs in zip(outcomes(compiled, inputs), outcomes(function, inputs), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

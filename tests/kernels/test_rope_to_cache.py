"""rope_to_cache: equals its definition wherever the tokens go, writes nothing else, and is registered correctly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from step_kernels import rope_to_cache
from step_kernels.rope_to_cache import _op, rope_to_cache_reference
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced

PAGES, SIZE = 5, 4


def case(tokens: int, groups: int, queries: int, dim: int, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    slots = torch.randperm(PAGES * SIZE, generator=generator)[:tokens]
    caches = [draw(PAGES, SIZE, groups, dim) for _ in range(2)]
    return draw(tokens, groups, queries + 2, dim), draw(tokens, dim), draw(tokens, dim), *caches, slots


@pytest.mark.parametrize("backend", backends_here("rope_to_cache"))
@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 4), st.sampled_from([2, 6, 16, 64]))
def test_equals_its_definition_and_leaves_the_other_slots(backend, tokens, groups, queries, dim):
    qkv, cos, sin, keys, values, slots = case(tokens, groups, queries, dim)
    before = keys.clone(), values.clone()
    exact, plain = ([each.to(dtype, copy=True) for each in (qkv, cos, sin, keys, values)] for dtype in (torch.float64, qkv.dtype))
    queries_of = [rope_to_cache_reference(*each, slots) for each in (exact, plain)]
    with forced(backend):
        query = rope_to_cache(qkv, cos, sin, keys, values, slots)
    for each in zip((query, keys, values), (queries_of[0], *exact[3:]), (queries_of[1], *plain[3:]), strict=True):
        assert_as_good_as_plain(*each)
    others = torch.ones(PAGES * SIZE, dtype=torch.bool).index_fill_(0, slots, False)
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(cache.flatten(0, 1)[others], old.flatten(0, 1)[others])


def test_sizes_that_do_not_fit_are_named():
    qkv, cos, sin, keys, values, slots = case(3, 2, 2, 16)
    with pytest.raises(ValueError, match="page_size, groups, dim"):
        rope_to_cache(qkv, cos, sin, keys[:, :, :1], values, slots)
    with pytest.raises(ValueError, match="one row a token"):
        rope_to_cache(qkv, cos, sin, keys, values, slots[:2])
    with pytest.raises(ValueError, match="cast them to one"):
        rope_to_cache(qkv, cos.double(), sin, keys, values, slots)


def test_training_through_it_is_refused():
    qkv, *others = case(3, 2, 2, 16)
    with pytest.raises(ValueError, match="forward only"):
        rope_to_cache(qkv.requires_grad_(), *others)


def test_registration():
    torch.library.opcheck(_op.registered, case(3, 2, 2, 16))

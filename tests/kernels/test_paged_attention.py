"""paged_attention: equals its definition for any mix of decoding and prompts, by every backend; companions change nothing."""

import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import paged_attention
from step_kernels.paged_attention import _op, aot_kernels, paged_attention_reference
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain, backends_here, forced
from support.triton_faults import with_fault

BACKENDS = backends_here("paged_attention")
# (tokens in the cache, new ones among them): the C++ kernel splits from 513 keys on, the Triton kernel from 257.
SPLIT = {"cpp": 513, "triton": 257, "torch": 20}


class Paged:
    """A cache in scattered pages with the arguments of the op; foreign pages hold NaN."""

    def __init__(self, sequences, heads=4, kv_heads=2, dim=16, page_size=16, seed=0, dtype=torch.float32, max_pages=None):
        lengths, queries = [length for length, _ in sequences], [new for _, new in sequences]
        generator = torch.Generator().manual_seed(seed)
        needed = [-(-length // page_size) for length in lengths]
        max_pages = max_pages or max([1, *needed]) + 1
        order = random.Random(seed).sample(range(sum(needed) + 3), sum(needed) + 3)
        self.key, self.value = torch.full((2, sum(needed) + 3, page_size, kv_heads, dim), float("nan"), dtype=dtype)
        self.table = torch.full((len(lengths), max_pages), -7, dtype=torch.int32)
        for index, (length, pages) in enumerate(zip(lengths, needed, strict=True)):
            mine = [order.pop() for _ in range(pages)]
            self.table[index, :pages] = torch.tensor(mine, dtype=torch.int32)
            for cache in (self.key, self.value):
                content = torch.randn(length, kv_heads, dim, generator=generator)
                for i, page in enumerate(mine):
                    held = content[i * page_size : (i + 1) * page_size]
                    cache[page, : len(held)] = held
        self.query = (2 * torch.randn(sum(queries), heads, dim, generator=generator)).to(dtype)
        self.lengths, self.bounds = torch.tensor(lengths, dtype=torch.int32), cumulative(queries)
        self.max_queries, self.scale = max([1, *queries]), dim**-0.5

    def arguments(self):
        return self.query, self.key, self.value, self.table, self.lengths, self.bounds

    def run(self, backend):
        with forced(backend):
            return paged_attention(*self.arguments(), self.max_queries)

    def reference(self, dtype):
        arguments = [x.to(dtype) if x.is_floating_point() else x for x in self.arguments()]
        return paged_attention_reference(*arguments, self.scale)


def assert_right(paged, backend):
    assert_as_good_as_plain(paged.run(backend), paged.reference(torch.float64), paged.reference(paged.query.dtype))


def test_it_has_fast_backends_here():
    assert {"cpp", "triton"} <= set(BACKENDS)


def test_the_reference_is_causal_attention_over_the_cache():
    paged = Paged([(9, 4)], heads=2, kv_heads=2)
    pages = paged.table[0, :1].long()
    keys, values = (cache[pages].flatten(0, 1)[:9].double().transpose(0, 1) for cache in (paged.key, paged.value))
    mask = torch.ones(4, 9, dtype=torch.bool).tril(5)
    query = paged.query.double().transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(paged.reference(torch.float64), expected, rtol=1e-12, atol=1e-12)


sequence = st.integers(0, 90).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, min(length, 40))))
shapes = st.sampled_from([(4, 2, 16), (3, 3, 32), (7, 1, 48), (2, 2, 80), (8, 2, 128), (21, 1, 64)])


@settings(max_examples=60)
@given(st.lists(sequence, max_size=5), shapes, st.sampled_from([1, 3, 16, 64]))
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_equals_the_definition_in_float64(backend, sequences, shape, page_size):
    assert_right(Paged(sequences, *shape, page_size), backend)


@pytest.mark.parametrize("queries", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [511, 512, 513, 514, 1300])
def test_long_sequences_are_split_and_joined(length, queries):
    """Around the borders of a split: a new token may see nothing of the last split."""
    assert_right(Paged([(length, queries), (7, 1)], 5, 1, 64), "cpp")


@pytest.mark.parametrize(("length", "queries"), [(600, 60), (1200, 100), (640, 640)])
def test_long_prompts_carry_the_softmax_on(length, queries):
    """The keys take several chunks, and blocks of new tokens lie across their borders."""
    assert_right(Paged([(length, queries), (7, 1)], 4, 2, 64), "cpp")


def test_the_narrower_instruction_set_is_right_too():
    """A process chooses once, so the tests of long sequences run again in another one."""
    tests = "split_and_joined and 513 or carry_the_softmax_on"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env={**os.environ, "STEP_KERNELS_ISA": "avx2"}, capture_output=True, text=True)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sequences", "shape"),
    [
        ([(1, 1), (40, 1), (0, 0), (17, 3)], (4, 2, 16)),
        ([(258, 4), (300, 1), (30, 30)], (5, 1, 32)),
        ([(70, 23), (5, 0)], (6, 2, 48)),
    ],
)
def test_triton_equals_the_definition(dtype, sequences, shape):
    assert_right(Paged(sequences, *shape, dtype=dtype), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_companions_change_no_bit(backend):
    """The first sequence is the same; the others differ in number, length and new tokens."""
    long = SPLIT[backend] + 30
    few, many = [(long, 1)], [(long, 1), (40, 1), (0, 0), (long // 2, 1)]
    alone, packed = Paged(few, max_pages=64), Paged(many, max_pages=64)
    pages = -(-long // 16)
    for cache, source in ((packed.key, alone.key), (packed.value, alone.value)):
        cache[packed.table[0, :pages].long()] = source[alone.table[0, :pages].long()]
    packed.query[0] = alone.query[0]
    assert torch.equal(packed.run(backend)[0], alone.run(backend)[0])


def test_threads_change_no_bit():
    paged = Paged([(700, 2), (40, 40), (1300, 1)], 8, 2, 64)
    threads = torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(count), paged.run("cpp"))[1] for count in (1, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_prompt_is_read_from_the_same_pages(backend):
    """Two sequences that share two pages of a prompt give what each gives with a copy of its own."""
    paged = Paged([(40, 1), (45, 2)])
    for cache in (paged.key, paged.value):
        cache[paged.table[1, :2].long()] = cache[paged.table[0, :2].long()]
    copied = paged.run(backend)
    paged.table[1, :2] = paged.table[0, :2]
    assert torch.equal(paged.run(backend), copied)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_a_prompt_give_what_the_whole_gives(backend):
    """The tokens of a prompt, fed as 20 and then 12, equal the prompt fed at once."""
    whole = Paged([(32, 32)])
    expected = whole.run(backend)
    query, table = whole.query, whole.table
    parts = []
    for first, last in ((0, 20), (20, 32)):
        arguments = (query[first:last], whole.key, whole.value, table)
        with forced(backend):
            lengths = torch.tensor([last], dtype=torch.int32)
            parts.append(paged_attention(*arguments, lengths, cumulative([last - first]), last - first))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_with_strides_are_taken(backend):
    paged = Paged([(20, 3), (9, 1)])
    expected = paged.run(backend)
    for name in ("query", "key", "value", "table"):
        held = getattr(paged, name)
        setattr(paged, name, held.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(paged.run(backend), expected)


def test_other_widths_of_heads_go_to_torch():
    paged = Paged([(20, 3), (9, 1)], dim=24)
    for backend in ("cpp", "triton"):
        assert torch.equal(paged.run(backend), paged.run("torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend):
    assert Paged([]).run(backend).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.full((1, 3), 99, dtype=torch.int32)}, "names page 99"),
        ({"lengths": torch.tensor([90], dtype=torch.int32)}, "has 90 tokens"),
        ({"lengths": torch.tensor([2], dtype=torch.int32)}, "has 2 tokens, 3 of them new"),
        ({"bounds": torch.tensor([0, 2], dtype=torch.int32)}, "must run from 0 to 3"),
    ],
)
def test_a_table_that_would_read_foreign_memory_is_refused(change, message):
    paged = Paged([(20, 3)])
    for name, value in change.items():
        setattr(paged, name, value)
    with pytest.raises(RuntimeError, match=message):
        paged.run("cpp")


def test_arguments_that_do_not_fit_are_refused():
    paged = Paged([(20, 3)])
    query, key, value, table, lengths, bounds = paged.arguments()
    for arguments, message in (
        ((query, key, value[:, :, :1], table, lengths, bounds, 3), "caches"),
        ((query[:, :3], key, value, table, lengths, bounds, 3), "3 query heads are not a multiple of 2"),
        ((query, key, value, table[:0], lengths, bounds, 3), "block table for 0"),
        ((query, key, value, table, lengths, bounds, 2), "cannot have 3"),
        ((query.clone().requires_grad_(), key, value, table, lengths, bounds, 3), "forward only"),
    ):
        with pytest.raises(ValueError, match=message):
            paged_attention(*arguments)


@pytest.mark.parametrize("sequences", [[(20, 3), (0, 0), (5, 1)], []])
def test_registration(sequences):
    paged = Paged(sequences)
    torch.library.opcheck(_op.registered, (*paged.arguments(), paged.max_queries, paged.scale))


def test_kernels_for_ahead_of_time_compilation_are_stated_in_full():
    pytest.importorskip("triton")
    for name, function, signature, constants, aligned, *numbers in aot_kernels():
        names = function.arg_names
        assert set(signature) | set(constants) == set(names) and not set(signature) & set(constants), name
        assert set(aligned) <= set(signature) and all(number > 0 for number in numbers)


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        # A boundary is off by one: of the keys of a token, of a sequence, of a split, of a page.
        ("_attend", "last = length - queries + token", "last = length - queries + token + 1"),
        ("_attend", "valid = key < end", "valid = key <= end"),
        ("_attend", "tl.where(is_split, split * SPLIT_KEYS, 0)", "tl.where(is_split, split * SPLIT_KEYS + 1, 0)"),
        ("_attend", "tl.minimum(end, begin + SPLIT_KEYS)", "tl.minimum(end, begin + SPLIT_KEYS + 1)"),
        ("_attend", "+ key % PAGE)", "+ (key + 1) % PAGE)"),
        ("_attend", "(tile * BLOCK_M + BLOCK_M - 1) // GROUP + 1)", "(tile * BLOCK_M + BLOCK_M - 1) // GROUP)"),
        ("_join", "splits = (length + SPLIT_KEYS - 1) // SPLIT_KEYS", "splits = length // SPLIT_KEYS"),
        # A mask is gone.
        ("_attend", "valid[None, :] & (key[None, :] <= last[:, None])", "valid[None, :]"),
        ("_attend", 'tl.where(now == float("-inf"), 0.0, now)', "now"),
        # What was summed before is not brought to the new maximum; a part counts as much as another.
        ("_attend", "total = total * decay", "total = total"),
        ("_join", "total += weight", "total += 1.0"),
    ],
)
def test_a_fault_in_the_triton_kernel_is_noticed(tmp_path, kernel, old, new):
    paged = Paged([(70, 23), (258, 4), (301, 1)], 5, 1, 32)
    with with_fault(tmp_path, "paged_attention", kernel, old, old):
        assert_right(paged, "triton")
    with with_fault(tmp_path, "paged_attention", kernel, old, new), pytest.raises(AssertionError, match="off by"):
        assert_right(paged, "triton")

"""A region of a saved tensor is what slicing the whole gives, and no other byte of the data is read."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from step_megatron.runtime.stored_regions import FilePart, read_region

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def readinto(self, buffer):
        count = super().readinto(buffer)
        self.count += count
        return count

    def read(self, size=-1):
        data = super().read(size)
        self.count += len(data)
        return data


def saved(tensor: torch.Tensor) -> Counting:
    file = Counting()
    torch.save(tensor, file)
    return file


@st.composite
def regions(draw):
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    start = [draw(st.integers(0, n - 1)) for n in shape]
    size = [draw(st.integers(0, n - low)) for n, low in zip(shape, start, strict=True)]
    return shape, start, size


@settings(max_examples=150, deadline=None)
@given(regions(), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_a_region_is_a_slice(region, dtype, transposed, converted):
    shape, start, size = region
    whole = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    file = saved(whole)
    target = torch.zeros(size[::-1] if transposed else size, dtype=torch.float64 if converted else dtype)
    target = target.permute(tuple(reversed(range(target.dim())))) if transposed else target
    read_region(file, start, target)
    expected = whole[tuple(slice(low, low + n) for low, n in zip(start, size, strict=True))]
    assert torch.equal(target, expected.to(target.dtype))


@pytest.mark.parametrize(("start", "size"), [((512, 0), (128, 512)), ((0, 64), (1024, 64))])
def test_nothing_else_is_read(start, size):
    """An eighth of 1 MB, by rows and by columns; what the zip file says of itself is a few thousand bytes."""
    file = saved(torch.zeros(1024, 512, dtype=torch.bfloat16))
    read_region(file, start, torch.empty(size, dtype=torch.bfloat16))
    assert file.count < (1 << 20) / 8 + 8192


def test_many_tensors_may_be_in_one_file():
    tensors = [torch.full((3, 5), float(number)) for number in range(3)]
    parts = [saved(tensor).getvalue() for tensor in tensors]
    file, place = io.BytesIO(b"".join(parts)), 0
    for tensor, part in zip(tensors, parts, strict=True):
        target = torch.empty(2, 2)
        read_region(FilePart(file, place, len(part)), (1, 3), target)
        assert torch.equal(target, tensor[1:, 3:])
        place += len(part)
    with pytest.raises((ValueError, EOFError, RuntimeError)):
        read_region(FilePart(file, 0, len(parts[0]) - 8), (0, 0), torch.empty(3, 5))


def test_a_view_was_saved_with_all_that_it_is_a_view_of():
    whole, target = torch.arange(12.0).view(3, 4), torch.empty(1, 2)
    read_region(saved(whole[1:]), (1, 2), target)
    assert torch.equal(target, whole[2:, 2:])


def test_what_is_no_plain_tensor_is_refused():
    whole = torch.arange(12.0).view(3, 4)
    for content, message in (([whole], "but list"), (whole.t(), "row by row")):
        with pytest.raises(ValueError, match=message):
            read_region(saved(content), (0, 0), torch.empty(1, 1))
    with pytest.raises(ValueError, match=r"region \[2, 4\] at \[2, 0\] of a tensor \[3, 4\]"):
        read_region(saved(whole), (2, 0), torch.empty(2, 4))

"""How a tensor of ours is made of tensors of another layout, and taken apart again: one entry a tensor.

The maps themselves are in `huggingface` (decoder), `whisper` (encoder) and `adaptor`. They serve state dicts in memory and
checkpoints that are streamed alike: an entry says names and shapes, and its tensors are read one entry at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        ours: its full name here.
        theirs: names of the other layout's tensors, in the order in which they are joined, with their shapes.
        groups: None joins them one below the other; with a number they are cut into so many groups of rows each, and a group of
            every one comes before the next group (query, key and value by key-value group).
    """

    ours: str
    theirs: tuple[tuple[str, Shape], ...]
    groups: int | None = None

    @property
    def shape(self) -> Shape:
        """Shape of our tensor."""
        first = self.theirs[0][1]
        return first if len(self.theirs) == 1 else (sum(shape[0] for _, shape in self.theirs), *first[1:])

    def views(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The places of their tensors in ours; with groups they are `[groups, rows / groups, ...]`."""
        if len(self.theirs) == 1:
            return (tensor,)
        rows = [shape[0] for _, shape in self.theirs]
        if self.groups is None:
            return tensor.split(rows)
        return tensor.unflatten(0, (self.groups, -1)).split([count // self.groups for count in rows], dim=1)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor from theirs, which have the entry's shapes; theirs itself where it is one."""
        if len(parts) == 1:
            return parts[0]
        joined = parts[0].new_empty(self.shape)
        for view, part in zip(self.views(joined), parts, strict=True):
            view.copy_(part.view(view.shape))
        return joined

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Their tensors from ours, or the rows that are theirs of another matrix with our rows; the inverse of `join`."""
        views = zip(self.views(tensor), self.theirs, strict=True)
        return tuple(view.reshape(shape[0], *tensor.shape[1:]) for view, (_, shape) in views)

    def renamed(self, ours: Callable[[str], str], theirs: Callable[[str], str]) -> "Entry":
        """The same entry under other names."""
        return replace(self, ours=ours(self.ours), theirs=tuple((theirs(name), shape) for name, shape in self.theirs))


def problems(entries: Sequence[Entry], shapes: Mapping[str, Shape], ignored: Callable[[str], bool]) -> list[str]:
    """Everything in which a layout's tensors are not those that the entries ask for, a line each: missing, misshapen, unknown.

    Args:
        shapes: of the tensors that there are.
        ignored: whether a tensor that no entry asks for is known to be of no use.
    """
    wanted = {name: shape for entry in entries for name, shape in entry.theirs}
    found = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in shapes]
    found += [
        f"misshapen: {name} is {list(shapes[name])}, the configuration wants {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != tuple(shape)
    ]
    return found + [
        f"unknown: {name} {list(shape)}" for name, shape in shapes.items() if name not in wanted and not ignored(name)
    ]

"""Register an op with torch, and call it without torch's detour where nothing needs that.

`torch.library.custom_op` makes a Python function one operator for whatever looks at operators: the compiler, FakeTensor, dispatch
modes, functorch's transforms. A call costs 40 to 150 us there, which is more than many kernels take at a decoding step's sizes.
A plain call (tensors that hold memory, and nobody looking) needs none of it: it runs the same function at once, or inside of a
`torch.autograd.Function` made of the same gradient, for 1 to 15 us.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import profiler

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """Decorate the function that computes the op `name`; its annotations make the schema, as for `torch.library.custom_op`.

    Args:
        mutates: names of the arguments that it writes into.
    """
    return lambda function: Operator(name, function, mutates)


class Operator:
    """An op: call it with positional arguments.

    Attributes:
        name: with its namespace; profiles show it.
        registered: what torch knows it as, for `torch.library.opcheck`.
    """

    def __init__(self, name: str, function: Callable, mutates: tuple[str, ...]):
        self.name, self._function = name, function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates)
        self._written = [index for index, argument in enumerate(function.__annotations__) if argument in mutates]
        self._differentiable: type[torch.autograd.Function] | None = None

    def register_fake(self, function: Callable) -> Callable:
        """Shapes of the results; as `torch.library.register_fake`."""
        return self.registered.register_fake(function)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """The gradient; as `torch.library.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self._function

        # With `setup_context` as a method of its own, torch would look up the signature at every call.
        def forward(ctx, *inputs):
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._differentiable = type(self.name.rpartition("::")[2], (torch.autograd.Function,), parts)

    def __call__(self, *inputs):
        wants_gradient = None if torch.compiler.is_compiling() else _gradient_wanted(inputs)
        if wants_gradient is None:
            return self.registered(*inputs)
        if profiler._is_profiler_enabled:
            with torch.profiler.record_function(self.name):
                return self._plain(inputs, wants_gradient)
        return self._plain(inputs, wants_gradient)

    def _plain(self, inputs: tuple, wants_gradient: bool):
        if wants_gradient:
            # Where no gradient is known, torch's error says so in backward.
            return self.registered(*inputs) if self._differentiable is None else self._differentiable.apply(*inputs)
        output = self._function(*inputs)
        for index in self._written:
            # Autograd refuses to differentiate what needed the values from before.
            torch.autograd.graph.increment_version(inputs[index])
        return output


def _gradient_wanted(inputs: tuple) -> bool | None:
    """Whether a gradient has to be known; None where somebody wants to see an operator: a mode or a transform is active, or a
    tensor is of another kind."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return None
    enabled, wanted = torch.is_grad_enabled(), False
    for each in inputs:
        if type(each) in _PLAIN:
            if each.is_meta:
                return None
            wanted |= enabled and each.requires_grad
        elif isinstance(each, torch.Tensor):
            return None
    return wanted

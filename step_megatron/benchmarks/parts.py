"""How the time of a model's pass divides over its parts, forward and backward, by one profile.

Parts are marked from outside, by hooks on modules and by functions replaced for the time of the profile, so that the model's code
knows nothing of it. Time belongs to the innermost part that is open. In the backward pass torch's engine runs the nodes of the
graph: every node carries the number that it got when it was made, which tells the part whose forward made it.

On a CPU a part's time is that of the calling thread, operators and the Python between them, so the parts add up to the pass as
the clock saw it (other threads are not seen: one thread is used). On a GPU it is the time of the kernels that a part started.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

REST = "everything else"
_MARK = "part: "
_ENGINE = "autograd::engine::evaluate_function: "
_SUMMING = f"{_ENGINE}torch::autograd::AccumulateGrad"


@dataclass
class Parts:
    """Marks parts while it is entered as a context (`watching`), and divides a profile over them.

    Attributes:
        modules: part of every module whose class, or a base of it, has this name.
        functions: part of `(owner, attribute)`, a function that is looked up there at every call.
        gradient_sums: the part that gets the leaves' gradients.
    """

    modules: Mapping[str, str]
    functions: Mapping[tuple[object, str], str]
    gradient_sums: str = REST
    _made_by: dict[int, str] = field(default_factory=dict)

    @contextmanager
    def watching(self, *roots: torch.nn.Module) -> Iterator[None]:
        """Mark the parts of these modules, and the functions."""
        with ExitStack() as undo:
            for module in {id(m): m for root in roots for m in root.modules()}.values():
                for name in (base.__name__ for base in type(module).__mro__):
                    if name in self.modules:
                        self._watch(undo, module, self.modules[name])
                        break
            for (owner, attribute), part in self.functions.items():
                own = attribute in vars(owner)
                before = getattr(owner, attribute)
                setattr(owner, attribute, self._marked(before, part))
                undo.callback(*(setattr, owner, attribute, before) if own else (delattr, owner, attribute))
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this part, unless a part within it is open."""
        first = torch.autograd._get_sequence_nr()
        with record_function(_MARK + name):
            yield
        for number in range(first, torch.autograd._get_sequence_nr()):
            self._made_by.setdefault(number, name)

    def measure(self, work: Callable[[], object], device: torch.device) -> dict[str, tuple[float, float]]:
        """Run the work once; seconds of every part, forward and backward. `REST` is what belongs to none."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._made_by.clear()
        with profile(activities=activities, acc_events=True) as profiled, record_function(_MARK + REST):
            work()
        events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CPU]
        thread = next(event.thread for event in events if event.name == _MARK + REST)
        seconds: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        for event in events:
            if device.type == "cuda":
                spent = event.self_device_time_total
            else:
                spent = event.self_cpu_time_total * (event.thread == thread)
            if spent:
                name, backward = self._owner(event)
                seconds[backward][name] += spent * 1e-6
        return {name: (seconds[False][name], seconds[True][name]) for name in seconds[False] | seconds[True]}

    def _owner(self, event: FunctionEvent) -> tuple[str, bool]:
        """The part that an event belongs to, and whether it belongs to the backward pass."""
        while event is not None:
            if event.name.startswith(_MARK):
                return event.name.removeprefix(_MARK), False
            if event.name == _SUMMING:
                return self.gradient_sums, True
            if event.name.startswith(_ENGINE):
                numbers = [child.sequence_nr for child in event.cpu_children if child.sequence_nr >= 0]
                return self._made_by.get(numbers[0], REST) if numbers else REST, True
            event = event.cpu_parent
        return REST, False

    def _watch(self, undo: ExitStack, module: torch.nn.Module, part: str) -> None:
        opened: list = []

        def enter(*_):
            opened.append(self.part(part))
            opened[-1].__enter__()

        def leave(*_):
            opened.pop().__exit__(None, None, None)

        undo.callback(module.register_forward_pre_hook(enter).remove)
        undo.callback(module.register_forward_hook(leave).remove)

    def _marked(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def run(*arguments, **options):
            with self.part(part):
                return function(*arguments, **options)

        return run

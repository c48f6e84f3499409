"""The training step never waits for the device: no value is read back, no size depends on data, nothing is copied across.

What runs is the step's own code: `run_schedule` (so `_forward_step`, `masked_loss` and Megatron's schedule) on batches that are
on the device already. Left out is what Megatron does once a step, after the last backward: it reads the number of trained tokens.
"""

import sys
from unittest import mock

import numpy as np
import pytest
import torch
from support.decoder_twins import audio_batch, huggingface_twin, model_of_twin, small_config
from torch.utils._python_dispatch import TorchDispatchMode

# Each of these reads a device value on the host, or makes a tensor whose size the host has to learn first.
FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::masked_scatter",
}  # fmt: skip


# Host values on the way to a device or back: on a CPU no operator shows them, so the calls are watched.
TO_DEVICE = [(torch, name) for name in ("tensor", "as_tensor", "asarray")] + [
    (torch.Tensor, name) for name in ("to", "new_tensor")
]
TO_HOST = ("item", "tolist", "numpy", "cpu", "cuda", "pin_memory", "__bool__", "__int__", "__float__", "__index__")
# The one compares states of the CPU's generator, which never were on a device; the other looks at bounds in CPU memory and turns
# round where they are on a device.
ON_THE_HOST = ("CudaRNGStatesTracker.fork", "check_counts")


def names_a_device(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a call puts a tensor somewhere: a tensor made without a device stays on the host."""
    places = (*(args[1:] if name == "to" else ()), kwargs.get("device"))
    return (
        name == "new_tensor" or any(isinstance(place, torch.device | str) for place in places) or bool(kwargs.get("pin_memory"))
    )


class HostWaits(TorchDispatchMode):
    """Collects what would make the host wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._silent = False
        watched = [*TO_DEVICE, *((torch.Tensor, name) for name in TO_HOST)]
        self._patches = [mock.patch.object(owner, name, self._noted(getattr(owner, name))) for owner, name in watched]

    def _noted(self, original):
        name = original.__name__

        def noted(*args, **kwargs):
            caller = sys._getframe(1).f_code.co_qualname
            if name in TO_HOST and caller in ON_THE_HOST:
                self._silent = True
            elif name in TO_HOST or names_a_device(name, args, kwargs):
                self.found.append(f"{name} by {caller}")
            try:
                return original(*args, **kwargs)
            finally:
                self._silent = False

        return noted

    def __enter__(self):
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if self._silent:
            return func(*args, **kwargs)
        if name in FORBIDDEN:
            self.found.append(name)
        if name == "aten::repeat_interleave.Tensor" and kwargs.get("output_size") is None:
            self.found.append(f"{name} without output_size")
        if name.startswith(("aten::index.Tensor", "aten::index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            # `x[mask] = number` is one masked fill; every other boolean index is a `nonzero` first.
            if not (name.startswith("aten::index_put") and args[2].numel() == 1):
                self.found.append(f"{name} with a mask")
        if name == "aten::_to_copy" and kwargs.get("device", args[0].device) != args[0].device:
            self.found.append(f"{name} to {kwargs['device']}")
        if name.startswith("aten::copy_") and args[0].device != args[1].device:
            self.found.append(f"{name} across devices")
        return func(*args, **kwargs)


def watched_step(rank, world_size, *, transformer) -> dict:
    """What the detector finds in a step of a layout, and the gradients of the adaptor and of the output layer."""
    from parallel.layouts import prepare
    from parallel.synthetic import GROUPS

    from step_megatron.checkpoint.distributed import unwrap
    from step_megatron.training.loop import run_schedule, supervised_loss

    trainer = prepare(transformer, "adam", None, ())
    batches = trainer.next_batches()
    model = unwrap(trainer.model[0])
    model.config.finalize_model_grads_func = None
    with HostWaits() as waits:
        reports = run_schedule(trainer.model, batches, supervised_loss(len(GROUPS)))
    gradients = [parameter.main_grad.abs().max().item() for parameter in model.parameters()]
    return {"found": waits.found, "reports": len(reports), "smallest": min(gradients)}


TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(("processes", "transformer"), [(1, {}), (1, RECOMPUTE), (2, TP2_SP), (2, {"context_parallel_size": 2})])
def test_forward_loss_and_backward_never_wait(processes, transformer, worker_pool):
    for result in worker_pool(processes).run(watched_step, {"transformer": transformer}):
        assert result["found"] == []
        assert result["reports"] == 4 and result["smallest"] > 0


def test_a_wait_inside_the_model_is_found(runtime):
    """The detector sees what a module does, forward and backward, not only what a test calls."""

    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * float(x.detach().sum() > 0)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.tensor(1.0, device=gradient.device)

    model = model_of_twin(config := small_config(), huggingface_twin(config)).train()
    model.adaptor.register_forward_hook(lambda module, inputs, out: Careless.apply(out))
    with HostWaits() as waits:
        model(audio_batch([14, 6, 6, 20], {0: 9, 3: 24})).sum().backward()
    assert any(found.endswith("Careless.forward") for found in waits.found)
    assert any(found.endswith("Careless.backward") for found in waits.found)


def test_the_detector_finds_what_it_looks_for():
    x = torch.arange(4.0)
    with HostWaits() as waits:
        x.sum().item()
        x[x > 1]
        x.nonzero()
        x.to("meta")
        x[x > 1] = torch.tensor([1.0, 2.0], device="cpu")
        torch.as_tensor([1], device=x.device)
        torch.from_numpy(np.zeros(2)).to(x.device, non_blocking=True)
        x.new_tensor([1.0])
        x.tolist()
        bool(x.any())
    for name in ("with a mask", "aten::nonzero", "_to_copy to meta", "_local_scalar_dense"):
        assert any(name in found for found in waits.found), name
    for name in ("item", "tensor", "as_tensor", "to", "new_tensor", "tolist", "__bool__"):
        assert any(found.startswith(f"{name} by ") for found in waits.found), name
    before = len(waits.found)
    torch.tensor([1.0], device="cpu").tolist()
    assert len(waits.found) == before

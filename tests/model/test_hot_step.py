"""The training step never waits for the device: no value is read back, no size depends on data, nothing is copied across."""

import torch
from support.decoder_twins import audio_batch, huggingface_twin, model_of_twin, small_config
from torch.utils._python_dispatch import TorchDispatchMode

# Each of these reads a device value on the host, or makes a tensor whose size the host has to learn first.
FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::unique_consecutive", "aten::equal", "aten::is_nonzero", "aten::masked_scatter",
}  # fmt: skip


class HostWaits(TorchDispatchMode):
    """Collects what would make the host wait on a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
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


def step(model, batch) -> None:
    loss_mask = torch.ones_like(batch.labels, dtype=torch.float32)
    (model(batch) * loss_mask).sum().backward()


def test_forward_and_backward_of_an_audio_batch_never_wait(runtime):
    model = model_of_twin(config := small_config(), huggingface_twin(config)).train()
    batch = audio_batch([14, 6, 6, 20], {0: 9, 3: 24})
    with HostWaits() as waits:
        step(model, batch)
    assert waits.found == []
    assert model.adaptor.linear2.weight.grad.abs().max() > 0


def test_nor_does_a_step_with_recomputation(runtime):
    config = small_config(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    model = model_of_twin(config, huggingface_twin(config)).train()
    with HostWaits() as waits:
        step(model, audio_batch([14, 6], {0: 9}))
    assert waits.found == []


def test_the_detector_finds_what_it_looks_for():
    x = torch.arange(4.0)
    with HostWaits() as waits:
        x.sum().item()
        x[x > 1]
        x.nonzero()
        x.to("meta")
        x[x > 1] = torch.tensor([1.0, 2.0])
    assert len(waits.found) >= 5

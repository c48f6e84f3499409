"""What a phase does not need leaves the device and comes back as it was; live tensor bytes are counted, not believed."""

import contextlib
import gc
import json

import pytest
import torch
from rl.toy_ppo import run, write_prompts
from training.toy_run import write_data

from step_megatron.rl.colocation import Colocation, Resident
from step_megatron.runtime.metrics import read_metrics


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python can reach, each once; float ones, for host copies are bytes."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.is_floating_point():
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def test_a_resident_wakes_with_the_same_bits_in_the_same_storages():
    flat = torch.randn(1000)
    views = flat[:400].view(20, 20), flat[400:]
    expected = [view.clone() for view in views]
    resident = Resident(lambda: [flat, *views])
    assert resident.bytes == 4000
    resident.sleep()
    resident.sleep()
    assert (resident.bytes, flat.untyped_storage().nbytes()) == (0, 0)
    resident.wake()
    resident.wake()
    assert all(torch.equal(view, wanted) for view, wanted in zip(views, expected, strict=True))
    views[1].fill_(7)
    assert flat[-1] == 7, "views still look at the same memory"


def test_host_memory_is_allocated_once():
    weights = torch.randn(5000)
    resident = Resident(lambda: [weights])
    sizes = []
    for _ in range(5):
        resident.sleep()
        sizes.append(resident.host_bytes)
        resident.wake()
        sizes.append(resident.host_bytes)
    assert set(sizes) == {20000}


def test_what_is_not_kept_wakes_as_zeros_and_costs_no_host_memory():
    gradients = torch.ones(100)
    resident = Resident(lambda: [gradients], keeps=False)
    resident.sleep()
    assert resident.host_bytes == 0
    resident.wake()
    assert torch.equal(gradients, torch.zeros(100))


def test_a_phase_holds_what_it_needs_and_nothing_else(tmp_path):
    tensors = {name: torch.randn(size) for name, size in (("a", 100), ("b", 1000), ("c", 10000))}
    residents = {name: Resident(lambda tensor=tensor: [tensor]) for name, tensor in tensors.items()}
    before = live_bytes()
    trace = tmp_path / "trace.json"
    colocation = Colocation(residents, {"one": ("a", "b"), "two": ("c", "unknown")}, True, torch.device("cpu"), trace)
    with colocation.phase("one"):
        assert before - live_bytes() == 40000
    with colocation.phase("two"):
        assert before - live_bytes() == 4400
    assert colocation.peaks == {"one": 4400, "two": 40000}
    colocation.flush()
    assert colocation.peaks == {}
    events = json.loads(trace.read_text().rstrip().rstrip(",") + "]")
    assert [event["name"] for event in events] == ["one", "two"] and all(event["dur"] >= 0 for event in events)


def test_old_residents_leave_before_new_ones_come():
    order = []

    class Watched(Resident):
        def __init__(self, name):
            super().__init__(lambda: [])
            self.name = name

        def sleep(self):
            order.append(f"{self.name} sleeps")

        def wake(self):
            order.append(f"{self.name} wakes")

    residents = {name: Watched(name) for name in ("weights", "cache", "optimizer")}
    colocation = Colocation(residents, {"generate": ("cache", "weights")}, True, torch.device("cpu"))
    with colocation.phase("generate"):
        assert order == ["optimizer sleeps", "weights wakes", "cache wakes"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colocation")
    write_data(folder)
    write_prompts(folder)
    return folder


def run_counting(rank: int, world_size: int, *, data: str, run_dir: str, extra: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Run PPO; in each phase of the last iteration, live bytes and those of the residents that the phase does not need."""
    from unittest import mock

    found: dict[str, tuple[int, int]] = {}
    phase = Colocation.phase

    @contextlib.contextmanager
    def counted(self, name):
        with phase(self, name):
            yield
            gc.collect()
            needless = [resident for other, resident in self.residents.items() if other not in self._needs[name]]
            found[name] = live_bytes(), sum(resident.bytes for resident in needless)

    with mock.patch.object(Colocation, "phase", counted):
        run(rank, world_size, data=data, run_dir=run_dir, extra=extra)
    return found


DISTRIBUTED = ("megatron.transformer.bf16=true", "megatron.ddp={use_distributed_optimizer: true, overlap_param_gather: true, "
               "overlap_grad_reduce: true}")  # fmt: skip


@pytest.mark.parametrize(("processes", "settings"), [(1, ()), (2, DISTRIBUTED)], ids=["fp32", "bf16-distributed"])
def test_offloading_changes_no_bit_and_frees_what_a_phase_does_not_need(data, tmp_path, worker_pool, processes, settings):
    found = {}
    for offload in ("off", "on"):
        extra = (*settings, f"rl.colocation.offload={offload}")
        arguments = {"data": str(data), "run_dir": str(tmp_path / offload), "extra": extra}
        found[offload] = worker_pool(processes).run(run_counting, arguments)[0]
    kept = [
        [{name: value for name, value in line.items() if not name.startswith(("time", "seconds/", "share/", "memory_gib/"))}
         for line in read_metrics(tmp_path / offload)]
        for offload in ("off", "on")
    ]  # fmt: skip
    assert repr(kept[0]) == repr(kept[1])
    for phase, (live, needless) in found["off"].items():
        ours, asleep = found["on"][phase]
        # Policy, critic and reference are three models, and two of them have moments and gradients.
        assert needless > 300_000 and asleep == 0, phase
        assert live - ours == pytest.approx(needless, rel=0.02), phase

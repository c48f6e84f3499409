"""How a step divides over its parts: known work goes to the part that did it, forward and backward, and the shares add up."""

import json
import time
from argparse import Namespace

import pytest
import torch

from step_megatron.benchmarks import shares
from step_megatron.benchmarks.parts import REST, Parts


class Sleep(torch.autograd.Function):
    """Takes a known time, forward and backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward)
        return gradient, None, None


class Inner(torch.nn.Module):
    def forward(self, x):
        return Sleep.apply(x, 0.02, 0.03)


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return Sleep.apply(self.inner(x), 0.05, 0.04)


def test_time_goes_to_the_innermost_part_that_did_the_work():
    model, x = Outer(), torch.ones(3, requires_grad=True)
    parts = Parts({"Outer": "outer", "Inner": "inner"}, {(time, "monotonic"): "clock"}, gradient_sums="sums")

    def work():
        time.monotonic()
        Sleep.apply(model(x), 0.01, 0.06).sum().backward()

    before = time.monotonic
    with parts.watching(model):
        measured = parts.measure(work, torch.device("cpu"))
    assert time.monotonic is before and not model._forward_hooks and not model._forward_pre_hooks
    # A sleep may take longer than it should on a busy machine, never less.
    known = {"inner": (0.02, 0.03), "outer": (0.05, 0.04), REST: (0.01, 0.06)}
    for name, times in known.items():
        assert all(found >= time - 1e-3 for time, found in zip(times, measured[name], strict=True)), measured
    assert set(measured) == {*known, "clock", "sums"} and measured["sums"][0] == 0 < measured["sums"][1]


@pytest.fixture(scope="module")
def result():
    return shares.run(Namespace(repeats=1, clips=4, preset="tiny"))


def test_shares_of_every_pass_add_up_and_nothing_known_is_missing(result):
    assert len(set(shares.PARTS)) == len(shares.PARTS) and json.loads(json.dumps(result)) == result
    assert set(result["passes"]) == {"uncached step", "cached step", "generation"}
    for name, each in result["passes"].items():
        assert sum(each["forward"].values()) + sum(each["backward"].values()) == pytest.approx(1)
        assert list(each["forward"]) == list(each["backward"]) == list(shares.PARTS)
        seen = {part for part in shares.PARTS if each["forward"][part] > 0}
        absent = {
            "uncached step": {shares.SAMPLING},
            "cached step": {shares.SAMPLING, shares.ENCODER, shares.ENCODER_ATTENTION, shares.POOL_NORM},
            "generation": {
                *(shares.ENCODER, shares.ENCODER_ATTENTION, shares.POOL_NORM, shares.OPTIMIZER, shares.SUMS, shares.BATCH)
            },
        }[name]
        assert seen == set(shares.PARTS) - absent, name


def test_what_trains_has_a_backward_and_what_is_frozen_has_none(result):
    for name in ("uncached step", "cached step"):
        backward = result["passes"][name]["backward"]
        trained = (shares.CONV, shares.ADAPTOR, shares.ATTENTION, shares.ROPE, shares.NORM, shares.SWIGLU, shares.LINEARS)
        assert all(backward[part] > 0 for part in (*trained, shares.SUMS))
        assert not any(backward[part] for part in (shares.ENCODER, shares.ENCODER_ATTENTION, shares.POOL_NORM, shares.OPTIMIZER))
        assert backward[REST] < 0.1
    assert not any(result["passes"]["generation"]["backward"].values())


def test_a_better_kernel_cannot_save_more_than_the_part_takes(result):
    step = result["passes"]["cached step"]
    assert set(step["could_save"]) == {shares.ROPE, shares.NORM, shares.SWIGLU}
    for name, saved in step["could_save"].items():
        assert 0 <= saved <= step["forward"][name] + step["backward"][name]

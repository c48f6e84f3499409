"""AudioAdaptor equals a loop of Conv1d and Linear over the chunks, in values and gradients; chunks never mix."""

import pytest
import torch
from torch import nn

from step_megatron.config.schema import AdaptorConfig, EncoderConfig
from step_megatron.model.adaptor import AudioAdaptor

ENCODER = EncoderConfig(width=6)
FRAMES = (1, 2, 3, 0, 8, 5, 5)


def adaptor(kind: str = "step", dtype: torch.dtype = torch.float64) -> AudioAdaptor:
    torch.manual_seed(0)
    return AudioAdaptor(ENCODER, AdaptorConfig(kind=kind, width=7), out_width=4).to(dtype)


def per_chunk(module: AudioAdaptor, features: torch.Tensor) -> torch.Tensor:
    """torch's own modules, one chunk at a time."""
    if module.kind == "linear":
        layers = nn.Linear(6, 4, dtype=torch.float64)
        names = {"weight": "linear.weight", "bias": "linear.bias"}
        return torch.func.functional_call(layers, {k: module.get_parameter(v) for k, v in names.items()}, features)
    conv = nn.Conv1d(6, 6, 3, stride=2, padding=1, dtype=torch.float64)
    outputs = []
    for chunk in features.split(FRAMES):
        if chunk.shape[0]:
            weights = {"weight": module.conv.weight, "bias": module.conv.bias}
            hidden = nn.functional.gelu(torch.func.functional_call(conv, weights, chunk.t()[None]))[0].t()
            outputs.append(module.linear2(nn.functional.relu(module.linear1(hidden))))
    return torch.cat(outputs)


@pytest.mark.parametrize("kind", ["step", "linear"])
def test_values_and_gradients_equal_a_loop_over_chunks(kind):
    module = adaptor(kind)
    features = torch.randn(sum(FRAMES), 6, dtype=torch.float64)
    actual, expected = module(features, FRAMES), per_chunk(module, features)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(actual)
    parameters = dict(module.named_parameters())
    ours, theirs = (torch.autograd.grad(out, list(parameters.values()), cotangent) for out in (actual, expected))
    for name, mine, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_gradcheck():
    module = adaptor()
    features = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, (3, 1, 2)), features)


@pytest.mark.parametrize("kind", ["step", "linear"])
def test_no_chunk_gives_zero_gradients_to_every_parameter(kind):
    module = adaptor(kind)
    out = module(torch.empty(0, 6), ())
    assert out.shape == (0, 4)
    out.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


def test_other_content_in_a_neighbouring_chunk_changes_nothing():
    module = adaptor(dtype=torch.float32)
    features = torch.randn(15, 6)
    changed = features.clone()
    changed[5:10] = 100.0
    before, after = (module(x, (5, 5, 5)).split([3, 3, 3]) for x in (features, changed))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_takes_the_cache_s_bfloat16_and_returns_its_own_type():
    module = adaptor(dtype=torch.float32)
    features = torch.randn(5, 6)
    stored = features.bfloat16()
    assert torch.equal(module(stored, (5,)), module(stored.float(), (5,)))


def test_frames_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 chunks hold 7 frames, but 5 features were given"):
        adaptor()(torch.zeros(5, 6, dtype=torch.float64), (3, 4))


def test_parameters_carry_the_released_names():
    names = {"conv.weight", "conv.bias", "linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}
    assert set(adaptor().state_dict()) == names

"""flash-attn and Transformer Engine as backends of packed attention, by stand-ins with their signatures (not run on a GPU):
right in float64's terms, gradients and log-sum-exp included; a call that a library does not take goes elsewhere or is refused."""

import contextlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from step_kernels import attention_libraries, audio_attention_varlen, backends_of, causal_attention_varlen, registry
from step_kernels.audio_attention import audio_attention_varlen_reference
from step_kernels.causal_attention import causal_attention_varlen_reference
from step_kernels.segments import cumulative
from support.kernel_checks import assert_as_good_as_plain
from support.library_stand_ins import STAND_INS, _module, installed

LIBRARY = {"flash-attn 2": "flash", "flash-attn 3": "flash", "te": "te"}
SCALE = 0.2


@contextlib.contextmanager
def forced(name: str):
    with registry.forced(LIBRARY[name]), installed(name):
        yield


def inputs(rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, count, dim, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads)]


def results(function, dtype: torch.dtype, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and the three gradients of a function of query, key and value."""
    leaves = [part.to(dtype).requires_grad_() for part in qkv]
    out = function(*leaves)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def compare(op, reference, dtype: torch.dtype, qkv: list[torch.Tensor]) -> None:
    exact, plain = (results(reference, kind, qkv) for kind in (torch.float64, dtype))
    # Of a segment of one key, the gradients of query and key are zero: they are judged by the size of all three.
    judged = [
        (each[0], torch.cat([gradient.flatten() for gradient in each[1:]])) for each in (results(op, dtype, qkv), exact, plain)
    ]
    for actual, wanted, allowed in zip(*judged, strict=True):
        assert_as_good_as_plain(actual, wanted, allowed)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", registry.HALF)
def test_audio_attention_by_a_library_equals_the_definition(name, dtype):
    @settings(max_examples=15)
    @given(lengths=st.lists(st.integers(0, 40), max_size=5).filter(any), dim=st.sampled_from([8, 64, 80]), data=st.data())
    def check(lengths, dim, data):
        valid = [data.draw(st.integers(min(1, length), length)) for length in lengths]
        arguments = cumulative(lengths), lengths, valid, SCALE
        with forced(name):
            compare(
                lambda *qkv: audio_attention_varlen(*qkv, *arguments),
                lambda *qkv: audio_attention_varlen_reference(*qkv, *arguments[1:]),
                dtype,
                inputs(sum(lengths), 2, 2, dim, dtype),
            )

    check()


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", registry.HALF)
def test_causal_attention_by_a_library_equals_the_definition(name, dtype):
    @settings(max_examples=15)
    @given(lengths=st.lists(st.integers(0, 40), max_size=5).filter(any), heads=st.sampled_from([(2, 2), (3, 1), (4, 2)]))
    def check(lengths, heads):
        with forced(name):
            compare(
                lambda *qkv: causal_attention_varlen(*qkv, cumulative(lengths), lengths, SCALE),
                lambda *qkv: causal_attention_varlen_reference(*qkv, lengths, SCALE),
                dtype,
                inputs(sum(lengths), *heads, 64, dtype),
            )

    check()


@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3"])
@pytest.mark.parametrize("valid", [None, [3, 1, 0, 5]])
def test_the_log_sum_exp_has_our_layout(name, valid):
    lengths = [4, 1, 0, 7]
    qkv = inputs(12, 2, 2, 64, torch.bfloat16)
    with forced(name):
        out, lse = audio_attention_varlen(*qkv, cumulative(lengths), lengths, valid, SCALE, return_lse=True)
    scores = [
        SCALE * torch.einsum("qhd,khd->qhk", q, k[:keys])
        for q, k, keys in zip(*(part.double().split(lengths) for part in qkv[:2]), valid or lengths, strict=True)
    ]
    torch.testing.assert_close(lse, torch.cat([each.logsumexp(2) for each in scores]).float())
    assert out.shape == (12, 2, 64) and lse.is_contiguous()


def test_slices_of_a_fused_projection_and_heads_with_steps_are_taken():
    lengths, fused = [5, 4], torch.randn(9, 2, 64, 3, generator=torch.Generator().manual_seed(3)).bfloat16()
    for parts in (fused.unbind(3), fused.movedim(3, 2).contiguous().unbind(2)):
        with forced("flash-attn 2"):
            out = causal_attention_varlen(*parts, cumulative(lengths), lengths, SCALE)
        exact = causal_attention_varlen_reference(*(part.double() for part in parts), lengths, SCALE)
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


def test_calls_that_a_library_does_not_take_are_refused_or_go_to_the_next(monkeypatch):
    lengths, qkv = [5, 4], inputs(9, 2, 2, 64, torch.bfloat16)
    leaves = [part.clone().requires_grad_() for part in qkv]
    arguments = cumulative(lengths), lengths

    def chosen(*parts, **how):
        registry.chosen.clear()
        causal_attention_varlen(*parts, *arguments, **how)
        ((_, name),) = registry.chosen
        return name

    # Off Triton's interpreter, as on a GPU without a measurement of Triton: the libraries stand before torch.
    monkeypatch.setitem(registry._DEVICE, "triton", "cuda")
    with installed("flash-attn 2", "te"):
        assert chosen(*leaves) == chosen(*qkv, return_lse=True) == "flash"
        assert chosen(*leaves, return_lse=True) == "torch"
        monkeypatch.setattr(registry, "in_force", "flash")
        with pytest.raises(RuntimeError, match="by flash does not take a gradient of the log-sum-exp; add torch to the list"):
            causal_attention_varlen(*leaves, *arguments, return_lse=True)
        with pytest.raises(RuntimeError, match="by flash does not take torch.float32"):
            causal_attention_varlen(*(part.float() for part in qkv), *arguments)
        with pytest.raises(RuntimeError, match="by flash does not take a head dimension of 12"):
            causal_attention_varlen(*inputs(9, 2, 2, 12, torch.bfloat16), *arguments)
        with pytest.raises(RuntimeError, match="by flash does not take a pack of no token"):
            causal_attention_varlen(*inputs(0, 2, 2, 64, torch.bfloat16), cumulative([0]), [0])
        monkeypatch.setattr(registry, "in_force", "te")
        with pytest.raises(RuntimeError, match="by te does not take a call that asks for the log-sum-exp"):
            causal_attention_varlen(*qkv, *arguments, return_lse=True)
        monkeypatch.setattr(registry, "in_force", "te,flash")
        assert chosen(*qkv, return_lse=True) == "flash"


def test_reasons_and_remedies():
    said = backends_of("causal_attention_varlen", "cpu")
    assert list(said)[:3] == ["triton", "flash", "te"] and "cuda tensors, not on cpu" in said["flash"]
    with installed():
        said = backends_of("audio_attention_varlen", "cpu")
        assert "pip install flash-attn" in said["flash"] and "step-megatron[cuda]" in said["te"]
    function = STAND_INS["flash-attn 2"]["flash_attn"].flash_attn_varlen_func
    with installed(flash_attn=_module("flash_attn", "2.5.9", flash_attn_varlen_func=function)):
        assert "'flash-attn>=2.6'" in attention_libraries.load_error("flash")
    older = _module("flash_attn_interface", flash_attn_varlen_func=lambda q, k, v: None)
    with installed(flash_attn_interface=older):
        assert "September 2025" in attention_libraries.load_error("flash")
    with installed("flash-attn 2", "te"):
        assert attention_libraries.load_error("flash") == attention_libraries.load_error("te") == ""
        assert attention_libraries.version("flash") == "flash_attn 2.8.4" and attention_libraries.version("te").endswith("2.9.0")


def test_a_library_that_does_not_import_says_so(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    with installed():
        del sys.modules["flash_attn_interface"]
        said = attention_libraries.load_error("flash")
    assert said == "flash is installed but cannot be imported (ImportError: undefined symbol: _ZN3c10); install it again"


@pytest.mark.parametrize("wrong", [lambda rows: (rows + 1).clamp(max=7), lambda rows: rows.flip(0)])
def test_a_fault_of_the_adapter_is_caught(wrong, monkeypatch):
    right = attention_libraries._valid_rows
    monkeypatch.setattr(attention_libraries, "_valid_rows", lambda *arguments: wrong(right(*arguments)))
    arguments = cumulative([5, 3]), [5, 3], [4, 2], SCALE
    with forced("flash-attn 2"), pytest.raises(AssertionError, match="off by"):
        compare(
            lambda *qkv: audio_attention_varlen(*qkv, *arguments),
            lambda *qkv: audio_attention_varlen_reference(*qkv, *arguments[1:]),
            torch.bfloat16,
            inputs(8, 2, 2, 64, torch.bfloat16),
        )

"""Choices by measurement: the bench writes them, the registry follows, the doctor says so; a damaged or stale file is loud."""

import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from step_kernels import audio_attention_varlen, causal_attention_varlen, choices, packed_attention, registry
from step_kernels.bench import choosing, lengths
from step_kernels.bench.harness import Case, Measured
from step_kernels.segments import cumulative
from support.library_stand_ins import installed

from step_megatron import cli, doctor
from step_megatron.config.schema import EncoderConfig
from step_megatron.model.encoder import AudioEncoder

CPU = torch.device("cpu")
AUDIO = "audio_attention_varlen"


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """The file of choices, not there yet."""
    path = tmp_path / "cache" / "choices.json"
    monkeypatch.setenv(choices.VARIABLE, str(path))
    monkeypatch.setattr(registry, "in_force", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(registry, "_said", set())
    # The tests say what a CPU does, wherever they run.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choices.load.cache_clear()
    yield path
    choices.load.cache_clear()


def choice(**changes) -> choices.Choice:
    return replace(
        choices.Choice(
            device=choices.device_name(CPU),
            op=AUDIO,
            dtype="float32",
            width=64,
            backend="torch",
            over="cpp",
            ratio=1.25,
            date="2026-02-03",
            torch=torch.__version__,
            versions={"cpp": "avx2"},
            cases=["a"],
            milliseconds={"torch": [1.0], "cpp": [1.25]},
            excluded={},
        ),
        **changes,
    )


def ran(dim: int = 64, op=audio_attention_varlen) -> str:
    """The backend that an op really took."""
    registry.chosen.clear()
    op(*torch.randn(3, 9, 2, dim), cumulative([4, 5]), [4, 5])
    (_, name) = next(iter(registry.chosen))
    return name


def test_the_bench_chooses_the_registry_follows_and_the_doctor_says_so(file, monkeypatch, capsys):
    monkeypatch.setattr(lengths, "asterisk", lambda segments=3: [9, 4, 30][:segments])
    monkeypatch.setattr(lengths, "uniform", lambda: [6, 7])
    assert cli.main(["bench", "audio-attention", "--choose", "--repeats", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["file"] == str(file) and [each["width"] for each in said["choices"]] == [64, 128]
    for each in said["choices"]:
        assert each["backend"] in ("cpp", "torch") and each["versions"]["torch"] == torch.__version__ and each["ratio"] > 0
        assert set(each["milliseconds"]) | set(each["excluded"]) == {"cpp", "torch"} and len(each["cases"]) == 4
        assert ran(each["width"]) == each["backend"]
        detail = next(check.detail for check in doctor.report() if check.name == "step_kernels")
        assert f"{AUDIO} (float32, {each['width']})" in detail and f"{each['backend']}, measured on {each['date']}" in detail
    assert all(each["threads"] == torch.get_num_threads() for each in said["choices"])
    cli.main(["doctor", "--json"])  # whatever else this machine lacks
    told = {(each["op"], each["width"]): each for each in json.loads(capsys.readouterr().out)["kernels"]}
    assert told[AUDIO, 64]["why"].startswith("measured on") and told[AUDIO, None]["why"] == "first of its order"


def test_a_measured_choice_goes_before_the_order_for_its_own_kind_only(monkeypatch):
    choices.write([choice()])
    assert ran() == "torch" and ran(128) == "cpp" and ran(op=causal_attention_varlen) == "cpp"
    assert registry.decide(AUDIO, CPU, torch.float32, 64) == ("torch", "measured on 2026-02-03: 1.2x of cpp")
    assert ", with torch 2.1.0: 1.2x" in choice(torch="2.1.0").why()
    assert [choice(threads=count).why().split(": ")[0] for count in (1, 4)] == [
        "measured on 2026-02-03 with 1 thread",
        "measured on 2026-02-03 with 4 threads",
    ]
    monkeypatch.setattr(registry, "in_force", "cpp")
    assert ran() == "cpp"
    assert registry.decide(AUDIO, CPU, torch.float32, 64)[1] == "forced by STEP_KERNELS_BACKEND=cpp"


def test_a_choice_of_another_device_is_not_followed():
    choices.write([choice(device="NVIDIA H100 80GB HBM3")])
    assert ran() == "cpp" and all(each["width"] is None for each in registry.decisions("cpu"))


def test_a_choice_that_cannot_be_followed_any_more_is_said_once(file):
    choices.write([choice(backend="flash")])
    with pytest.warns(UserWarning, match=f"{file}.*fastest by flash, which cannot run: {AUDIO} has no flash for float32"):
        assert ran() == "cpp"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran() == "cpp"
    choices.write([choice(backend="flash", dtype="bfloat16")])
    with pytest.warns(UserWarning, match="flash kernels run on cuda tensors, not on cpu"):
        assert registry.decide(AUDIO, CPU, torch.bfloat16, 64)[0] == "torch"


def test_a_measured_library_is_followed_except_where_a_call_does_not_fit_it():
    choices.write([choice(backend="te", dtype="bfloat16")])
    inputs, arguments = torch.randn(3, 9, 2, 64).bfloat16(), (cumulative([4, 5]), [4, 5])
    with installed("te", "flash-attn 2"):
        registry.chosen.clear()
        audio_attention_varlen(*inputs, *arguments)
        audio_attention_varlen(*inputs, *arguments, return_lse=True)
        assert [name for _, name in registry.chosen] == ["te", "flash"]
        assert packed_attention.describe(AUDIO, CPU, torch.bfloat16, 64) == "te transformer_engine.pytorch 2.9.0"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ("{}", "lacks 'format'"),
        ('{"format": 2, "choices": []}', "format 2, this release reads 1"),
        ('{"format": 1, "choices": [{"op": "x"}]}', "missing"),
        (json.dumps({"format": 1, "choices": [asdict(choice(width="64"))]}), "width is '64'"),
        (json.dumps({"format": 1, "choices": [asdict(choice(dtype="float23"))]}), "dtype is 'float23'"),
        (json.dumps({"format": 1, "choices": [asdict(choice(op="nonsense"))]}), "op is 'nonsense'; there are .*gae_varlen"),
        (json.dumps({"format": 1, "choices": [asdict(choice(backend="fast"))]}), "backend is 'fast'; there are cuda"),
        (json.dumps({"format": 1, "choices": [asdict(choice(versions=None))]}), "versions is None"),
        (json.dumps({"format": 1, "choices": [asdict(choice(cases="a"))]}), "cases is 'a'"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it_and_the_remedy(file, content, why, capsys):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.raises(ValueError, match=f"(?s){file}: not a file of measured choices .*{why}.*delete it.*--choose"):
        ran()
    assert cli.main(["bench", "audio-attention", "--choose"]) == 2 and str(file) in capsys.readouterr().err
    check = next(check for check in doctor.report() if check.name == "step_kernels")
    assert check.status == "missing" and str(file) in check.detail


def test_writing_keeps_the_others_and_is_all_or_nothing(file, monkeypatch):
    choices.write([choice(), choice(width=128)])
    choices.write([choice(backend="cpp", over="torch")])
    assert {key[3]: each.backend for key, each in choices.load().items()} == {64: "cpp", 128: "torch"}
    before = file.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        choices.write([choice(width=32)])
    assert file.read_bytes() == before and [path.name for path in file.parent.iterdir()] == [file.name]


def test_others_may_read_the_file(file):
    before = os.umask(0o027)
    try:
        choices.write([choice()])
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o640


def denied(*_):
    raise PermissionError(13, "Permission denied")


def test_a_default_file_that_cannot_be_read_is_no_file(monkeypatch, tmp_path):
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        assert ran() == "cpp" and choices.load() == {}
        with pytest.raises(PermissionError):  # what cannot be read is not written over
            choices.write([choice()])
    choices.load.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    assert choices.path() is None and ran() == "cpp"
    with pytest.raises(ValueError, match="no home directory.*by STEP_KERNELS_CHOICES"):
        choosing.choose("audio-attention", 1, CPU)


def test_a_named_file_that_cannot_be_read_is_an_error_with_its_remedy(file, monkeypatch):
    file.mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"{file}: the file that STEP_KERNELS_CHOICES names .*Is a directory.*set the variable empty"
    ):
        ran()
    file.rmdir()
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ValueError, match="Permission denied.*name another"):
        ran()


def test_what_computes_an_op_shows_where_it_differs_from_the_order(monkeypatch):
    before = registry.computed_by("cpu")
    assert before[f"{AUDIO} float32"].startswith("cpp ") and before[f"{AUDIO} bfloat16"] == f"torch {torch.__version__}"
    choices.write([choice(backend="cpp"), choice(width=128, device="another")])
    assert registry.computed_by("cpu") == before
    choices.write([choice(date="2026-03-04", ratio=2.0)])
    assert registry.computed_by("cpu") == before | {f"{AUDIO} float32 64": f"torch {torch.__version__}"}
    monkeypatch.setattr(registry, "in_force", "torch")
    assert set(registry.computed_by("cpu").values()) == {f"torch {torch.__version__}"}


def test_where_the_file_is(monkeypatch):
    monkeypatch.delenv(choices.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert choices.path() == Path("/somewhere/step_kernels/choices.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert choices.path() == Path.home() / ".cache" / "step_kernels" / "choices.json"
    monkeypatch.setenv(choices.VARIABLE, "")
    assert choices.path() is None
    with pytest.raises(ValueError, match="STEP_KERNELS_CHOICES is empty"):
        choosing.choose("audio-attention", 1, CPU)


@pytest.mark.parametrize(
    ("seconds", "dependent", "chosen", "over", "ratio"),
    [
        ({"cpp": 1.0, "torch": 2.0}, (), "cpp", "torch", 2.0),
        ({"cpp": 2.0, "torch": 1.0}, (), "torch", "cpp", 2.0),
        ({"cpp": 1.04, "torch": 1.0}, (), "cpp", "torch", 0.962),  # within the noise: the first of the order stays
        ({"cpp": 2.0, "torch": 1.0}, ("torch",), "cpp", "", 0.0),  # bits that depend on companions are never chosen
        ({"cpp": 2.0}, (), "cpp", "", 0.0),  # torch fails
    ],
)
def test_which_backend_is_chosen(seconds, dependent, chosen, over, ratio, monkeypatch):
    def measured(case: Case, repeats, device):
        assert [each.name for each in case.contestants] == list(seconds)
        return Measured(case, {name: [value] for name, value in seconds.items()})

    monkeypatch.setattr(choosing, "measure", measured)
    monkeypatch.setattr(choosing, "by", lambda name, alone: lambda: name not in dependent)
    monkeypatch.setattr(choosing, "_fails", lambda contestant: "" if contestant.name in seconds else "no kernel")
    monkeypatch.setattr(lengths, "asterisk", lambda segments=2: [3, 2])
    made = choosing.choose("causal-attention", 1, CPU)["choices"][0]
    assert (made["backend"], made["over"], made["ratio"]) == (chosen, over, ratio) and made["op"] == "causal_attention_varlen"
    assert set(made["excluded"]) == {*dependent, *({"cpp", "torch"} - set(seconds))}


def test_ops_with_one_backend_a_device_are_refused(capsys):
    assert cli.main(["bench", "gae", "--choose"]) == 2
    assert "one backend a device" in capsys.readouterr().err


def test_the_encoders_fingerprint_follows_the_choice():
    def fingerprint() -> str:
        config = EncoderConfig(mels=16, layers=1, width=64, heads=1, ffn_width=32, max_positions=50)
        return AudioEncoder(config).reset_parameters(0).fingerprint()

    before = fingerprint()
    choices.write([choice()])
    chosen = fingerprint()
    choices.write([choice(backend="cpp", over="torch")])
    assert chosen != before == fingerprint()
    choices.write([choice(op="pool_norm_downsample")])
    assert fingerprint() not in (before, chosen)

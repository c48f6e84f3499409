"""A run's checkpoint -> a folder that other tools load: `export_run(run_dir, out, layout)`.

    step-audio     the released layout: encoder, step adaptor, decoder
    qwen2-audio    Qwen2AudioForConditionalGeneration: encoder, linear adaptor, decoder
    qwen2, llama   the decoder alone: Qwen2ForCausalLM, LlamaForCausalLM

    OUT/model*.safetensors, config.json, generation_config.json, tokenizer files, README.md (model card), LICENCES/

One tensor is in memory at a time; types are those of the checkpoint; padding of the vocabulary is not in it. LoRA adapters are
merged into the weights, or written alone (`adapter`). OUT is complete or absent.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from step_megatron.checkpoint.directory import CheckpointError, checkpoint_at, checkpoint_root, latest_checkpoint, steps_in
from step_megatron.checkpoint.safetensors_files import SafetensorsFiles, TensorInfo, write_safetensors
from step_megatron.checkpoint.streamed import WeightsReader
from step_megatron.config.load import RUN_CONFIG, for_one_process, load_config
from step_megatron.config.schema import Config
from step_megatron.conversion import card, model_configs
from step_megatron.conversion.adapter import Read, export_adapter, reading_merged
from step_megatron.conversion.importing import ADAPTOR, LANGUAGE_MODEL, meta_model
from step_megatron.conversion.provenance import copy_licences, history
from step_megatron.conversion.sources import ConversionError, CTranslate2Encoder, Source
from step_megatron.conversion.tokenizer_files import NAMES
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.model.adaptor import adaptor_entries
from step_megatron.model.decoder import transformer_config
from step_megatron.model.huggingface import EMBEDDING, decoder_entries
from step_megatron.model.mapping import Entry, problems
from step_megatron.model.whisper import encoder_entries, encoder_prefix, huggingface_name
from step_megatron.runtime.folders import whole_folder
from step_megatron.runtime.progress import Progress

LAYOUTS = ("step-audio", "qwen2-audio", "qwen2", "llama")


@dataclass(frozen=True)
class _Piece:
    """A tensor to write: the part of an entry, of what is read under the entry's name."""

    info: TensorInfo
    entry: Entry
    part: int
    read: Read


def export_run(
    run_dir: Path, out: Path, layout: str | None = None, step: int | None = None, adapter: bool = False
) -> dict[str, Any]:
    """Export a run, or what `convert import` made; see the module's docstring.

    Args:
        out: the folder to make.
        layout: one of `LAYOUTS`; None for that of the import, which for a run of another kind is step-audio.
        step: of a checkpoint that is not the newest.
        adapter: the LoRA adapters alone, in peft's format, which is that of the decoder; `layout` is not used.

    Returns:
        `layout`, `checkpoint`, `tensors`, `bytes`, `files`; of adapters also `left_out`.

    Raises:
        FileExistsError: `out` is there already.
        ConversionError: a layout that the model does not fit into, an encoder that the layout needs and the run has none of.
        CheckpointError: no such checkpoint.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; name another --out, or delete it first")
    config = _run_config(run_dir)
    if adapter:
        return export_adapter(run_dir, config, _checkpoint(run_dir, step), out)
    past = history(run_dir, config)
    layout = layout or past.layout or "step-audio"
    check_layout(config, layout)
    checkpoint = _checkpoint(run_dir, step)
    tree = model_configs.build(config, layout, past)
    with meta_model(config) as model, whole_folder(out) as folder:
        reader = WeightsReader(checkpoint, model)
        pieces = _pieces(config, layout, reader)
        tensors = {name: piece.info for name, piece in pieces.items()}
        with Progress(sum(info.bytes for info in tensors.values()) / 1e6, "export", "MB") as bar:
            files = write_safetensors(
                folder, tensors, _Reader(pieces), written=lambda name: bar.update(tensors[name].bytes / 1e6)
            )
        tree["dtype"] = str(reader.tensors[LANGUAGE_MODEL + EMBEDDING].dtype).removeprefix("torch.")
        tokenizer = _copy_tokenizer(config, folder)
        _write_json(folder / "config.json", tree)
        _write_json(folder / "generation_config.json", model_configs.generation(config, past, tokenizer))
        for place in past.places:
            copy_licences(place, folder / "LICENCES")
        text = card.model_card(config, layout, checkpoint.name, past, tensors, run_dir / RUN_CONFIG)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return {
        "layout": layout,
        "checkpoint": checkpoint.name,
        "tensors": len(tensors),
        "bytes": sum(info.bytes for info in tensors.values()),
        "files": [file.name for file in files],
    }


def check_layout(config: Config, layout: str) -> None:
    """Refuse a layout that cannot hold the model.

    Raises:
        ConversionError: names the setting that does not fit, and a layout that does.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    kind, bias = config.adaptor.kind, config.megatron.transformer.get("add_qkv_bias", True)
    if layout == "qwen2-audio" and kind != "linear":
        raise ConversionError(f"qwen2-audio has a linear adaptor, this run adaptor.kind={kind}; export it as step-audio")
    if layout == "step-audio" and kind != "step":
        raise ConversionError(f"step-audio has the step adaptor, this run adaptor.kind={kind}; export it as qwen2-audio")
    if layout == "llama" and bias:
        raise ConversionError("llama has no bias of query, key and value, this run has one (add_qkv_bias); export it as qwen2")
    if layout == "qwen2" and not bias:
        raise ConversionError("qwen2 has a bias of query, key and value, this run has none (add_qkv_bias); export it as llama")
    if layout == "step-audio" and not bias:
        raise ConversionError("step-audio's decoder has a bias of query, key and value, this run has none; export it as llama")
    if layout in ("step-audio", "qwen2-audio") and config.encoder.weights in ("", "random"):
        raise ConversionError(
            f"{layout} holds an encoder, this run has none (encoder.weights={config.encoder.weights!r}); export the decoder alone"
        )


class _Reader:
    """Reads what a piece needs; a joined tensor is kept until its last part has been asked for."""

    def __init__(self, pieces: dict[str, _Piece]):
        self._pieces = pieces
        self._entry: Entry | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def __call__(self, name: str) -> torch.Tensor:
        piece = self._pieces[name]
        if piece.entry is not self._entry:
            self._entry, self._parts = piece.entry, ()
            self._parts = piece.entry.split(piece.read(piece.entry.ours))
        return self._parts[piece.part].contiguous()


def _pieces(config: Config, layout: str, reader: WeightsReader) -> dict[str, _Piece]:
    """Every tensor of the layout by its name there, in the order of the layers."""
    transformer, read = transformer_config(config), reading_merged(reader, config.model.lora)
    prefix = "language_model." if layout == "qwen2-audio" else ""
    entries = [
        entry.renamed(lambda name: LANGUAGE_MODEL + name, lambda name: prefix + name)
        for entry in decoder_entries(transformer, config.model.vocabulary_size, config.model.tie_embeddings)
    ]
    pieces: dict[str, _Piece] = {}
    if layout in ("step-audio", "qwen2-audio"):
        where = "adapter." if layout == "step-audio" else "multi_modal_projector."
        adaptor = adaptor_entries(config.encoder, config.adaptor, transformer.hidden_size, where)
        entries += [entry.renamed(lambda name: ADAPTOR + name, lambda name: name) for entry in adaptor]
        pieces = _encoder_pieces(config, layout)
    for entry in entries:
        dtype = reader.tensors[entry.ours].dtype
        for part, (name, shape) in enumerate(entry.theirs):
            pieces[name] = _Piece(TensorInfo(shape, dtype), entry, part, read)
    return pieces


def _encoder_pieces(config: Config, layout: str) -> dict[str, _Piece]:
    """The frozen encoder's tensors, from wherever the run reads them, in the types that they have there."""
    source, named = open_encoder(Path(config.encoder.weights))

    def theirs(name: str) -> str:
        return f"encoder.{name}" if layout == "step-audio" else f"audio_tower.{huggingface_name(name)}"

    shapes = {name: info.shape for name, info in source.tensors.items()}
    known = encoder_entries(config.encoder, named)
    begin = named("conv1.weight").removesuffix("conv1.weight")
    if found := problems(known, shapes, lambda name: not name.startswith(begin)):
        raise ConversionError("\n  ".join([f"{config.encoder.weights}: not the run's encoder:", *found]))
    pieces = {}
    for entry in encoder_entries(config.encoder, theirs):
        ((name, shape),) = entry.theirs
        dtype = source.tensors[named(entry.ours)].dtype
        pieces[name] = _Piece(TensorInfo(shape, dtype), entry, 0, lambda ours: source.read(named(ours)))
    return pieces


def open_encoder(directory: Path) -> tuple[Source, Callable[[str], str]]:
    """The tensors of an encoder's directory (`encoder.weights`), and their names there by released name."""
    if (directory / "model.bin").is_file():
        return CTranslate2Encoder(directory / "model.bin"), lambda name: name
    files = SafetensorsFiles(directory)
    prefix = encoder_prefix(files.tensors)
    if prefix is None:
        raise ConversionError(f"{directory}: no tensor is called [prefix]conv1.weight; is it an audio encoder?")
    released = f"{prefix}after_norm.weight" in files.tensors
    return files, lambda name: prefix + (name if released else huggingface_name(name))


def _run_config(run_dir: Path) -> Config:
    path = run_dir / RUN_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a run's directory, or one that `convert import` made")
    return for_one_process(load_config(path))


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    if step is None:
        found = latest_checkpoint(run_dir)
    else:
        found = checkpoint_at(checkpoint_root(run_dir), step)
    if found is None or not found.is_dir():
        there = ", ".join(path.name for path in steps_in(checkpoint_root(run_dir)).values()) or "none"
        raise CheckpointError(f"{run_dir}: no such checkpoint; there are: {there}")
    return found


def _copy_tokenizer(config: Config, folder: Path) -> Tokenizer | None:
    if not config.tokenizer.path:
        return None
    source = Path(config.tokenizer.path)
    tokenizer = Tokenizer.load(source)
    for name in NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return tokenizer


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

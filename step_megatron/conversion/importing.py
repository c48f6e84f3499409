"""Released checkpoints -> a run directory that training, chat and evaluation start from: `import_model(directory, out)`.

    OUT/config.yaml                 sizes, where encoder and tokenizer are; nothing of a training run
    OUT/checkpoints/step_00000000   decoder and adaptor, in Megatron's layout: any parallel layout reads it
    OUT/encoder/                    the frozen encoder, safetensors under released names
    OUT/tokenizer/                  the model's files, with the specials that audio needs
    OUT/import.json                 what was imported: files, hashes, licences, configurations
    OUT/LICENCES/                   licence texts that lay beside the weights

One tensor is in memory at a time. OUT is complete or absent.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from step_megatron.checkpoint.directory import checkpoint_root, point_to
from step_megatron.checkpoint.safetensors_files import TensorInfo, write_safetensors
from step_megatron.checkpoint.streamed import write_weights
from step_megatron.config.load import RUN_CONFIG, save
from step_megatron.config.schema import Config, EncoderConfig
from step_megatron.conversion import provenance
from step_megatron.conversion.layouts import Foreign, recognise
from step_megatron.conversion.sources import ConversionError, Scratch, Source
from step_megatron.conversion.tokenizer_files import Prepared, prepare
from step_megatron.model.adaptor import adaptor_entries
from step_megatron.model.audio_lm import AudioLanguageModel, build_model, draw_adaptor
from step_megatron.model.decoder import transformer_config
from step_megatron.model.huggingface import EMBEDDING, OUTPUT, decoder_entries
from step_megatron.model.mapping import Entry, problems
from step_megatron.model.whisper import encoder_entries
from step_megatron.runtime import seeds
from step_megatron.runtime.device import initialize, shutdown
from step_megatron.runtime.folders import whole_folder
from step_megatron.runtime.progress import Progress

LANGUAGE_MODEL, ADAPTOR = "language_model.", "adaptor."
# A decoder alone has an adaptor all the same, for whisper-base's features; its encoder is not set.
_NO_ENCODER = EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048)
_CHECKPOINT = "step_00000000"


@dataclass
class Imported:
    """What an import will write, checked against the files, before any tensor is read.

    Attributes:
        config: the run's configuration.
        decoder, adaptor: entries by our full name; the adaptor has none where it is drawn from the seed.
        encoder: entries by released name; none where there is no encoder.
        models: the checkpoint of the decoder and, where the encoder comes from another, that one.
        prepared: the tokenizer.
        drawn: parameters that no file has.

    A tensor that is read is good until the next one is: they share their memory.
    """

    config: Config
    decoder: dict[str, Entry]
    adaptor: dict[str, Entry]
    encoder: dict[str, Entry]
    models: list[Foreign]
    prepared: Prepared | None = None
    drawn: dict[str, torch.Tensor] = field(default_factory=dict)
    _whole: Scratch = field(default_factory=Scratch)
    _part: Scratch = field(default_factory=Scratch)

    def read(self, name: str) -> torch.Tensor:
        """A parameter of decoder or adaptor, by its full name."""
        if name in self.drawn:
            return self.drawn[name]
        entry, source = self._entry(name)
        tensor = self._joined(entry, source)
        if name not in (LANGUAGE_MODEL + EMBEDDING, LANGUAGE_MODEL + OUTPUT):
            return tensor
        copy = self.models[0].decoder_name("lm_head.weight")
        if self.config.model.tie_embeddings and copy in source.tensors and not torch.equal(source.read(copy), tensor):
            raise ConversionError(
                f"{self.models[0].directory}: {copy} differs from the embeddings, though config.json ties them; set "
                "tie_word_embeddings to false there"
            )
        return _with_rows(tensor, self.config.model.vocabulary_size, self.config.run.seed, name)

    def read_encoder(self, name: str) -> torch.Tensor:
        """A tensor of the encoder, by its released name."""
        return self._joined(*self._entry(name))

    def _joined(self, entry: Entry, source: Source) -> torch.Tensor:
        dtype = source.tensors[entry.theirs[0][0]].dtype
        tensor = self._whole.tensor(entry.shape, dtype)
        for view, (theirs, shape) in zip(entry.views(tensor), entry.theirs, strict=True):
            if view.is_contiguous():
                source.read(theirs, view.view(shape))
            else:
                view.copy_(source.read(theirs, self._part.tensor(shape, dtype)).view(view.shape))
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor: that which it has in the files.

        Raises:
            ConversionError: parts that are joined are of different types.
        """
        if name in self.drawn:
            return self.drawn[name].dtype
        entry, source = self._entry(name)
        types = {source.tensors[theirs].dtype for theirs, _ in entry.theirs}
        if len(types) > 1:
            raise ConversionError(f"{', '.join(n for n, _ in entry.theirs)}: of different types {types}; convert them to one")
        return types.pop()

    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor of the files, as they are read."""
        return {name: TensorInfo(self._entry(name)[0].shape, self.dtype(name)).bytes for name in self._names()}

    def _names(self) -> list[str]:
        return [*self.decoder, *self.adaptor, *self.encoder]

    def _entry(self, name: str) -> tuple[Entry, Source]:
        if name in self.encoder:
            return self.encoder[name], self.models[-1].source
        return self.decoder.get(name) or self.adaptor[name], self.models[0].source


def import_model(
    directory: Path,
    out: Path | None,
    encoder: Path | None = None,
    tokenizer: Path | None = None,
    seed: int = Config().run.seed,
) -> dict[str, Any]:
    """Import a model, or a decoder and the encoder of another; see the module's docstring.

    Args:
        directory: Step-Audio, Qwen2-Audio, Qwen2.5 or LLaMA (Hugging Face), or a GGUF file.
        out: the run directory to make; None reads and checks every tensor and writes nothing.
        encoder: Whisper (Hugging Face or CTranslate2), or a model of `directory`'s kinds that has an encoder.
        tokenizer: a tokenizer directory to use in place of the model's.
        seed: draws an adaptor, and rows for added specials, where the files have none.

    Returns:
        `layouts`, `tensors` and `bytes` as they are here, `drawn` parameters, `added` specials, `tokenizer` and `template`.

    Raises:
        ConversionError, SafetensorsError, TokenizerError: what does not fit (all such tensors are named in one message), or a
            file that is not what its known digest says.
        FileExistsError: `out` is there already.
    """
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists; name another --out, or delete it first")
    imported = plan(directory, encoder, seed)
    with _folder(out) as folder:
        imported.prepared = _settle_tokenizer(imported, tokenizer, folder, out)
        _draw_adaptor(imported)
        sizes = imported.sizes()
        with Progress(sum(sizes.values()) / 1e6, "import", "MB") as bar:

            def advance(name: str) -> None:
                bar.update(sizes.get(name, 0) / 1e6)

            with _digests(imported.models) as records:
                if out is None:
                    _read_all(imported, advance)
                else:
                    _write(imported, folder, out.absolute(), advance)
                _record(imported, [found.result() for found in records], folder)
    prepared = imported.prepared
    return {
        "layouts": [foreign.layout for foreign in imported.models],
        "tensors": len(sizes),
        "bytes": sum(sizes.values()),
        "drawn": sorted(imported.drawn),
        "added": prepared.added if prepared else {},
        "tokenizer": prepared is not None,
        "template": imported.config.tokenizer.template,
    }


def plan(directory: Path, encoder: Path | None, seed: int) -> Imported:
    """Hold what the files have against what the configuration asks for; nothing is read but headers.

    Raises:
        ConversionError: as `import_model`.
    """
    main = recognise(directory)
    if main.decoder is None:
        raise ConversionError(f"{directory}: a {main.layout} checkpoint has no decoder of ours; give it by --encoder")
    models = [main]
    if encoder is not None:
        models.append(recognise(encoder))
        if main.encoder is not None:
            raise ConversionError(f"{directory}: has an encoder, and an adaptor trained for it; --encoder is for decoders alone")
        if models[-1].encoder is None:
            raise ConversionError(f"{encoder}: a {models[-1].layout} checkpoint has no audio encoder")
    config = _configuration(models, seed)
    transformer = transformer_config(config)
    # The rows that the files have: specials may add to them later.
    entries = decoder_entries(transformer, config.model.vocabulary_size, config.model.tie_embeddings)
    decoder = [entry.renamed(lambda name: LANGUAGE_MODEL + name, main.decoder_name) for entry in entries]
    adaptor = []
    if main.adaptor is not None:
        adaptor = adaptor_entries(config.encoder, config.adaptor, transformer.hidden_size, main.adaptor_prefix)
        adaptor = [entry.renamed(lambda name: ADAPTOR + name, lambda name: name) for entry in adaptor]
    heard = encoder_entries(config.encoder, models[-1].encoder_name) if models[-1].encoder is not None else []
    _check(models, [decoder + adaptor + (heard if len(models) == 1 else []), heard])
    named = [{entry.ours: entry for entry in group} for group in (decoder, adaptor, heard)]
    return Imported(config, *named, models)


def _configuration(models: list[Foreign], seed: int) -> Config:
    decoder = models[0].decoder
    config = Config()
    config.run.seed = seed
    config.model = replace(config.model, preset="", **decoder.model)
    config.encoder = replace(models[-1].encoder or _NO_ENCODER)
    config.adaptor = replace(models[0].adaptor or config.adaptor)
    config.megatron.transformer = dict(decoder.transformer)
    embedding = models[0].source.tensors.get(models[0].decoder_name("model.embed_tokens.weight"))
    if embedding is not None and embedding.dtype == torch.bfloat16:
        config.megatron.transformer["bf16"] = True
    return config


def _check(models: list[Foreign], wanted: list[list[Entry]]) -> None:
    """Every tensor of every file is asked for, known to be of no use, or named in the error, as is what is missing.

    Args:
        wanted: entries of the first model, and of the second, where there is one.
    """
    found = []
    for number, (foreign, entries) in enumerate(zip(models, wanted, strict=False)):
        shapes = {name: info.shape for name, info in foreign.source.tensors.items()}

        def ignored(name: str, foreign: Foreign = foreign, number: int = number) -> bool:
            # Of a second model only the encoder is wanted.
            return foreign.ignored(name) or (number == 1 and not name.startswith(foreign.encoder_name("conv1.weight")[:-12]))

        if lines := problems(entries, shapes, ignored):
            found.append("\n  ".join([f"{foreign.directory}: {len(lines)} tensors are not those of config.json:", *lines]))
    if found:
        raise ConversionError("\n".join(found))


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where to write: beside `out`, which it becomes in the end, or a place that is forgotten."""
    if out is None:
        with TemporaryDirectory() as place:
            yield Path(place)
        return
    with whole_folder(out) as partial:
        yield partial


def _settle_tokenizer(imported: Imported, given: Path | None, folder: Path, out: Path | None) -> Prepared | None:
    """Write the tokenizer, and make room for the specials that it gets."""
    config = imported.config
    audio = bool(imported.encoder)
    prepared = prepare(imported.models[0], given, folder / "tokenizer", config.model.vocabulary_size, audio)
    if prepared is not None:
        config.tokenizer.path = str(out.absolute() / "tokenizer") if out else ""
        config.tokenizer.template = prepared.template
        config.model.vocabulary_size = prepared.rows
    return prepared


def _draw_adaptor(imported: Imported) -> None:
    if imported.adaptor:
        return
    drawn = draw_adaptor(imported.config, imported.config.megatron.transformer["hidden_size"])
    dtype = torch.bfloat16 if imported.config.megatron.transformer.get("bf16") else torch.float32
    imported.drawn = {ADAPTOR + name: parameter.detach().to(dtype) for name, parameter in drawn.named_parameters()}


def _read_all(imported: Imported, advance: Callable[[str], None]) -> None:
    for name in [*imported.decoder, *imported.adaptor]:
        imported.read(name)
        advance(name)
    for name in imported.encoder:
        imported.read_encoder(name)
        advance(name)


@contextmanager
def _digests(models: list[Foreign]) -> Iterator[list[Future]]:
    """Records of the checkpoints, made beside the reading, which leaves the files in the system's cache."""
    with ThreadPoolExecutor(1) as thread:
        yield [thread.submit(provenance.describe, foreign) for foreign in models]


def _write(imported: Imported, folder: Path, out: Path, advance: Callable[[str], None]) -> None:
    config = imported.config
    config.run.dir = str(out)
    if imported.encoder:
        config.encoder.weights = str(out / "encoder")
        infos = {name: TensorInfo(entry.shape, imported.dtype(name)) for name, entry in imported.encoder.items()}
        write_safetensors(folder / "encoder", infos, imported.read_encoder, written=advance)
    root = checkpoint_root(folder)
    with meta_model(config) as model:
        dtypes = {name: imported.dtype(name) for name in (*imported.decoder, *imported.adaptor, *imported.drawn)}
        write_weights(root / _CHECKPOINT, model, dtypes, imported.read, written=advance)
    point_to(root / _CHECKPOINT)
    save(config, folder / RUN_CONFIG)


def _record(imported: Imported, models: list[dict[str, Any]], folder: Path) -> None:
    """Write what was imported, and the licences."""
    record = {
        "models": models,
        "drawn": sorted(imported.drawn),
        "added": imported.prepared.added if imported.prepared else {},
    }
    (folder / provenance.FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for foreign in imported.models:
        provenance.copy_licences(foreign.directory, folder / "LICENCES")


@contextmanager
def meta_model(config: Config) -> Iterator[AudioLanguageModel]:
    """The whole model of a configuration in one process, without memory for its parameters."""
    initialize(config)
    try:
        with torch.device("meta"):
            (model,) = build_model(config)
        yield model
    finally:
        shutdown()


def _with_rows(tensor: torch.Tensor, rows: int, seed: int, name: str) -> torch.Tensor:
    """The rows of tokens that the files do not have: their mean, and a tenth of their spread, drawn from the seed.

    At the mean a new token is neither likelier nor less likely than the others; the spread tells the new ones apart.
    """
    missing = rows - tensor.shape[0]
    if not missing:
        return tensor
    mean, spread = tensor.float().mean(0), tensor.float().std(0)
    noise = torch.randn(missing, tensor.shape[1], generator=seeds.generator(seed, name))
    return torch.cat([tensor, (mean + 0.1 * spread * noise).to(tensor.dtype)])

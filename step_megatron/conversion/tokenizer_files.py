"""The tokenizer of an imported model: its files copied (or made, from a GGUF file), the specials that audio needs added."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from step_megatron.conversion.gguf_file import GgufFile
from step_megatron.conversion.layouts import Foreign
from step_megatron.conversion.sources import ConversionError
from step_megatron.data.template import TEMPLATES
from step_megatron.data.tokenizer import Tokenizer, TokenizerError
from step_megatron.data.tokenizer_json import FILE, add_specials

# What a tokenizer directory may hold; copied as it is, on import and on export.
NAMES = (
    FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "compact.json",
)
# Beside a template's own marks, what a conversation with audio and reasoning is made of.
_AUDIO = ("<think>", "</think>", "<audio_start>", "<audio_patch>", "<audio_end>")
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Prepared:
    """A tokenizer directory that is ready.

    Attributes:
        template: the conversation template that its specials allow.
        rows: least rows of embeddings that a model for it has.
        added: specials that were added, with their ids.
    """

    template: str
    rows: int
    added: dict[str, int]


def prepare(foreign: Foreign, given: Path | None, out: Path, rows: int, audio: bool) -> Prepared | None:
    """Write the tokenizer of an imported model into `out`; None where there is none.

    Args:
        given: a tokenizer directory to use instead of the model's own.
        rows: rows of the model's embeddings.
        audio: add the specials of audio and reasoning that are missing: in rows that no token has, then beyond.

    Raises:
        ConversionError: more tokens than rows, or no template whose marks the tokenizer has.
        TokenizerError: files that are damaged or clash.
    """
    source = given or foreign.directory
    out.mkdir(parents=True)
    names = [name for name in NAMES if (source / name).is_file()]
    if isinstance(foreign.source, GgufFile) and given is None:
        _write_gguf(foreign.source, out)
    elif FILE in names or "qwen.tiktoken" in names:
        for name in names:
            shutil.copyfile(source / name, out / name)
    elif given is not None:
        raise TokenizerError(f"{given}: neither {FILE} nor qwen.tiktoken is here; give a tokenizer's folder")
    else:
        out.rmdir()
        return None
    tokenizer = Tokenizer.load(out)
    template = _template(source, tokenizer)
    added: dict[str, int] = {}
    if audio:
        missing = [name for name in _AUDIO if name not in tokenizer.specials]
        added = {name: tokenizer.size + place for place, name in enumerate(missing)}
        if added:
            add_specials(out, added)
            tokenizer = Tokenizer.load(out)
    # Qwen's plain vocabulary counts the speech tokens of Step-Audio, ids without text that a Qwen model has no rows for.
    whole = (out / FILE).is_file() or tokenizer.is_compact
    needed = tokenizer.size if whole else 1 + max(tokenizer.specials.values())
    if needed - len(added) > rows:
        raise ConversionError(
            f"{source}: the tokenizer has {needed - len(added)} ids, the model {rows} rows; they are not of one model"
        )
    return Prepared(template, max(rows, needed), added)


def _template(source: Path, tokenizer: Tokenizer) -> str:
    for name, template in TEMPLATES.items():
        if {template.open, template.close} <= tokenizer.specials.keys() and _is_own(name, source, tokenizer):
            return name
    known = "; ".join(f"{name}: {template.open} {template.close}" for name, template in TEMPLATES.items())
    raise ConversionError(f"{source}: the tokenizer has the marks of no conversation template ({known})")


def _is_own(name: str, source: Path, tokenizer: Tokenizer) -> bool:
    """Whether the marks come from the files: Qwen's plain vocabulary is given Step-Audio's where nothing is said."""
    return name != "step-audio" or (source / FILE).is_file() or (source / "added_tokens.json").is_file() or tokenizer.is_compact


def _write_gguf(source: GgufFile, out: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json` from what a GGUF file holds of them.

    Source: SmolLM2's own tokenizer.json, which cuts digits apart, as llama.cpp's `smollm` pre-tokenizer does.
    """
    fields, where = source.fields, source.files[0]
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, cut) != ("gpt2", "smollm"):
        raise ConversionError(
            f"{where}: its tokenizer is {kind}, cut as {cut}; only SmolLM2's (gpt2, smollm) is known: name a folder with the "
            "model's tokenizer.json by --tokenizer"
        )
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    built = tokenizers.Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    built.add_special_tokens(special)
    built.save(str(out / FILE))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "padding", "unknown"):
        if (number := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{ {'padding': 'pad', 'unknown': 'unk'}.get(name, name) }_token"] = tokens[number]
    config |= {"chat_template": template} if (template := fields.get("tokenizer.chat_template")) else {}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

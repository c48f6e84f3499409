"""Whisper itself on the held-out clips of a transcription data set: the ceiling of a model that listens through its encoder.

The CTranslate2 files that `data fetch` unpacks are read, their weights given to transformers' model, which decodes greedily and
is told the language. Clips, normalisation and rates are those of the model that is evaluated.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
import torch

from step_megatron.audio.address import parse_address
from step_megatron.audio.errors import AudioError
from step_megatron.audio.front_end import LogMelFrontEnd
from step_megatron.audio.geometry import SAMPLE_RATE
from step_megatron.data.template import THINK_END
from step_megatron.evaluation.results import transcription_rates
from step_megatron.evaluation.tasks import TRANSCRIPTION, Item
from step_megatron.model.whisper import CTranslate2File, from_ctranslate2, huggingface_name
from step_megatron.runtime.progress import Progress

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

_BATCH, _NEW_TOKENS = 16, 96
# CTranslate2 module of a decoder layer -> transformers' module, for those that are not stacked.
_LAYER = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_STACKED = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
_PARTS = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}


def whisper_rates(directory: Path, items: Sequence[Item], data_dir: Path) -> dict:
    """Error rates of a Whisper model on items that ask for a transcript and name their language.

    Args:
        directory: Whisper in CTranslate2's format (`model.bin`, `config.json`, `tokenizer.json`).
        data_dir: where the clips' addresses start.

    Returns:
        As `results.transcription_rates`, and the `name` of the model.

    Raises:
        ImportError: transformers is not installed.
        ValueError: no such item.
        AudioError: a clip cannot be read.
    """
    items = [item for item in items if item.kind == TRANSCRIPTION and item.language]
    if not items:
        raise ValueError(f"{data_dir}: test.jsonl has no transcription item with a meta.language; leave --whisper out")
    texts = transcribe(directory, [_waveform(item, data_dir) for item in items], [item.language for item in items])
    rates = transcription_rates(
        [item.answer for item in items], [THINK_END + text for text in texts], [item.language for item in items]
    )
    return {"name": directory.resolve().name, **rates}


def transcribe(directory: Path, waveforms: Sequence[torch.Tensor], languages: Sequence[str]) -> list[str]:
    """Greedy transcripts of 16 kHz waveforms of at most 30 s; `languages` has two letters for each."""
    from transformers import WhisperFeatureExtractor

    model, extractor = load_whisper(directory), WhisperFeatureExtractor()
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    texts = []
    with Progress(len(waveforms), "whisper", "clips") as bar:
        for start in range(0, len(waveforms), _BATCH):
            batch = slice(start, start + _BATCH)
            features = extractor([w.numpy() for w in waveforms[batch]], sampling_rate=SAMPLE_RATE, return_tensors="pt")
            names = [("<|startoftranscript|>", f"<|{code}|>", "<|transcribe|>", "<|notimestamps|>") for code in languages[batch]]
            prompts = torch.tensor([[tokenizer.token_to_id(name) for name in each] for each in names])
            end = tokenizer.token_to_id("<|endoftext|>")
            ids = _greedy(model, features.input_features, prompts, end, settings)
            texts += [tokenizer.decode(row, skip_special_tokens=True) for row in ids.tolist()]
            bar.update(len(names))
    return texts


@torch.no_grad()
def _greedy(
    model: "WhisperForConditionalGeneration",
    features: torch.Tensor,
    prompts: torch.Tensor,
    end: int,
    settings: Mapping[str, list[int]],
) -> torch.Tensor:
    """New tokens of every row, `[rows, n]`; what follows a row's end is the end again."""
    encoded, cache, ids, new = model.model.encoder(features), None, prompts, []
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for position in range(_NEW_TOKENS):
        out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1]
        logits[:, settings["suppress_ids"]] = -torch.inf
        if not position:
            logits[:, settings["suppress_ids_begin"]] = -torch.inf
        ids = logits.argmax(-1, keepdim=True).masked_fill(finished[:, None], end)
        finished |= ids[:, 0] == end
        new.append(ids)
        if finished.all():
            break
    return torch.cat(new, 1)


def load_whisper(directory: Path) -> "WhisperForConditionalGeneration":
    """transformers' model with the weights of a CTranslate2 folder, in float32."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    stored = CTranslate2File(directory / "model.bin").tensors()
    encoder = from_ctranslate2({name: tensor for name, tensor in stored.items() if name.startswith("encoder/")})
    # The file has one final norm for both; `huggingface_name` knows the encoder's.
    state = {f"model.encoder.{huggingface_name(name)}": tensor for name, tensor in encoder.items()}
    state |= {f"model.decoder.{name}": tensor for name, tensor in _decoder(stored).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    tokens, width = state["proj_out.weight"].shape
    layers = len(
        {name.split("/")[1] for name in stored if name.startswith("decoder/layer_") and "layer_norm" not in name.split("/")[1]}
    )
    heads = int(stored["decoder/num_heads"])
    config = WhisperConfig(
        vocab_size=tokens,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )
    model = WhisperForConditionalGeneration(config).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def _decoder(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder's tensors under transformers' names."""
    state = {
        "embed_tokens.weight": stored["decoder/embeddings/weight"],
        "embed_positions.weight": stored["decoder/position_encodings/encodings"],
        "layer_norm.weight": stored["decoder/layer_norm/gamma"],
        "layer_norm.bias": stored["decoder/layer_norm/beta"],
    }
    for name, tensor in stored.items():
        place, _, rest = name.removeprefix("decoder/").partition("/")
        if not name.startswith("decoder/layer_") or not rest:
            continue
        layer, (module, _, part) = f"layers.{place.removeprefix('layer_')}", rest.rpartition("/")
        if module in _LAYER:
            state[f"{layer}.{_LAYER[module]}.{_PARTS[part]}"] = tensor
        elif module in _STACKED:
            for target, piece in zip(_STACKED[module], tensor.chunk(len(_STACKED[module])), strict=True):
                # Whisper's keys have no bias; the file has zeros.
                if (target.rpartition(".")[2], part) != ("k_proj", "bias"):
                    state[f"{layer}.{target}.{part}"] = piece
    return state


def _waveform(item: Item, data_dir: Path) -> torch.Tensor:
    place = parse_address(item.audio[0], data_dir)
    (clip,) = LogMelFrontEnd(mels=80).decode([place.read()], [place.name])
    if isinstance(clip, AudioError):
        raise clip
    return torch.from_numpy(clip.waveform)

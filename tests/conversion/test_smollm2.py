"""Real weights: SmolLM2-135M's GGUF file with whisper-base's encoder, imported, exported, and loaded by transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion import foreign
from conversion.foreign import same_bits, tensors_of

from step_megatron.config import load_config
from step_megatron.conversion.exporting import export_run
from step_megatron.conversion.importing import import_model
from step_megatron.data.tokenizer import Tokenizer

SENTENCE = "The capital of France is Paris, and the capital of Germany is Berlin."
QUESTION = "What is the capital of France?"
ADDED = ["<think>", "</think>", "<audio_start>", "<audio_patch>", "<audio_end>"]
ROWS = 49152


@pytest.fixture(scope="module")
def gguf(step_data) -> Path:
    path = step_data / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there: run `step-megatron data fetch --group smollm2`")
    return path


@pytest.fixture(scope="module")
def imported(gguf, step_data, tmp_path_factory) -> Path:
    """With whisper-base's encoder."""
    whisper = step_data / "whisper-base"
    if not (whisper / "model.bin").is_file():
        pytest.skip(f"{whisper} is not there: run `step-megatron data fetch`")
    out = tmp_path_factory.mktemp("smollm2") / "run"
    summary = import_model(gguf, out, encoder=whisper)
    assert summary["layouts"] == ["llama", "whisper"] and len(summary["drawn"]) == 6
    assert summary["added"] == {name: ROWS + place for place, name in enumerate(ADDED)}
    return out


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "back"
    assert export_run(imported, out)["layout"] == "llama"
    return out


def test_the_export_says_where_it_comes_from(exported):
    rows = tensors_of(exported)["model.embed_tokens.weight"]
    # New tokens get rows near the mean of the others, each its own.
    assert rows.shape[0] == ROWS + len(ADDED) == json.loads((exported / "config.json").read_text())["vocab_size"]
    mean, spread = rows[:ROWS].mean(0), rows[:ROWS].std(0)
    assert (rows[ROWS:] - mean).norm() < 0.2 * spread.norm() * len(ADDED) ** 0.5
    assert len({tuple(row) for row in rows[ROWS:].tolist()}) == len(ADDED)
    card = (exported / "README.md").read_text()
    assert "imported: `smollm2` (layout llama), licence: apache-2.0" in card and "`<audio_patch>` 49155" in card
    assert "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53" in card
    assert {file.name for file in (exported / "LICENCES").iterdir()} == {"smollm2.txt", "whisper-base.txt"}


def test_it_speaks_english_before_any_training(imported, exported):
    """Loss per token of a sentence, and the greedy answer to a question in its own chat format."""
    from transformers import LlamaForCausalLM

    from step_megatron.generation.engine import Engine
    from step_megatron.generation.request import Prompt, Sampling
    from step_megatron.model.batch import make_batch
    from step_megatron.runtime.device import shutdown

    theirs = LlamaForCausalLM.from_pretrained(exported)
    config, (model,) = foreign.loaded(imported)
    try:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        ids = torch.tensor([tokenizer.encode(SENTENCE)])
        with torch.no_grad():
            ours, expected = model(make_batch(ids, [ids.shape[1]])), theirs(ids).logits
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-3)
        # Where query and key stay as GGUF has them it is 2.447.
        loss = torch.nn.functional.cross_entropy(ours[0, :-1].double(), ids[0, 1:]).item()
        assert loss == pytest.approx(1.715, abs=2e-3)
        start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
        prompt = [start, *tokenizer.encode(f"user\n{QUESTION}"), end, *tokenizer.encode("\n")]
        prompt += [start, *tokenizer.encode("assistant\n")]
        (result,) = Engine(model).generate([Prompt(prompt)], Sampling(max_new_tokens=16, stop_ids=(end,)))
        text = theirs.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=end, pad_token_id=0)
        assert result.tokens == text[0, len(prompt) :].tolist()
        assert "Paris" in tokenizer.decode(result.tokens)
    finally:
        shutdown()


def test_its_tokenizer_cuts_text_as_smollm2_does(imported, exported):
    """Beside tiktoken on the same merges, with GPT-2's pattern and every digit by itself."""
    import tiktoken
    from transformers import AutoTokenizer

    ours = Tokenizer.load(imported / "tokenizer")
    tree = json.loads((imported / "tokenizer" / "tokenizer.json").read_text())
    assert ours.size == ROWS + len(ADDED)
    known = {token: ours.token_bytes(number) for token, number in tree["model"]["vocab"].items()}
    merged = [known[first] + known[second] for first, second in tree["model"]["merges"]]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in merged:
        ranks.setdefault(token, len(ranks))
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    reference = tiktoken.Encoding("smollm2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    theirs = AutoTokenizer.from_pretrained(exported)
    for text in (SENTENCE, "  naïve\tcafé\n\n x", "你好，世界。", "def f(x):\n    return x", "I'll say it's 🙂", "1234 is:5"):
        ids = ours.encode(text)
        assert [ours.token_bytes(number) for number in ids] == reference.decode_tokens_bytes(reference.encode(text)), text
        assert ids == theirs.encode(text, add_special_tokens=False) and ours.decode(ids) == text
    messages = [{"role": "user", "content": QUESTION}]
    assert theirs.apply_chat_template(messages, tokenize=False).endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n")


def test_the_encoder_is_whisper_bases(imported, step_data):
    from step_megatron.config.schema import EncoderConfig
    from step_megatron.model.encoder import build_encoder

    config = load_config(imported / "config.yaml")
    assert (config.model.vocabulary_size, config.tokenizer.template) == (ROWS + len(ADDED), "chatml")
    sizes = EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048, weights=str(step_data / "whisper-base"))
    same_bits(dict(build_encoder(config.encoder).state_dict()), dict(build_encoder(sizes).state_dict()))


def test_the_preset_is_what_the_import_makes(imported):
    made, preset = load_config(imported / "config.yaml"), load_config(None, ["model.preset=smol-audio"])
    for name in ("vocabulary_size", "max_positions", "rotary_base", "tie_embeddings"):
        assert getattr(made.model, name) == getattr(preset.model, name), name
    assert replace(made.encoder, weights="") == preset.encoder and made.adaptor == preset.adaptor
    assert made.tokenizer.template == preset.tokenizer.template
    # Megatron's default of the heads' width is theirs.
    assert preset.megatron.transformer == {k: v for k, v in made.megatron.transformer.items() if k != "kv_channels"}

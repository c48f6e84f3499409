"""Tokens a second of greedy generation from prompts of unequal length, beside transformers' `generate` with the same weights.

The decoder is the preset `tiny`, in float32; prompts are text of 20 to 120 tokens, each continued by 64. Ours packs the prompts
and keeps its cache in pages; it runs once more with every op of `step_kernels` in plain torch, which says what the kernels are
worth; transformers pads on the left and is given all prompts in one batch, its best way. Runs alternate between the three, so
that what else the machine does hits all of them alike; a ratio is formed within each round.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
from step_kernels.bench.contestants import by

from step_megatron.benchmarks.train_step import OVERRIDES
from step_megatron.benchmarks.train_step_peer import decoder_weights, text_config
from step_megatron.config import load_config
from step_megatron.config.schema import Config
from step_megatron.model.audio_lm import AudioLanguageModel, build_model
from step_megatron.model.generation import Prompt, generate
from step_megatron.runtime.device import initialize, shutdown

_PROMPTS, _NEW_TOKENS = 32, 64
# Sums in another order may turn a near tie: from there on a row goes its own way.
_AGREEING = 0.9


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `repeats` (rounds), `clips` (prompts, None for 32).

    Returns:
        `{"name", "ratio", "low", "high", ...}`: tokens a second over transformers' (median, lowest and highest round), the same
        over ours in plain torch (`ratio_torch`), and tokens a second of all.

    Raises:
        RuntimeError: another contestant generates other tokens (then the comparison is worth nothing).
    """
    prompts = _prompts(options.clips or _PROMPTS)
    config = load_config(None, list(OVERRIDES))
    initialize(config)
    try:
        (model,) = build_model(config)
        contestants = {"ours": lambda: _ours(model, prompts)}
        contestants |= {"plain torch ops": by("torch", contestants["ours"]), "transformers": _peer(config, model, prompts)}
        agreeing = _agreement({name: work() for name, work in contestants.items()})
        rounds = [{name: _rate(work, len(prompts)) for name, work in contestants.items()} for _ in range(options.repeats)]
    finally:
        shutdown()
    print(f"{len(prompts)} prompts of 20-120 tokens, {_NEW_TOKENS} new, {torch.get_num_threads()} threads; tokens a second")
    for name in contestants:
        print(f"  {name:15} {_spread([each[name] for each in rounds])}")
    result = {"name": "generate"}
    for suffix, other in (("", "transformers"), ("_torch", "plain torch ops")):
        ratios = [each["ours"] / each[other] for each in rounds]
        print(f"  ours / {other}: {_spread(ratios)}")
        result |= {f"ratio{suffix}": statistics.median(ratios), f"low{suffix}": min(ratios), f"high{suffix}": max(ratios)}
    return result | {
        "tokens_per_second": {name: statistics.median(each[name] for each in rounds) for name in contestants},
        "agreeing": agreeing,
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
    }


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 121, (count,), generator=generator).tolist()
    return [torch.randint(2, 4096, (length,), generator=generator).tolist() for length in lengths]


def _ours(model: AudioLanguageModel, prompts: Sequence[list[int]]) -> list[list[int]]:
    return [each.tokens for each in generate(model, [Prompt(tokens) for tokens in prompts], _NEW_TOKENS)]


def _peer(config: Config, model: AudioLanguageModel, prompts: Sequence[list[int]]) -> Callable[[], list[list[int]]]:
    from transformers import Qwen2ForCausalLM

    peer = Qwen2ForCausalLM(text_config(config)).eval()
    peer.load_state_dict(decoder_weights(model))
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in prompts])
    mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in prompts])

    def work() -> list[list[int]]:
        out = peer.generate(
            ids, attention_mask=mask, max_new_tokens=_NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return out[:, longest:].tolist()

    return work


def _agreement(results: dict[str, list[list[int]]]) -> float:
    """Share of the tokens that are ours, of the contestant that has fewest."""
    ours = torch.tensor(results["ours"])
    shares = {name: float((torch.tensor(tokens) == ours).double().mean()) for name, tokens in results.items()}
    name = min(shares, key=shares.__getitem__)
    if shares[name] < _AGREEING:
        raise RuntimeError(f"{name} generates something else: {shares[name]:.0%} of its tokens are ours")
    return shares[name]


def _rate(work: Callable[[], object], prompts: int) -> float:
    start = time.perf_counter()
    work()
    return prompts * _NEW_TOKENS / (time.perf_counter() - start)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

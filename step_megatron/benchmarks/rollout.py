"""Tokens a second of rollouts from prompts of unequal length, beside transformers with the same weights.

Prompts are text of 20 to 120 tokens, in float32. Three cases:

    greedy      each prompt is continued by 64 tokens
    sampling    the same, from the untruncated distribution at temperature 1
    spread      greedy; replies end at lengths of their own, as a real policy's do, and what goes on beyond an end does not count

Contestants: ours; ours with every op of `step_kernels` in plain torch, which says what the kernels are worth; ours with
`generation.batch_invariant`, which says what equal bits cost (both in the greedy case); transformers' `generate`, padded on the
left, all prompts in one batch, which goes on until the longest reply has ended, so that the longest length over the mean one is
what a static batch loses; and its continuous-batching `generate_batch`, where it runs on a CPU (in the greedy case). Runs
alternate between the contestants, so that what else the machine does hits all of them alike; a ratio is formed within each round.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from step_kernels.bench.contestants import by

from step_megatron.benchmarks.train_step import OVERRIDES
from step_megatron.config import load_config
from step_megatron.config.schema import Config
from step_megatron.conversion import model_configs
from step_megatron.conversion.provenance import History
from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.model import huggingface
from step_megatron.model.audio_lm import AudioLanguageModel, build_model
from step_megatron.runtime.device import initialize, shutdown

_PROMPTS, _NEW_TOKENS, _LONGEST = 32, 64, 160
# Sums in another order may turn a near tie: from there on a row goes its own way.
_AGREEING = 0.9
_OURS, _PEER = "ours", "transformers generate"

Work = Callable[[], list[list[int]]]


def run(options: Namespace) -> dict:
    """Measure, print a table for every case, and return the figures.

    Args:
        options: `repeats` (rounds), `clips` (prompts, None for 32), `preset` (None for tiny).

    Returns:
        `{"name", "preset", "ratio", "low", "high", "limit", "share_of_limit", "cases", ...}`: `ratio` is tokens a second over
        `generate`'s where replies end at lengths of their own (median, lowest and highest round), `limit` what a static batch
        loses there; `cases` holds, of every case, tokens a second of each contestant, and ours over each other.

    Raises:
        RuntimeError: another contestant generates other greedy tokens (then the comparison is worth nothing).
    """
    prompts = _prompts(options.clips or _PROMPTS)
    preset = options.preset or "tiny"
    config = load_config(None, [*OVERRIDES, f"model.preset={preset}"])
    initialize(config)
    try:
        (model,) = build_model(config)
        peer = _Peer(config, model, prompts)
        cases = _cases(config, model, peer, prompts)
        measured = {name: _measure(name, *case, options.repeats) for name, case in cases.items()}
    finally:
        shutdown()
    lengths = _lengths(len(prompts))
    spread = measured["spread"]["ours_over"][_PEER]
    limit = max(lengths) / statistics.mean(lengths)
    print(f"spread: longest reply over mean {limit:.2f}; reached {spread['median'] / limit:.0%} of it")
    return {
        "name": "rollout",
        "preset": preset,
        "ratio": spread["median"],
        "low": spread["low"],
        "high": spread["high"],
        "limit": limit,
        "share_of_limit": spread["median"] / limit,
        "cases": measured,
        "absent": peer.absent,
        "prompts": len(prompts),
        "threads": torch.get_num_threads(),
    }


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 121, (count,), generator=generator).tolist()
    return [torch.randint(2, 4096, (length,), generator=generator).tolist() for length in lengths]


def _lengths(count: int) -> list[int]:
    """Lengths of replies: log-normal, half of them below 40."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return [min(int(length), _LONGEST) for length in (3.7 + 0.8 * normal).exp().clamp(min=4).tolist()]


def _cases(
    config: Config, model: AudioLanguageModel, peer: "_Peer", prompts: Sequence[list[int]]
) -> dict[str, tuple[dict[str, Work], list[int] | None]]:
    """Of every case: its contestants, and the lengths at which replies end (None: as long as they are)."""

    def ours(lengths: list[int], temperature: float = 0.0, **settings) -> Work:
        engine = Engine(model, replace(config.generation, **settings))
        samplings = [Sampling(temperature, seed=i, max_new_tokens=length) for i, length in enumerate(lengths)]
        return lambda: [each.tokens for each in engine.generate([Prompt(tokens) for tokens in prompts], samplings)]

    equal, spread = [_NEW_TOKENS] * len(prompts), _lengths(len(prompts))
    greedy = {
        _OURS: ours(equal),
        "plain torch ops": by("torch", ours(equal)),
        "batch invariant": ours(equal, batch_invariant=True),
        _PEER: peer.generate(_NEW_TOKENS),
        **peer.generate_batch(_NEW_TOKENS),
    }
    sampling = {_OURS: ours(equal, 1.0), _PEER: peer.generate(_NEW_TOKENS, sample=True)}
    return {
        "greedy": (greedy, None),
        "sampling": (sampling, None),
        "spread": ({_OURS: ours(spread), _PEER: peer.generate(max(spread))}, spread),
    }


class _Peer:
    """transformers' decoder with our weights; `absent` says why a contestant does not run."""

    def __init__(self, config: Config, model: AudioLanguageModel, prompts: Sequence[list[int]]):
        from transformers import AutoConfig, AutoModelForCausalLM

        layout = "qwen2" if model.config.add_qkv_bias else "llama"
        tree = model_configs.build(config, layout, History("bench"))
        shape = AutoConfig.for_model(**tree, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        self.model = AutoModelForCausalLM.from_config(shape).eval()
        tied = config.model.tie_embeddings
        weights = huggingface.to_huggingface(huggingface.gather([model.language_model]), model.config, tied=tied)
        missing = self.model.load_state_dict(weights, strict=not tied)
        if set(missing.missing_keys) - {"lm_head.weight"} or missing.unexpected_keys:
            raise RuntimeError(f"the peer does not take our weights: {missing}")
        self.prompts, self.absent = list(prompts), {}

    def generate(self, new: int, sample: bool = False) -> Work:
        """All prompts in one batch, padded on the left."""
        longest = max(map(len, self.prompts))
        ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in self.prompts])
        mask = torch.tensor([[0] * (longest - len(tokens)) + [1] * len(tokens) for tokens in self.prompts])
        settings = {"max_new_tokens": new, "do_sample": sample, "eos_token_id": None, "pad_token_id": 0}
        if sample:
            settings |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return lambda: self.model.generate(ids, attention_mask=mask, **settings)[:, longest:].tolist()

    def generate_batch(self, new: int) -> dict[str, Work]:
        """Continuous batching, if this machine's build of it runs."""
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)

        def work() -> list[list[int]]:
            outputs = self.model.generate_batch(inputs=self.prompts, generation_config=settings, progress_bar=False)
            if len(outputs) != len(self.prompts):
                raise RuntimeError(f"{len(outputs)} of {len(self.prompts)} prompts were answered")
            by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
            return [by_prompt[tuple(tokens)] for tokens in self.prompts]

        name = "transformers generate_batch"
        try:
            work()
        except Exception as error:  # whatever it meets on a machine without a GPU
            self.absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"{name} does not run here: {self.absent[name]}")
            return {}
        return {name: work}


def _measure(case: str, contestants: dict[str, Work], lengths: list[int] | None, repeats: int) -> dict:
    results = {name: work() for name, work in contestants.items()}
    counted = sum(map(len, results[_OURS]))
    agreeing = None if case == "sampling" else _agreement(results, lengths)
    rounds = [{name: counted / _seconds(work) for name, work in contestants.items()} for _ in range(repeats)]
    print(f"{case}: {counted} new tokens, {torch.get_num_threads()} threads; tokens a second, median (lowest-highest)")
    for name in contestants:
        print(f"  {name:27} {_spread([each[name] for each in rounds])}")
    over = {}
    for other in contestants:
        if other != _OURS:
            ratios = [each[_OURS] / each[other] for each in rounds]
            print(f"  ours / {other}: {_spread(ratios)}")
            over[other] = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    rates = {name: statistics.median(each[name] for each in rounds) for name in contestants}
    return {"tokens": counted, "agreeing": agreeing, "tokens_per_second": rates, "ours_over": over}


def _agreement(results: dict[str, list[list[int]]], lengths: list[int] | None = None) -> float:
    """Share of the tokens that are ours, of the contestant that has fewest; what goes on beyond a reply's end does not count."""
    ours = results[_OURS]
    lengths = lengths or [len(reply) for reply in ours]
    if [len(reply) for reply in ours] != lengths:
        raise RuntimeError("our replies do not end where they should")
    shares = {
        name: sum(a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=False))
        / sum(lengths)
        for name, theirs in results.items()
    }
    name = min(shares, key=shares.__getitem__)
    if shares[name] < _AGREEING:
        raise RuntimeError(f"{name} generates something else: {shares[name]:.0%} of its tokens are ours")
    return shares[name]


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"

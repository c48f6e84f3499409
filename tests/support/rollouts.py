"""Ragged prompts with audio, and the slow ways of continuing them that the engine is held against."""

import torch
from support.decoder_twins import ENCODER_WIDTH, VOCABULARY

from step_megatron.generation.request import Prompt, Sampling

# Prompt lengths and, for some, the encoder frames of their audio chunks.
_PROMPTS = [(5, ()), (30, (17, 8)), (9, ()), (12, (6,)), (5, ()), (40, (24,)), (1, ())]
_WORD = (1 << 64) - 1


def make_prompts() -> list[Prompt]:
    generator = torch.Generator().manual_seed(11)
    prompts = []
    for length, frames in _PROMPTS:
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        features = torch.randn(sum(frames), ENCODER_WIDTH, generator=generator) if frames else None
        audio, start = [], 1
        for count in frames:
            audio += range(start, start + (count + 1) // 2)
            start = audio[-1] + 2
        prompts.append(Prompt(tokens, audio, features, frames))
    return prompts


def training_batch(prompts: list[Prompt], continuations: list[list[int]], labels: bool = False):
    """Prompts and what follows them, packed as for training; with labels, every token's is the next one."""
    from step_megatron.model.batch import make_batch

    whole = [[*prompt.tokens, *more] for prompt, more in zip(prompts, continuations, strict=True)]
    tokens = torch.tensor([[token for each in whole for token in each]])
    starts = [sum(map(len, whole[:i])) for i in range(len(whole))]
    places = [start + place for start, prompt in zip(starts, prompts, strict=True) for place in prompt.audio_positions]
    features = [prompt.audio_features for prompt in prompts if prompt.audio_features is not None]
    return make_batch(
        tokens,
        [len(each) for each in whole],
        tokens.roll(-1, 1) if labels else None,
        torch.cat(features) if features else None,
        tuple(frames for prompt in prompts for frames in prompt.encoder_frames),
        torch.tensor(places) if places else None,
    )


def next_logits(model, prompt: Prompt, tokens: list[int]) -> torch.Tensor:
    """Logits of the next token, float64, by the training forward pass over the whole sequence; one process."""
    with torch.no_grad():
        return model(training_batch([prompt], [tokens]))[0, -1].double()


def token_by_token(model, prompt: Prompt, sampling: Sampling) -> tuple[list[int], list[float]]:
    """The sample and its log-probabilities, by one full forward pass a token and arithmetic in float64."""
    tokens, logprobs = [], []
    while len(tokens) < sampling.max_new_tokens and not (tokens and tokens[-1] in sampling.stop_ids):
        policy = (next_logits(model, prompt, tokens) / (sampling.temperature or 1.0)).log_softmax(-1)
        if sampling.temperature == 0:
            token = int(policy.argmax())
        else:
            token = draw(policy.exp(), sampling, splitmix(sampling.seed, len(tokens)))
        tokens.append(token)
        logprobs.append(float(policy[token]))
    return tokens, logprobs


def draw(probabilities: torch.Tensor, sampling: Sampling, number: float) -> int:
    """The token at `number` of what top-k and top-p leave, a loop over the vocabulary."""
    weights = probabilities.tolist()
    order = list(range(len(weights)))
    if sampling.top_k or sampling.top_p < 1:
        order.sort(key=lambda token: (-weights[token], token))
        order = order[: sampling.top_k or len(order)]
        total, nucleus = sum(weights[token] for token in order), []
        while order and sum(weights[token] for token in nucleus) < sampling.top_p * total:
            nucleus.append(order.pop(0))
        order = sorted(nucleus)
    target = number * sum(weights[token] for token in order)
    for token in order:
        target -= weights[token]
        if target < 0:
            return token
    return order[-1]


def splitmix(seed: int, number: int) -> float:
    """Output `number` of SplitMix64 started at `seed`, its upper 24 bits as a fraction; in Python's integers."""
    mixed = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
    return ((mixed ^ (mixed >> 31)) >> 40) / (1 << 24)

"""One sample on its way through the engine: the tokens it has, the pages it holds, what it reads next and when it ends."""

from collections import deque
from dataclasses import dataclass, field

import torch

from step_megatron.generation.request import FinishReason, Generation, Prompt, Sampling


class Group:
    """The samples of one prompt: it is computed once, and they share its pages.

    Attributes:
        prompt: what they share.
        members: all samples.
        waiting: samples that have not started, the next one first.
        started: whether a sample is computing, or has computed, the prompt's pages for the others.
        pages: pages of the prompt that are held for the waiting samples; None before they are computed, and after they were
            given up for want of memory.
        audio: `[audio tokens, width]`, the adaptor's output, kept for as long as somebody may read it again; None without audio.
    """

    def __init__(self, prompt: Prompt, samplings: list[Sampling], results: list[Generation]):
        self.prompt = prompt
        self.members = [Sequence(self, sampling, result) for sampling, result in zip(samplings, results, strict=True)]
        self.waiting = deque(self.members)
        self.started = False
        self.pages: list[int] | None = None
        self.audio: torch.Tensor | None = None


@dataclass(eq=False)
class Sequence:
    """A sample.

    A token is read (its key and value computed) either in a chunk of the prompt or as the one token of a decoding step. The last
    token of a prompt is always read by decoding: there is one place where logits are made.

    Attributes:
        tokens: prompt and sample so far.
        computed: how many of them are in the cache.
        chunked: how many of them are read in chunks; what follows is decoded.
        pages: held pages, in order.
        started: number of its start, in the order of all starts.
        done: whether it has ended.
    """

    group: Group
    sampling: Sampling
    result: Generation
    tokens: list[int] = field(init=False)
    computed: int = 0
    chunked: int = field(init=False)
    pages: list[int] = field(default_factory=list)
    started: int = 0
    done: bool = False
    # Ids that the reasoning budget still has to put here; None before it has acted.
    _closing: deque[int] | None = None
    _reasoning_ended: bool = False

    def __post_init__(self):
        self.tokens = [int(token) for token in self.group.prompt.tokens]
        self.chunked = self.prompt_length - 1
        self._reasoning_ended = self.sampling.budget is None

    @property
    def prompt_length(self) -> int:
        return len(self.group.prompt.tokens)

    @property
    def drawn(self) -> int:
        """Tokens of the sample, which is the number of the next random number."""
        return len(self.tokens) - self.prompt_length

    @property
    def reads_last(self) -> bool:
        """Whether the next decoding step reads the last token, so that its result is new (else it is read again)."""
        return self.computed + 1 == len(self.tokens)

    def forced(self) -> int | None:
        """The token that the reasoning budget puts next, None if the sample is free."""
        if self._reasoning_ended:
            return None
        if self._closing is not None:
            return self._closing[0]
        budget, tokens = self.sampling.budget, self.result.tokens
        if any(len(ending) <= len(tokens) and tuple(tokens[-len(ending) :]) == ending for ending in budget.endings):
            self._reasoning_ended = True
            return None
        if len(tokens) < budget.tokens or not budget.closing:
            return None
        self._closing = deque(budget.closing)
        return self._closing[0]

    def accept(self, token: int, logprob: float) -> FinishReason | None:
        """Add a token; why the sample has ended with it, None if it goes on."""
        result, sampling = self.result, self.sampling
        self.tokens.append(token)
        result.tokens.append(token)
        result.logprobs.append(logprob)
        if self._closing:
            self._closing.popleft()
            self._reasoning_ended = not self._closing
            if not result.forced:
                result.forced_from = len(result.tokens) - 1
            result.forced += 1
        elif token in sampling.stop_ids:
            return "stop"
        return "length" if len(result.tokens) >= sampling.max_new_tokens else None

    def restart(self, chunked: int) -> None:
        """Begin again with an empty cache, of what is known already reading so much in chunks."""
        self.computed, self.chunked = 0, chunked

"""A sample of the policy, and all samples of an iteration as the packed tensors that PPO computes on."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from step_kernels.segments import cumulative

from step_megatron.data.rl_prompts import RLPrompt
from step_megatron.data.template import TokenizedSample
from step_megatron.generation.request import Generation


@dataclass(frozen=True)
class Rollout:
    """One response.

    Attributes:
        id: of the iteration's sample.
        group: number of its prompt in the iteration.
        prompt: what it answers.
        generation: what the engine generated.
        text: the same as text, from inside the thinking on.
        sample: prompt and response, rendered; the targets are the response's tokens that the policy chose itself.
    """

    id: str
    group: int
    prompt: RLPrompt
    generation: Generation
    text: str
    sample: TokenizedSample

    @property
    def log_probs(self) -> list[float]:
        """Of the tokens that the policy chose, by the rollout engine."""
        kept = _chosen(self.generation)
        return [logprob for logprob, keep in zip(self.generation.logprobs, kept, strict=True) if keep]


def with_response(prompt: TokenizedSample, generation: Generation) -> TokenizedSample:
    """Prompt and response as one sample; tokens that the reasoning budget forced are context."""
    ids = np.concatenate([prompt.input_ids, np.asarray(generation.tokens, prompt.input_ids.dtype)])
    mask = np.zeros(len(ids), np.uint8)
    mask[len(prompt.input_ids) :] = _chosen(generation)
    return dataclasses.replace(prompt, input_ids=ids, loss_mask=mask)


def _chosen(generation: Generation) -> np.ndarray:
    """Which tokens the policy chose, bool."""
    chosen = np.ones(len(generation.tokens), bool)
    chosen[generation.forced_from : generation.forced_from + generation.forced] = False
    return chosen


@dataclass
class Experience:
    """The responses of an iteration, packed (`packed.py`), on the host; the same bits on every rank.

    Attributes:
        samples: prompt and response of each.
        group: `[samples]` int64, the number of each one's prompt.
        cu_seqlens: `[samples + 1]` int32 over the tokens that the policy chose.
        rollout: `[tokens]` float32, log-probabilities by the engine.
        old, reference, values: `[tokens]` float32, by the training forward: of the policy before the first update, of the
            reference policy, of the critic; None where nothing asks for them.
        advantages, returns: `[tokens]` float32.
        valid: `[samples]` bool; a sample whose judgment failed is not trained on.
    """

    samples: list[TokenizedSample]
    group: torch.Tensor
    cu_seqlens: torch.Tensor
    rollout: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    values: torch.Tensor | None = None
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "Experience":
        """The responses as they were generated, not scored yet."""
        lengths = [rollout.sample.trained_tokens for rollout in rollouts]
        return cls(
            samples=[rollout.sample for rollout in rollouts],
            group=torch.tensor([rollout.group for rollout in rollouts]),
            cu_seqlens=cumulative(lengths),
            rollout=torch.tensor([logprob for rollout in rollouts for logprob in rollout.log_probs]),
            valid=torch.ones(len(rollouts), dtype=torch.bool),
        )

    @property
    def tokens(self) -> int:
        return len(self.rollout)

    @property
    def mask(self) -> torch.Tensor:
        """`[tokens]` bool: tokens of valid samples."""
        return torch.repeat_interleave(self.valid, self.cu_seqlens.diff(), output_size=self.tokens)

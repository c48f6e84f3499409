"""Between conversations and the engine: prompts rendered as in training, and text out of what was generated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from step_megatron.audio.cache import EncodedClip
from step_megatron.config.schema import TokenizerConfig
from step_megatron.data.schema import Conversation
from step_megatron.data.template import TEMPLATES, THINK_END, THINK_START, TokenizedSample, render
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.data.turns import as_prompt
from step_megatron.generation.request import Generation, Prompt, ReasoningBudget


@dataclass(frozen=True)
class Rendering:
    """How a model's prompts are written and its replies read.

    Attributes:
        tokenizer: the model's.
        settings: template, and what becomes of earlier reasoning.
    """

    tokenizer: Tokenizer
    settings: TokenizerConfig

    def sample(self, conversation: Conversation, clip_tokens: Callable[[str], list[int]]) -> TokenizedSample:
        """What the model reads before its next turn; `clip_tokens`: address -> placeholders of every chunk of the clip."""
        conversation = as_prompt(conversation, self.settings.earlier_reasoning)
        return render(conversation, self.tokenizer, clip_tokens, self.settings.template, generation=True)

    def text(self, generation: Generation) -> str:
        """What was generated, from inside `<think>` on, without the id that ended it.

        Under a template whose prompt does not open `<think>`, a reply that does not think gets `</think>` in front, so that all
        replies read alike.
        """
        ids = generation.tokens[:-1] if generation.finish_reason == "stop" else generation.tokens
        text = self.tokenizer.decode(ids)
        if TEMPLATES[self.settings.template].prompt_thinks:
            return text
        opened = text.lstrip()
        return opened.removeprefix(THINK_START) if opened.startswith(THINK_START) else THINK_END + text

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply."""
        return self.tokenizer.special(TEMPLATES[self.settings.template].close), self.tokenizer.pad_id

    def budget(self, tokens: int) -> ReasoningBudget | None:
        """End a reasoning of so many tokens that has not ended itself; None for 0."""
        if not tokens:
            return None
        template = TEMPLATES[self.settings.template]
        end = self.tokenizer.special(THINK_END)
        closing = (*self.tokenizer.encode("\n"), end, *self.tokenizer.encode(template.after_thinking))
        return ReasoningBudget(tokens, closing, ((end,),))


def prompt_of(sample: TokenizedSample, clips: Mapping[str, EncodedClip]) -> Prompt:
    """The engine's prompt of a rendered one, whose clips are all there."""
    positions = [np.arange(span.start, span.start + span.tokens) for span in sample.audio]
    chunks = [clips[span.address].chunk(span.chunk) for span in sample.audio]
    return Prompt(
        tokens=sample.input_ids,
        audio_positions=np.concatenate([np.empty(0, np.int64), *positions]),
        audio_features=torch.cat(chunks) if chunks else None,
        encoder_frames=tuple(len(chunk) for chunk in chunks),
    )

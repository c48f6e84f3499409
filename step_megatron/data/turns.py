"""Which turns of a conversation are trained, and what is seen of earlier ones: the same in training and in generation.

A round is a human turn (or several in a row: a user may interrupt himself) with all that follows it until the next one: replies,
calls of tools and their results. With `tokenizer.earlier_reasoning`

    keep    the reasoning of all replies stays, and a conversation is one sample;
    strip   a round sees the replies of earlier rounds without their reasoning, as at inference where it is not sent back. What
            a turn was trained on would then not be what later turns see of it, so each trained round is a sample of its own,
            which ends with it.

Inside a round reasoning always stays: a model that called a tool goes on from what it thought. No turn is ever left out.
"""

from dataclasses import replace
from typing import Literal

from step_megatron.data.schema import Conversation, Turn

EarlierReasoning = Literal["keep", "strip"]
TrainTurns = Literal["all", "last"]


def training_samples(
    conversation: Conversation, train_turns: TrainTurns = "all", earlier_reasoning: EarlierReasoning = "keep"
) -> list[Conversation]:
    """What a conversation is trained as, in order; at least one sample, which has no trained turn where there is none.

    Args:
        train_turns: `all` assistant turns, or the `last`; a turn with `"train": false` is never trained, nor counted as last.
    """
    turns = conversation.turns
    if train_turns == "last":
        last = max((i for i, turn in enumerate(turns) if _trained(turn)), default=-1)
        turns = tuple(replace(turn, train=False) if _trained(turn) and i != last else turn for i, turn in enumerate(turns))
    if earlier_reasoning == "strip":
        ends = [end for start, end in _rounds(turns) if any(map(_trained, turns[start:end]))]
        samples = [as_prompt(replace(conversation, turns=turns[:end]), earlier_reasoning) for end in ends]
        return samples or [conversation]
    return [replace(conversation, turns=turns)]


def as_prompt(conversation: Conversation, earlier_reasoning: EarlierReasoning) -> Conversation:
    """A conversation as its last round sees it: replies of earlier rounds are context, without reasoning where it is stripped."""
    if earlier_reasoning == "keep":
        return conversation
    start = _rounds(conversation.turns)[-1][0]
    earlier = (
        replace(turn, reasoning=None, train=False) if turn.role == "assistant" else turn for turn in conversation.turns[:start]
    )
    return replace(conversation, turns=(*earlier, *conversation.turns[start:]))


def _trained(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.train


def _rounds(turns: tuple[Turn, ...]) -> list[tuple[int, int]]:
    """Start and end of every round; what stands before the first human turn belongs to the first."""
    human = [turn.role == "human" for turn in turns]
    starts = [i for i, is_human in enumerate(human) if is_human and not (i and human[i - 1])]
    starts = [0, *starts[1:]]
    return list(zip(starts, [*starts[1:], len(turns)], strict=True))

"""Whether another engine says of its samples what the trainer says of them: the gate before they train a policy.

An engine with weights, kernels or inputs of its own may be wrong in ways that no loss shows: a weight under a wrong name, other
rotary positions, doubled placeholders, log-probabilities of another distribution. All of them show in max |dlogp|.
"""

from collections.abc import Sequence

import torch

from step_megatron.errors import UserError
from step_megatron.generation.layout import generation_mode
from step_megatron.generation.request import Generation, Prompt
from step_megatron.model.audio_lm import AudioLanguageModel
from step_megatron.model.batch import ModelBatch
from step_megatron.model.segments import pack_segments


class ParityError(UserError, RuntimeError):
    """Engine and trainer differ about the same tokens by more than is allowed."""


@torch.no_grad()
def trainer_log_probs(
    model: AudioLanguageModel, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]], temperature: float
) -> list[torch.Tensor]:
    """Log-probabilities of each reply's tokens by the training forward; tensor-parallel ranks call it together.

    Args:
        temperature: of the policy; 0 is 1, as in `Sampling`.

    Returns:
        `[tokens]` float32 on the host for every reply.
    """
    with generation_mode(model):
        scores = model(_batch(model, prompts, replies, temperature or 1.0))
    return list(scores.log_probs.float().cpu().split([len(reply) for reply in replies]))


def check_parity(
    model: AudioLanguageModel, prompts: Sequence[Prompt], generations: Sequence[Generation], temperature: float, limit: float
) -> float:
    """max |dlogp| between an engine's samples and the trainer.

    Raises:
        ParityError: it is above `limit`, or no number; names the worst prompt.
    """
    wanted = trainer_log_probs(model, prompts, [each.tokens for each in generations], temperature)
    differences = [
        float((torch.tensor(each.logprobs) - mine).abs().nan_to_num(nan=torch.inf).max())
        for each, mine in zip(generations, wanted, strict=True)
    ]
    worst = max(range(len(differences)), key=differences.__getitem__)
    if differences[worst] > limit:
        audio = "with" if len(prompts[worst].audio_positions) else "without"
        raise ParityError(
            f"the engine's log-probabilities are up to {differences[worst]:.3g} from the trainer's (prompt {worst} of "
            f"{len(prompts)}, {audio} audio; allowed is {limit:g}): it does not generate what is trained. Set "
            "rl.rollout.backend=own; or, if the engine computes in a lower precision and you take that, raise "
            "rl.rollout.vllm.parity_limit"
        )
    return differences[worst]


def _batch(
    model: AudioLanguageModel, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]], temperature: float
) -> ModelBatch:
    """Prompts and replies packed, of which the replies' tokens are predicted."""
    device = model.rotary.cos.device
    whole = [[*prompt.tokens, *reply] for prompt, reply in zip(prompts, replies, strict=True)]
    starts = torch.tensor([0, *map(len, whole)]).cumsum(0).tolist()
    predicted, audio = [], []
    for start, prompt, reply in zip(starts, prompts, replies, strict=False):
        first = start + len(prompt.tokens) - 1
        predicted += range(first, first + len(reply))
        audio += [start + int(place) for place in prompt.audio_positions]
    features = [prompt.audio_features for prompt in prompts if prompt.audio_features is not None]
    return ModelBatch(
        tokens=torch.tensor([[token for each in whole for token in each]], device=device),
        packed=pack_segments([len(each) for each in whole], device, 1, 0),
        labels=torch.tensor([[token for reply in replies for token in reply]], device=device),
        audio_features=torch.cat(features).to(device) if features else None,
        encoder_frames=tuple(frames for prompt in prompts for frames in prompt.encoder_frames),
        audio_positions=torch.tensor(audio, device=device) if features else None,
        predicted=torch.tensor(predicted, device=device),
        temperature=temperature,
    )

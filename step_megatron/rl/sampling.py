"""The phase of an iteration that generates: prompts -> samples of the policy, each with a seed of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from step_megatron.data.rl_prompts import RLPrompt
from step_megatron.data.schema import Conversation, Text, Turn
from step_megatron.data.template import TokenizedSample
from step_megatron.generation.rendering import prompt_of
from step_megatron.generation.request import Generation, Sampling
from step_megatron.rl.generating import generate
from step_megatron.rl.journal import Journal
from step_megatron.rl.rewarding import pair_of
from step_megatron.rl.rollout import Rollout, with_response
from step_megatron.runtime.seeds import derive
from step_megatron.training.optimizer import settled_parameters

if TYPE_CHECKING:
    from step_megatron.rl.loop import PPO, Clips

_RUBRIC = "The reply will be judged by these criteria:\n"


def sample(ppo: PPO, prompts: Sequence[RLPrompt], clips: Clips) -> list[Rollout]:
    """All samples of all prompts, prompts first; those that a killed run had are not generated again."""
    settings, iteration = ppo.config.rl.rollout, ppo.iteration
    rendered = [ppo.rendering.sample(conversation_of(prompt, settings.shows_rubric), ppo.lengths.tokens) for prompt in prompts]
    names = [[f"{iteration + 1}.{number}.{i}" for i in range(settings.samples)] for number in range(len(prompts))]
    budget, stop_ids = ppo.rendering.budget(settings.reasoning_tokens), ppo.rendering.stop_ids

    def sampling(name: str) -> Sampling:
        # Samplers take 63 bits.
        seed = derive(ppo.config.run.seed, "rollout", name) % 2**63
        cut = {"top_p": settings.top_p, "top_k": settings.top_k}
        return Sampling(
            settings.temperature, **cut, seed=seed, max_new_tokens=settings.max_new_tokens, stop_ids=stop_ids, budget=budget
        )

    def rollout(name: str, generation: Generation) -> Rollout:
        number = int(name.split(".")[1])
        text = ppo.rendering.text(generation)
        return Rollout(name, number, prompts[number], generation, text, with_response(rendered[number], generation))

    def ended(name: str, generation: Generation) -> None:
        pair = pair_of(rollout(name, generation), ppo.rewards)
        if ppo.judging is not None and pair is not None:
            ppo.judging.start(pair)

    if ppo.judging is not None:
        ppo.judging.begin(clips, ppo.folder)
    judging = nullcontext(lambda: None) if ppo.judging is None else ppo.judging.alongside()

    samplings = [[sampling(name) for name in each] for each in names]
    inputs = [prompt_of(each, clips) for each in rendered]
    writes = ppo.runtime.tp_rank == 0
    with (
        settled_parameters(ppo.actor.model),
        Journal(ppo.folder, "rollouts", ppo.group, writes) as journal,
        judging as judge_a_little,
    ):

        def beat() -> None:
            ppo.heartbeat.beat()
            judge_a_little()

        generations = generate(ppo.engine, inputs, samplings, names, journal, beat, ended)
    return [
        rollout(name, generation)
        for each, made in zip(names, generations, strict=True)
        for name, generation in zip(each, made, strict=True)
    ]


def conversation_of(prompt: RLPrompt, shows_rubric: bool) -> Conversation:
    """What the policy reads: the history, and the criteria before it where it is to see them (`rl.rollout.shows_rubric`)."""
    conversation = prompt.conversation
    if not (shows_rubric and prompt.rubric):
        return conversation
    criteria = Turn("system", (Text(_RUBRIC + "\n".join(f"- {criterion}" for criterion in prompt.rubric)),))
    return Conversation(conversation.id, conversation.source, (criteria, *conversation.turns))


def too_long(sample: TokenizedSample, budget: int, new_tokens: int) -> str:
    """Why a rendered prompt cannot be used, "" where it can."""
    whole = len(sample.input_ids) + new_tokens
    if whole <= budget:
        return ""
    return (
        f"{len(sample.input_ids)} tokens and up to {new_tokens} new ones (rl.rollout.max_new_tokens) are more than {budget} "
        "(data.tokens_per_micro_batch, or model.max_positions)"
    )

"""Which turns are trained and what they see of earlier ones: token by token, in both templates; nothing is dropped."""

import pytest
from data.test_template import CHUNKS, conversations, say, shown, special, spell, talk, templates
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.data.schema import Audio, Text, Turn
from step_megatron.data.template import render
from step_megatron.data.turns import as_prompt, training_samples

# A question with a tool's help, and a second question about another clip.
WITH_TOOL = talk(
    say("tool_json_schemas", "{}"),
    Turn("human", (Audio("a.wav"), Text("Q"))),
    say("assistant", "c", reasoning="r"),
    say("function_output", "F"),
    say("assistant", "A", reasoning="s"),
    Turn("human", (Text("P"), Audio("a.wav"))),
    say("assistant", "B", reasoning="t"),
)
CLIP = [*special("<audio_start>", 0), *[("<audio_patch>", 0)] * 3, *special("<audio_end>", 0)]


def step_audio_reply(reasoning: str, text: str, mask: int) -> list[tuple[str, int]]:
    head = [*special("<|BOT|>", 0), *spell("assistant\n", 0), *special("<think>", 0), *spell("\n", 0)]
    thought = [*spell(f"{reasoning}\n", mask), *special("</think>", mask)]
    return [*head, *thought, *spell(f"\n{text}", mask), *special("<|EOT|>", mask)]


def step_audio_turn(role: str, *content: tuple[str, int]) -> list[tuple[str, int]]:
    return [*special("<|BOT|>", 0), *spell(f"{role}\n", 0), *content, *special("<|EOT|>", 0)]


def chatml_reply(reasoning: str, text: str, mask: int) -> list[tuple[str, int]]:
    thought = [*special("<think>", mask), *spell(f"\n{reasoning}\n", mask), *special("</think>", mask), ("\n\n", mask)]
    head = [*special("<|im_start|>", 0), *spell("assistant\n", 0)]
    return [*head, *(thought if reasoning else []), *spell(text, mask), *special("<|im_end|>", mask), *spell("\n", 0)]


def chatml_turn(role: str, *content: tuple[str, int]) -> list[tuple[str, int]]:
    return [*special("<|im_start|>", 0), *spell(f"{role}\n", 0), *content, *special("<|im_end|>", 0), *spell("\n", 0)]


FORMS = {
    "step-audio": (step_audio_turn, step_audio_reply, "human", "function_output"),
    "chatml": (chatml_turn, chatml_reply, "user", "tool"),
}


@pytest.mark.parametrize("template", sorted(FORMS))
def test_stripped_reasoning_token_by_token_and_a_tools_turns_stay(full, template):
    turn, reply, human, tool = FORMS[template]
    start = [*turn("tool_json_schemas", *spell("{}", 0)), *turn(human, *CLIP, *spell("Q", 0))]
    result, second = turn(tool, *spell("F", 0)), turn(human, *spell("P", 0), *CLIP)
    first_round = [*start, *reply("r", "c", 1), *result, *reply("s", "A", 1)]
    both_rounds = [*start, *reply("", "c", 0), *result, *reply("", "A", 0), *second, *reply("t", "B", 1)]

    samples = training_samples(WITH_TOOL, "all", "strip")
    assert [shown(render(sample, full, CHUNKS.__getitem__, template), full) for sample in samples] == [first_round, both_rounds]
    kept = [*first_round, *second, *reply("t", "B", 1)]
    assert [shown(render(s, full, CHUNKS.__getitem__, template), full) for s in training_samples(WITH_TOOL)] == [kept]


@given(conversations, templates, st.sampled_from(["all", "last"]), st.sampled_from(["keep", "strip"]))
def test_generation_is_given_what_training_saw(full, conversation, template, train_turns, reasoning):
    """The prompt of every trained sample's last reply is a prefix of the sample."""
    for sample in training_samples(conversation, train_turns, reasoning):
        trained = [i for i, turn in enumerate(sample.turns) if turn.role == "assistant" and turn.train]
        if not trained:
            continue
        history = talk(*conversation.turns[: trained[-1] + 1])
        prompt = render(as_prompt(history, reasoning), full, CHUNKS.__getitem__, template, generation=True)
        whole = render(sample, full, CHUNKS.__getitem__, template)
        assert prompt.input_ids.tolist() == whole.input_ids[: len(prompt.input_ids)].tolist()


@given(conversations, st.sampled_from(["all", "last"]))
def test_every_turn_is_trained_once_and_none_is_lost(conversation, train_turns):
    wanted = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant" and turn.train]
    wanted = wanted if train_turns == "all" else wanted[-1:]
    for reasoning in ("keep", "strip"):
        samples = training_samples(conversation, train_turns, reasoning)
        trained = [i for s in samples for i, turn in enumerate(s.turns) if turn.role == "assistant" and turn.train]
        assert trained == wanted
        for sample in samples:
            both = list(zip(sample.turns, conversation.turns, strict=False))
            assert all((a.role, a.content) == (b.role, b.content) for a, b in both), "text, audio and results of tools stay"
            assert all(a.reasoning == b.reasoning for a, b in both if reasoning == "keep" or a.train and a.role == "assistant")
        assert len(samples[-1].turns) == len(conversation.turns) or reasoning == "strip"

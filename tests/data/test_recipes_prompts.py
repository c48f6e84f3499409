"""Prompts of PPO: single questions about the clips of their split, with a reference, an answer among choices, and a check."""

import random
from collections import Counter

import pytest
from data.test_recipes_preferences import conversations

from step_megatron.audio.address import parse_address
from step_megatron.data.checks import read_check
from step_megatron.data.dialogues.phrases import sentence
from step_megatron.data.recipes.preferences import CRITERIA
from step_megatron.data.recipes.prompts import build_prompts, prompts
from step_megatron.data.rl_prompts import read_rl_prompts
from step_megatron.data.schema import write_conversations
from step_megatron.rl.verifiable import CHECKS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open-speech")
    for split in ("train", "test"):
        write_conversations(folder / f"{split}.jsonl", conversations(split))
    counts = build_prompts(folder, seed=1, counts={"train": 100, "test": 20})
    found = {split: read_rl_prompts(folder / f"prompts/{split}.jsonl") for split in counts}
    assert counts == {split: len(records) for split, records in found.items()} == {"train": 100, "test": 20}
    return folder, found


def test_the_right_sentence_is_what_every_measure_asks_for(built):
    for prompt in built[1]["train"]:
        check, (turn,) = read_check(prompt.meta["checks"][-1]), prompt.history
        assert turn.role == "human" and turn.text
        right = sentence(prompt.meta["task"], prompt.answer)
        assert check.passes(right) and not check.kept_form(prompt.answer) and prompt.reference == prompt.answer
        for other in prompt.choices:
            named = CHECKS[prompt.check](sentence(prompt.meta["task"], other), prompt.answer, prompt.choices)
            assert named == check.content(sentence(prompt.meta["task"], other)) == (other == prompt.answer)


def test_plain_and_rubric_prompts_are_mixed_and_no_clip_is_in_two_splits(built):
    folder, found = built
    rubrics = Counter(prompt.rubric for prompt in found["train"])
    assert set(rubrics) == {(), (CRITERIA["right"],), (CRITERIA["right"], CRITERIA["sentence"])} and rubrics[()] > 30
    clips = {split: {p.conversation.audio_addresses()[0] for p in records} for split, records in found.items()}
    assert not clips["train"] & clips["test"]
    assert all(parse_address(clip, folder / "prompts").path.startswith(str(folder / "audio")) for clip in clips["test"])


def test_there_are_as_many_as_there_are_questions():
    asked = conversations("test")
    made = list(prompts(asked, 10_000, random.Random(1)))
    assert len(made) == len(asked) and {p.meta["task"] for p in made} == {"language"}

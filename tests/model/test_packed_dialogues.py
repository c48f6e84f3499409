"""A dialogue with clips in several turns has the same logits packed among others as alone: nothing crosses over."""

import pytest
import torch
from support.decoder_twins import ENCODER_WIDTH, huggingface_twin, model_of_twin, small_config

from step_megatron.audio.cache import EncodedClip
from step_megatron.audio.geometry import chunk_frames
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import MicroBatch, Padding, assemble
from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.data.template import render
from step_megatron.training.batch import to_device

CLIPS = {name: [chunk_frames(samples)] for name, samples in {"a.wav": 6000, "b.wav": 9000, "c.wav": 3300}.items()}
GROUP = LossGroup("dialogues")


class Letters:
    """A tokenizer of letters."""

    pad_id = 0

    def encode(self, text: str) -> list[int]:
        return [20 + ord(letter) % 100 for letter in text]

    def special(self, name: str) -> int:
        return 1 + ["<|BOT|>", "<|EOT|>", "<think>", "</think>", "<audio_start>", "<audio_patch>", "<audio_end>"].index(name)


def dialogue(name: str, *clips: str) -> Conversation:
    turns = [
        turn
        for number, clip in enumerate(clips)
        for turn in (
            Turn("human", (Audio(clip), Text(f"{name} {number}"))),
            Turn("assistant", (Text(clip[0]),), reasoning=f"{number}"),
        )
    ]
    return Conversation(name, "s", (*turns, Turn("human", (Text("And?"),)), Turn("assistant", (Text("yes"),))))


def pack(*dialogues: Conversation) -> MicroBatch:
    samples = [render(each, Letters(), lambda clip: [frames.tokens for frames in CLIPS[clip]]) for each in dialogues]
    return assemble(samples, [GROUP] * len(samples), CLIPS.__getitem__, Padding(), Letters.pad_id)


@pytest.fixture
def logits(runtime):
    model = model_of_twin(config := small_config(), huggingface_twin(config)).eval()
    generator = torch.Generator().manual_seed(0)
    clips = {
        name: EncodedClip(torch.randn(chunk.encoder, ENCODER_WIDTH, generator=generator).bfloat16(), (chunk.encoder,))
        for name, (chunk,) in CLIPS.items()
    }

    def of(*dialogues: Conversation) -> tuple[torch.Tensor, ...]:
        """Logits `[n, vocabulary]` of every position of each dialogue, packed together."""
        batch = to_device(pack(*dialogues), clips, [GROUP], ENCODER_WIDTH, runtime).model
        batch.labels = batch.predicted = None
        with torch.no_grad():
            return model(batch)[0].split(pack(*dialogues).segment_lengths)

    return of


def test_packed_logits_equal_those_of_the_dialogue_alone(logits):
    dialogues = [dialogue("first", "a.wav", "b.wav"), dialogue("second", "c.wav", "a.wav", "b.wav"), dialogue("third", "b.wav")]
    packed = logits(*dialogues)
    for each, together in zip(dialogues, packed, strict=True):
        (alone,) = logits(each)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    (other,) = logits(dialogue("second", "c.wav", "b.wav", "b.wav"))
    same = min(len(other), len(packed[1]))
    assert (other[:same] - packed[1][:same]).abs().max() > 1e-2, "clips change nothing, so this test proves nothing"


def test_neighbours_change_not_one_bit(logits):
    own = dialogue("own", "a.wav", "c.wav")
    before = logits(dialogue("next", "b.wav"), own, dialogue("last", "a.wav"))[1]
    after = logits(dialogue("NEXT", "b.wav"), own, dialogue("LAST", "c.wav", "c.wav"))[1]
    assert torch.equal(before, after)

"""The packed row: segments contiguous, labels one ahead within a segment, masks exact, padding counted and never trained."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step_megatron.audio.geometry import chunk_frames
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import Padding, assemble, drop_failed
from step_megatron.data.template import AudioSpan, TokenizedSample

PAD, PATCH = 0, 9
# Clips by name: samples of each chunk, and so the placeholders.
CLIPS = {"a": [chunk_frames(n) for n in (16_000,)], "b": [chunk_frames(n) for n in (400_000, 5_000)]}


@st.composite
def samples(draw, name="x"):
    """A sample of random ids and mask, with clips somewhere in it."""
    ids: list[int] = [1]
    spans = []
    for clip in draw(st.lists(st.sampled_from(sorted(CLIPS)), max_size=2)):
        for chunk, frames in enumerate(CLIPS[clip]):
            ids += draw(st.lists(st.integers(10, 99), max_size=3))
            spans.append(AudioSpan(clip, chunk, len(ids), frames.tokens))
            ids += [PATCH] * frames.tokens
    ids += draw(st.lists(st.integers(10, 99), min_size=1, max_size=12))
    mask = [0] + draw(st.lists(st.integers(0, 1), min_size=len(ids) - 1, max_size=len(ids) - 1))
    return TokenizedSample(name, "s", np.array(ids, np.int32), np.array(mask, np.uint8), tuple(spans))


paddings = st.sampled_from([Padding(), Padding(4, 4), Padding(1, 8), Padding(8, 16)])
packs = st.lists(samples(), min_size=1, max_size=4)


def pack(made, padding=Padding()):  # noqa: B008 - frozen
    return assemble(made, [LossGroup(f"source-{i}") for i in range(len(made))], CLIPS.__getitem__, padding, PAD)


@given(packs, paddings)
def test_segments_are_the_samples_in_order(made, padding):
    batch = pack(made, padding)
    edges = batch.cu_seqlens.tolist()
    total = batch.tokens.shape[1]
    assert edges[0] == 0 and edges[-1] == total and tuple(np.diff(edges)) == batch.segment_lengths
    assert all(length % padding.segment_multiple == 0 for length in batch.segment_lengths)
    assert total % padding.row_multiple == 0
    for sample, start, end in zip(made, edges[:-1], edges[1:], strict=True):
        row = batch.tokens[0, start:end].tolist()
        assert row == sample.input_ids.tolist() + [PAD] * (end - start - len(sample.input_ids))
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
    assert batch.padding == total - sum(len(sample.input_ids) for sample in made)
    assert batch.groups == tuple(LossGroup(f"source-{i}") for i in range(len(made)))


@given(packs, paddings)
def test_padding_is_the_least_that_the_shapes_allow(made, padding):
    batch = pack(made, padding)
    lengths = [len(sample.input_ids) for sample in made]
    for length, filled in zip(lengths[:-1], batch.segment_lengths[:-1], strict=True):
        assert filled - length < padding.segment_multiple
    assert batch.segment_lengths[-1] - lengths[-1] < padding.segment_multiple + padding.row_multiple


@given(packs, paddings)
def test_labels_and_mask_against_a_loop_over_predictions(made, padding):
    """Written the other way round: for each target of each sample, the one position that predicts it."""
    batch = pack(made, padding)
    expected: dict[int, int] = {}
    for sample, start in zip(made, batch.cu_seqlens.tolist(), strict=False):
        for position, (number, target) in enumerate(zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)):
            if target:
                expected[start + position - 1] = number
    trained = {t: batch.labels[0, t].item() for t in range(batch.tokens.shape[1]) if batch.loss_mask[0, t]}
    assert trained == expected
    assert set(batch.loss_mask.unique().tolist()) <= {0.0, 1.0}


@given(packs, paddings)
def test_no_segment_predicts_its_neighbour(made, padding):
    batch = pack(made, padding)
    assert (batch.loss_mask[0, batch.cu_seqlens[1:].long() - 1] == 0).all()


@given(packs, paddings)
def test_audio_positions_are_the_placeholders_in_order(made, padding):
    batch = pack(made, padding)
    assert batch.audio_positions.tolist() == (batch.tokens[0] == PATCH).nonzero().flatten().tolist()
    assert batch.audio_positions.dtype == torch.int64
    where = [t for span in batch.audio for t in range(span.start, span.start + span.tokens)]
    assert where == batch.audio_positions.tolist()
    frames = [CLIPS[span.address][span.chunk] for span in batch.audio]
    assert batch.encoder_frames == tuple(f.encoder for f in frames)
    assert [span.tokens for span in batch.audio] == [f.tokens for f in frames]


def test_types_and_a_row_by_hand():
    one = TokenizedSample("one", "s", np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.uint8), ())
    two = TokenizedSample("two", "s", np.array([8, 9], np.int32), np.array([0, 1], np.uint8), ())
    batch = assemble([one, two], [LossGroup("m"), LossGroup("n", "naturalness")], CLIPS.__getitem__, Padding(4, 4), PAD)
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 8, 9, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 1, 0, 0, 1, 0, 0, 0]]
    assert (batch.labels[0, 1], batch.labels[0, 4]) == (7, 9)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 4, 8] and batch.segment_lengths == (4, 4) and batch.padding == 3
    assert batch.sample_ids == ("one", "two") and batch.groups == (LossGroup("m"), LossGroup("n", "naturalness"))
    assert batch.audio == () == batch.encoder_frames
    types = [batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.cu_seqlens]
    assert [part.dtype for part in types] == [torch.int64, torch.int64, torch.float32, torch.int64, torch.int32]


@given(packs, st.sets(st.sampled_from(["a", "b", "unknown"])))
def test_failed_clip_takes_its_whole_segments_out_of_the_loss(made, failed):
    batch = pack(made, Padding(4, 4))
    dropped = drop_failed(batch, failed)
    for sample, start, end in zip(made, batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        bad = any(span.address in failed for span in sample.audio)
        before, after = batch.loss_mask[0, start:end], dropped.loss_mask[0, start:end]
        assert torch.equal(after, torch.zeros_like(after) if bad else before)
    for name, value in vars(batch).items():
        other = getattr(dropped, name)
        if name != "loss_mask":
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_dropping_does_not_change_the_batch_it_was_given():
    ids = np.array([1, *[PATCH] * CLIPS["a"][0].tokens, 5], np.int32)
    sample = TokenizedSample("x", "s", ids, np.eye(len(ids), dtype=np.uint8)[-1], (AudioSpan("a", 0, 1, CLIPS["a"][0].tokens),))
    batch = pack([sample])
    assert drop_failed(batch, {"a"}).loss_mask.sum() == 0 and batch.loss_mask.sum() == 1
    assert drop_failed(batch, {"b"}) is batch


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (dict(tp=1, cp=1, sequence_parallel=False), Padding(1, 1)),
        (dict(tp=4, cp=1, sequence_parallel=False), Padding(1, 1)),
        (dict(tp=4, cp=1, sequence_parallel=True), Padding(1, 4)),
        (dict(tp=1, cp=2, sequence_parallel=False), Padding(4, 4)),
        (dict(tp=2, cp=2, sequence_parallel=True), Padding(4, 8)),
    ],
)
def test_padding_of_a_layout(layout, expected):
    padding = Padding.for_layout(**layout, budget=1001)
    assert padding == expected
    # What the shapes are for: 2 x cp pieces of a segment, cp x tp pieces of a row.
    assert padding.segment_multiple % (2 * layout["cp"] if layout["cp"] > 1 else 1) == 0
    assert padding.row_multiple % (layout["cp"] * (layout["tp"] if layout["sequence_parallel"] else 1)) == 0


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
    with pytest.raises(ValueError, match="tokens_per_micro_batch is 7; this parallel layout needs at least 8"):
        Padding.for_layout(tp=2, cp=2, sequence_parallel=True, budget=7)

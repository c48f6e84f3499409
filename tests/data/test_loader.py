"""The loader: every sample once an epoch, one plan for all ranks, exact resume, bad samples left out by name."""

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from step_megatron.config.schema import SourceConfig
from step_megatron.data.loader import DataError, MixtureLoader
from step_megatron.data.schema import Audio, Conversation, SchemaError, Text, Turn, write_conversations
from step_megatron.data.template import render


@pytest.fixture
def make(config, compact, data_set):
    """A loader of the data set; `make(dp_rank, dp_size)`, or with another config or index."""

    def make(dp_rank=0, dp_size=1, config=config, index=data_set.index, **how):
        return MixtureLoader(config, compact, index, dp_rank, dp_size, **how)

    return make


def same(one, two) -> bool:
    """Whether two micro-batches are equal to the bit."""
    return all(
        torch.equal(value, getattr(two, name)) if isinstance(value, torch.Tensor) else value == getattr(two, name)
        for name, value in vars(one).items()
    )


def ids(steps) -> list[str]:
    return [name for step in steps for batch in step for name in batch.sample_ids]


def test_every_sample_once_an_epoch(make, config, data_set):
    """One source: after any number of steps no sample has been given twice more often than another, waiting ones apart."""
    config.data.sources = config.data.sources[:1]
    loader = make()
    given = Counter()
    for _ in range(40):
        given.update(ids([loader.next_step()]))
    state = loader.state_dict()
    rest = [place for step in state["steps"] for items in step for place in items] + state["waiting"]
    given.update(loader.sources.conversation(source, index).id for source, index, _ in rest)
    epoch, position = state["mixture"]["epochs"][0], state["mixture"]["positions"][0]
    assert epoch >= 2
    assert set(given) == {conversation.id for conversation in data_set.spoken}
    assert Counter(given.values()) == Counter({epoch + 1: position, epoch: 60 - position}) - Counter({epoch + 1: 0})


def test_batches_hold_the_rendered_samples(make, config, data_set, compact):
    loader = make()
    by_id = {conversation.id: conversation for conversation in data_set.spoken + data_set.written}
    for _ in range(5):
        step = loader.next_step()
        assert len(step) == config.training.micro_batches_per_step
        for batch in step:
            assert batch.tokens.shape[1] <= config.data.tokens_per_micro_batch
            assert batch.loss_mask.sum() >= 1
            starts = batch.cu_seqlens.tolist()
            for name, group, start, end in zip(batch.sample_ids, batch.groups, starts[:-1], starts[1:], strict=True):
                sample = render(by_id[name], compact, loader.clips.tokens)
                assert batch.tokens[0, start:end].tolist() == sample.input_ids.tolist()
                assert batch.loss_mask[0, start:end].sum() == sample.trained_tokens
                assert group.source == ("speech" if name.startswith("clip") else "reasoning")


def test_shares_of_trained_tokens(make):
    loader = make()
    trained = Counter()
    for _ in range(30):
        for batch in loader.next_step():
            for group, start, end in zip(batch.groups, batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
                trained[group.source] += batch.loss_mask[0, start:end].sum().item()
    assert trained["speech"] / sum(trained.values()) == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_out_one_plan(make, dp_size):
    """Any number of ranks trains the same samples in the same step, cut into the same micro-batches."""
    whole, ranks = make(), [make(rank, dp_size) for rank in range(dp_size)]
    for _ in range(4):
        step = whole.next_step()
        shares = [rank.next_step() for rank in ranks]
        assert {len(share) for share in shares} == {len(step) // dp_size}
        assert sorted(batch.sample_ids for share in shares for batch in share) == sorted(batch.sample_ids for batch in step)
        assert all(rank.state_dict() == whole.state_dict() for rank in ranks)


def test_same_seed_same_batches_other_seed_others(make, config):
    steps = [make().next_step() for _ in range(2)]
    assert all(same(one, two) for one, two in zip(*steps, strict=True))
    config.run.seed += 1
    assert ids([make().next_step()]) != ids([steps[0]])


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 11])
def test_resume_is_exact(make, steps):
    loader = make()
    for _ in range(steps):
        loader.next_step()
    other = make()
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for _ in range(8):
        for one, two in zip(loader.next_step(), other.next_step(), strict=True):
            assert same(one, two)
    assert loader.state_dict() == other.state_dict()


def test_resume_on_more_ranks_goes_on_with_the_same_steps(make):
    loader = make()
    loader.next_step()
    ranks = [make(rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(loader.state_dict())
    for _ in range(4):
        assert sorted(ids([loader.next_step()])) == sorted(ids([rank.next_step() for rank in ranks]))


def test_resume_with_other_sizes_loses_and_doubles_nothing(make, config):
    """Planned steps are packed anew; everything drawn is either given or still held."""
    loader = make()
    before = ids([loader.next_step(), loader.next_step()])
    changed = copy.deepcopy(config)
    changed.data.tokens_per_micro_batch, changed.training.micro_batches_per_step = 2048, 2
    changed.megatron.transformer = {"context_parallel_size": 2}
    other = make(config=changed)
    other.load_state_dict(loader.state_dict())
    after = ids([other.next_step() for _ in range(3)])
    state = other.state_dict()
    rest = [place for step in state["steps"] for items in step for place in items] + state["waiting"]
    held = [other.sources.conversation(source, index).id for source, index, _ in rest]
    drawn = Counter(before + after + held)
    for name, tokens in zip(other.source_names, state["mixture"]["epochs"], strict=True):
        sizes = {"speech": 60, "reasoning": 40}[name]
        position = state["mixture"]["positions"][other.source_names.index(name)]
        mine = {key: count for key, count in drawn.items() if key.startswith("clip" if name == "speech" else "text")}
        assert sum(mine.values()) == tokens * sizes + position
        assert set(mine.values()) <= {tokens, tokens + 1}


def test_position_of_other_data_is_refused(make, config, data_set):
    state = make().state_dict()
    config.run.seed += 1
    with pytest.raises(DataError, match="restore data.sources and run.seed"):
        make().load_state_dict(state)
    config.run.seed -= 1
    config.data.sources[0].name = "renamed"
    with pytest.raises(DataError, match="renamed"):
        make().load_state_dict(state)


def test_other_samples_under_the_same_names_and_sizes_are_refused_by_their_cause(make, config, data_set, full, tmp_path):
    config.data.quarantine_limit = 0.1
    index = {address: clip for address, clip in data_set.index.items() if address != "audio/3.wav"}
    state = json.loads(json.dumps(make(index=index).state_dict()))
    make(index=index).load_state_dict(state)

    def refused(message, **options):
        with pytest.raises(DataError, match=f"the saved position is of other data: {message}.*start a new run from the weights"):
            make(**options).load_state_dict(state)

    other = {address: clip for address, clip in data_set.index.items() if address != "audio/4.wav"}
    refused("other samples of source 'speech' are usable, though its file is the same .was the audio index made", index=other)
    with pytest.raises(DataError, match="the vocabulary at tokenizer.path has changed"):
        MixtureLoader(config, full, index).load_state_dict(state)
    changed = copy.deepcopy(config)
    changed.tokenizer.template, changed.adaptor.kind = "chatml", "linear"
    refused("tokenizer.template was step-audio, is chatml; adaptor.kind was step, is linear", index=index, config=changed)
    changed = copy.deepcopy(config)
    changed.data.sources[1].path = str(tmp_path / "text.jsonl")
    lines = (data_set.folder / "text.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "text.jsonl").write_text("".join(lines))
    make(index=index, config=changed).load_state_dict(state)
    (tmp_path / "text.jsonl").write_text("".join(lines[::-1]))
    refused("the file of source 'reasoning' has changed", index=index, config=changed)


def test_layout_pads_segments_and_rows(make, config):
    config.megatron.transformer = {
        "context_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "virtual_pipeline_model_parallel_size": 2,
    }
    config.data.tokens_per_micro_batch = 1029
    for batch in make().next_step():
        # Pieces of two context-parallel ranks, cut again by two tensor-parallel ones; no more padding than that.
        assert batch.tokens.shape[1] % 8 == 0 and batch.tokens.shape[1] <= 1024
        assert all(length % 4 == 0 for length in batch.segment_lengths)


def test_quarantined_clips_are_left_out_and_counted(make, config, data_set):
    config.data.quarantine_limit = 0.05
    index = {address: clip for address, clip in data_set.index.items() if address not in ("audio/3.wav", "audio/8.wav")}
    index["audio/9.wav"] = SimpleNamespace(num_samples=320)
    loader = make(index=index)
    assert loader.sources.left_out == {(0, row): "clip not in the audio index" for row in (3, 8, 9)}
    assert loader.sources.clips == 57
    names = ids([loader.next_step() for _ in range(12)])
    assert not set(names) & {"clip-3", "clip-8", "clip-9"} and "clip-4" in names
    config.data.quarantine_limit = 0.049
    with pytest.raises(DataError, match=r"3 of 60 clips are not in the audio index, such as audio/3.wav; .* allows 4.9%"):
        make(index=index)


def test_no_sample_is_longer_than_the_models_positions(make, config, tmp_path):
    turns = [(Turn("human", (Text("Q"),)), Turn("assistant", (Text("a" * words),))) for words in (50, 400)]
    write_conversations(tmp_path / "a.jsonl", [Conversation(str(i), "s", each) for i, each in enumerate(turns)])
    config.data.sources = [SourceConfig("s", str(tmp_path / "a.jsonl"))]
    config.data.quarantine_limit, config.model.max_positions = 0.5, 300
    loader = make(index=None)
    assert set(ids([loader.next_step() for _ in range(3)])) == {"0"}
    assert loader.sources.left_out == {(0, 1): "longer than the model's positions"}


def test_too_long_and_untrained_samples_are_left_out_by_name(make, config, tmp_path, caplog):
    def sample(name: str, words: int, train: bool = True) -> Conversation:
        return Conversation(name, "s", (Turn("human", (Text("Q"),)), Turn("assistant", (Text("a" * words),), train=train)))

    write_conversations(tmp_path / "a.jsonl", [sample("good", 50), sample("long", 2000), sample("idle", 5, train=False)])
    config.data.sources = [SourceConfig("s", str(tmp_path / "a.jsonl"))]
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    config.data.quarantine_limit = 0.7
    for _ in ("first start", "second start"):
        loader = make(index=None, quarantine=quarantine)
        caplog.clear()
        assert set(ids([loader.next_step() for _ in range(3)])) == {"good"}
        assert loader.sources.left_out == {(0, 1): "longer than a micro-batch", (0, 2): "no trained token"}
        assert len([record for record in caplog.records if "sample long of source s is left out" in record.message]) == 1
    entries = {entry["id"]: entry for entry in map(json.loads, quarantine.read_text().splitlines())}
    assert len(quarantine.read_text().splitlines()) == 2 and set(entries) == {"long", "idle"}
    assert entries["long"]["source"] == "s" and entries["long"]["reason"].endswith("2026 tokens, budget 1024")
    assert entries["long"]["remedy"].startswith("raise data.tokens_per_micro_batch")
    config.data.quarantine_limit = 0.66
    with pytest.raises(
        DataError, match=r"2 of the 3 samples of source 's' cannot be trained on, more than data.quarantine_limit"
    ):
        make(index=None).next_step()
    config.data.quarantine_limit = 1.0
    write_conversations(tmp_path / "a.jsonl", [sample("long", 2000)])
    with pytest.raises(DataError, match="no sample of 's' has a trained token and at most 1024 tokens"):
        make(index=None).next_step()


def test_what_is_left_out_is_part_of_the_position(make, config, tmp_path):
    """So that a resumed run counts as the uninterrupted one does; with another budget it is found anew."""
    made = [
        Conversation(f"{i}", "s", (Turn("human", (Text("Q"),)), Turn("assistant", (Text("a" * 90 * i),)))) for i in range(1, 17)
    ]
    write_conversations(tmp_path / "a.jsonl", made)
    config.data.sources = [SourceConfig("s", str(tmp_path / "a.jsonl"))]
    config.data.quarantine_limit = 0.5
    loader = make(index=None)
    loader.next_step()
    assert set(loader.sources.left_out) == {(0, row) for row in (11, 12, 13, 14, 15)}
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(index=None)
    resumed.load_state_dict(state)
    assert resumed.sources.left_out == loader.sources.left_out
    config.data.tokens_per_micro_batch = 2048
    roomier = make(index=None)
    roomier.load_state_dict(state)
    roomier.next_step()
    assert roomier.sources.left_out == {}


def test_only_good_sample_of_a_source_is_found_across_epochs(make, config, tmp_path):
    """It may be first in one epoch and last in the next."""
    made = [Conversation(f"{i}", "s", (Turn("human", (Text("Q"),)),)) for i in range(12)]
    made.append(Conversation("good", "s", (Turn("human", (Text("Q"),)), Turn("assistant", (Text("A"),)))))
    write_conversations(tmp_path / "a.jsonl", made)
    config.data.sources = [SourceConfig("s", str(tmp_path / "a.jsonl"))]
    config.data.quarantine_limit = 1.0
    assert set(ids([make(index=None).next_step()])) == {"good"}


def test_addresses_of_another_folder_become_absolute(make, config, data_set, tmp_path):
    """Sources may lie elsewhere than the index; the index is asked for the place that the file means."""
    conversation = Conversation(
        "far",
        "s",
        (Turn("human", (Audio("x.tar::a/b.wav"), Audio(str(data_set.folder / "y.wav")))), Turn("assistant", (Text("A"),))),
    )
    write_conversations(tmp_path / "far.jsonl", [conversation])
    config.data.sources = [SourceConfig("far", str(tmp_path / "far.jsonl"))]
    index = {
        f"{tmp_path}/x.tar::a/b.wav": SimpleNamespace(num_samples=8000),
        str(data_set.folder / "y.wav"): SimpleNamespace(num_samples=8000),
    }
    batch = make(index=index).next_step()[0]
    assert {span.address for span in batch.audio} == set(index)


def test_bad_setups_are_refused(make, config, data_set):
    with pytest.raises(DataError, match="micro_batches_per_step is 4; make it a multiple of 3 data-parallel ranks"):
        make(0, 3)
    config.data.validation, config.training.validation_micro_batches = config.data.sources, 2
    with pytest.raises(DataError, match="training.validation_micro_batches is 2; make it a multiple of 3"):
        make(0, 3, validation=True)
    with pytest.raises(DataError, match="'clip-0' has audio, but there is no audio index"):
        make(index=None)
    config.data.sources[0].path += ".missing"
    with pytest.raises(SchemaError, match="no such file"):
        make()

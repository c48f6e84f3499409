"""The loader on dialogues: which turns are trained, what filters leave out, how many steps an epoch has."""

import json
from collections import Counter

import pytest
from data.test_template import say

from step_megatron.config.schema import SourceConfig
from step_megatron.data.aspects import LossGroup
from step_megatron.data.loader import DataError, MixtureLoader
from step_megatron.data.schema import Conversation, write_conversations
from step_megatron.data.template import render
from step_megatron.data.turns import training_samples


def dialogue(number: int, rounds: int, **meta) -> Conversation:
    turns = [
        turn
        for i in range(rounds)
        for turn in (say("human", f"{number} + {i}?"), say("assistant", str(number + i), reasoning=f"{number} and {i}"))
    ]
    return Conversation(f"d{number}", "chats", tuple(turns), meta)


@pytest.fixture
def chats(tmp_path, config):
    """Twenty dialogues of one to four rounds, every fifth with an aspect; the configuration reads them alone."""
    made = [dialogue(i, i % 4 + 1, **({"aspect": "naturalness"} if i % 5 == 0 else {})) for i in range(20)]
    write_conversations(tmp_path / "chats.jsonl", made)
    config.data.sources = [SourceConfig("chats", str(tmp_path / "chats.jsonl"))]
    config.data.tokens_per_micro_batch, config.data.packing_window = 256, 10
    config.training.micro_batches_per_step = 2
    return made


def given(loader: MixtureLoader, steps: int) -> Counter:
    """How often each sample, by its tokens, was given."""
    counts = Counter()
    for _ in range(steps):
        for batch in loader.next_step():
            edges = batch.cu_seqlens.tolist()
            counts.update(tuple(batch.tokens[0, a:b].tolist()) for a, b in zip(edges[:-1], edges[1:], strict=True))
    return counts


def test_stripped_dialogues_are_a_sample_a_round(config, compact, chats):
    config.tokenizer.earlier_reasoning = "strip"
    loader = MixtureLoader(config, compact, None)
    samples = [render(s, compact, loader.clips.tokens) for each in chats for s in training_samples(each, "all", "strip")]
    assert loader.sources.size(0) == len(samples) == 50
    counts = given(loader, 40)
    assert set(counts) == {tuple(sample.input_ids.tolist()) for sample in samples}
    assert loader.groups == (LossGroup("chats"), LossGroup("chats", "naturalness"))


def test_only_last_turns_are_trained(config, compact, chats):
    config.data.train_turns = "last"
    loader = MixtureLoader(config, compact, None)
    expected = {c.id: render(training_samples(c, "last")[0], compact, loader.clips.tokens).trained_tokens for c in chats}
    for batch in loader.next_step():
        edges = batch.cu_seqlens.tolist()
        for name, a, b in zip(batch.sample_ids, edges[:-1], edges[1:], strict=True):
            assert batch.loss_mask[0, a:b].sum() == expected[name]


@pytest.mark.parametrize("reasoning", ["keep", "strip"])
@pytest.mark.parametrize("epochs", [1.0, 2.5])
def test_steps_of_epochs_give_every_sample_about_so_often(reasoning, epochs, config, compact, chats):
    config.tokenizer.earlier_reasoning = reasoning
    loader = MixtureLoader(config, compact, None)
    before = json.dumps(loader.state_dict())
    steps = loader.steps_in(epochs)
    assert json.dumps(loader.state_dict()) == before, "the position stays"
    counts = given(loader, steps)
    size, mean = loader.sources.size(0), sum(counts.values()) / loader.sources.size(0)
    # The last window is not cut where the epoch ends, and what waits for a whole step is not given.
    slack = 20 / size
    assert epochs - slack <= mean <= epochs + slack
    if epochs == 1.0:
        assert max(counts.values()) <= 2


def test_what_filters_drop_is_named_counted_and_no_failure(config, compact, chats, tmp_path):
    leak = '{"error": {"message": "Rate limit", "code": 429}}'
    bad = [Conversation(f"bad{i}", "chats", (say("human", "Hm?"), say("assistant", leak))) for i in range(5)]
    write_conversations(tmp_path / "chats.jsonl", [*bad, *chats])
    assert MixtureLoader(config, compact, None).sources.size(0) == 25
    config.data.filters = ["role_order", "api_error"]
    loader = MixtureLoader(config, compact, None, quarantine=tmp_path / "quarantine.jsonl")
    assert loader.sources.left_out == {(0, row): "api_error" for row in range(5)}, "more than data.quarantine_limit allows"
    assert loader.sources.size(0) == 20
    entries = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in entries] == [f"bad{i}" for i in range(5)]
    assert entries[0]["reason"].startswith("api_error: turns[1]: {")
    resumed = MixtureLoader(config, compact, None)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert resumed.sources.left_out == loader.sources.left_out


def test_another_way_to_train_the_turns_is_another_position(config, compact, chats):
    state = MixtureLoader(config, compact, None).state_dict()
    config.tokenizer.earlier_reasoning, config.data.train_turns = "strip", "last"
    with pytest.raises(DataError, match="data.train_turns was all, is last; tokenizer.earlier_reasoning was keep, is strip"):
        MixtureLoader(config, compact, None).load_state_dict(state)


def test_an_unknown_filter_is_named(config, compact, chats):
    config.data.filters = ["api_errors"]
    with pytest.raises(DataError, match="data.filters: there is no filter 'api_errors'; there are api_error, empty_reasoning"):
        MixtureLoader(config, compact, None)

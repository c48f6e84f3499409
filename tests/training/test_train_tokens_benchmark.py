"""The benchmark of training tokens: its contestants train alike, and conversations that see one another are noticed."""

from argparse import Namespace

import pytest
import torch

from step_megatron.benchmarks import train_tokens, train_tokens_peer


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(train_tokens_peer, "BATCH", 2)


def test_contestants_agree_and_are_timed(capsys):
    before = torch.get_num_threads()
    result = train_tokens.run(Namespace(repeats=1, clips=4, preset="tiny"))
    assert torch.get_num_threads() == before
    assert set(result["tokens_per_second"]) == {"ours", "padded", "packed"} and result["ratio"] > 0 < result["ratio_packed"]
    first, second = result["losses"]
    assert second["ours"] < first["ours"], "the update has to have happened"
    for each in (first, second):
        assert each["padded"] == pytest.approx(each["ours"], rel=1e-5) == each["packed"]
    assert "load" in capsys.readouterr().out


def test_a_peer_that_computes_something_else_is_no_peer():
    same = {"ours": 2.0, "padded": 2.0, "packed": 2.00001}
    train_tokens._check([same, same])
    with pytest.raises(RuntimeError, match="the packed Trainer computes something else: at update 2"):
        train_tokens._check([same, same | {"packed": 2.001}])


def test_packed_conversations_that_see_one_another_are_noticed():
    from transformers import AutoModelForCausalLM

    from step_megatron.config import load_config

    config = load_config(None, ["model.preset=tiny", *train_tokens.OVERRIDES])
    conversations = train_tokens.make_conversations(4, config.model.vocabulary_size)
    torch.manual_seed(0)
    # With a cache transformers does not look at the positions.
    model = AutoModelForCausalLM.from_config(train_tokens_peer.text_config(config), dtype=torch.float32)
    model.lm_head.weight.data.mul_(10)
    row = train_tokens_peer._packed(conversations)
    with pytest.raises(RuntimeError, match="see one another"):
        train_tokens_peer._check_apart(model, row, conversations)
    model.config.use_cache = False
    train_tokens_peer._check_apart(model, row, conversations)

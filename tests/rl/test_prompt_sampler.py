"""Prompts of an iteration: every one once an epoch, sources by weight, resting by pass rate, the same after a resume."""

from collections import Counter

import pytest

from step_megatron.config import load_config
from step_megatron.config.load import ConfigError
from step_megatron.data.rl_prompts import RLPrompt, write_rl_prompts
from step_megatron.data.schema import Text, Turn
from step_megatron.data.sources import DataError
from step_megatron.rl.prompt_sampler import PromptSampler

HISTORY = (Turn("human", (Text("hi"),)),)


def sampler(folder, sizes, extra=(), unusable=lambda prompt: "", weights=None):
    sources = []
    for name, size in sizes.items():
        write_rl_prompts(folder / f"{name}.jsonl", [RLPrompt(f"{name}-{i}", name, HISTORY, answer="x") for i in range(size)])
        sources.append(f"{{name: {name}, path: {folder / name}.jsonl, weight: {(weights or {}).get(name, 1)}}}")
    config = load_config(None, [f"rl.prompts=[{', '.join(sources)}]", *extra])
    return PromptSampler(config, unusable)


def test_an_epoch_has_every_prompt_once(tmp_path):
    prompts = sampler(tmp_path, {"a": 7})
    assert sorted(p.id for p in prompts.draw(7, 0)) == sorted(p.id for p in prompts.draw(7, 1))
    assert len({p.id for p in prompts.draw(7, 2)}) == 7


def test_sources_are_mixed_by_weight_in_numbers_of_prompts(tmp_path):
    prompts = sampler(tmp_path, {"a": 10, "b": 10}, weights={"a": 3, "b": 1})
    counts = Counter(p.source for p in prompts.draw(40, 0))
    assert counts == {"a": 30, "b": 10}


def test_prompts_that_always_or_never_pass_rest_and_come_back(tmp_path):
    prompts = sampler(tmp_path, {"a": 4}, ["rl.curriculum={low: 0.25, high: 0.75, rest: 2}"])
    drawn = prompts.draw(4, 0)
    rates = {p.id: rate for p, rate in zip(drawn, (0.0, 0.5, 1.0, None), strict=True)}
    prompts.tell(drawn, list(rates.values()), 0)
    awake = {name for name, rate in rates.items() if rate in (0.5, None)}
    for iteration in (1, 2):
        assert {p.id for p in prompts.draw(4, iteration)} == awake
    assert {p.id for p in prompts.draw(8, 3)} == set(rates)


def test_when_all_prompts_rest_the_message_says_so(tmp_path):
    prompts = sampler(tmp_path, {"a": 3}, ["rl.curriculum.low=0.5"])
    drawn = prompts.draw(3, 0)
    prompts.tell(drawn, [0.0] * 3, 0)
    with pytest.raises(DataError, match="all 3 prompts of 'a' rest.*rl.curriculum.low=0.5"):
        prompts.draw(1, 1)


def test_a_resumed_sampler_draws_what_would_have_followed(tmp_path):
    settings = ({"a": 5, "b": 3}, ["rl.curriculum.high=0.9"])
    first = sampler(tmp_path, *settings)
    drawn = first.draw(6, 0)
    first.tell(drawn, [1.0, 0.5, 0.0, None, 1.0, 0.2], 0)
    second = sampler(tmp_path, *settings)
    second.load_state_dict(first.state_dict())
    for iteration in range(1, 4):
        assert [p.id for p in second.draw(4, iteration)] == [p.id for p in first.draw(4, iteration)]


def test_a_state_of_other_sources_is_refused(tmp_path):
    state = sampler(tmp_path, {"a": 2}).state_dict()
    with pytest.raises(DataError, match=r"come from \['a'\], this run's from \['b'\]"):
        sampler(tmp_path, {"b": 2}).load_state_dict(state)


def test_unusable_prompts_are_named_and_too_many_stop_the_run(tmp_path):
    few = sampler(tmp_path, {"a": 10}, ["data.quarantine_limit=0.1"], lambda p: "no clip" if p.id == "a-3" else "")
    assert few.left_out == {"a-3": "no clip"} and "a-3" not in {p.id for p in few.draw(27, 0)}
    with pytest.raises(DataError, match="10 of 10 prompts cannot be used, such as 'a-0': no clip"):
        sampler(tmp_path, {"a": 10}, (), lambda p: "no clip")


def test_without_prompts_there_is_no_run():
    with pytest.raises(ConfigError, match="rl.prompts is empty"):
        PromptSampler(load_config(None, []), lambda prompt: "")

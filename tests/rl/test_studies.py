"""The studies on tones: what is trained on and measured, who judges, and whole studies of a few seconds."""

import dataclasses
import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from training.toy_run import PITCHES, train, write_data

from step_megatron.config.schema import JudgeConfig
from step_megatron.data.checks import read_check
from step_megatron.data.dialogues.phrases import sentence
from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts, write_rl_prompts
from step_megatron.data.schema import SchemaError, read_conversations
from step_megatron.rl.judge.judging import judge_pairs
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.scale import Scale
from step_megatron.studies.marks import MarksJudge
from step_megatron.studies.prompts import KINDS, RIGHT, WISHES, held_out_file, training_file, write_kinds
from step_megatron.studies.reporting import spread

WISH_OF = {wish.text: wish for wish in WISHES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The tones, and prompts about them: 12 to train on, 6 held out."""
    folder = tmp_path_factory.mktemp("studies")
    write_data(folder)
    for split, file in (("train", "train"), ("test", "held_out")):
        tones = read_conversations(folder / f"{file}.jsonl")
        prompts = (
            RLPrompt(c.id, "tones", c.turns[:1], answer=c.turns[1].text, check="multiple_choice", choices=tuple(PITCHES))
            for c in tones
        )
        write_rl_prompts(folder / f"{split}.jsonl", prompts)
    # `train.jsonl` has become prompts: the start is trained on sums.
    return folder


def test_each_kind_is_checked_for_what_its_prompt_asks_for(data, tmp_path):
    write_kinds(data, tmp_path, held_out=6)
    trained = {kind: read_rl_prompts(training_file(tmp_path, kind)) for kind in KINDS}
    held_out = {kind: read_rl_prompts(held_out_file(tmp_path, kind)) for kind in KINDS}
    assert sorted(p.id for kind in KINDS for p in trained[kind]) == sorted(f"tone-{n}" for n in range(12))
    assert {p.id for p in held_out["preference"]} == {p.id for p in held_out["rubric"]} == {f"tone-{n}" for n in range(12, 18)}
    assert {p.rubric[1] for p in held_out["rubric"]} == set(WISH_OF)
    for prompt in held_out["preference"] + held_out["rubric"]:
        check, right = read_check(prompt.meta["checks"][-1]), prompt.answer
        wrong = next(pitch for pitch in PITCHES if pitch != right)
        wish = WISH_OF[prompt.rubric[1]] if prompt.rubric else None
        assert prompt.history[-1].text.endswith(wish.text if wish else "How high?")
        write = wish.apply if wish else sentence
        assert check.passes(write("pitch", right)) and not check.content(write("pitch", wrong))
        assert not check.kept_form(sentence("pitch", right) if wish else right)
        for address in prompt.conversation.audio_addresses():
            assert (tmp_path / address).is_file()


def test_prompts_without_choices_are_refused(data, tmp_path):
    (prompt, *_) = read_rl_prompts(data / "train.jsonl")
    for split in ("train", "test"):
        write_rl_prompts(tmp_path / f"{split}.jsonl", [dataclasses.replace(prompt, check="exact", choices=())])
    with pytest.raises(SchemaError, match=r"train.jsonl: prompt 'tone-\d+' has no answer with choices"):
        write_kinds(tmp_path, tmp_path, held_out=1)


@pytest.mark.parametrize("rubric", [(), *((RIGHT, wish.text) for wish in WISHES)])
def test_the_judge_of_training_wants_what_the_prompt_asks_for(rubric):
    write = WISH_OF[rubric[1]].apply if rubric else sentence
    good, wrong, formless = write("pitch", "low"), write("pitch", "mid"), "low low low " * 3
    pairs = [Pair(str(i), (), reply, "low", rubric) for i, reply in enumerate((good, wrong, formless))]

    def rewards(hears: bool) -> list[float]:
        judgments = judge_pairs(pairs, MarksJudge(Scale(), hears), JudgeConfig(), seed=0)
        assert not any(judgment.orders_disagree or judgment.failures for judgment in judgments)
        return [judgment.reward for judgment in judgments]

    assert rewards(True)[0] > max(rewards(True)[1:])
    deaf = rewards(False)
    assert (deaf[0] == deaf[1]) == (not rubric) and deaf[0] > deaf[2]


def test_a_spread_is_that_of_a_sample():
    values = [0.25, 0.5, 1.0]
    found = spread(values)
    assert (found["mean"], found["deviation"]) == pytest.approx((statistics.mean(values), statistics.stdev(values)))
    assert spread([1.0])["deviation"] is None


def studied(rank: int, world_size: int, *, name: str, start: str, data: str, out: str) -> dict:
    """Run a study of two legs an arm, an iteration each."""
    from step_megatron.studies.arms import Setting
    from step_megatron.studies.catalogue import STUDIES
    from step_megatron.studies.reporting import run_study

    study = STUDIES[name]
    study = dataclasses.replace(study, arms={arm: legs[:2] for arm, legs in study.arms.items()})
    settings = (
        "rl={iterations: 1, mini_batches: 1}",
        "rl.rollout={prompts: 4, samples: 2, max_new_tokens: 4}",
        "rl.ppo.baseline=leave_one_out",
        "generation={rows: 16, cache_tokens: 1024}",
        "training={lr_schedule: constant, save_interval: 0, async_save: false}",
        "megatron.optimizer.lr=1e-3",
        "data.tokens_per_micro_batch=256",
    )
    setting = Setting(Path(start), Path(data), Path(out), overrides=settings, seeds=(1, 2), held_out=3)
    return run_study(study, setting)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory, worker_pool):
    folder = tmp_path_factory.mktemp("start")
    extra = (
        f"data.sources=[{{name: sums, path: {data}/sums.jsonl}}]",
        f"data.validation=[{{name: sums, path: {data}/sums.jsonl}}]",
        "training={steps: 2, lr_warmup_steps: 0}",
    )
    worker_pool(1).run(train, {"data": str(data), "run_dir": str(folder), "extra": extra})
    return folder


def kinds_trained(folder: Path, prompts: Path) -> list[Counter]:
    """Samples of each kind in every run of an arm."""
    kind_of = {prompt.id: kind for kind in KINDS for prompt in read_rl_prompts(training_file(prompts, kind))}
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    lines = ([json.loads(line) for file in sorted(run.glob("rollouts/*.jsonl")) for line in file.open()] for run in runs)
    return [Counter(kind_of[line["prompt"]] for line in each) for each in lines]


def test_arms_see_as_many_samples_of_a_kind_in_their_own_order(data, start, tmp_path, worker_pool):
    arguments = {"name": "joint-vs-sequential", "start": str(start), "data": str(data), "out": str(tmp_path)}
    (results,) = worker_pool(1).run(studied, arguments)
    trained = {arm: kinds_trained(tmp_path / arm.replace(" ", "-") / "1", tmp_path / "prompts") for arm in results["arms"]}
    both = {"preference": 4, "rubric": 4}
    assert trained == {
        "joint": [both, both],
        "preference first": [{"preference": 8}, {"rubric": 8}],
        "rubric first": [{"rubric": 8}, {"preference": 8}],
    }
    for arm, legs in results["arms"].items():
        assert [leg["iterations"] for leg in legs] == [0, 1, 2]
        for kind in KINDS:
            first, second = (legs[i][f"{kind}/reward"]["values"] for i in (1, 2))
            assert results["forgetting"][arm][kind]["values"] == pytest.approx(
                [a - b for a, b in zip(first, second, strict=True)]
            )
    assert (tmp_path / "report.html").read_text().count("<polygon") == 18

    before = (tmp_path / "joint" / "1" / "second" / "metrics.jsonl").stat().st_mtime_ns
    (again,) = worker_pool(1).run(studied, arguments)
    assert again == results and (tmp_path / "joint" / "1" / "second" / "metrics.jsonl").stat().st_mtime_ns == before


def test_arms_are_rewarded_for_their_own_and_go_on_in_one_run(data, start, tmp_path, worker_pool):
    arguments = {"name": "reward-trap", "start": str(start), "data": str(data), "out": str(tmp_path)}
    (results,) = worker_pool(1).run(studied, arguments)
    lines = {arm: json.loads((tmp_path / arm / "1/ppo/metrics.jsonl").read_text().split("\n")[1]) for arm in results["arms"]}
    rewarded = {arm: {name for name in line if name in ("reward/verifiable", "reward/preference")} for arm, line in lines.items()}
    assert rewarded == {
        "RLVR": {"reward/verifiable"},
        "RLHF": {"reward/preference"},
        "both": {"reward/verifiable", "reward/preference"},
    }
    assert all(line["step"] == 2 for line in lines.values())
    start_row = results["arms"]["both"][0]
    assert start_row["preference/preference"]["mean"] == 0.5 and "training/entropy" not in start_row

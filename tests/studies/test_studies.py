"""The studies on tones: what is trained on and measured, who judges, and whole studies of a few seconds."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from training.toy_run import PITCHES, train, write_data

from step_megatron.config.rl import JudgeConfig
from step_megatron.data.checks import read_check
from step_megatron.data.dialogues.phrases import ONE_WORD, sentence
from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts, write_rl_prompts
from step_megatron.data.schema import SchemaError, read_conversations
from step_megatron.rl.judge.judging import judge_pairs
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.scale import Scale
from step_megatron.studies.arms import Setting, Study
from step_megatron.studies.catalogue import STUDIES
from step_megatron.studies.marks import MarksJudge
from step_megatron.studies.prompts import BARE, KINDS, RIGHT, held_out_file, training_file, write_kinds
from step_megatron.studies.reporting import report, run_study, summarise

WRITE = {"preference": sentence, "rubric": ONE_WORD.apply}
RUBRICS = {"preference": (), "rubric": (RIGHT, BARE)}


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
    for kind, other in (KINDS, KINDS[::-1]):
        for prompt in held_out[kind]:
            check, right = read_check(prompt.meta["checks"][-1]), prompt.answer
            wrong = next(pitch for pitch in PITCHES if pitch != right)
            assert prompt.rubric == RUBRICS[kind] and prompt.reference == right
            assert prompt.history[-1].text == ("How high?" if kind == "preference" else "Answer in one word. How high?")
            assert check.passes(WRITE[kind]("pitch", right))
            assert not check.content(WRITE[kind]("pitch", wrong)) and not check.kept_form(WRITE[other]("pitch", right))
            for address in prompt.conversation.audio_addresses():
                assert (tmp_path / address).is_file()


def test_prompts_without_choices_are_refused(data, tmp_path):
    (prompt, *_) = read_rl_prompts(data / "train.jsonl")
    for split in ("train", "test"):
        write_rl_prompts(tmp_path / f"{split}.jsonl", [dataclasses.replace(prompt, check="exact", choices=())])
    with pytest.raises(SchemaError, match=r"train.jsonl: prompt 'tone-\d+' has no answer with choices"):
        write_kinds(tmp_path, tmp_path, held_out=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_of_training_wants_what_the_prompt_asks_for(kind):
    replies = WRITE[kind]("pitch", "low"), WRITE[kind]("pitch", "mid"), "low low low low low"
    pairs = [Pair(str(i), (), reply, "low", RUBRICS[kind]) for i, reply in enumerate(replies)]

    def rewards(hears: bool) -> list[float]:
        judgments = judge_pairs(pairs, MarksJudge(Scale(), hears), JudgeConfig(), seed=0)
        assert not any(judgment.orders_disagree or judgment.failures for judgment in judgments)
        return [judgment.reward for judgment in judgments]

    hearing, deaf = rewards(True), rewards(False)
    assert hearing[0] > max(hearing[1:]) and deaf[0] > deaf[2]
    assert (deaf[0] == deaf[1]) == (kind == "preference")


def test_what_the_first_kind_loses_in_the_second_leg_is_forgotten():
    def rows(*rewards: tuple[float, float]) -> list[dict[str, float]]:
        return [{"iterations": 3.0 * i, "first/reward": a, "second/reward": b} for i, (a, b) in enumerate(rewards)]

    found = {"arm": [rows((0.5, 0.5), (0.9, 0.5), (0.6, 0.7)), rows((0.5, 0.5), (0.8, 0.4), (0.9, 0.8))]}
    study = Study("A study", {"arm": ()}, ("first", "second"), (("first", "first/reward"),), forgetting=True)
    summary = summarise(study, found)
    last = summary["arms"]["arm"][-1]
    # Two values' sample deviation is their distance over the root of two.
    assert last["iterations"] == 6 and last["first/reward"]["values"] == [0.6, 0.9]
    assert (last["first/reward"]["mean"], last["first/reward"]["deviation"]) == pytest.approx((0.75, 0.3 / math.sqrt(2)))
    forgetting = summary["forgetting"]["arm"]
    assert forgetting["first"]["values"] == pytest.approx([0.3, -0.1]) and forgetting["second"]["mean"] == pytest.approx(-0.3)
    known = {"title": "A study", "start": "run", "seeds": [1, 2]}
    assert "0.75 ± 0.21" in report(study, known | summary)


def studied(rank: int, world_size: int, *, name: str, start: str, data: str, out: str) -> dict:
    """Run a study of two legs an arm, an iteration each."""
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
    setting = Setting(Path(start), Path(data), Path(out), overrides=settings, seeds=(1,), held_out=3)
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
    (results,) = worker_pool(1).run(studied, arguments, timeout=600)
    trained = {arm: kinds_trained(tmp_path / arm.replace(" ", "-") / "1", tmp_path / "prompts") for arm in results["arms"]}
    both = {"preference": 4, "rubric": 4}
    assert trained == {
        "joint": [both, both],
        "preference first": [{"preference": 8}, {"rubric": 8}],
        "rubric first": [{"rubric": 8}, {"preference": 8}],
    }
    assert [leg["iterations"] for leg in results["arms"]["joint"]] == [0, 1, 2]
    assert all(set(found) == set(KINDS) for found in results["forgetting"].values())
    assert (tmp_path / "report.html").read_text().count("<polygon") == 3 * len(STUDIES["joint-vs-sequential"].panels)

    before = (tmp_path / "joint" / "1" / "second" / "metrics.jsonl").stat().st_mtime_ns
    (again,) = worker_pool(1).run(studied, arguments, timeout=600)
    assert again == results and (tmp_path / "joint" / "1" / "second" / "metrics.jsonl").stat().st_mtime_ns == before


def test_arms_are_rewarded_for_their_own_and_go_on_in_one_run(data, start, tmp_path, worker_pool):
    arguments = {"name": "reward-trap", "start": str(start), "data": str(data), "out": str(tmp_path)}
    (results,) = worker_pool(1).run(studied, arguments, timeout=600)
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

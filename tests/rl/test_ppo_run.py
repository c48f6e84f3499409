"""Whole runs of PPO: layouts, offloading and stops change nothing; rewards are learnt; what is wrong ends with a message."""

import math
from pathlib import Path

import pytest
from rl.toy_ppo import run, write_prompts
from support.worker_pool import WorkerError
from training.toy_run import write_data

from step_megatron.runtime.metrics import read_metrics

# What an iteration ends with that does not depend on the clock.
CLOCK = ("seconds", "share/", "memory_gib/", "seconds/", "time", "run_dir", "checkpoint", "rollout/dlogp", "rollout/ratio")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo")
    write_data(folder)
    write_prompts(folder)
    return folder


def lines(run_dir: Path) -> list[dict]:
    """The run's metrics without those that depend on the clock."""
    return [{name: value for name, value in line.items() if not name.startswith(CLOCK)} for line in read_metrics(run_dir)]


LAYOUTS = {
    "tp2": ("megatron.transformer.tensor_model_parallel_size=2",),
    "tp2-sp": ("megatron.transformer={tensor_model_parallel_size: 2, sequence_parallel: true}",),
    "dp2": (),
    "dp2-distributed": ("megatron.optimizer.use_distributed_optimizer=true", "megatron.ddp.overlap_grad_reduce=true"),
    "cp2": ("megatron.transformer.context_parallel_size=2",),
}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory, worker_pool):
    """The metrics of one process."""
    folder = tmp_path_factory.mktemp("alone")
    worker_pool(1).run(run, {"data": str(data), "run_dir": str(folder)})
    return lines(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_equals_that_of_one_process(data, alone, tmp_path, worker_pool, layout):
    worker_pool(2).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": LAYOUTS[layout]})
    for ours, theirs in zip(lines(tmp_path), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5, nan_ok=True)


BANDIT = (
    "tokenizer.template=chatml",
    "rl={iterations: 24, epochs: 2, mini_batches: 1}",
    "rl.rollout={prompts: 8, samples: 4, max_new_tokens: 3}",
    "rl.rewards=[{kind: preference}, {kind: rubric}]",
    "megatron.optimizer.lr=3e-3",
    "training.save_interval=0",
)


def test_a_policy_reaches_the_known_optimum_and_kl_pulls_it_back(data, tmp_path, worker_pool):
    """A bandit with audio prompts: three vowels are the best reply to all of them, worth 2/3 beside references with one."""
    found = {}
    for beta in (0.0, 1.0):
        arguments = {"data": str(data), "run_dir": str(tmp_path / f"{beta}"), "extra": (*BANDIT, f"rl.ppo.kl.beta={beta}")}
        worker_pool(1).run(run, arguments)
        found[beta] = read_metrics(tmp_path / f"{beta}")
    free, held = found[0.0][-1], found[1.0][-1]
    assert found[0.0][0]["score"] < 0 and free["score"] == pytest.approx(2 / 3, abs=0.05)
    assert held["kl"] < free["kl"] / 5 and held["score"] < free["score"]


def test_a_group_baseline_reaches_it_without_a_critic(data, tmp_path, worker_pool):
    extra = (*BANDIT, "rl.ppo.baseline=leave_one_out", "rl.ppo.kl.beta=0.0")
    worker_pool(1).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": extra})
    lines = read_metrics(tmp_path)
    assert lines[-1]["score"] > 0.5 and not (tmp_path / "critic").exists() and "value_loss" not in lines[-1]


def test_a_critic_on_the_policys_trunk_learns_too(data, tmp_path, worker_pool):
    extra = (*BANDIT, "rl.critic.kind=shared", "rl.ppo.kl.beta=0.0")
    worker_pool(1).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": extra})
    lines = read_metrics(tmp_path)
    assert lines[-1]["score"] > 0.5 and lines[-1]["value_loss"] < lines[0]["value_loss"]


class Poisoned:
    """A judge that is no good."""

    def __init__(self, kind: str):
        self.kind, self.asked = kind, 0

    def answer(self, requests):
        from step_megatron.data.preferences import Verdict
        from step_megatron.rl.judge.judging import Answer
        from step_megatron.rl.judge.verdict import write_verdict

        if self.kind == "failing":
            return [Answer("I cannot say.") for _ in requests]
        levels = [0 if self.kind == "constant" else request.seed % 7 - 3 for request in requests]
        told = zip(requests, levels, strict=True)
        return [Answer("</think>" + write_verdict(Verdict((level,) * len(r.pair.rubric), level))) for r, level in told]


def random_judge(config):
    return Poisoned("random")


def constant_judge(config):
    return Poisoned("constant")


def failing_judge(config):
    return Poisoned("failing")


NORMALISED = ("rl.rewards=[{kind: preference, normalise: true}, {kind: rubric, normalise: true}]", "rl.iterations=12")


@pytest.mark.parametrize("judge", [random_judge, constant_judge])
def test_verdicts_without_sense_leave_the_run_stable(data, tmp_path, worker_pool, judge):
    arguments = {"data": str(data), "run_dir": str(tmp_path), "extra": (*BANDIT, *NORMALISED), "judge": judge}
    worker_pool(1).run(run, arguments)
    for line in read_metrics(tmp_path):
        assert math.isfinite(line["policy_loss"]) and abs(line["kl"]) < 5 and line["skipped_updates"] == 0


def test_a_judge_that_always_fails_stops_the_run_with_the_reason(data, tmp_path, worker_pool):
    with pytest.raises(WorkerError, match="judgments failed, more than rl.judge.failure_limit=0.2.*unfinished"):
        worker_pool(1).run(run, {"data": str(data), "run_dir": str(tmp_path), "judge": failing_judge})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("rl.prompts=[]",), "rl.prompts is empty"),
        (("rl.rollout.temperature=0.0",), "PPO samples from its policy"),
        (("rl.ppo.baseline=group", "rl.rollout.samples=1"), "set rl.rollout.samples to 2 or more"),
        (("rl.curriculum.low=0.2", "rl.rollout.samples=1"), "raise rl.rollout.samples"),
        (("rl.rollout.max_new_tokens=250",), r"250 new ones \(rl.rollout.max_new_tokens\) are more than 256"),
        (("rl.ppo.kl={place: loss, estimator: k1}",), "the expected gradient of k1 is zero"),
    ],
)
def test_settings_that_make_no_run_are_refused(data, tmp_path, worker_pool, extra, message):
    with pytest.raises(WorkerError, match=message):
        worker_pool(1).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": extra})


def test_without_a_judge_judgments_are_refused(data, tmp_path, worker_pool):
    with pytest.raises(WorkerError, match="nobody is there to judge: name a reward model's run in rl.judge.run"):
        worker_pool(1).run(run, {"data": str(data), "run_dir": str(tmp_path), "judge": None})


def test_a_pipelined_policy_is_refused_with_the_nearest_layout(data, tmp_path, worker_pool):
    extra = ("megatron.transformer.pipeline_model_parallel_size=2",)
    with pytest.raises(WorkerError, match="the nearest layout is .*pipeline_model_parallel_size=1"):
        worker_pool(2).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": extra})


@pytest.fixture(scope="module")
def untaught(data, tmp_path_factory, worker_pool):
    """A run to judge with that was never taught to judge: it writes no verdict."""
    folder = tmp_path_factory.mktemp("judge")
    worker_pool(2).run("training.toy_run:train", {"data": str(data), "run_dir": str(folder), "extra": ("training.steps=3",)})
    return f"rl.judge={{run: {folder}, max_tokens: 8, retries: 1, failure_limit: 1.0, instructions: brief}}"


def answers(rank: int, world_size: int, **arguments) -> list[dict[str, list[int]]]:
    """Run PPO; what the judge on the same devices wrote in every iteration."""
    from unittest import mock

    from step_megatron.rl.judge.phase import ColocatedJudging

    found = []
    finish = ColocatedJudging.finish

    def watched(self, pairs):
        judgments = finish(self, pairs)
        found.append({key: value["tokens"] for key, value in self._journal.known.items()})
        return judgments

    with mock.patch.object(ColocatedJudging, "finish", watched):
        run(rank, world_size, **arguments, judge=None)
    return found


@pytest.mark.parametrize("transformer", ["{tensor_model_parallel_size: 2}", "{}"])
def test_a_judge_on_the_same_devices_answers_alike_beside_generation_and_after_it(
    data, untaught, tmp_path, worker_pool, transformer
):
    """Its answers are no verdicts: every sample is masked, nothing is trained, nothing breaks."""
    found = {}
    for offload in ("on", "off"):
        extra = (untaught, f"rl.colocation.offload={offload}", f"megatron.transformer={transformer}", "rl.iterations=2",
                 "generation.cache_tokens=2048", "training.save_interval=5")  # fmt: skip
        arguments = {"data": str(data), "run_dir": str(tmp_path / offload), "extra": extra}
        found[offload], other = worker_pool(2).run(answers, arguments)
        assert found[offload] == other, "every rank knows all answers"
        for line in read_metrics(tmp_path / offload):
            assert line["judge/masked"] == 1 and line["trained_samples"] == 0 and line["kl"] == 0
            assert line["reward/preference_failed"] + line["reward/rubric_failed"] == 8
    assert found["on"] == found["off"]
    # Two orders of eight pairs, each asked again once.
    assert [len(iteration) for iteration in found["on"]] == [32, 32]


def test_with_adapters_the_reference_is_the_policy_without_them(data, tmp_path, worker_pool):
    extra = (*BANDIT, "model.lora={rank: 4, alpha: 8}", "rl.iterations=6", "rl.ppo.kl.beta=0.0", "rl.colocation.offload=on")
    worker_pool(1).run(run, {"data": str(data), "run_dir": str(tmp_path), "extra": extra})
    first, *_, last = read_metrics(tmp_path)
    assert first["kl"] == 0 and abs(last["kl"]) > 1e-3

"""The benchmark of PPO: both sides get the same prompts, weights and reward, ours is the loop of `train ppo`."""

import dataclasses
import sys
from argparse import Namespace

import pytest

from step_megatron.benchmarks import peer_environment, ppo, ppo_ours
from step_megatron.benchmarks.ppo_job import Report
from step_megatron.data.tokenizer import Tokenizer

# A contestant that does nothing, by the protocol.
_IDLE = """
import sys, time
from step_megatron.benchmarks.ppo_job import Job, Pace
job, pace = Job.read(sys.argv[1]), Pace()
print("not a report")
while True:
    pace.wait()
    pace.timed("generate", time.sleep)(0.01)
    pace.rewards.append(sum(job.token_scores) / len(job.token_scores))
    pace.report()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    return folder, ppo.prepare(folder)


def test_the_reward_of_a_text_is_the_mean_of_its_tokens_scores(prepared):
    folder, jobs = prepared
    job, tokenizer = jobs["ppo"], Tokenizer.load(folder / "tokenizer")
    assert tokenizer.size == len(job.token_scores) == 4096 and len(job.prompts) == 32 and jobs["rloo"].replies == 32
    assert min(map(len, job.prompts)) < 40 and max(map(len, job.prompts)) > 100
    for tokens in [*job.prompts, list(range(5, 4096, 7))]:
        counted = ppo_ours.letters((), tokenizer.decode(tokens))
        assert counted == sum(job.token_scores[token] for token in tokens) > 0
    assert all(job.pad not in tokens for tokens in job.prompts)


@pytest.mark.parametrize("algorithm", ["ppo", "shared", "rloo"])
def test_our_side_is_the_loop_and_its_phases_are_told(prepared, monkeypatch, algorithm):
    folder, jobs = prepared
    job = dataclasses.replace(
        jobs[algorithm], prompts=jobs[algorithm].prompts[:8], new_tokens=4, epochs=1, mini_batches=2, threads=1
    )
    reports = []

    class OneIteration:
        def __init__(self):
            self.rewards = []

        def wait(self):
            if reports:
                raise SystemExit

        def report(self, phases):
            reports.append(phases)

    monkeypatch.setattr(ppo_ours, "Pace", OneIteration)
    monkeypatch.setattr(sys, "argv", ["ppo_ours", str(job.write(folder / "small.json"))])
    (folder / ppo_ours.PROMPTS.format(8)).write_text((folder / ppo_ours.PROMPTS.format(32)).read_text())
    with pytest.raises(SystemExit):
        ppo_ours.main()
    (phases,) = reports
    assert phases.keys() >= {"generate", "judge", "score", "train"} and ("train critic" in phases) == (algorithm == "ppo")


def test_contestants_alternate_and_ratios_are_formed(prepared, monkeypatch, capfd):
    monkeypatch.setattr(ppo, "prepare", lambda folder: prepared[1])
    monkeypatch.setattr(peer_environment, "python", lambda release: sys.executable)
    monkeypatch.setattr(ppo, "_command", lambda python, module, job: [sys.executable, "-c", _IDLE, str(job)])
    result = ppo.run(Namespace(repeats=3, make_peer=False))
    assert set(result["contestants"]) == {"ours ppo", "ours shared", "ours rloo", "TRL ppo", "TRL rloo"}
    for each in result["contestants"].values():
        assert each["seconds"] == pytest.approx(sum(each["phases"].values()), rel=0.2)
        assert each["phases"].keys() == {"generate", "other"} and each["reward"] > 0 and each["peak"] >= each["start"] > 0
    for suffix in ("", "_shared", "_rloo"):
        assert result[f"ratio{suffix}_cpu"] > 0
        assert result[f"low{suffix}"] <= result[f"ratio{suffix}"] <= result[f"high{suffix}"]
    assert "not a report" in capfd.readouterr().err


def test_a_contestant_that_dies_is_an_error(prepared, monkeypatch):
    monkeypatch.setattr(ppo, "prepare", lambda folder: prepared[1])
    monkeypatch.setattr(peer_environment, "python", lambda release: sys.executable)
    monkeypatch.setattr(ppo, "_command", lambda python, module, job: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match="ours ppo ended with status 3"):
        ppo.run(Namespace(repeats=1, make_peer=False))


def test_a_missing_environment_says_how_it_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(peer_environment.PeerError, match="step-megatron bench ppo --make-peer"):
        ppo.run(Namespace(repeats=1, make_peer=False))
    made = peer_environment.folder("1.12.0")
    made.mkdir(parents=True)
    (made / "requirements.txt").write_text("transformers==5.23.0\ntrl==1.11.0")
    with pytest.raises(peer_environment.PeerError):
        peer_environment.python("1.12.0")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm, release", [("ppo", "1.12.0"), ("rloo", "1.16.0")])
def test_trl_does_an_iteration(prepared, algorithm, release):
    folder, jobs = prepared
    try:
        python = peer_environment.python(release)
    except peer_environment.PeerError as error:
        pytest.skip(str(error))
    job = dataclasses.replace(jobs[algorithm], new_tokens=4, threads=1)
    path = job.write(folder / f"peer-{algorithm}.json")
    with ppo._contestant(f"TRL {algorithm}", ppo._command(str(python), "ppo_peer", path)) as contestant:
        report = contestant.iteration()
    assert isinstance(report, Report) and report.phases.keys() >= {"generate", "train forward", "train backward", "optimizer"}
    # The mean over all ids, which a policy without training draws alike.
    assert report.reward == pytest.approx(sum(job.token_scores) / len(job.token_scores), abs=0.25)

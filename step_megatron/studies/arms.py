"""The arms of a study: each a chain of legs of PPO from the same start, run with several seeds and measured after every leg.

    OUT/prompts/                  what is trained and measured on (`prompts`)
    OUT/start.json                what the start replies to the held-out prompts
    OUT/ARM/SEED/RUN/             runs of PPO
    OUT/ARM/SEED/replies-N.json   what the policy replies after leg N
    OUT/ARM/SEED/measured.json    a `Row` for every leg

What is finished is kept: a study that was interrupted goes on where it was.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from step_megatron.config.load import RUN_CONFIG, ConfigError, load_config
from step_megatron.config.schema import Config
from step_megatron.evaluation.files import write_json
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.run import run_ppo
from step_megatron.runtime.machine import cores
from step_megatron.runtime.metrics import read_metrics
from step_megatron.studies.held_out import Texts, measure, sample_held_out
from step_megatron.studies.marks import MarksJudge
from step_megatron.studies.prompts import training_file, write_kinds

# `iterations` done; `KIND/MEASURE` of `held_out`; `training/METRIC`, means of the last quarter of the leg, none of the start.
Row = dict[str, float]
# By arm: of every seed the start and every leg.
Found = dict[str, list[list[Row]]]
_OF_TRAINING = ("score", "kl", "entropy", "response_tokens")


@dataclasses.dataclass(frozen=True)
class Leg:
    """`rl.iterations` of the recipe: of the leg before's run where it has the same name, else of one that starts from its policy.

    Attributes:
        kinds: prompts that are trained on, in equal shares.
        rewards: `rl.rewards`; the recipe's where empty.
    """

    run: str
    kinds: tuple[str, ...]
    rewards: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        kinds: that are measured.
        panels: heading and measure of every chart.
        hears: whether the program that judges in training knows right answers.
        forgetting: whether what a kind loses in the second leg is reported.
    """

    title: str
    arms: dict[str, tuple[Leg, ...]]
    kinds: tuple[str, ...]
    panels: tuple[tuple[str, str], ...]
    hears: bool = True
    forgetting: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a study runs, and how much of it.

    Attributes:
        start: run that every arm starts from.
        prompts: folder of `train.jsonl` and `test.jsonl` (`prompts.write_kinds`).
        recipe, overrides: of every run of PPO. Where `rl.judge` names a judge it is asked, else `marks.MarksJudge`.
        held_out, samples: most held-out prompts of a kind, and replies to each.
        jobs: arms at a time, each in a process of its own; 1 runs them in this one.
    """

    start: Path
    prompts: Path
    out: Path
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1, 2, 3)
    held_out: int = 150
    samples: int = 1
    jobs: int = 1

    def config(self, run_dir: Path, seed: int, before: Path, extra: Iterable[str] = ()) -> Config:
        """A run of PPO from the policy of the run `before`; `extra` gives way to the user's overrides."""
        of_start = load_config(self.start / RUN_CONFIG)
        threads = max(1, cores() // self.jobs)
        own = [
            f"run={{dir: '{run_dir}', seed: {seed}, threads: {threads}, tensorboard: false}}",
            f"model.weights='{before}'",
            f"data.index='{of_start.data.index}'",
            f"audio={{cache: on, cache_dir: '{of_start.audio.cache_dir}'}}",
        ]
        return load_config(self.recipe, [*own, *extra, *self.overrides])


def run_arms(study: Study, setting: Setting) -> Found:
    """Run all arms with all seeds, and measure.

    Raises:
        FileNotFoundError: no run to start from.
        ConfigError, SchemaError: settings or prompts that cannot be used.
    """
    if not (setting.start / RUN_CONFIG).is_file():
        raise FileNotFoundError(f"{setting.start / RUN_CONFIG} is missing: name a finished run to start from, such as an SFT run")
    folder = setting.out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    write_kinds(setting.prompts, folder, setting.held_out)
    kept = setting.out / "start.json"
    if not kept.is_file():
        tokens = setting.config(setting.out, 0, setting.start).rl.rollout.max_new_tokens
        write_json(kept, sample_held_out(setting.start, folder, study.kinds, setting.samples, tokens, seed=0))
    texts = _read(kept)
    start = {"iterations": 0.0} | measure(folder, texts, texts)
    plan = [(study, arm, seed, setting) for seed in setting.seeds for arm in study.arms]
    if setting.jobs > 1:
        # A process for each arm: process groups of earlier runs leave threads behind.
        settings = {"mp_context": multiprocessing.get_context("spawn"), "initializer": _end_with_parent, "max_tasks_per_child": 1}
        with ProcessPoolExecutor(setting.jobs, **settings) as pool:
            measured = list(pool.map(run_arm, *zip(*plan, strict=True)))
    else:
        measured = list(itertools.starmap(run_arm, plan))
    found: Found = {arm: [] for arm in study.arms}
    for (_, arm, _, _), legs in zip(plan, measured, strict=True):
        found[arm].append([start, *legs])
    return found


def _end_with_parent() -> None:
    """A worker whose study was killed ends too, instead of running what is left with nobody to tell."""

    def follow() -> None:
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()


def run_arm(study: Study, arm: str, seed: int, setting: Setting) -> list[Row]:
    """Run one arm with one seed; what was measured after each leg."""
    folder = setting.out / arm.replace(" ", "-") / str(seed)
    kept = folder / "measured.json"
    if kept.is_file():
        return _read(kept)
    rows, before = [], setting.start
    start: Texts = _read(setting.out / "start.json")
    legs = study.arms[arm]
    for number, leg in enumerate(legs):
        if number and legs[number - 1].run != leg.run:
            before = folder / legs[number - 1].run
        config = _leg_config(setting, legs[: number + 1], folder, seed, before)
        judge = None if _names_judge(config) else MarksJudge(Scale(config.rl.judge.levels), study.hears)
        if signal := run_ppo(config, judge)["interrupted"]:
            raise KeyboardInterrupt(signal)
        prompts, tokens = setting.out / "prompts", config.rl.rollout.max_new_tokens
        texts = sample_held_out(folder / leg.run, prompts, study.kinds, setting.samples, tokens, seed)
        write_json(folder / f"replies-{number + 1}.json", texts)
        rows.append(_row(config, legs[: number + 1]) | measure(prompts, texts, start))
    write_json(kept, rows)
    return rows


def _leg_config(setting: Setting, legs: tuple[Leg, ...], folder: Path, seed: int, before: Path) -> Config:
    """The run of the last of these legs, up to that leg's end."""
    leg = legs[-1]
    files = [f"{{name: {kind}, path: '{training_file(setting.out / 'prompts', kind)}'}}" for kind in leg.kinds]
    extra = [f"rl.prompts=[{', '.join(files)}]"] + ([f"rl.rewards={leg.rewards}"] if leg.rewards else [])
    config = setting.config(folder / leg.run, seed, before, extra)
    times = sum(each.run == leg.run for each in legs)
    return dataclasses.replace(config, rl=dataclasses.replace(config.rl, iterations=config.rl.iterations * times))


def _row(config: Config, legs: tuple[Leg, ...]) -> Row:
    """What training says of the last of these legs."""
    times = sum(each.run == legs[-1].run for each in legs)
    a_leg = config.rl.iterations // times
    last = read_metrics(config.run.dir)[-max(1, a_leg // 4) :]
    means = {f"training/{name}": sum(line[name] for line in last) / len(last) for name in _OF_TRAINING}
    return {"iterations": float(a_leg * len(legs))} | means


def _names_judge(config: Config) -> bool:
    return bool(config.rl.judge.run or config.rl.judge.server.url)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it and run the study again") from None

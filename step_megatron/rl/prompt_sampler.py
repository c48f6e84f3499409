"""Which prompts an iteration has: sources mixed by weight, epochs reshuffled, and a curriculum by pass rate."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.data.mixture import Mixture, Source
from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts
from step_megatron.data.sources import DataError, folder_of_index, located
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)


class PromptSampler:
    """An endless stream of prompts, a function of seed and position.

    Args:
        config: `rl.prompts`, `rl.curriculum`, `rl.rollout.samples`, `data.index` and `data.quarantine_limit`, `run.seed`.
        unusable: why a prompt cannot be used, "" where it can.

    Attributes:
        left_out: prompts that cannot be used, by id, with the reason.

    Raises:
        ConfigError: no source, or a curriculum that cannot tell prompts apart.
        SchemaError: a line of a file is no prompt.
        DataError: too many prompts cannot be used.
    """

    def __init__(self, config: Config, unusable: Callable[[RLPrompt], str]):
        self._curriculum = config.rl.curriculum
        if not config.rl.prompts:
            raise ConfigError("rl.prompts is empty; name a file of prompts: [{name: speech, path: prompts.jsonl, weight: 1}]")
        if config.rl.rollout.samples < 2 and (self._curriculum.low > 0 or self._curriculum.high < 1):
            raise ConfigError(
                "rl.curriculum tells prompts apart by the pass rate of their samples: raise rl.rollout.samples to 4 or more"
            )
        self.left_out: dict[str, str] = {}
        self._prompts: list[list[RLPrompt]] = []
        folder = folder_of_index(config.data.index)
        for source in config.rl.prompts:
            prompts = [_located(prompt, source.path, folder) for prompt in read_rl_prompts(source.path)]
            reasons = {prompt.id: reason for prompt in prompts if (reason := unusable(prompt))}
            if len(reasons) > config.data.quarantine_limit * len(prompts):
                name, reason = next(iter(reasons.items()))
                raise DataError(
                    f"{source.path}: {len(reasons)} of {len(prompts)} prompts cannot be used, such as {name!r}: {reason}; mend "
                    f"them, or raise data.quarantine_limit={config.data.quarantine_limit:g}"
                )
            for name, reason in reasons.items():
                logger.warning("%s: prompt %r is left out: %s", source.path, name, reason)
            self.left_out |= reasons
            self._prompts.append([prompt for prompt in prompts if prompt.id not in reasons])
        sources = [Source(s.name, s.weight, len(p)) for s, p in zip(config.rl.prompts, self._prompts, strict=True)]
        self._mixture = Mixture(sources, config.run.seed)
        # Source and id of a prompt -> its pass rate when it was last sampled, and the iteration of that.
        self._rates: dict[tuple[str, str], tuple[float, int]] = {}

    def draw(self, count: int, iteration: int) -> list[RLPrompt]:
        """The next `count` prompts that do not rest.

        Raises:
            DataError: all prompts of a source rest.
        """
        drawn = []
        for _ in range(count):
            source = self._mixture.choose()
            prompts = self._prompts[source]
            for _ in range(2 * len(prompts)):
                prompt = prompts[self._mixture.advance(source)]
                if not self._rests(source, prompt, iteration):
                    break
            else:
                raise DataError(
                    f"all {len(prompts)} prompts of {self._mixture.sources[source].name!r} rest: none has a pass rate between "
                    f"rl.curriculum.low={self._curriculum.low:g} and high={self._curriculum.high:g}; widen them, or shorten rest"
                )
            self._mixture.credit(source, 1)
            drawn.append(prompt)
        return drawn

    def tell(self, prompts: Sequence[RLPrompt], rates: Sequence[float | None], iteration: int) -> None:
        """What share of each prompt's samples passed; None where none could be judged."""
        names = {
            id(prompt): source.name for source, each in zip(self._mixture.sources, self._prompts, strict=True) for prompt in each
        }
        for prompt, rate in zip(prompts, rates, strict=True):
            if rate is not None:
                self._rates[names[id(prompt)], prompt.id] = (rate, iteration)

    def _rests(self, source: int, prompt: RLPrompt, iteration: int) -> bool:
        known = self._rates.get((self._mixture.sources[source].name, prompt.id))
        if known is None:
            return False
        rate, when = known
        return not self._curriculum.low <= rate <= self._curriculum.high and iteration - when <= self._curriculum.rest

    def state_dict(self) -> dict[str, Any]:
        """The position and the pass rates, as JSON values."""
        rates = [[*name, *value] for name, value in sorted(self._rates.items())]
        return {"mixture": self._mixture.state_dict(), "names": [s.name for s in self._mixture.sources], "rates": rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            DataError: the sources are others.
        """
        names = [source.name for source in self._mixture.sources]
        if state["names"] != names:
            raise DataError(f"the checkpoint's prompts come from {state['names']}, this run's from {names}; restore rl.prompts")
        self._mixture.load_state_dict(state["mixture"])
        self._rates = {(source, name): (rate, when) for source, name, rate, when in state["rates"]}


def _located(prompt: RLPrompt, path: str, index_folder: str | None) -> RLPrompt:
    """The prompt with its clips' addresses as the audio index knows them."""
    return dataclasses.replace(prompt, history=located(prompt.conversation, path, index_folder).turns)

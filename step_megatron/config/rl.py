"""Settings of the parts of reinforcement learning: the section `rl` of a configuration (`schema.RLConfig`)."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class KLConfig:
    """The penalty on leaving the reference policy; `rl/kl.py` has the reasons for the defaults."""

    # `reward`: part of every token's reward. `loss`: a term of the loss.
    place: Literal["reward", "loss"] = "reward"
    # `auto`: k1 in the reward, k2 in the loss. k1 is refused in the loss; k3's gradient there is of another divergence.
    estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    # The coefficient; the report gives none.
    beta: float = 0.05
    # KL of a sample (summed over its tokens) that beta adapts to; none keeps beta fixed.
    target: float | None = None
    # Samples over which beta adapts.
    horizon: float = 10000.0


@dataclass
class PPOConfig:
    """Equations 4 and 5 of the report; published values are Step-Audio-R1's."""

    # Ratios are clipped to 1 - clip .. 1 + clip_high (none: clip).
    clip: float = 0.2
    clip_high: float | None = None
    # Values are clipped to their old value +- this; none leaves it out.
    value_clip: float | None = 0.2
    gamma: float = 1.0
    gae_lambda: float = 1.0
    # `critic`: a value network. `group`, `leave_one_out`: the other samples of the same prompt, no critic.
    baseline: Literal["critic", "group", "leave_one_out"] = "critic"
    whiten_advantages: bool = True
    entropy_coefficient: float = 0.0
    # Largest weight of truncated importance sampling between trainer and rollout; none leaves the weights out.
    importance_truncation: float | None = 2.0
    kl: KLConfig = field(default_factory=KLConfig)


@dataclass
class JudgeServerConfig:
    """An OpenAI-compatible server that judges."""

    # Up to and including the version: `http://host:8000/v1`.
    url: str = ""
    model: str = ""
    # Name of the environment variable that holds the key; empty for a server without one. The key itself is never written.
    api_key_env: str = ""
    # Requests on the way at once.
    concurrency: int = 32
    # For a whole answer.
    timeout_seconds: float = 300.0
    # After a failure that may pass (429, 5xx, a broken connection), with exponentially growing, jittered waits.
    retries: int = 5
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0
    # Folder of answers already had; empty keeps none.
    cache_dir: str = ""


@dataclass
class JudgeConfig:
    """The generative reward model: how it is asked, and how its verdicts are read."""

    # Of the scale: 7 is -3 .. 3, 6 the same without the tie.
    levels: int = 7
    # `both`: each pair in both orders. `random`: in one, at half the cost, and with the judge's preference for a place in it.
    orders: Literal["both", "random"] = "both"
    # Times that an answer without a verdict is asked for again before the sample is masked.
    retries: int = 3
    # Share of masked samples above which the run stops.
    failure_limit: float = 0.2
    # `brief` is for small models that were trained to judge.
    instructions: Literal["full", "brief"] = "full"
    # Of each quoted text; the middle of a longer one is left out.
    max_characters: int = 20000
    # Of the judge's sampling; at 0 an answer without a verdict would come again.
    temperature: float = 0.6
    # Of the judge's reasoning and verdict.
    max_tokens: int = 2048
    # PPO: run of a reward model that judges in this process, on the devices of the policy; empty asks the server.
    run: str = ""
    server: JudgeServerConfig = field(default_factory=JudgeServerConfig)


@dataclass
class RewardConfig:
    """One kind of reward in the mixture; `rl/rewards.py` says what each is."""

    kind: Literal["preference", "rubric", "verifiable", "reasoning_present", "length"] = "preference"
    weight: float = 1.0
    # By the running mean and deviation of this kind.
    normalise: bool = False
    # Only samples that are also of one of these kinds; empty for all.
    only_with: list[Literal["preference", "rubric", "verifiable"]] = field(default_factory=list)
    # `length`: nothing is taken off from min to max, and -1 beyond another slack.
    min_tokens: int = 0
    max_tokens: int = 1024
    slack_tokens: int = 256


@dataclass
class VLLMConfig:
    """Rollouts by vLLM (`generation/vllm_backend.py`)."""

    # Of the device's memory, for its weights and cache while it is awake.
    memory_share: float = 0.4
    # Largest |dlogp| between vLLM and the trainer about the first prompts; beyond it the run stops. In bfloat16 0.1 is usual.
    parity_limit: float = 0.2


@dataclass
class RolloutConfig:
    """What an iteration of PPO generates. The policy is the untruncated distribution at this temperature, everywhere."""

    # Prompts of an iteration, and samples of each.
    prompts: int = 64
    samples: int = 16
    temperature: float = 1.0
    # Drawing from less than the whole distribution makes every importance ratio a biased one: see the metric `rollout/ratio`.
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    # Reasoning of so many tokens is ended by force (those tokens are not trained); 0: never.
    reasoning_tokens: int = 0
    # The policy sees the criteria of a rubric too, as a system turn (equations 4 and 5 may be read so).
    shows_rubric: bool = False
    # Who generates: `own`, on the trainer's weights, or vLLM on a copy of them.
    backend: Literal["own", "vllm"] = "own"
    vllm: VLLMConfig = field(default_factory=VLLMConfig)


@dataclass
class CriticConfig:
    """The value network of PPO; it begins as the policy, with a head of its own."""

    # `separate`: a model of its own. `shared`: a second head on the policy's trunk, at half the work; another algorithm.
    kind: Literal["separate", "shared"] = "separate"
    # Its learning rate over the policy's (2.5e-6 beside 1e-6 in Step-Audio 2).
    lr_factor: float = 2.5
    # `shared`: what its loss counts for beside the policy's.
    coefficient: float = 0.1


@dataclass
class CurriculumConfig:
    """Prompts by pass rate: what always or never passes teaches nothing (Step-Audio-R1 takes 3 to 6 of 8)."""

    # A prompt whose samples passed more rarely or more often than this rests.
    low: float = 0.0
    high: float = 1.0
    # Iterations that it rests before it is tried again.
    rest: int = 20
    # A sample passes from this reward on (of its verifiable reward, or else of its judgment).
    threshold: float = 0.5


@dataclass
class ColocationConfig:
    """Policy, critic, reference and judge on the same devices."""

    # Keep on the device what a phase needs, and the rest in pinned host memory; `auto` does so on a GPU.
    offload: Literal["auto", "on", "off"] = "auto"
    # Judge what is finished while the rest is being generated. A judge on the same devices does so where nothing is offloaded.
    overlap_judge: bool = True

"""The typed configuration of a run: these dataclasses are the schema, and the only place where a setting is declared.

A value comes from, in rising order: the default here, the model preset, the recipe (YAML), `key=value` on the command line.
Whatever Megatron-Core's own dataclasses already name (learning rate, parallel sizes, layer counts) is not declared again: it goes
through `megatron.transformer`, `megatron.optimizer` and `megatron.ddp`, and Megatron's dataclasses validate it.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from step_megatron.config.rl import (
    ColocationConfig,
    CriticConfig,
    CurriculumConfig,
    JudgeConfig,
    PPOConfig,
    RewardConfig,
    RolloutConfig,
)


@dataclass
class RunConfig:
    """Where a run writes and what it runs on."""

    dir: str = "runs/default"
    seed: int = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Process-group backend; `auto` is gloo on a CPU and NCCL on a GPU.
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    # Compute threads of one rank; 0 divides the machine's cores by the ranks on it.
    threads: int = 0
    # How long a collective may wait for the slowest rank before the run fails; the first step may encode a whole corpus.
    timeout_minutes: int = 30
    log_interval: int = 10
    tensorboard: bool = True
    wandb_project: str = ""


@dataclass
class EncoderConfig:
    """Whisper-shaped audio encoder; defaults are the published Qwen2-Audio encoder."""

    mels: int = 128
    width: int = 1280
    layers: int = 32
    heads: int = 20
    ffn_width: int = 5120
    # 50 Hz positions: 30 s.
    max_positions: int = 1500
    # Average-pool by two before the final norm: 50 -> 25 Hz. Off only to compare with a plain Whisper encoder.
    pooling: bool = True
    # A directory that holds weights (`whisper-base`, unpacked by `data fetch`), or `random`, through which a model learns little,
    # for the encoder is frozen. Has to be set where a source has audio.
    weights: str = ""


@dataclass
class AdaptorConfig:
    """Encoder-to-decoder adaptor; defaults are the Step-Audio shape."""

    # `step`: Conv1d k3 s2 + GELU + Linear + ReLU + Linear, 12.5 Hz. `linear`: Qwen2-Audio's projector, 25 Hz.
    kind: Literal["step", "linear"] = "step"
    width: int = 2048
    # `clean` zeroes the frame beyond a chunk's end that the last convolution tap reads; `step` reads it, as released.
    compat: Literal["clean", "step"] = "clean"


@dataclass
class LoRAConfig:
    """Low-rank adapters beside the decoder's linear layers. The decoder itself is frozen then, the audio adaptor is trained all
    the same unless `model.freeze` names it.
    """

    # 0: no adapters, the decoder itself is trained.
    rank: int = 0
    # An adapter's share is multiplied by alpha / rank.
    alpha: float = 32.0
    # Not supported: it has to stay 0.
    dropout: float = 0.0
    # Megatron's names: query, key and value; attention's output; gate and up; down.
    targets: list[Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]] = field(
        default_factory=lambda: ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    )


@dataclass
class ModelConfig:
    """What the decoder needs beyond Megatron's own `TransformerConfig`."""

    # Sizes by name (`config/presets`); empty for none, where every size is given.
    preset: str = "step-audio-32b"
    # A directory that `convert import` wrote, or a run: training starts from the weights of its newest checkpoint, with a new
    # optimizer; its sizes, encoder and tokenizer take the place of the preset's.
    weights: str = ""
    vocabulary_size: int = 158720
    max_positions: int = 65536
    rotary_base: float = 1e6
    tie_embeddings: bool = False
    # `auto`: Transformer Engine on a GPU when installed, else the torch layers.
    layers: Literal["auto", "torch", "te"] = "auto"
    # Patterns (fnmatch) of parameters that are not trained; one that matches nothing is an error. The encoder is always frozen.
    freeze: list[str] = field(default_factory=list)
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class TokenizerConfig:
    """Token ids: the Qwen vocabulary, or the subset of it that a corpus uses."""

    # Directory written by `data build` (compact vocabulary), with a `qwen.tiktoken`, or with Hugging Face's `tokenizer.json`.
    path: str = ""
    template: Literal["step-audio", "chatml"] = "step-audio"
    # Reasoning of earlier replies: `keep` it, or `strip` it, in training as in generation; see `data.turns`.
    earlier_reasoning: Literal["keep", "strip"] = "keep"


@dataclass
class SourceConfig:
    """One source of conversations in the mixture."""

    name: str = ""
    path: str = ""
    # Share of trained tokens relative to the other sources (equation 1 of the report).
    weight: float = 1.0


@dataclass
class DataConfig:
    """What is read, and how it is packed."""

    sources: list[SourceConfig] = field(default_factory=list)
    # Held-out sources whose loss is measured every `training.validation_interval` steps; empty measures none.
    validation: list[SourceConfig] = field(default_factory=list)
    # Micro-batch size: packed tokens, never exceeded.
    tokens_per_micro_batch: int = 4096
    # Assistant turns that are trained: all that a conversation does not except (`"train": false`), or the last of them.
    train_turns: Literal["all", "last"] = "all"
    # Conversations that these filters find (`data filter --help` lists them) are left out of training and validation.
    filters: list[str] = field(default_factory=list)
    # Audio index written by `data validate`; conversations name clips, the index knows their length and hash.
    index: str = ""
    # Share of the clips that may be unusable, and share of a source's samples that may be left out (longer than a micro-batch,
    # nothing to train), before a run stops.
    quarantine_limit: float = 0.01
    # Samples that the packer looks at together, a multiple of what one step needs.
    packing_window: int = 256


@dataclass
class AudioConfig:
    """Decoding and the encoded-audio cache."""

    # `auto`: cache on disk when more than one pass is asked for, else encode inside the step.
    cache: Literal["auto", "on", "off"] = "auto"
    cache_dir: str = ""
    cache_max_gib: float = 50.0
    # No clip of the index may be longer; `data validate --max-seconds` quarantines those that are.
    max_clip_seconds: float = 600.0
    # Rows of every matrix product in the encoder: one canonical shape, so that a clip's bits do not depend on its companions.
    encoder_block: int = 1024


@dataclass
class AnomalyConfig:
    """What becomes of a step whose loss or gradient norm is out of order: `step_megatron.training.anomalies`."""

    # `skip`: no update. `rewind`: back to the last checkpoint, leaving out the batches since then. `stop`: the run ends.
    action: Literal["skip", "rewind", "stop"] = "skip"
    # A loss (a gradient norm) above this multiple of its running median is out of order; 0: only one that is not finite.
    loss_factor: float = 0.0
    grad_norm_factor: float = 0.0
    # Steps that the running median is of; half of them have to be known before anything is held against it.
    window: int = 100
    # The run stops at so many in a row, whatever `action` says.
    max_in_a_row: int = 3


@dataclass
class TrainingConfig:
    """The step loop. Learning rate, weight decay and clipping are Megatron's (`megatron.optimizer`)."""

    steps: int = 1000
    # Passes over the data after which the run ends (some source has been passed so often): decides `steps` where it is not 0.
    epochs: float = 0.0
    # Micro-batches of one optimizer step over all data-parallel ranks.
    micro_batches_per_step: int = 8
    lr_warmup_steps: int = 0
    lr_schedule: Literal["cosine", "wsd", "constant", "linear"] = "cosine"
    # Steps of the final decay of `wsd`.
    wsd_decay_steps: int = 0
    # Steps between two checkpoints; 0 saves at the end only (and when the run is told to stop).
    save_interval: int = 0
    # Write checkpoints beside the training, from a copy in host memory (as large as the rank's part of one); off: stop for it.
    async_save: bool = True
    # Newest checkpoints that stay on disk; 0 keeps them all.
    keep_checkpoints: int = 0
    # Beside them, for good: those of every so many steps (0: none), and the one with the lowest validation loss.
    keep_checkpoint_every: int = 0
    keep_best_checkpoint: bool = False
    # When the newest checkpoint is damaged: set it aside and go on from the newest whole one, or refuse to go on.
    damaged_checkpoint: Literal["set-aside", "refuse"] = "set-aside"
    # Steps between two measurements of the validation loss; 0 measures at the end only.
    validation_interval: int = 0
    # Micro-batches of one measurement over all data-parallel ranks; the same ones each time.
    validation_micro_batches: int = 8
    # A rank that gives no sign for so long while the others wait for it is named with its stack, and the run ends with status 75;
    # 0 never. The slowest part of a step (a checkpoint, a measurement of the validation loss) has to take less.
    hang_timeout_seconds: float = 600.0
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)


@dataclass
class GenerationConfig:
    """The engine that generates: evaluation, chat and rollouts."""

    # Samples that are decoded together.
    rows: int = 64
    # Tokens that the key-value cache holds; what does not fit waits.
    cache_tokens: int = 65536
    # Longest prompt and reply together; 0: model.max_positions.
    max_length: int = 0
    # A prompt is read in chunks of so many tokens, and a pass over prompts reads about `prefill_tokens`, so that running samples
    # never wait long.
    prefill_chunk: int = 1024
    prefill_tokens: int = 8192
    # A sample's bits depend on nothing but its prompt, its seed and the weights: every product has `invariant_rows` rows.
    batch_invariant: bool = False
    invariant_rows: int = 32
    # On a GPU: replay decoding steps as CUDA graphs.
    cuda_graphs: bool = True


@dataclass
class MegatronConfig:
    """Fields of Megatron's own dataclasses, passed through."""

    transformer: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)


@dataclass
class RLConfig:
    """Reinforcement learning from judgments (3.3 of the report)."""

    # Files of prompts (`data/rl_prompts.py`), mixed by weight in numbers of prompts.
    prompts: list[SourceConfig] = field(default_factory=list)
    iterations: int = 100
    # Passes over an iteration's samples, and optimizer steps of a pass.
    epochs: int = 1
    mini_batches: int = 1
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    colocation: ColocationConfig = field(default_factory=ColocationConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    rewards: list[RewardConfig] = field(
        default_factory=lambda: [RewardConfig("preference", normalise=True), RewardConfig("rubric", normalise=True)]
    )


@dataclass
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    adaptor: AdaptorConfig = field(default_factory=AdaptorConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

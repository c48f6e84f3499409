"""Load a trained run for inference: its configuration, tokenizer, encoder and weights, in one process whatever layout trained it.

with loaded_run(run_dir, data_dir) as run:
    run.encode(addresses)
    texts = run.reply(conversations, max_new_tokens=96)
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from step_megatron.audio.address import parse_address
from step_megatron.audio.cache import EncodedClip
from step_megatron.audio.encode_once import EncodedAudio, open_encoded_audio
from step_megatron.audio.errors import AudioError
from step_megatron.audio.front_end import LogMelFrontEnd, split_chunks
from step_megatron.audio.index import INDEX_NAME, AudioIndex
from step_megatron.checkpoint.directory import latest_checkpoint
from step_megatron.checkpoint.distributed import load_model_weights
from step_megatron.config.load import for_one_process, load_config
from step_megatron.config.schema import Config
from step_megatron.data.schema import Conversation
from step_megatron.data.tokenizer import Tokenizer
from step_megatron.generation.engine import Engine
from step_megatron.generation.rendering import Rendering, prompt_of
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.model.audio_lm import AudioLanguageModel, build_model
from step_megatron.model.encoder import AudioEncoder, build_encoder
from step_megatron.runtime.device import Runtime, initialize, shutdown
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)


@contextmanager
def loaded_run(run_dir: Path, data_dir: Path | None = None) -> Iterator["TrainedRun"]:
    """A run's newest checkpoint, ready to answer; the runtime ends with the block.

    Args:
        run_dir: holds `config.yaml` and `checkpoints/`.
        data_dir: where addresses of clips start and where the audio index is; None if clips come as files only (`add_file`).

    Raises:
        FileNotFoundError: no run, no checkpoint or no audio index there; says what to do.
        ValueError: a damaged configuration or tokenizer.
        CheckpointError: weights that do not fit the configuration.
    """
    # The index takes a relative path from its own folder, a shell user means the current one.
    data_dir = data_dir and data_dir.absolute()
    config = for_one_process(_read_config(run_dir))
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{run_dir}: no checkpoint yet; `step-megatron train midtrain` writes one into the run's directory"
        )
    tokenizer = Tokenizer.load(config.tokenizer.path)
    runtime = initialize(config)
    try:
        if runtime.world_size > 1:
            raise ValueError("evaluation and chat run in one process: start them without torchrun")
        model = build_model(config)[0]
        load_model_weights(model, checkpoint)
        model.eval()
        encoder = build_encoder(config.encoder, config.audio.encoder_block, config.adaptor.compat, config.run.seed)
        encoder.to(runtime.device)
        front_end = LogMelFrontEnd(config.encoder.mels, runtime.device, runtime.threads, config.audio.max_clip_seconds)
        audio = None if data_dir is None else _encoded_audio(config, data_dir, encoder, runtime)
        logger.info("loaded %s", checkpoint)
        yield TrainedRun(config, tokenizer, model, encoder, front_end, audio, data_dir)
    finally:
        shutdown()


class TrainedRun:
    """A trained model with all that it takes to ask it something. Make it with `loaded_run`."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        model: AudioLanguageModel,
        encoder: AudioEncoder,
        front_end: LogMelFrontEnd,
        audio: EncodedAudio | None,
        data_dir: Path | None,
    ):
        self.config, self.tokenizer, self.model = config, tokenizer, model
        self.engine, self.rendering = Engine(model, config.generation), Rendering(tokenizer, config.tokenizer)
        self._encoder, self._front_end, self._audio, self._data_dir = encoder, front_end, audio, data_dir
        self._clips: dict[str, EncodedClip | None] = {}

    def encode(self, addresses: Sequence[str]) -> None:
        """Take clips of the data directory from the encoded-audio cache, encoding what it lacks.

        A clip that is quarantined or cannot be read is logged and has no features.

        Raises:
            ValueError: for clips that were never indexed; says how to index them.
        """
        places: dict[str, str] = {}
        for address in dict.fromkeys(addresses):
            if address in self._clips:
                continue
            place = str(parse_address(address, self._data_dir))
            if place in self._audio.index:
                places[place] = address
            elif reason := self._audio.index.reason(place):
                logger.warning("%s is quarantined (%s): its items fail", address, reason)
                self._clips[address] = None
            else:
                raise ValueError(f"{place} is not in the audio index; run `step-megatron data validate` over the data")
        self._audio.prepare(list(places))
        fetched = self._audio.fetch(list(places))
        self._clips |= {address: fetched[place] for place, address in places.items()}

    def add_file(self, path: Path) -> str:
        """Encode one audio file of any format; returns the address that names it in a conversation.

        Raises:
            AudioError: missing, damaged, silent about its format, too short for one token, or too long.
        """
        place = parse_address(str(path), Path.cwd())
        self._clips[str(path)] = self.encode_bytes(place.read(), place.name)
        return str(path)

    def encode_bytes(self, data: bytes, name: str) -> EncodedClip:
        """Encode an audio file's bytes, of any format; `name` is what an error calls it, errors as in `add_file`."""
        waveform = self._front_end.decode([data], [name])[0]
        if isinstance(waveform, AudioError):
            raise waveform
        chunks = split_chunks(waveform.waveform)
        if not chunks:
            raise AudioError("too-short", f"{name}: {len(waveform.waveform)} samples at 16 kHz are too short for one audio token")
        features = [part.to(torch.bfloat16).cpu() for part in self._encoder.encode(self._front_end.log_mel(chunks))]
        return EncodedClip(torch.cat(features), tuple(len(part) for part in features))

    def features(self, addresses: Sequence[str]) -> dict[str, torch.Tensor | None]:
        """Encoder output `[frames, width]` bfloat16 of clips already encoded; None for one that could not be read."""
        return {a: None if self._clips[a] is None else self._clips[a].features for a in addresses}

    def prompt(self, conversation: Conversation, clips: Mapping[str, EncodedClip] | None = None) -> Prompt:
        """What the model reads before its next turn, earlier reasoning as in training.

        Its clips by their addresses; None for those that were encoded before. All must be readable.
        """
        clips, tokens_out = self._clips if clips is None else clips, self.model.adaptor.tokens_out

        def clip_tokens(address: str) -> list[int]:
            return [tokens_out(frames) for frames in clips[address].chunk_frames]

        return prompt_of(self.rendering.sample(conversation, clip_tokens), clips)

    def reply(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], None] | None = None,
    ) -> list[str | None]:
        """Text of the next assistant turn of every conversation, as `Rendering.text`; None where a clip could not be read.

        `seed` is one for all, of which every conversation gets its own by its index, or one for each. `progress` is called with
        how many replies have ended since the last call.
        """
        readable = [i for i, c in enumerate(conversations) if all(self._clips[a] is not None for a in c.audio_addresses())]
        prompts = [self.prompt(conversations[i]) for i in readable]
        replies: list[str | None] = [None] * len(conversations)
        sampling = Sampling(temperature, max_new_tokens=max_new_tokens, stop_ids=self.rendering.stop_ids)
        if isinstance(seed, int):
            sampling = dataclasses.replace(sampling, seed=seed)
        else:
            sampling = [dataclasses.replace(sampling, seed=seed[i]) for i in readable]
        for i, generation in zip(readable, self.engine.generate(prompts, sampling, progress=progress), strict=True):
            replies[i] = self.rendering.text(generation)
        return replies


def _read_config(run_dir: Path) -> Config:
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --run names the directory of a run (for example runs/quickstart)")
    config = load_config(path)
    # A run of text alone names no encoder: it has not learnt to hear with any.
    config.encoder.weights = config.encoder.weights or "random"
    return config


def _encoded_audio(config: Config, data_dir: Path, encoder: AudioEncoder, runtime: Runtime) -> EncodedAudio:
    """The clips of a data directory, through the cache that training filled (`auto` is `on`: clips are used more than once)."""
    own = data_dir / INDEX_NAME
    index = AudioIndex.load(own if own.is_file() or not config.data.index else config.data.index)
    # A clip that fails is a failed item of the evaluation, counted in its results: it must not stop it.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, quarantine_limit=1.0))
    return open_encoded_audio(config, encoder, index, runtime, passes=2)

"""The clips of a run through the frozen encoder: `data encode` beforehand, or what a stage opens for its own sources."""

import dataclasses

import torch.distributed as dist

from step_megatron.audio.encode_once import EncodedAudio, Prepared, open_encoded_audio
from step_megatron.audio.index import AudioIndex
from step_megatron.config.load import ConfigError
from step_megatron.config.schema import Config
from step_megatron.data.loader import MixtureLoader
from step_megatron.model.encoder import build_encoder
from step_megatron.runtime.device import Runtime, initialize, shutdown


def encode(config: Config) -> Prepared:
    """Encode every clip of the audio index (all splits) into the cache, shared over the ranks; every rank calls this.

    Returns:
        How many clips were encoded and failed now.

    Raises:
        ConfigError: the recipe keeps no cache, so there is nowhere to put them, or names no index or encoder weights.
        QuarantineLimitExceeded: too many clips cannot be used.
    """
    if config.audio.cache == "off" or not config.data.index:
        raise ConfigError(
            "set audio.cache=on and data.index: clips are encoded beforehand into the cache, and the index lists them"
        )
    config = dataclasses.replace(config, audio=dataclasses.replace(config.audio, cache="on"))
    runtime = initialize(config)
    try:
        index = AudioIndex.load(config.data.index)
        return encoded_audio(config, runtime, index, passes=2).prepare([clip.address for clip in index])
    finally:
        shutdown()


def encoded_audio(config: Config, runtime: Runtime, index: AudioIndex, passes: float, clips: int | None = None) -> EncodedAudio:
    """The frozen encoder, with its cache if the run has one; arguments as `open_encoded_audio`."""
    encoder = build_encoder(config.encoder, config.audio.encoder_block, config.adaptor.compat, config.run.seed)
    return open_encoded_audio(config, encoder.to(runtime.device), index, runtime, passes, clips)


def clips_of(*loaders: MixtureLoader | None) -> list[str]:
    """Addresses of all clips of the loaders' sources, each once."""
    conversations = (
        loader.sources.conversation(source, row)
        for loader in loaders
        if loader is not None
        for source in range(len(loader.source_names))
        for row in range(loader.sources.size(source))
    )
    return list(dict.fromkeys(clip for conversation in conversations for clip in conversation.audio_addresses()))


def passes_over(config: Config, loader: MixtureLoader, validation: MixtureLoader | None) -> float:
    """About how often the run hears a clip, the same on every rank: clips of the first step times steps, over all clips.

    Validation hears the same clips at every measurement.
    """
    start = loader.state_dict()
    heard = sum(len({span.address for span in batch.audio}) for batch in loader.next_step()) * loader.dp_size
    loader.load_state_dict(start)
    passes = [heard * config.training.steps / max(1, loader.sources.clips)]
    if validation is not None and validation.sources.clips and config.training.validation_interval:
        passes.append(config.training.steps / config.training.validation_interval)
    passes = [max(passes)]
    dist.broadcast_object_list(passes)
    return passes[0]

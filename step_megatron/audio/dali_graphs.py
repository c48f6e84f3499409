"""The DALI pipelines of the front end; each is fed one batch at a time by `external_source`."""

from collections.abc import Callable

import torch

from step_megatron.audio.geometry import HOP_SAMPLES, SAMPLE_RATE
from step_megatron.audio.log_mel import WINDOW_SAMPLES, hann_window


def build_pipeline(kind: str, batch_clips: int, mels: int, device: torch.device, threads: int):
    """A built pipeline.

    Args:
        kind: `decode` (input `encoded`; outputs `[frames, channels]` and rate), `resample` (inputs `wave` and `rate`; output at
            16 kHz), or `log_mel` (input `wave`, padded on the right; output `[mels, frames]`).
        batch_clips: most clips in a batch.
        device: where `log_mel` runs; the others run on the CPU.
        threads: CPU threads.
    """
    from nvidia.dali import Pipeline

    on_gpu = kind == "log_mel" and device.type == "cuda"
    graphs: dict[str, Callable[[], tuple]] = {
        "decode": _decode,
        "resample": _resample,
        "log_mel": lambda: _log_mel(mels, on_gpu),
    }
    # One batch at a time: the caller needs the result of what it fed before it can go on.
    pipeline = Pipeline(
        batch_size=batch_clips, num_threads=threads, device_id=(device.index or 0) if on_gpu else None, prefetch_queue_depth=1
    )
    with pipeline:
        pipeline.set_outputs(*graphs[kind]())
    pipeline.build()
    return pipeline


def _decode() -> tuple:
    from nvidia.dali import fn, types

    return tuple(fn.decoders.audio(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1), dtype=types.FLOAT))


def _resample() -> tuple:
    from nvidia.dali import fn, types

    wave = fn.external_source(name="wave", dtype=types.FLOAT, ndim=1)
    rate = fn.external_source(name="rate", dtype=types.FLOAT, ndim=0)
    return (fn.audio_resample(wave, in_rate=rate, out_rate=float(SAMPLE_RATE)),)


def _log_mel(mels: int, on_gpu: bool) -> tuple:
    from nvidia.dali import fn, math, types

    wave = fn.external_source(name="wave", dtype=types.FLOAT, ndim=1)
    power = fn.spectrogram(
        wave.gpu() if on_gpu else wave,
        nfft=WINDOW_SAMPLES,
        window_length=WINDOW_SAMPLES,
        window_step=HOP_SAMPLES,
        window_fn=hann_window().tolist(),
        center_windows=True,
        reflect_padding=True,
        power=2,
    )
    mel = fn.mel_filter_bank(
        power,
        sample_rate=float(SAMPLE_RATE),
        nfilter=mels,
        freq_low=0.0,
        freq_high=SAMPLE_RATE / 2,
        mel_formula="slaney",
        normalize=True,
    )
    log = math.log10(math.max(mel[:, :-1], 1e-10))
    return ((math.max(log, fn.reductions.max(log) - 8.0) + 4.0) * 0.25,)

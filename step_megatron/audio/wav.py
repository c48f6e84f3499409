"""A clip of any format as a WAV file in memory, for those who understand nothing else: browsers, judges behind an API."""

import io
from pathlib import Path

import soundfile

from step_megatron.audio.address import parse_address
from step_megatron.audio.errors import AudioError
from step_megatron.audio.front_end import LogMelFrontEnd
from step_megatron.audio.geometry import SAMPLE_RATE


def wav_bytes(front_end: LogMelFrontEnd, root: Path, address: str) -> bytes:
    """16-bit mono WAV at 16 kHz, as the model hears the clip; a relative address starts at `root`.

    Raises:
        AudioError: it cannot be read.
    """
    place = parse_address(address, root)
    decoded = front_end.decode([place.read()], [place.name])[0]
    if isinstance(decoded, AudioError):
        raise decoded
    file = io.BytesIO()
    soundfile.write(file, decoded.waveform, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()

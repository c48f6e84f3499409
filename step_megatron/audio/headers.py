"""What an encoded clip says of itself, read from a few bytes: format, rate, channels, frames; and whether it is cut short.

A cut wav decodes short without a word, so its header is compared with the bytes that are there. Reading it here costs
microseconds; only formats that are rare in practice go through soundfile's own probe.
"""

import io
import struct
from dataclasses import dataclass

from step_megatron.audio.errors import AudioError

# Writers that cannot seek back (pipes) leave a data size of this or more: "until the end of the file".
_WAV_SIZE_UNKNOWN = 0x7FFF0000
# Codec numbers that libsndfile, and so DALI, reads: PCM, float, A-law, mu-law, extensible; ADPCM, GSM.
_WAV_PLAIN_CODECS = (1, 3, 6, 7, 0xFFFE)
_WAV_PACKED_CODECS = (2, 0x11, 0x31, 0x40)


@dataclass(frozen=True)
class AudioHeader:
    """What is known of a clip before decoding.

    Attributes:
        format: `wav`, `flac`, `ogg`, `g722`, or soundfile's name of the format in lower case; `unknown` is left to PyAV.
        rate: Hz, or None when the header does not say.
        channels: or None.
        frames: samples a channel at `rate`, or None where the header does not tell: then FFmpeg or DALI finds out.
    """

    format: str
    rate: int | None = None
    channels: int | None = None
    frames: int | None = None

    @property
    def seconds(self) -> float | None:
        """Duration, when the header tells it."""
        return self.frames / self.rate if self.frames is not None and self.rate else None


def read_header(data: bytes, name: str = "") -> AudioHeader:
    """Read a clip's header.

    Args:
        data: the encoded clip.
        name: file name; its extension tells raw g722, which has no header.

    Raises:
        AudioError: `empty`, `corrupt` (a damaged header), or `truncated` (fewer bytes than the header promises).
    """
    if not data:
        raise AudioError("empty", "0 bytes")
    if name.lower().endswith(".g722"):
        # 64 kbit/s: one byte is two samples at 16 kHz.
        return AudioHeader("g722", 16000, 1, 2 * len(data))
    try:
        if data[:4] in (b"RIFF", b"RF64", b"BW64") and data[8:12] == b"WAVE":
            return _read_wav(data)
        if data[:4] == b"fLaC":
            return _read_flac(data)
        if data[:4] == b"OggS":
            return _read_ogg(data)
        if data[:4] == b"FORM" and len(data) < 8 + struct.unpack_from(">I", data, 4)[0]:
            raise AudioError(
                "truncated", f"the AIFF header promises {8 + struct.unpack_from('>I', data, 4)[0]} bytes, {len(data)} are there"
            )
    except struct.error as error:
        raise AudioError("truncated", f"{len(data)} bytes end inside the header") from error
    return _read_by_soundfile(data)


def _read_wav(data: bytes) -> AudioHeader:
    position, rate, channels, block, pcm, long_size = 12, None, None, 0, False, None
    while position + 8 <= len(data):
        chunk, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        body = position + 8
        if chunk == b"ds64":
            long_size = struct.unpack_from("<Q", data, body + 8)[0]
        elif chunk == b"fmt ":
            code, channels, rate, _, block = struct.unpack_from("<HHIIH", data, body)
            if code not in _WAV_PLAIN_CODECS + _WAV_PACKED_CODECS:
                return AudioHeader("unknown")
            pcm = code in _WAV_PLAIN_CODECS
            if not (channels and rate and block):
                raise AudioError("corrupt", f"wav header with {channels} channels, {rate} Hz, {block} bytes a frame")
        elif chunk == b"data":
            if rate is None:
                raise AudioError("corrupt", "wav without a format chunk before its data")
            return _wav_data(
                len(data) - body, long_size if size == 0xFFFFFFFF and long_size else size, rate, channels, block if pcm else 0
            )
        position = body + size + (size & 1)
    raise AudioError("truncated", f"wav without a data chunk in its {len(data)} bytes")


def _wav_data(there: int, promised: int, rate: int, channels: int, block: int) -> AudioHeader:
    """Header of a wav whose data chunk promises `promised` bytes while `there` follow; `block` is 0 for compressed codecs."""
    if promised > there and promised < _WAV_SIZE_UNKNOWN:
        raise AudioError("truncated", f"the wav header promises {promised} bytes of samples, {there} are there")
    size = min(promised, there)
    if size < max(block, 1):
        raise AudioError("empty", "a wav without samples")
    return AudioHeader("wav", rate, channels, size // block if block else None)


def _read_flac(data: bytes) -> AudioHeader:
    packed = struct.unpack_from(">Q", data, 18)[0]
    rate, channels, frames = packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1
    if data[4] & 0x7F != 0 or rate == 0:
        raise AudioError("corrupt", "flac without a stream description")
    return AudioHeader("flac", rate, channels, frames or None)


def _read_ogg(data: bytes) -> AudioHeader:
    """Rate and channels from the first page; the last page must be whole and carry the end-of-stream mark."""
    last = data.rfind(b"OggS")
    if last + 27 > len(data):
        raise AudioError("truncated", f"{len(data)} bytes end inside the header of an ogg page")
    flags, granule, segments = data[last + 5], struct.unpack_from("<q", data, last + 6)[0], data[last + 26]
    size = 27 + segments + sum(data[last + 27 : last + 27 + segments])
    if last + size > len(data) or not flags & 4:
        raise AudioError("truncated", "the ogg stream stops before its end-of-stream page")
    packet = 27 + data[26]
    if data[packet : packet + 7] == b"\x01vorbis":
        channels, rate = struct.unpack_from("<BI", data, packet + 11)
        return AudioHeader("ogg", rate, channels, granule if granule > 0 else None)
    if data[packet : packet + 8] == b"OpusHead":
        channels, skip, rate = struct.unpack_from("<BHI", data, packet + 9)
        # Opus counts 48 kHz samples; libsndfile hands it out at the original rate where that is one of Opus' own.
        rate = rate if rate in (8000, 12000, 16000, 24000, 48000) else 48000
        return AudioHeader("ogg", rate, channels, (granule - skip) * rate // 48000 if granule > skip else None)
    return AudioHeader("ogg" if data[packet : packet + 5] == b"\x7fFLAC" else "unknown")


def _read_by_soundfile(data: bytes) -> AudioHeader:
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(data))
    except (RuntimeError, TypeError):
        return AudioHeader("unknown")
    # Without its length tag a VBR mp3's length is a guess that soundfile would cut the clip at; FFmpeg reads to the end.
    known = info.format != "MP3" or _has_length_tag(data)
    return AudioHeader(info.format.lower(), info.samplerate, info.channels, info.frames if known else None)


def _has_length_tag(data: bytes) -> bool:
    """Whether the first frame of an mp3, behind its ID3 tag, is one of the frames that tell the length."""
    first = 0
    if data[:3] == b"ID3":
        first = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    return any(tag in data[first : first + 200] for tag in (b"Xing", b"Info", b"VBRI"))

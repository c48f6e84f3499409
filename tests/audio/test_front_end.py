"""The front end: any format decodes right or fails alone, and its log-mel is Whisper's, to the bit the same in any batch."""

import io
import struct
from argparse import Namespace

import numpy as np
import pytest
import soundfile
import torch
from audio.audio_files import encoded, voice
from transformers import WhisperFeatureExtractor

from step_megatron.audio import front_end as front_end_module
from step_megatron.audio.errors import AudioError
from step_megatron.audio.front_end import LogMelFrontEnd, decoder_version, split_chunks
from step_megatron.audio.geometry import CHUNK_SAMPLES, chunk_frames, chunk_lengths
from step_megatron.audio.headers import AudioHeader, read_header
from step_megatron.benchmarks.front_end import run

TOLERANCE = 2e-4
# One sample; around the STFT's hop, half window and window; around the first tokens; a whole chunk.
LENGTHS = [1, 2, 159, 160, 161, 199, 200, 201, 320, 321, 399, 400, 401, 640, 1000, 16000, 16001, 50_000, 399_999, 400_000]


@pytest.fixture(scope="module")
def front_ends():
    return [LogMelFrontEnd(mels, threads=1, backend=backend) for mels in (80, 128) for backend in ("torch", "dali")]


@pytest.fixture(scope="module")
def front_end(front_ends):
    return front_ends[0]


def references(waveforms, mels):
    """transformers' features of clips padded to 30 s: what the network sees, and what is cut off."""
    extractor = WhisperFeatureExtractor(feature_size=mels)
    return [reference(extractor, waveform) for waveform in waveforms]


def reference(extractor, waveform):
    features = extractor(waveform, sampling_rate=16000, return_tensors="pt").input_features[0]
    return features[:, : chunk_frames(len(waveform)).network], features[:, chunk_frames(len(waveform)).network :]


def assert_whisper_features(front_ends, waveforms):
    expected_of = {mels: references(waveforms, mels) for mels in (80, 128)}
    for front_end in front_ends:
        for waveform, features, (expected, beyond) in zip(
            waveforms, front_end.log_mel(waveforms), expected_of[front_end.mels], strict=True
        ):
            assert features.shape == (front_end.mels, chunk_frames(len(waveform)).network)
            torch.testing.assert_close(features, expected, rtol=0, atol=TOLERANCE)
            # What is cut off is silence: one value everywhere.
            assert beyond.numel() == 0 or beyond.min() == beyond.max()


def test_features_equal_whispers_for_every_length_class(front_ends):
    sound = voice(25.0).astype(np.float32)
    assert_whisper_features(front_ends, [sound[:length] for length in LENGTHS])


def test_features_equal_whispers_for_hard_signals(front_ends):
    generator = np.random.default_rng(1)
    click = np.zeros(8000, np.float32)
    click[7999] = 1.0
    t = np.arange(32000)
    signals = {
        "one loud sample at the very end": click,
        "loud, then far below the floor": np.concatenate([voice(1.0), 1e-6 * voice(1.0)]),
        "a pure tone": np.sin(0.3 * t),
        "constant": np.ones(8000),
        "clipped noise": np.clip(generator.standard_normal(20000), -1, 1),
        "quieter than the clamp": 1e-7 * generator.standard_normal(20000),
        "full scale square": np.sign(np.sin(0.01 * t) + 0.1),
    }
    assert_whisper_features(front_ends, [signal.astype(np.float32) for signal in signals.values()])


def test_digital_silence_has_one_value(front_ends):
    for front_end in front_ends:
        (features,) = front_end.log_mel([np.zeros(5000, np.float32)])
        assert torch.equal(features, torch.full_like(features, -1.5))


def test_the_maximum_is_taken_per_chunk(front_ends):
    """A quiet second chunk is not floored by the loud first one: the released code cuts before it transforms."""
    clip = np.concatenate([voice(25.0), 1e-4 * voice(3.0)]).astype(np.float32)
    chunks = split_chunks(clip)
    assert [len(chunk) for chunk in chunks] == chunk_lengths(len(clip)) == [CHUNK_SAMPLES, 48000]
    assert_whisper_features(front_ends, chunks)


def test_companions_do_not_change_a_bit(front_ends):
    clips = [voice(seconds, seed=i).astype(np.float32) for i, seconds in enumerate([0.5, 3.0, 0.03, 1.7])]
    for front_end in front_ends:
        together = front_end.log_mel(clips)
        for clip, features in zip(clips, together, strict=True):
            assert torch.equal(front_end.log_mel([clip])[0], features)
        assert torch.equal(front_end.log_mel(clips[::-1] * 20)[0], together[-1])


def test_the_number_of_threads_does_not_change_a_bit():
    """Ranks of one node have fewer threads each the more there are, and share what they encode."""
    clip, before = voice(20.0).astype(np.float32), torch.get_num_threads()
    try:
        features = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            features.append(LogMelFrontEnd(128, threads=threads).log_mel([clip])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])


def test_chunks_that_are_none_are_refused(front_end):
    with pytest.raises(ValueError, match="empty chunk"):
        front_end.log_mel([np.zeros(0, np.float32)])
    with pytest.raises(ValueError, match="400000"):
        front_end.log_mel([np.zeros(CHUNK_SAMPLES + 1, np.float32)])


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_sample_width_is_read_exactly(front_end, subtype):
    data = encoded(voice(0.5), subtype=subtype)
    (clip,) = front_end.decode([data])
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    assert np.array_equal(clip.waveform, expected) and (clip.sample_rate, clip.channels, clip.format) == (16000, 1, "wav")


def test_integer_widths_are_scaled_as_their_definition_says(front_end):
    """Against numpy alone: n-bit integers over 2^(n-1), 8-bit ones offset by 128."""
    raw = {1: np.arange(256).astype("u1").tobytes(), 2: np.arange(-32768, 32768, 64).astype("<i2").tobytes()}
    values = np.arange(-(2**23), 2**23, 32768).astype("<i4")
    raw[3] = b"".join(value.tobytes()[:3] for value in values)
    expected = {1: (np.arange(256) - 128) / 128, 2: np.arange(-32768, 32768, 64) / 32768, 3: values / 2**23}
    for width, content in raw.items():
        header = struct.pack(
            "<4sI4s4sIHHIIHH4sI",
            b"RIFF",
            36 + len(content),
            b"WAVE",
            b"fmt ",
            16,
            1,
            1,
            16000,
            16000 * width,
            width,
            8 * width,
            b"data",
            len(content),
        )
        (clip,) = front_end.decode([header + content])
        assert np.array_equal(clip.waveform, expected[width].astype(np.float32)), width


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("FLAC", "PCM_24"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16"), ("MP3", None), ("CAF", "FLOAT")],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_containers_decode_to_their_first_channel(front_end, container, subtype, channels):
    data = encoded(voice(0.7, channels=channels), container=container, subtype=subtype)
    (clip,) = front_end.decode([data])
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    assert rate == 16000 and clip.channels == channels
    np.testing.assert_allclose(clip.waveform, expected[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("container", "rate"),
    [("WAV", rate) for rate in (8000, 11025, 22050, 44100, 48000, 96000)] + [("MP3", rate) for rate in (8000, 32000, 44100)],
)
def test_other_rates_are_resampled(front_end, rate, container):
    """Against the closed form: the same two tones sampled at 16 kHz."""

    def tones(sample_rate):
        t = np.arange(sample_rate) / sample_rate
        return 0.3 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * 1234.5 * t)

    data = encoded(np.stack([tones(rate), np.zeros(rate)], 1), rate, container)
    (clip,) = front_end.decode([data])
    assert clip.sample_rate == rate and clip.channels == 2 and abs(len(clip.waveform) - 16000) <= 1
    interior = slice(1600, -1600)
    error = clip.waveform[interior] - tones(16000)[interior]
    # A lossy codec is held to a signal-to-noise ratio of 20 dB: right tones at the right time.
    assert np.abs(error).max() < (1e-3 if container == "WAV" else 0.1)
    assert np.square(error).mean() < 0.01 * np.square(tones(16000)).mean()


@pytest.mark.parametrize("container", ["WAV", "MP3"])
def test_sound_on_the_right_only_is_heard(front_end, container):
    sound = voice(0.7, channels=2)
    sound[:, 0] = 0
    data = encoded(sound, container=container)
    (clip,) = front_end.decode([data])
    np.testing.assert_allclose(clip.waveform, soundfile.read(io.BytesIO(data))[0][:, 1], atol=1e-6)


def test_vbr_mp3_without_length_tag_is_read_to_its_end(front_end):
    """Its length is a guess (a third of the truth here), at which soundfile would stop without a word."""
    sound = np.concatenate([voice(4.0), np.zeros(64000), 0.3 * np.random.default_rng(0).standard_normal(64000)])
    file = io.BytesIO()
    soundfile.write(file, sound, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    data = file.getvalue()
    tagless = data[data.find(data[:2], 4) :]
    assert soundfile.info(io.BytesIO(tagless)).frames < 0.5 * len(sound)
    (clip,) = front_end.decode([tagless])
    assert abs(len(clip.waveform) - len(sound)) < 3000 and np.abs(clip.waveform[-48000:]).mean() > 0.1


def test_g722_and_aac_are_read_by_ffmpeg(front_end):
    sound = voice(1.0)
    raw, aac = compressed_by_ffmpeg(sound, "g722", "g722"), compressed_by_ffmpeg(sound, "aac", "mp4")
    g722_clip, aac_clip = front_end.decode([raw, aac], ["greeting.g722", "x.m4a"])
    assert len(g722_clip.waveform) == 2 * len(raw) and g722_clip.format == "g722"
    for clip in (g722_clip, aac_clip):
        shift = int(np.argmax(np.correlate(clip.waveform, sound[2000:14000], "valid"))) - 2000
        heard = clip.waveform[2000 + shift : 14000 + shift]
        assert abs(shift) < 2500 and np.corrcoef(heard, sound[2000:14000])[0, 1] > 0.97


def compressed_by_ffmpeg(sound, codec, container):
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray((sound * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return file.getvalue()


def damaged_clips():
    """name -> (bytes, kind of failure, words of the reason)"""
    good, flac, ogg = encoded(voice(1.0)), encoded(voice(1.0), container="FLAC"), encoded(voice(1.0), container="OGG")
    mp3, aiff = encoded(voice(3.0), container="MP3"), encoded(voice(1.0), container="AIFF")
    not_finite = voice(1.0)
    not_finite[500] = np.nan
    flipped = bytearray(flac)
    flipped[len(flac) // 2 :] = bytes(len(flac) - len(flac) // 2)
    foreign = good[:20] + struct.pack("<H", 0x1234) + good[22:]
    no_data = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36, b"WAVE", b"fmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", 0)
    return {
        "empty": (b"", "empty", "0 bytes"),
        "cut wav": (good[: len(good) // 2], "truncated", "promises 32000 bytes"),
        "cut wav header": (good[:30], "truncated", "data chunk|header"),
        "wav without samples": (no_data, "empty", "without samples"),
        "wav with 0 channels": (good[:22] + b"\0\0" + good[24:], "corrupt", "0 channels"),
        "wav of an unknown codec": (foreign, "corrupt", "unknown codec"),
        "text": (b"once upon a time" * 100, "corrupt", "not audio"),
        "zeros": (bytes(5000), "corrupt", "not audio"),
        "cut flac": (flac[: len(flac) // 2], "corrupt", "samples"),
        "flac with zeros inside": (bytes(flipped), "corrupt", ""),
        "cut ogg": (ogg[: len(ogg) // 2], "truncated", "end-of-stream"),
        "cut mp3": (mp3[: len(mp3) // 2], "truncated", "promises"),
        "cut aiff": (aiff[: len(aiff) // 2], "truncated", "AIFF"),
        "not a number": (encoded(not_finite, subtype="FLOAT"), "corrupt", "finite"),
        "too long": (encoded(np.zeros(16000 * 31), subtype="PCM_U8"), "too-long", "31.0 s; the limit is 30 s"),
    }


def test_damaged_clips_fail_alone_and_leave_the_others_alone():
    front_end = LogMelFrontEnd(80, max_seconds=30.0)
    bad = damaged_clips()
    good = [encoded(voice(0.3 + 0.1 * i, seed=i)) for i in range(len(bad))]
    mixed = [clip for pair in zip(good, (data for data, _, _ in bad.values()), strict=True) for clip in pair]
    for _ in range(2):
        outcomes = front_end.decode(mixed)
        for outcome, data in zip(outcomes[::2], good, strict=True):
            assert np.array_equal(outcome.waveform, soundfile.read(io.BytesIO(data), dtype="float32")[0])
        for (name, (_, kind, words)), outcome in zip(bad.items(), outcomes[1::2], strict=True):
            assert isinstance(outcome, AudioError), name
            assert outcome.kind == kind, (name, str(outcome))
            pytest.raises(AudioError, _throw, outcome).match(words)


def _throw(error):
    raise error


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", None), ("WAV", "PCM_16"), ("RF64", "PCM_16"), ("MP3", None)],
)
def test_a_clip_cut_anywhere_has_its_header_or_an_error(container, subtype):
    """`unknown` is no header: other decoders are asked, and refuse."""
    data = encoded(voice(0.1), container=container, subtype=subtype)
    whole = read_header(data)
    for size in range(len(data)):
        try:
            header = read_header(data[:size])
        except AudioError as error:
            assert error.kind in ("empty", "truncated"), size
        else:
            assert header in (whole, AudioHeader("unknown")), size


def test_g722_cut_anywhere_has_two_samples_a_byte():
    assert [read_header(bytes(size), "a.g722").frames for size in (1, 2, 99)] == [2, 4, 198]


def test_a_clip_that_cannot_be_resampled_fails_alone(monkeypatch):
    front_end = LogMelFrontEnd(80)
    run_pipeline = front_end._run

    def run(kind, **inputs):
        if kind == "resample" and any(rate == 11025 for rate in inputs["rate"]):
            raise RuntimeError("Assert on resampling failed")
        return run_pipeline(kind, **inputs)

    monkeypatch.setattr(front_end, "_run", run)
    good, bad, other = front_end.decode([encoded(voice(0.5, rate), rate) for rate in (8000, 11025, 44100)])
    assert (bad.kind, bad.detail) == ("corrupt", "Assert on resampling failed")
    assert abs(len(good.waveform) - 8000) <= 1 and abs(len(other.waveform) - 8000) <= 1


def test_a_decoder_of_another_version_is_another_decoder(monkeypatch):
    versions = {"nvidia-dali-cuda130": "1", "av": "1"}
    monkeypatch.setattr(front_end_module.importlib.metadata, "version", lambda name: versions[name])
    seen = [decoder_version.__wrapped__()]
    for package in versions:
        versions[package] = "2"
        seen.append(decoder_version.__wrapped__())
    for name in ("__version__", "__libsndfile_version__"):
        monkeypatch.setattr(soundfile, name, "another")
        seen.append(decoder_version.__wrapped__())
    assert len(set(seen)) == 5


def test_a_wav_from_a_pipe_has_no_size_and_is_read_to_its_end(front_end):
    data = bytearray(encoded(voice(0.5), subtype="PCM_16"))
    place = data.find(b"data") + 4
    for unknown in (0xFFFFFFFF, 0x7FFFFFFF):
        data[place : place + 4] = struct.pack("<I", unknown)
        (clip,) = front_end.decode([bytes(data)])
        assert len(clip.waveform) == 8000


def test_rf64_is_read(front_end):
    data = encoded(voice(0.5), container="RF64", subtype="PCM_16")
    assert len(front_end.decode([data])[0].waveform) == 8000
    assert front_end.decode([data[:-100]])[0].kind == "truncated"


def test_real_clips_have_whispers_features(front_ends, step_data):
    """Real speech of the fetched data: spread over its lengths, decoded and transformed."""
    files = sorted((step_data / "open-speech" / "audio").rglob("*.*"), key=lambda file: (file.stat().st_size, file.name))
    if not files:
        pytest.skip("no open-speech data; `step-megatron data fetch` and `data build` make it")
    chosen = files[:: max(1, len(files) // 12)]
    clips = front_ends[0].decode([file.read_bytes() for file in chosen], [file.name for file in chosen])
    chunks = [chunk for clip in clips for chunk in split_chunks(clip.waveform)]
    assert len(chunks) >= len(chosen)
    assert_whisper_features(front_ends, chunks)


def test_the_benchmark_gives_its_figures(tmp_path):
    result = run(Namespace(data=tmp_path, repeats=1, clips=2))
    assert result["name"] == "front-end" and result["source"] == "synthetic"
    assert 0 < result["low"] <= result["ratio"] <= result["high"] and result["ratio_unpadded"] > 0

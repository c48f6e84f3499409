"""whisper-base's weights as transformers' model: it writes down real prompts, and its rates are formed as the model's are."""

from pathlib import Path

import pytest

from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.evaluation.tasks import to_item
from step_megatron.evaluation.whisper import whisper_rates


def item(data: Path, language: str, speaker: str, key: str, text: str):
    file = data / f"sources/asterisk-{language}/usr/share/asterisk/sounds/{speaker}/{key}.g722"
    if not file.is_file():
        pytest.skip(f"{file} is not there: run `step-megatron data fetch --group tests`")
    question = Turn("human", (Audio(str(file)), Text("What is said?")))
    meta = {"task": "transcription", "answer": text, "language": language}
    return to_item(Conversation(key, "asterisk", (question, Turn("assistant", (Text(text),))), meta), "test")


def test_it_transcribes_prompts_in_two_languages(step_data):
    weights = step_data / "whisper-base"
    if not (weights / "model.bin").is_file():
        pytest.skip(f"{weights} is not there: run `step-megatron data fetch`")
    items = [
        item(step_data, "en", "en_US_f_Allison", "conf-getpin", "Please enter the conference pin number."),
        item(step_data, "es", "es_MX_f_Allison", "conf-enteringno", "Entrando a la conferencia numero"),
    ]
    rates = whisper_rates(weights, items, step_data)
    assert (rates["name"], rates["n"], rates["failed"]) == ("whisper-base", 2, 0)
    assert rates["languages"]["en"]["wer"] == 0
    # It writes the accent of "número", which the reference lacks.
    assert rates["languages"]["es"]["wer"] <= 0.2
    with pytest.raises(ValueError, match="no transcription item with a meta.language"):
        whisper_rates(weights, [], step_data)

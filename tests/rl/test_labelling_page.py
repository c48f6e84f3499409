"""The labelling page in a real browser: a person's clicks become preference records, blind, and texts stay texts."""

import io
import threading

import numpy as np
import pytest
import soundfile
from support.browser import browser, driver

from step_megatron.data.preferences import Preference, read_preferences, write_preferences
from step_megatron.data.schema import Audio, Text, Turn
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.labelling import Labelling, serve

pytestmark = pytest.mark.skipif(driver() is None, reason="no ChromeDriver; apt-get install chromium chromium-driver")

HOSTILE = "<img src=x onerror=\"document.title='stolen'\"> </script><b>bold</b>"
HISTORY = (Turn("human", (Audio("a.wav"), Text(HOSTILE))), Turn("assistant", (Text("So."),)), Turn("human", (Text("And?"),)))
SECONDS = 0.5


def wav(address: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(np.arange(int(16000 * SECONDS)) / 10), 16000, format="WAV")
    return buffer.getvalue()


@pytest.fixture
def page(tmp_path):
    """Address of the page over three pairs, the first with a criterion, and the file of what was said."""
    records = [
        Preference(f"p{i}", "policy", HISTORY, f"{HOSTILE} mine", "theirs", "sft", ("Is kind.",) if i == 0 else ())
        for i in range(3)
    ]
    write_preferences(tmp_path / "pairs.jsonl", records)
    out = tmp_path / "labelled.jsonl"
    server, address = serve(Labelling(tmp_path / "pairs.jsonl", out, Scale(), "ann"), wav)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield address, out
    server.shutdown()
    server.server_close()


def test_clicks_become_records(page, tmp_path):
    address, out = page
    shown = {}
    with browser(tmp_path) as tab:
        tab.open(address)
        # Heard: the clip is fetched and has its length.
        length = "const clip = document.querySelector('audio'); clip.onloadedmetadata = () => done(clip.duration); clip.load();"
        assert tab.run(length) == pytest.approx(SECONDS, abs=0.01)
        assert tab.text("#history .turn").endswith(HOSTILE) and tab.run("done(document.title)") == "Which reply is better?"
        # A verdict without a level for the criterion is not sent.
        tab.click("input[name=overall][value='2']")
        tab.click("button[type=submit]")
        assert tab.text("#progress") == "0 of 3 done" and not out.exists()
        shown["p0"] = tab.text("#first")
        tab.click("input[name=rubric0][value='1']")
        tab.type("#reasoning", "Reply A is kind.")
        tab.click("button[type=submit]")
        # The next pair, with a form that has forgotten the last one, is put off: p2 comes first, then p1 again.
        tab.wait("pair.id === 'p1'")
        assert tab.text("#progress") == "1 of 3 done"
        assert tab.run("done([reasoning.value, document.querySelectorAll(':checked, [name=rubric0]').length])") == ["", 0]
        tab.click("#skip")
        for name in ("p2", "p1"):
            tab.wait(f"pair.id === '{name}'")
            shown[name] = tab.text("#first")
            tab.click("input[name=overall][value='-1']")
            tab.click("button[type=submit]")
        tab.wait("pair === null")
        assert tab.text("#progress") == "3 of 3 done; thank you, there is nothing left to label."
        assert tab.text("#pair") == "", "the form has to be hidden"
        # Nobody else's page is answered.
        tab.open(address.partition("?")[0] + "?token=wrong")
        assert "open the address that the command has printed" in tab.text("body")
    records = read_preferences(out)
    assert [record.id for record in records] == ["p0", "p2", "p1"]
    for record, level in zip(records, (2, -1, -1), strict=True):
        first_is_response = shown[record.id] == record.response
        assert record.verdict.overall == (level if first_is_response else -level)
    assert records[0].reasoning == ("{response}" if shown["p0"] == records[0].response else "{reference}") + " is kind."

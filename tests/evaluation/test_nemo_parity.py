"""Word and character error rates equal NeMo's, where NeMo is installed (`pip install '.[nemo]'`)."""

import pytest

from step_megatron.evaluation.scoring import normalise_transcript, score_transcripts

PAIRS = [
    ("please leave a message", "please leave message"),
    ("Нажмите один", "нажмите, один!"),
    ("per favore attenda in linea", "favore per attendere"),
    ("uno", "uno due tre quattro"),
    ("quitter la conférence", ""),
]


@pytest.mark.parametrize("use_cer", [False, True])
def test_rates_equal_nemos(use_cer):
    wer = pytest.importorskip("nemo.collections.asr.metrics.wer", reason="NeMo is an extra")
    references = [normalise_transcript(reference) for reference, _ in PAIRS]
    hypotheses = [normalise_transcript(hypothesis) for _, hypothesis in PAIRS]
    expected = wer.word_error_rate(hypotheses=hypotheses, references=references, use_cer=use_cer)
    scores = score_transcripts([r for r, _ in PAIRS], [f"</think>\n{h}" for _, h in PAIRS])
    assert scores["cer" if use_cer else "wer"] == pytest.approx(expected, abs=1e-12)

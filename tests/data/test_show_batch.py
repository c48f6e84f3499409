"""The page of a packed batch: each token once, coloured by the mask, audio and padding as spans, nothing from outside."""

import re
from html.parser import HTMLParser

import pytest

from step_megatron.data.aspects import LossGroup
from step_megatron.data.loader import MixtureLoader
from step_megatron.data.micro_batch import Padding, assemble
from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.data.show_batch import render_page
from step_megatron.data.template import render


class Spans(HTMLParser):
    """Class, title and text of every span in a token row; every address that the page refers to."""

    def __init__(self, page: str):
        super().__init__()
        self.spans: list[list[str]] = []
        self.inside, self.outside_references = False, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.outside_references += [value for name, value in attributes if name in ("src", "href")]
        if tag == "div":
            self.inside = given.get("class") == "row"
        if tag == "span" and self.inside:
            self.spans.append([given.get("class", ""), given.get("title", ""), ""])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "div"

    def handle_data(self, data):
        if self.inside and self.spans:
            self.spans[-1][2] += data


@pytest.fixture
def batch(config, compact, data_set):
    config.megatron.transformer = {"context_parallel_size": 4}
    return MixtureLoader(config, compact, data_set.index).next_step()[0]


def test_every_position_is_shown_once_with_its_mask(batch, compact):
    spans = Spans(render_page(batch, compact, "title")).spans
    coloured, covered = set(), []
    for kind, title, _ in spans:
        numbers = [int(number) for number in re.findall(r"positions? (\d+)(?: to (\d+))?", title)[0] if number]
        covered += range(numbers[0], numbers[-1] + 1)
        if "t" in kind.split():
            coloured.add(numbers[0])
    assert covered == list(range(batch.tokens.shape[1]))
    # A position's colour says that it is predicted, which is the mask one position earlier.
    assert coloured == {t + 1 for t in range(batch.tokens.shape[1]) if batch.loss_mask[0, t]}


def test_audio_and_padding_are_one_span_each(batch, compact):
    spans = Spans(render_page(batch, compact, "title")).spans
    chunks = [text for kind, _, text in spans if kind == "a"]
    assert chunks == [
        f"{span.address}, chunk {span.chunk}: {span.tokens} placeholders, {frames} frames"
        for span, frames in zip(batch.audio, batch.encoder_frames, strict=True)
    ]
    assert sum(int(text.split()[-1]) for kind, _, text in spans if kind == "p") == batch.padding > 0


def test_facts_of_the_batch_are_on_the_page(batch, compact):
    page = render_page(batch, compact, "step 3, rank 1")
    assert "<title>step 3, rank 1</title>" in page
    assert str(batch.cu_seqlens.tolist()) in page
    assert all(name in page for name in (*batch.sample_ids, *(group.source for group in batch.groups)))
    assert f"{int(batch.loss_mask.sum()):,} trained" in page and f"{batch.padding:,} padding" in page


def test_page_is_self_contained_and_text_is_escaped(full):
    hostile = "<script>alert(1)</script>\n\x07"
    conversation = Conversation(
        hostile, "s", (Turn("human", (Audio("<b>.wav"), Text(hostile))), Turn("assistant", (Text("你"),)))
    )
    sample = render(conversation, full, lambda address: [3])
    frames = [type("Frames", (), {"encoder": 5})]
    batch = assemble([sample], [LossGroup("s")], lambda address: frames, Padding(), full.pad_id)
    page = render_page(batch, full, hostile)
    assert "<script" not in page and "<b>" not in page
    parsed = Spans(page)
    assert parsed.outside_references == [] and "http" not in page and "@import" not in page
    assert "<07>" in "".join(text for _, _, text in parsed.spans)

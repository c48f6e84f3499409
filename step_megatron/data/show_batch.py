"""One packed micro-batch as one self-contained HTML page: what the model reads, what it is trained on, what is padding."""

import html
from collections.abc import Iterator
from pathlib import Path

from step_megatron.config.schema import Config
from step_megatron.data.loader import MixtureLoader
from step_megatron.data.micro_batch import MicroBatch
from step_megatron.data.template import AudioSpan
from step_megatron.data.tokenizer import Tokenizer

_STYLE = """
:root { --ink: #1c2430; --quiet: #5c6675; --line: #d5dae1; --paper: #fff; --shade: #f4f6f8;
  --target: #cfe3ff; --edge: #1f5fbf; --audio: #ffe8c7; --audio-edge: #b36b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --quiet: #9aa4b2; --line: #3a4350; --paper: #14181e;
  --shade: #1d232b; --target: #17406f; --edge: #7db4ff; --audio: #4a3413; --audio-edge: #e0a54a; } }
body { margin: 2rem auto; padding: 0 1rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin-bottom: 0; }
h2 { font-size: 1rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; color: var(--quiet); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; }
th { font-weight: 600; color: var(--quiet); }
th.n, td.n { text-align: right; }
code, .row { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
.row { padding: .7rem; background: var(--shade); border-radius: 6px; line-height: 1.9; }
.row .t, .key .t { background: var(--target); border-bottom: 2px solid var(--edge); }
.row .s, .key .s { border: 1px solid var(--quiet); border-radius: 3px; padding: 0 .2rem; margin: 0 .1rem; }
.row .a, .key .a { background: var(--audio); border: 1px solid var(--audio-edge); border-radius: 3px; padding: 0 .4rem; }
.row .p, .key .p { border: 1px dashed var(--quiet); color: var(--quiet); border-radius: 3px; padding: 0 .4rem; }
.row .w { color: var(--quiet); }
p.key span { margin-right: 1rem; padding: .1rem .4rem; }
"""
_KEY = (
    '<span class="t">trained: the model must predict it</span><span>context</span><span class="s">special</span>'
    '<span class="a">audio chunk</span><span class="p">padding</span>'
)
_COLUMNS = ("", "sample", "source", "aspect", "start", "tokens", "trained", "audio chunks", "padding")


def write_page(config: Config, path: str | Path, step: int = 0, micro_batch: int = 0, rank: int = 0, ranks: int = 1) -> Path:
    """Write the page of a micro-batch as training would make it.

    Args:
        config: a run's; its tokenizer, sources and audio index are read.
        step, micro_batch: which, from 0.
        rank, ranks: data-parallel rank, and how many there are.

    Raises:
        ValueError: there is no such micro-batch in a step.
    """
    from step_megatron.audio.index import AudioIndex

    tokenizer = Tokenizer.load(config.tokenizer.path)
    index = AudioIndex.load(config.data.index) if config.data.index else None
    loader = MixtureLoader(config, tokenizer, index, rank, ranks)
    for _ in range(step):
        loader.next_step()
    batches = loader.next_step()
    if not 0 <= micro_batch < len(batches):
        raise ValueError(f"a step has {len(batches)} micro-batches on each rank; there is no number {micro_batch}")
    title = f"Step {step}, micro-batch {micro_batch} of {len(batches)}, data-parallel rank {rank} of {ranks}"
    path = Path(path)
    path.write_text(render_page(batches[micro_batch], tokenizer, title), encoding="utf-8")
    return path


def render_page(micro_batch: MicroBatch, tokenizer: Tokenizer, title: str) -> str:
    """The page as HTML; it needs no other file and no network.

    Args:
        title: which micro-batch this is (step, number, rank).
    """
    total = micro_batch.tokens.shape[1]
    trained = int(micro_batch.loss_mask.sum())
    audio = len(micro_batch.audio_positions)
    facts = (
        f"{total:,} positions in {len(micro_batch.segment_lengths)} segments: {trained:,} trained ({trained / total:.1%}), "
        f"{audio:,} audio placeholders in {len(micro_batch.audio)} chunks, {micro_batch.padding:,} padding "
        f"({micro_batch.padding / total:.1%})."
    )
    segments = [_Segment(micro_batch, tokenizer, i) for i in range(len(micro_batch.segment_lengths))]
    body = [
        f"<h1>{html.escape(title)}</h1><p>{facts}</p>",
        f'<div class="scroll">{_overview(segments)}</div>',
        f"<p>cu_seqlens <code>{micro_batch.cu_seqlens.tolist()}</code></p>",
        f'<p class="key">{_KEY}</p>',
        *(segment.html() for segment in segments),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


class _Segment:
    """One segment of the row, on its way to HTML."""

    def __init__(self, micro_batch: MicroBatch, tokenizer: Tokenizer, number: int):
        self.tokenizer, self.number = tokenizer, number
        self.start, self.end = micro_batch.cu_seqlens[number : number + 2].tolist()
        self.name, self.group = micro_batch.sample_ids[number], micro_batch.groups[number]
        self.ids = micro_batch.tokens[0, self.start : self.end].tolist()
        # The mask is on the position that predicts; a page shows what is predicted.
        mask = micro_batch.loss_mask[0, self.start : self.end].tolist()
        self.target = [False, *(value > 0 for value in mask[:-1])]
        self.trained = int(sum(mask))
        self.tokens = len(self.ids)
        while self.tokens and self.ids[self.tokens - 1] == tokenizer.pad_id:
            self.tokens -= 1
        frames = zip(micro_batch.audio, micro_batch.encoder_frames, strict=True)
        self.audio = {span.start - self.start: (span, n) for span, n in frames if self.start <= span.start < self.end}

    def html(self) -> str:
        heading = f"{self.number}: {html.escape(self.name)} <code>{html.escape(str(self.group))}</code>"
        return f'<h2>{heading}</h2><div class="row">{"".join(self._pieces())}</div>'

    def _pieces(self) -> Iterator[str]:
        position = 0
        while position < self.tokens:
            if position in self.audio:
                span, frames = self.audio[position]
                yield self._chunk(span, frames)
                position += span.tokens
            else:
                yield self._token(position)
                position += 1
        if self.tokens < len(self.ids):
            where = f"positions {self.start + self.tokens} to {self.end - 1}"
            yield f'<span class="p" title="{where}">padding x {len(self.ids) - self.tokens}</span>'

    def _chunk(self, span: AudioSpan, frames: int) -> str:
        where = f"positions {span.start} to {span.start + span.tokens - 1}"
        label = f"{span.address}, chunk {span.chunk}: {span.tokens} placeholders, {frames} frames"
        return f'<span class="a" title="{where}">{html.escape(label)}</span>'

    def _token(self, position: int) -> str:
        number = self.ids[position]
        special = number in self.tokenizer.specials.values()
        kinds = " ".join(kind for kind, holds in (("t", self.target[position]), ("s", special)) if holds)
        where = f"position {self.start + position}, id {number}"
        return f'<span class="{kinds}" title="{where}">{_visible(self.tokenizer.token_bytes(number))}</span>'


def _visible(data: bytes) -> str:
    """A token's bytes as HTML in which white space and parts of characters can be seen."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "".join(f"&lt;{byte:02X}&gt;" for byte in data)
    marks = {" ": '<i class="w">&middot;</i>', "\n": '<i class="w">&#9166;</i><br>', "\t": '<i class="w">&rarr;</i>'}
    return "".join(marks.get(c, html.escape(c) if c.isprintable() else f"&lt;{ord(c):02X}&gt;") for c in text)


def _overview(segments: list[_Segment]) -> str:
    """The table of segments."""
    rows = []
    for s in segments:
        counts = (s.start, s.tokens, s.trained, len(s.audio), len(s.ids) - s.tokens)
        cells = (s.number, s.name, s.group.source, s.group.aspect, *counts)
        rows.append("".join(f"<td{_number(cell)}>{html.escape(str(cell))}</td>" for cell in cells))
    # A heading stands as its column does: right for numbers.
    head = "".join(f"<th{_number(cell)}>{name}</th>" for name, cell in zip(_COLUMNS, cells, strict=True))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table>"


def _number(cell: str | int) -> str:
    return ' class="n"' if isinstance(cell, int) else ""

"""The report's HTML: one self-contained page from plain values. `report.py` collects the values.

No script, no font, no address outside the file; clips are `data:` URIs. Colours are CSS variables with a light and a dark set.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from step_megatron.evaluation.charts import Bar, bar_panel

STYLE = """
:root{color-scheme:light dark;--font:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;--page:#f6f7f9;--card:#fff;
  --ink:#1b2430;--faint:#5c6775;--grid:#e3e7ec;--edge:#dde2e8;--model:#1f6feb;--probe:#2a9d8f;--other:#e08a1e;
  --plain:#a3adb8;--good:#1a7f4b;--bad:#b3372f;--second:#8250df}
@media (prefers-color-scheme:dark){:root{--page:#0f141a;--card:#171e26;--ink:#e4e9ef;--faint:#97a3b0;--grid:#29323c;
  --edge:#2a343f;--model:#5b9dff;--probe:#4cc3b3;--other:#f0a544;--plain:#66717d;--good:#56c98a;--bad:#f08a80;
  --second:#b48cff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 var(--font)}
main{max-width:1180px;margin:0 auto;padding:28px 16px 60px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}
h2{font-size:19px;margin:40px 0 6px}
h3{font-size:15px;margin:0 0 6px}
p{margin:6px 0 12px;max-width:78ch}
.sub{color:var(--faint)}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px;min-width:0}
.tiles{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));margin:20px 0 0}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{color:var(--faint);font-size:13px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--ink);font:12px var(--font)}
svg .t{font-weight:600;font-size:14px}
svg .u,svg .l{fill:var(--faint)}
svg .u{font-weight:400;font-size:12px}
svg .v{font-weight:600}
svg .g{stroke:var(--grid);stroke-width:1}
svg .c{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
svg .w{fill:none;stroke:var(--ink);stroke-width:1.2}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th{color:var(--faint);font-weight:600;text-align:right;padding:6px 8px;border-bottom:1px solid var(--edge);
  white-space:nowrap}
td{text-align:right;padding:6px 8px;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
.key{display:flex;flex-wrap:wrap;gap:6px 18px;font-size:13.5px;margin:0 0 12px;padding:0;list-style:none}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
audio{width:100%;height:34px;margin:2px 0 8px}
dl{display:grid;grid-template-columns:auto 1fr;gap:2px 10px;margin:0;font-size:14px}
dt{color:var(--faint)}
dd{margin:0;overflow-wrap:anywhere}
.good{color:var(--good)}
.bad{color:var(--bad)}
.tag{float:right;font-size:12.5px;font-weight:600}
details{margin:10px 0}
summary{cursor:pointer;color:var(--faint)}
pre{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px;overflow-x:auto;font-size:12.5px;
  line-height:1.45}
li{margin:4px 0;max-width:78ch}
.bar{height:10px;border-radius:3px;background:var(--model);min-width:2px}
.stage{width:55%}
""".strip()


@dataclass(frozen=True)
class Clip:
    """A clip to play and what was said about it.

    Attributes:
        uri: a `data:` URI, or empty for a text-only item.
        answer: None if the reasoning never ended.
        other_answer: the answer about another clip; None where that was not asked.
        right: None where an answer is not simply right or wrong (a transcript).
    """

    task: str
    uri: str
    question: str
    reference: str
    reasoning: str
    answer: str | None
    other_answer: str | None
    right: bool | None


def escape(value: object) -> str:
    """Text of a value, safe between tags and inside quoted attributes."""
    return html.escape(str(value))


def share(value: float | None) -> str:
    """Number of a rate: two decimals, a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"


def page(title: str, body: Iterable[str]) -> str:
    """Whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def header(title: str, subtitle: str, tiles: Sequence[tuple[str, str]]) -> str:
    """Heading, one line under it, and a row of big numbers (number, what it is)."""
    cells = "".join(f'<div class="card tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in tiles)
    return f'<header><h1>{escape(title)}</h1><div class="sub">{escape(subtitle)}</div><div class="tiles">{cells}</div></header>'


def section(title: str, note: str, *parts: str) -> str:
    """Titled section: an optional line of explanation, then HTML parts in order."""
    intro = f'<p class="sub">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{intro}{''.join(parts)}</section>"


def grid(cards: Iterable[str]) -> str:
    """Cards side by side, as many a row as the width allows; each is HTML."""
    return '<div class="grid">' + "".join(f'<div class="card">{card}</div>' for card in cards) + "</div>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Table in a card that scrolls sideways on a narrow screen; the first column is text, the others are numbers."""
    top = "".join(f"<th>{escape(head)}</th>" for head in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def bullets(lines: Iterable[str]) -> str:
    """List of plain-text lines."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def folded(summary: str, text: str) -> str:
    """Preformatted plain text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def task_panels(tasks: Mapping[str, Mapping]) -> str:
    """A panel of bars for every task: the model beside its three controls."""
    names = (("model", "trained model"), ("probe", "linear probe"), ("other", "other clip"), ("plain", "majority class"))
    key = "".join(f'<li><i style="background:var(--{colour})"></i>{name}</li>' for colour, name in names)
    panels = []
    for task, r in tasks.items():
        bars = [
            Bar("model", r["accuracy"], "model", r.get("accuracy_interval")),
            Bar("probe", r["probe"], "probe", r.get("probe_interval")),
            Bar("other clip", r["other_clip"], "other", r.get("other_clip_interval")),
            Bar("majority", r["majority"], "plain"),
        ]
        panels.append(bar_panel(task.replace("_", " "), f"{len(r.get('labels', ()))} labels, {r['n']} held-out items", bars))
    return f'<ul class="key">{key}</ul>' + grid(panels)


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, one under the other."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows) + "</dl>"


def clip_cards(clips: Iterable[Clip]) -> str:
    """A card for every conversation: player, question, reference, answer, what it said about another clip, its reasoning."""
    cards = []
    for clip in clips:
        mark = {True: '<span class="tag good">✓ right</span>', False: '<span class="tag bad">✗ wrong</span>', None: ""}[
            clip.right
        ]
        player = f'<audio controls preload="metadata" src="{clip.uri}"></audio>' if clip.uri else ""
        rows = [("question", clip.question), ("reference", clip.reference)]
        rows.append(("answer", "(none: the reasoning never ended)" if clip.answer is None else clip.answer))
        if clip.other_answer is not None:
            rows.append(("other clip", clip.other_answer))
        reasoning = f"<details><summary>reasoning</summary>{escape(clip.reasoning)}</details>" if clip.reasoning else ""
        cards.append(f"<h3>{mark}{escape(clip.task.replace('_', ' '))}</h3>{player}{facts(rows)}{reasoning}")
    return grid(cards)


def stage_table(seconds: Mapping[str, float]) -> str:
    """Seconds of every stage with a bar."""
    longest = max(seconds.values(), default=0) or 1
    rows = "".join(
        f'<tr><td>{escape(stage)}</td><td>{s:.1f} s</td><td class="stage">'
        f'<div class="bar" style="width:{100 * s / longest:.1f}%"></div></td></tr>'
        for stage, s in seconds.items()
    )
    return f'<div class="card scroll"><table><tbody>{rows}</tbody></table></div>'

"""What a journey's page begins with: the stream's length along the way, what each layer adds, and what is expected, as tables whose cells are coloured.

The same numbers as those of the figure (``journey_picture``), written as HTML: a figure would take most of the page's time, twice, for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.page import escape

from .journey_picture import MOST_TOKENS, additions, stations, steep, stream_lengths

EXPECTED = 8
"""Tokens of the highest probability that are shown."""
LEVELS = 50
"""Steps of a colour and of a bar's length: a page has no styles but those of its style sheet, which its policy knows by their hash."""
OVERVIEW = """
section.overview { display: flex; flex-wrap: wrap; gap: 1.2rem 2.5rem; margin: 1rem 0; }
section.overview > div { max-width: 100%; }
section.overview table { font-size: .78rem; }
section.overview caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
section.overview th, section.overview td { border: 0; padding: .12em .4em; font-weight: 400; }
table.stream td { min-width: 1.1em; text-align: center; border: 1px solid var(--bg); background: rgb(from var(--one) r g b / var(--a)); }
table.stream td.s { color: light-dark(#ffffff, #12151a); }
table.stream thead th { height: 5.5em; vertical-align: bottom; }
table.stream thead span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9em; overflow: hidden; }
table.bars td:last-child { width: 13em; }
table.bars i { display: block; height: .75em; min-width: 1px; background: var(--one); }
table.bars i.b { background: var(--two); }
table.bars i.c { background: var(--three); }
""" + "\n".join(f"td.l{i} {{ --a: {i / LEVELS:g}; }} i.l{i} {{ width: {100 * i / LEVELS:g}%; }}" for i in range(LEVELS + 1))
_COLOURS = "abc"


def overview(journey: Any) -> str:
    """The section."""
    return f'<section class="overview">{_stream(journey)}{_added(journey)}{_expected(journey)}</section>'


def _stream(journey: Any) -> str:
    """[stations t] Lengths as colours; written where there is room."""
    lengths = stream_lengths(journey)
    first = max(0, lengths.shape[1] - MOST_TOKENS)
    shown = lengths[:, first:]
    colour = shown.clamp(min=1e-12).log10() if steep(shown) else shown
    low = float(colour.min()) if steep(shown) else 0.0
    share = ((colour - low) / max(float(colour.max()) - low, 1e-30)).clamp(0, 1)
    room = shown.shape[1] <= 14
    head = "".join(f"<th><span>{escape(p)}</span></th>" for p in journey.pieces[first:])
    rows = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_cell(n, a, room) for n, a in zip(row, parts, strict=True))}</tr>"
        for (name, _), row, parts in zip(stations(journey), shown.tolist(), share.tolist(), strict=True)
    )
    scale = ", the colour by its logarithm" if steep(shown) else ""
    whole = f" (the last {MOST_TOKENS} of {lengths.shape[1]} tokens)" if first else ""
    caption = f"length of the stream after each step{whole}{scale}"
    return f'<div class="scroll"><table class="stream"><caption>{caption}</caption><thead><tr><th></th>{head}</tr></thead>{rows}</table></div>'


def _cell(length: float, share: float, room: bool) -> str:
    said = f"{length:.0f}" if length >= 100 else f"{length:.3g}"
    return f'<td class="{_level(share)}{" s" if share > 0.55 else ""}" title="{said}">{said if room else ""}</td>'


def _level(share: float) -> str:
    """The class of a share between 0 and 1; 0 of what is no number."""
    return f"l{round(LEVELS * min(max(share, 0.0), 1.0)) if math.isfinite(share) else 0}"


def _added(journey: Any) -> str:
    """Bars of what each sublayer adds at the position."""
    added = additions(journey)
    rows: list[tuple[str, float, int]] = []
    for layer in range(max(map(len, added.values()), default=0)):
        rows += [(f"{layer} {word}", float(x[layer]), kind) for kind, (word, x) in enumerate(added.items()) if layer < len(x)]
    here = journey._way.subject.labels([journey.position])[0]
    return _bars(f"what is added at {here}: length", rows)


def _expected(journey: Any) -> str:
    if "probabilities" not in journey:
        return ""
    p: Tensor = journey.values("probabilities", position=journey.position)
    best = p.argsort(descending=True, stable=True)[:EXPECTED].tolist()
    rows = [(journey._way.subject.piece(i), 100 * float(p[i]), 0) for i in best]
    return _bars(f"what is expected {'next' if journey._way.subject.causal else 'here'}: probability in %", rows)


def _bars(caption: str, rows: Sequence[tuple[str, float, int]]) -> str:
    if not rows:
        return ""
    top = max(float(torch.tensor([x for _, x, _ in rows]).max()), 1e-30)
    made = "".join(
        f'<tr><th>{escape(name)}</th><td class="n">{x:.3g}</td><td><i class="{_COLOURS[kind]} {_level(x / top)}"></i></td></tr>' for name, x, kind in rows
    )
    return f'<div class="scroll"><table class="bars"><caption>{escape(caption)}</caption>{made}</table></div>'

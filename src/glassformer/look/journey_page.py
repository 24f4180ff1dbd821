"""A journey as a chapter to read: every step with its formula, its sentence, and a small picture of its numbers.

A picture is as small as it is honest: at most ``TOKENS`` positions (the last) by ``COLUMNS`` columns, of which each is the number furthest from zero among
its neighbours; colour says the sign, strength the size, and what is hidden or zero shows the paper.
"""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import torch
from torch import Tensor

from glassformer.core.page import escape, still

from .journey_overview import OVERVIEW, overview
from .journey_scene import Scene
from .result import written

TOKENS, COLUMNS = 24, 48
MOST_PICTURES = 200
"""Pictures of one page; steps beyond have words only."""

_STYLE = """
h2 { margin: 2rem 0 .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .1rem; }
h3 code { font-weight: 400; color: var(--dim); margin-left: .6em; }
td { white-space: pre; }
p.f { color: var(--dim); font-family: var(--mono); font-size: .86rem; }
p.f b { color: var(--ink); font-weight: 500; }
figure { margin: .4rem 0; }
figure img { image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { color: var(--dim); font-size: .8rem; }
ol.text { display: flex; flex-wrap: wrap; gap: .3rem; list-style: none; padding: 0; margin: .6rem 0; }
ol.text li { border: 1px solid var(--line); border-radius: 5px; padding: 0 .4em; max-width: 100%; overflow-wrap: anywhere; }
ol.text small { color: var(--dim); margin-left: .4em; }
"""


def page_of(journey: Any) -> str:
    """The whole page."""
    body, left, chapter = [_text(journey), overview(journey)], MOST_PICTURES, None
    for step in journey.shown:
        named = _chapter(step, journey)
        if named != chapter:
            chapter = named
            body.append(f"<h2>{escape(named)}</h2>")
        shown, used = _shown(journey, step) if left else ("", 0)
        left -= used
        body.append(_article(step) + shown)
    if not left:
        body.append(f'<p class="fine">A page has {MOST_PICTURES} pictures at most; journey(…, layer=) shows one layer with all of its own.</p>')
    return still(journey.title, "\n".join(body), _STYLE + OVERVIEW)


def _text(journey: Any) -> str:
    items = "".join(f"<li>{escape(p)}<small>{i}</small></li>" for p, i in zip(journey.pieces, journey.ids, strict=True))
    source = "".join(f"<li>{escape(p)}<small>{i}</small></li>" for p, i in zip(journey.source_pieces, journey.source_ids, strict=True))
    return (f'<p class="fine">The encoder reads:</p><ol class="text">{source}</ol>' if source else "") + f'<ol class="text">{items}</ol>'


def _chapter(step: Any, journey: Any) -> str:
    half = {"encoder.": "Encoder, ", "decoder.": "Decoder, "}.get(step.name[:8], "")
    if step.layer is not None:
        name = f"layer {step.layer}"
    else:
        name = "embedding" if step.kind in ("tokens", "embed") or "embed" in step.name or step.name.endswith("blocks.0.resid_pre") else "read-out"
    return (half + name)[:1].upper() + (half + name)[1:]


def _article(step: Any) -> str:
    shape = " × ".join(map(str, step.shape)) or "one number"
    inputs = f"; from {', '.join(step.inputs)}" if step.inputs else ""
    says = f'<p class="f"><b>{escape(step.formula)}</b><br>{escape(step.axes)} = {shape}{escape(inputs)}</p>'
    return f"<h3>{escape(step.title)}<code>{escape(step.name)}</code></h3>{says}<p>{escape(step.meaning)}</p>"


def _shown(journey: Any, step: Any) -> tuple[str, int]:
    """A picture or a table of a step's numbers, and how many pictures that is."""
    letters = step.axes.split()
    if letters and letters[-1] == "v":
        return _words(journey, step), 0
    grid = picture_of(journey, step)
    if grid is None:
        return "", 0
    values, caption = grid
    high, wide = values.shape
    scale = max(3, min(12, 360 // max(wide, 1)))
    source = "data:image/png;base64," + base64.b64encode(png(values)).decode()
    return f'<figure><img alt="" width="{wide * scale}" height="{high * scale}" src="{source}"><figcaption>{escape(caption)}</figcaption></figure>', 1


def picture_of(journey: Any, step: Any) -> tuple[Tensor, str] | None:
    """At most [TOKENS COLUMNS] of a step's numbers, and what they are; None where one number or a row of them needs no picture."""
    letters, n = step.axes.split(), step.shape[0] if step.shape else 0
    head = {"h": _head(journey, step)} if "h" in letters or "g" in letters else {}
    if letters == ["h", "t", "s"]:
        t, s = step.shape[1:]
        values = journey.values(step.name, head=head["h"], position=slice(max(0, t - TOKENS), t))[:, max(0, s - TOKENS) :]
        return values, f"head {head['h']}, {_last(t)} × {_last(s, 'key')}"
    if len(letters) not in (2, 3) or letters[0] not in "ts" or letters[-1] in "1c" or letters[1:2] == ["c"]:
        return None
    values = journey.values(step.name, head=head["h"]) if head else journey.values(step.name)
    values = values[max(0, n - TOKENS) :]
    each = -(-values.shape[1] // COLUMNS)
    who = f"the head that query head {head['h']} reads, " if "g" in letters else f"head {head['h']}, " if head else ""
    by = f"{values.shape[1]} numbers" if each == 1 else f"{values.shape[1]:,} numbers, {each} to a column (the one furthest from zero)"
    return furthest(values, each), f"{who}{_last(n)} × {by}"


def _head(journey: Any, step: Any) -> int:
    way = journey._way
    return Scene(way, step, way.position if step.side == "text" else len(way.half(step).pieces) - 1, way.head).head


def _last(n: int, word: str = "position") -> str:
    return f"{n} {word}{'' if n == 1 else 's'}" if n <= TOKENS else f"the last {TOKENS} of {n} {word}s"


def furthest(x: Tensor, each: int) -> Tensor:
    """[t n] -> [t ceil(n / each)]: of every ``each`` neighbours the number furthest from zero."""
    if each <= 1:
        return x
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % each)).unflatten(1, (-1, each))
    return x.gather(2, x.abs().argmax(2, keepdim=True))[..., 0]


def _words(journey: Any, step: Any) -> str:
    """The highest numbers of a row over the vocabulary or the classes."""
    x = journey.values(step.name, position=journey.position) if len(step.shape) == 2 else journey.values(step.name)
    best = [int(i) for i in x.argsort(descending=True, stable=True)[:6] if x[i] > -torch.inf]
    names = [f"class {i}" if step.kind == "classes" else journey._way.subject.piece(i) for i in best]
    cells = "".join(f'<tr><td>{escape(n)}</td><td class="n">{written(float(x[i]))}</td></tr>' for n, i in zip(names, best, strict=True))
    return f'<div class="scroll"><table>{cells}</table></div>'


def png(values: Tensor) -> bytes:
    """[rows columns] as a picture of 31 colours: orange above zero, blue below (as in every figure), clear at zero and where a number is not finite."""
    x = torch.nan_to_num(values.float(), nan=0.0, posinf=0.0, neginf=0.0)
    top = float(x.abs().max()) or 1.0
    level = (x / top * 15).round().int() + 15  # 0..30, 15 is zero
    palette = bytes(c for i in range(31) for c in ((0xD9, 0x6A, 0x1B) if i >= 15 else (0x1F, 0x6F, 0xC4)))
    clear = bytes(round(255 * abs(i - 15) / 15) for i in range(31))
    raw = b"".join(b"\0" + bytes(row) for row in level.tolist())

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 8, 3, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"PLTE", palette), chunk(b"tRNS", clear), chunk(b"IDAT", zlib.compress(raw, 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

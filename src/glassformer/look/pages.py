"""One self-contained HTML page from one :class:`~glassformer.look.inside.Inside`.

    page.html   the words and the places
    page.css    the looks
    page.js     the one state and the token strip
    heads.js    the grid of heads and the enlarged head
    lens.js     the prediction by layer
    norms.js    what is added to the stream

Patterns travel as half floats (11 bits: three significant digits), so the page says what the model computed and not a picture of it.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np

from glassformer.core.errors import InputError
from glassformer.core.fields import described, typed
from glassformer.core.files import replace, trouble
from glassformer.core.page import scripted, short
from glassformer.core.tap import Tap
from glassformer.text.shown import shown, shown_text

from .inside import HEAD_FIGURES, Bools, Floats, Inside, gather

MOST_BYTES = 96 * 2**20
"""Browsers open a page of this size within seconds; beyond it they become unreliable."""

FILES = ("page.html", "page.css", "page.js", "heads.js", "lens.js", "norms.js")

_SMALLEST = np.float16(2.0**-24)


@typed(InputError)
def page(model: Any, tokenizer: Any, text: str, title: str | None = None, *, tap: Tap | None = None) -> str:
    """The page for ``model`` on ``text``, as a string of HTML; ``title`` is the model's name on it. ``tap``: edits that hold meanwhile.

    Raises :class:`InputError` as :func:`gather` does, and for patterns too large for one page.
    """
    if not hasattr(tokenizer, "encode"):
        raise InputError(f"tokenizer is {described(type(tokenizer))}, but a text is read by one: gf.load(folder) has one.")
    return render(gather(model, tokenizer, text, name=title, tap=tap))


@typed(InputError)
def write_page(path: str | os.PathLike[str], model: Any, tokenizer: Any, text: str, title: str | None = None, *, tap: Tap | None = None) -> Path:
    """Write :func:`page` to ``path``, whole or not at all; gives the path back."""
    content, target = page(model, tokenizer, text, title, tap=tap), Path(path)
    if not target.parent.is_dir():
        raise InputError(f"The page cannot be written to {str(target)!r}: the folder {str(target.parent)!r} does not exist; create it or choose another.")
    try:
        replace(target, content)
    except OSError as error:
        reason, todo = trouble(error)
        raise InputError(f"The page cannot be written to {str(target)!r}: {reason}. {todo}; what was there before is untouched.") from error
    return target


def render(inside: Inside) -> str:
    """The page for what :func:`gather` found (or for an :class:`Inside` made by hand)."""
    return scripted(f"Inside {shown_line(inside.card.name)}", data(inside), "glassformer.look", *FILES)


def data(inside: Inside) -> dict[str, Any]:
    """What the page's script reads, as plain data."""
    packing = "lower" if inside.causal else "full"
    _check_size(inside, packing)
    low, high = inside.row_sums
    norms, lens = inside.norms, inside.lens
    return {
        "model": {
            "name": shown_line(inside.card.name),
            "kind": inside.card.kind,
            "layers": inside.card.layers,
            "d_model": inside.card.d_model,
            "vocab_size": inside.card.vocab_size,
            "parameters": inside.card.parameters,
        },
        "text": shown_text(inside.text),
        "ids": list(inside.ids),
        "pieces": list(inside.pieces),
        "vocabulary": {str(i): piece for i, piece in inside.vocabulary.items()},
        "causal": inside.causal,
        "masks": any(bool(m.any()) for m in inside.masked),
        "row_sums": [short(low), short(high)],
        "patterns": {
            "packing": packing,
            "heads": [len(p) for p in inside.patterns],
            "half": [pack(p, m, packing) for p, m in zip(inside.patterns, inside.masked, strict=True)],
        },
        "figures": {"names": list(HEAD_FIGURES), "values": [_numbers(f) for f in inside.head_figures()]},
        "norms": {"attn": _numbers(norms.attn), "ffn": _numbers(norms.ffn), "stream": _numbers(norms.stream), "adds": norms.adds},
        "lens": lens
        and {
            "rows": list(lens.rows),
            "ids": lens.ids.tolist(),
            "p": _numbers(lens.p),
            "entropy": _numbers(lens.entropy),
            "choice_p": _numbers(lens.choice_p),
            "choice_rank": lens.choice_rank.tolist(),
            "next_p": _numbers(lens.next_p),
            "next_rank": lens.next_rank.tolist(),
        },
    }


def pack(pattern: Floats, masked: Bools, packing: str) -> str:
    """Base64 of little-endian half floats, [h t s]; "lower" keeps only keys s <= t, row after row.

    NaN stands where ``masked`` [t s]. A stored zero is an exact zero of the model: what is smaller than the
    smallest half float is stored as that, 6e-8.
    """
    h, t, _ = pattern.shape
    half = pattern.astype("<f2")
    vanished = (half == 0) & (pattern != 0)
    half[vanished] = np.copysign(_SMALLEST, pattern[vanished])
    half[:, masked] = np.nan
    half = half[:, *np.tril_indices(t)] if packing == "lower" else half.reshape(h, -1)
    return base64.b64encode(half.tobytes()).decode("ascii")


def unpack(packed: str, heads: int, tokens: int, packing: str) -> Floats:
    """The inverse of :func:`pack`: [h t s], to the precision of half floats, NaN where masked."""
    values = np.frombuffer(base64.b64decode(packed), "<f2").astype(np.float32)
    if packing == "full":
        return values.reshape(heads, tokens, tokens)
    out = np.full((heads, tokens, tokens), np.nan, np.float32)
    out[:, *np.tril_indices(tokens)] = values.reshape(heads, -1)
    return out


def shown_line(text: str) -> str:
    """A name on one line: spaces stay, other control characters are made visible."""
    return " ".join(shown(word) for word in text.split(" ") if word)


def _check_size(inside: Inside, packing: str) -> None:
    t, heads = len(inside.ids), sum(len(p) for p in inside.patterns)
    need = heads * (t * (t + 1) // 2 if packing == "lower" else t * t) * 2 * 4 // 3
    if need > MOST_BYTES:
        fits = int((MOST_BYTES * (3 if packing == "lower" else 1.5) / 4 / max(heads, 1)) ** 0.5)
        raise InputError(
            f"The patterns of {heads} heads on {t} tokens would make a page of {need >> 20} MB, but at most {MOST_BYTES >> 20} MB open well in a browser: "
            f"give a text of at most {fits} tokens."
        )


def _numbers(x: Any) -> Any:
    return [_numbers(row) for row in x] if np.ndim(x) else short(float(x))

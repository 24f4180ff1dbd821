"""What changes in a model's output when the text does.

compare(model, "White hare upon the", "Brown hare upon the")
    pieces      what the texts share
    outputs     ranks and probabilities that change, divergence
    depths      how far apart the two streams are, and what the read-out makes of them
    parts       which heads and feed-forwards carry the change of one number, summing to it
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.numerics import wide
from glassformer.core.tap import Record, Tap
from glassformer.text.shown import short

from .comparison_parts import mean_gradient, parts_of
from .distributions import js, kl
from .figure import Theme, bars, heatmap, lines, mark, plain_text
from .lens_reading import stream_sites
from .next_tokens import check_k, joined, quoted
from .result import Cell, Grid, Result
from .subject import Positions, Subject, Target, Text, check_reads_tokens, feedforward_of, note_length, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glassformer.text import Tokenizer

MOST_DRAWN = 14


@dataclass(frozen=True, eq=False)
class Comparison(Result):
    """How a model's output differs between two texts, and where the difference arises.

    Axes: ``c`` tokens (the union of both texts' most probable, the one whose probability changes most first), ``r`` depths (``rows``), ``l`` layers,
    ``h`` heads, ``a`` aligned positions. Index 0 of a pair is the first text. Divergences are in bits.
    """

    texts: tuple[str, str]
    pieces: tuple[tuple[str, ...], tuple[str, ...]]
    at: tuple[int, int]
    """The positions that are compared."""
    prefix: int
    """How many tokens both begin with."""
    suffix: int
    """How many tokens both end with (none of the prefix counted again)."""
    pairs: tuple[tuple[int, int], ...]
    """[a] Aligned positions: the same token in the same order, and replaced stretches of equal length."""
    same: tuple[bool, ...]
    """[a] Whether the pair is the same token."""
    shared: tuple[str, ...]
    """The pieces that stand in both, in the order of the first."""
    ids: Tensor
    """[c]"""
    tokens: tuple[str, ...]
    p: Tensor
    """[2 c]"""
    logits: Tensor
    """[2 c]"""
    rank: Tensor
    """[2 c] 1 is the most probable."""
    kl: tuple[float, float]
    """KL(first || second), KL(second || first), in bits."""
    js: float
    """Divergence of Jensen and Shannon, in bits."""
    rows: tuple[str, ...]
    distance: Tensor
    """[r] ``2 |x - y| / (|x| + |y|)`` of the two streams at the compared positions: 0 equal, 2 opposite."""
    cosine: Tensor
    """[r]"""
    lens_js: Tensor
    """[r] Divergence (JS, in bits) of what the read-out makes of the two streams; the last is ``js``."""
    aligned: Tensor
    """[r a] ``distance`` at every aligned pair."""
    target: str
    """The logit, or difference of two logits, whose change is divided among the parts."""
    values: tuple[float, float]
    """It, for the first and the second text."""
    heads: Tensor | None
    """[l h] What each head contributes to the change; NaN where a layer has fewer heads. None (as the next four): a foreign model, whose norms are closed."""
    cross: Tensor | None
    """[l h] The heads of cross-attention, in a decoder that has it."""
    attn: Tensor | None
    """[l] Attention as a whole (of both kinds)."""
    ffn: Tensor | None
    """[l]"""
    embedding: float | None
    rest: float | None
    """The change less all parts: what rounding and the numerical integration leave over, and what edits of the stream do."""

    @property
    def change(self) -> float:
        """The change of the target from the first text to the second."""
        return self.values[1] - self.values[0]

    @property
    def title(self) -> str:
        return f"{self.texts[0]} against {self.texts[1]}: JS {self.js:.3g} bits"

    def best(self, n: int = 5) -> list[tuple[str, float]]:
        """The heads that carry most of the change (cross-attention's as ``"1.0 cross"``), the largest first."""
        found = []
        for kind, x in (("", self.heads), (" cross", self.cross)):
            if x is not None:
                found += [(f"{i}.{j}{kind}", float(v)) for i, row in enumerate(x) for j, v in enumerate(row) if not torch.isnan(v)]
        return sorted(found, key=lambda f: -abs(f[1]))[:n]

    def grid(self) -> Grid:
        columns = ("token", "p first", "p second", "change of p", "rank first", "rank second", "change of logit")
        rows: list[tuple[Cell, ...]] = []
        for i, token in enumerate(self.tokens):
            (a, b), (ra, rb), (la, lb) = (x[:, i].tolist() for x in (self.p, self.rank, self.logits))
            rows.append((token, a, b, b - a, ra, rb, lb - la))
        return Grid(columns, tuple(rows), "\n".join(self._notes()))

    def _notes(self) -> list[str]:
        a, b = self.pieces
        shares = f"Shared: the first {self.prefix} and the last {self.suffix} of {len(a)} and {len(b)} tokens"
        changed = [f"{a[i]} → {b[j]}" for (i, j), same in zip(self.pairs, self.same, strict=True) if not same]
        shares += f"; exchanged: {', '.join(changed[:6])}" if changed else ""
        depths = ", ".join(f"{name} {d:.3g} ({x:.2g})" for name, d, x in zip(self.rows, self.distance.tolist(), self.lens_js.tolist(), strict=True))
        heads = ", ".join(f"{name} {v:+.3g}" for name, v in self.best())
        parts = ""
        if self.attn is not None and self.ffn is not None:
            parts = (
                f" = attention {float(self.attn.sum()):+.3g}, feed-forward {float(self.ffn.sum()):+.3g}, embedding {self.embedding:+.3g}, rest {self.rest:+.1g}"
            )
        return [
            f"{shares}.",
            f"KL(first || second) {self.kl[0]:.3g} bits, KL(second || first) {self.kl[1]:.3g} bits, JS {self.js:.3g} bits.",
            f"Distance of the streams by depth (JS of what is read there, in bits): {depths}.",
            f"Logit of {self.target}: {self.values[0]:.3g} → {self.values[1]:.3g}, a change of {self.change:+.3g}{parts}.",
            *([f"Heads that carry most of it: {heads}."] if heads else []),
        ]

    def size(self) -> tuple[float, float]:
        return (12.0, 7.0)

    def draw(self, figure: Figure, theme: Theme) -> None:
        grid = figure.add_gridspec(2, 2, width_ratios=[1.0, 1.15])
        self._draw_tokens(figure.add_subplot(grid[:, 0]), theme)
        axes = figure.add_subplot(grid[:, 1] if self.attn is None else grid[0, 1])
        named = {"distance of the streams": self.distance, "root of JS (in bits) of what is read": self.lens_js.sqrt()}
        lines(axes, theme, range(len(self.rows)), named, title="Where in the layers the difference arises")
        axes.set_xticks(range(len(self.rows)), self.rows, rotation=0 if len(self.rows) < 8 else 45)
        axes.set_ylim(bottom=0)
        if self.attn is not None and self.ffn is not None:
            self._draw_parts(figure.add_subplot(grid[1, 1]), theme, self.attn, self.ffn)

    def _draw_parts(self, axes: Any, theme: Theme, attn: Tensor, ffn: Tensor) -> None:
        """What heads, attention as a whole and feed-forwards contribute to the change, signed."""
        layers = [f"layer {i}" for i in range(len(attn))]
        columns = [torch.full_like(attn, torch.nan), attn, ffn]
        names = ["", "attention", "feed-fwd"]
        values = torch.stack(columns, 1)
        for kind, x in (("c", self.cross), ("", self.heads)):
            if x is not None:
                values, names = torch.cat([x, values], 1), [f"{kind}{j}" for j in range(x.shape[1])] + names
        target = " − ".join(map(mark, self.target.split(" − ")))
        heatmap(axes, theme, values, layers, names, title=f"Change of the logit of {target}: {self.change:+.3g}", x="head", signed=True)

    def _draw_tokens(self, axes: Any, theme: Theme) -> None:
        """Paired bars: a token's probability after either text."""
        n = min(MOST_DRAWN, len(self.tokens))
        y = np.arange(n)
        for which, shift in ((0, -0.2), (1, 0.2)):
            axes.barh(y + shift, self.p[which, :n].numpy(), height=0.38, color=theme.series[which], label=plain_text(short(self.texts[which], 40)))
        bars(axes, theme, [mark(short(t, 16)) for t in self.tokens[:n]], np.zeros(n), title="Tokens whose probability changes most", x="probability")
        axes.legend(fontsize=8, labelcolor=theme.ink, facecolor=theme.paper, edgecolor=theme.grid, loc="lower right")


def compare(
    model: Any,
    text: Text,
    other: Text,
    k: int = 20,
    *,
    target: Any = None,
    position: Positions = None,
    tokenizer: Tokenizer | None = None,
    source: Text | None = None,
    other_source: Text | None = None,
    tap: Tap | None = None,
) -> Comparison:
    """What changes in the model's output when ``text`` becomes ``other``, where in the layers, and through which heads.

    Outputs are compared at one position of each text (None: the last; in an encoder the mask token's), so the texts may differ in length.
    ``target`` is the number whose change is divided among the parts; None is the logit of the token that gains most probability less that of the one that
    loses most. With x and y the final streams of the two texts and f the target as a function of the stream,

        ``f(y) - f(x) = g . (y - x)``,   ``g = integral of grad f(x + s (y - x)) ds, s = 0..1``,

    which is exact for every norm and read-out, and ``y - x`` is the sum of what embedding, heads and feed-forwards add to the second text less what they
    add to the first: a part contributes ``g`` times the change of its output (integrated gradients along the line between the streams, arXiv 1703.01365).
    Where a norm stands between a part and the stream, ``g`` is carried back through it in the same way. A head whose output does not change contributes
    0. The contributions are direct: that a head changed because an earlier one did is not told apart.

    ``source``, ``other_source``: of an encoder-decoder; None for the second means the same. ``tap``: edits that hold in both runs; what an edit of the stream
    itself does belongs to no part, and stands in ``rest``. Raises :class:`InputError` as candidates() does.
    """
    a = read(model, text, tokenizer, source=source, tap=tap, note=False)
    b = read(model, other, tokenizer, source=source if other_source is None else other_source, tap=tap, note=False)
    note_length(a.model, max(len(a), len(b)))
    check_reads_tokens(a.stack, "compare()")
    check_k(k)
    at = (a.position(position), b.position(position))
    (record_a, every_a), (record_b, every_b) = (_run(s) for s in (a, b))
    logits = torch.stack([wide(every_a[at[0]]), wide(every_b[at[1]])])
    aim = _aim(a, target, logits)
    outputs = _outputs(a, logits, k)
    depths = _depths(a, (record_a, record_b), at, logits)
    values = (float(aim.of(logits[0].double())), float(aim.of(logits[1].double())))
    shared = _shared(a, b)
    return Comparison(
        texts=_quotes(a, b, shared["prefix"]),
        pieces=(a.pieces, b.pieces),
        at=at,
        **shared,
        **outputs,
        **depths,
        aligned=_aligned(a, (record_a, record_b), shared["pairs"]),
        target=aim.label,
        values=values,
        **parts_of(a, (record_a, record_b), at, aim, values[1] - values[0]),
    )


def _run(s: Subject) -> tuple[Record, Tensor]:
    sites = [*stream_sites(s)[1]]
    for i in range(s.layers):
        for kind in ("attn", "cross", feedforward_of(s.stack, i)):
            sites += [site for site in (f"blocks.{i}.{kind}.out", f"blocks.{i}.{kind}.z") if s.has(site)]
        sites += [site for site in (f"blocks.{i}.resid_mid", f"blocks.{i}.resid_mid_cross") if s.has(site)]
    return s.run(*sites)


# Texts, outputs, depths


def _shared(a: Subject, b: Subject) -> dict[str, Any]:
    """What the two texts have in common."""
    least = min(len(a), len(b))
    prefix = next((i for i in range(least) if a.ids[i] != b.ids[i]), least)
    suffix = next((i for i in range(least - prefix) if a.ids[-1 - i] != b.ids[-1 - i]), least - prefix)
    found: list[tuple[int, int]] = []
    for kind, i, i_end, j, j_end in difflib.SequenceMatcher(None, a.ids, b.ids, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and i_end - i == j_end - j):
            found += zip(range(i, i_end), range(j, j_end), strict=True)
    shared = dict.fromkeys(i for i in a.ids if i in b.ids)
    return {
        "prefix": prefix,
        "suffix": suffix,
        "pairs": tuple(found),
        "same": tuple(a.ids[i] == b.ids[j] for i, j in found),
        "shared": tuple(a.piece(i) for i in shared),
    }


def _quotes(a: Subject, b: Subject, prefix: int) -> tuple[str, str]:
    """The texts in quotes: their ends, or where they part, if the ends of long ones are the same."""
    one, two = quoted(a), quoted(b)
    if one != two or a.ids == b.ids:
        return one, two
    near = slice(max(0, prefix - 3), prefix + 5)
    parted = (f"“{'…' * (near.start > 0)}{joined(s.pieces[near]).strip()}…”" for s in (a, b))
    return next(parted), next(parted)


def _aim(s: Subject, target: Any, logits: Tensor) -> Target:
    if target is not None:
        return s.target(target, logits[0])
    gain = logits.softmax(-1).diff(dim=0)[0]
    up, down = int(gain.argmax()), int(gain.argmin())
    if up == down:  # two equal outputs
        down = int(logits[0].topk(2).indices[1])
        up = int(logits[0].argmax())
    return s.target((up, down), logits[0])


def _outputs(s: Subject, logits: Tensor, k: int) -> dict[str, Any]:
    """The union of both lists, and the divergences."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    union = torch.unique(logits.topk(min(k, logits.shape[-1]), -1).indices)
    union = union[(p[1, union] - p[0, union]).abs().argsort(descending=True, stable=True)]
    chosen = logits[:, union]
    rank = torch.stack([(row > own[:, None]).sum(-1) + 1 for row, own in zip(logits, chosen, strict=True)])
    return {
        "ids": union.cpu(),
        "tokens": tuple(s.piece(i) for i in union.tolist()),
        "p": p[:, union].cpu(),
        "logits": chosen.cpu(),
        "rank": rank.cpu(),
        "kl": (float(kl(logp[0], logp[1])), float(kl(logp[1], logp[0]))),
        "js": float(js(logp[0], logp[1])),
    }


def _apart(x: Tensor, y: Tensor) -> Tensor:
    """``2 |x - y| / (|x| + |y|)`` of streams [.. d]."""
    apart: Tensor = 2 * (x - y).norm(dim=-1) / (x.norm(dim=-1) + y.norm(dim=-1)).clamp_min(1e-30)
    return apart


@torch.no_grad()
def _depths(s: Subject, records: tuple[Record, Record], at: tuple[int, int], logits: Tensor) -> dict[str, Any]:
    """How far apart the streams are at the compared positions."""
    names, sites = stream_sites(s)
    x, y = (torch.stack([record[s.path(site)][0, i] for site in sites]) for record, i in zip(records, at, strict=True))  # r d
    read_out = [torch.cat([wide(s.stack.read(h[None, :-1], normed=False)[0]), own[None]]).log_softmax(-1) for h, own in zip((x, y), logits, strict=True)]
    x, y = wide(x), wide(y)
    return {
        "rows": names,
        "distance": _apart(x, y).cpu(),
        "cosine": torch.nn.functional.cosine_similarity(x, y, dim=-1).cpu(),
        "lens_js": js(read_out[0], read_out[1]).clamp_min(0).cpu(),
    }


def _aligned(s: Subject, records: tuple[Record, Record], pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """[r a]"""
    sites = stream_sites(s)[1]
    where = [list(side) for side in zip(*pairs, strict=True)] if pairs else [[], []]
    x, y = (torch.stack([wide(record[s.path(site)][0][i]) for site in sites]) for record, i in zip(records, where, strict=True))
    return _apart(x, y).cpu()


__all__ = ["Comparison", "compare", "mean_gradient"]

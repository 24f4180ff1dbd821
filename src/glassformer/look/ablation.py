"""Ablation: take a part of the model away, and see what the answer loses.

    "5.1"          head 1 of layer 5 (its z)                "attn 3"   what attention of layer 3 adds
    "cross 2.0"    a head of cross-attention                "ffn 3"    what the feed-forward layer adds
    "ffn 3.412"    hidden unit 412 of layer 3 (its post)    "block 3"  the whole block: the stream leaves it as it came
    "position 4"   the stream that enters block 0 there     tuples say the same: (5, 1), ("ffn", 3, 412), ("block", 3)

    zero       0 in its place
    mean       its mean over all positions of the reference texts (of this text itself where none are given)
    resample   its values at positions drawn from them, the mean over ``draws`` draws

The value of an ablation depends on what is put in place: zero is no value that the rest of the model has ever seen there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.tap import Tap

from .figure import Theme, bars, heatmap
from .result import Grid, Result
from .subject import Positions, Subject, Text, check_layer, check_reads_tokens, check_whole, choose, feedforward_of, n_heads, note_length, read, shorten
from .sweep import Patch, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW = ("zero", "mean", "resample")
_WORDS = re.compile(r"(attn|cross|ffn|mlp|experts|block|layer|position|pos)\s*(-?[0-9]{1,9})(?:\s*[.,]\s*([0-9]{1,9}))?", re.IGNORECASE)
_HEAD = re.compile(r"L?\s*([0-9]{1,9})\s*(?:[.,]|H)\s*([0-9]{1,9})", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One thing to take away: its name, the site where it stands, and which head or unit of it (``base``: relative to that site)."""

    name: str
    site: str
    head: int | None = None
    unit: int | None = None
    position: int | None = None
    base: str | None = None


def part_of(s: Subject, given: Any) -> Part:
    """The part that a text or tuple names (see the head of this file). Raises :class:`SiteError` for one that the model has not."""
    kind, layer, inner = _read(given, s.layers)
    if kind == "position":
        if inner is not None:
            raise SiteError(f"{given!r}: a position has no parts by number; write 'position {layer}'.")
        (at,) = s.positions(layer)
        return Part(f"position {at}", "blocks.0.resid_pre", position=at)
    check_layer(s.stack, layer)
    if kind == "block":
        if inner is not None:
            raise SiteError(f"{given!r}: a block has no parts by number; write 'ffn {layer}.{inner}' for a unit or '{layer}.{inner}' for a head.")
        return Part(f"block {layer}", f"blocks.{layer}.resid_post", base=f"blocks.{layer}.resid_pre")
    if kind in ("attn", "cross"):
        if kind == "cross" and not s.has(f"blocks.{layer}.cross.z"):
            raise SiteError(f"{given!r} names cross-attention, but layer {layer} of this model has none: write 'attn {layer}', or give an encoder-decoder.")
        if inner is None:
            return Part(f"{kind} {layer}", f"blocks.{layer}.{kind}.out")
        n = n_heads(s.stack, layer, kind)
        if inner >= n:
            raise SiteError(f"Head {layer}.{inner} was asked for, but layer {layer} has {n} heads, 0 to {n - 1}.")
        return Part(f"{layer}.{inner}" if kind == "attn" else f"cross {layer}.{inner}", f"blocks.{layer}.{kind}.z", head=inner)
    own = feedforward_of(s.stack, layer)
    if inner is None:
        return Part(f"ffn {layer}", f"blocks.{layer}.{own}.out")
    if own != "ffn":
        raise SiteError(
            f"{given!r} names a hidden unit, but the feed-forward layer {layer} is a mixture of experts, "
            f"whose units see only some tokens: 'ffn {layer}' takes it whole."
        )
    width = int(s.stack.blocks[layer].ffn.down.in_features) if hasattr(s.stack, "blocks") else inner + 1
    if inner >= width:
        raise SiteError(f"Unit {layer}.{inner} was asked for, but the feed-forward layer {layer} has {width} units, 0 to {width - 1}.")
    return Part(f"ffn {layer}.{inner}", f"blocks.{layer}.ffn.post", unit=inner)


def _read(given: Any, layers: int) -> tuple[str, int, int | None]:
    if isinstance(given, tuple):
        numbers = given[1:] if given and isinstance(given[0], str) else given
        if all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) and len(numbers) in (1, 2):
            word = given[0].lower() if isinstance(given[0], str) else "attn"
            given = f"{word} {'.'.join(map(str, numbers))}"
    if isinstance(given, str):
        if found := _HEAD.fullmatch(given.strip()):
            return "attn", int(found[1]), int(found[2])
        if found := _WORDS.fullmatch(given.strip()):
            word = {"mlp": "ffn", "experts": "ffn", "layer": "block", "pos": "position"}.get(found[1].lower(), found[1].lower())
            return word, int(found[2]), None if found[3] is None else int(found[3])
    n = layers - 1  # an example that this model has
    raise SiteError(f"{shorten(repr(given))} names no part: write '{n}.0' (a head), 'ffn {n}.3' (a unit), 'attn {n}', 'ffn {n}', 'block {n}', or 'position 0'.")


@dataclass(frozen=True, eq=False)
class Ablated(Result):
    """What is lost without each part. One number per part: the asked logit (or difference), the first target's probability, and KL from the whole
    model's prediction in bits."""

    names: tuple[str, ...]
    how: str
    target: str
    logit: Tensor
    prob: Tensor
    kl: Tensor
    logit_before: float
    prob_before: float
    top: tuple[str, ...]
    """The most probable token without the part."""

    @property
    def title(self) -> str:
        return f"ablation ({self.how}): logit {self.target}, before {self.logit_before:.4g} (probability {self.prob_before:.4g})"

    def grid(self) -> Grid:
        rows = [
            (n, float(a), float(a) - self.logit_before, float(p), float(k), t)
            for n, a, p, k, t in zip(self.names, self.logit, self.prob, self.kl, self.top, strict=True)
        ]
        return Grid(
            ("without", "logit", "change", "probability", "KL, bits", "then first"),
            tuple(rows),
            "KL from the whole model's prediction to that without the part",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        bars(figure.subplots(), theme, self.names, self.logit - self.logit_before, title=self.title, x="change of the logit")

    def size(self) -> tuple[float, float]:
        return (8.0, max(2.2, min(14.0, 1.4 + 0.28 * len(self.names))))


@dataclass(frozen=True, eq=False)
class HeadAblation(Result):
    """The same for every head: ``change`` [l h] of the asked logit, ``kl`` [l h]; NaN where a layer has fewer heads."""

    how: str
    target: str
    change: Tensor
    kl: Tensor
    before: float

    @property
    def title(self) -> str:
        return f"ablation ({self.how}) of each head: change of logit {self.target} (before {self.before:.4g})"

    def __getitem__(self, head: str | tuple[int, int]) -> float:
        layers, heads = self.change.shape
        kind, layer, inner = _read(head, layers)
        if kind not in ("attn", "cross") or inner is None or not 0 <= layer < layers or inner >= heads:
            raise SiteError(f"{head!r} is no head here: layers are 0 to {layers - 1}, heads 0 to {heads - 1}, written as '1.0'.")
        return float(self.change[layer, inner])

    def best(self, n: int = 5) -> list[tuple[str, float]]:
        """The heads without which the logit changes most."""
        order = self.change.nan_to_num(0).abs().flatten().argsort(descending=True)[:n].tolist()
        return [(f"{i // self.change.shape[1]}.{i % self.change.shape[1]}", float(self.change.flatten()[i])) for i in order]

    def grid(self) -> Grid:
        h = self.change.shape[1]
        found = [(name, value, float(self.kl[int(name.split(".")[0]), int(name.split(".")[1])])) for name, value in self.best(self.change.shape[0] * h)]
        return Grid(
            ("head", "change", "KL, bits"),
            tuple(r for r in found if r[1] == r[1]),
            "a negative change: the head speaks for the target; KL from the whole model's prediction",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        l, h = self.change.shape
        heatmap(
            figure.subplots(),
            theme,
            self.change,
            [str(i) for i in range(l)],
            [str(i) for i in range(h)],
            title=self.title,
            x="head",
            y="layer",
            label="change",
            signed=True,
        )

    def size(self) -> tuple[float, float]:
        return (max(6.5, min(12.0, 2.5 + 0.45 * self.change.shape[1])), max(3.0, min(12.0, 1.6 + 0.35 * self.change.shape[0])))


def ablate(
    model: Any,
    text: Text,
    what: Any,
    *,
    how: str = "zero",
    target: Any = None,
    position: Positions = None,
    positions: Positions = None,
    reference: Sequence[Text] | None = None,
    draws: int = 8,
    seed: int = 0,
    tokenizer: Any = None,
    source: Text | None = None,
    tap: Tap | None = None,
    memory: int | None = None,
    progress: bool | None = None,
) -> Ablated:
    """What the prediction at ``position`` (the last) is without a part, or several: each alone, and all together.

    ``what``: a part or a list of parts (``"5.1"``, ``"ffn 3.412"``, ``"attn 3"``, ``"ffn 3"``, ``"block 3"``, ``"position 4"``). ``positions``: take
    it away there
    only. ``how``: ``"zero"``, ``"mean"``, ``"resample"`` over the ``reference`` texts. A block's mean is that of what it adds to the stream. ``tap``:
    edits that hold in every run, also without the part and in the reference texts (``tap | ablation``).
    Raises :class:`SiteError` for a part that the model has not, :class:`InputError` for what cannot be read.
    """
    s = read(model, text, tokenizer, source=source, tap=tap, note=False)
    given = list(what) if isinstance(what, list | set | frozenset | range) else [what]
    parts = [part_of(s, g) for g in given]
    if not parts:
        raise InputError("Nothing to take away was named: give a part, such as '5.1', or a list of parts.")
    sweep, made = _prepare(s, parts, how, positions, reference, draws, seed, memory, progress)
    groups = [[i] for i in range(len(parts))] + ([list(range(len(parts)))] if len(parts) > 1 else [])
    names = tuple(p.name for p in parts) + (("all of them",) if len(parts) > 1 else ())
    at = s.position(position)
    base = sweep.logits[at]
    asked = s.target(target, base)
    logit, prob, kl, best = _measured(s, sweep, [[made[i][k] for i in g] for g in groups for k in range(len(made[0]))], len(made[0]), asked, at)
    return Ablated(names, how, asked.label, logit, prob, kl, float(asked.of(base)), float(base.softmax(-1)[asked.token]), tuple(s.piece(int(i)) for i in best))


def ablate_heads(
    model: Any, text: Text, *, how: str = "zero", kind: str = "attn", target: Any = None, position: Positions = None, **options: Any
) -> HeadAblation:
    """:func:`ablate` for every head, one at a time; ``kind="cross"``: of cross-attention. Options as there."""
    choose(kind, ("attn", "cross"), "kind of attention")
    s = read(model, text, options.pop("tokenizer", None), source=options.pop("source", None), tap=options.pop("tap", None), note=False)
    counts = [n_heads(s.stack, n, kind) for n in range(s.layers)] if kind == "attn" or s.has("blocks.*.cross.z") else []
    if not counts:
        raise InputError("This model has no cross-attention heads: leave kind out.")
    parts = [part_of(s, (kind, layer, h)) for layer, n in enumerate(counts) for h in range(n)]
    filled = {"positions": None, "reference": None, "draws": 8, "seed": 0, "memory": None, "progress": None} | options
    if unknown := [o for o in options if o not in ("positions", "reference", "draws", "seed", "memory", "progress")]:
        raise InputError(f"ablate_heads() takes no option {unknown[0]!r}.")
    sweep, made = _prepare(s, parts, how, **filled)
    at = s.position(position)
    asked = s.target(target, sweep.logits[at])
    logit, _, kl, _ = _measured(s, sweep, [[patch] for row in made for patch in row], len(made[0]), asked, at)
    before = float(asked.of(sweep.logits[at]))
    change, away = (torch.full((len(counts), max(counts)), float("nan")) for _ in range(2))
    i = 0
    for layer, n in enumerate(counts):
        change[layer, :n], away[layer, :n] = logit[i : i + n] - before, kl[i : i + n]
        i += n
    return HeadAblation(how, asked.label, change, away, before)


def _measured(s: Subject, sweep: Sweep, variants: Sequence[Sequence[Patch]], draws: int, asked: Any, at: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Logit, probability and KL, the mean over the draws, and the most probable token (of the mean probabilities)."""
    whole = sweep.logits[at].double().log_softmax(-1)

    def score(logits: Tensor) -> Tensor:
        log = logits[:, 0].double().log_softmax(-1)
        kl = (whole.exp() * (whole - log)).masked_fill(whole.isinf(), 0.0).sum(-1) / math.log(2)
        return torch.stack([asked.of(logits[:, 0]).double(), log[:, asked.token].exp(), kl, log.argmax(-1).double()], -1)

    found = sweep.run(variants, score, (at,), "ablating").reshape(-1, draws, 4)
    mean = found.mean(1).float()
    return mean[:, 0], mean[:, 1], mean[:, 2], [int(i) for i in found[:, :, 3].long().mode(1).values]


def _prepare(
    s: Subject, parts: Sequence[Part], how: str, positions: Positions, reference: Any, draws: int, seed: int, memory: int | None, progress: bool | None
) -> tuple[Sweep, list[list[Patch]]]:
    """The sweep, and for every part what stands in its place: one patch, or one per draw."""
    choose(how, HOW, "way to ablate")
    check_reads_tokens(s.stack, "Ablation")
    check_whole(1, draws=draws)
    check_whole(0, seed=seed)
    if isinstance(reference, str):
        raise InputError("reference is one text, but several are meant: give a list of texts.")
    if reference is not None and not isinstance(reference, list | tuple):
        raise InputError(f"reference is a list of texts, but {described(type(reference))} was given.")
    sites = sorted({x for p in parts for x in (p.site, p.base) if x})
    others = [] if how == "zero" or reference is None else [_read_reference(s, text) for text in reference]
    note_length(s.model, max(map(len, [s, *others])))
    sweep = Sweep(s, sites if how != "zero" else (), memory=memory, progress=progress)
    where = None if positions is None else tuple(s.positions(positions))
    pools = {} if how == "zero" else _pools(s, sweep, sites, None if reference is None else others)
    draw = torch.Generator().manual_seed(seed)
    t = len(s)
    picks = [torch.randint(len(next(iter(pools.values()))), (t,), generator=draw) for _ in range(draws)] if how == "resample" else []
    made = []
    for part in parts:
        at = (part.position,) if part.position is not None else where
        if how == "zero":
            made.append([Patch(part.site, torch.zeros(()), at, part.head, part.unit, part.base)])
            continue
        pool = pools[part.site] - pools[part.base] if part.base else pools[part.site]  # [n ..]
        pool = pool[:, part.head] if part.head is not None else pool
        pool = pool[:, part.unit] if part.unit is not None else pool
        if how == "mean":
            made.append([Patch(part.site, pool.mean(0, keepdim=True), at, part.head, part.unit, part.base)])
        else:
            made.append([Patch(part.site, pool[pick if at is None else pick[list(at)]], at, part.head, part.unit, part.base) for pick in picks])
    return sweep, made


def _read_reference(s: Subject, text: Text) -> Subject:
    return read(s.model, text, s.tokenizer, source=list(s.source_ids) or None, tap=s.tap, note=False)


def _pools(s: Subject, sweep: Sweep, sites: Sequence[str], others: Sequence[Subject] | None) -> dict[str, Tensor]:
    """The values at all positions of the reference texts, [n ..] by site."""
    if others is None:
        return {site: sweep.base[site][0] for site in sites}
    if not others:
        raise InputError("reference holds no texts: give some, or leave it out for this text's own positions.")
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for other in others:
        record, _ = other.run(*sites)
        for site in sites:
            found[site].append(record[s.prefix + site][0])
    return {site: torch.cat(values) for site, values in found.items()}

"""The inside of a request: edits that hold while it runs, and the values that come back with the answer.

    "edits": [{"type": "Zero", "site": "blocks.5.attn.z[1]"}]                    what Intervention.save writes, inline
    "return_sites": ["blocks.3.resid_post", {"site": "blocks.5.attn.pattern", "heads": [0, 2], "positions": "0:8"}]

    prompt ──► Engine (edits at work in every step) ──► ids
                                                         │
    prompt + ids ──► one plain pass, edits at work ──► Keep ──► values of every position but the last token's

The values are taken in a pass of their own over the finished row, so that whoever asks for them does not slow the others down; a cached step
computes the same up to rounding. Their size is known before anything runs.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import GlassformerError, InputError, SiteError
from glassformer.core.modes import evaluating
from glassformer.core.sites import HEAD_AXIS, SiteInfo
from glassformer.core.tap import Pattern, Record, Tap, check_heads
from glassformer.look.changes import Change, Spans, spans_of, within
from glassformer.look.edits import FORMAT, VERSION, Intervention

from .limits import Limits
from .problems import Problem, of_error
from .schemas import Inside, SiteWanted


@dataclass(frozen=True)
class Entry:
    """One entry of ``return_sites``: which sites, which heads of them, which positions (None: all)."""

    pattern: Pattern
    spans: Spans
    positions: str | None


class Anatomy:
    """The sites of a model with their axes, and the sizes that do not grow with the text; worked out once."""

    def __init__(self, model: Any):
        self.model = model
        self.pair = hasattr(model, "encoder")

    @cached_property
    def sites(self) -> list[SiteInfo]:
        """All of them."""
        found: list[SiteInfo] = self.model.sites()
        return found

    @cached_property
    def axes(self) -> dict[str, list[str]]:
        """Of every site."""
        return {s.path: s.axes.split() for s in self.sites}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every site's value for a text of two tokens."""
        return {r.path: tuple(r.shape) for r in self.model.dimensions(2).rows}

    def shape(self, path: str, entry: Entry, row: int, source: int) -> list[int]:
        """Of the value that an entry returns, for a row of so many tokens (and, of an encoder-decoder, such a source)."""
        own = source if path.startswith("encoder.") else row
        along = {"t": own, "s": source if ".cross." in path else own}
        axes = self.axes[path]
        shape = [along.get(a, n) for a, n in zip(axes, self.shapes[path], strict=True)]
        if entry.pattern.heads is not None:
            check_heads(entry.pattern.heads, shape[HEAD_AXIS[path.rsplit(".", 1)[-1]]], path)
            shape[HEAD_AXIS[path.rsplit(".", 1)[-1]]] = len(entry.pattern.heads)
        at = place_axis(axes)
        if entry.spans is not None:
            if at is None:
                raise SiteError(f"{path!r} has the axes {' '.join(axes)}, without positions: leave positions out there.")
            shape[at] = len(chosen(entry.spans, shape[at]))
        return shape[1:] if axes[0] == "b" else shape


def place_axis(axes: Sequence[str]) -> int | None:
    """Which axis counts the positions of the value's own row: that of the queries, or of what has none, of the keys."""
    return next((axes.index(a) for a in ("t", "s") if a in axes), None)


def chosen(spans: Spans, n: int) -> list[int]:
    """The positions of a row of ``n`` that the spans name."""
    return [i for i in range(n) if within(spans, i)]


class Keep(Tap):
    """Keeps what the entries ask for, of a plain pass over one row, in float32 on the host."""

    def __init__(self, entries: Sequence[Entry], axes: dict[str, list[str]]):
        self.entries, self.axes = entries, axes
        self.kept: list[tuple[str, Entry, Tensor]] = []

    def visit(self, path: str, x: Tensor) -> Tensor:
        self._keep(path, lambda heads: x if heads is None else x.index_select(HEAD_AXIS[path.rsplit(".", 1)[-1]], torch.tensor(heads, device=x.device)))
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        self._keep(path, compute)

    def _keep(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        for entry in self.entries:
            if entry.pattern.meets(path):
                value = compute(entry.pattern.heads).detach()
                axes = self.axes[path]
                if entry.spans is not None and (at := place_axis(axes)) is not None:
                    value = value.index_select(at, torch.tensor(chosen(entry.spans, value.shape[at]), dtype=torch.long, device=value.device))
                self.kept.append((path, entry, (value[0] if axes[0] == "b" else value).to("cpu", torch.float32)))

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(e.pattern for e in self.entries)


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the inside, read and checked."""

    entries: tuple[Entry, ...] = ()
    as_lists: bool = False
    edits: Intervention | None = None
    trace: bool | int = False
    anatomy: Anatomy | None = field(default=None, repr=False)

    def tap(self) -> Tap | None:
        """The edits for one answer (a tap serves one at a time)."""
        return None if self.edits is None or self.anatomy is None else self.edits.tap(self.anatomy.model)

    def whole(self, first: int) -> Tap | None:
        """The edits for one pass over a whole row, whose first step read so many tokens."""
        return None if self.edits is None or self.anatomy is None else whole_row(self.edits, first, self.anatomy).tap(self.anatomy.model)

    def check_size(self, rows: Sequence[tuple[int, int]], limits: Limits) -> None:
        """Raise a :class:`Problem` if the values of these rows (tokens, and source's tokens) will be larger than one request may return."""
        if not self.entries or self.anatomy is None:
            return
        size = 0
        for entry in self.entries:
            for path in (p for p in self.anatomy.axes if entry.pattern.meets(p)):
                size += sum(4 * math.prod(self.anatomy.shape(path, entry, row, source)) for row, source in rows)
        if size > limits.site_bytes:
            raise Problem(
                413,
                f"return_sites asks for up to {size:,} bytes of values, and one request returns at most {limits.site_bytes:,}: "
                "choose fewer sites, heads or positions, or fewer new tokens.",
                param="return_sites",
                code="sites_too_large",
            )

    def values(self, prompt: Sequence[int], ids: Sequence[int], start: Sequence[int] = ()) -> list[dict[str, Any]]:
        """The values asked for, from one pass over the row; the last token drawn was never read, and has none. ``start``: of a decoder's row."""
        assert self.anatomy is not None
        model = self.anatomy.model
        keep: Tap = Keep(self.entries, self.anatomy.axes)
        edits = self.whole(len(start) if self.anatomy.pair else len(prompt))
        tap = keep if edits is None else edits | keep
        device = next(model.parameters()).device
        row = torch.tensor([[*(start if self.anatomy.pair else prompt), *ids[:-1]]], device=device)
        with torch.no_grad(), evaluating(model):
            if self.anatomy.pair:
                model(torch.tensor([list(prompt)], device=device), row, tap=tap)
            else:
                model(row, tap=tap)
        assert isinstance(keep, Keep)
        return [self._told(*kept) for kept in keep.kept]

    def _told(self, path: str, entry: Entry, value: Tensor) -> dict[str, Any]:
        assert self.anatomy is not None
        axes = [a for a in self.anatomy.axes[path] if a != "b"]
        about: dict[str, Any] = {"site": path, "axes": " ".join(axes), "shape": list(value.shape), "dtype": "float32"}
        if entry.pattern.heads is not None:
            about["heads"] = list(entry.pattern.heads)
        if entry.positions is not None:
            about["positions"] = entry.positions
        array = value.contiguous().numpy().astype("<f4", copy=False)
        return about | ({"values": _plain(array)} if self.as_lists else {"base64": base64.b64encode(array.tobytes()).decode()})


def _plain(array: Any) -> Any:
    """Nested lists; what JSON cannot say (infinities of masked scores) is null."""
    return array.tolist() if np.isfinite(array).all() else _nulls(array.tolist())


def _nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_nulls(v) for v in value]
    return value if math.isfinite(value) else None


def read(body: Inside, anatomy: Anatomy, limits: Limits, allow_edits: bool = True, allow_sites: bool = True) -> Wanted:
    """What a request asks of the inside. Raises a :class:`Problem` for what the model lacks and for what this server does not give."""
    wanted: bool | int = False if body.return_trace is None else body.return_trace
    if wanted is not True and wanted > limits.trace_candidates:
        raise Problem(400, f"return_trace is {wanted}, and this server keeps at most {limits.trace_candidates} candidates of a stage.", param="return_trace")
    if body.sites_format is not None and not body.return_sites:
        raise Problem(400, "sites_format says how the values of return_sites are written, but return_sites was not given.", param="sites_format")
    if body.return_sites and not allow_sites:
        raise Problem(403, "This server was started with --no-sites, so it returns no values of the inside.", param="return_sites")
    if body.edits and not allow_edits:
        raise Problem(403, "This server was started with --no-edits, so no request changes what its model computes.", param="edits")
    entries = tuple(_entry(e, anatomy) for e in body.return_sites or ())
    return Wanted(entries, body.sites_format == "lists", _edits(body.edits, anatomy, limits), wanted, anatomy)


def _entry(given: str | SiteWanted, anatomy: Anatomy) -> Entry:
    one = given if isinstance(given, SiteWanted) else SiteWanted(site=given)
    try:
        pattern = Pattern.read(one.site)
        if pattern.segments[0] == "step":
            raise SiteError(f"{one.site!r} begins with 'step.', but values are returned for the whole row: leave it out, and say positions.")
        if one.heads is not None:
            if pattern.heads is not None:
                raise SiteError(f"{one.site!r} picks heads, and heads={one.heads} does too: leave one of them out.")
            pattern = Pattern.read(f"{one.site}[{','.join(map(str, one.heads))}]")
        Record(pattern.text).check(anatomy.axes)
        spans = None if one.positions is None else spans_of(Change(one.site, positions=one.positions).positions)
        entry = Entry(pattern, spans, one.positions)
        for path in (p for p in anatomy.axes if pattern.meets(p)):
            if path not in anatomy.shapes:
                raise SiteError(f"{path!r} cannot be returned: nothing says how large it is.")
            anatomy.shape(path, entry, 1, 1)
        return entry
    except GlassformerError as error:
        problem = of_error(error)
        problem.param = "return_sites"
        raise problem from None


def _edits(given: list[dict[str, Any]] | dict[str, Any] | None, anatomy: Anatomy, limits: Limits) -> Intervention | None:
    if not given:
        return None
    data = {"format": FORMAT, "version": VERSION, "name": "request", "edits": given} if isinstance(given, list) else given
    entries = data.get("edits")
    if isinstance(entries, list) and len(entries) > limits.edits:
        raise Problem(400, f"{len(entries)} edits were given, and one request has at most {limits.edits}.", param="edits")
    try:
        made = Intervention.from_dict(data, "edits")
        made.check(anatomy.model)
        return made
    except GlassformerError as error:
        problem = of_error(error)
        problem.param = "edits"
        raise problem from None


def whole_row(edits: Intervention, first: int, anatomy: Anatomy) -> Intervention:
    """The same edits for one pass over the finished row: what holds in some steps only, holds at the positions that those steps read.

    Step 0 reads the ``first`` tokens, step n the token that step n - 1 drew. Raises :class:`InputError` where a value has no positions.
    """
    made: list[Change] = []
    for change in edits.edits:
        steps = spans_of(change.steps)
        if steps is None:
            made.append(change)
            continue
        paths = [p for p in anatomy.axes if Pattern.read(change.site).meets(p)]
        if all(p.startswith("encoder.") for p in paths):
            made += [_without_steps(change, change.positions)] if within(steps, 0) else []
            continue
        if any(p.endswith("logits") or "t" not in anatomy.axes[p] for p in paths) and not all("s" in anatomy.axes[p] for p in paths):
            raise InputError(f"{change.words} holds in steps {change.steps} only, which cannot be shown beside return_sites: leave steps out, or return_sites.")
        own = spans_of(change.positions)
        pieces = [f"{max(low - 1, 0) + first}:{'' if high is None else high - 1 + first}" for low, high in steps if high is None or high > 1]
        pieces += [f"0:{first}"] if within(steps, 0) else []
        both = _both(own, spans_of(",".join(pieces)))
        if both:
            made.append(_without_steps(change, both))
    return Intervention(edits.name, tuple(made)) if made else _nothing(edits)


def _both(a: Spans, b: Spans) -> str:
    """The positions that are in both, written."""
    if a is None or b is None:
        return ",".join(f"{low}:{'' if high is None else high}" for low, high in (a or b or ()))
    pairs = [(max(x[0], y[0]), min((h for h in (x[1], y[1]) if h is not None), default=None)) for x in a for y in b]
    return ",".join(f"{low}:{'' if high is None else high}" for low, high in pairs if high is None or low < high)


def _without_steps(change: Change, positions: Any) -> Change:
    from dataclasses import replace

    return replace(change, steps=None, positions=positions)


def _nothing(edits: Intervention) -> Intervention:
    """An intervention that changes nothing, at the first site of the edits."""
    from glassformer.look.changes import Scale

    return Intervention(edits.name, (Scale(edits.edits[0].site, 1.0),))

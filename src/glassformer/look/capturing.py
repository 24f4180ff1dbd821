"""Values of a pass, held in memory where they fit and on disk where they do not.

    held = capture(model, text, ["blocks.*.resid_pre"], budget=2 * 10**9)
    held["blocks.3.resid_pre"]           [b t d], read when it is asked for
    held.pattern(3, 5)                   [t s] of one head, made from the stream that enters its layer: no other matrix exists

On disk each value is written as it is computed, patterns head by head, and forgotten: memory holds the pass itself and one value.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.core.files import trouble
from glassformer.core.modes import evaluating
from glassformer.core.tap import Record
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.safetensors_file import header
from glassformer.weights.stored import Stored

from .forecasting import available, check_budget, dry_run, model_of, patterns_of, rows_within, said
from .storing import Draft
from .subject import Text, check_layer, choose, n_heads, note_length, read

FILE = "captured.safetensors"
SQUARE = ("scores", "pattern")


class Captured:
    """Values by path. ``place``: ``"memory"`` or ``"disk"``; ``lengths``: real tokens per row.

    ``held[path]`` is the value of the whole batch; what stands in it beyond a row's own length was computed from padding and means nothing.
    :meth:`row` gives one row without that.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        source: Tensor | None,
        lengths: Sequence[int],
        values: dict[str, Tensor] | dict[str, Stored],
        axes: dict[str, list[str]],
        keep: Any = None,
    ):
        self.model, self.tokens, self.source, self.lengths = model, tokens, source, list(lengths)
        self._values, self._axes, self._keep = values, axes, keep  # a temporary folder lives as long as this object

    @property
    def place(self) -> str:
        """Where the values lie."""
        return "disk" if any(isinstance(v, Stored) for v in self._values.values()) else "memory"

    @property
    def paths(self) -> list[str]:
        """What was captured, in the order of computation."""
        return list(self._values)

    @property
    def bytes(self) -> int:
        """Bytes held, in memory or on disk."""
        if self.place == "disk":
            return sum(v.nbytes for v in self._values.values())
        return sum({v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in self._values.values() if isinstance(v, Tensor)}.values())

    def _find(self, path: str) -> Tensor | Stored:
        if path not in self._values:
            raise SiteError(f"{path!r} was not captured.{did_you_mean(path, self._values)} Captured: {len(self._values)} sites.")
        return self._values[path]

    def __getitem__(self, path: str) -> Tensor:
        """The whole value at a path, read now if it lies on disk."""
        found = self._find(path)
        return found.read() if isinstance(found, Stored) else found

    def __contains__(self, path: str) -> bool:
        return path in self._values

    def __len__(self) -> int:
        return len(self._values)

    def row(self, path: str, row: int, head: int | None = None) -> Tensor:
        """One row of a value, without its batch axis and without padding; of scores and patterns one head, if given. Nothing else is read."""
        found, axes = self._find(path), self._axes[path]
        if axes[:1] != ["b"]:
            raise SiteError(f"{path!r} has the axes {' '.join(axes)}, which all rows share: read it with held[path].")
        self._check_row(row)
        one = found[row] if isinstance(found, Tensor) else found.item(row)
        axes = axes[1:]
        if head is not None:
            if axes[:1] != ["h"]:
                raise SiteError(f"{path!r} has the axes b {' '.join(axes)}, where a head is no part of its own: leave head out.")
            if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < one.shape[0]:
                raise SiteError(f"Head {head!r} was asked for, but {one.shape[0]} were captured at {path!r}, counted from 0.")
            one, axes = one[head] if isinstance(one, Tensor) else one.item(head), axes[1:]
        x = one if isinstance(one, Tensor) else one.read()
        if path.startswith("encoder.") or self.lengths[row] == self.tokens.shape[1]:  # of the source, which is not padded
            return x
        own = [i for i, a in enumerate(axes) if a == "t" or (a == "s" and ".cross." not in path)]
        return x[tuple(slice(self.lengths[row]) if i in own else slice(None) for i in range(x.ndim))]

    def _check_row(self, row: int) -> None:
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(self.lengths):
            raise InputError(f"Row {row!r} was asked for, but there are {len(self.lengths)}, counted from 0.")

    def pattern(self, layer: int, head: int, row: int = 0, kind: str = "attn") -> Tensor:
        """What head ``head`` of a layer pays attention to, [t s]: read if it was captured, else made now, from the stream that enters the layer if
        that was captured, else from the tokens. No other head's matrix is made.
        """
        halves = isinstance(self.model, EncoderDecoderModel)
        stack, prefix = (self.model.decoder, "decoder.") if halves else (self.model, "")
        choose(kind, ("attn", "cross") if halves else ("attn",), "kind of attention of this model")
        check_layer(stack, layer)
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < (n := n_heads(stack, layer, kind)):
            n = n_heads(stack, layer, kind)
            raise SiteError(f"Head {layer}.{head} was asked for, but layer {layer} has {n} heads, 0 to {n - 1}.")
        self._check_row(row)
        path, length = f"blocks.{layer}.{kind}.pattern", self.lengths[row]
        if prefix + path in self._values and self._find(prefix + path).shape[1] == n:
            return self.row(prefix + path, row, head)
        tap, stream = _Until(f"{path}[{head}]"), f"{prefix}blocks.{layer}.resid_pre"
        with torch.no_grad(), evaluating(self.model):
            memory = None if self.source is None or kind == "attn" else self.model.encode(self.source[row : row + 1])
            try:
                if stream in self._values:
                    stack.resume(self.row(stream, row).to(self.tokens.device)[None], layer, memory=memory, tap=tap)
                else:
                    stack.states(self.tokens[row : row + 1, :length], memory=memory if memory is not None else self._memory(row), tap=tap)
            except _Enough:
                pass
        return tap[path][0, 0]

    def _memory(self, row: int) -> Tensor | None:
        return None if self.source is None else self.model.encode(self.source[row : row + 1])


def capture(
    model: Any,
    texts: Text | Sequence[Text],
    sites: str | Sequence[str],
    *,
    tokenizer: Tokenizer | None = None,
    source: Text | None = None,
    budget: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    disk: bool = True,
) -> Captured:
    """The values at ``sites`` (patterns, full paths) of one text, or of several as rows of one batch (right-padded).

    ``budget``: bytes of memory, None: half of what is available. What does not fit is written to one safetensors file in ``folder`` (None: a
    temporary one, removed with the answer), in as few rows at a time as the budget asks for. ``disk=False`` forbids it.
    Raises :class:`InputError` if it fits nowhere, with the bytes that it needs.
    """
    whole, patterns = model_of(model), patterns_of(sites)
    several = isinstance(texts, list | tuple) and bool(texts) and not hasattr(texts[0], "__index__")
    given: list[Any] = list(texts) if several else [texts]
    subjects = [read(model, t, tokenizer, source=source, note=False) for t in given]
    lengths = [len(s) for s in subjects]
    note_length(subjects[0].model, max(lengths))
    tokens = torch.zeros(len(subjects), max(lengths), dtype=torch.long, device=subjects[0].device)
    for i, s in enumerate(subjects):
        tokens[i, : len(s)] = s.tokens[0]
    ids = torch.tensor([subjects[0].source_ids] * len(subjects), device=tokens.device) if subjects[0].source_ids else None
    budget = available(tokens.device) if budget is None else check_budget(budget)
    rows, t, source_t = len(lengths), max(lengths), None if ids is None else ids.shape[1]
    shapes, most, infos = dry_run(whole, Record(*patterns), rows, t, source_t)
    axes = {path: infos[path].axes.split() for path in shapes}
    if most <= budget:
        record = Record(*patterns)
        _run(whole, tokens, ids, lengths, record)
        return Captured(whole, tokens, ids, lengths, record.values, axes)
    if not disk:
        raise InputError(
            f"The capture takes {said(most)} at one time, but the budget is {said(budget)} and disk=False: raise it, or ask for fewer sites or texts."
        )
    if folder is not None and (Path(folder) / FILE).exists():
        raise InputError(f"{str(folder)!r} already holds a capture ({FILE}), which another one may be reading: choose another folder, or remove it.")
    at_once = _rows_at_once(whole, patterns, shapes, rows, t, source_t, budget)
    keep = tempfile.TemporaryDirectory(prefix="glassformer-") if folder is None else None
    place = Path(keep.name if keep is not None else folder or ".")
    try:
        place.mkdir(parents=True, exist_ok=True)
        _write(whole, place / FILE, patterns, shapes, tokens, ids, lengths, at_once, {p for p in shapes if axes[p][:1] == ["b"]})
    except OSError as error:
        reason, todo = trouble(error)
        raise InputError(f"The capture cannot be written to {str(place)!r}: {reason}. {todo}.") from error
    return Captured(whole, tokens, ids, lengths, dict(header(place / FILE)), axes, keep)


def _run(model: Any, tokens: Tensor, source: Tensor | None, lengths: Sequence[int], tap: Record) -> None:
    ragged = lengths if len(set(lengths)) > 1 or lengths[0] < tokens.shape[1] else None
    with torch.no_grad(), evaluating(model):
        model(*(() if source is None else (source,)), tokens, lengths=ragged, tap=tap)


def _rows_at_once(model: Any, patterns: tuple[str, ...], shapes: dict[str, Tensor], rows: int, t: int, source_t: int | None, budget: int) -> int:
    """How many rows a pass may have when every value is written at once."""
    need = {n: dry_run(model, _Spill(patterns, shapes, lambda *_: None), n, t, source_t)[1] for n in {1, rows}}
    if need[rows] <= budget:
        return rows
    if need[1] > budget:
        raise InputError(
            f"Even with every value on disk a pass of {t} tokens takes {said(need[1])} at one time, but the budget is {said(budget)}: "
            "raise it, give a shorter text, or leave out what is made for all heads at once (result)."
        )
    return rows_within(need[1], need[rows], rows, budget)


def _write(
    model: Any,
    file: Path,
    patterns: tuple[str, ...],
    shapes: dict[str, Tensor],
    tokens: Tensor,
    source: Tensor | None,
    lengths: list[int],
    at_once: int,
    by_row: set[str],
) -> None:
    """All values into one file, each as it is computed."""
    b = len(lengths)
    with Draft(file, {path: (x.dtype, tuple(x.shape)) for path, x in shapes.items()}) as draft:
        for first in range(0, b, at_once):

            def put(path: str, x: Tensor, head: int | None, first: int = first) -> None:
                whole = shapes[path]
                unit = whole.nbytes // b if path in by_row else 0  # bytes of a row; a value without rows is one
                if head is None:
                    draft.put(path, x, first * unit)
                    return
                matrix = unit // whole.shape[1]
                for i in range(x.shape[0]):
                    draft.put(path, x[i], (first + i) * unit + head * matrix)

            rows = slice(first, first + at_once)
            _run(model, tokens[rows], None if source is None else source[rows], lengths[rows], _Spill(patterns, shapes, put))


class _Spill(Record):
    """Hands every value on as it comes and keeps none; scores and patterns head by head."""

    def __init__(self, patterns: tuple[str, ...], shapes: dict[str, Tensor], put: Callable[[str, Tensor, int | None], None]):
        super().__init__(*patterns)
        self._shapes, self._put = shapes, put

    def visit(self, path: str, x: Tensor) -> Tensor:
        super().visit(path, x)
        if path in self.values:
            self._put(path, self.values.pop(path), None)
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if not self.wants(path):
            return
        if path.rsplit(".", 1)[-1] not in SQUARE:
            self._put(path, compute(self._wanted(path)[1]).detach(), None)
            return
        for i, head in enumerate(self._wanted(path)[1] or range(self._shapes[path].shape[1])):
            self._put(path, compute((head,)).detach(), i)


class _Enough(Exception):
    """What was asked for is there, and the rest of the pass is not needed."""


class _Until(Record):
    """Records one offered value and ends the pass."""

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        super().offer(path, compute)
        if path in self.values:
            raise _Enough


__all__ = ["Captured", "capture"]

"""Values of a pass, held in memory where they fit and on disk where they do not.

    held = capture(model, text, ["blocks.*.resid_pre"], budget=2 * 10**9)
    held["blocks.3.resid_pre"]           [b t d], read when it is asked for
    held.pattern(3, 5)                   [t s] of one head, made from the stream that enters its layer: no other matrix exists

On disk each value is written as it is computed, patterns head by head, and forgotten: memory holds the pass itself and one value.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.core.files import flush, trouble
from glassformer.core.modes import evaluating
from glassformer.core.tap import Record
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.safetensors_file import header
from glassformer.weights.stored import TYPES, Stored

from .forecasting import available, check_budget, dry_run, model_of, said
from .subject import Text, check_layer, n_heads, read

FILE = "captured.safetensors"
NAMES = {dtype: name for name, dtype in TYPES.items()}
SQUARE = ("scores", "pattern")


class Captured:
    """Values by path. ``place``: ``"memory"`` or ``"disk"``; ``lengths``: real tokens per row (what lies beyond them means nothing)."""

    def __init__(
        self, model: Any, tokens: Tensor, source: Tensor | None, lengths: Sequence[int], values: dict[str, Tensor] | dict[str, Stored], keep: Any = None
    ):
        self.model, self.tokens, self.source, self.lengths = model, tokens, source, list(lengths)
        self._values, self._keep = values, keep  # a temporary folder lives as long as this object

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
        """One row of a value, without its batch axis; of scores and patterns one head, if given. Nothing else is read."""
        found = self._find(path)
        if isinstance(found, Tensor):
            return found[row] if head is None else found[row, head]
        one = found.item(row)
        return (one if head is None else one.item(head)).read()

    def pattern(self, layer: int, head: int, row: int = 0, kind: str = "attn") -> Tensor:
        """What head ``head`` of a layer pays attention to, [t s]: read if it was captured, else made now, from the stream that enters the layer if
        that was captured, else from the tokens. No other head's matrix is made.
        """
        halves = isinstance(self.model, EncoderDecoderModel)
        stack, prefix = (self.model.decoder, "decoder.") if halves else (self.model, "")
        check_layer(stack, layer)
        if not 0 <= head < (n := n_heads(stack, layer, kind)):
            raise SiteError(f"Head {layer}.{head} was asked for, but layer {layer} has {n} heads, 0 to {n - 1}.")
        if not 0 <= row < len(self.lengths):
            raise InputError(f"Row {row} was asked for, but there are {len(self.lengths)}.")
        path, length = f"blocks.{layer}.{kind}.pattern", self.lengths[row]
        if prefix + path in self._values and self._find(prefix + path).shape[1] == n:
            return self.row(prefix + path, row, head)[:length]
        tap, stream = _Until(f"{path}[{head}]"), f"{prefix}blocks.{layer}.resid_pre"
        with torch.no_grad(), evaluating(self.model):
            memory = None if self.source is None or kind == "attn" else self.model.encode(self.source[row : row + 1])
            try:
                if stream in self._values:
                    stack.resume(self.row(stream, row)[None, :length], layer, memory=memory, tap=tap)
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
    whole, patterns = model_of(model), (sites,) if isinstance(sites, str) else tuple(sites)
    several = isinstance(texts, list | tuple) and bool(texts) and not isinstance(texts[0], int)
    given: list[Any] = list(texts) if several else [texts]
    subjects = [read(model, t, tokenizer, source=source) for t in given]
    lengths = [len(s) for s in subjects]
    tokens = torch.zeros(len(subjects), max(lengths), dtype=torch.long, device=subjects[0].device)
    for i, s in enumerate(subjects):
        tokens[i, : len(s)] = s.tokens[0]
    ids = torch.tensor([subjects[0].source_ids] * len(subjects), device=tokens.device) if subjects[0].source_ids else None
    budget = available() if budget is None else check_budget(budget)
    rows, t, source_t = len(lengths), max(lengths), None if ids is None else ids.shape[1]
    shapes, most, infos = dry_run(whole, Record(*patterns), rows, t, source_t)
    if most <= budget:
        record = Record(*patterns)
        _run(whole, tokens, ids, lengths, record)
        return Captured(whole, tokens, ids, lengths, record.values)
    if not disk:
        raise InputError(
            f"The capture takes {said(most)} at one time, but the budget is {said(budget)} and disk=False: raise it, or ask for fewer sites or texts."
        )
    at_once = _rows_at_once(whole, patterns, shapes, rows, t, source_t, budget)
    keep = tempfile.TemporaryDirectory(prefix="glassformer-") if folder is None else None
    place = Path(keep.name if keep is not None else folder or ".")
    try:
        place.mkdir(parents=True, exist_ok=True)
        file = _write(whole, place / FILE, patterns, shapes, tokens, ids, lengths, at_once, {p for p in shapes if infos[p].axes[0] == "b"})
    except OSError as error:
        reason, todo = trouble(error)
        raise InputError(f"The capture cannot be written to {str(place)!r}: {reason}. {todo}.") from error
    return Captured(whole, tokens, ids, lengths, dict(header(file)), keep)


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
    return max(1, int(rows * budget / need[rows]))


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
) -> Path:
    """All values into one file whose header is known before it begins; a draft until it is whole."""
    entries: dict[str, Any] = {}
    at = 0
    for path, x in shapes.items():
        entries[path] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
        at += x.nbytes
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    draft = file.with_name(f".{file.name}.draft")
    begin, b = 8 + len(head), len(lengths)
    handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.pwrite(handle, len(head).to_bytes(8, "little") + head, 0)
        os.ftruncate(handle, begin + at)
        for first in range(0, b, at_once):

            def put(path: str, x: Tensor, head: int | None, first: int = first) -> None:
                whole, start = shapes[path], begin + entries[path]["data_offsets"][0]
                unit = whole.nbytes // b if path in by_row else 0  # bytes of a row; a value without rows is one
                if head is None:
                    _put(handle, x, start + first * unit)
                    return
                matrix = unit // whole.shape[1]
                for i in range(x.shape[0]):
                    _put(handle, x[i], start + (first + i) * unit + head * matrix)

            rows = slice(first, first + at_once)
            _run(model, tokens[rows], None if source is None else source[rows], lengths[rows], _Spill(patterns, shapes, put))
        os.fsync(handle)
        os.close(handle)
        handle = -1
        draft.replace(file)
        flush(file.parent)
    finally:
        if handle >= 0:
            os.close(handle)
        draft.unlink(missing_ok=True)
    return file


def _put(handle: int, x: Tensor, at: int) -> None:
    numbers: Any = x.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    view = memoryview(numbers)
    while len(view):
        n = os.pwrite(handle, view, at)
        view, at = view[n:], at + n


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
        if not self._meets(path):
            return
        if path.rsplit(".", 1)[-1] not in SQUARE:
            self._put(path, compute(self._heads(path)).detach(), None)
            return
        for i, head in enumerate(self._heads(path) or range(self._shapes[path].shape[1])):
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

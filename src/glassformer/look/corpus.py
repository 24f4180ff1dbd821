"""Activations of a whole text on disk: written within a memory bound, gone on with after an interruption, read back lazily.

acts = activations(model, "corpus.txt", ["blocks.2.resid_post"], "acts", batch=8, context=128)
acts["blocks.2.resid_post"][10_000:10_100]      [100 d]: only these are read
for tokens, x in acts.batches("blocks.2.resid_post", 4096): ...

text ──► tokens ──► windows of `context` tokens ──► passes of `batch` windows ──► shard 0, shard 1, …      each renamed to its place when whole
                                                                              └─► index.json               model, sites, shapes, text
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import InputError, SiteError, did_you_mean
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.numerics import dtype_named
from glassformer.core.tap import Record
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded
from glassformer.weights.safetensors_file import header
from glassformer.weights.stored import Stored

from .forecasting import available, check_budget, check_sizes, dry_run, model_of, patterns_of, rows_within, said
from .storing import Draft
from .subject import shorten

INDEX, FORMAT, VERSION = "index.json", "glassformer.activations", 1
SHARD = 256 << 20  # bytes of a shard, at most
TYPES = ("float64", "float32", "float16", "bfloat16")
FIELDS = {"model": str, "text": str, "tokens": int, "context": int, "dtype": str, "windows_per_shard": int, "patterns": list, "sites": dict}


class Rows:
    """One site's vectors [n ..] across the shards: ``[i]``, ``[a:b]``, a list of places or a mask [n] reads those and no others."""

    def __init__(self, parts: Sequence[Stored]):
        self._parts = list(parts)
        self._ends = torch.tensor([p.shape[0] for p in self._parts]).cumsum(0).tolist()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(tokens, ...)``."""
        return (self._ends[-1], *self._parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The type on disk."""
        return self._parts[0].dtype

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: int | slice | Sequence[int] | Tensor) -> Tensor:
        n = len(self)
        if isinstance(where, slice):
            low, high, step = where.indices(n)
            if step == 1:
                return self._run(low, max(low, high))
            where = list(range(low, high, step))
        places = torch.as_tensor(where)
        if places.dtype == torch.bool and tuple(places.shape) == (n,):
            places = places.nonzero().flatten()
        elif places.numel() and (places.dtype == torch.bool or places.is_floating_point() or places.ndim > 1):
            raise InputError(f"Places are whole numbers, a slice, or a mask of {n:,} truths, but {places.dtype} of shape {tuple(places.shape)} was given.")
        chosen = places.long().flatten().tolist()
        if wrong := [i for i in chosen if not -n <= i < n]:
            raise InputError(f"Place {wrong[0]} was asked for, but there are {n:,} tokens.")
        found = torch.stack([self._run(i % n, i % n + 1)[0] for i in chosen]) if chosen else self._run(0, 0)
        return found if places.ndim else found[0]

    def _run(self, low: int, high: int) -> Tensor:
        out = torch.empty((high - low, *self.shape[1:]), dtype=self.dtype)
        start = 0
        for part, end in zip(self._parts, self._ends, strict=True):
            a, b = max(low, start), min(high, end)
            if a < b:
                size = part.nbytes // part.shape[0]
                raw = part.raw((a - start) * size, (b - start) * size)
                out[a - low : b - low] = raw.view(part.dtype).view(b - a, *part.shape[1:])
            start = end
        return out


class Activations:
    """What :func:`activations` wrote. ``index``: model, sites, shapes, type, context, text; ``tokens``: :class:`Rows` of ids; ``acts[site]``: of vectors."""

    def __init__(self, folder: Path, index: dict[str, Any], shards: Sequence[dict[str, Stored]]):
        self.folder, self.index, self._shards = folder, index, shards
        self.tokens = Rows([s["tokens"] for s in shards])

    @property
    def sites(self) -> list[str]:
        """The sites, by full path."""
        return list(self.index["sites"])

    @property
    def context(self) -> int:
        """Tokens in a window: place ``i`` stood at position ``i % context``."""
        return int(self.index["context"])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, site: str) -> Rows:
        if site not in self.index["sites"]:
            raise SiteError(f"{site!r} was not kept in {str(self.folder)!r}.{did_you_mean(site, self.sites)} Kept: {', '.join(self.sites)}.")
        return Rows([s[site] for s in self._shards])

    def batches(self, site: str, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids [n] and vectors [n ..], ``size`` tokens at a time, in the order of the text."""
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"size is a number of tokens, at least 1, but {size!r} was given.")
        rows = self[site]
        for at in range(0, len(rows), size):
            yield self.tokens[at : at + size], rows[at : at + size]

    def __repr__(self) -> str:
        return f"Activations({len(self):,} tokens, {len(self.sites)} sites, {self.index['dtype']}, in {str(self.folder)!r})"


def activations(
    model: Any,
    text: str | os.PathLike[str] | Sequence[str],
    sites: str | Sequence[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    batch: int = 8,
    context: int = 128,
    dtype: str = "float32",
    budget: int | None = None,
    most: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> Activations:
    """Write the values at ``sites`` (of every token) of a text file, or of texts one after another, to ``folder`` as safetensors shards with an index.

    ``batch``: windows of ``context`` tokens in a pass, fewer if ``budget`` (bytes of memory for the passes; None: half of what is available) asks for
    it; beside them the text and its token ids stand in memory. ``dtype``: on disk. ``most``: at most so many tokens. A folder that holds part of the
    same work is gone on with; one of another model, text or setting is refused, and with ``resume=False`` any.
    Raises :class:`InputError` for what cannot be, :class:`SiteError` for sites that have no value per token.
    """
    tokenizer = tokenizer if tokenizer is not None or not isinstance(model, Loaded) else model.tokenizer
    net = model_of(model)
    if isinstance(net, EncoderDecoderModel):
        raise InputError("An encoder-decoder reads pairs of texts, and a corpus is one text: use its encoder, model.encoder.")
    check_sizes(net, batch, context)
    if dtype not in TYPES:
        raise InputError(f"dtype={dtype!r} is no type to keep activations in: one of {', '.join(TYPES)}.")
    ids, digest = _read_text(text, tokenizer, net, most)
    budget = available(next(net.parameters()).device) if budget is None else check_budget(budget)
    context = min(context, len(ids))
    patterns = patterns_of(sites)
    shapes, rows, windows = _plan(net, patterns, batch, context, dtype_named(dtype), budget)
    index: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": fingerprint(net),
        "text": digest,
        "tokens": len(ids),
        "context": context,
        "dtype": dtype,
        "windows_per_shard": windows,
        "patterns": list(patterns),
        "sites": shapes,
    }
    place = Path(folder)
    try:
        index = _open(place, index, resume)
        _fill(net, ids, place, index, rows, progress)
    except OSError as error:
        reason, todo = files.trouble(error)
        raise InputError(f"Activations cannot be written to {str(place)!r}: {reason}. {todo}; whole shards stay, and the same call goes on.") from error
    return read_activations(place)


def read_activations(folder: str | os.PathLike[str]) -> Activations:
    """What stands in a folder, unread until it is asked for. Raises :class:`InputError` if it is none, or not whole."""
    place = Path(folder)
    index = _index(place)
    if index is None:
        raise InputError(f"{str(place)!r} holds no activations ({INDEX} is missing): look.activations writes them.")
    names = [_shard(i) for i in range(_shards(index))]
    if missing := [n for n in names if not (place / n).exists()]:
        raise InputError(
            f"{str(place)!r} is not whole: {len(missing)} of {len(names)} shards are missing; call activations again with the same text and it goes on."
        )
    shards = [header(place / n) for n in names]
    size = index["context"] * index["windows_per_shard"]
    for i, (name, shard) in enumerate(zip(names, shards, strict=True)):
        n = min(size, index["tokens"] - i * size)
        for key, shape in (("tokens", []), *index["sites"].items()):
            if key not in shard or list(shard[key].shape) != [n, *shape]:
                is_there = f"shape {list(shard[key].shape)}" if key in shard else "nothing"
                raise InputError(f"{name} in {str(place)!r} has {is_there} at {key!r}, but {INDEX} says {[n, *shape]}: remove that shard and write it again.")
    return Activations(place, index, shards)


def fingerprint(model: Any) -> str:
    """sha256 of a model's shape and of every parameter."""
    seen = hashlib.sha256(json.dumps(model.spec.to_dict(), sort_keys=True, default=str).encode())
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        seen.update(f"{name} {tuple(x.shape)} {x.dtype}".encode())
        if not hasattr(x, "tensor_data_names"):  # of one held in few bits the shape must do
            flat: Any = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            seen.update(flat)
    return seen.hexdigest()


# What is to be done


def _read_text(text: Any, tokenizer: Tokenizer | None, model: Any, most: int | None) -> tuple[list[int], str]:
    """The ids, and a hash of them."""
    if tokenizer is None:
        raise InputError("A text is read by a tokenizer, but there is none: give tokenizer=, or what gf.load gave in place of the model.")
    if isinstance(text, str | os.PathLike):
        file = Path(text)
        try:
            if not file.is_file():
                raise InputError(f"There is no file {shorten(str(text), 200)!r}: give a text file, or a list of texts.")
            texts = [file.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise InputError(f"{str(file)!r} is not UTF-8 text (byte {error.start}): convert it first.") from error
        except OSError as error:  # among others: a whole text, which is too long for a name
            raise InputError(f"{shorten(str(text))!r} cannot be read as a file ({error.strerror}): give a text file, or a list of texts.") from error
    elif isinstance(text, Iterable):
        texts = list(text)
        if wrong := [t for t in texts if not isinstance(t, str)]:
            raise InputError(f"The list of texts holds {described(type(wrong[0]))}: give texts.")
    else:
        raise InputError(f"A text file or a list of texts is read, but {described(type(text))} was given.")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise InputError(f"most is a number of tokens, at least 1, but {most!r} was given.")
    ids = [i for t in texts for i in tokenizer.encode(t)][:most]
    if not ids:
        raise InputError("The text has 0 tokens, but at least 1 is needed: give some text.")
    if max(ids) >= model.spec.vocab_size:
        raise InputError(
            f"The text has the token id {max(ids)}, but the model's vocabulary is 0 to {model.spec.vocab_size - 1}: use the tokenizer of this model."
        )
    return ids, hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).hexdigest()


def _plan(model: Any, patterns: tuple[str, ...], batch: int, context: int, dtype: torch.dtype, budget: int) -> tuple[dict[str, list[int]], int, int]:
    """Shape per token by path, windows in a pass, windows in a shard."""
    held, _, infos = dry_run(model, Record(*patterns), 1, context)
    for path in held:
        axes = infos[path].axes.split()
        if axes[:2] not in (["b", "t"], ["b", "s"]) or {"t", "s"} & set(axes[2:]) or held[path].shape[1] != context:
            raise SiteError(f"{path!r} has the axes {' '.join(axes)}, but a corpus keeps one value per token (b t ...): capture() holds the others.")
    peak = {n: dry_run(model, Record(*patterns), n, context)[1] for n in {1, batch}}
    # What a pass held is written to the disk as it is, or by way of one value in the type of the disk.
    beside = max(x[0, 0].numel() for x in held.values()) * dtype.itemsize * context
    need = {n: bytes_now + n * beside for n, bytes_now in peak.items()}
    if need[1] > budget:
        raise InputError(
            f"One window of {context} tokens takes {said(need[1])} at one time, but the budget is {said(budget)}: raise it, or take a "
            "smaller context or fewer sites."
        )
    per_token = sum(x[0, 0].numel() for x in held.values()) * dtype.itemsize + 8
    windows = max(1, SHARD // (per_token * context))
    return {p: list(x.shape[2:]) for p, x in held.items()}, rows_within(need[1], need[batch], batch, budget), windows


def _open(place: Path, wanted: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The index of the folder: a new one, or the one that is there if it is of the same work."""
    place.mkdir(parents=True, exist_ok=True)
    found = _index(place)
    if found is None:
        files.replace(place / INDEX, json.dumps(wanted, indent=2) + "\n")
        return wanted
    if not resume:
        raise InputError(f"{str(place)!r} already holds activations: choose another folder, or go on with them by resume=True.")
    words = {"model": "model", "text": "text", "sites": "sites", "patterns": "sites", "dtype": "dtype", "context": "context", "tokens": "number of tokens"}
    for name, word in words.items():
        if found[name] != wanted[name]:
            a, b = (list(v) if isinstance(v, dict) else v[:12] if isinstance(v, str) else v for v in (found[name], wanted[name]))
            raise InputError(f"{str(place)!r} holds activations of another {word} ({a}, and now {b}): choose another folder.")
    return found


def _index(place: Path) -> dict[str, Any] | None:
    file = place / INDEX
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON ({error}): remove the folder and write it again.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("version") != VERSION:
        raise InputError(f"{file} is no index of activations of version {VERSION}: choose another folder.")
    for name, kind in FIELDS.items():
        if type(found.get(name)) is not kind or (kind is int and found[name] < 1):
            raise InputError(f"{file}: {name!r} is {shorten(repr(found.get(name)))}, which no index has: remove the folder and write it again.")
    if not found["sites"] or not all(isinstance(v, list) and all(type(n) is int for n in v) for v in found["sites"].values()):
        raise InputError(f"{file}: 'sites' are no shapes by name: remove the folder and write it again.")
    return found


def _shards(index: dict[str, Any]) -> int:
    return -(-index["tokens"] // (index["context"] * index["windows_per_shard"]))


def _shard(i: int) -> str:
    return f"activations-{i:05d}.safetensors"


# Doing it


def _fill(model: Any, ids: list[int], place: Path, index: dict[str, Any], rows: int, progress: bool | None) -> None:
    """Compute the shards that are not there."""
    size, n = index["context"] * index["windows_per_shard"], _shards(index)
    for draft in place.glob(".activations-*"):  # of a run that was killed
        draft.unlink(missing_ok=True)
    todo = [i for i in range(n) if not (place / _shard(i)).exists()]
    with _Bar(len(ids), progress) as advance:
        advance(len(ids) - sum(len(ids[i * size : (i + 1) * size]) for i in todo))
        for i in todo:
            _write(place / _shard(i), model, ids[i * size : (i + 1) * size], index, rows, advance)


def _write(file: Path, model: Any, ids: list[int], index: dict[str, Any], rows: int, advance: Any) -> None:
    """One shard, each value as it is computed."""
    context, dtype, device = index["context"], dtype_named(index["dtype"]), next(model.parameters()).device
    sites = {path: (dtype, (len(ids), *shape)) for path, shape in index["sites"].items()}
    tap, at = Record(*index["patterns"]), 0
    with Draft(file, {"tokens": (torch.int64, (len(ids),))} | sites) as draft, torch.no_grad(), evaluating(model):
        draft.put("tokens", torch.tensor(ids), 0)
        while at < len(ids):
            n = min(rows, (len(ids) - at) // context)
            take = n * context if n else len(ids) - at  # what does not fill a window is a shorter one
            tokens = torch.tensor(ids[at : at + take], device=device).view(max(n, 1), -1)
            if not any(p.startswith(("logits", "readout")) for p in sites):
                model.states(tokens, tap=tap)  # no logits are needed
            else:
                model(tokens, tap=tap)
            for path in sites:
                x = tap[path].to("cpu", dtype)
                if dtype == torch.float16 and not torch.equal(x.isfinite(), tap[path].isfinite().cpu()):
                    raise InputError(f"A value at {path!r} is beyond what float16 holds (65,504): keep the activations as bfloat16 or float32.")
                draft.put(path, x, at * x.flatten(0, 1)[0].nbytes)
            tap.clear()
            at += take
            advance(take)


class _Bar:
    """A bar of rich on a terminal, and nothing elsewhere."""

    def __init__(self, total: int, shown: bool | None):
        import sys

        self._total, self._shown = total, sys.stderr.isatty() if shown is None else shown
        self._bar: Any = None

    def __enter__(self) -> Any:
        if not self._shown:
            return lambda n: None
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task("tokens", total=self._total)
        return lambda n: self._bar.advance(task, n)

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


__all__ = ["Activations", "Rows", "activations", "fingerprint", "read_activations"]

"""Many texts, read window by window: what asks for statistics or examples runs through here, holding one batch at a time.

    file, texts, ids ──► windows of at most ``context`` tokens ──► batches ──► states of the stack ──► fn(path, values, batch)

A window is a row of its own: its first tokens see nothing of what stood before it in the text. Nothing is read out (no logits are made), and
a pass ends as soon as the last site that somebody wants has been seen.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.tap import Pattern, Tap
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.models.transformer import TransformerModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .subject import Subject, check_whole, most_positions, piece_of, read, vocabulary

Texts = Any
"""A text, a file (``pathlib.Path``), token ids, or a list of texts or of rows of ids."""

CONTEXT = 256
"""Tokens of a window where the model allows more."""
AT_ONCE = 4096
"""Tokens of a batch: wide enough for full products, few enough that a layer's hidden units stay small beside a model."""
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text. ``start``: how many of the text's own tokens stood before it."""

    text: int
    start: int
    ids: tuple[int, ...]
    before: int
    """How many tokens at its beginning were put around it (``[CLS]``, a start token)."""
    after: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows as rows, padded on the right."""

    windows: tuple[Window, ...]
    tokens: Tensor
    """[b t]"""
    real: Tensor
    """[b t], False at padding."""
    number: int
    """Of its first window, counted over all batches."""


class Reading:
    """A model and many texts; raises :class:`InputError` for what cannot be read."""

    def __init__(
        self,
        model: Any,
        texts: Texts,
        tokenizer: Tokenizer | None = None,
        *,
        source: Any = None,
        context: int | None = None,
        tokens: int | None = None,
        at_once: int = AT_ONCE,
    ):
        if isinstance(model, Loaded):
            model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise InputError(f"tokens={tokens!r}: at least 1 token is read; None reads all.")
        if context is not None:
            check_whole(1, context=context)
        self.tokenizer, self.most = tokenizer, tokens
        self.texts = texts
        self._sources = source
        self.subject: Subject = read(model, [0], tokenizer, source=self.source(0))  # what kind of model this is; the token is only a stand-in
        self.model, self.stack = self.subject.model, self.subject.stack
        limit = most_positions(self.model)
        self.around = self._put_around()
        """What stands before and after every window that comes from a text."""
        room = min(x for x in (context or CONTEXT, limit) if x is not None)
        if context is not None and limit is not None and context > limit:
            raise InputError(f"Windows of {context} tokens were asked for, but this model has positions for {limit}: give context={limit} or fewer.")
        self.context = room
        if room <= len(self.around[0]) + len(self.around[1]):
            raise InputError(f"Windows of {room} tokens leave no room for text beside the {sum(map(len, self.around))} that stand around it: give more.")
        self.at_once = at_once if isinstance(self.stack, TransformerModel) else 1  # other models are not told where padding begins

    # What is read

    def source(self, text: int) -> Any:
        """What an encoder-decoder's encoder reads for a text."""
        many = isinstance(self._sources, list | tuple) and self._sources and not isinstance(self._sources[0], int)
        if many and text >= len(self._sources):
            raise InputError(f"There is a text number {text}, but only {len(self._sources)} sources were given: give one for each text, or one for all.")
        return self._sources[text] if many else self._sources

    def _put_around(self) -> tuple[list[int], list[int]]:
        if isinstance(self.model, EncoderDecoderModel):
            return [int(self.model.spec.start)], []
        if self.tokenizer is None or not hasattr(self.tokenizer, "prompt"):
            return [], []
        before, after = getattr(self.tokenizer, "_around", ([], []))
        return list(before), list(after)

    def rows(self) -> Iterator[tuple[list[int], bool]]:
        """The ids of every text, and whether they come from a text (so that something stands around them)."""
        for one in _each(self.texts):
            if isinstance(one, str):
                if self.tokenizer is None:
                    raise InputError("A text was given, but there is no tokenizer to read it: give tokenizer=, what gf.load gave, or token ids.")
                # Of a long text only the beginning is cut into tokens where no more is asked for (hardly a token is longer than 32 characters).
                yield self.tokenizer.encode(one if self.most is None else one[: 32 * self.most]), True
            else:
                yield _as_ids(one), False

    def windows(self) -> Iterator[Window]:
        """The texts cut into windows, at most ``tokens`` tokens in all. Raises :class:`InputError` if there is nothing to read."""
        v, left, n = vocabulary(self.stack), self.most, 0
        for i, (ids, framed) in enumerate(self.rows()):
            if ids and (max(ids) >= v or min(ids) < 0):
                wrong = max(ids) if max(ids) >= v else min(ids)
                raise InputError(f"Text {i} holds the token id {wrong}, but the model's vocabulary is 0 to {v - 1}: use the model's own tokenizer.")
            before, after = self.around if framed else ([], [])
            step = self.context - len(before) - len(after)
            for start in range(0, len(ids), step):
                own = ids[start : start + step] if left is None else ids[start : start + min(step, left)]
                yield Window(i, start, (*before, *own, *after), len(before), len(after))
                n += 1
                left = None if left is None else left - len(own)
                if left == 0:
                    return
        if not n:
            raise InputError("The texts have 0 tokens, but at least 1 is looked at: give some text.")

    def batches(self) -> Iterator[Batch]:
        """Windows together, as many as ``at_once`` tokens allow. Those of an encoder-decoder share one source."""
        return self.together(self.windows())

    def together(self, windows: Iterable[Window]) -> Iterator[Batch]:
        """These windows in batches."""
        held: list[Window] = []
        number = 0
        for w in windows:
            wide = max([len(w.ids), *(len(h.ids) for h in held)])
            new_source = isinstance(self.model, EncoderDecoderModel) and held and held[0].text != w.text
            if held and ((len(held) + 1) * wide > self.at_once or new_source):
                yield self._batch(held, number)
                number, held = number + len(held), []
            held.append(w)
        if held:
            yield self._batch(held, number)

    def _batch(self, held: list[Window], number: int) -> Batch:
        wide = max(len(w.ids) for w in held)
        tokens = torch.zeros(len(held), wide, dtype=torch.long)
        real = torch.zeros(len(held), wide, dtype=torch.bool)
        for row, w in enumerate(held):
            tokens[row, : len(w.ids)] = torch.tensor(w.ids)
            real[row, : len(w.ids)] = True
        device = self.subject.device
        return Batch(tuple(held), tokens.to(device), real.to(device), number)

    # Where it is looked at

    def sites(self, pattern: str) -> list[str]:
        """The full paths that a pattern meets, in the order of computation; raises :class:`SiteError` for none."""
        full = Pattern.read(self.subject.path(pattern))
        if full.heads is not None:
            raise SiteError(f"{pattern!r} picks heads, but whole vectors are read here: leave the brackets out.")
        return [s.path for s in self.model.sites() if full.meets(s.path)]

    def vector_sites(self, site: str | Sequence[str]) -> list[str]:
        """The full paths that one or several patterns meet, in the order of computation.

        Raises :class:`SiteError` for none, and :class:`InputError` for a site that has not one vector for each token.
        """
        patterns: list[Any] = list(site) if isinstance(site, list | tuple) else [site]
        if not patterns or any(not isinstance(p, str) for p in patterns):
            raise InputError(f"site={site!r} names no site: give a pattern such as 'blocks.*.resid_post', or several.")
        wanted = {path for pattern in patterns for path in self.sites(pattern)}
        chosen = [s for s in self.model.sites() if s.path in wanted]
        for s in chosen:
            axes = s.axes.split()
            memory = axes[1:2] == ["s"] and ".cross." in s.path  # keys of a memory: one for each token of the source
            if axes[0] != "b" or len(axes) < 3 or axes[1] not in ("t", "s") or memory:
                raise InputError(f"{self.short(s.path)!r} has the axes {s.axes!r}, but one vector for each token is read here: choose a site b t d.")
        return [s.path for s in chosen]

    def short(self, path: str) -> str:
        """A path without what an encoder-decoder's paths begin with."""
        return path.removeprefix(self.subject.prefix)

    def run(self, paths: Sequence[str], fn: Callable[[str, Tensor, Batch], None], batches: Iterable[Batch] | None = None) -> None:
        """``fn(path, values [b t ..], batch)`` at every one of these sites, for every batch; values are held no longer than that."""
        with torch.no_grad(), evaluating(self.model):
            for batch in self.batches() if batches is None else batches:
                self.watched(batch, Watch(paths, lambda path, x, b=batch: fn(path, x, b)))  # type: ignore[misc]

    def watched(self, batch: Batch, watch: Watch) -> None:
        """One pass over a batch under ``watch``, which ends it when it has seen enough."""
        full = bool(batch.real.all())
        lengths = None if full else batch.real.sum(1)
        whole = any(p.endswith("logits") for p in watch.paths)
        try:
            if isinstance(self.model, EncoderDecoderModel):
                s = read(self.model, [0], self.tokenizer, source=self.source(batch.windows[0].text))
                source = torch.tensor([s.source_ids], device=s.device)
                memory = self.model.encode(source).expand(len(batch.windows), -1, -1)
                options = {"memory": memory, "tap": watch, "path": "decoder", "lengths": lengths}
            else:
                options = {"tap": watch} | ({} if full else {"lengths": lengths})
            run = self.stack if whole or not isinstance(self.stack, TransformerModel) else self.stack.states
            run(batch.tokens, **options)
        except Enough:
            pass


class Enough(Exception):
    """Every value that was wanted has been seen."""


class Watch(Tap):
    """Hands on the values at some sites, and ends the pass after the last. ``left``: the sites that have not been seen yet."""

    def __init__(self, paths: Sequence[str], fn: Callable[[str, Tensor], None]):
        self.paths, self.left, self._fn = tuple(paths), set(paths), fn

    def patterns(self) -> tuple[Pattern, ...]:
        """Its paths: a foreign model makes attention patterns only for who asks."""
        return tuple(Pattern.read(p) for p in self.paths)

    def visit(self, path: str, x: Tensor) -> Tensor:
        if path in self.left:
            self._take(path, x)
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if path in self.left:
            self._take(path, compute(None))

    def _take(self, path: str, x: Tensor) -> None:
        self._fn(path, x)
        self.left.discard(path)
        if not self.left:
            raise Enough


# Texts


def _each(texts: Texts) -> Iterator[Any]:
    """One text after the other; files are opened when their turn comes."""
    if isinstance(texts, bytes | bytearray):
        raise InputError("texts is bytes, but a text, a file (pathlib.Path), token ids, or a list of them is read: decode it first.")
    if isinstance(texts, Path):
        yield from _documents(texts)
    elif isinstance(texts, str):
        yield texts
    elif isinstance(texts, Tensor):
        yield from texts if texts.ndim == 2 else [texts]
    elif isinstance(texts, Iterable):
        items = list(texts)
        if items and all(hasattr(i, "__index__") and not isinstance(i, Tensor) for i in items):
            yield items
            return
        for one in items:
            yield from _documents(one) if isinstance(one, Path) else [one]
    else:
        raise InputError(f"texts is {described(type(texts))}, but a text, a file (pathlib.Path), token ids, or a list of them is read.")


def _as_ids(one: Any) -> list[int]:
    if isinstance(one, Tensor) and (one.is_floating_point() or one.ndim != 1):
        raise InputError(f"A text is a tensor of {one.dtype} and shape {tuple(one.shape)}, but rows of token ids are read: [t] or [b t].")
    if isinstance(one, Tensor):
        return [int(i) for i in one]
    if not isinstance(one, Sequence) and not hasattr(one, "__array__"):
        raise InputError(f"A text is {described(type(one))}, but a text or a list of token ids is read.")
    if wrong := [i for i in one if isinstance(i, bool) or not hasattr(i, "__index__")]:
        raise InputError(f"A row of token ids holds {wrong[0]!r}: give texts, or whole numbers.")
    return [int(i) for i in one]


def _documents(path: Path, separator: str = "\f") -> Iterator[str]:
    yield from (part for part in read_file(path).split(separator) if part.strip())


def read_file(path: Path) -> str:
    """The text of a file, packed (.gz .xz .bz2) or not. Raises :class:`InputError` if it cannot be read."""
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as stream:
            text: str = stream.read()
            return text
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): convert it first.") from error
    except FileNotFoundError:
        raise InputError(f"There is no file {str(path)!r}: give the path of a text file.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        why = "it is a folder; name a file" if isinstance(error, IsADirectoryError) else getattr(error, "strerror", None) or error
        raise InputError(f"{str(path)!r} cannot be read: {why}.") from error


@dataclass(frozen=True)
class Context:
    """A piece of text around one token: ``pieces[at]`` is the token, ``value`` what was found there."""

    value: float
    pieces: tuple[str, ...]
    at: int
    text: int
    position: int
    """The token's number in its text, counted from 0 (what stands around a window is not counted)."""
    values: tuple[float, ...] = ()
    """The same number at every piece, where it was asked for."""

    def __str__(self) -> str:
        return "".join(f"[{p}]" if i == self.at else p for i, p in enumerate(self.pieces)).replace("·", " ").replace("⏎", " ").strip()


def context_of(tokenizer: Tokenizer | None, window: Window, at: int, value: float, around: int, values: Sequence[float] = ()) -> Context:
    """The pieces around place ``at`` of a window; ``values``: one number for every place of the window."""
    low, high = max(0, at - around), min(len(window.ids), at + around // 2 + 1)
    pieces = tuple(piece_of(tokenizer, i) for i in window.ids[low:high])
    return Context(value, pieces, at - low, window.text, window.start + at - window.before, tuple(values[low:high]))

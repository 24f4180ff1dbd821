"""What probes read: one vector for each token, word or text at some sites, beside the label that it should tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described

from .windows import Batch, Reading

PER = ("token", "word", "text")


@dataclass(frozen=True, eq=False)
class Examples:
    """``x`` by path [n d] in float32; for every example its label, its group (texts of equal content are one group), and its type for control tasks."""

    x: dict[str, Tensor]
    labels: list[Any]
    groups: Tensor
    types: list[Any]


def examples_of(reading: Reading, paths: Sequence[str], labels: Sequence[Any], per: str, pool: str) -> Examples:
    """Collect every labelled example at once for all paths. Raises :class:`InputError` where labels and texts do not fit together."""
    texts = list(reading.texts) if isinstance(reading.texts, list | tuple) or (isinstance(reading.texts, Tensor) and reading.texts.ndim) else None
    if texts is None or (texts and hasattr(texts[0], "__index__") and not isinstance(texts[0], Tensor)):
        raise InputError("A probe is learnt on some texts and tested on others: give a list of texts, with labels for each.")
    if not isinstance(labels, Sequence | Tensor | np.ndarray) or isinstance(labels, str) or getattr(labels, "ndim", 1) < 1:
        raise InputError(f"labels is {described(type(labels))}, but a list is read, with {'one label' if per == 'text' else 'a list of labels'} for each text.")
    if any(isinstance(text, Path) for text in texts):
        raise InputError("A file may hold many texts, so that labels would not belong to one each: give the texts themselves.")
    if len(labels) != len(texts):
        raise InputError(f"There are {len(texts)} texts but labels for {len(labels)}: give one {'label' if per == 'text' else 'list of labels'} for each text.")
    rows = [ids for ids, _ in reading.rows()]
    content: dict[tuple[int, ...], int] = {}
    group = [content.setdefault(tuple(ids), len(content)) for ids in rows]
    wanted = {} if per == "text" else _wanted(reading, texts, rows, labels, per)
    kept: dict[str, list[Tensor]] = {p: [] for p in paths}
    found: list[tuple[Any, int, Any]] = []
    sums: dict[str, dict[int, tuple[Tensor, int]]] = {p: {} for p in paths}

    def look(path: str, x: Tensor, batch: Batch) -> None:
        if x.shape[:2] != batch.tokens.shape:
            raise InputError(f"{reading.short(path)!r} has the shape {tuple(x.shape)}: a probe reads one vector for each token, [b t d].")
        x = x.flatten(2)
        for row, w in enumerate(batch.windows):
            own = range(w.before, len(w.ids) - w.after)
            if per == "text":
                if labels[w.text] is None:
                    continue
                # The last or mean of what the whole text has, special tokens among it: theirs is what a model itself would pool.
                total, n = sums[path].get(w.text, (torch.zeros(x.shape[-1]), 0))
                part = x[row, : len(w.ids)].float().cpu()
                sums[path][w.text] = (
                    (part[-1], 1) if pool == "last" else (total + part.sum(0), n + len(part)) if pool == "mean" else (total, n) if n else (part[0], 1)
                )
                continue
            places = [i for i in own if (w.text, w.start + i - w.before) in wanted]
            kept[path].append(x[row, places].float().cpu())
            if path == paths[0]:
                found.extend((label, group[w.text], kind) for i in places for label, kind in (wanted[w.text, w.start + i - w.before],))

    reading.run(paths, look)
    if per == "text":
        order = sorted(sums[paths[0]])
        x = {p: torch.stack([s / n for s, n in (sums[p][i] for i in order)]) if order else torch.zeros(0, 1) for p in paths}
        found = [(labels[i], group[i], None) for i in order]
    else:
        x = {p: torch.cat(parts) if parts else torch.zeros(0, 1) for p, parts in kept.items()}
    if not found:
        raise InputError("No label stands at a token that was read: give labels (None leaves a token out), or read more tokens.")
    return Examples(x, [f[0] for f in found], torch.tensor([f[1] for f in found]), [f[2] for f in found])


def _wanted(reading: Reading, texts: Sequence[Any], rows: list[list[int]], labels: Sequence[Any], per: str) -> dict[tuple[int, int], tuple[Any, Any]]:
    """Label and type by text and number of the token in it."""
    wanted: dict[tuple[int, int], tuple[Any, Any]] = {}
    for i, (text, ids, given) in enumerate(zip(texts, rows, labels, strict=True)):
        if isinstance(given, str) or not isinstance(given, Sequence | Tensor | np.ndarray):
            raise InputError(f"The labels of text {i} are {given!r}, but per={per!r} takes a list, one label for each {per}: or use per='text'.")
        given = given.tolist() if isinstance(given, Tensor | np.ndarray) else given
        if per == "token":
            if len(given) != len(ids):
                raise InputError(f"Text {i} has {len(ids)} tokens but {len(given)} labels: give one for each token, None where there is none.")
            wanted |= {(i, t): (label, ids[t]) for t, label in enumerate(given) if label is not None}
            continue
        words, last = _last_tokens(reading, text, i)
        if len(given) != len(words):
            raise InputError(f"Text {i} has {len(words)} words between spaces but {len(given)} labels: give one for each word, None where there is none.")
        wanted |= {(i, t): (label, word) for word, t, label in zip(words, last, given, strict=True) if label is not None and t is not None}
    return wanted


def _last_tokens(reading: Reading, text: Any, i: int) -> tuple[list[str], list[int | None]]:
    """The words of a text, and the last token of each: in a causal model the first that has seen the whole word."""
    if not isinstance(text, str) or reading.tokenizer is None:
        raise InputError(f"Text {i} is no text with a tokenizer, but words are found by their place in the text: give texts, or labels per='token'.")
    words, ends, at = text.split(), [], 0
    for word in words:
        at = text.index(word, at) + len(word)
        ends.append((at - len(word), at))
    pieces = reading.tokenizer.offsets(text)
    last: list[int | None] = []
    t = 0
    for begin, end in ends:
        found = None
        while t < len(pieces) and pieces[t].start < end:
            if pieces[t].end > begin:
                found = t
            t += 1
        last.append(found)
    return words, last

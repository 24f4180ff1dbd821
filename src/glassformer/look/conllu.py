"""Dependency trees of a CoNLL-U file (https://universaldependencies.org/format.html), with the characters that every word covers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from glassformer.core.errors import InputError

from .subject import choose
from .windows import read_file

COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_ID = re.compile(r"[0-9]+([-.][0-9]+)?")


@dataclass(frozen=True)
class Sentence:
    """A sentence of ``w`` words, counted from 0. ``spans``: ``text[start:end]`` of each; ``governors``: the word that each hangs on (-1: the root).

    ``fields``: the ten fields of every word as the file has them (:data:`COLUMNS`); empty for a sentence that comes from no file.
    """

    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    governors: tuple[int, ...]
    relations: tuple[str, ...]
    fields: tuple[tuple[str, ...], ...] = field(default=(), repr=False, compare=False)

    def column(self, name: str) -> tuple[str | None, ...]:
        """One column of every word, None where the file leaves it open (``_``). Raises :class:`InputError` for no column, and for a sentence of no file."""
        at = COLUMNS.index(choose(name, COLUMNS, "column"))
        if len(self.fields) != len(self.words):
            raise InputError(f"The sentence {self.text[:40]!r} comes from no file, so it has no column {name!r}: read_conllu(path) gives sentences that have.")
        return tuple(None if row[at] == "_" and name != "form" else row[at] for row in self.fields)

    @property
    def upos(self) -> tuple[str | None, ...]:
        """The part of speech of every word (``NOUN``, ``VERB``, ...)."""
        return self.column("upos")


def read_conllu(path: str | Path) -> Iterator[Sentence]:
    """The sentences of a file (plain, .gz, .xz or .bz2), in order. Raises :class:`InputError` naming the line that is no CoNLL-U.

    Words that are written as one (``2-3 don't``) share the characters of what is written, or divide them where their forms add up to it.
    Empty nodes (``1.1``) have no place in the text and are left out.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"{path!r} is no path: give that of a CoNLL-U file.")
    path = Path(path)
    rows: list[list[str]] = []
    for number, line in enumerate((read_file(path) + "\n").split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            row = line.split("\t")
            if len(row) != 10:
                raise InputError(f"{path.name}, line {number}: a line of CoNLL-U has 10 fields between tabs, but this has {len(row)}: {line[:60]!r}.")
            if not _ID.fullmatch(row[0]):
                raise InputError(f"{path.name}, line {number}: a line of CoNLL-U begins with its word's number (3, 3-4 or 3.1), but this with {row[0][:20]!r}.")
            rows.append(row)
        elif not line.strip() and rows:
            if any(row[0].isdigit() for row in rows):
                yield _sentence(rows, path.name, number)
            rows = []


def _sentence(rows: list[list[str]], file: str, line: int) -> Sentence:
    words = [r for r in rows if r[0].isdigit()]
    together = {int(r[0].split("-")[0]): r for r in rows if "-" in r[0]}
    text, spans, last, begin, shared = "", [], 0, 0, ""
    for number, row in enumerate(words, 1):
        if number in together:
            last, shared, begin = int(together[number][0].split("-")[1]), together[number][1], len(text)
            divided = "".join(r[1] for r in words[number - 1 : last]) == shared
            text += shared
            at = begin
        if number <= last:
            spans.append((at, at + len(row[1])) if divided else (begin, begin + len(shared)))
            at += len(row[1])
        else:
            spans.append((len(text), len(text) + len(row[1])))
            text += row[1]
        ending = row if number > last else together[max(k for k in together if k <= number)] if number == last else None
        if ending is not None and "SpaceAfter=No" not in ending[9].split("|"):
            text += " "
    try:
        governors = tuple(int(r[6]) - 1 for r in words)
        if [int(r[0]) for r in words] != list(range(1, len(words) + 1)) or not all(-1 <= g < len(words) for g in governors):
            raise ValueError
    except ValueError:
        raise InputError(f"{file}, the sentence that ends at line {line}: words are numbered from 1 and each names its head's number (0: root).") from None
    return Sentence(text.rstrip(), tuple(r[1] for r in words), tuple(spans), governors, tuple(r[7] for r in words), tuple(map(tuple, words)))

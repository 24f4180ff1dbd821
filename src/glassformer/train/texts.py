"""Texts: files and folders become documents.

    books/  a.txt  b.txt.gz  c.jsonl ──► list_files ──► documents ──► one text after the other

A document is one file, or what lies between separators (``"\\f"``), or one line's ``text`` in a
``.jsonl`` file. Files may be compressed (``.gz``, ``.xz``, ``.bz2``).
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from glassformer.core.errors import DataError

ENDINGS = (".txt", ".md", ".text", ".jsonl")
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def list_files(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    """All text files that these files and folders name, sorted within each folder."""
    files: list[Path] = []
    for path in [Path(paths)] if isinstance(paths, (str, Path)) else [Path(p) for p in paths]:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and Path(p.name.removesuffix(_packing(p))).suffix in ENDINGS)
            if not found:
                raise DataError(f"The folder {path} holds no text: files end in {', '.join(ENDINGS)} (also with .gz, .xz, .bz2).")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"There is no file or folder {path}.")
    if not files:
        raise DataError("No files were named: there is nothing to learn from.")
    return files


def documents(files: Iterable[Path], separator: str | None = "\f") -> Iterator[str]:
    """The documents of these files, one by one; a file is parted at ``separator``, a ``.jsonl`` file gives its lines' ``text``."""
    for path in files:
        try:
            with _open_text(path) as stream:
                if path.name.removesuffix(_packing(path)).endswith(".jsonl"):
                    yield from _json_lines(path, stream)
                else:
                    text = stream.read()
                    yield from (text.split(separator) if separator else [text])
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): convert it first.") from error
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{path} cannot be read: {error}.") from error


def read_texts(paths: str | Path | Iterable[str | Path], separator: str | None = "\f") -> list[str]:
    """All documents of these files and folders in memory; for training a tokenizer."""
    return [d for d in documents(list_files(paths), separator) if d]


def _packing(path: Path) -> str:
    return path.suffix if path.suffix in OPENERS else ""


def _open_text(path: Path) -> TextIO:
    raw = OPENERS.get(path.suffix, open)(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8", newline="")


def _json_lines(path: Path, stream: TextIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                yield str(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(f'{path}, line {number}: a JSON object with a "text" is expected ({error}).') from error

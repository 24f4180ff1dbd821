"""Data: text becomes token shards once, and is read from them by memory map ever after.

    data/
      index.json              the tokenizer's hash, the shards, where they came from
      tokens-00000.bin …      token ids, uint16 or uint32, nothing else
      documents.bin           uint64: where each document begins
      tokenizer.json          the tokenizer itself

    data = prepare(["shakespeare.txt"], tokenizer, "data")       # or: TokenData.open("data", tokenizer)
    train, validation = data.split(0.1)

Which documents there are says :mod:`.texts`. If the tokenizer has an end-of-sequence token it follows
every document of a text that has more than one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from glassformer.core.errors import DataError
from glassformer.core.fields import described, typed
from glassformer.core.files import trouble

from .texts import documents, list_files

if TYPE_CHECKING:
    from glassformer.text import Tokenizer

Ids = npt.NDArray[Any]
FORMAT = 1
SHARD = 2**27  # tokens to a shard: 256 MB in uint16
PIECE = 2**20  # characters of a piece; longer documents are cut at line ends
TOGETHER = 2**22  # characters handed to the tokenizer at once, which may work on its pieces in parallel


class OtherText(DataError):
    """A folder holds the shards of another text or tokenizer than the one that is asked for."""


class TokenData:
    """A long row of token ids, in one or several arrays, of which nothing is copied until it is read.

    ``arrays``: the pieces, in order. ``starts``: where documents begin (positions in the whole row, ascending,
    the first 0). ``tokenizer_hash`` and ``vocab_size`` say what the ids mean; ``text_bytes`` is the size of
    the text in UTF-8, if known.
    """

    def __init__(
        self,
        arrays: Sequence[Ids],
        *,
        starts: Ids | None = None,
        vocab_size: int | None = None,
        tokenizer_hash: str | None = None,
        tokenizer: Tokenizer | None = None,
        text_bytes: int | None = None,
        name: str = "tokens in memory",
    ):
        self._arrays = [np.asarray(a) for a in arrays]
        self._ends = np.cumsum([len(a) for a in self._arrays])
        self._starts = np.zeros(1, np.int64) if starts is None or not len(starts) else np.asarray(starts)
        self._tokenizer = tokenizer
        self.vocab_size, self.tokenizer_hash, self.text_bytes, self.name = vocab_size, tokenizer_hash, text_bytes, name

    # Where it comes from

    @classmethod
    def from_ids(cls, ids: Sequence[int] | Ids, tokenizer: Tokenizer | None = None, *, vocab_size: int | None = None) -> TokenData:
        """Token ids in memory. With a tokenizer that has an end-of-sequence token, documents end at it."""
        array = np.asarray(ids)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"Token ids are one row of whole numbers; an array of shape {array.shape} and type {array.dtype} was given.")
        if tokenizer is not None:
            vocab_size = tokenizer.vocab_size
        if len(array) and vocab_size is not None and int(array.max()) >= vocab_size:
            raise DataError(f"Token id {int(array.max())} is outside the vocabulary of {vocab_size} tokens: the ids belong to another tokenizer.")
        end = None if tokenizer is None else tokenizer.eos_id
        starts = None if end is None else np.concatenate([[0], np.flatnonzero(array[:-1] == end) + 1])
        return cls([array], starts=starts, vocab_size=vocab_size, tokenizer=tokenizer, tokenizer_hash=None if tokenizer is None else tokenizer.hash)

    @classmethod
    @typed(DataError)
    def from_text(cls, text: str | Sequence[str], tokenizer: Tokenizer) -> TokenData:
        """One text, or several documents, encoded in memory."""
        if not hasattr(tokenizer, "encode_to_array"):
            raise DataError(f"A text is read by a tokenizer, but {described(type(tokenizer))} was given: gf.text.train makes one, gf.load(folder) has one.")
        documents = [text] if isinstance(text, str) else list(text)
        rows: list[Ids] = []
        starts = list(_encode(documents, tokenizer, rows.append))
        if not starts:
            raise DataError("The text is empty: give one with words in it.")
        return cls(
            [np.concatenate(rows)],
            starts=np.asarray(starts),
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer,
            tokenizer_hash=tokenizer.hash,
            text_bytes=sum(len(d.encode()) for d in documents),
        )

    @classmethod
    @typed(DataError)
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> TokenData:
        """Shards that :func:`prepare` wrote, by memory map. A ``tokenizer`` other than theirs is a :class:`DataError`.

        The size of every file is checked, its contents are not.
        """
        from glassformer.text import Tokenizer

        folder = Path(folder)
        index = _read_index(folder)
        if tokenizer is not None and tokenizer.hash != index["tokenizer"]:
            raise DataError(
                f"The shards in {folder} were made with the tokenizer {index['tokenizer'][:12]}…, but the one given is {tokenizer.hash[:12]}…: "
                f"use {folder / 'tokenizer.json'}, or prepare the text again with the new tokenizer."
            )
        dtype = np.dtype(index["dtype"])
        arrays = []
        for shard in index["shards"]:
            _check_size(folder / shard["file"], shard["tokens"] * dtype.itemsize)
            arrays.append(np.memmap(folder / shard["file"], dtype=dtype, mode="r"))
        _check_size(folder / "documents.bin", index["documents"] * np.dtype(np.uint64).itemsize)
        return cls(
            arrays,
            starts=np.fromfile(folder / "documents.bin", dtype=np.uint64).astype(np.int64),
            vocab_size=index["vocab_size"],
            tokenizer_hash=index["tokenizer"],
            tokenizer=tokenizer if tokenizer is not None else Tokenizer.load(folder),
            text_bytes=index["text_bytes"],
            name=str(folder),
        )

    # What it is

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"TokenData({len(self):,} tokens, {self.documents:,} documents, {self.name})"

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the ids, if it is at hand."""
        return self._tokenizer

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._starts)

    @property
    def fingerprint(self) -> str:
        """A short hash of what the data is: its length, its tokenizer and a sample of its ids."""
        sample = self.read(np.linspace(0, max(len(self) - 64, 0), 256).astype(np.int64), min(64, len(self)))
        return hashlib.sha256(f"{len(self)} {self.tokenizer_hash}".encode() + sample.tobytes()).hexdigest()[:16]

    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text for one token on average, which bits per byte need; None without tokenizer and text."""
        if self.text_bytes is None and self._tokenizer is not None and len(self):
            ids = self.read(np.zeros(1, np.int64), min(len(self), 1_000_000))[0]
            return max(len(self._tokenizer.decode(ids.tolist()).encode()), 1) / len(ids)
        return None if self.text_bytes is None or not len(self) else self.text_bytes / len(self)

    # How it is read

    def read(self, starts: Ids, length: int) -> npt.NDArray[np.int64]:
        """Windows of ``length`` tokens that begin at ``starts``: int64 [b, length]."""
        if len(self._arrays) == 1:
            return cast(npt.NDArray[np.int64], self._arrays[0][starts[:, None] + np.arange(length)].astype(np.int64))
        out = np.empty((len(starts), length), np.int64)
        for row, start in enumerate(starts.tolist()):
            done, shard = 0, int(np.searchsorted(self._ends, start, side="right"))
            while done < length:
                array = self._arrays[shard]
                first = start + done - (int(self._ends[shard]) - len(array))
                taken = array[first : first + length - done]
                out[row, done : done + len(taken)] = taken
                done, shard = done + len(taken), shard + 1
        return out

    def document_ids(self, starts: Ids, length: int) -> npt.NDArray[np.int64]:
        """The number of the document that each token of these windows belongs to: int64 [b, length]."""
        places = starts[:, None] + np.arange(length)
        return np.searchsorted(self._starts, places.reshape(-1), side="right").reshape(places.shape).astype(np.int64)

    @typed(DataError)
    def part(self, first: int, last: int) -> TokenData:
        """Tokens ``first`` to ``last`` (not included), without copying."""
        if not 0 <= first <= last:
            raise DataError(f"A part goes from its first token to its last one; first={first} and last={last} were given.")
        pieces, begin = [], 0
        for array in self._arrays:
            lo, hi = max(first - begin, 0), min(last - begin, len(array))
            if lo < hi:
                pieces.append(array[lo:hi])
            begin += len(array)
        inside = self._starts[(self._starts > first) & (self._starts < last)] - first
        return TokenData(
            pieces,
            starts=np.concatenate([[0], inside]),
            vocab_size=self.vocab_size,
            tokenizer_hash=self.tokenizer_hash,
            tokenizer=self._tokenizer,
            name=f"tokens {first:,} to {last:,} of {self.name}",
        )

    @typed(DataError)
    def split(self, fraction: float = 0.1) -> tuple[TokenData, TokenData]:
        """The data without its last ``fraction``, and that last fraction: for training, for validation."""
        if not 0 < fraction < 1:
            raise DataError(f"The fraction for validation lies between 0 and 1; {fraction} was given.")
        cut = len(self) - round(len(self) * fraction)
        if not 0 < cut < len(self):
            raise DataError(f"{len(self)} tokens cannot be split into {1 - fraction:.0%} and {fraction:.0%}: there are too few.")
        return self.part(0, cut), self.part(cut, len(self))


# From files to shards


@typed(DataError)
def prepare(
    paths: str | Path | Iterable[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    separator: str | None = "\f",
    shard_tokens: int = SHARD,
    choice: Any = None,
) -> TokenData:
    """Encode files and folders into token shards at ``out``; shards already made from the same are used again.

    ``separator`` parts a file into documents (None: a file is one document). ``choice``: where the tokenizer came from, as plain
    data that is kept with the shards (see :func:`made_for`). Written to a temporary
    folder and renamed, so that ``out`` is whole or not there. Raises :class:`DataError` for missing, empty or
    unreadable text, and if ``out`` holds something else.
    """
    files, out = list_files(paths), Path(out)
    source = _fingerprint(files, separator)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        index = _read_index(out)
        if index["tokenizer"] == tokenizer.hash and index["source"] == source:
            return TokenData.open(out, tokenizer)
        raise OtherText(f"{out} already holds shards of another text or tokenizer: choose another folder, or delete this one if nothing needs it.")
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        index = _write_shards(files, tokenizer, draft, separator, shard_tokens) | {"source": source, "choice": choice}
        tokenizer.save(draft / "tokenizer.json")
        (draft / "index.json").write_text(json.dumps(index, indent=1))
        if out.is_dir():  # empty: seen above
            out.rmdir()
        draft.rename(out)
    except OSError as error:
        reason, todo = trouble(error)
        raise DataError(f"The shards could not be written to {out}: {reason}. {todo}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return TokenData.open(out, tokenizer)


def made_for(folder: str | Path) -> Any:
    """The choice of tokenizer that the shards in ``folder`` were made for; None without shards, or if they do not say."""
    return _read_index(Path(folder)).get("choice") if (Path(folder) / "index.json").is_file() else None


def _write_shards(files: list[Path], tokenizer: Tokenizer, folder: Path, separator: str | None, shard_tokens: int) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    waiting: list[Ids] = []
    filled = text_bytes = 0

    def flush() -> None:
        nonlocal filled
        if filled:
            name = f"tokens-{len(shards):05d}.bin"
            row = np.concatenate(waiting)
            row.tofile(folder / name)
            shards.append({"file": name, "tokens": len(row)})
            waiting.clear()
            filled = 0

    def write(ids: Ids) -> None:
        nonlocal filled
        waiting.append(ids)
        filled += len(ids)
        if filled >= shard_tokens:
            flush()

    def counted() -> Iterator[str]:
        nonlocal text_bytes
        for document in documents(files, separator):
            text_bytes += len(document.encode())
            yield document

    starts = list(_encode(counted(), tokenizer, write))
    flush()
    if not starts:
        raise DataError(f"The text in {', '.join(map(str, files[:3]))} is empty: give one with words in it.")
    np.asarray(starts, np.uint64).tofile(folder / "documents.bin")
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "dtype": np.dtype(_dtype(tokenizer.vocab_size)).name,
        "tokens": sum(shard["tokens"] for shard in shards),
        "documents": len(starts),
        "text_bytes": text_bytes,
        "shards": shards,
    }


def _encode(texts: Iterable[str], tokenizer: Tokenizer, write: Callable[[Ids], object]) -> Iterator[int]:
    """Encode documents, hand their ids to ``write`` in order, and yield where each document begins.

    Pieces go to the tokenizer on all cores. An end-of-sequence token follows every document if there are several;
    where the text itself spells one, a document ends too.
    """
    dtype, end = _dtype(tokenizer.vocab_size), tokenizer.eos_id
    at = documents_seen = 0
    last: int | None = None

    def put(ids: Ids) -> None:
        nonlocal at, last
        if len(ids):
            write(ids.astype(dtype, copy=False))
            at, last = at + len(ids), int(ids[-1])

    def close() -> None:
        if end is not None and last != end:
            put(np.asarray([end]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for together in _batched((number == 0, piece) for text in texts for number, piece in enumerate(_pieces(text))):
            for (first, _), ids in zip(together, pool.map(tokenizer.encode_to_array, [piece for _, piece in together]), strict=True):
                if first:
                    if documents_seen:
                        close()
                    documents_seen += 1
                    yield at
                if end is not None:
                    yield from (at + int(i) + 1 for i in np.flatnonzero(ids[:-1] == end))
                put(ids)
    if documents_seen > 1:
        close()


def _batched(pieces: Iterable[tuple[bool, str]]) -> Iterator[list[tuple[bool, str]]]:
    """Lists of pieces of about ``TOGETHER`` characters."""
    batch: list[tuple[bool, str]] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[1])
        if characters >= TOGETHER:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """Cut very long text after line ends that are followed by a visible character, where tokenizers cut too."""
    at = 0
    while len(text) - at > PIECE:
        cut = text.rfind("\n", at, at + PIECE) + 1
        while cut > at and text[cut].isspace():
            cut = text.rfind("\n", at, cut - 1) + 1
        cut = cut if cut > at else at + PIECE
        yield text[at:cut]
        at = cut
    if at < len(text):
        yield text[at:]


def _dtype(vocab_size: int) -> type[np.unsignedinteger[Any]]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _fingerprint(files: list[Path], separator: str | None) -> str:
    seen = hashlib.sha256(repr((FORMAT, separator)).encode())
    for path in files:
        try:
            with path.open("rb") as stream:
                seen.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    return seen.hexdigest()


def _check_size(path: Path, expected: int) -> None:
    if not path.is_file() or path.stat().st_size != expected:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
        raise DataError(f"{path} should hold {expected} bytes, but there is {found}: prepare the text again.")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise DataError(f"{folder} holds no token shards (no index.json): make them with prepare().")
    try:
        index = cast(dict[str, Any], json.loads(path.read_text()))
        missing = {"format", "tokenizer", "vocab_size", "dtype", "documents", "shards", "source", "text_bytes"} - set(index)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): delete the folder and prepare the text again.") from error
    if missing or index["format"] != FORMAT:
        raise DataError(f"{path} is of another format ({index.get('format')} where {FORMAT} is read): delete the folder and prepare the text again.")
    return index

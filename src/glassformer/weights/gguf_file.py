"""GGUF files (llama.cpp's format): one header with everything, then the tensors.

    "GGUF" | version | counts ──► metadata: key, type, value … ──► tensors: name, dims, type, offset … ──► padding ──► data

Only the header is read, through a map of the file. Scalars and texts are read at once; an array is walked over to know where it
ends (every text in it says its own length) and decoded when somebody asks, so that a vocabulary of 128 thousand pieces costs
nothing to a reader who wants the shape of a matrix. Whatever the header promises is compared with the size of the file before
anything is allocated: a damaged or hostile file is an error.

A model may be split: ``name-00001-of-00003.gguf`` holds the metadata, and each file the header of its own tensors.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from glassformer.core.blocks import FORMATS, Format
from glassformer.core.errors import WeightsError, did_you_mean

from .stored import Stored

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
TEXT, ARRAY = 8, 9
NAMED: dict[int, tuple[str, Format]] = {form.id: (name, form) for name, form in FORMATS.items()}
MOST_DIMS, MOST_NAME, ALIGNMENT = 4, 65_535, 32
MOST_KEYS, MOST_TENSORS = 1 << 16, 1 << 17  # the largest published models have a hundred and ten thousand
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class Metadata(Mapping[str, Any]):
    """What a file says about its model, by key; arrays are decoded when they are asked for (numbers as an array, texts as a list)."""

    def __init__(self, values: Mapping[str, Any], file: Path):
        self._values, self.file = dict(values), file

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = value.decoded()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Metadata({len(self)} keys of {self.file})"

    def count(self, key: str) -> int:
        """How many items an array has, without decoding it (0 if there is none)."""
        value = self._values.get(key, ())
        return value.count if isinstance(value, _Array) else len(value)

    def need(self, key: str) -> Any:
        """The value; raises :class:`WeightsError` if the file does not say it."""
        if key not in self:
            raise WeightsError(f"{self.file} lacks {key!r}, without which the model cannot be built.{did_you_mean(key, self)}")
        return self[key]


@dataclass(frozen=True)
class Gguf:
    """An opened file: its metadata, its tensors by name (unread), and all the files that it is made of."""

    metadata: Metadata
    tensors: dict[str, Stored]
    files: tuple[Path, ...]


def read(file: Path) -> Gguf:
    """The header of a GGUF file, or of all files of a split one. Raises :class:`WeightsError` saying what is wrong and where."""
    metadata, tensors = _one(file)
    parts = _whole(metadata, "split.count", 1)
    if parts < 2:
        return Gguf(metadata, tensors, (file,))
    found = SPLIT.fullmatch(file.name)
    if found is None or int(found[3]) != parts:
        raise WeightsError(f"{file} is one of {parts} files of a model, and its name must say which: name-00001-of-{parts:05}.gguf. Give it its own name back.")
    files = [file.with_name(f"{found[1]}-{i + 1:05}-of-{parts:05}.gguf") for i in range(parts)]
    absent = next((f for f in files if not f.is_file()), None)
    if absent is not None:
        raise WeightsError(f"{file} is one of {parts} files of a model, and {absent.name} is not beside it: fetch the others too.")
    everything: dict[str, Stored] = {}
    metadata = _one(files[0])[0]
    for i, part in enumerate(files):
        about, here = (metadata, _one(part)[1]) if i == 0 else _one(part)
        itself = _whole(about, "split.no", -1), _whole(about, "split.count", 1)
        if itself != (i, parts):
            raise WeightsError(
                f"{part} calls itself part {itself[0]} of {itself[1]}, counted from 0, but its name says {i} of {parts}: "
                "the files belong to different models, or were renamed."
            )
        twice = next((n for n in here if n in everything), None)
        if twice is not None:
            raise WeightsError(f"{twice!r} is in {everything[twice].file.name} and in {part.name}: the files belong to different models.")
        everything |= here
    promised = _whole(metadata, "split.tensors.count", len(everything))
    if promised != len(everything):
        raise WeightsError(f"{files[0]} promises {promised} tensors in {parts} files, but they hold {len(everything)}: the files belong to different models.")
    return Gguf(metadata, everything, tuple(files))


def _whole(metadata: Metadata, key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int:
        raise WeightsError(f"{metadata.file}: {key} is {str(value)[:40]!r}, but a whole number is needed.")
    return value


def _one(file: Path) -> tuple[Metadata, dict[str, Stored]]:
    try:
        with file.open("rb") as f:
            size = file.stat().st_size
            if size < 24:
                raise WeightsError(f"{file} has {size} bytes, and the header of a GGUF file alone has more: it was cut short. Fetch it again.")
            header = _Header(file, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), size)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror}): check that it is there and yours to read.") from error
    return header.read()


@dataclass(frozen=True)
class _Array:
    """An array in the file, walked over and not decoded."""

    data: mmap.mmap
    start: int
    stop: int
    count: int
    type: int

    def decoded(self) -> Any:
        """Numbers as a NumPy array, texts as a list (bytes that are no UTF-8 become surrogates, from which they can be had back)."""
        if self.type != TEXT:
            return np.frombuffer(self.data[self.start : self.stop], SCALARS[self.type])
        raw, at, length, texts = self.data[self.start : self.stop], 0, struct.Struct("<Q").unpack_from, []
        for _ in range(self.count):
            n = length(raw, at)[0]
            texts.append(raw[at + 8 : at + 8 + n].decode("utf-8", "surrogateescape"))
            at += 8 + n
        return texts


class _Header:
    """A walk through the header from left to right; ``at`` is the place reached."""

    def __init__(self, file: Path, data: mmap.mmap, size: int):
        self.file, self.data, self.size, self.at = file, data, size, 0

    def read(self) -> tuple[Metadata, dict[str, Stored]]:
        """Everything, checked."""
        if self.data[:4] != b"GGUF":
            raise WeightsError(f"{self.file} is no GGUF file: it starts with {self.data[:4]!r}.")
        self.at = 4
        version = self.number("<I", "the version")
        if version & 0xFFFF == 0:
            raise WeightsError(
                f"{self.file} is written for big-endian machines, which is not supported: convert it with gguf-convert-endian, or fetch the usual one."
            )
        if version not in (2, 3):
            raise WeightsError(f"{self.file} has GGUF version {version}, but versions 2 and 3 are read: convert the model again with a newer llama.cpp.")
        tensors, values = self.number("<Q", "the number of tensors"), self.number("<Q", "the number of keys")
        # The least that a key (length, one letter, type, value) and a tensor (length, one letter, dims, type, offset) take.
        self.check_count(values, 14, "keys", MOST_KEYS)
        self.check_count(tensors, 25, "tensors", MOST_TENSORS)
        metadata = Metadata(self.keys(values), self.file)
        return metadata, self.tensors(tensors, metadata.get("general.alignment", ALIGNMENT))

    def keys(self, count: int) -> dict[str, Any]:
        """The metadata."""
        found: dict[str, Any] = {}
        for i in range(count):
            where, key = self.at, self.text(f"key {i}", MOST_NAME)
            if key in found:
                self.damaged(f"the key {key[:60]!r} stands there twice", where)
            found[key] = self.value(self.number("<I", f"the type of {key[:60]!r}"), key)
        return found

    def value(self, type: int, key: str) -> Any:
        """A value of the metadata: a number, a text, or an array that is walked over."""
        if type in SCALARS:
            return self.number(SCALARS[type], f"the value of {key[:60]!r}")
        if type == TEXT:
            return self.text(f"the value of {key[:60]!r}", self.size)
        if type != ARRAY:
            self.damaged(f"{key[:60]!r} has a value of type {type}, which GGUF does not have")
        item, count = self.number("<I", f"the items of {key[:60]!r}"), self.number("<Q", f"the length of {key[:60]!r}")
        if item in SCALARS:
            width = struct.calcsize(SCALARS[item])
            self.check_count(count, width, f"numbers in {key[:60]!r}")
            start, self.at = self.at, self.at + width * count
            return _Array(self.data, start, self.at, count, item)
        if item != TEXT:
            self.damaged(f"{key[:60]!r} is an array of items of type {item}, which is not supported")
        self.check_count(count, 8, f"texts in {key[:60]!r}")
        return self.texts(count, key)

    def texts(self, count: int, key: str) -> _Array:
        """Walk over texts, each of which says its length: the one loop that is as long as the vocabulary."""
        at, data, last, length = self.at, self.data, self.size - 8, struct.Struct("<Q").unpack_from
        for i in range(count):
            if at > last:
                self.damaged(f"text {i} of {count} in {key[:60]!r} begins beyond the end", at)
            at += 8 + length(data, at)[0]
        if at > self.size:
            self.damaged(f"a text in {key[:60]!r} ends beyond the end", at)
        start, self.at = self.at, at
        return _Array(data, start, at, count, TEXT)

    def tensors(self, count: int, alignment: Any) -> dict[str, Stored]:
        """The tensors, whose offsets count from the first aligned byte after the header."""
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.damaged(f"general.alignment is {str(alignment)[:40]}, but a power of two is needed")
        entries = [self.tensor(i) for i in range(count)]
        data = -(-self.at // alignment) * alignment
        found: dict[str, Stored] = {}
        for name, shape, kind, offset, nbytes in entries:
            if name in found:
                self.damaged(f"the tensor {name[:80]!r} is described twice")
            if offset % alignment:
                self.damaged(f"the tensor {name[:80]!r} starts at offset {offset}, which is no multiple of the alignment {alignment}")
            start, end = data + offset, data + offset + nbytes
            if end > self.size:
                self.damaged(f"the tensor {name[:80]!r} of shape {shape} and type {kind} needs the bytes {start} to {end}, but the file has {self.size}")
            found[name] = Stored(name, shape, kind, self.file, start, nbytes)
        before = None
        for tensor in sorted(found.values(), key=lambda t: t.offset):
            if before is not None and tensor.offset < before.offset + before.nbytes:
                self.damaged(f"the tensors {before.name[:80]!r} and {tensor.name[:80]!r} lie on the same bytes", tensor.offset)
            before = tensor
        return found

    def tensor(self, i: int) -> tuple[str, tuple[int, ...], str, int, int]:
        """Name, shape in torch's order (GGUF counts the fastest axis first), type, offset, bytes."""
        name = self.text(f"the name of tensor {i}", MOST_NAME)
        n = self.number("<I", f"the axes of {name[:80]!r}")
        if n > MOST_DIMS:
            self.damaged(f"the tensor {name[:80]!r} has {n} axes, but there are at most {MOST_DIMS}")
        dims = [self.number("<Q", f"the shape of {name[:80]!r}") for _ in range(n)]
        id, offset = self.number("<I", f"the type of {name[:80]!r}"), self.number("<Q", f"the offset of {name[:80]!r}")
        if id not in NAMED:
            raise WeightsError(f"{self.file}: the tensor {name[:80]!r} has the type number {id}, which is not known here. Known: {', '.join(FORMATS)}.")
        kind, form = NAMED[id]
        total = 1
        for d in dims:
            total *= d
        # No type holds 16 numbers in a byte: this is more than any file of this size could.
        if not 0 < total <= 16 * self.size:
            self.damaged(f"the tensor {name[:80]!r} has shape {tuple(reversed(dims))}, and a file of {self.size} bytes cannot hold that")
        if dims and dims[0] % form.numbers:
            self.damaged(f"the tensor {name[:80]!r} has rows of {dims[0]} numbers, but {kind} packs {form.numbers} together")
        if not dims and form.numbers > 1:
            self.damaged(f"the tensor {name[:80]!r} is one number, but {kind} packs {form.numbers} together")
        return name, tuple(reversed(dims)), kind, offset, total // form.numbers * form.bytes

    # Small pieces

    def number(self, kind: str, what: str) -> Any:
        """One number; moves on."""
        try:
            (value,) = struct.unpack_from(kind, self.data, self.at)
        except struct.error:
            self.damaged(f"it ends before {what}")
        self.at += struct.calcsize(kind)
        return value

    def text(self, what: str, most: int) -> str:
        """A text with its length before it; moves on."""
        n = self.number("<Q", f"the length of {what}")
        if n > most or n > self.size - self.at:
            self.damaged(f"{what} is said to be {n} bytes long, but {min(most, self.size - self.at)} are possible")
        start, self.at = self.at, self.at + n
        return self.data[start : self.at].decode("utf-8", "surrogateescape")

    def check_count(self, count: int, width: int, what: str, most: int | None = None) -> None:
        """Raise if so many things cannot be in what is left of the file, or are more than anybody has."""
        if most is not None and count > most:
            self.damaged(f"it promises {count} {what}, and more than {most} are not believed")
        if count * width > self.size - self.at:
            self.damaged(f"it promises {count} {what}, but only {self.size - self.at} bytes are left")

    def damaged(self, what: str, at: int | None = None) -> NoReturn:
        raise WeightsError(f"{self.file} is damaged or cut short: {what} (byte {self.at if at is None else at}). Fetch it again from where it came.")

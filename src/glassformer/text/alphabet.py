"""The byte-level alphabet: 256 printable characters, one for every byte.

``tokenizer.json`` is text, so a byte-level vocabulary cannot hold raw bytes such as ``F0``. GPT-2 therefore wrote each byte as one
printable character: the printable Latin-1 characters stand for themselves, the other 68 bytes became U+0100, U+0101, ... in order.
That is why a space looks like ``Ġ`` (byte 20) and a line feed like ``Ċ`` (byte 0A) in such files. Everything in this package that a
person reads goes through :func:`readable` instead.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
"""

from __future__ import annotations

_THEMSELVES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(256) if byte not in _THEMSELVES)

CHARACTER_OF_BYTE: tuple[str, ...] = tuple(chr(byte) if byte in _THEMSELVES else chr(0x100 + _OTHERS.index(byte)) for byte in range(256))
"""``CHARACTER_OF_BYTE[0x20] == "Ġ"``."""

BYTE_OF_CHARACTER: dict[str, int] = {character: byte for byte, character in enumerate(CHARACTER_OF_BYTE)}
"""The inverse."""


def bytes_of(piece: str) -> bytes | None:
    """The bytes that a piece of a byte-level vocabulary stands for, or ``None`` if it is not written in the alphabet."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in piece])
    except KeyError:
        return None


def readable(raw: bytes) -> str:
    """Bytes as a person reads them: whole characters as they are, bytes that are only a part of a character as ``⟨F0 9F⟩``.

    >>> readable("né".encode()[:2])
    'n⟨C3⟩'
    """
    shown = []
    while raw:
        try:
            shown.append(raw.decode("utf-8"))
            break
        except UnicodeDecodeError as broken:
            end = broken.start + 1
            while end < len(raw) and 0x80 <= raw[end] < 0xC0:
                end += 1
            shown.append(raw[: broken.start].decode("utf-8") + f"⟨{raw[broken.start : end].hex(' ').upper()}⟩")
            raw = raw[end:]
    return "".join(shown)

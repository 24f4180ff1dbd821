"""Special tokens: which ones there are, what they are for, and where they stand in a text.

A special token is a piece that no merging of letters can produce: the end of a document, the padding of a batch. It has a spelling
(``<|endoftext|>``), an id, and often a role (``eos``). Spellings in a text become ids before anything else is cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

ROLES = ("eos", "bos", "pad", "unk", "mask", "cls", "sep")
"""End and begin of a text, padding, an unknown piece, a masked one, and BERT's first and separating token."""

FOR_UNKNOWN = "leave it out, or train a tokenizer that can read it: kinds bpe and bytes read every text, others what they do not know as a special token <unk>"
"""What to do about a character or word that a tokenizer does not know."""

# Which spelling means what where a file does not say so; the first one present wins.
USUAL: dict[str, tuple[str, ...]] = {
    "eos": ("<eos>", "</s>", "<|eos|>", "<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "[EOS]", "[SEP]"),
    "bos": ("<bos>", "<s>", "<|bos|>", "<|startoftext|>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "[BOS]", "[CLS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>", "<|unk|>", "[UNK]", "⟨unk⟩"),
    "mask": ("<mask>", "<|mask|>", "[MASK]"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
}


def usual_roles(spellings: Iterable[str]) -> dict[str, str]:
    """``{"eos": "</s>", ...}``: the roles that these spellings have by convention."""
    present = set(spellings)
    return {role: name for role, names in USUAL.items() for name in (next((n for n in names if n in present), None),) if name is not None}


def roles_in_config(config: Mapping[str, Any]) -> dict[str, str]:
    """The roles that a Hugging Face ``tokenizer_config.json`` names (``"eos_token": "</s>"`` or ``{"content": "</s>"}``)."""
    found = {}
    for role in ROLES:
        entry = config.get(f"{role}_token")
        spelling = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(spelling, str):
            found[role] = spelling
    return found


Segment = str | int
"""A stretch of ordinary text, or the id of the added token that stood there."""


class Cutter:
    """Cuts the added tokens out of a text, as ``tokenizers`` does: leftmost first, the longest of those that start together.

    Tokens marked ``normalized: false`` are cut in a first pass over the text, the others in a second over what is left.
    ``added`` is the list ``added_tokens`` of a ``tokenizer.json``; with ``allow_special=False`` those marked special stay text.
    """

    def __init__(self, added: Iterable[Mapping[str, Any]]) -> None:
        tokens = [token for token in added if token["content"]]
        self.spelling: dict[int, str] = {token["id"]: token["content"] for token in tokens}
        self._passes = {
            allow: [
                _Pass({t["content"]: t["id"] for t in tokens if bool(t["normalized"]) == normalized and (allow or not t["special"])})
                for normalized in (False, True)
            ]
            for allow in (True, False)
        }

    def cut(self, text: str, allow_special: bool) -> list[Segment]:
        """Ordinary stretches (never empty) and ids, in the order of the text."""
        segments: list[Segment] = [text] if text else []
        for one in self._passes[allow_special]:
            if one.ids:
                segments = [piece for segment in segments for piece in (one.cut(segment) if isinstance(segment, str) else (segment,))]
        return segments


class _Pass:
    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids
        self._expression = re.compile("|".join(re.escape(s) for s in sorted(ids, key=len, reverse=True)))
        self._firsts = {spelling[0] for spelling in ids}

    def cut(self, text: str) -> Iterator[Segment]:
        if not any(first in text for first in self._firsts):  # far faster than the expression, and nearly always enough
            yield text
            return
        end = 0
        for match in self._expression.finditer(text):
            if match.start() > end:
                yield text[end : match.start()]
            yield self.ids[match.group()]
            end = match.end()
        if end < len(text):
            yield text[end:]

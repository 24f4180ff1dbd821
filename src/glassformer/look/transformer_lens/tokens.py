"""From texts to tokens and back, by TransformerLens' names."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described

from ..subject import piece_of


def as_ids(given: Any) -> Tensor:
    """Token ids as a tensor. Raises :class:`InputError` for what are none."""
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Token ids are a tensor, or lists of whole numbers of equal length, but {described(type(given))} was given: {given!r:.60}."
        ) from error


class TokenizerView:
    """Our tokenizer with the attributes that notebooks read off one of transformers; all else is the tokenizer's own."""

    def __init__(self, own: Any):
        self.own = own
        self.padding_side = "right"

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, else the one that ends it."""
        bos: int | None = self.own.bos_id if self.own.bos_id is not None else self.own.eos_id
        return bos

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        eos: int | None = self.own.eos_id
        return eos

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills up a row, else the one that ends a text."""
        pad: int | None = self.own.pad_id if self.own.pad_id is not None else self.own.eos_id
        return pad

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __len__(self) -> int:
        return len(self.own)

    def decode(self, ids: Any) -> str:
        """The text of ids."""
        ids = [int(i) for i in torch.as_tensor(ids).flatten()]
        text: str = self.own.decode(ids)
        return text


class Tokens:
    """The part of a hooked model that reads and writes texts."""

    cfg: SimpleNamespace
    gf_tokenizer: Any
    tokenizer: Any

    def _need_tokenizer(self, what: str) -> Any:
        if self.gf_tokenizer is None:
            raise InputError(f"{what} needs a tokenizer, but this model was wrapped without one: HookedTransformer(model, tokenizer), or give token ids.")
        return self.gf_tokenizer

    def to_tokens(
        self, input: str | list[str], prepend_bos: bool | None = None, padding_side: str = "right", move_to_device: bool = True, truncate: bool = True
    ) -> Tensor:
        """Ids [b t] of a text or of several, filled up on the right; ``prepend_bos`` None: ``cfg.default_prepend_bos``."""
        tokenizer = self._need_tokenizer("A text")
        if not isinstance(input, str) and not (isinstance(input, list | tuple) and all(isinstance(text, str) for text in input)):
            raise InputError(f"to_tokens reads a text or a list of texts, but {described(type(input))} was given.")
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        if bos and self.cfg.bos_id is None:
            raise InputError("prepend_bos was asked for, but this tokenizer has no token that begins a text: prepend_bos=False.")
        rows = [[self.cfg.bos_id] * bool(bos) + tokenizer.encode(text) for text in ([input] if isinstance(input, str) else input)]
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        longest = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id or 0
        if padding_side not in ("right", "left"):
            raise InputError(f"padding_side={padding_side!r} is neither 'right' nor 'left'.")
        if padding_side == "left" and len({*map(len, rows)}) > 1:
            raise InputError("Rows are filled up on the right here, where a causal model does not see it: leave padding_side out.")
        made = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long)
        return made.to(self.cfg.device) if move_to_device else made

    def to_string(self, tokens: Any) -> Any:
        """The text of ids [t]; of [b t] a list of texts."""
        tokenizer = self._need_tokenizer("A text")
        ids = as_ids(tokens)
        if ids.ndim == 2:
            return [self.to_string(row) for row in ids]
        return tokenizer.decode([int(i) for i in ids.flatten()])

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """The pieces of a text (or of ids) one by one; of several texts a list of lists."""
        if isinstance(input, list) and input and isinstance(input[0], str):
            return [self.to_str_tokens(text, prepend_bos) for text in input]
        ids = self.to_tokens(input, prepend_bos)[0] if isinstance(input, str) else as_ids(input)
        ids = ids[0] if ids.ndim == 2 and ids.shape[0] == 1 else ids
        if ids.ndim > 1:
            raise InputError(f"to_str_tokens reads one row, but ids of shape {tuple(ids.shape)} were given.")
        if self.gf_tokenizer is None:
            return [piece_of(None, int(i)) for i in ids.reshape(-1)]
        return [self.gf_tokenizer.decode([int(i)]) for i in ids.reshape(-1)]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises :class:`InputError` for one of several."""
        ids = self.to_tokens(string, prepend_bos=False)[0]
        if len(ids) != 1:
            raise InputError(f"{string!r} is {len(ids)} tokens ({self.to_str_tokens(ids)}), but one was asked for.")
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one id."""
        text: str = self._need_tokenizer("A text").decode([int(int_token)])
        return text

    def get_token_position(self, single_token: str | int, input: Any, mode: str = "first", prepend_bos: bool | None = None) -> int:
        """Where a token stands in a text or in ids. Raises :class:`InputError` if it does not."""
        ids = (self.to_tokens(input, prepend_bos) if isinstance(input, str) else as_ids(input)).flatten().tolist()
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        if wanted not in ids:
            raise InputError(f"{single_token!r} does not stand among the {len(ids)} tokens.")
        if mode not in ("first", "last"):
            raise InputError(f"mode={mode!r}: the 'first' or the 'last' place.")
        return ids.index(wanted) if mode == "first" else len(ids) - 1 - ids[::-1].index(wanted)

    def _ids(self, input: Any, prepend_bos: bool | None) -> Tensor:
        """[b t] of whatever a call was given."""
        if isinstance(input, str) or (isinstance(input, list) and input and isinstance(input[0], str)):
            return self.to_tokens(input, prepend_bos)
        if not isinstance(input, Tensor | Iterable):
            raise InputError(f"A model reads a text, texts or token ids, but {input!r} was given.")
        ids = as_ids(input).to(self.cfg.device)
        return ids[None] if ids.ndim == 1 else ids

"""From merges to ranks: when may ``tiktoken`` stand in for ``tokenizers``?

``tokenizers`` knows a list of merges ``(u, v)``; at each step the pair with the lowest place in the list, the leftmost of equals, becomes
``uv``. ``tiktoken`` knows ranked byte strings; at each step the adjacent pair whose *concatenation* has the lowest rank becomes one. The
second may merge pairs that are no merge of the first: with the merges ``a+b, b+c, a+bc`` the text ``abc`` is ``ab c`` for one and ``abc``
for the other.

**What is never adjacent does no harm.** Suppose the two agree up to some step on some text, where ``tiktoken`` now joins ``u`` and ``v``
to a token ``T`` although ``(u, v)`` is no merge. Until then no merge crossed the borders of this stretch, so ``tokenizers``, given
the string ``T`` alone, takes the same steps inside it and arrives at ``u v`` too, where it stops. Therefore

    if each ranked ``T``, encoded alone by merges only, gives the one token ``T``, both give the same tokens for every text.

The same argument says that each ``T`` always comes into being by the same last merge, whatever surrounds it; where several merges spell
``T``, the place of that one is its rank. Tokens that do not give themselves are unreachable; they get no rank. Files with
``ignore_merges`` use such a token after all where it is a whole word; it then gets a rank behind all others, unless it comes out as exactly two
tokens, for then ``tiktoken`` would join them anywhere.

This holds for arbitrary lists of merges, not only for those that training finds; a property test draws them at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .alphabet import CHARACTER_OF_BYTE, bytes_of


class Unfit(Exception):
    """This tokenizer has no equal in ranks; the message says why. It never leaves this room."""


class Ranks(NamedTuple):
    """``of[piece]`` is the rank of a byte string; ``ids[rank]`` its id, or ``ids is None`` if the ranks are the ids."""

    of: dict[bytes, int]
    ids: list[int] | None


def ranks_of(model: Mapping[str, Any], tokenize: Any) -> Ranks:
    """Ranks that merge as ``model`` (the entry ``"model"`` of a ``tokenizer.json``) does.

    ``tokenize(piece)`` must give the ids of a piece by merges only (with ``ignore_merges`` off).
    Raises :class:`Unfit` if there are none.
    """
    vocab: dict[str, int] = model["vocab"]
    if missing := [byte for byte, character in enumerate(CHARACTER_OF_BYTE) if character not in vocab]:
        raise Unfit(f"{len(missing)} of the 256 bytes are not in its vocabulary, {missing[0]:02X} for one")
    pairs: list[tuple[str, str]] = [(left, right) for left, right in model["merges"]]
    place = _places(pairs)
    reached: list[tuple[int, bytes, int]] = []
    whole_words: list[tuple[int, bytes, int]] = []
    for piece, id in vocab.items():
        raw = bytes_of(piece)
        if not raw:  # a special token in the vocabulary, written in other characters: no text leads there
            continue
        alone = tokenize(piece)
        if alone == [id]:
            reached.append((place[piece] if len(piece) > 1 else -1, raw, id))
        elif model.get("ignore_merges"):
            if len(alone) == 2:
                raise Unfit(f"its piece {piece!r} is used as a whole word only")
            whole_words.append((len(pairs), raw, id))
    ordered = sorted(reached, key=lambda entry: entry[0]) + whole_words
    ids = [id for _, _, id in ordered]
    merged = [id for at, _, id in ordered if at >= 0]
    if merged == sorted(merged):
        return Ranks({raw: id for _, raw, id in ordered}, None)
    return Ranks({raw: rank for rank, (_, raw, _) in enumerate(ordered)}, ids)


def _places(pairs: list[tuple[str, str]]) -> dict[str, int]:
    """The place in the list at which each piece comes into being."""
    spelled: dict[str, list[int]] = {}
    for at, pair in enumerate(pairs):
        spelled.setdefault("".join(pair), []).append(at)
    order = {pair: at for at, pair in enumerate(pairs)}
    # Neighbours in the list (as converted files have them) keep every order among pieces whichever is the one; others are looked up.
    return {piece: ats[0] if ats[-1] - ats[0] + 1 == len(ats) else _last_merge(piece, order) for piece, ats in spelled.items()}


def _last_merge(piece: Iterable[str], order: Mapping[tuple[str, str], int]) -> int:
    parts, last = list(piece), len(order)
    while len(parts) > 1:
        at = min(range(len(parts) - 1), key=lambda i: order.get((parts[i], parts[i + 1]), len(order)))
        last = order.get((parts[at], parts[at + 1]), len(order))
        if last == len(order):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return last

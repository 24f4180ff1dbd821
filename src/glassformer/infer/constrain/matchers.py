"""Where a text stands in a grammar: matchers by the tokens drawn so far, kept for as long as there is room.

    ()  ──5──►  (5,)  ──9──►  (5, 9)         a copy of the parent that has consumed one token more
                  └───2──►  (5, 2)           a fork

What a matcher knows is a function of the tokens that were drawn, so the table below is a memo and no state: a row that forks, is wound back or
leaves the batch finds its place by its tokens, and a place that was thrown out is computed anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glassformer.core.errors import SamplerError

from .vocabulary import Vocabulary, reason

PLACES = 1024
"""How many matchers are kept; in a vocabulary of 50,000 tokens each takes some 10 kB."""
SEARCH = 400
"""How many tokens are tried at the beginning to see whether a text can be finished, in vocabularies that lack characters."""
NARROW, FORK = 64, 4
"""Later on it is looked at what a token leads to only where at most 64 may follow, and only along ways that fork into at most 4: dead ends lie in
texts that must come as they are, and a look at everything would take longer than the model does."""

Bits = NDArray[np.uint8]


@dataclass(eq=False)
class Place:
    """One place in the grammar: ``may_end`` here, ``complete`` (nothing can follow), or ``over`` (behind the end, where nothing is ruled)."""

    matcher: Any
    may_end: bool = False
    complete: bool = False
    over: bool = False
    bits: Bits | None = None  # which tokens may follow, little end first
    hopeless: bool | None = None


class Matchers:
    """The places of one compiled grammar. ``eos`` are the ids that end a text: allowed where it may end, and never as text."""

    def __init__(self, lark: str, vocabulary: Vocabulary, eos: tuple[int, ...]):
        self.vocabulary, self.eos = vocabulary, frozenset(eos)
        self.root = self._place(vocabulary.matcher(lark).deep_copy())
        self.careful = not vocabulary.complete
        self._places: OrderedDict[bytes, Place] = OrderedDict()
        self._lock = threading.RLock()

    def at(self, ids: NDArray[np.int64]) -> Place:
        """The place behind these tokens. Raises :class:`SamplerError` for a token that may not stand there."""
        if not len(ids):
            return self.root
        with self._lock:
            key = ids.tobytes()
            found = self._places.get(key)
            if found is None:
                parent = self.root if len(ids) == 1 else self._places.get(key[: -ids.itemsize])
                found = self._replay(ids) if parent is None else self._after(parent, int(ids[-1]))
                self._places[key] = found
                if len(self._places) > PLACES:
                    self._places.popitem(last=False)
            else:
                self._places.move_to_end(key)
            return found

    def bits(self, place: Place) -> Bits:
        """Which tokens may follow, one bit per id and one more: whether the text may end."""
        with self._lock:
            if place.bits is None:
                place.bits = self._bits(place)
            return place.bits

    def finishable(self) -> bool:
        """Whether the vocabulary can spell a whole text of the grammar, as far as a short search sees."""
        with self._lock:
            return bool(self.bits(self.root).any()) and not (self.careful and self._hopeless(self.root, [SEARCH], len(self.vocabulary)))

    def only_empty(self) -> bool:
        """Whether the text may end before it has begun, and cannot begin."""
        with self._lock:
            return self.root.may_end and not self._tokens(self.bits(self.root))

    # Steps

    def _place(self, matcher: Any) -> Place:
        if matcher.is_error():
            raise SamplerError(f"The grammar became too much to follow: {reason(matcher)}. Simplify it.")
        return Place(matcher, bool(matcher.is_accepting()), bool(matcher.is_stopped()))

    def _after(self, parent: Place, token: int) -> Place:
        if parent.over or parent.complete or token in self.eos:
            return Place(None, over=True)
        matcher = parent.matcher.deep_copy()
        if not 0 <= token < len(self.vocabulary) or not matcher.consume_token(token):
            if matcher.is_error() and "doesn't satisfy the grammar" not in (why := reason(matcher)):
                raise SamplerError(f"The grammar became too much to follow: {why}. Simplify it.")
            raise SamplerError(
                f"Token {token} was drawn where the constraint does not allow it: another link of the chain brought it in. "
                f"Put the constraint behind that link, or leave it out."
            )
        return self._place(matcher)

    def _replay(self, ids: NDArray[np.int64]) -> Place:
        place = self.root
        for token in ids.tolist():
            place = self._after(place, token)
        return place

    def _bits(self, place: Place) -> Bits:
        bits = np.zeros(-(-(len(self.vocabulary) + 1) // 32) * 4, np.uint8)
        if place.over or place.complete:
            bits[:] = 255 * place.over
        else:
            place.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.size)
            if place.matcher.is_error():
                if "NoExtension" not in reason(place.matcher):  # no token of this vocabulary goes on here
                    raise SamplerError(f"The grammar became too much to follow: {reason(place.matcher)}. Simplify it.")
                bits[:] = 0
            for token in self.eos:
                bits[token >> 3] &= 255 ^ (1 << (token & 7)) if token < len(self.vocabulary) else 255
            if self.careful:
                self._drop_hopeless(place, bits)
        end = self.vocabulary.end
        bits[end >> 3] = (bits[end >> 3] & (255 ^ (1 << (end & 7)))) | (place.may_end << (end & 7))
        return bits

    # In a vocabulary that lacks characters a text may come to where nothing can follow

    def _drop_hopeless(self, place: Place, bits: Bits) -> None:
        tokens = self._tokens(bits)
        for token in tokens if len(tokens) <= NARROW else ():
            if self._hopeless(self._after(place, token), [NARROW], FORK):
                bits[token >> 3] &= 255 ^ (1 << (token & 7))

    def _hopeless(self, place: Place, budget: list[int], fork: int) -> bool:
        """Whether it is sure that no text can be finished from here. Not sure: the budget is spent, or more than ``fork`` tokens may follow."""
        if place.may_end or place.complete or place.over:
            return False
        if place.hopeless is None:
            bits = np.zeros(-(-(len(self.vocabulary) + 1) // 32) * 4, np.uint8)
            place.matcher.deep_copy().unsafe_compute_mask_ptr(bits.ctypes.data, bits.size)
            tokens = [token for token in self._tokens(bits) if token not in self.eos]
            if len(tokens) > fork:
                return False
            for token in tokens:
                budget[0] -= 1
                if budget[0] < 0 or not self._hopeless(self._after(place, token), budget, fork):
                    return False
            place.hopeless = True
        return place.hopeless

    def _tokens(self, bits: Bits) -> list[int]:
        found: list[int] = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: len(self.vocabulary)]).tolist()
        return found

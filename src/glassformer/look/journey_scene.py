"""A step, a position and a head: what sentences are made of, and how numbers and tokens are written in them."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

_BELOW = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def num(x: float | Tensor) -> str:
    """Three digits."""
    x = float(x)
    if not math.isfinite(x):
        return "infinite" if x > 0 else "−∞" if x < 0 else "no number"
    text = f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return text.replace("-", "−") if text not in ("-0", "-0.0") else "0"


def share(p: float | Tensor) -> str:
    """A share of one as per cent."""
    x = 100 * float(p)
    return f"{x:.0f} %" if x >= 1 or x == 0 else f"{x:.2g} %" if x >= 0.01 else "less than 0.01 %"


def quoted(piece: str) -> str:
    """A piece in quotes, without the mark of its space."""
    text = piece.strip("·") or piece
    return f'"{text}"' if "'" in text else f"'{text}'"


def bits(p: Tensor) -> Tensor:
    """Entropy of shares along the last axis, which sum to one."""
    return torch.special.entr(p.double()).sum(-1) / math.log(2)


class Scene:
    """A step, the position and the head that are spoken of."""

    def __init__(self, way: Any, step: Any, position: int, head: int | None):
        self.way, self.step, self.t, self.half = way, step, position, way.half(step)
        self.pieces, self.keys, self._head = self.half.pieces, way.keys(step), head

    def get(self, name: str | None = None, **at: Any) -> Tensor:
        """Values of a step (this one)."""
        made: Tensor = self.way.values(name or self.step.name, **at)
        return made.double() if made.is_floating_point() else made

    def lengths(self, name: str | None = None) -> Tensor:
        """Of the vectors along the last axis."""
        return self.get(name).norm(dim=-1)

    def input(self, n: int = 0) -> str:
        """The name of the step's n-th input."""
        name: str = self.step.inputs[n]
        return name

    def word(self, i: int | Tensor, keys: bool = False) -> str:
        """A piece in quotes, with its position below the line where it stands more than once."""
        pieces = self.keys if keys else self.pieces
        piece = pieces[int(i)]
        text = quoted(piece)
        return text if pieces.count(piece) == 1 else text + str(int(i)).translate(_BELOW)

    @property
    def here(self) -> str:
        """The token at the position."""
        return self.word(self.t)

    def token(self, i: int | Tensor) -> str:
        """A token of the vocabulary in quotes."""
        return quoted(self.way.subject.piece(int(i)))

    # Heads

    @property
    def attention(self) -> Any:
        """The layer that the step belongs to."""
        block = self.half.stack.blocks[self.step.layer]
        return block.cross if ".cross." in self.step.name else block.attn

    @cached_property
    def head(self) -> int:
        """The head that is spoken of."""
        if self._head is not None and self._head < self.attention.n_heads:
            return self._head
        root = self.step.name[: self.step.name.index(".cross." if ".cross." in self.step.name else ".attn.")]
        pattern = f"{root}.{'cross' if '.cross.' in self.step.name else 'attn'}.pattern"
        narrowest: dict[tuple[str, int], int] = self.way.narrowest
        if (pattern, self.t) not in narrowest:  # every sentence of the layer asks
            rows = self.get(pattern, position=self.t)
            rows = rows / rows.sum(-1, keepdim=True).clamp(min=1e-30)
            narrowest[pattern, self.t] = int(bits(rows).argmin())
        return narrowest[pattern, self.t]

    @property
    def group(self) -> int:
        """The key/value head that the head reads."""
        return self.head // int(self.attention.n_heads // self.attention.n_kv_heads)

    @property
    def group_name(self) -> str:
        """How the key/value head is called: where every head has its own, by the head's number."""
        return f"head {self.group}" if self.attention.n_heads == self.attention.n_kv_heads else f"key/value head {self.group}"

    def ends(self, x: Tensor, keys: bool = False) -> tuple[str, str, str, str]:
        """The token of the greatest number and that number, the token of the least and that number."""
        high, low = int(x.argmax()), int(x.argmin())
        return self.word(high, keys), num(x[high]), self.word(low, keys), num(x[low])


def angle(a: Tensor, b: Tensor) -> str:
    cosine = float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30))
    return f"{math.degrees(math.acos(max(-1.0, min(1.0, cosine)))):.0f}°"

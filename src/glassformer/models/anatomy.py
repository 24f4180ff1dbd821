"""Anatomy: what a model is made of, before it runs.

model.params()                      parameters by layer and part; the rows add up to the total
model.dimensions("The car is red")  every tensor on the way, in order, with named axes and sizes
model.flops_per_token(context)      operations of a forward pass, per token
model.bytes()                       memory of weights, and of the cache per token
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glassformer.core.errors import InputError
from glassformer.core.mask import And, Causal
from glassformer.core.sites import SiteInfo
from glassformer.core.spec import ranges
from glassformer.core.tap import Tap
from glassformer.parts.attention import CrossAttentionLayer, _Attention
from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.packed import Packed, PackedLinear, PackedReadOut


class ParamRow(NamedTuple):
    """Parameters of one part."""

    part: str
    shape: str
    size: int


@dataclass(frozen=True)
class Params:
    """A table of parameters by layer and part; tied weights are counted once."""

    rows: tuple[ParamRow, ...]
    total: int
    tied: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{'part':<38} {'shape':<18} {'each':>14} {'times':>6} {'parameters':>16}", "-" * 96]
        groups: dict[tuple[str, str], list[tuple[int | None, ParamRow]]] = {}
        for r in self.rows:
            head, number, tail = _block_of(r.part)
            key = (r.part, r.shape) if number is None else (f"{head}blocks.#.{tail}", r.shape)
            groups.setdefault(key, []).append((number, r))
        for (name, shape), members in groups.items():
            numbers = [n for n, _ in members if n is not None]
            shown = name.replace("#", str(numbers[0]) if len(numbers) == 1 else f"{{{ranges(numbers)}}}") if numbers else name
            count = members[0][1].size
            lines.append(f"{shown:<38} {shape:<18} {count:>14,} {len(members):>6} {count * len(members):>16,}")
        lines += ["-" * 96, f"{'total':<79} {self.total:>16,}"]
        lines += [f"tied, counted once: {t}" for t in self.tied]
        return "\n".join(lines)


class Dimension(NamedTuple):
    """One tensor on the way through a model."""

    path: str
    axes: str
    shape: tuple[int, ...]
    meaning: str


@dataclass(frozen=True)
class Dimensions:
    """Every tensor on the way of one text, in the order of computation."""

    text: str
    tokens: int
    rows: tuple[Dimension, ...]

    def __str__(self) -> str:
        lines = [self.text, f"{'site':<34} {'axes and sizes':<34} meaning", "-" * 110]
        for r in _folded(self.rows):
            sizes = " ".join(f"{a}={n}" if a != "1" else "1" for a, n in zip(r.axes.split(), r.shape, strict=True))
            lines.append(f"{r.path:<34} {sizes:<34} {r.meaning}")
        return "\n".join(lines)


class Bytes(NamedTuple):
    """Memory in bytes: all weights; the cache, per token of one row."""

    weights: int
    cache_per_token: int

    def __str__(self) -> str:
        return f"weights {self.weights:,} bytes; cache {self.cache_per_token:,} bytes per token"


class Anatomy:
    """What every built model can say about itself."""

    named_parameters: Callable[..., Any]
    named_modules: Callable[..., Any]
    modules: Callable[..., Any]

    origin: Mapping[str, Any] = MappingProxyType({})
    """What the checkpoint that the model was opened from says besides Spec and tensors (``config``, ``generation``), so that it travels along."""

    def params(self) -> Params:
        """A table of parameters by layer and part that adds up to the exact total."""
        rows = [ParamRow(name, " x ".join(map(str, x.shape)), x.numel()) for name, x in self.named_parameters()]
        rows += [_packed_row(name, m) for name, m in self.named_modules() if isinstance(m, Packed)]
        seen: dict[int, str] = {}
        tied = []
        for name, x in self.named_parameters(remove_duplicate=False):
            if id(x) in seen:
                tied.append(f"{name} is {seen[id(x)]}")
            seen.setdefault(id(x), name)
        tied += [f"{name}.weight is the embedding's table" for name, m in self.named_modules() if getattr(m, "tied", False)]
        return Params(tuple(rows), sum(r.size for r in rows), tuple(tied))

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations of a forward pass per token, in a row of ``context`` tokens.

        Two per multiply-add of every matrix (of experts: the chosen ones), and ``2 * 2 * seen * h * k`` per
        attention layer for scores and mix, ``seen`` being the average number of visible keys. Training
        costs three times as much (backward is two forwards). Raises :class:`InputError` for a context below 1.
        """
        if not isinstance(context, int) or context < 1:
            raise InputError(f"context is a number of tokens, 1 or more; {context!r} was given.")
        encoders = {id(m) for model in self.modules() if isinstance(model, Anatomy) and not _causal(model) for m in model.modules()}
        return _matrix_flops(self) + sum(_attention_flops(m, context, id(m) not in encoders) for m in self.modules() if isinstance(m, _Attention))

    def bytes(self) -> Bytes:
        """Bytes of weights, and of cached keys and values per token of one row."""
        weights = {id(x): bytes_of(x) for _, x in self.named_parameters()}
        weights |= {id(m): m.packed_bytes for m in self.modules() if isinstance(m, Packed)}
        half: Any = getattr(self, "decoder", self)  # an encoder reads its text once and keeps no keys
        layers = [m for m in half.modules() if isinstance(m, _Attention) and _causal(half)]
        cache = sum(m.cached * (m.out.like if isinstance(m.out, Packed) else m.out.weight).element_size() for m in layers)
        return Bytes(sum(weights.values()), cache)

    def dimensions(self, text: str | list[int] | int, tokenizer: Any = None) -> Dimensions:
        """Every tensor on the way of a text, with named axes and sizes; runs on the meta device, so no weights are needed.

        ``text``: a string (without a tokenizer each UTF-8 byte counts as a token), token ids, or a number of tokens.
        """
        if isinstance(text, int):
            n, said = text, f"{text} tokens"
        elif isinstance(text, str):
            n = len(getattr(tokenizer, "prompt", tokenizer.encode)(text)) if tokenizer is not None else len(text.encode())
            said = f"{text!r}: {n} {'tokens' if tokenizer is not None else 'bytes, one token each (give a tokenizer for its own pieces)'}"
        else:
            n, said = len(text), f"{len(text)} tokens"
        spec: Any = self.spec  # type: ignore[attr-defined]
        model = spec.build(device="meta").eval()
        shapes = _Shapes()
        tokens = torch.zeros(1, n, dtype=torch.long, device="meta")
        with torch.no_grad():
            model(*((tokens, tokens) if hasattr(model, "encoder") else (tokens,)), tap=shapes)
        known: dict[str, SiteInfo] = {s.path: s for s in model.sites()}
        return Dimensions(said, n, tuple(Dimension(p, known[p].axes, s, known[p].meaning) for p, s in shapes.seen.items()))


def bytes_of(x: Tensor) -> int:
    """Bytes that a tensor takes; of one that torchao holds in few bits, those of the numbers and steps that it is made of."""
    if hasattr(x, "tensor_data_names"):
        names: list[str] = x.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        return sum([bytes_of(getattr(x, name)) for name in names])
    return x.numel() * x.element_size()


class _Shapes(Tap):
    """Remembers the shape of every value, the ones made only for observers too."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, ...]] = {}

    def visit(self, path: str, x: Tensor) -> Tensor:
        self.seen[path] = tuple(x.shape)
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        self.seen[path] = tuple(compute(None).shape)


def _causal(model: Any) -> bool:
    mask = getattr(model.spec, "mask", None)  # an encoder-decoder has none of its own: its halves do
    return mask is None or any(isinstance(m, Causal) for m in (mask.terms if isinstance(mask, And) else (mask,)))


def _matrix_flops(model: Any) -> int:
    """Two operations per weight of every matrix that a token meets."""
    skipped: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, ExpertsLayer):
            share = module.spec.top_k / module.spec.n_experts
            skipped |= {id(m): share for m in module.experts.modules()}
    total = 0.0
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedReadOut):
            total += 2 * math.prod(module.matrix_shape) * skipped.get(id(module), 1.0)
        elif isinstance(module, nn.Linear) or hasattr(module, "tied"):
            total += 2 * module.weight.numel() * skipped.get(id(module), 1.0)
    return int(total)


def _packed_row(path: str, module: Packed) -> ParamRow:
    """A packed matrix among the parameters: its numbers count, whatever they take in memory (``bytes`` says that)."""
    rows, columns = module.matrix_shape
    return ParamRow(f"{path.removesuffix('.table')}.weight", f"{rows} x {columns} {'+'.join(dict.fromkeys(module.types))}", rows * columns)


def _attention_flops(layer: _Attention, context: int, causal: bool) -> int:
    if isinstance(layer, CrossAttentionLayer) or not causal:
        seen = float(context)
    else:
        size = min([context, *(m.size for m in getattr(layer.spec.mask, "terms", (layer.spec.mask,)) if hasattr(m, "size"))])
        # Row t sees min(t + 1, size) keys; the mean over the row.
        seen = (size * (size + 1) / 2 + (context - size) * size) / context
    return int(2 * seen * layer.n_heads * (layer.d_head + layer.d_value))


def _folded(rows: tuple[Dimension, ...]) -> list[Dimension]:
    """Layers with the same sites and sizes are shown once: ``blocks.0-11.attn.q``."""
    layers: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = {}
    for r in rows:
        head, number, tail = _block_of(r.path)
        if number is not None:
            layers.setdefault(head, {}).setdefault(number, []).append((tail, r.shape))
    groups: dict[tuple[str, int], tuple[int, int]] = {}
    for head, by_number in layers.items():
        numbers = sorted(by_number)
        first = numbers[0]
        for n in numbers:
            if by_number[n] != by_number[first]:
                first = n
            groups[head, first] = (first, n)
            groups.setdefault((head, n), (-1, -1))
    folded = []
    for r in rows:
        head, number, tail = _block_of(r.path)
        if number is None:
            folded.append(r)
            continue
        a, b = groups[head, number]
        if a == number:
            folded.append(r._replace(path=f"{head}blocks.{f'{{{a}-{b}}}' if b > a else a}.{tail}"))
    return folded


def _block_of(path: str) -> tuple[str, int | None, str]:
    head, found, rest = path.partition("blocks.")
    if not found:
        return path, None, ""
    number, _, tail = rest.partition(".")
    return head, int(number), tail

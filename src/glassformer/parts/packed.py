"""Packed parameters: matrices that stay quantised in memory and are unpacked where they are used.

    rows of bytes ──► dequantise ──► W ──┐         gone again after the product
                                 x ──────┴─► x W^T + b
    rows of bytes, few rows of x ────────────────► x W^T + b     compiled code, on a CPU (parts/linear.py)

    ids ──► their rows of bytes ──► dequantise ──► vectors      an embedding unpacks only the rows that are asked for

A matrix of 4-bit blocks takes an eighth of its float32 size, and each use costs the unpacking. Rows may come from
tensors of different types (queries and keys in Q4_K, values in Q6_K): a matrix is a list of pieces, one below the other.
Gradients flow through to ``x``, so that adapters and attributions work; the packed numbers themselves do not learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glassformer.core.blocks import dequantise, row_numbers
from glassformer.core.errors import WeightsError

from . import steady
from .embed import EmbeddingLayer
from .linear import Linear, packed_product, product
from .readout import LanguageModelLayer

AT_ONCE = 1 << 18  # numbers unpacked at a time: a megabyte, which a core keeps by itself; the product reads it from there (docs/log.md)


class Piece(NamedTuple):
    """Rows of a matrix as a file holds them: ``raw`` [rows, bytes] uint8, and the type of their blocks."""

    raw: Tensor
    type: str


class Packed(nn.Module):
    """Base of what holds a matrix [rows, columns] in pieces; ``like`` only says the type in which it is unpacked."""

    like: Tensor

    def hold(self, pieces: Sequence[Piece], dtype: torch.dtype) -> None:
        """Take the pieces. Raises :class:`WeightsError` if they are not rows of one matrix."""
        widths = [row_numbers(p.type, p.raw.shape[1]) for p in pieces]
        if len(set(widths)) != 1:
            raise WeightsError(f"The pieces of a packed matrix have rows of {' and '.join(map(str, widths))} numbers: rows of one matrix are equally long.")
        self.types = tuple(p.type for p in pieces)
        self.counts = tuple(p.raw.shape[0] for p in pieces)
        self.matrix_shape = (sum(self.counts), widths[0])
        for i, piece in enumerate(pieces):
            self.register_buffer(f"piece{i}", piece.raw)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=pieces[0].raw.device), persistent=False)

    @property
    def raws(self) -> list[Tensor]:
        """The bytes of each piece."""
        return [getattr(self, f"piece{i}") for i in range(len(self.types))]

    @property
    def packed_bytes(self) -> int:
        """Bytes that the matrix takes in memory."""
        return sum(x.numel() for x in self.raws)

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [rows, columns], unpacked."""
        kind = self.like.dtype if dtype is None else dtype
        made = [dequantise(x, t, kind) for x, t in zip(self.raws, self.types, strict=True)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def strips(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrix from top to bottom in strips that are soon used up; a small one is a single strip."""
        rows, columns = self.matrix_shape
        if rows * columns <= AT_ONCE:
            yield self.whole(dtype)
            return
        step = max(1, AT_ONCE // columns)
        for x, kind in zip(self.raws, self.types, strict=True):
            for at in range(0, len(x), step):
                yield dequantise(x[at : at + step], kind, dtype)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b``: [.. columns] -> [.. rows]. Few rows meet the bytes as they lie; for more, W is unpacked."""
        fast = packed_product(x, self.raws, self.types, bias)
        if fast is not None:
            return fast
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
            y: Tensor = _Product.apply(x, self)
        else:
            y = self.times(x)
        return y if bias is None else y + bias.to(y.dtype)

    def times(self, x: Tensor) -> Tensor:
        """``x W^T``, strip by strip."""
        made = [(product if steady.on() else F.linear)(x, w) for w in self.strips(x.dtype)]
        return made[0] if len(made) == 1 else torch.cat(made, -1)

    def extra_repr(self) -> str:
        return f"{self.matrix_shape[0]} x {self.matrix_shape[1]} of {', '.join(dict.fromkeys(self.types))}, {self.packed_bytes:,} bytes"


class _Product(torch.autograd.Function):
    """``x W^T`` that keeps nothing for the way back: W is unpacked again there, so that a layer's gradient costs no more memory than its use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return packed.times(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        made, at = None, 0
        for w in ctx.packed.strips(g.dtype):
            part = g[..., at : at + len(w)] @ w
            made, at = part if made is None else made + part, at + len(w)
        assert made is not None
        return made, None


class PackedLinear(Packed):
    """``y = x W^T + b`` with W in pieces; [.. in] -> [.. out]. In the place of ``nn.Linear``."""

    def __init__(self, pieces: Sequence[Piece], bias: nn.Parameter | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.hold(pieces, dtype)
        self.out_features, self.in_features = self.matrix_shape
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in], unpacked at each call."""
        return self.whole()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)


class PackedEmbedding(EmbeddingLayer):
    """An embedding whose table is packed: the rows of the tokens at hand are unpacked, and no others."""

    def __init__(self, layer: EmbeddingLayer, pieces: Sequence[Piece], dtype: torch.dtype = torch.float32):
        nn.Module.__init__(self)  # all but the table is the dense layer's
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        for name, x in layer.named_parameters(recurse=False):
            if name != "weight":
                self.register_parameter(name, x)
        for name, module in layer.named_children():
            self.add_module(name, module)
        self.table = Packed()
        self.table.hold(pieces, dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table [v d], unpacked at each call."""
        return self.table.whole()

    def rows(self, tokens: Tensor) -> Tensor:
        kind, at = self.table.like.dtype, 0
        made = None
        for raw, type in zip(self.table.raws, self.table.types, strict=True):
            here = dequantise(raw[(tokens - at).clamp(0, len(raw) - 1)], type, kind)
            made = here if made is None else torch.where((tokens >= at)[..., None], here, made)
            at += len(raw)
        assert made is not None
        return made

    def scores(self, h: Tensor) -> Tensor:
        """The table as a read-out: [.. d] -> [.. v]."""
        return self.table.product(h)


class PackedReadOut(LanguageModelLayer):
    """A read-out over the vocabulary whose matrix is packed (its own, or the embedding's if tied)."""

    def __init__(self, layer: LanguageModelLayer, embed: EmbeddingLayer, pieces: Sequence[Piece] = (), dtype: torch.dtype = torch.float32):
        nn.Module.__init__(self)
        for name, value in vars(layer).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self._embed = (embed,)
        self.transform, self.bias = layer.transform, layer.bias
        self.table = None
        if pieces:
            self.table = Packed()
            self.table.hold(pieces, dtype)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        embed: Any = self._embed[0]
        shape: tuple[int, int] = (embed.table if self.table is None else self.table).matrix_shape
        return shape

    @property
    def weight(self) -> Tensor:
        """The matrix [v width], unpacked at each call."""
        return self._embed[0].weight if self.table is None else self.table.whole()

    def scores(self, h: Tensor) -> Tensor:
        y = self._embed[0].scores(h) if self.table is None else self.table.product(h)  # type: ignore[operator]
        return y if self.bias is None else y + self.bias.to(y.dtype)


# Exchanging the parts of a model


def packable(model: Any, path: str) -> bool:
    """Whether the parameter at ``path`` is a matrix that can stay packed: of a linear layer, an embedding or a read-out of its own."""
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    if type(module) in (nn.Linear, Linear):
        above, _, name = owner.rpartition(".")
        used_whole = getattr(type(model.get_submodule(above)), "MATRICES", ())  # taken apart as matrices for every token: unpacked once is faster
        return leaf == "weight" and name not in used_whole
    alone = not getattr(getattr(model, "spec", None), "shared", False)  # a table of both halves of an encoder-decoder stays dense
    return alone and ((type(module) is EmbeddingLayer and leaf == "weight") or (type(module) is LanguageModelLayer and leaf == "matrix"))


def pack(model: Any, packed: Mapping[str, Sequence[Piece]], dtype: torch.dtype = torch.float32) -> None:
    """Put packed layers in the places of those whose parameters ``packed`` names (``"blocks.0.attn.qkv.weight"``); works on a model without memory too.

    ``dtype``: what the matrices are unpacked to where nothing else says it. Raises :class:`WeightsError` for a matrix that cannot stay packed, or
    pieces that do not have its shape.
    """
    for path, pieces in packed.items():
        if not packable(model, path):
            raise WeightsError(f"The parameter {path!r} cannot stay packed: only matrices of linear layers, embeddings and read-outs can. Load it unpacked.")
        owner = path.rpartition(".")[0]
        layer, shape = model.get_submodule(owner), tuple(model.get_parameter(path).shape)
        above, _, name = owner.rpartition(".")
        parent = model.get_submodule(above)
        made: nn.Module
        held: Any
        if isinstance(layer, nn.Linear):
            made = held = PackedLinear(pieces, layer.bias, dtype)
        elif isinstance(layer, EmbeddingLayer):
            made = PackedEmbedding(layer, pieces, dtype)
            held = made.table
            _read_from(parent, layer, made)
        else:
            made = PackedReadOut(layer, layer._embed[0], pieces, dtype)
            held = made.table
        if held.matrix_shape != shape:
            raise WeightsError(f"The packed pieces of {path!r} make a matrix of shape {held.matrix_shape}, but the model needs {shape}.")
        setattr(parent, name, made.train(layer.training))


def _read_from(parent: nn.Module, old: EmbeddingLayer, new: PackedEmbedding) -> None:
    """Let a read-out that knows the embedding know the packed one."""
    readout = getattr(parent, "readout", None)
    if isinstance(readout, LanguageModelLayer) and readout._embed[0] is old:
        readout._embed = (new,)
        if readout.tied:
            parent.readout = PackedReadOut(readout, new).train(readout.training)


def unpack(model: Any) -> Any:
    """Make every packed layer of ``model`` an ordinary one again, with parameters that learn; gives the model back."""
    for path, module in list(model.named_modules()):
        above, _, name = path.rpartition(".")
        parent = model.get_submodule(above)
        if isinstance(module, PackedLinear):
            made: Any = Linear(module.in_features, module.out_features, bias=False, device="meta")
            made.weight, made.bias = nn.Parameter(module.weight), module.bias
            setattr(parent, name, made.train(module.training))
        elif isinstance(module, PackedEmbedding):
            dense = module.spec.build(module.vocab_size, getattr(parent.spec, "d_model"))  # noqa: B009
            dense.weight = nn.Parameter(module.weight)
            for own, x in module.named_parameters(recurse=False):
                dense.register_parameter(own, x)
            for own, part in module.named_children():
                if own != "table":
                    setattr(dense, own, part)
            parent.embed = dense.train(module.training)
    for module in list(model.modules()):
        readout = getattr(module, "readout", None)
        if isinstance(readout, PackedReadOut):
            plain = LanguageModelLayer.__new__(LanguageModelLayer)
            nn.Module.__init__(plain)
            for own, value in vars(readout).items():
                if not own.startswith("_"):
                    setattr(plain, own, value)
            plain._embed = (module.embed,)
            plain.transform, plain.bias = readout.transform, readout.bias
            if readout.table is not None:
                plain.matrix = nn.Parameter(readout.table.whole())
            module.readout = plain.train(readout.training)
    return model

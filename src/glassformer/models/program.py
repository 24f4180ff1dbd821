"""A decode step as one call: the kernels of core/native in the order in which the model calls them, written down once.

    tokens [b] ──► rows of the table (+ positions) ──► stream [b 1 d] ──► block ──► block ──► … ──► final norm ──► [b 1 d] ──► read-out ──► logits [b v]
                                                       └──────────────────── step ────────────────────┘
    └────────────────────────────────────────────────────────── decode ─────────────────────────────────────────────────────────┘

    block   (norm) ──► qkv ──► (rotary) ──► append and attend ──► out ──► (norm) ──► + ──► (norm) ──► up, activation, down ──► (norm) ──► +

:func:`decode` is for whoever draws token after token; :func:`step` takes part in every forward pass, and leaves embedding and read-out to it.
A :class:`Plan` holds the calls (structs with addresses and sizes) and the memory between them, and belongs to the cache of one run. It computes the bits
of the blocks' own way, which calls the same kernels one by one. Before each step it looks whether the model's modules, parameters and buffers and the
cache's memory are still those that were written down, and whoever wants to look into the blocks (a tap, a hook) finds them called as always.
"""

from __future__ import annotations

import ctypes
import operator
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from glassformer.core import modes, native
from glassformer.core.cache import Cache, Dense
from glassformer.core.flow import Pass
from glassformer.core.mask import Causal, Everything, Window
from glassformer.parts import decoding, linear, steady
from glassformer.parts.attention import AttentionLayer
from glassformer.parts.embed import EmbeddingLayer
from glassformer.parts.feedforward import ACTIVATIONS, GatedLayer, PlainLayer
from glassformer.parts.kernels import NormaliserLayer
from glassformer.parts.linear import Linear
from glassformer.parts.norm import LayerNormLayer, NoNormLayer, RMSNormLayer
from glassformer.parts.packed import PackedEmbedding, PackedLinear, PackedReadOut
from glassformer.parts.position import LearnedLayer, NoPositionLayer
from glassformer.parts.readout import LanguageModelLayer
from glassformer.parts.rotary import RotaryLayer
from glassformer.parts.wiring import SequentialBlock

_ADD = struct.Struct("=4q")
_ROWS = struct.Struct("=9qd")
_SCORES = 3  # in which word a product says where its result goes
_KEYS = 12  # in which word a call of attention says how many keys there are: after eight addresses, b, h, g and t


class _Other(Exception):
    """Something that is not written down: the blocks go their own way."""


class _NotNow(_Other):
    """Somebody trains, or stands between a module and its call: for as long as that is so."""


def step(model: Any, x: Tensor, p: Pass) -> Tensor | None:
    """The stream after the final norm of a decode step, or None where the blocks are to be called one by one: x [b 1 d] -> [b 1 d]."""
    cache = p.cache
    if torch.compiler.is_compiling() or cache is None or cache.plan is False or x.ndim != 3 or x.shape[1] != 1 or not _is_plain(p):
        return None
    if steady.on() or modes.is_deterministic() or (code := decoding.library(x)) is None:
        return None
    slots = [layer.get("attn") for layer in cache.layers]
    if len(slots) != len(model.blocks) or any(type(s) is not Dense or s._keys is None for s in slots) or (0 in cache.clock.new):
        return None
    plan: Plan | None = cache.plan
    if plan is None or not plan.fits(model, slots, x):
        try:
            plan = cache.plan = Plan(model, x, slots, code)
        except _NotNow:
            cache.plan = None
            return None
        except _Other:
            cache.plan = False
            return None
    return plan.run(x, p, max(cache.clock.lengths) + 1)


def decode(model: Any, tokens: Tensor, cache: Cache) -> Tensor | None:
    """``model(tokens, cache=cache, keep=1)[:, -1]`` for one token per row, nobody looking: [b 1] -> [b v]. None: it is to be called that way.

    That is so until a step has been written down, and where embedding or read-out do more than look up, add and multiply. The model is in
    evaluation mode if a value comes, and no gradients are recorded.
    """
    plan, clock = cache.plan, cache.clock
    if type(plan) is not Plan or not plan.whole or tokens.shape != (plan.rows, 1) or tokens.dtype != torch.int64:
        return None
    if not decoding.is_free() or steady.on() or modes.is_deterministic() or native.library() is not plan.code or _are_hooked() or clock.overwritten:
        return None
    keys, ids = max(clock.lengths) + 1, tokens[:, 0].tolist()
    if keys > plan.most or (cache.capacity is not None and keys > cache.capacity) or min(ids) < 0 or max(ids) >= plan.n_tokens:
        return None  # the forward pass says what is wrong
    return plan.decode(ids, cache, keys) if plan.fits(model, [layer.get("attn") for layer in cache.layers]) else None


def _is_plain(p: Pass) -> bool:
    return p.tap is None and p.aux is None and p.memory is None and type(p.mask) is Causal and "position" not in p.shared and not _are_hooked()


def _are_hooked() -> bool:
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


class _Facts:
    """All that the calls were made of: who is where, and where its numbers lie. :meth:`hold` says whether it still is so (some 1,000 of them, each step)."""

    def __init__(self, model: Any, names: Sequence[str], slots: Sequence[Any] = (), itself: bool = False):
        self.model, self.names = model, names
        self.modules = [m for name in names for m in model._modules[name].modules()] + ([model] if itself else [])
        self.classes: list[Any] = list(dict.fromkeys(map(type, self.modules)))
        self.owns = [m.__dict__ for m in self.modules]
        self.chosen = [(own, name) for own in self.owns for name in _CHOICES if name in own]
        inner = [own for own in self.owns if own is not model.__dict__]
        self.dicts = [d for own in inner for d in (own["_modules"], own["_parameters"], own["_buffers"]) if d]
        self.parts = self._parts()
        self.tensors = [w for w in self.parts if isinstance(w, Tensor)]
        self.memory = _memory(slots)
        self.others = self._others()
        self.told = self._told()

    def hold(self, slots: Sequence[Any] = ()) -> bool:
        return _same(self._parts(), self.parts) and _same(_memory(slots), self.memory) and _same(self._others(), self.others) and self.told == self._told()

    def _parts(self) -> list[Any]:
        here = self.model._modules
        return [*map(here.get, self.names), *chain.from_iterable(map(dict.values, self.dicts))]

    def _others(self) -> list[Any]:
        """What calls are made of beside tensors: the modules' choices and numbers, their classes and what those do."""
        return [*(own.get(name) for own, name in self.chosen), *map(type, self.modules), *(kind.forward for kind in self.classes)]

    def _told(self) -> list[Any]:
        every = [*self.tensors, *self.memory]
        told: list[Any] = [torch.get_num_threads(), torch.is_inference_mode_enabled(), self.is_bare()]
        # A stride and a number of entries say a shape, and take a third of the time.
        told += [*map(Tensor.data_ptr, every), *map(Tensor.stride, every), *map(Tensor.numel, every), *map(operator.attrgetter("dtype"), every)]
        return told

    def is_bare(self) -> bool:
        return _is_bare(self.owns)


def _is_bare(owns: Sequence[dict[str, Any]]) -> bool:
    """Whether nobody trains, and nobody stands between a module and its call."""
    return not (
        any(map(_IN_TRAINING, owns))
        or any(map(_AFTER, owns))
        or any(map(_BEFORE, owns))
        or any(any(map(dict.__contains__, owns, repeat(name))) for name in _CALLS)
    )


_CHOICES = ("spec", "act", "steps", "normed", "tied", "_embed", "n_heads", "n_kv_heads", "eps", "scale", "offset", "late", "factor")
_CALLS = ("forward", "_compiled_call_impl")  # what stands in the place of a class's own way
_IN_TRAINING, _AFTER, _BEFORE = map(operator.itemgetter, ("training", "_forward_hooks", "_forward_pre_hooks"))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _memory(slots: Sequence[Any]) -> list[Any]:
    return [w for slot in slots for w in (slot._keys, slot._values)]


class Plan:
    """The calls of a decode step through a model's blocks, for streams like ``x`` [b 1 d]; ``steps`` counts how often it was run.

    Made by :func:`step`. A copy of a cache makes a plan of its own.
    """

    def __init__(self, model: Any, x: Tensor, slots: list[Any], code: Any):
        if not _is_bare([m.__dict__ for part in (model.blocks, model.final_norm) for m in part.modules()]):
            raise _NotNow
        self.facts, self.code, self.steps = _Facts(model, ("blocks", "final_norm"), slots), code, 0
        self.rows, self.d, self.type, self.bf16 = x.shape[0], x.shape[2], x.dtype, int(x.dtype == torch.bfloat16)
        self.threads = torch.get_num_threads()
        self.memory: dict[str, Tensor] = {}
        self.tables: dict[str, tuple[RotaryLayer, Tensor, Tensor]] = {}
        self.calls: list[tuple[str, bytes]] = []
        self.attending: list[int] = []
        self.stream, self.ends = self._buffer("stream", self.d), torch.zeros(self.rows, dtype=torch.int64)
        for block, slot in zip(model.blocks, slots, strict=True):
            self._block(block, slot)
        self._norm(model.final_norm, self.stream, self._buffer("final", self.d))
        inner, self.calls, self.outer = self.calls, [], _Facts(model, ("embed", "position", "readout"), itself=True)
        try:
            self._outside(model)
            entrance, *exit_ = self.calls
            self._write([entrance, *inner, *exit_], len(inner))
        except _Other:
            self._write(inner, len(inner))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy

    def fits(self, model: Any, slots: Sequence[Any], x: Tensor | None = None) -> bool:
        """Whether all is as it was when the calls were written down."""
        if x is not None and (x.shape != (self.rows, 1, self.d) or x.dtype != self.type):
            return False
        return self.facts.model is model and self.outer.hold() and self.facts.hold(slots)

    def run(self, x: Tensor, p: Pass, keys: int) -> Tensor:
        """From the stream that enters the blocks: ``keys`` is how many the longest row has, the new one included."""
        self.stream.copy_(x[:, 0])
        self.ends.copy_(p.index[..., 0] + 1)
        self._run(self.program, p.positions, p.lengths, keys)
        return self.memory["final"][:, None].clone()

    def decode(self, ids: list[int], cache: Cache, keys: int) -> Tensor:
        """From the tokens ``ids`` [b] to the logits [b v]."""
        lengths = cache.clock.lengths
        self.ids[:] = ids  # type: ignore[assignment]
        self.at[:] = [n + self.offset for n in lengths]
        self.ends.copy_(torch.tensor([n + 1 for n in lengths]))
        logits = torch.empty(self.rows, self.vocabulary, dtype=self.type)
        for word, at in self.scoring:
            self.words[word] = logits.data_ptr() + at
        places = torch.tensor(lengths if len(set(lengths)) > 1 else lengths[:1])
        self._run(self.whole, places[:, None] if len(places) > 1 else places, None, keys)
        cache.clock.new = [1] * self.rows
        cache.close()
        return logits

    def _run(self, program: bytes, positions: Tensor, lengths: Tensor | None, keys: int) -> None:
        for layer, cos, sin in self.tables.values():
            for mine, table in zip((cos, sin), layer.tables(positions, lengths), strict=True):
                mine.copy_(table[..., 0, :])
        for word in self.attending:
            self.words[word] = keys
        self.code.glassformer_program(program)
        self.steps += 1

    # What is written down

    def _outside(self, model: Any) -> None:
        """Before the blocks the rows of the tokens, after them the scores over the vocabulary."""
        embed, position, readout = model.embed, model.position, model.readout
        plain = type(embed) in (EmbeddingLayer, PackedEmbedding) and type(embed.norm) is NoNormLayer and not embed.spec.n_types
        plain = plain and type(embed.lift_tokens) is nn.Identity is type(embed.lift_sum) and type(position) in (NoPositionLayer, LearnedLayer)
        scored = type(readout) in (LanguageModelLayer, PackedReadOut) and readout.transform is None and readout.factor == 1.0 and readout.spec.cap is None
        if not (plain and scored and self.outer.is_bare() and type(model).forward is type(model)._plain_forward):
            raise _Other
        self._look_up(embed, position)
        self._score(readout, embed)

    def _look_up(self, embed: Any, position: Any) -> None:
        learned, tables = type(position) is LearnedLayer, list(self._packed(embed.table) if type(embed) is PackedEmbedding else self._dense(embed.weight))
        packed = embed.table if type(embed) is PackedEmbedding else None
        shape = tuple(embed.weight.shape) if packed is None else packed.matrix_shape
        if len(tables) > 1 or shape != (embed.vocab_size, self.d) or (packed is not None and packed.like.dtype != self.type):
            raise _Other
        self.offset: int = position.spec.offset if learned else 0
        self.most: int = position.spec.max_positions if learned else sys.maxsize
        if learned and tuple(position.table.shape) != (self.most + self.offset, self.d):
            raise _Other
        self.n_tokens, self.ids, self.at = embed.vocab_size, (ctypes.c_int64 * self.rows)(), (ctypes.c_int64 * self.rows)()
        (table, kind), places = tables[0], self._at(position.table) if learned else 0
        told = (table.data_ptr(), ctypes.addressof(self.ids), places, ctypes.addressof(self.at), self.stream.data_ptr(), self.rows, self.d, kind, self.bf16)
        self.calls.append(("rows", _ROWS.pack(*told, float(torch.tensor(embed.factor, dtype=self.type)))))

    def _score(self, readout: Any, embed: Any) -> None:
        packed = type(readout) is PackedReadOut
        if readout._embed[0] is not embed or (packed and readout.bias is not None):
            raise _Other
        pieces = list(self._packed(readout.table or embed.table) if packed else self._dense(readout.weight))
        self.vocabulary = sum(len(raw) for raw, _ in pieces)
        self._times(pieces, readout.bias, self.memory["final"], 0, self.vocabulary)  # where to is said at each step

    def _block(self, block: nn.Module, slot: Any) -> None:
        if type(block) is not SequentialBlock:
            raise _Other
        for name, before, out, after in block.steps:
            part, x = block._modules[name], self.stream
            if before:
                x = self._norm(block._modules[before], x, self._buffer("normed", self.d))
            if type(part) is AttentionLayer:
                y = self._attention(part, x, slot)
            elif type(part) in (PlainLayer, GatedLayer):
                y = self._widened(part, x)
            else:
                raise _Other
            if out:
                y = self._norm(block._modules[out], y, self._buffer("out", self.d))
            self.calls.append(("add", _ADD.pack(self.stream.data_ptr(), y.data_ptr(), self.rows * self.d, self.bf16)))
            if after:
                self._norm(block._modules[after], self.stream, self.stream)

    def _norm(self, layer: Any, x: Tensor, y: Tensor) -> Tensor:
        if type(layer) not in (LayerNormLayer, RMSNormLayer):
            raise _Other
        rms = type(layer) is RMSNormLayer
        if not x.shape[1] == layer.d == layer.weight.numel() == (layer.d if rms or layer.bias is None else layer.bias.numel()):
            raise _Other
        weight, bias = self._at(layer.weight), 0 if rms else self._at(layer.bias)
        offset, late = (layer.offset, layer.late) if rms else (0.0, False)
        told = decoding._NORM.pack(x.data_ptr(), weight, bias, y.data_ptr(), self.rows, layer.d, self.bf16, rms, layer.eps, offset, late)
        self.calls.append(("norm", told))
        return y

    def _attention(self, layer: AttentionLayer, x: Tensor, slot: Dense) -> Tensor:
        h, g, d_key, d_value, own, size = layer.n_heads, layer.n_kv_heads, layer.d_head, layer.d_value, layer.spec.mask, self.type.itemsize
        if layer.normed or type(layer.normaliser) is not NormaliserLayer or type(own) not in (Everything, Window):
            raise _Other
        keys, values = slot._keys, slot._values
        if keys is None or values is None or keys.dtype != self.type or values.dtype != self.type or keys.stride(3) != 1 or values.stride(3) != 1:
            raise _Other
        qkv = self._product(layer.qkv, x, "qkv")
        width, (n_q, n_k, _) = qkv.shape[1], layer.widths
        q, k, v = (qkv.data_ptr() + at * size for at in (0, n_q, n_q + n_k))
        q_step, k_step = width, width
        if type(layer.position) is RotaryLayer:
            q, k, q_step, k_step = self._turned(layer.position, q, h, width, "q"), self._turned(layer.position, k, g, width, "k"), n_q, n_k
        elif type(layer.position) is not NoPositionLayer:
            raise _Other
        z = self._buffer("z", h * d_value)
        told = decoding._CALL.pack(
            *(q, keys.data_ptr(), values.data_ptr(), z.data_ptr(), k, v, self.ends.data_ptr(), 0),
            *(self.rows, h, g, 1, keys.shape[2], d_key, d_value),
            *(q_step, d_key, q_step, *keys.stride()[:3], *values.stride()[:3], h * d_value, d_value, h * d_value, 1),
            *(k_step, k_step, d_key, width, width, d_value),
            *(own.size if isinstance(own, Window) else 0, self.bf16, self.bf16, self.threads),
            *(layer.scale, layer.spec.cap or 0.0),
        )
        self.calls.append(("attend", told))
        return self._product(layer.out, z, "out")

    def _turned(self, layer: RotaryLayer, x: int, n: int, width: int, name: str) -> int:
        assert layer.key is not None
        if layer.key not in self.tables:
            self.tables[layer.key] = (layer, torch.zeros(self.rows, layer.dim), torch.zeros(self.rows, layer.dim))
        _, cos, sin = self.tables[layer.key]
        k, y = layer.d_head, self._buffer(name, n * layer.d_head)
        steps = (width, width, k, layer.dim)
        told = (x, y.data_ptr(), cos.data_ptr(), sin.data_ptr(), self.rows, 1, n, k, layer.dim, *steps, layer.spec.layout == "half", self.bf16)
        self.calls.append(("turn", decoding._TURN.pack(*told)))
        return y.data_ptr()

    def _widened(self, layer: Any, x: Tensor) -> Tensor:
        gated, act, size = type(layer) is GatedLayer, layer.spec.act, self.type.itemsize
        # A plain layer calls its activation itself: of these one alone is compiled code.
        if layer.act is not ACTIVATIONS[act] or act not in (decoding._ACTS if gated else ("gelu_tanh",)):
            raise _Other
        wide = self._product(layer.gate_up if gated else layer.up, x, "wide")
        width = wide.shape[1]
        n = width // 2 if gated else width
        post = self._buffer("post", n)
        up = wide.data_ptr() + n * size if gated else 0
        self.calls.append(("bend", decoding._BEND.pack(wide.data_ptr(), up, post.data_ptr(), self.rows, n, width, self.bf16, decoding._ACTS[act])))
        return self._product(layer.down, post, "out")

    def _product(self, layer: Any, x: Tensor, name: str) -> Tensor:
        """``x W^T + b`` by :mod:`glassformer.parts.linear`'s rules of who takes part."""
        if type(layer) not in (Linear, PackedLinear):
            raise _Other
        y = self._buffer(name, layer.out_features)
        self._times(self._dense(layer.weight) if type(layer) is Linear else self._packed(layer), layer.bias, x, y.data_ptr(), layer.out_features)
        return y

    def _times(self, pieces: Iterable[tuple[Tensor, int]], bias: Tensor | None, x: Tensor, y: int, n: int) -> None:
        b, at, k, pieces = self._at(bias), 0, x.shape[1], list(pieces)
        if sum(len(raw) for raw, _ in pieces) != n or (bias is not None and bias.shape != (n,)):
            raise _Other
        for raw, kind in pieces:
            dense = kind in linear._TYPES.values()
            name = linear.kernel(self.code, self.type, self.rows, k) if dense else "linear"
            if name is None or (raw.shape[1] != k if dense else k % 32):
                raise _Other
            told = (x.data_ptr(), raw.data_ptr(), b + at if b else 0, y + at, self.rows, len(raw), k, kind, self.bf16, self.threads)
            self.calls.append((name, linear._CALL.pack(*told)))
            at += len(raw) * self.type.itemsize

    def _dense(self, weight: Tensor) -> Iterator[tuple[Tensor, int]]:
        self._at(weight)
        yield weight, linear._TYPES[self.type]

    def _packed(self, packed: Any) -> Iterator[tuple[Tensor, int]]:
        if self.rows > linear.PACKED_ROWS or (self.rows > 1 and len(packed.types) > 1):
            raise _Other
        for raw, kind in zip(packed.raws, packed.types, strict=True):
            if kind not in linear.BLOCKS or not linear._is_held(raw):
                raise _Other
            yield raw, linear.BLOCKS[kind]

    def _at(self, w: Tensor | None) -> int:
        """Where a parameter lies (0: there is none)."""
        if w is None:
            return 0
        if w.dtype != self.type or not linear._is_held(w) or w.numel() == 0:
            raise _Other
        return w.data_ptr()

    def _buffer(self, name: str, width: int) -> Tensor:
        key = name if name in ("stream", "final") else f"{name}:{width}"
        if key not in self.memory:
            self.memory[key] = torch.zeros(self.rows, width, dtype=self.type)
        return self.memory[key]

    def _write(self, calls: list[tuple[str, bytes]], inner: int) -> None:
        """Put the calls side by side where they stay, and make the lists of who takes which: the ``inner`` of the blocks, and all."""
        size = sum(len(told) for _, told in calls)
        self.room = bytearray(size)
        self.words = memoryview(self.room).cast("q")
        start, at, ops, whole = ctypes.addressof(ctypes.c_char.from_buffer(self.room)), 0, [], len(calls) > inner
        self.scoring: list[tuple[int, int]] = []
        for i, (name, told) in enumerate(calls):
            self.room[at : at + len(told)] = told
            if name == "attend":
                self.attending.append(at // 8 + _KEYS)
            if whole and i > inner:
                self.scoring.append((at // 8 + _SCORES, self.words[at // 8 + _SCORES]))
            ops += [ctypes.cast(getattr(self.code, f"glassformer_{name}"), ctypes.c_void_p).value, start + at]
            at += len(told)
        self.ops = bytearray(struct.pack(f"={len(ops)}q", *ops))
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.ops))
        self.program = struct.pack("=3q", first + whole * 16, inner, self.threads)
        self.whole = struct.pack("=3q", first, len(ops) // 2, self.threads) if whole else b""
        self.calls = []

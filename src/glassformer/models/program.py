"""A decode step's blocks as one call: the kernels of core/native in the order in which the blocks call them, written down once.

    stream [b 1 d] ──► block ──► block ──► … ──► final norm ──► [b 1 d]

    block   (norm) ──► qkv ──► (rotary) ──► append and attend ──► out ──► (norm) ──► + ──► (norm) ──► up, activation, down ──► (norm) ──► +

A :class:`Plan` holds the calls (structs with addresses and sizes) and the memory between them, and belongs to the cache of one run. It computes the bits
of the blocks' own way, which calls the same kernels one by one. Before each step it looks whether the model's modules, parameters and buffers and the
cache's memory are still those that were written down, and whoever wants to look into the blocks (a tap, a hook) finds them called as always.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from glassformer.core import modes
from glassformer.core.cache import Dense
from glassformer.core.flow import Pass
from glassformer.core.mask import Causal, Everything, Window
from glassformer.parts import decoding, linear, steady
from glassformer.parts.attention import AttentionLayer
from glassformer.parts.feedforward import ACTIVATIONS, GatedLayer, PlainLayer
from glassformer.parts.kernels import NormaliserLayer
from glassformer.parts.linear import Linear
from glassformer.parts.norm import LayerNormLayer, RMSNormLayer
from glassformer.parts.packed import PackedLinear
from glassformer.parts.position import NoPositionLayer
from glassformer.parts.rotary import RotaryLayer
from glassformer.parts.wiring import SequentialBlock

_ADD = struct.Struct("=4q")
_KEYS = 12  # in which word a call of attention says how many keys there are: after eight addresses, b, h, g and t


class _Other(Exception):
    """Something that is not written down: the blocks go their own way."""


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
    if plan is None or plan.facts.model is not model or not plan.facts.hold(x, slots):
        try:
            plan = cache.plan = Plan(model, x, slots, code)
        except _Other:
            cache.plan = False
            return None
    return plan.run(x, p, max(cache.clock.lengths) + 1)


def _is_plain(p: Pass) -> bool:
    return p.tap is None and p.aux is None and p.memory is None and type(p.mask) is Causal and "position" not in p.shared and not _are_hooked()


def _are_hooked() -> bool:
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


class _Facts:
    """All that the calls were made of: who is where, and where its numbers lie. :meth:`hold` says whether it still is so (some 1,000 of them, each step)."""

    def __init__(self, model: Any, x: Tensor, slots: list[Any]):
        self.model, self.slots = model, slots
        self.owns = [m.__dict__ for m in (*model.blocks.modules(), *model.final_norm.modules())]
        self.dicts = [d for own in self.owns for d in (own["_modules"], own["_parameters"], own["_buffers"]) if d]
        self.parts = [model.blocks, model.final_norm, *chain.from_iterable(d.values() for d in self.dicts)]
        self.tensors = [w for w in self.parts if isinstance(w, Tensor)]
        self.memory = [w for slot in slots for w in (slot._keys, slot._values)]
        self.told = self._told(x)

    def hold(self, x: Tensor, slots: list[Any]) -> bool:
        parts = [self.model.blocks, self.model.final_norm, *chain.from_iterable(map(dict.values, self.dicts))]
        memory = [w for slot in slots for w in (slot._keys, slot._values)]
        same = len(parts) == len(self.parts) and all(map(operator.is_, parts, self.parts))
        return same and len(memory) == len(self.memory) and all(map(operator.is_, memory, self.memory)) and self.told == self._told(x)

    def _told(self, x: Tensor) -> list[Any]:
        every = [*self.tensors, *self.memory]
        told: list[Any] = [x.shape, x.dtype, torch.get_num_threads(), torch.is_inference_mode_enabled(), self.is_bare()]
        told += [(own.get("eps"), own.get("scale")) for own in self.owns]
        # A stride and a number of entries say a shape, and take a third of the time.
        told += [*map(Tensor.data_ptr, every), *map(Tensor.stride, every), *map(Tensor.numel, every), *map(operator.attrgetter("dtype"), every)]
        return told

    def is_bare(self) -> bool:
        """Whether nobody trains, and nobody stands between a module and its call."""
        return not any(own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own for own in self.owns)


class Plan:
    """The calls of a decode step through a model's blocks, for streams like ``x`` [b 1 d]; ``steps`` counts how often it was run.

    Made by :func:`step`. A copy of a cache makes a plan of its own.
    """

    def __init__(self, model: Any, x: Tensor, slots: list[Any], code: Any):
        self.facts, self.code, self.steps = _Facts(model, x, slots), code, 0
        if not self.facts.is_bare():
            raise _Other
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
        self._write()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # addresses mean nothing in a copy

    def run(self, x: Tensor, p: Pass, keys: int) -> Tensor:
        """One step: ``keys`` is how many the longest row has, the new one included."""
        self.stream.copy_(x[:, 0])
        self.ends.copy_(p.index[..., 0] + 1)
        for layer, cos, sin in self.tables.values():
            for mine, table in zip((cos, sin), layer.tables(p.positions, p.lengths), strict=True):
                mine.copy_(table[..., 0, :])
        for word in self.attending:
            self.words[word] = keys
        self.code.glassformer_program(self.program)
        self.steps += 1
        return self.memory["final"][:, None].clone()

    # What is written down

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
        y, size, k = self._buffer(name, layer.out_features), self.type.itemsize, x.shape[1]
        bias, at = self._at(layer.bias), 0
        for raw, kind in self._pieces(layer, k):
            b = bias + at * size if bias else 0
            told = (x.data_ptr(), raw.data_ptr(), b, y.data_ptr() + at * size, self.rows, len(raw), k, kind, self.bf16, self.threads)
            self.calls.append(("linear", linear._CALL.pack(*told)))
            at += len(raw)
        return y

    def _pieces(self, layer: Any, k: int) -> Iterator[tuple[Tensor, int]]:
        if type(layer) is Linear:
            if self.rows > linear.ROWS[self.type] or layer.weight.shape[1] != k:
                raise _Other
            self._at(layer.weight)
            yield layer.weight, linear._TYPES[self.type]
            return
        if self.rows > linear.PACKED_ROWS or k % 32 or (self.rows > 1 and len(layer.types) > 1):
            raise _Other
        for raw, kind in zip(layer.raws, layer.types, strict=True):
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

    def _write(self) -> None:
        """Put the calls side by side where they stay, and make the list of who takes which."""
        size = sum(len(told) for _, told in self.calls)
        self.room = bytearray(size)
        self.words = memoryview(self.room).cast("q")
        start, at, ops = ctypes.addressof(ctypes.c_char.from_buffer(self.room)), 0, []
        for name, told in self.calls:
            self.room[at : at + len(told)] = told
            if name == "attend":
                self.attending.append(at // 8 + _KEYS)
            ops += [ctypes.cast(getattr(self.code, f"glassformer_{name}"), ctypes.c_void_p).value, start + at]
            at += len(told)
        self.ops = bytearray(struct.pack(f"={len(ops)}q", *ops))
        self.program = struct.pack("=2q", ctypes.addressof(ctypes.c_char.from_buffer(self.ops)), len(ops) // 2)
        self.calls = []

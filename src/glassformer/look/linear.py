"""The way of one position's stream to the read-out as a sum of parts: every norm on it frozen at what it did.

    part ──► (out norm) ──► + ──► (norm after the sum) ──► … ──► final norm ──► (transform) ──► read-out ──► logit
                                   affine, once its scale is held at the value that it had for this text

A LayerNorm is ``w * (x - mean(x)) / scale + b``. Centring is linear, and with ``scale`` held at its actual value so is the rest: each part is
carried by itself, the bias is a part of its own, and the parts sum to the stream exactly. What is frozen is what the parts have in common:
had one of them been different, the scale would have been another.

:meth:`Walk.push` carries every part forwards to the last stream [n p d]; :meth:`Walk.pull` carries one direction of reading backwards to
every place where something is added [p d], which costs no more for a million neurons. ``p``: the positions asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.errors import InputError
from glassformer.core.flow import Pass
from glassformer.core.modes import evaluating
from glassformer.core.numerics import wide
from glassformer.core.tap import Record
from glassformer.parts.attention import matrix_of
from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.norm import DynamicTanhLayer, LayerNormLayer, NoNormLayer, RMSNormLayer
from glassformer.parts.wiring import ParallelBlock, SequentialBlock

from .subject import Subject, feedforward_of, reads_tokens, with_weights


@dataclass(frozen=True)
class Part:
    """One summand: its name, what it is, and the layer and head where it has them."""

    name: str
    kind: str
    """``"embedding"``, ``"head"``, ``"cross head"``, ``"feed-forward"``, ``"unit"``, ``"bias"``, ``"attention"`` or ``"cross-attention"``."""
    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True, eq=False)
class Frozen:
    """``y = gain * (M (x - mean(x))) + bias``, without what is None: a norm at a fixed scale, an activation at a fixed factor, a matrix."""

    name: str
    gain: Tensor | None = None
    """[p d]."""
    centred: bool = False
    matrix: Tensor | None = None
    """[out in]."""
    bias: Tensor | None = None
    """[out]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The linear part: [.. p in] -> [.. p out]."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x if self.matrix is None else x @ self.matrix.T
        return x if self.gain is None else x * self.gain

    def back(self, r: Tensor) -> Tensor:
        """Its transpose: the direction of its input that a direction ``r`` of its output reads; [p out] -> [p in]."""
        r = r if self.gain is None else r * self.gain
        r = r if self.matrix is None else r @ self.matrix
        return r - r.mean(-1, keepdim=True) if self.centred else r

    def at(self, i: int) -> Frozen:
        """The map of one of the positions."""
        return self if self.gain is None else replace(self, gain=self.gain[i : i + 1])


def freeze(norm: nn.Module, x: Tensor, name: str) -> Frozen | None:
    """A norm as the affine map that it was at its input ``x`` [p d]; None for the identity.

    LayerNorm and RMSNorm: the scale is held. DynamicTanh: each feature's factor ``tanh(alpha x) / x`` is held.
    Raises :class:`InputError` for a norm of one's own, of which nothing is known.
    """
    x = wide(x)
    if isinstance(norm, NoNormLayer):
        return None
    if isinstance(norm, LayerNormLayer):
        scale = (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        return Frozen(name, wide(norm.weight) / scale, True, None, None if norm.bias is None else wide(norm.bias))
    if isinstance(norm, RMSNormLayer):
        return Frozen(name, (norm.offset + wide(norm.weight)) / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt())
    if isinstance(norm, DynamicTanhLayer):
        alpha = wide(norm.alpha)
        return Frozen(name, wide(norm.weight) * _factor(lambda v: torch.tanh(alpha * v), x), bias=wide(norm.bias))
    raise InputError(
        f"{name} is a {type(norm).__name__}, and how it acts at a fixed scale is known of LayerNorm, RMSNorm, DynamicTanh and NoNorm only: use one of those."
    )


def affine(linear: nn.Module, name: str) -> Frozen | None:
    """A linear layer as it is; None for the identity."""
    if isinstance(linear, nn.Identity):
        return None
    bias = getattr(linear, "bias", None)
    return Frozen(name, matrix=wide(matrix_of(linear)), bias=None if bias is None else wide(bias))  # type: ignore[arg-type]


def freeze_transform(transform: Any, h: Tensor) -> list[Frozen]:
    """BERT's ``norm(act(W h + b))`` at its input ``h`` [p d]: of the activation the factor ``(act(z) - act(0)) / z`` of each feature is held."""
    maps = [affine(transform.linear, "readout.transform")]
    z = wide(transform.linear(h))
    zero = transform.act(z.new_zeros(()))
    factor = _factor(lambda v: transform.act(v) - zero, z)
    maps.append(Frozen("readout.transform.act", factor, bias=None if float(zero) == 0 else zero.expand(z.shape[-1])))
    maps.append(freeze(transform.norm, transform.act(z), "readout.transform.norm"))
    return [m for m in maps if m is not None]


def _factor(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x) / x``, feature by feature; 0 at 0, where nothing is multiplied by it."""
    return torch.where(x == 0, torch.zeros_like(x), function(x) / torch.where(x == 0, torch.ones_like(x), x))


class Rows(Record):
    """A record of some positions only, without the batch axis: [p ..]; values [s g k] whole, patterns [h p s]."""

    def __init__(self, rows: Sequence[int], *patterns: str):
        super().__init__(*patterns)
        self._rows = list(rows)

    def visit(self, path: str, x: Tensor) -> Tensor:
        if self.wants(path):
            self._keep(path, x)
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if self.wants(path):
            self._keep(path, compute(None))

    def _keep(self, path: str, x: Tensor) -> None:
        name, x = path.rsplit(".", 1)[-1], x.detach()
        x = x if name == "pos_embed" and x.ndim == 2 else x[0]
        self.values[path] = x.clone() if name == "v" else x[:, self._rows] if name == "pattern" else x[self._rows]


@dataclass(frozen=True, eq=False)
class Step:
    """One sublayer: what it returns goes through ``out``, joins the stream, and the sum goes through ``after``."""

    layer: int
    sublayer: str
    out: Frozen | None
    after: Frozen | None

    @property
    def path(self) -> str:
        """``blocks.3.attn``."""
        return f"blocks.{self.layer}.{self.sublayer}"


@dataclass(frozen=True, eq=False)
class Pulled:
    """Directions of reading: ``at[(layer, sublayer)]`` [p d] of what a sublayer returns, ``embed`` [p w] of the embedding; ``biases`` are parts already."""

    at: dict[tuple[int, str], Tensor]
    embed: Tensor
    biases: list[tuple[Part, Tensor]]


@dataclass(frozen=True, eq=False)
class Walk:
    """One forward pass of some positions, frozen (see the head of this file)."""

    subject: Subject
    rows: list[int]
    record: Rows
    embed: list[Frozen]
    """What embedding and positions go through before the first block."""
    steps: list[Step]
    final: list[Frozen]
    logits: Tensor | None = None
    """[p v], where a tap of the subject's own may have changed them."""

    def __getitem__(self, site: str) -> Tensor:
        return wide(self.record[self.subject.prefix + site])

    def module(self, step: Step) -> Any:
        """The sublayer's module."""
        return getattr(self.subject.stack.blocks[step.layer], step.sublayer)

    # Parts where they arise

    def origin(self) -> tuple[list[Part], Tensor]:
        """Token embedding, token types and positions: their parts and vectors [n p w]."""
        layer = self.subject.stack.embed
        made = [(Part("embed", "embedding"), self["embed"])]
        if layer.spec.n_types:
            types = wide(layer.types[0]).expand_as(made[0][1])
            made = [(Part("embed", "embedding"), self["embed"] - types), (Part("embed.types", "bias"), types)]
        if self.subject.has("pos_embed"):
            made.append((Part("pos_embed", "embedding"), self["pos_embed"]))
        return [part for part, _ in made], torch.stack([v for _, v in made])

    def parts(self, step: Step) -> tuple[list[Part], Tensor]:
        """What a sublayer returns, in parts [n p d]: heads and their bias, or the feed-forward and its bias."""
        layer, module = step.layer, self.module(step)
        if step.sublayer in ("attn", "cross"):
            within, kind = ("", "head") if step.sublayer == "attn" else ("cross.", "cross head")
            z = self.record[self.subject.prefix + f"{step.path}.z"]
            vectors = wide(module.result(z[None], None)[0].transpose(0, 1))
            parts = [Part(f"{layer}.{within}{h}", kind, layer, h) for h in range(module.n_heads)]
            bias = None if module.out.bias is None else wide(module.out.bias).expand_as(vectors[0])
        else:
            vectors, bias = self[f"{step.path}.out"][None], self.bias(step)
            parts = [Part(f"{layer}.{step.sublayer}", "feed-forward", layer)]
            vectors = vectors if bias is None else vectors - bias
        if bias is None:
            return parts, vectors
        return [*parts, Part(f"{layer}.{step.sublayer}.bias", "bias", layer)], torch.cat([vectors, bias[None]])

    def bias(self, step: Step) -> Tensor | None:
        """What the biases of a feed-forward's projection back add to its output [p d] (of experts: by their weights); None without."""
        module, total = self.module(step), None
        if not isinstance(module, ExpertsLayer):
            bias = down_bias(module)
            return None if bias is None else bias.expand_as(self[f"{step.path}.out"])
        for _, inner, weight in self.experts(step):
            if (bias := down_bias(inner)) is not None:
                added = weight[:, None] * bias
                total = added if total is None else total + added
        return total

    def experts(self, step: Step) -> list[tuple[str, Any, Tensor]]:
        """Every expert that a position goes to by its number, then the ``"shared"`` one, each with its weight at every position [p]."""
        module = self.module(step)
        chosen = self.record[self.subject.prefix + f"{step.path}.chosen"]
        weights = self[f"{step.path}.router"].gather(-1, chosen)
        if module.spec.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights * module.spec.routing.scale
        found = [(str(e), module.experts[e], (weights * (chosen == e)).sum(-1)) for e in sorted(set(chosen.flatten().tolist()))]
        return found if module.shared is None else [*found, ("shared", module.shared, torch.ones_like(weights[:, 0]))]

    # Forwards and backwards

    def push(self) -> tuple[list[Part], Tensor]:
        """Every part in the stream after the final norm: [n p d], which sum to ``resid_final``."""
        parts, vectors = self.through(*self.origin(), self.embed)
        for step in self.steps:
            more, added = self.through(*self.parts(step), [] if step.out is None else [step.out], step.layer)
            parts, vectors = [*parts, *more], torch.cat([vectors, added])
            parts, vectors = self.through(parts, vectors, [] if step.after is None else [step.after], step.layer)
        return self.through(parts, vectors, self.final)

    @staticmethod
    def through(parts: list[Part], vectors: Tensor, maps: Sequence[Frozen], layer: int | None = None) -> tuple[list[Part], Tensor]:
        """Parts after further maps, whose biases are parts of their own."""
        for m in maps:
            vectors = m(vectors)
            if m.bias is not None:
                parts = [*parts, Part(f"{m.name}.bias", "bias", layer)]
                vectors = torch.cat([vectors, m.bias.expand_as(vectors[:1])])
        return parts, vectors

    def pull(self, r: Tensor, beyond: Sequence[Frozen] = ()) -> Pulled:
        """The direction ``r`` [p d], read of what ``beyond`` makes of the last stream, at every place where a part is added."""
        biases: list[tuple[Part, Tensor]] = []
        at: dict[tuple[int, str], Tensor] = {}

        def back(m: Frozen | None, r: Tensor, layer: int | None = None) -> Tensor:
            if m is None:
                return r
            if m.bias is not None:
                biases.append((Part(f"{m.name}.bias", "bias", layer), (r * m.bias).sum(-1)))
            return m.back(r)

        for m in reversed([*self.final, *beyond]):
            r = back(m, r)
        for step in reversed(self.steps):
            r = back(step.after, r, step.layer)
            at[step.layer, step.sublayer] = back(step.out, r, step.layer)
        for m in reversed(self.embed):
            r = back(m, r)
        return Pulled(at, r, biases[::-1])


def last_only(s: Subject) -> dict[str, int]:
    """The option that reads out one position where a call is made for what lies before the logits; none for pooled and foreign models."""
    readout = getattr(s.stack, "readout", None)
    return {} if readout is None or readout.pooled else {"keep": 1}


def walk(s: Subject, rows: list[int], what: str, *more: str) -> Walk:
    """Run the text once and freeze the way of the positions ``rows``; ``more`` sites are recorded too.

    Raises :class:`InputError` for a foreign model, and for blocks that are wired in a way of their own.
    """
    stack: Any = with_weights(s.stack, what)
    wanted = ["embed", "blocks.*.resid_pre", "blocks.*.resid_post", "blocks.*.attn.z", "blocks.*.attn.out", "resid_final", *more]
    wanted += [f for f in ("pos_embed", "blocks.*.resid_mid", "blocks.*.resid_mid_cross", "blocks.*.cross.z", "blocks.*.cross.out") if s.has(f)]
    for name in {feedforward_of(stack, i) for i in range(s.layers)}:
        wanted += [f"blocks.*.{name}.{site}" for site in ("out", *(("in", "router", "chosen") if name == "experts" else ()))]
    record = Rows(rows, *(s.path(site) for site in wanted))
    with torch.no_grad(), evaluating(s.model):
        if s.tap is None:
            s.model(*s.inputs, tap=record, **last_only(s))  # the logits wanted are computed from the last stream
            logits = None
        else:
            output = s.model(*s.inputs, tap=s.tap | record)
            logits = output[0, rows] if reads_tokens(stack) else None
        made = Walk(s, rows, record, [], [], [], logits)
        made.embed.extend(_embedding(made))
        for i, block in enumerate(stack.blocks):
            made.steps.extend(steps_of(made, block, i))
        last = freeze(stack.final_norm, made[f"blocks.{s.layers - 1}.resid_post"], "final_norm")
    made.final.extend([] if last is None else [last])
    return made


def _embedding(w: Walk) -> list[Frozen]:
    layer = w.subject.stack.embed
    maps = (freeze(layer.norm, w.origin()[1].sum(0), "embed.norm"), affine(layer.lift_sum, "embed.lift"))
    return [m for m in maps if m is not None]


_BEFORE = {"attn": "resid_pre", "cross": "resid_mid"}


def steps_of(w: Walk, block: Any, i: int) -> list[Step]:
    """The sublayers of block ``i`` in order, their norms frozen. Raises :class:`InputError` for a wiring of one's own."""
    if isinstance(block, ParallelBlock):
        return [Step(i, name, None, None) for name, _ in block.steps]
    if not isinstance(block, SequentialBlock):
        raise InputError(f"Block {i} is a {type(block).__name__}, whose wiring is not known here: sums of parts are known of the wirings of glassformer.")
    made = []
    for name, _, out, after in block.steps:
        y = w[f"blocks.{i}.{name}.out"]
        first = None if not out else freeze(getattr(block, out), y, f"{i}.{out}")
        second = None
        if after:
            y = y if first is None else first(y) + (0 if first.bias is None else first.bias)
            before = _BEFORE.get(name, "resid_mid_cross" if "cross" in block.order else "resid_mid")
            second = freeze(getattr(block, after), w[f"blocks.{i}.{before}"] + y, f"{i}.{after}")
        made.append(Step(i, name, first, second))
    return made


def down_bias(inner: nn.Module) -> Tensor | None:
    """The bias of a feed-forward's projection back [d], where it has one."""
    bias = getattr(getattr(inner, "down", None), "bias", None)
    return None if bias is None else wide(bias)


def units(inner: nn.Module, x: Tensor) -> Tensor:
    """The hidden units of a feed-forward at its input ``x`` [p d], as they are projected back: [p f]."""
    index, record = torch.arange(len(x), device=x.device), Record("post")
    with torch.no_grad(), evaluating(inner):
        inner(x[None], Pass(positions=index, index=index, tap=record))
    return wide(record["post"][0])

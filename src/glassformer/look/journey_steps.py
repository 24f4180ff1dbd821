"""The steps of a journey, in the order in which this model computes: what each is called, what it follows from, and how its values are got.

    embed ─► block 0 ─► … ─► final norm ─► read-out ─► logits ─► probabilities ─► links of the sampler ─► next
             └ norms where the wiring has them, attention head by head, cross-attention, feed-forward or experts, sums

A step that is a site of the model bears the site's path; what lies between sites has a name beside them (``attn.products``, ``ffn.gate_act``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.feedforward import GatedLayer, PlainLayer
from glassformer.parts.norm import DynamicTanhLayer, JointLayer, LayerNormLayer, NoNormLayer, RMSNormLayer
from glassformer.parts.wiring import _AFTER, ParallelBlock

from .journey_attention import Heads
from .journey_feedforward import experts, feedforward
from .journey_formulas import linear, norm_formula, position_formula
from .journey_run import ALL, Half, Pick

Compute = Callable[[Pick], Tensor]


@dataclass(frozen=True, eq=False)
class JourneyStep:
    """One step: ``values`` follow from the values of ``inputs`` (earlier steps) by ``formula``; ``meaning`` says what it means for this text.

    ``axes``: a letter for each axis of ``shape`` (t position, s key position, h head, g key/value head, k head size, d stream, f unit, v token, e expert,
    c choice, r latent, w width of a narrow embedding, 1 an axis of size one). ``layer``: None outside the blocks.
    """

    name: str
    layer: int | None
    title: str
    formula: str
    axes: str
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    dtype: str
    kind: str
    """What sort of step it is, whatever its layer: ``"pattern"``, ``"norm.scale"``."""
    side: str
    """Whose tokens the position axis counts: ``"text"`` or ``"source"`` (key positions of cross-attention count the source)."""
    _way: Any = field(repr=False)
    _compute: Compute = field(repr=False)
    by_head: bool = field(default=False, repr=False)
    by_row: bool = field(default=False, repr=False)
    module: Any = field(default=None, repr=False)

    @property
    def values(self) -> Tensor:
        """The numbers, computed now (batch axis left out)."""
        made: Tensor = self._way.values(self.name)
        return made

    @property
    def meaning(self) -> str:
        """What the step means for this text, from its numbers."""
        said: str = self._way.meaning(self.name)
        return said


class Plan:
    """The steps of one stack of blocks, from its embedding to the stream that its read-out reads; ``aliases``: other names of the same values."""

    def __init__(self, way: Any, half: Half):
        self.way, self.half, self.prefix = way, half, half.prefix
        self.steps: dict[str, JourneyStep] = {}
        self.aliases: dict[str, str] = {}
        self.t, self.d = len(half.ids), half.stack.spec.d_model
        self.layer: int | None = None

    def add(
        self,
        name: str,
        kind: str,
        title: str,
        formula: str,
        axes: str,
        shape: tuple[int, ...],
        inputs: tuple[str, ...],
        compute: Compute,
        *,
        by_head: bool = False,
        by_row: bool = False,
        dtype: str | None = None,
        module: Any = None,
    ) -> str:
        """Append a step; ``name`` without the stack's prefix, ``inputs`` with it. Returns the full name."""
        full = self.prefix + name
        dtype = dtype or ("float64" if self.half.final.dtype == torch.float64 else "float32")
        self.steps[full] = JourneyStep(
            full, self.layer, title, formula, axes, shape, inputs, dtype, kind, self.half.side, self.way, compute, by_head, by_row, module
        )
        return full

    def of(self, name: str, pick: Pick = ALL) -> Tensor:
        """The values of an earlier step (full name), as the model's own type has them; rows picked where there are positions."""
        step = self.steps[name]
        x = step._compute(pick)
        if pick.rows is not None and not step.by_row and step.axes.split()[0] == "t":
            x = x[list(pick.rows)]
        return x

    # Whole stacks

    def build(self) -> str:
        """All steps up to the final norm; returns the name of what the read-out reads."""
        stack = self.half.stack
        x = self.embedding(stack)
        for i, block in enumerate(stack.blocks):
            self.layer = i
            if i:
                self.aliases[f"{self.prefix}blocks.{i}.resid_pre"] = x
            x = self.block(i, block, x)
        self.layer = None
        final = self.norm("final_norm", stack.final_norm, x, "resid_final", lambda _: self.half.final[0])
        if final == x:
            self.aliases[f"{self.prefix}resid_final"] = x
        return final

    def embedding(self, stack: Any) -> str:
        """From ids to the stream that enters block 0."""
        title, formula = "the text as pieces, each with its number", "ids = tokenizer(text)"
        tokens = self.add("tokens", "tokens", title, formula, "t", (self.t,), (), lambda _: self.half.tokens[0], dtype="int64")
        return self._summed(stack, self._looked_up(stack, tokens))

    def _looked_up(self, stack: Any, x: str) -> str:
        """Each token's vector, before positions are added."""
        e, t = stack.embed, self.t
        w, ds = e.width, e.d_sum
        before: list[tuple[str, str, str, str, int, Callable[[Tensor], Tensor]]] = [
            ("rows", "embed", "look up each token's vector", "x[t] = E[ids[t]]", w, lambda ids: e.look_up(ids[None])[0])
        ]
        if e.factor != 1.0:
            factor = e.factor
            scaled = ("scaled", "scaled", "multiply by a constant", f"x = {factor:g} · rows", w, lambda x: x * torch.tensor(factor, dtype=x.dtype))
            before.append(scaled)
        if not isinstance(e.lift_tokens, nn.Identity):
            before.append(("lifted", "map", "lift narrow rows to the stream's width", linear("x", "W_lift", "x", e.lift_tokens), ds, e.lift_tokens))
        if e.spec.n_types:
            before.append(("typed", "add", "add the vector of token type 0", "x = x + types[0]", ds, lambda x: x + e.types[0]))
        for n, (short, kind, title, formula, width, fn) in enumerate(before):
            name = "embed" if n == len(before) - 1 else f"embed.{short}"
            axes = "t d" if width == self.d else "t w"
            x = self.add(name, kind, title, formula, axes, (t, width), (x,), lambda pick, x=x, fn=fn: fn(self.of(x)))  # type: ignore[misc]
        return x

    def _summed(self, stack: Any, x: str) -> str:
        """Positions added, the sum normed and lifted, where the model does so."""
        e, half, spec, t = stack.embed, self.half, stack.spec, self.t
        ds = e.d_sum
        normed, lifts = not isinstance(e.norm, NoNormLayer), not isinstance(e.lift_sum, nn.Identity)
        after = [k for k, on in (("sum", spec.position.adds), ("normed", normed), ("lifted_sum", lifts)) if on]
        names = {k: f"embed.{k}" for k in after}
        if after:
            names[after[-1]] = "blocks.0.resid_pre" if len(stack.blocks) else "embed.stream"
        axes = "t d" if ds == self.d else "t w"
        if "sum" in names:
            place = self.add(
                "pos_embed",
                "position",
                "the vector of each position",
                position_formula(spec.position),
                axes,
                (t, ds),
                (),
                lambda _: stack.position.add(half.index, e.look_up(half.tokens)),
            )
            x = self.add(
                names["sum"],
                "sum",
                "add position to token",
                "x = embed + pos_embed",
                axes,
                (t, ds),
                (x, place),
                lambda _, x=x: self.of(x) + self.of(place),  # type: ignore[misc]
            )
        if "normed" in names:
            x = self.norm("embed.norm", e.norm, x, names["normed"])
        if "lifted_sum" in names:
            formula = linear("x", "W_lift", "x", e.lift_sum)
            lifted = names["lifted_sum"]
            x = self.add(lifted, "map", "lift the finished sum to the stream's width", formula, "t d", (t, self.d), (x,), lambda _, x=x: e.lift_sum(self.of(x)))  # type: ignore[misc]
        if not after and len(stack.blocks):
            self.aliases[f"{self.prefix}blocks.0.resid_pre"] = x
        return x

    # A norm

    def norm(self, path: str, module: Any, x: str, out: str, compute: Compute | None = None, by_row: bool = False) -> str:
        """Mean, scale and normed values of ``x``; returns the name of the last (``x`` itself where nothing is normed)."""
        if isinstance(module, NoNormLayer):
            return x
        step, inner = self.steps[x], module.norm if isinstance(module, JointLayer) else module
        joint = isinstance(module, JointLayer)
        axes = step.axes.split()
        rows = axes[:-2] if joint else axes[:-1]
        small = (*step.shape[: len(rows)], 1)

        def read(pick: Pick) -> Tensor:
            y = self.of(x, pick if by_row else ALL)
            y = y.flatten(-2) if joint else y
            return y if y.dtype in (torch.float32, torch.float64) else y.float()

        used, one = [x], " ".join([*rows, "1"])
        if isinstance(inner, LayerNormLayer):
            title, formula = "the mean over features", "mean = Σ_d x / d"
            mean = self.add(f"{path}.mean", "norm.mean", title, formula, one, small, (x,), lambda pick: read(pick).mean(-1, keepdim=True), by_row=by_row)
            used.append(mean)
        if isinstance(inner, LayerNormLayer | RMSNormLayer):
            centred = isinstance(inner, LayerNormLayer)
            formula = f"scale = √(Σ_d (x − mean)² / d + {inner.eps:g})" if centred else f"scale = √(Σ_d x² / d + {inner.eps:g})"

            def scale(pick: Pick) -> Tensor:
                y = read(pick)
                y = y - y.mean(-1, keepdim=True) if centred else y
                return (y.pow(2).mean(-1, keepdim=True) + inner.eps).sqrt()

            used.append(self.add(f"{path}.scale", "norm.scale", "what the norm divides by", formula, one, small, tuple(used), scale, by_row=by_row))
        assert isinstance(inner, LayerNormLayer | RMSNormLayer | DynamicTanhLayer)

        def normed(pick: Pick) -> Tensor:
            y: Tensor = module(self.of(x, pick if by_row else ALL)[None], self.half.aside())[0]
            return y

        formula, whole = norm_formula(inner), compute is None and by_row
        return self.add(out, "norm.normed", "the norm", formula, step.axes, step.shape, tuple(used), compute or normed, by_row=whole, module=inner)

    # A block

    def block(self, i: int, block: Any, x: str) -> str:
        """One block, wired as it is; returns the name of the stream that leaves it."""
        root = f"blocks.{i}."
        if isinstance(block, ParallelBlock):
            return self._parallel(i, block, x)
        for name, before, out, after in block.steps:
            site = _AFTER[name].name
            y = self.norm(root + before, getattr(block, before), x, f"{root}{before}.normed", self.site(i, f"{name}.in")) if before else x
            y = self.sublayer(i, block, name, y)
            if out:
                y = self.norm(root + out, getattr(block, out), y, f"{root}{out}.normed")
            added = f"{root}{site}_sum" if after else root + site
            word = {"attn": "attention", "cross": "cross-attention"}.get(name, "the feed-forward layer")
            formula = f"x = {self._short(x)} + {self._short(y)}"
            compute: Compute = (lambda _, x=x, y=y: self.of(x) + self.of(y)) if after else self.site(i, site)  # type: ignore[misc]
            x = self.add(added, "residual", f"add what {word} gives to the stream", formula, "t d", (self.t, self.d), (x, y), compute)
            if after:
                x = self.norm(root + after, getattr(block, after), x, root + site, self.site(i, site))
        return x

    def _parallel(self, i: int, block: Any, x: str) -> str:
        root, outs, normed = f"blocks.{i}.", [], {}
        for name, norm in block.steps:
            if norm not in normed:
                normed[norm] = self.norm(root + norm, getattr(block, norm), x, f"{root}{norm}.normed", self.site(i, f"{name}.in"))
            outs.append(self.sublayer(i, block, name, normed[norm]))
        formula = f"x = {self._short(x)} + {self._short(outs[0])} + {self._short(outs[1])}"
        title = "add what attention and the feed-forward layer give to the stream"
        return self.add(f"{root}resid_post", "residual", title, formula, "t d", (self.t, self.d), (x, *outs), self.site(i, "resid_post"))

    def site(self, i: int, path: str) -> Compute:
        """What the block has recorded there."""
        return lambda _: self.half.block(i)[path][0]

    def _short(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def sublayer(self, i: int, block: Any, name: str, x: str) -> str:
        """Attention, cross-attention, feed-forward or experts; returns the name of what it gives."""
        layer = getattr(block, name)
        self.aliases[f"{self.prefix}blocks.{i}.{name}.in"] = x
        if isinstance(layer, ExpertsLayer):
            return experts(self, i, layer, x)
        if isinstance(layer, PlainLayer | GatedLayer):
            return feedforward(self, i, "ffn", layer, x)
        return Heads(self, i, name, layer).build(x)

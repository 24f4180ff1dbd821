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
from glassformer.parts.feedforward import ClampedGatedLayer, GatedLayer, PlainLayer
from glassformer.parts.norm import DynamicTanhLayer, JointLayer, LayerNormLayer, NoNormLayer, RMSNormLayer
from glassformer.parts.wiring import _AFTER, ParallelBlock

from .journey_attention import Heads
from .journey_formulas import groups, linear, norm_formula, position_formula
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
        e, half, spec = stack.embed, self.half, stack.spec
        w, ds, t = e.width, e.d_sum, self.t
        tokens = self.add(
            "tokens", "tokens", "the text as pieces, each with its number", "ids = tokenizer(text)", "t", (t,), (), lambda _: half.tokens[0], dtype="int64"
        )
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
        x = tokens
        for n, (short, kind, title, formula, width, fn) in enumerate(before):
            name = "embed" if n == len(before) - 1 else f"embed.{short}"
            axes = "t d" if width == self.d else "t w"
            x = self.add(name, kind, title, formula, axes, (t, width), (x,), lambda pick, x=x, fn=fn: fn(self.of(x)))  # type: ignore[misc]
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

        used = [x]
        if isinstance(inner, LayerNormLayer):
            used.append(
                self.add(
                    f"{path}.mean",
                    "norm.mean",
                    "the mean over features",
                    "mean = Σ_d x / d",
                    " ".join([*rows, "1"]),
                    small,
                    (x,),
                    lambda pick: read(pick).mean(-1, keepdim=True),
                    by_row=by_row,
                )
            )
        if isinstance(inner, LayerNormLayer | RMSNormLayer):
            centred = isinstance(inner, LayerNormLayer)
            formula = f"scale = √(Σ_d (x − mean)² / d + {inner.eps:g})" if centred else f"scale = √(Σ_d x² / d + {inner.eps:g})"

            def scale(pick: Pick) -> Tensor:
                y = read(pick)
                y = y - y.mean(-1, keepdim=True) if centred else y
                return (y.pow(2).mean(-1, keepdim=True) + inner.eps).sqrt()

            name = self.add(
                f"{path}.scale", "norm.scale", "what the norm divides by", formula, " ".join([*rows, "1"]), small, tuple(used), scale, by_row=by_row
            )
            used.append(name)
        assert isinstance(inner, LayerNormLayer | RMSNormLayer | DynamicTanhLayer)

        def normed(pick: Pick) -> Tensor:
            y: Tensor = module(self.of(x, pick if by_row else ALL)[None], self.half.aside())[0]
            return y

        return self.add(
            out,
            "norm.normed",
            "the norm",
            norm_formula(inner),
            step.axes,
            step.shape,
            tuple(used),
            compute or normed,
            by_row=by_row and compute is None,
            module=inner,
        )

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
            return self.experts(i, layer, x)
        if isinstance(layer, PlainLayer | GatedLayer):
            return self.feedforward(i, "ffn", layer, x)
        return Heads(self, i, name, layer).build(x)

    # Feed-forward

    def feedforward(self, i: int, path: str, layer: Any, x: str) -> str:
        """Expand, bend, (gate,) recombine."""
        root, f, t = f"blocks.{i}.{path}.", layer.spec.d_ff, self.t
        act = layer.spec.act
        if isinstance(layer, PlainLayer):
            formula = linear("pre", "W_in", "x", layer.up)
            pre = self.add(root + "pre", "ffn.pre", "expand", formula, "t f", (t, f), (x,), self.site(i, f"{path}.pre"), module=act)
            formula = f"post = {act}(pre)"
            post = self.add(root + "post", "ffn.post", "the activation", formula, "t f", (t, f), (pre,), self.site(i, f"{path}.post"), module=act)
        else:
            clamped = isinstance(layer, ClampedGatedLayer)
            gate = self.add(
                root + "gate", "ffn.gate", "expand to the gate", linear("gate", "W_gate", "x", layer.gate_up), "t f", (t, f), (x,), self.site(i, f"{path}.gate")
            )
            limit, alpha = getattr(layer, "limit", 0.0), getattr(layer, "alpha", 0.0)

            def opened(_: Pick) -> Tensor:
                g = self.of(gate)
                if clamped:
                    g = g.clamp(max=limit)
                    return g * torch.sigmoid(g * alpha)
                y: Tensor = layer.act(g)
                return y

            formula = f"g = min(gate, {limit:g}); gate_act = g · σ({alpha:g} g)" if clamped else f"gate_act = {act}(gate)"
            bent = self.add(root + "gate_act", "ffn.gate_act", "the gate's activation", formula, "t f", (t, f), (gate,), opened, module=act)
            formula = linear("pre", "W_up", "x", layer.gate_up)
            pre = self.add(root + "pre", "ffn.values", "expand to what the gate multiplies", formula, "t f", (t, f), (x,), self.site(i, f"{path}.pre"))
            formula = f"post = gate_act ⊙ (clamp(pre, ±{limit:g}) + 1)" if clamped else "post = gate_act ⊙ pre"
            post = self.add(root + "post", "ffn.post", "the gate lets through", formula, "t f", (t, f), (bent, pre), self.site(i, f"{path}.post"), module=act)
        formula = linear("out", "W_out", "post", layer.down)
        return self.add(root + "out", "ffn.out", "recombine the units", formula, "t d", (t, self.d), (post,), self.site(i, f"{path}.out"))

    def experts(self, i: int, layer: Any, x: str) -> str:
        """The router chooses, the chosen experts answer, their answers are weighed."""
        root, t, spec = f"blocks.{i}.experts.", self.t, layer.spec
        e, c = spec.n_experts, spec.top_k
        routing = "σ(logits)" if type(layer.routing).__name__.startswith("Sigmoid") else "softmax_e(logits)"
        made = self.add(
            root + "logits",
            "experts.logits",
            "how well each expert suits",
            linear("logits", "W_r", "x", layer.router),
            "t e",
            (t, e),
            (x,),
            lambda _: layer.logits(self.of(x)[None])[0],
        )
        router = self.add(
            root + "router", "experts.router", "the router's probabilities", f"router = {routing}", "t e", (t, e), (made,), self.site(i, "experts.router")
        )
        rule = "the c greatest of router" + (" + correction" if hasattr(layer.routing, "correction") else "") + groups(spec)
        chosen = self.add(
            root + "chosen", "experts.chosen", "the experts chosen", f"chosen = {rule}", "t c", (t, c), (router,), self.site(i, "experts.chosen"), dtype="int64"
        )

        def weigh(_: Pick) -> Tensor:
            w = self.of(router).gather(-1, self.of(chosen))
            w = w / w.sum(-1, keepdim=True) if spec.normalise else w
            return w * spec.routing.scale

        formula = "w = router[chosen]" + (" / Σ_c router[chosen]" if spec.normalise else "") + (f" · {spec.routing.scale:g}" if spec.routing.scale != 1 else "")
        weights = self.add(root + "weights", "experts.weights", "what each chosen expert counts", formula, "t c", (t, c), (router, chosen), weigh)

        def answer(_: Pick) -> Tensor:
            flat, at = self.of(x), self.of(chosen)
            out = flat.new_zeros(t * c, flat.shape[-1])
            for n, places in layer.visits(at[None]):
                out[places] = layer.experts[n](flat[places // c][None], self.half.aside())[0]
            return out.view(t, c, -1)

        answers = self.add(
            root + "answers",
            "experts.answers",
            "what each chosen expert gives",
            "answers[t, c] = expert_chosen[t, c](x[t])",
            "t c d",
            (t, c, self.d),
            (x, chosen),
            answer,
        )
        if layer.shared is None:
            used: tuple[str, ...] = (weights, answers)
            formula = "out = Σ_c w ⊙ answers"
        else:
            self.aliases[f"{self.prefix}{root}shared.in"] = x
            used = (weights, answers, self.feedforward(i, "experts.shared", layer.shared, x))
            formula = "out = Σ_c w ⊙ answers + shared.out"
        return self.add(root + "out", "ffn.out", "weigh the answers", formula, "t d", (t, self.d), used, self.site(i, "experts.out"))

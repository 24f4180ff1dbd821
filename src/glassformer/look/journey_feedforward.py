"""The steps of a feed-forward layer and of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from glassformer.parts.feedforward import ClampedGatedLayer, PlainLayer

from .journey_formulas import groups, linear
from .journey_run import Pick


def feedforward(plan: Any, i: int, path: str, layer: Any, x: str) -> str:
    """Expand, bend, (gate,) recombine."""
    root, f, t = f"blocks.{i}.{path}.", layer.spec.d_ff, plan.t
    act = layer.spec.act
    if isinstance(layer, PlainLayer):
        formula = linear("pre", "W_in", "x", layer.up)
        pre = plan.add(root + "pre", "ffn.pre", "expand", formula, "t f", (t, f), (x,), plan.site(i, f"{path}.pre"), module=act)
        formula = f"post = {act}(pre)"
        post = plan.add(root + "post", "ffn.post", "the activation", formula, "t f", (t, f), (pre,), plan.site(i, f"{path}.post"), module=act)
    else:
        clamped = isinstance(layer, ClampedGatedLayer)
        gate = plan.add(
            root + "gate", "ffn.gate", "expand to the gate", linear("gate", "W_gate", "x", layer.gate_up), "t f", (t, f), (x,), plan.site(i, f"{path}.gate")
        )
        limit, alpha = getattr(layer, "limit", 0.0), getattr(layer, "alpha", 0.0)

        def opened(_: Pick) -> Tensor:
            g = plan.of(gate)
            if clamped:
                g = g.clamp(max=limit)
                return g * torch.sigmoid(g * alpha)
            y: Tensor = layer.act(g)
            return y

        formula = f"g = min(gate, {limit:g}); gate_act = g · σ({alpha:g} g)" if clamped else f"gate_act = {act}(gate)"
        bent = plan.add(root + "gate_act", "ffn.gate_act", "the gate's activation", formula, "t f", (t, f), (gate,), opened, module=act)
        formula = linear("pre", "W_up", "x", layer.gate_up)
        pre = plan.add(root + "pre", "ffn.values", "expand to what the gate multiplies", formula, "t f", (t, f), (x,), plan.site(i, f"{path}.pre"))
        formula = f"post = gate_act ⊙ (clamp(pre, ±{limit:g}) + 1)" if clamped else "post = gate_act ⊙ pre"
        post = plan.add(root + "post", "ffn.post", "the gate lets through", formula, "t f", (t, f), (bent, pre), plan.site(i, f"{path}.post"), module=act)
    formula = linear("out", "W_out", "post", layer.down)
    return plan.add(root + "out", "ffn.out", "recombine the units", formula, "t d", (t, plan.d), (post,), plan.site(i, f"{path}.out"))


def experts(plan: Any, i: int, layer: Any, x: str) -> str:
    """The router chooses, the chosen experts answer, their answers are weighed."""
    root = f"blocks.{i}.experts."
    chosen, weights = _routed(plan, i, layer, x)
    shape = (plan.t, layer.spec.top_k, plan.d)
    formula = "answers[t, c] = expert_chosen[t, c](x[t])"
    title = "what each chosen expert gives"
    answers = plan.add(root + "answers", "experts.answers", title, formula, "t c d", shape, (x, chosen), _answer(plan, layer, x, chosen))
    used: tuple[str, ...] = (weights, answers)
    formula = "out = Σ_c w ⊙ answers"
    if layer.shared is not None:
        plan.aliases[f"{plan.prefix}{root}shared.in"] = x
        used, formula = (*used, feedforward(plan, i, "experts.shared", layer.shared, x)), f"{formula} + shared.out"
    site: str = plan.add(root + "out", "ffn.out", "weigh the answers", formula, "t d", (plan.t, plan.d), used, plan.site(i, "experts.out"))
    return site


def _routed(plan: Any, i: int, layer: Any, x: str) -> tuple[str, str]:
    """Which experts are chosen, and what each counts: the names of the two steps."""
    root, t, spec = f"blocks.{i}.experts.", plan.t, layer.spec
    e, c = spec.n_experts, spec.top_k
    formula = linear("logits", "W_r", "x", layer.router)
    made = plan.add(root + "logits", "experts.logits", "how well each expert suits", formula, "t e", (t, e), (x,), lambda _: layer.logits(plan.of(x)[None])[0])
    formula = f"router = {'σ(logits)' if type(layer.routing).__name__.startswith('Sigmoid') else 'softmax_e(logits)'}"
    router = plan.add(root + "router", "experts.router", "the router's probabilities", formula, "t e", (t, e), (made,), plan.site(i, "experts.router"))
    formula = "chosen = the c greatest of router" + (" + correction" if hasattr(layer.routing, "correction") else "") + groups(spec)
    site = plan.site(i, "experts.chosen")
    chosen = plan.add(root + "chosen", "experts.chosen", "the experts chosen", formula, "t c", (t, c), (router,), site, dtype="int64")

    def weigh(_: Pick) -> Tensor:
        w: Tensor = plan.of(router).gather(-1, plan.of(chosen))
        w = w / w.sum(-1, keepdim=True) if spec.normalise else w
        return w * spec.routing.scale

    formula = "w = router[chosen]" + (" / Σ_c router[chosen]" if spec.normalise else "") + (f" · {spec.routing.scale:g}" if spec.routing.scale != 1 else "")
    weights = plan.add(root + "weights", "experts.weights", "what each chosen expert counts", formula, "t c", (t, c), (router, chosen), weigh)
    return chosen, weights


def _answer(plan: Any, layer: Any, x: str, chosen: str) -> Callable[[Pick], Tensor]:
    """[t c d] What each chosen expert makes of its token."""

    def answer(_: Pick) -> Tensor:
        flat, at = plan.of(x), plan.of(chosen)
        t, c = at.shape
        out: Tensor = flat.new_zeros(t * c, flat.shape[-1])
        for n, places in layer.visits(at[None]):
            out[places] = layer.experts[n](flat[places // c][None], plan.half.aside())[0]
        return out.view(t, c, -1)

    return answer

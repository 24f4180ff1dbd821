"""Formulas of steps as plain text, as this model's parts compute them."""

from __future__ import annotations

from typing import Any

from glassformer.parts.kernels import NormaliserLayer, SigmoidLayer, SoftmaxPlusOneLayer
from glassformer.parts.norm import DynamicTanhLayer, LayerNormLayer, RMSNormLayer


def norm_formula(norm: Any) -> str:
    """From ``x`` to what a norm gives."""
    if isinstance(norm, LayerNormLayer):
        return "y = w ⊙ (x − mean) / scale" + ("" if norm.bias is None else " + b")
    if isinstance(norm, RMSNormLayer):
        return "y = w ⊙ x / scale" if norm.offset == 0 else f"y = ({norm.offset:g} + w) ⊙ x / scale"
    assert isinstance(norm, DynamicTanhLayer)
    return "y = w ⊙ tanh(α x) + b"


def normaliser_formula(normaliser: NormaliserLayer) -> str:
    """From scores to weights."""
    if isinstance(normaliser, SigmoidLayer):
        return "pattern = σ(scores − ln(keys seen))" if normaliser.bias is None else f"pattern = σ(scores + {normaliser.bias:g})"
    sink = "" if normaliser.sink() is None else "1 + " if isinstance(normaliser, SoftmaxPlusOneLayer) else "exp(sink[h]) + "
    return f"pattern[h,t,s] = exp(scores[h,t,s]) / ({sink}Σ_s' exp(scores[h,t,s']))"


def linear(out: str, matrix: str, x: str, module: Any) -> str:
    bias = getattr(module, "bias", None)
    return f"{out} = {matrix} {x}" + ("" if bias is None else f" + b_{matrix.removeprefix('W_')}")


def groups(spec: Any) -> str:
    groups = spec.routing.groups
    return f", within the best {groups.keep} of {groups.n} groups" if hasattr(groups, "keep") else ""


def position_formula(position: Any) -> str:
    if type(position).__name__ == "Learned":
        return "pos_embed[t] = P[t]" if not position.offset else f"pos_embed[t] = P[t + {position.offset}]"
    place = "sine and cosine side by side" if getattr(position, "layout", "") == "interleaved" else "all sines, then all cosines"
    return f"pos_embed[t] = sin, cos(t / {getattr(position, 'base', 0):g}^(2i/d)), {place}"


def bias_formula(stack: Any, layer: Any) -> str:
    names = [type(p).__name__ for p in (layer.spec.position, stack.spec.position) if p.biases]
    known = {"ALiBi": "−slope[h] · |t − s|", "T5Buckets": "B[bucket(s − t), h]"}
    return "bias[h,t,s] = " + " + ".join(known.get(n, f"{n}(t, s)[h]") for n in names)

"""The parts once more, from the papers, in float64 NumPy: short, slow, and independent of the package.

Shapes: q [t h k], k and v [s h k] of one row; x [t d]. Loops where a loop is what the formula says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


# Attention (arXiv 1706.03762) and its normalisers


def attention(
    q: Array,
    k: Array,
    v: Array,
    visible: Callable[[int, int], bool],
    *,
    scale: float | None = None,
    cap: float | None = None,
    bias: Callable[[int, int, int], float] = lambda h, i, j: 0.0,
    normaliser: str = "softmax",
    sink: Array | None = None,
    sigmoid_bias: float | None = None,
) -> tuple[Array, Array]:
    """Outputs [t h k] and pattern [h t s]; heads of k and v are repeated for groups of query heads."""
    t, h, d = q.shape
    s, g = k.shape[0], k.shape[1]
    pattern, out = np.zeros((h, t, s)), np.zeros((t, h, v.shape[2]))
    for head in range(h):
        kv = head // (h // g)
        for i in range(t):
            seen = [j for j in range(s) if visible(i, j)]
            scores = np.array([q[i, head] @ k[j, kv] for j in seen]) * (1 / math.sqrt(d) if scale is None else scale)
            if cap is not None:
                scores = cap * np.tanh(scores / cap)
            scores = scores + np.array([bias(head, i, j) for j in seen])
            if not seen:
                continue
            if normaliser == "sigmoid":
                weights = 1 / (1 + np.exp(-(scores + (-math.log(len(seen)) if sigmoid_bias is None else sigmoid_bias))))
            else:
                extra = {"softmax": 0.0, "plus-one": 1.0, "sink": math.exp(sink[head]) if sink is not None else 0.0}[normaliser]
                weights = np.exp(scores) / (extra + np.exp(scores).sum())
            pattern[head, i, seen] = weights
            out[i, head] = weights @ v[seen, kv]
    return out, pattern


def alibi_slopes(n: int) -> Array:
    """arXiv 2108.12409, section 3: a geometric sequence from 2^(-8/n) for a power of two; else that of the
    nearest lower power, then every other slope of the next power (the authors' code)."""
    if math.log2(n).is_integer():
        return np.array([2 ** (-8 * i / n) for i in range(1, n + 1)])
    lower = 2 ** math.floor(math.log2(n))
    return np.concatenate([alibi_slopes(lower), alibi_slopes(2 * lower)[0::2][: n - lower]])


def t5_bucket(relative: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """arXiv 1910.10683, section 2.1: half of the buckets for exact distances, the rest logarithmic. ``relative`` is key - query."""
    start = 0
    if bidirectional:
        buckets //= 2
        start = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return start + distance
    far = exact + math.floor(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact))
    return start + min(far, buckets - 1)


# Positions


def rope_frequencies(base: float, dim: int) -> Array:
    """arXiv 2104.09864, equation 15."""
    return np.array([base ** (-2 * i / dim) for i in range(dim // 2)])


def linear_frequencies(base: float, dim: int, factor: float) -> Array:
    """arXiv 2306.15595: position m becomes m / factor."""
    return rope_frequencies(base, dim) / factor


def ntk_frequencies(base: float, dim: int, factor: float) -> Array:
    """The base b' with b'^(-(dim-2)/dim) = b^(-(dim-2)/dim) / factor (arXiv 2309.00071, definition 1)."""
    return rope_frequencies(base * factor ** (dim / (dim - 2)), dim)


def yarn_frequencies(base: float, dim: int, factor: float, context: int, fast: float, slow: float) -> Array:
    """arXiv 2309.00071, section 3.2, with the ramp linear in the index between the rounded ends (the authors' code)."""
    index = lambda turns: dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
    low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), dim - 1)
    out = []
    for i, f in enumerate(rope_frequencies(base, dim)):
        ramp = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
        out.append((1 - ramp) * f + ramp * f / factor)
    return np.array(out)


def llama3_frequencies(base: float, dim: int, factor: float, low: float, high: float, context: int) -> Array:
    """Llama 3.1 (the published model code)."""
    out = []
    for f in rope_frequencies(base, dim):
        wavelength = 2 * math.pi / f
        if wavelength < context / high:
            out.append(f)
        elif wavelength > context / low:
            out.append(f / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return np.array(out)


def rotate(x: Array, position: float, frequencies: Array, layout: str) -> Array:
    """One vector: each pair (a, b) as the complex number a + ib times e^(i position frequency); what has no frequency stays."""
    out, n = x.copy(), len(frequencies)
    for i, f in enumerate(frequencies):
        a, b = (i, i + n) if layout == "half" else (2 * i, 2 * i + 1)
        turned = complex(x[a], x[b]) * np.exp(1j * position * f)
        out[a], out[b] = turned.real, turned.imag
    return out


def sinusoid(position: int, d: int, base: float = 10_000.0) -> Array:
    """arXiv 1706.03762, section 3.5."""
    out = np.zeros(d)
    for i in range(d):
        angle = position / base ** (2 * (i // 2) / d)
        out[i] = math.sin(angle) if i % 2 == 0 else math.cos(angle)
    return out


# Norms


def layer_norm(x: Array, weight: Array, bias: Array | float, eps: float) -> Array:
    return weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + bias


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
    return (offset + weight) * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# Feed-forward

erf = np.vectorize(math.erf)
sigmoid = lambda x: 1 / (1 + np.exp(-x))
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "identity": lambda x: x,
}


# A whole decoder: GPT-2 in forty lines


def gpt2(ids: list[int], w: dict[str, Array], n_layers: int, n_heads: int, eps: float = 1e-5) -> Array:
    """Logits [t v]; ``w`` holds matrices as output x input."""
    x = w["embed.weight"][ids] + w["position.table"][: len(ids)]
    t, d = x.shape
    for i in range(n_layers):
        b = f"blocks.{i}"
        y = layer_norm(x, w[f"{b}.norm1.weight"], w[f"{b}.norm1.bias"], eps)
        q, k, v = np.split(y @ w[f"{b}.attn.qkv.weight"].T + w[f"{b}.attn.qkv.bias"], 3, -1)
        z = np.zeros((t, d))
        for h in range(n_heads):
            one = slice(h * d // n_heads, (h + 1) * d // n_heads)
            scores = q[:, one] @ k[:, one].T / math.sqrt(d // n_heads)
            scores[np.triu_indices(t, 1)] = -np.inf
            z[:, one] = softmax(scores) @ v[:, one]
        x = x + z @ w[f"{b}.attn.out.weight"].T + w[f"{b}.attn.out.bias"]
        y = layer_norm(x, w[f"{b}.norm2.weight"], w[f"{b}.norm2.bias"], eps)
        y = ACTIVATIONS["gelu_tanh"](y @ w[f"{b}.ffn.up.weight"].T + w[f"{b}.ffn.up.bias"])
        x = x + y @ w[f"{b}.ffn.down.weight"].T + w[f"{b}.ffn.down.bias"]
    return layer_norm(x, w["final_norm.weight"], w["final_norm.bias"], eps) @ w["embed.weight"].T

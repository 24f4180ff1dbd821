"""The rules of the links that truncate, steer and act by chance, written again: one row, float64, one token after another."""

from __future__ import annotations

import math

import numpy as np

GONE = -np.inf


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def entropy(p):
    return -sum(q * math.log(q) for q in p if q > 0)


def only(x, kept):
    return np.array([l if i in kept else GONE for i, l in enumerate(x)])


def strongest(x):
    return np.argsort(-x, kind="stable")


def typical(x, p, min_keep=1):
    prob = softmax(x)
    h, kept, total = entropy(prob), [], 0.0
    far = {i: abs(-math.log(q) - h) for i, q in enumerate(prob) if q > 0}
    for i in sorted(far, key=lambda i: (far[i], prob[i])):
        if total >= p and len(kept) >= min_keep and far[i] > far[kept[-1]]:
            break
        kept.append(i)
        total += prob[i]
    return only(x, kept)


def top_n_sigma(x, n):
    live = x[np.isfinite(x)]
    return x if n <= 0 else np.where(x < live.max() - n * live.std(), GONE, x)


def top_h(x, h, width=100):
    order = strongest(x)[:width]
    parts = [-q * math.log(q) if q > 0 else 0.0 for q in softmax(x[order])]
    kept, total = [order[0]], parts[0]
    for i, part in zip(order[1:], parts[1:], strict=True):
        total += part
        if total > h * sum(parts):
            break
        kept.append(i)
    return only(x, kept)


def epsilon(x, bar, min_keep=1):
    prob, order = softmax(x), strongest(x)
    return only(x, {i for i in range(len(x)) if prob[i] >= bar} | set(order[:min_keep]))


def eta(x, e, min_keep=1):
    return epsilon(x, min(e, math.sqrt(e) * math.exp(-entropy(softmax(x)))), min_keep)


def top_a(x, a, min_keep=1):
    return epsilon(x, a * softmax(x).max() ** 2, min_keep)


def dynamic_temperature(x, t, spread, exponent=1.0):
    live = np.isfinite(x).sum()
    if spread == 0 or live <= 1:
        return x / t if spread == 0 else x
    low, high = max(0.0, t - spread), t + spread
    now = low + (high - low) * (entropy(softmax(x)) / math.log(live)) ** exponent
    return x / now if now > 0 else only(x, {x.argmax()})


def xtc(x, u, probability, threshold=0.1, min_keep=1):
    order, prob = strongest(x), softmax(x)
    strong = [i for i in order if prob[i] >= threshold and np.isfinite(x[i])]
    if u > probability or len(strong) < 2 or np.isfinite(x).sum() - len(strong) + 1 < min_keep:
        return x
    stays = min(i for i in strong if x[i] == x[strong[-1]])
    return np.array([GONE if i in strong and i != stays else l for i, l in enumerate(x)])


def mirostat1(x, mu, m=100):
    """What is kept, and the k of it."""
    y = np.sort(x[np.isfinite(x)])[::-1]
    t = [math.log((i + 2) / (i + 1)) for i in range(min(m, len(y)) - 1)]
    b = [y[i] - y[i + 1] for i in range(len(t))]
    s = sum(p * q for p, q in zip(t, b, strict=True)) / sum(p * p for p in t)
    k = ((s - 1) * 2**mu / (1 - float(len(x)) ** (1 - s))) ** (1 / s)
    k = min(max(int(k), 1), len(y))
    return np.where(x < y[k - 1], GONE, x), k


def mirostat2(x, mu):
    bits = -np.log2(np.maximum(softmax(x), 1e-300))
    return np.where((bits > mu) & (np.arange(len(x)) != x.argmax()), GONE, x)


def steered(mu, kept, chosen, tau, eta):
    return mu - eta * (-math.log2(softmax(kept)[chosen]) - tau)


def adaptive_p(x, target, mean):
    wanted = min(max(2 * target - mean, 0.0), 1.0)
    d = np.abs(softmax(x) - wanted) / 0.3
    return np.where(np.isfinite(x), 5 - 10 * d**2 / (1 + d), x)

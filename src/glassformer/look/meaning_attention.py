"""Sentences about the steps of an attention layer."""

from __future__ import annotations

import math

from glassformer.parts.kernels import NormaliserLayer, SigmoidLayer

from .journey_scene import Scene, angle, bits, num, share

ROWS = 256
"""Query positions whose weights are computed at a time."""


def q(c: Scene) -> str:
    x = c.get(position=c.t).norm(dim=-1)
    high, low = int(x.argmax()), int(x.argmin())
    if len(x) == 1:
        return f"The query of {c.here} is {num(x[0])} long."
    return f"At {c.here} the longest query is that of head {high} ({num(x[high])}), the shortest that of head {low} ({num(x[low])})."


def kv(c: Scene, what: str) -> str:
    x = c.get()[:, c.group].norm(dim=-1)
    high, a, low, b = c.ends(x, keys=True)
    return f"In {c.group_name} {high} has the longest {what} ({a}), {low} the shortest ({b})."


def rotate(c: Scene) -> str:
    query = c.step.axes.split()[1] == "h"
    head = c.head if query else c.group
    a, b = c.get(c.input())[c.t, head], c.get()[c.t, head]
    kept = abs(float(a.norm() - b.norm())) <= 1e-3 * float(a.norm())
    size = f"its length stays {num(b.norm())}" if kept else f"its length goes from {num(a.norm())} to {num(b.norm())}"
    what = f"query of {c.here} in head {head}" if query else f"key of {c.here} in {c.group_name}"
    return f"Position {c.t} turns the {what} by {angle(a, b)}; {size}."


def products(c: Scene) -> str:
    high, a, low, b = c.ends(c.get(head=c.head, position=c.t), keys=True)
    return f"In head {c.head} the query of {c.here} fits the key of {high} best ({a}) and that of {low} least ({b}), the mask not yet counted."


def scores(c: Scene) -> str:
    before, after = c.get(c.input(), head=c.head, position=c.t), c.get(head=c.head, position=c.t)
    high, a, low, b = c.ends(after, keys=True)
    return f"In head {c.head} the numbers of {c.here}, from {num(before.min())} to {num(before.max())}, now go from {b} ({low}) to {a} ({high})."


def bias(c: Scene) -> str:
    high, a, low, b = c.ends(c.get(head=c.head, position=c.t), keys=True)
    return f"In head {c.head} distance gives {c.here} {a} for {high}, the most, and {b} for {low}, the least."


def masked(c: Scene) -> str:
    rule = c.half.rule(c.step.layer, "cross" if ".cross." in c.step.name else "attn")
    t, s = c.step.shape[1:]
    visible = rule.mask.tensor(t, s, c.half.device)
    pairs = t * s if visible is None else int(visible.sum())
    row = c.get(head=c.head, position=c.t)
    best = int(row.argmax())
    seen = int((row > -math.inf).sum())
    fit = f"in head {c.head} the best fit that it sees is {c.word(best, True)} ({num(row[best])})"
    return f"{c.here} sees {seen} of {s} tokens, and of all {t * s:,} pairs {pairs:,} are visible; {fit}."


def pattern(c: Scene) -> str:
    h = c.head
    row = c.get(head=h, position=c.t)
    best = [i for n, i in enumerate(row.argsort(descending=True, stable=True)[:3].tolist()) if row[i] >= 0.01 or (n == 0 and row[i] > 0)]
    gives = ", ".join(f"{share(row[i])} to {c.word(i, True)}" for i in best) or "nothing to any token"
    total, entropy = 0.0, 0.0
    n = c.step.shape[1]
    for start in range(0, n, ROWS):
        rows = c.get(head=h, position=slice(start, min(start + ROWS, n)))
        sums = rows.sum(-1, keepdim=True)
        total += float(sums.sum())
        entropy += float(bits(rows / sums.clamp(min=1e-30)).sum())
    entropy /= n
    normaliser: NormaliserLayer = c.attention.normaliser
    whole = normaliser.sink() is None and not isinstance(normaliser, SigmoidLayer)
    rest = "" if whole else f", whose weights sum to {num(total / n)} on average"
    narrowest = "" if c._head is not None or c.step.shape[0] == 1 else f", the narrowest of {c.step.shape[0]} here"
    return (
        f"Head {h} of layer {c.step.layer}{narrowest}: {c.here} gives {gives}; its rows{rest}{',' if rest else ''} spread over {num(2**entropy)} tokens "
        f"(entropy {num(entropy)} bits on average)."
    )


def z(c: Scene) -> str:
    pattern, values = c.step.inputs
    weights, v = c.get(pattern, head=c.head, position=c.t), c.get(values)[:, c.group]
    made = c.get(position=c.t, head=c.head).norm()
    parts = (weights * v.norm(dim=-1)).sum()
    kept = share(made / parts.clamp(min=1e-30))
    return f"In head {c.head} the weighed values of {c.here} are {num(parts)} long end to end; their sum is {num(made)} long, {kept} of that."


def result(c: Scene) -> str:
    x = c.get(position=c.t).norm(dim=-1)
    high, low = int(x.argmax()), int(x.argmin())
    if len(x) == 1:
        return f"At {c.here} the head writes a vector {num(x[0])} long into the stream."
    return f"At {c.here} head {high} writes the longest vector ({num(x[high])}), head {low} the shortest ({num(x[low])})."


def attn_out(c: Scene) -> str:
    parts = c.get(c.input(), position=c.t).norm(dim=-1)
    bias = c.attention.out.bias
    plus = "" if bias is None else f" and a bias {num(bias.detach().double().norm())} long"
    return f"At {c.here} the vectors of {len(parts)} heads, {num(parts.sum())} long end to end,{plus} add up to one {num(c.get()[c.t].norm())} long."

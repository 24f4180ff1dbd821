"""What a step means for this text, in a sentence made of its numbers.

Every sentence names tokens of the text and numbers of the step (and of the steps it follows from), rounded to three digits; none says more than
the numbers do. The length of a vector is the root of its squared numbers' sum; the entropy of shares ``p`` is ``-Σ p log2 p`` bits, and shares
spread over as many tokens as would have that entropy if all had the same share, ``2^entropy``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import meaning_attention
from .journey_scene import Scene, angle, bits, num, share


def sentence(way: Any, step: Any, position: int, head: int | None) -> str:
    """The sentence of a step; ``head`` None: the one whose pattern is narrowest at the position."""
    return SENTENCES[step.kind](Scene(way, step, position, head))


# Text and embedding


def _tokens(c: Scene) -> str:
    n, ids = len(c.pieces), c.half.ids
    return f"The {c.step.side} is {n} {'token' if n == 1 else 'tokens'}, {len(set(ids))} different; at position {c.t} stands {c.here} (id {ids[c.t]})."


def _embed(c: Scene) -> str:
    x = c.get()
    long, a, short, b = c.ends(x.norm(dim=-1))
    if len(set(c.half.ids)) == 1:
        return f"The vector of {long} is {a} long."
    said = f"{long} has the longest vector ({a}), {short} the shortest ({b})"
    first = {i: n for n, i in reversed(list(enumerate(c.half.ids)))}
    places = sorted(first.values())[:512]
    unit = x[places] / x[places].norm(dim=-1, keepdim=True).clamp(min=1e-30)
    near = (unit @ unit.T).fill_diagonal_(-2.0)
    i, j = divmod(int(near.argmax()), len(places))
    i, j = min(i, j), max(i, j)
    return f"{said}; of different tokens {c.word(places[i])} and {c.word(places[j])} lie nearest (cosine {num(near[i, j])})."


def _map(c: Scene) -> str:
    pooled = c.step.axes.split()[0] not in "ts"
    before, after = c.get(c.input()), c.get()
    a, b = (before, after) if pooled else (before[c.t], after[c.t])
    who = "The vector of the whole text" if pooled else f"The vector of {c.here}"
    return f"{who} goes from {a.shape[-1]} numbers of length {num(a.norm())} to {b.shape[-1]} of length {num(b.norm())}."


def _position(c: Scene) -> str:
    x = c.lengths()
    high, low = _ends(x)
    ends = f"the longest is that of position {high} ({num(x[high])}), the shortest that of position {low} ({num(x[low])})"
    return f"The vector of position {c.t}, where {c.here} stands, is {num(x[c.t])} long; {ends}."


# Sums and norms


def _sum(c: Scene) -> str:
    before, added, after = c.get(c.input()), [c.get(n) for n in c.step.inputs[1:]], c.get()
    names = [_giver(n) for n in c.step.inputs[1:]]
    a, b = before[c.t], after[c.t]
    gives = " and ".join(f"{name} adds a vector {num(x[c.t].norm())} long" for name, x in zip(names, added, strict=True))
    total = sum(added[1:], added[0])
    change = total.norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)
    most = int(change.argmax())
    rest = f"; for its length {c.word(most)} is given most ({num(change[most])} times as much)" if len(c.pieces) > 1 else ""
    return f"At {c.here} {gives} to one {num(a.norm())} long: the sum is {num(b.norm())} long and points {angle(a, b)} away from before{rest}."


def _giver(name: str) -> str:
    for part, word in (
        (".cross.", "cross-attention"),
        (".attn.", "attention"),
        ("norm1", "attention"),
        ("norm_cross", "cross-attention"),
        ("pos_embed", "position"),
    ):
        if part in name:
            return word
    return "the feed-forward layer"


def _rows(c: Scene, name: str | None = None) -> tuple[Tensor, str]:
    """Values by token (of the head spoken of, where there are heads), and how that is said."""
    x = c.get(name)
    letters = c.step.axes.split()
    if x.ndim == 3:
        at = c.group if letters[1] == "g" else c.head
        return x[:, at], f"In head {at} " if letters[1] == "h" else f"In {c.group_name} "
    return x, ""


def _mean(c: Scene) -> str:
    x, where = _rows(c)
    if x.ndim == 1:
        return f"The mean over the features is {num(x[0])}."
    high, a, low, b = c.ends(x[:, 0])
    return f"{where}{'t' if where else 'T'}he mean over the features is highest at {high} ({a}) and lowest at {low} ({b}); at {c.here} it is {num(x[c.t, 0])}."


def _scale(c: Scene) -> str:
    x, where = _rows(c)
    if x.ndim == 1:
        return f"The norm divides the vector by {num(x[0])}."
    high, a, low, b = c.ends(x[:, 0])
    return f"{where}{'t' if where else 'T'}he norm divides {high} by {a}, the most, and {low} by {b}, the least; {c.here} by {num(x[c.t, 0])}."


def _normed(c: Scene) -> str:
    (after, where), (before, _) = _rows(c), _rows(c, c.input())
    if after.ndim == 1:
        return f"The vector goes from length {num(before.norm())} to {num(after.norm())}."
    a, b = before.norm(dim=-1), after.norm(dim=-1)
    ranges = f"all were between {num(a.min())} and {num(a.max())} long and are now between {num(b.min())} and {num(b.max())}"
    return f"{where}{c.here} goes from length {num(a[c.t])} to {num(b[c.t])}; {ranges}."


# Feed-forward


def _pre(c: Scene) -> str:
    x = c.get()[c.t]
    high = int(x.argmax())
    everywhere = c.get()
    at, unit = divmod(int(everywhere.argmax()), everywhere.shape[-1])
    what = "unit" if c.step.kind == "ffn.pre" else "gate"
    return (
        f"At {c.here} {what} {high} is the most active ({num(x[high])}), and {share((x < 0).double().mean())} of {len(x):,} {what}s are below zero; "
        f"in the whole {c.step.side} the highest is {what} {unit} at {c.word(at)} ({num(everywhere[at, unit])})."
    )


def _gate_act(c: Scene) -> str:
    x = c.get()[c.t]
    high = int(x.abs().argmax())
    near = share((x.abs() < 0.1).double().mean())
    return f"At {c.here} the gate of unit {high} is the furthest from zero ({num(x[high])}); {near} of {len(x):,} are within 0.1 of zero."


def _ends(x: Tensor) -> tuple[int, int]:
    """The places of the greatest and of the least number."""
    return int(x.argmax()), int(x.argmin())


def _values(c: Scene) -> str:
    x = c.get()[c.t]
    high, low = _ends(x)
    return f"At {c.here} what is to be gated lies between {num(x[low])} (unit {low}) and {num(x[high])} (unit {high})."


def _post(c: Scene) -> str:
    x = c.get()[c.t]
    high = int(x.abs().argmax())
    energy = x.pow(2).sort(descending=True).values.cumsum(0)
    half = int((energy < 0.5 * energy[-1]).sum()) + 1
    zero = f" {share((x == 0).double().mean())} are exactly zero." if bool((x == 0).any()) else ""
    return f"At {c.here} unit {high} counts most ({num(x[high])}); half of the squared length lies in {half:,} of {len(x):,} units.{zero}"


def _out(c: Scene) -> str:
    x = c.lengths()
    high, a, low, b = c.ends(x)
    return f"What is given back is longest at {high} ({a}) and shortest at {low} ({b}); at {c.here} it is {num(x[c.t])} long."


def _expert_logits(c: Scene) -> str:
    x = c.get()[c.t]
    high, low = _ends(x)
    return f"Expert {high} suits {c.here} best ({num(x[high])}), expert {low} least ({num(x[low])})."


def _router(c: Scene) -> str:
    x = c.get()[c.t]
    best = x.argsort(descending=True, stable=True)[:3].tolist()
    return f"At {c.here} the router gives {', '.join(f'expert {i} {share(x[i])}' for i in best)}."


def _chosen(c: Scene) -> str:
    x = c.get()
    own = x[c.t].tolist()
    counts = x.flatten().bincount()
    most = int(counts.argmax())
    busiest = f"the busiest is expert {most}, chosen {int(counts[most])} of {x.numel()} times"
    return f"{c.here} goes to {'expert' if len(own) == 1 else 'experts'} {' and '.join(map(str, own))}; {busiest}."


def _of_chosen(c: Scene, numbers: Tensor, said: str) -> str:
    """A number of each chosen expert."""
    chosen = c.get(c.input(1))[c.t].tolist()
    return f"At {c.here} {', '.join(f'expert {e} ' + said.format(num(x)) for e, x in zip(chosen, numbers, strict=True))}."


def _weights(c: Scene) -> str:
    return _of_chosen(c, c.get()[c.t], "counts {}")


def _answers(c: Scene) -> str:
    return _of_chosen(c, c.get(position=c.t).norm(dim=-1), "answers with a vector {} long")


# Read-out


def _best(c: Scene, x: Tensor, form: Callable[[Tensor], str]) -> str:
    return ", ".join(f"{c.token(i)} {form(x[i])}" for i in x.argsort(descending=True, stable=True)[:3].tolist())


def _logits(c: Scene) -> str:
    x = c.get(position=c.t)
    return f"At {c.here} the highest scores have {_best(c, x, num)}; the mean of {len(x):,} is {num(x.mean())}."


def _probabilities(c: Scene) -> str:
    x = c.get(position=c.t)
    entropy = float(bits(x))
    where = "after" if c.way.subject.causal else "at"
    return f"Expected {where} {c.here}: {_best(c, x, share)}; {num(entropy)} bits are open, as between {num(2**entropy)} tokens of the same probability."


def _start(c: Scene) -> str:
    x = c.get()
    return f"The sampler begins with {len(x):,} scores from {num(x.min())} to {num(x.max())}; the highest is that of {c.token(x.argmax())}."


def _link(c: Scene) -> str:
    ending, n = c.step.module
    step = ending.drawn[n]
    before = step.before[0].double().softmax(-1)
    gone = step.removed[0]
    left, link = int(step.support[0]), step.link
    if gone:
        rest = _best(c, step.probabilities[0].double(), share) if left > 1 else c.token(step.logits[0].argmax())
        does = f"removes {len(gone):,} tokens with {share(before[gone].sum())} of the probability and leaves {left:,} ({rest})"
    else:
        does = f"{'removes no token' if bool((step.before != step.logits).any()) else 'changes nothing'} and leaves {left:,}"
    return f"{link!r} {does}; what is open goes from {num(bits(before))} to {num(step.entropy[0])} bits."


def _next(c: Scene) -> str:
    ending = c.step.module
    if ending.picked < 0:
        return "No token is left to be picked."
    at = f"{c.way.subject.prefix}probabilities"
    own = c.get(at, position=ending.position)[ending.picked]
    left = ending.drawn[-1].before[0].double().softmax(-1)[ending.picked]
    where = "after" if c.way.subject.causal else "at"
    return f"{c.token(ending.picked)} is picked {where} {c.word(ending.position)}: the model gives it {share(own)}, what the links left {share(left)}."


def _pooled(c: Scene) -> str:
    x, rows = c.get(), c.get(c.input())
    near = (rows @ x) / (rows.norm(dim=-1) * x.norm()).clamp(min=1e-30)
    high, a, low, b = c.ends(near)
    return f"The vector of the whole text is {num(x.norm())} long; of its tokens {high} lies nearest (cosine {a}), {low} furthest ({b})."


def _classes(c: Scene) -> str:
    x = c.get()
    at = ""
    if x.ndim == 2:
        x, at = x[c.t], f" at {c.here}"
    high, low = _ends(x)
    return f"Class {high} has the highest score{at} ({num(x[high])}), class {low} the lowest ({num(x[low])})."


def _vector(c: Scene) -> str:
    x, before = c.get(), c.get(c.input())
    high = int(x.abs().argmax())
    return f"The vector goes from length {num(before.norm())} to {num(x.norm())}; its largest number is {num(x[high])} (feature {high})."


SENTENCES: dict[str, Callable[[Scene], str]] = {
    "tokens": _tokens,
    "embed": _embed,
    "scaled": _map,
    "map": _map,
    "add": _map,
    "act": _map,
    "position": _position,
    "sum": _sum,
    "residual": _sum,
    "norm.mean": _mean,
    "norm.scale": _scale,
    "norm.normed": _normed,
    "q": meaning_attention.q,
    "k": lambda c: meaning_attention.kv(c, "key"),
    "v": lambda c: meaning_attention.kv(c, "value"),
    "rotate": meaning_attention.rotate,
    "products": meaning_attention.products,
    "scores": meaning_attention.scores,
    "bias": meaning_attention.bias,
    "masked": meaning_attention.masked,
    "pattern": meaning_attention.pattern,
    "z": meaning_attention.z,
    "result": meaning_attention.result,
    "attn.out": meaning_attention.attn_out,
    "ffn.pre": _pre,
    "ffn.gate": _pre,
    "ffn.gate_act": _gate_act,
    "ffn.values": _values,
    "ffn.post": _post,
    "ffn.out": _out,
    "experts.logits": _expert_logits,
    "experts.router": _router,
    "experts.chosen": _chosen,
    "experts.weights": _weights,
    "experts.answers": _answers,
    "logits": _logits,
    "probabilities": _probabilities,
    "sampler.logits": _start,
    "sampler.link": _link,
    "next": _next,
    "pooled": _pooled,
    "classes": _classes,
    "vector": _vector,
}

"""Activation patching: put a value of one run into another run, and see how much of the answer comes with it.

    denoise   base run: corrupted text     one value from the clean run put in     1 = the clean answer is back, 0 = nothing changed
    noise     base run: clean text         one value from the corrupted run put in 0 = the clean answer is gone, 1 = nothing changed

Vig et al. (arXiv 2004.12265), Meng et al. (arXiv 2202.05262), Wang et al. (arXiv 2211.00593); good practice: Zhang and Nanda (arXiv 2309.16042).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.tap import Record

from .patching_places import Places, places, read_by
from .patching_question import Question, ask, site_path
from .patching_results import Patched
from .subject import Positions, Text, check_layer


def activation_patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    site: str = "resid_pre",
    *,
    by: str | Sequence[str] | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    normalise: bool = True,
    memory: int | None = None,
    progress: bool | None = None,
    **question: Any,
) -> Patched:
    """Put the value at ``site`` of one run into the other, for every place along ``by``: layer, position, head.

    ``site``: resid_pre, resid_mid, resid_post, attn_out, mlp_out, z, q, k, v, pattern, result, cross.z, ... ``metric``: ``"logit_diff"`` (of
    ``target``, a token
    or a pair; by default the two runs' own choices), ``"logit"``, ``"prob"``, ``"logprob"``, ``"kl"``, or a function of logits [b v] that gives [b],
    read at ``position``
    (the last). ``direction``: ``"denoise"`` patches clean values into the corrupted run, ``"noise"`` the other way. Values are normalised: 0 the
    corrupted run, 1 the clean one.
    ``positions``, ``layers``: only these. Further: ``tokenizer``, ``source``, ``corrupted_source``, ``memory`` (bytes), ``progress``.
    ``tap``: edits that hold in every run alike. With one target the number is its logit, with a pair the difference of both; the title says which.
    Raises :class:`InputError` for texts of different token counts and a metric that is the same in both runs, :class:`SiteError` for an unknown site.
    """
    q = ask(model, clean, corrupted, normalise=normalise, memory=memory, progress=progress, **question)
    where, values = _values(q, site, by, positions, layers)
    return Patched(site, where.by, where.names, q.scaled(_swept(q, where, values), normalise), q.clean, q.corrupted, q.label, q.direction, normalise)


def _values(q: Question, site: str, by: Any, positions: Positions, layers: Sequence[int] | None) -> tuple[Places, dict[str, Tensor]]:
    """The places of a sweep and what the other run has there."""
    s = q.base
    given = range(s.layers) if layers is None else layers if isinstance(layers, Iterable) else [layers]
    chosen = [check_layer(s.stack, n) for n in given]
    if not chosen:
        raise InputError(f"No layer was given: name at least one of 0 to {s.layers - 1}, or leave layers out for all.")
    axes = read_by(s, site, by)
    record, _ = q.other.run(*(site_path(s, site, n) for n in chosen))
    values = {p.removeprefix(s.prefix): v for p, v in record.values.items()}
    return places(s, site, axes, values, chosen, None if positions is None else s.positions(positions)), values


def _swept(q: Question, where: Places, values: Mapping[str, Tensor]) -> Tensor:
    """The number asked about with each place patched."""
    variants = [where.picked(values, place) for place in where.each()]
    return q.sweep.run(variants, q.score, q.at, f"patching {where.site}").reshape(where.shape)


def attribution_patch(
    model: Any,
    clean: Text,
    corrupted: Text,
    site: str = "resid_pre",
    *,
    by: str | Sequence[str] | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    normalise: bool = True,
    exact: bool = False,
    memory: int | None = None,
    progress: bool | None = None,
    **question: Any,
) -> Patched:
    """The change that every patch of :func:`activation_patch` would make, to first order: ``(other - base) * d metric / d base``, summed over what is patched.

    Two forward passes and one backward, whatever the number of patches (Nanda 2023, "Attribution patching"; Kramar et al., arXiv 2403.00745, on
    where it fails).
    ``exact=True`` runs the sweep too and reports the correlation of the estimate with it. Other arguments as in :func:`activation_patch`.
    """
    q = ask(model, clean, corrupted, normalise=normalise, memory=memory, progress=progress, **question)
    where, values = _values(q, site, by, positions, layers)
    s = q.base
    record = Record(*(s.prefix + p for p in values), grad=True)
    slopes = slopes_of(q, record, [s.prefix + p for p in values])
    parts = {}
    for path, value in values.items():
        new, old = value, record[s.prefix + path].detach()
        parts[path] = ((new - old).masked_fill(new.isinf() | old.isinf(), 0.0) * slopes[s.prefix + path])[0]
    total = torch.stack([_summed(where, parts, place) for place in where.each()]).reshape(where.shape)
    estimate = q.scaled(total.detach().cpu(), normalise, change=True)
    made = Patched(site, where.by, where.names, estimate, q.clean, q.corrupted, q.label, q.direction, normalise, "attribution patching (estimate)")
    if not exact:
        return made
    found = _swept(q, where, values)
    start = q.corrupted if q.direction == "denoise" else q.clean
    truth = q.scaled(found.double() - start, normalise, change=True)
    p, r = correlations(estimate, truth)
    return Patched(**(vars(made) | {"exact": truth, "pearson": p, "spearman": r}))


def slopes_of(q: Question, record: Record, paths: Sequence[str]) -> dict[str, Tensor]:
    """The gradient of the metric by each recorded value in the base run; no parameter's ``grad`` is touched."""
    with torch.enable_grad():
        logits = q.base.run("logits", tap=record, grad=True)[1]
        score = q.score(logits[list(q.at)][None]).sum()
        if not score.requires_grad:
            raise InputError(f"The metric ({q.label}) gives no gradient, but an estimate is made of it: compute it from the logits by differentiable steps.")
        values = [record[p] for p in paths]
        found = torch.autograd.grad(score, values, allow_unused=True)
    return {p: torch.zeros_like(v) if g is None else g.detach() for p, v, g in zip(paths, values, found, strict=True)}


def _summed(where: Places, parts: Mapping[str, Tensor], place: Mapping[str, int]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for patch in where.picked({p: v[None] for p, v in parts.items()}, place):
        total = total + patch.value.sum().double().cpu()
    return total


def correlations(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Pearson's and Spearman's correlation of two tensors of one shape (NaN where one of them is constant)."""

    def pearson(x: Tensor, y: Tensor) -> float:
        x, y = x - x.mean(), y - y.mean()
        size = float(x.norm() * y.norm())
        return float(x @ y) / size if size else math.nan

    def ranks(x: Tensor) -> Tensor:
        _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        return (ends - (counts.double() - 1) / 2)[inverse]

    x, y = a.flatten().double(), b.flatten().double()
    return pearson(x, y), pearson(ranks(x), ranks(y))


# The sweeps by the names that people know


def _named(site: str, by: tuple[str, ...], text: str) -> Callable[..., Patched]:
    @functools.wraps(activation_patch, assigned=())
    def patch(model: Any, clean: Text, corrupted: Text, **options: Any) -> Patched:
        return activation_patch(model, clean, corrupted, site, by=by, **options)

    patch.__doc__ = f":func:`activation_patch` of {text}."
    return patch


get_act_patch_resid_pre = _named("resid_pre", ("layer", "position"), "the stream that enters each block, by position")
get_act_patch_resid_mid = _named("resid_mid", ("layer", "position"), "the stream after attention, by position")
get_act_patch_attn_out = _named("attn.out", ("layer", "position"), "what attention adds, by position")
get_act_patch_mlp_out = _named("ffn.out", ("layer", "position"), "what the feed-forward layer adds, by position")
get_act_patch_attn_head_out_all_pos = _named("z", ("layer", "head"), "each head's output at all positions")
get_act_patch_attn_head_out_by_pos = _named("z", ("layer", "position", "head"), "each head's output, by position")
get_act_patch_attn_head_q_all_pos = _named("q", ("layer", "head"), "each head's queries at all positions")
get_act_patch_attn_head_k_all_pos = _named("k", ("layer", "head"), "each head's keys at all positions")
get_act_patch_attn_head_v_all_pos = _named("v", ("layer", "head"), "each head's values at all positions")
get_act_patch_attn_head_pattern_all_pos = _named("pattern", ("layer", "head"), "each head's pattern at all positions")
get_act_patch_attn_head_q_by_pos = _named("q", ("layer", "position", "head"), "each head's queries, by position")
get_act_patch_attn_head_k_by_pos = _named("k", ("layer", "position", "head"), "each head's keys, by position")
get_act_patch_attn_head_v_by_pos = _named("v", ("layer", "position", "head"), "each head's values, by position")
get_act_patch_attn_head_pattern_by_pos = _named("pattern", ("layer", "position", "head"), "each head's pattern, by query position")

__all__ = ["Patched", "activation_patch", "attribution_patch"]

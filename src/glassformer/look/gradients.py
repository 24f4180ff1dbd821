"""Which tokens an output depends on, by its gradient.

    gradient x input        sum_d x_d dF/dx_d                                    one backward pass; local
    integrated gradients    sum_d (x_d - x'_d) int_0^1 dF/dx_d(x' + a (x - x')) da    arXiv 1703.01365; sums to F(x) - F(x')

``x`` are the rows of the embedding table that the text's tokens name (positions stay as they are), ``F`` a logit, a difference of two, or any
number that a function makes of the model's output. A model takes such vectors in place of tokens: ``model(inputs_embeds=...)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.modes import evaluating
from glassformer.core.numerics import wide
from glassformer.core.tap import Record
from glassformer.models.transformer import TransformerModel

from .gradient_line import Line
from .gradient_question import Asked, ask, differentiable, embeds_of, gradients
from .gradient_results import SiteAttribution, TokenAttribution
from .subject import Positions, Subject, Text, read

TOKENS = 1024
"""Tokens whose gradients are computed at a time: larger batches are hardly faster and take more memory."""
FEATURES = "dkrw"
"""Axes that are summed over: the features of one vector."""


def gradient_x_input(
    model: Any,
    text: Text,
    target: Any = None,
    *,
    site: str | None = None,
    position: Positions = None,
    tokenizer: Any = None,
    source: Text | None = None,
) -> TokenAttribution | SiteAttribution:
    """Gradient times value, summed over features: for every token's embedding, or at any ``site`` (``"blocks.3.attn.z"``: a number per position and head).

    ``target``: a token, a pair (difference of logits), or a function of the output [b ..] that gives one number per row [b]; None: the model's choice.
    ``position`` None: the last. First order only: what the number would lose if the value shrank to zero along its tangent.
    Raises :class:`InputError` for a target that the model does not have, :class:`SiteError` for an unknown site.
    """
    s = read(model, text, tokenizer, source=source)
    row = s.position(position)
    if site is not None:
        return _at_site(s, site, target, row)
    embeds = embeds_of(s)
    asked = ask(s, target, row, embeds)
    outputs, grads = gradients(s, embeds, asked)
    values = [(wide(e) * wide(g)).sum(-1)[0].cpu() for e, g in zip(embeds, grads, strict=True)]
    return _answer(s, "Gradient x input", asked, values, float(outputs[0]), None, "", 1)


def integrated_gradients(
    model: Any,
    text: Text,
    target: Any = None,
    *,
    baseline: str | int | Sequence[int] = "zero",
    steps: int = 32,
    most: int = 2048,
    tolerance: float = 1e-3,
    batch: int | None = None,
    position: Positions = None,
    tokenizer: Any = None,
    source: Text | None = None,
) -> TokenAttribution:
    """Integrated gradients of every token's embedding along the straight line from a baseline (arXiv 1703.01365).

    ``baseline``: ``"zero"`` vectors, the ``"mean"`` row of the table, one token id for every place, or as many ids as the text has tokens (then an
    encoder's source stays as it is). The line is cut into intervals of 8 Gauss-Legendre nodes, at least ``steps`` in all where ``most`` leaves room. On
    each interval the integral, summed over the tokens, must give the difference of the outputs at its ends, so the error of that sum is known, and the
    worst intervals are halved until the errors sum to less than ``tolerance`` times the whole difference (or times a thousandth of the output, where
    the difference is smaller than that), until what is left of each may be the rounding of the outputs (16 epsilons of the largest), which more
    gradients do not lessen, or until ``most`` gradients were made. Errors of single tokens that cancel in the sum are not seen: ask again with more
    ``steps`` to see how far the tokens' own numbers move. ``batch`` gradients are computed at a time (None: as many as
    have about 1,024 tokens together). Norms make the output change most near zero vectors: from ``"zero"`` the first intervals are powers of 16, and
    nodes stand evenly in the logarithm. Where the output jumps (a mixture of experts chooses others) no gradient sees it: the
    jumps are left, as the completeness error. Raises :class:`InputError` for a baseline or numbers that do not fit.
    """
    s = read(model, text, tokenizer, source=source)
    batch = max(1, TOKENS // (len(s) + len(s.source_ids))) if batch is None else batch
    for name, given in (("steps", steps), ("most", most), ("batch", batch)):
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise InputError(f"{name}={given!r} is a number of gradients: a whole number of at least 1.")
    if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not tolerance > 0:
        raise InputError(f"tolerance={tolerance!r} is the error that is allowed, as a part of the difference of the outputs: a number above 0, such as 1e-3.")
    if most < steps:
        raise InputError(f"most={most} gradients are allowed, but steps={steps} are made at least: give most={steps} or more, or fewer steps.")
    row, ends = s.position(position), embeds_of(s)
    starts = _baseline(s, baseline, ends)
    asked = ask(s, target, row, ends)
    line = Line(s, starts, ends, asked, batch)
    line.integrate(steps, most, tolerance)
    named = baseline if isinstance(baseline, str) else s.piece(baseline) if isinstance(baseline, int) else "given ids"
    return _answer(s, "Integrated gradients", asked, line.values(), line.output(1.0), line.output(0.0), named, line.used)


def _at_site(s: Subject, site: str, target: Any, row: int) -> SiteAttribution:
    if not isinstance(site, str):
        raise InputError(f"site={site!r} is no name of a site: give one as text, such as 'blocks.0.attn.z'.")
    full = s.path(site)
    info = next((i for i in s.model.sites() if i.path == full), None)
    if info is None:
        raise InputError(f"{site!r} names several sites: name one, such as {site.replace('**', 'blocks.0').replace('*', '0')!r}.")
    record = Record(full, grad=True)
    asked = ask(s, target, row, embeds_of(s) if isinstance(s.stack, TransformerModel) else [])
    with torch.enable_grad(), evaluating(s.model):
        keep = {} if asked.keep is None else {"keep": torch.tensor([asked.keep], device=s.device)}
        output = differentiable(asked.of(s.model(*s.inputs, tap=record, **keep)), asked)
        value = record[full]
        if not value.is_floating_point():
            raise InputError(f"{site!r} holds whole numbers ({value.dtype}), which have no gradient: name a site of continuous values.")
        grad = torch.autograd.grad(output.sum(), value, allow_unused=True)[0]
    product = torch.zeros_like(value) if grad is None else value.detach() * grad
    axes = info.axes.split()
    features = [i for i, axis in enumerate(axes) if axis in FEATURES]
    product = wide(product).sum(features) if features else wide(product)
    kept = [axis for axis in axes if axis not in FEATURES]
    if kept[:1] == ["b"]:
        product, kept = product[0], kept[1:]
    return SiteAttribution(site, tuple(kept), asked.label, asked.place, s.pieces, s.source_pieces if ".cross." in full else s.pieces, product.cpu())


# The line from baseline to text


def _baseline(s: Subject, given: Any, ends: list[Tensor]) -> list[Tensor]:
    """Where the line begins, in the shapes of where it ends."""
    if isinstance(given, str):
        if given not in ("zero", "mean"):
            raise InputError(f"baseline={given!r} is unknown: 'zero', 'mean', a token id, or a list of ids as long as the text.")
        if given == "zero":
            return [torch.zeros_like(e) for e in ends]
        with torch.no_grad():
            return [wide(s.stack.embed.weight).mean(0).to(e.dtype).expand_as(e) for e in ends]
    one = isinstance(given, int) and not isinstance(given, bool)
    ids: list[Any] = [given] * len(s) if one else list(given) if isinstance(given, Sequence | Tensor) else [None]
    if len(ids) != len(s):
        raise InputError(f"The baseline has {len(ids)} ids, but the text has {len(s)} tokens: a baseline holds one id for each, or is a single id for all.")
    plain: list[Any] = [i.item() if isinstance(i, Tensor) else i for i in ids]
    tokens = torch.tensor([[s.token(i) for i in plain]], device=s.device)
    with torch.no_grad():
        rows = s.stack.embed.rows(tokens)
        if len(ends) == 1:
            return [rows]
        return [rows[:, :1].expand_as(ends[0]) if one else ends[0], rows]


def _answer(s: Subject, method: str, asked: Asked, values: list[Tensor], actual: float, baseline: float | None, named: str, steps: int) -> TokenAttribution:
    sources = values[0] if len(values) == 2 else None
    return TokenAttribution(method, asked.label, asked.place, s.pieces, values[-1], s.source_pieces, sources, actual, baseline, named, steps)


__all__ = ["SiteAttribution", "TokenAttribution", "gradient_x_input", "integrated_gradients"]

"""The number whose gradient is asked for: a logit, a difference of two, a class, or what a function makes of the model's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.models.encoder_decoder import EncoderDecoderModel

from .subject import Subject, reads_tokens, with_weights


@dataclass(frozen=True, eq=False)
class Asked:
    """The number ``of(output)`` [b] that is asked about; ``keep``: the one position that is read out, where that can be chosen."""

    label: str
    place: str
    keep: int | None
    of: Callable[[Tensor], Tensor]


def ask(s: Subject, target: Any, row: int, embeds: list[Tensor]) -> Asked:
    """What is asked about; raises :class:`InputError` for a target that the output does not have."""
    place = f"{s.pieces[row]} (position {row} of {len(s)})"
    if callable(target):
        return Asked(getattr(target, "__name__", "a function").replace("<lambda>", "a function of the output"), "", None, _checked(target))
    if reads_tokens(s.stack):
        with torch.no_grad(), evaluating(s.model):
            asked = s.target(target, forward(s, embeds, row)[0, 0] if target is None else torch.empty(0))
        return Asked(asked.label, place, row, lambda out: asked.of(out[:, 0]))
    readout = s.stack.readout
    if not readout.SITES or type(readout.spec).__name__ == "Vector":
        raise InputError(
            f"This model ends in {type(s.stack.spec.readout).__name__}, which has no scores: give target= as a function of its output, "
            "such as lambda v: v @ other."
        )
    with torch.no_grad(), evaluating(s.model):
        scores = forward(s, embeds, None)[0]
    scores = scores if readout.pooled else scores[row]
    given = int(scores.argmax()) if target is None else target
    classes = list(given) if isinstance(given, tuple | list) else [given]
    if len(classes) > 2 or any(isinstance(c, bool) or not isinstance(c, int) or not 0 <= c < len(scores) for c in classes):
        raise InputError(f"target={target!r} is no class of this model: give a number from 0 to {len(scores) - 1}, or two whose scores are subtracted.")

    def of(out: Tensor) -> Tensor:
        at = out if readout.pooled else out[:, row]
        return at[:, classes[0]] if len(classes) == 1 else at[:, classes[0]] - at[:, classes[1]]

    return Asked("class " + " - ".join(map(str, classes)), "" if readout.pooled else place, None, of)


def _checked(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def of(out: Tensor) -> Tensor:
        made = function(out)
        if not isinstance(made, Tensor) or made.shape != (len(out),):
            got = tuple(made.shape) if isinstance(made, Tensor) else described(type(made))
            raise InputError(f"The target function gave {got} for an output of shape {tuple(out.shape)}, but one number per row is needed: ({len(out)},).")
        return made

    return of


def embeds_of(s: Subject) -> list[Tensor]:
    """The rows of the table that the tokens name [1 t w]; of an encoder-decoder the source's first."""
    stack: Any = with_weights(s.stack, "The gradient of the token embeddings")
    made = [(s.model.encoder, s.source_ids)] if isinstance(s.model, EncoderDecoderModel) else []
    with torch.no_grad():
        return [m.embed.rows(torch.tensor([ids], device=s.device)) for m, ids in (*made, (stack, s.ids))]


def forward(s: Subject, embeds: list[Tensor], keep: int | None) -> Tensor:
    """The output for vectors in place of tokens; ``keep``: of one position only [b 1 v]."""
    chosen = None if keep is None else torch.full((len(embeds[0]),), keep, device=s.device)
    names = ("source_embeds", "inputs_embeds")[-len(embeds) :]
    output: Tensor = s.model(**dict(zip(names, embeds, strict=True)), keep=chosen)
    return output


def gradients(s: Subject, embeds: list[Tensor], asked: Asked) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The numbers [b] and their gradients."""
    leaves = [e.detach().requires_grad_() for e in embeds]
    with torch.enable_grad(), evaluating(s.model):
        outputs = differentiable(asked.of(forward(s, leaves, asked.keep)), asked)
        return outputs.detach(), torch.autograd.grad(outputs.sum(), leaves)


def differentiable(outputs: Tensor, asked: Asked) -> Tensor:
    """The numbers themselves; raises :class:`InputError` where no gradient leads back from them."""
    if not outputs.requires_grad:
        raise InputError(
            f"The target ({asked.label}) has no gradient: what it returns is constant, a whole number, or detached; return a smooth function of the output."
        )
    return outputs

"""How a logit is read off the last stream: one direction, after maps that are held at what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.flow import Pass
from glassformer.core.numerics import wide

from .attribution_results import Attribution
from .linear import Frozen, Part, Walk, freeze_transform
from .subject import Subject, Target


@dataclass(frozen=True, eq=False)
class Reading:
    """``logit = direction . maps(stream) + constant`` at every position: direction [p d'], maps held at what they did, wholes [p]."""

    target: Target
    direction: Tensor
    maps: list[Frozen]
    constant: float
    has_bias: bool
    wholes: Tensor
    remark: str

    @staticmethod
    def of(w: Walk, target: Any) -> Reading:
        s, readout = w.subject, w.subject.stack.readout
        h = w.record[s.prefix + "resid_final"]
        index = torch.arange(len(h), device=h.device)
        made = h if readout.transform is None else readout.transform(h[None], Pass(positions=index, index=index))[0]
        raw = readout.scores(made * readout.factor)
        if target is None and len(w.rows) > 1:
            raise InputError(f"{len(w.rows)} positions were given without a target, and the model's own choice differs between them: name the target.")
        asked = s.target(target, raw[0])
        ids = torch.tensor(asked.ids, device=h.device)
        table = wide(readout._embed[0].rows(ids) if readout.tied else readout.weight[ids])
        biases = None if readout.bias is None else wide(readout.bias[ids])
        sign = torch.tensor([1.0, -1.0], device=h.device, dtype=table.dtype)[: len(ids)]
        remarks = ["Norms are held at the scale that they had for this text."]
        if readout.transform is not None:
            remarks.append("The activation before the read-out is held at the factor by which it multiplied each feature.")
        if readout.spec.cap is not None:
            remarks.append(f"The read-out's soft-cap of {readout.spec.cap:g} is not linear: these are logits before it.")
        constant = 0.0 if biases is None else float((sign * biases).sum())
        maps = [] if readout.transform is None else freeze_transform(readout.transform, h)
        direction = (readout.factor * (sign @ table)).expand(len(h), -1)
        wholes = wide(asked.of(raw))
        _check_read(w, asked, raw, readout.spec.cap)
        return Reading(asked, direction, maps, constant, biases is not None, wholes, " ".join(remarks))


def _check_read(w: Walk, asked: Target, raw: Tensor, cap: float | None) -> None:
    """Under edits: whether the logits that the model ends with are what its read-out makes of the last stream."""
    if w.logits is not None:
        read = raw if cap is None else cap * torch.tanh(raw / cap)
        check_sum(w, wide(asked.of(read)), wide(asked.of(w.logits)))


def check_sum(w: Walk, summed: Tensor, whole: Tensor) -> None:
    """Under edits: raise :class:`InputError` where the parts no longer sum to what the edited model computes."""
    if w.logits is None and w.subject.tap is None:
        return
    allowed = max(1e-4, 16 * torch.finfo(w.record[w.subject.prefix + "resid_final"].dtype).eps) * max(1.0, float(whole.abs().max()))
    i = int((summed - whole).abs().argmax())
    if not float((summed - whole).abs().flatten()[i]) <= allowed:
        raise InputError(
            f"With these edits the parts sum to {float(summed.flatten()[i]):.4f}, but the model computes {float(whole.flatten()[i]):.4f}: they change the "
            "stream or the logits beside the parts; edit what a part is made of (z, pattern, ffn.post), or ask by ablate(tap=...)."
        )


def answer(w: Walk, reading: Reading, summands: list[tuple[Part, Tensor]]) -> Attribution:
    """The answer from the value of every part at every position [p]."""
    if reading.has_bias:
        summands = [*summands, (Part("readout.bias", "bias"), torch.full_like(reading.wholes, reading.constant))]
    each = torch.stack([v for _, v in summands], 1).cpu()
    check_sum(w, each.sum(-1), reading.wholes.cpu())
    label = reading.target.label if reading.target.against is not None else repr(reading.target.label).strip("'")
    return Attribution(label, place_of(w.subject, w.rows), tuple(p for p, _ in summands), each.mean(0), each, reading.wholes.cpu(), reading.remark)


def place_of(s: Subject, rows: list[int]) -> str:
    if len(rows) == 1:
        return f"{s.pieces[rows[0]]} (position {rows[0]} of {len(s)})"
    return f"{len(rows)} positions ({', '.join(s.labels(rows)[:4])}{', …' if len(rows) > 4 else ''}), their mean"

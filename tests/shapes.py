"""Whether every value of a model has the shape that its site declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glassformer.core.tap import Tap
from glassformer.models import EncoderDecoderModel


class Shapes(Tap):
    """Notes the shape at every site, of values made only for observers too."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, ...]] = {}

    def visit(self, path: str, x: Tensor) -> Tensor:
        self.seen[path] = tuple(x.shape)
        return x

    def offer(self, path: str, compute: Any) -> None:
        self.seen[path] = tuple(compute(None).shape)


def sizes(model: Any, path: str, b: int, t: int, source_t: int) -> dict[str, set[int]]:
    """The sizes that an axis letter may have at a path, read off the Spec."""
    spec, s = model.spec, t
    if isinstance(model, EncoderDecoderModel):
        name, _, path = path.partition(".")
        spec = getattr(spec, name)
        t = source_t if name == "encoder" else t
        s = source_t if name == "encoder" or ".cross." in path else t
    found = {
        "b": b,
        "t": t,
        "s": s,
        "d": spec.d_model,
        "w": spec.embedding.lift.widths(spec.d_model)[1],
        "1": 1,
        "v": getattr(spec.readout, "n_classes", spec.vocab_size),
    }
    if path.startswith("blocks."):
        block = spec.blocks[int(path.split(".")[1])]
        attention = block.cross if ".cross." in path else block.attention
        h, g, k, value = attention.sizes(spec.d_model)
        last = path.rsplit(".", 1)[-1]
        found |= {"h": h, "g": g, "k": value if last in ("v", "z") else k}
        ff = block.feedforward.shared if ".shared." in path else block.feedforward
        found["r"] = getattr(attention, "q_lora_rank" if last == "q_latent" else "kv_lora_rank", 0)
        found |= {"f": getattr(ff, "d_ff", 0), "e": getattr(ff, "n_experts", 0), "c": getattr(ff, "top_k", 0)}
    return {a: {n} for a, n in found.items()}


def check_shapes(model: Any, ids: Tensor, source_t: int = 7) -> None:
    """Every site is met, none is undeclared, and each axis has its size."""
    b, t = ids.shape
    tap = Shapes()
    with torch.no_grad():
        if isinstance(model, EncoderDecoderModel):
            model(torch.zeros(b, source_t, dtype=torch.long, device=ids.device), ids, tap=tap)
        else:
            model(ids, tap=tap)
    declared = {s.path: s for s in model.sites()}
    assert list(declared) == [p for p in declared if p in tap.seen], sorted(declared.keys() - tap.seen.keys())
    assert set(tap.seen) == set(declared), sorted(tap.seen.keys() - declared.keys())
    for path, shape in tap.seen.items():
        axes = declared[path].axes.split()
        assert len(axes) == len(shape), (path, axes, shape)
        allowed = sizes(model, path, b, t, source_t)
        for axis, n in zip(axes, shape, strict=True):
            assert n in allowed[axis], f"{path}: axis {axis} is {n}, declared {allowed[axis]}"
        assert declared[path].meaning

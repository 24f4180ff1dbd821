"""``model.blocks[3].attn.W_Q`` and ``model.blocks[3].attn.hook_pattern``: the tree that notebooks walk."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from glassformer.core.errors import InputError
from glassformer.core.flow import Pass
from glassformer.parts.norm import NoNormLayer

from ..matrices import PerLayer, norm_of


class Branch:
    """A part of a block: its matrices when asked for, its hook points by their own names."""

    def __init__(self, name: str, points: dict[str, Any], matrices: dict[str, PerLayer], layer: int):
        self.name, self._points, self._matrices, self._layer = name, points, matrices, layer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._points:
            return self._points[name]
        if name in self._matrices:
            return self._matrices[name][self._layer]
        raise AttributeError(f"{self.name} has no {name!r}; it has {', '.join((*self._matrices, *self._points))}.")


def block_of(model: Any, i: int) -> SimpleNamespace:
    """One block."""
    w, begin = model.weights, f"blocks.{i}."
    points = {n.removeprefix(begin): p for n, p in model.hook_dict.items() if n.startswith(begin)}

    def of(part: str) -> dict[str, Any]:
        return {n.removeprefix(f"{part}."): p for n, p in points.items() if n.startswith(f"{part}.")}

    attention = {n: getattr(w, n) for n in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")}
    names = ("W_in", "W_out", "b_in", "b_out", *(("W_gate",) if model.cfg.gated_mlp else ()))
    block = model.model.blocks[i]
    return SimpleNamespace(
        attn=Branch(f"{begin}attn", of("attn"), attention, i),
        mlp=Branch(f"{begin}mlp", of("mlp"), {n: getattr(w, n) for n in names}, i),
        ln1=vectors(model.model, getattr(block, "norm1", None), of("ln1")),
        ln2=vectors(model.model, getattr(block, "norm2", None), of("ln2")),
        **{n: p for n, p in points.items() if "." not in n},
    )


def vectors(model: Any, norm: Any, points: dict[str, Any]) -> Any:
    """A norm: ``w``, ``b``, its hook points, and itself as a function."""
    found = {n.rsplit(".", 1)[-1]: p for n, p in points.items()}
    return None if norm is None else Norm(model, norm, found)


class Norm:
    """A norm's weight and bias (1 and 0 where there are none), and the function."""

    def __init__(self, model: Any, norm: Any, points: dict[str, Any]):
        self._model, self._norm = model, norm
        self.__dict__.update(points)

    @property
    def w(self) -> Any:
        """[d]."""
        return self._vectors()[0]

    @property
    def b(self) -> Any:
        """[d]."""
        return self._vectors()[1]

    def _vectors(self) -> Any:
        if isinstance(self._norm, NoNormLayer):
            return 1.0, 0.0
        try:
            return norm_of(self._norm, self._model.spec.d_model)
        except InputError:
            return 1.0, 0.0

    def __call__(self, x: Any) -> Any:
        import torch

        index = torch.arange(x.shape[-2], device=x.device)
        return self._norm(x, Pass(positions=index, index=index))

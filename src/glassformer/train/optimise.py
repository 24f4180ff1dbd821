"""Optimisers: which rule moves which parameter, and by how much.

A Spec chooses (``AdamW()``, ``Muon()``), :meth:`Optimizer.build` sorts the parameters of a model and
returns :class:`Optimisers`: one object for the loop, whatever is inside.

    kind of parameter        AdamW decays it    Muon takes it
    matrix (inside blocks)   yes                yes (each expert's too)
    router of experts        yes                no (AdamW)
    read-out, not tied       yes                no (AdamW)
    embedding                no                 no (AdamW)
    vector: norms, biases    no                 no (AdamW)
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.errors import CheckpointError, SpecError
from glassformer.core.spec import Spec, part

from . import stacked

Named = list[tuple[str, nn.Parameter]]


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise SpecError(f"{name} is above 0; {value} was given.")


class Optimizer(Spec):
    """Base of all optimisers."""

    @abstractmethod
    def build(self, model: nn.Module) -> Optimisers:
        """The optimisers of the trainable parameters of ``model``."""


@part
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1412.6980, 1711.05101), in torch's fused kernel.

        m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
        w = w - lr (m' / (sqrt(v') + eps) + weight_decay w)         m', v': corrected for their zero start

    Norms, biases and embeddings do not decay.
    """

    lr: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if self.weight_decay < 0:
            raise SpecError(f"weight_decay is 0 or more; {self.weight_decay} was given.")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise SpecError(f"betas are two numbers in [0, 1); {self.betas} were given.")
        _positive("eps", self.eps)

    def build(self, model: nn.Module) -> Optimisers:
        return Optimisers([self.over([(n, p) for n, p, _ in _trainable(model)], model)])

    def over(self, parameters: Named, model: nn.Module) -> Ruled:
        """AdamW over some parameters of ``model``, in a decaying and a not decaying group."""
        kinds = {name: kind for name, _, kind in _trainable(model)}
        decays = [(n, p) for n, p in parameters if kinds[n] in ("matrix", "readout")]
        stays = [(n, p) for n, p in parameters if kinds[n] not in ("matrix", "readout")]
        groups = [(decays, self.weight_decay), (stays, 0.0)]
        made = torch.optim.AdamW(
            [{"params": [p for _, p in g], "weight_decay": w} for g, w in groups if g],
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in parameters),
        )
        return Ruled(made, decays + stays, self.lr)


@part
class Muon(Optimizer):
    """Momentum, made orthogonal (kellerjordan.github.io/posts/muon, arXiv 2502.16982), for the matrices inside blocks.

        B = momentum B + g;    w = w - lr (0.2 sqrt(max(rows, columns)) NS(g + momentum B) + weight_decay w)

    ``NS`` is five Newton-Schulz steps towards ``U V^T`` of the argument's singular value decomposition. The
    factor ``0.2 sqrt(max(…))`` gives updates the size of AdamW's, so learning rates of the same order serve
    both. Matrices of one shape are moved together (stacked.py). Everything else (embeddings, read-out, routers of experts, norms, biases) is AdamW's.
    """

    lr: float = 2e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    rest: AdamW = AdamW()

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if not 0 <= self.momentum < 1:
            raise SpecError(f"momentum lies in [0, 1); {self.momentum} was given.")
        if self.iterations < 1:
            raise SpecError(f"iterations of Newton-Schulz are 1 or more; {self.iterations} was given.")

    def build(self, model: nn.Module) -> Optimisers:
        parameters = _trainable(model)
        hidden: Named = [(n, p) for n, p, kind in parameters if kind == "matrix" and p.ndim == 2]
        if not hidden:
            raise SpecError("Muon moves the matrices inside blocks, but this model has none that train: use AdamW().")
        taken = {n for n, _ in hidden}
        made = stacked.Muon(
            [p for _, p in hidden],
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.iterations,
        )
        rest: Named = [(n, p) for n, p, _ in parameters if n not in taken]
        return Optimisers([Ruled(made, hidden, self.lr), *([self.rest.over(rest, model)] if rest else [])])


class Ruled:
    """One torch optimiser, the names of its parameters, and its learning rate before the schedule."""

    def __init__(self, optimiser: torch.optim.Optimizer, parameters: Named, lr: float):
        self.optimiser, self.parameters, self.lr = optimiser, parameters, lr


class Optimisers:
    """All optimisers of a run, moved together.

    State is kept by parameter name, never by index, so that a checkpoint can be read without the code
    that made it: ``state()`` gives ``{"blocks.0.attn.qkv.weight/exp_avg": tensor}``.
    """

    def __init__(self, ruled: list[Ruled]):
        self._ruled = ruled
        self.parameters: list[nn.Parameter] = [p for r in ruled for _, p in r.parameters]
        self.names: list[str] = [n for r in ruled for n, _ in r.parameters]

    @property
    def lr(self) -> float:
        """The learning rate now (of the first optimiser)."""
        return float(self._ruled[0].optimiser.param_groups[0]["lr"])

    def set_factor(self, factor: float) -> None:
        """Set every learning rate to its own base times ``factor``."""
        for r in self._ruled:
            for group in r.optimiser.param_groups:
                group["lr"] = r.lr * factor

    def step(self) -> None:
        """Move all parameters by their gradients."""
        for r in self._ruled:
            r.optimiser.step()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters:
            p.grad = None

    def groups(self) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
        """Each group as (optimiser's name, names of its parameters, its settings), for printing and tests."""
        for r in self._ruled:
            names = {id(p): n for n, p in r.parameters}
            for group in r.optimiser.param_groups:
                settings = {k: v for k, v in group.items() if k != "params"}
                yield type(r.optimiser).__name__, [names[id(p)] for p in group["params"]], settings

    def state(self) -> dict[str, Tensor]:
        """All state as named tensors: ``parameter/key``."""
        found: dict[str, Tensor] = {}
        for r in self._ruled:
            for name, p in r.parameters:
                for key, value in r.optimiser.state.get(p, {}).items():
                    found[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave, to the bit. Raises :class:`CheckpointError` for strange names or shapes."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            by_name.setdefault(name, {})[kind] = value
        strange = sorted(set(by_name) - set(self.names))
        if strange:
            raise CheckpointError(f"The checkpoint has optimiser state for {strange[0]!r}, which is no trainable parameter of this model.")
        for r in self._ruled:
            r.optimiser.state.clear()
            on_device = any(g.get("fused") or g.get("capturable") for g in r.optimiser.param_groups)
            for name, p in r.parameters:
                mine = by_name.get(name, {})
                for key, value in mine.items():
                    if value.ndim and value.shape != p.shape:
                        raise CheckpointError(
                            f"The checkpoint's {key} of {name!r} has shape {tuple(value.shape)}, but the parameter has {tuple(p.shape)}: another model's."
                        )
                if mine:
                    r.optimiser.state[p] = {k: v.to(p.device) if on_device or k != "step" else v.clone() for k, v in mine.items()}


# How parameters are sorted


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter, str]]:
    """Trainable parameters in the model's order, each once, with its kind (a tied read-out is an embedding)."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or "Embed" in type(m).__name__ for p in m.parameters(recurse=False)}
    found = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            found.append((name, p, _kind(name, p, id(p) in tables)))
    if not found:
        raise SpecError("No parameter of this model is trainable: set requires_grad on what should learn.")
    return found


def _kind(name: str, p: nn.Parameter, table: bool) -> str:
    words = name.split(".")
    if table or any(w.endswith("embed") or w == "position" for w in words):
        return "embedding"
    if p.ndim < 2:
        return "vector"
    # A router chooses among experts as a read-out among tokens: its rows are scores, which Muon would make equally loud.
    return "readout" if any(w in ("readout", "lm_head", "head", "unembed", "router") for w in words) else "matrix"

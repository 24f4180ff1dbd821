"""Hooks: what a user's function is told about the place where it is called, and the tap that calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from glassformer.core.errors import SiteError
from glassformer.core.fields import described
from glassformer.core.tap import Tap

from .names import ADDED, without_step

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
HookFunction = Callable[..., Any]


@dataclass(eq=False)
class HookPoint:
    """A place with a name: ``hook.name``, ``hook.layer()``; ``hook.ctx`` is yours to keep things in."""

    name: str
    ctx: dict[str, Any] = field(default_factory=dict)
    owner: Any = field(default=None, repr=False)

    def layer(self) -> int:
        """The block's number. Raises :class:`SiteError` for a place outside the blocks."""
        parts = self.name.split(".")
        if parts[0] != "blocks":
            raise SiteError(f"{self.name!r} stands in no block, so it has no layer.")
        return int(parts[1])

    def add_hook(self, hook: HookFunction, dir: str = "fwd", is_permanent: bool = False, **_: Any) -> None:
        """As ``model.add_hook(name, hook)``."""
        self.owner.add_hook(self.name, hook, dir, is_permanent)

    def clear_context(self) -> None:
        """Forget ``ctx``."""
        self.ctx.clear()


class Stop(Exception):
    """Ends a pass where nothing after it was asked for; carries the value."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value


@dataclass
class Hook:
    """One function at the names that ``wanted`` holds; ``place`` is called with the value and the hook point."""

    wanted: frozenset[str]
    place: HookFunction
    direction: str = "fwd"
    permanent: bool = False


class Hooks(Tap):
    """The tap of one call: hooks by our paths, what is kept, and where the pass may end."""

    def __init__(
        self,
        hooks: Sequence[Hook],
        points: dict[str, HookPoint],
        paths: dict[str, str],
        keep: dict[str, Tensor] | None = None,
        wanted: frozenset[str] = frozenset(),
    ):
        self.keep, self.stop_at, self.device = keep, "", None
        self.gradients: dict[str, Tensor] | None = None
        self.calls: dict[str, list[tuple[Hook, HookPoint]]] = {}
        for hook in hooks:
            for name in points:
                if name in hook.wanted:
                    self.calls.setdefault(paths[name], []).append((hook, points[name]))
        self.kept: dict[str, list[str]] = {}
        for name in wanted:
            self.kept.setdefault(paths[name], []).append(name)
        self.rows = 1
        self.added = any(p.endswith(ADDED) for p in (*self.calls, *self.kept))
        self.stream: Tensor | None = None

    def edits(self, path: str) -> bool:
        path = without_step(path)
        return path in self.calls or (self.gradients is not None and path in self.kept)

    def differentiates(self) -> bool:
        return self.gradients is not None or any(h.direction == "bwd" for calls in self.calls.values() for h, _ in calls)

    def visit(self, path: str, x: Tensor) -> Tensor:
        path = without_step(path)
        if self.added and self.stream is not None and (path + ADDED in self.calls or path + ADDED in self.kept):
            x = self.stream + self._at(path + ADDED, x - self.stream)
        x = self._at(path, x)
        if self.added and path.rsplit(".", 1)[-1] in ("resid_pre", "resid_mid"):
            self.stream = x
        if path == self.stop_at:
            raise Stop(x)
        return x

    def _at(self, path: str, x: Tensor) -> Tensor:
        for hook, point in self.calls.get(path, ()):
            x = self._backward(x, hook, point) if hook.direction == "bwd" else self._forward(x, hook, point, path)
        if path in self.kept and self.keep is not None:
            self._keep(path, x)
            if self.gradients is not None and x.requires_grad:
                x = x.view_as(x)  # one tensor may be seen at two places, each with a gradient of its own
                x.register_hook(lambda g: self._keep_gradient(path, g))
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        path = without_step(path)
        if path in self.kept and self.keep is not None:
            self._keep(path, compute(None))

    def _keep(self, path: str, x: Tensor) -> None:
        assert self.keep is not None
        for name in self.kept[path]:
            kept = x.detach()
            kept = kept if self.device is None else kept.to(self.device)
            if name == "hook_pos_embed" and kept.ndim == 2:  # they hold it for every row
                kept = kept.expand(self.rows, *kept.shape)
            self.keep[name] = kept

    def _keep_gradient(self, path: str, g: Tensor) -> None:
        assert self.gradients is not None
        for name in self.kept[path]:
            self.gradients[f"{name}_grad"] = g.detach()

    def _forward(self, x: Tensor, hook: Hook, point: HookPoint, path: str) -> Tensor:
        shown = x.expand(self.rows, *x.shape) if path == "pos_embed" and x.ndim == 2 else x
        # Their hooks may write into what they are given; ours may be a view of the projection, or recorded already.
        own = shown.clone()
        before = own._version
        new = hook.place(own, point)
        if new is None:
            return own if own._version != before else x
        if not isinstance(new, Tensor):
            raise SiteError(f"The hook at {point.name!r} returned {described(type(new))}, but the value is a tensor: return one of the same shape, or None.")
        if new.shape != shown.shape:
            raise SiteError(f"The hook at {point.name!r} returned shape {tuple(new.shape)}, but the value has shape {tuple(shown.shape)}: keep the shape.")
        if new.dtype != shown.dtype:
            raise SiteError(f"The hook at {point.name!r} returned {new.dtype}, but the value is {shown.dtype}: return it as the value's type.")
        return new

    @staticmethod
    def _backward(x: Tensor, hook: Hook, point: HookPoint) -> Tensor:
        if not x.requires_grad:
            return x
        x = x.view_as(x)

        def run(g: Tensor) -> Tensor | None:
            made = hook.place(g.clone(), point)
            return made[0] if isinstance(made, tuple) else made

        x.register_hook(run)
        return x


def none_of_them(names: Sequence[str], given: NamesFilter, known: dict[str, str]) -> str:
    """What is said of a filter that meets nothing."""
    from glassformer.core.errors import did_you_mean

    if isinstance(given, str):
        return f"{given!r} is no hook of this model.{did_you_mean(given, names)} model.hook_dict lists all {len(known)}."
    return f"The filter meets none of this model's {len(known)} hooks: model.hook_dict lists them."


def chosen(given: NamesFilter, known: dict[str, str], default: frozenset[str] | None = None) -> frozenset[str]:
    """The names that a filter means. Raises :class:`SiteError` for a name that the model has not."""
    if given is None:
        return frozenset(known) if default is None else default
    if callable(given):
        return frozenset(n for n in known if given(n))
    if not isinstance(given, str | Sequence):
        raise SiteError(f"Hooks are chosen by a name, a list of names or a function of the name, but {described(type(given))} was given.")
    wanted = [given] if isinstance(given, str) else list(given)
    for name in wanted:
        if name not in known:
            raise SiteError(none_of_them(list(known), name, known))
    return frozenset(wanted)


__all__ = ["Hook", "HookPoint", "Hooks", "NamesFilter", "Stop", "chosen"]

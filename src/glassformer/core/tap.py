"""Taps: whoever looks at, or changes, the values of a forward pass.

    tap    = Record("blocks.*.attn.pattern", "blocks.5.resid_post")
    logits = model(tokens, tap=tap)
    tap["blocks.3.attn.pattern"]                 # b h t s
    tap.stack("blocks.*.attn.pattern")           # l b h t s

    zero   = Edit("blocks.5.attn.z[2]", lambda z: 0 * z)
    logits = model(tokens, tap=zero | Record("logits"))      # left to right

A tap is an object that the caller holds; nothing is installed into the model. A model that is
called without one does no work for it.

    forward ──► p.see(site, x) ──► tap is None? ──► x, untouched
                                     │ else
                                     └──► tap.visit(path, x) ──► the x that goes on

Patterns are paths whose segments may be ``*`` (any one segment), ``**`` (any number of
segments) or a set of numbers ``{0,3-5}``; a trailing ``[2,5]`` picks heads. While generating,
paths begin with ``step.{n}.``; a pattern that does not itself begin with ``step.`` meets every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from .eager import eagerly
from .errors import SiteError, did_you_mean
from .fields import described
from .sites import HEAD_AXIS


class Tap:
    """Base of all observers; override :meth:`visit` (and :meth:`offer` for values computed only on request)."""

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        """Called once as a pass through a stack begins, before any of its sites: ``path`` is what their paths begin with (``""``, ``"decoder"``,
        ``"step.3"``), ``index`` [t] or [b t] the place of each token in its row, counted over all steps of a cached generation, ``lengths`` [b]
        how many tokens of each row are real in this call (None: all). An encoder-decoder begins twice.
        """

    def visit(self, path: str, x: Tensor) -> Tensor:
        """Called at each site in the order of computation; what it returns goes on."""
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        """Called where a value exists only for observers; ``compute(heads)`` makes it (None: all heads). It is not written into: others may hold it too."""

    def edits(self, path: str) -> bool:
        """Whether the value at ``path`` must lie on the way to the output (because it is changed or differentiated)."""
        return False

    def differentiates(self) -> bool:
        """Whether gradients at sites are wanted: such a call runs eagerly, since a compiled graph has no inside to differentiate by."""
        return False

    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns that must each meet a site of the model; used to catch misspelt names."""
        return ()

    def check(self, known: Iterable[str]) -> None:
        """Raise :class:`SiteError` if a pattern meets none of the ``known`` paths."""
        known = tuple(known)
        for pattern in self.patterns():
            if not any(pattern.may_meet(path) for path in known):
                plain = pattern.segments[2:] if pattern.segments[:1] == ("step",) else pattern.segments
                name = ".".join(plain)
                short = {_generic(path): None for path in known}
                raise SiteError(
                    f"{pattern.text!r} meets no site of this model.{did_you_mean(name, dict.fromkeys(known) | short)} model.sites() lists them all."
                )

    def __or__(self, other: Tap) -> Tap:
        if not isinstance(other, Tap):
            raise SiteError(f"a | b joins two taps, but {described(type(other))} was given.")
        return Chain(self, other)


class Record(Tap):
    """Keep the values at the sites that the patterns meet.

    ``grad=True`` keeps them in the graph and retains their gradients (``tap.grad(path)`` after
    ``backward()``); attention scores and patterns then run that layer's explicit arithmetic,
    since a gradient needs the value on the way to the output. Otherwise values are detached.
    ``device`` moves them (``"cpu"`` keeps an accelerator's memory free).
    """

    def __init__(self, *patterns: str, grad: bool = False, device: str | torch.device | None = None):
        if not patterns:
            raise SiteError("Record() keeps nothing: name what to keep, such as Record('blocks.*.attn.pattern'), or Record('**') for everything.")
        self._patterns = tuple(Pattern.read(p) for p in patterns)
        self._asked: Asked = tuple((p.segments, p.heads) for p in self._patterns)
        self._grad, self._device = grad, device
        self.values: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}  # with grad=True: what the recorded heads were picked from

    # What is seen

    def visit(self, path: str, x: Tensor) -> Tensor:
        wanted, heads = self._wanted(path)
        if not wanted:
            return x
        if self._grad:
            return self._visit_grad(path, x)
        kept = x.detach() if heads is None else _pick(path, x.detach(), heads)
        self.values[path] = _compact(kept) if self._device is None else kept.to(self._device)
        return x

    @eagerly
    def _visit_grad(self, path: str, x: Tensor) -> Tensor:
        # Inside a backward pass this is activation checkpointing computing the value again:
        # the one that the gradient reaches is already kept.
        if torch._C._current_graph_task_id() != -1:
            return x
        if not x.requires_grad:
            # A view that starts a graph here: embeddings under frozen weights, or no_grad around the call.
            x = x.detach().requires_grad_() if torch.is_grad_enabled() and x.is_floating_point() else x
        else:
            # One tensor may be seen at two sites (a post-norm block reads the stream as it is): each has a gradient of its own.
            x = x.view_as(x)
        if x.requires_grad:
            x.retain_grad()
        heads = self._wanted(path)[1]
        if heads is None:
            self.values[path] = x
        else:
            self._whole[path] = x
            self.values[path] = _pick(path, x, heads)
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        wanted, heads = self._wanted(path)
        if wanted:
            kept = compute(heads).detach()
            self.values[path] = _compact(kept) if self._device is None else kept.to(self._device)

    def wants(self, path: str) -> bool:
        """Whether the value at ``path`` is kept."""
        return self._wanted(path)[0]

    def edits(self, path: str) -> bool:
        return self._grad and self.wants(path)

    def differentiates(self) -> bool:
        return self._grad

    def patterns(self) -> tuple[Pattern, ...]:
        return self._patterns

    def _wanted(self, path: str) -> tuple[bool, tuple[int, ...] | None]:
        """Whether the value at ``path`` is kept, and of which heads (None: all)."""
        return (_decide if torch.compiler.is_compiling() else _decide_once)(self._asked, path)

    # How it is read

    @property
    def paths(self) -> list[str]:
        """The recorded paths, in the order of computation."""
        return list(self.values)

    def __getitem__(self, path: str) -> Tensor:
        if path not in self.values:
            was = f" Recorded: {len(self.values)} sites." if self.values else " Nothing is recorded yet: pass this tap to a model call."
            raise SiteError(f"{path!r} was not recorded.{did_you_mean(path, self.values)}{was}")
        return self.values[path]

    def __contains__(self, path: str) -> bool:
        return path in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def find(self, pattern: str) -> list[str]:
        """The recorded paths that a pattern meets, in the order of computation."""
        wanted = Pattern.read(pattern)
        return [p for p in self.values if wanted.meets(p)]

    def stack(self, pattern: str) -> Tensor:
        """Every recorded value that the pattern meets, stacked on a new first axis (``l``)."""
        found = self.find(pattern)
        if not found:
            raise SiteError(f"{pattern!r} meets nothing that was recorded.{did_you_mean(pattern, self.values)}")
        shapes = {tuple(self.values[p].shape) for p in found}
        if len(shapes) > 1:
            raise SiteError(f"{pattern!r} meets values of different shapes ({', '.join(map(str, sorted(shapes)))}): stack them by a narrower pattern.")
        return torch.stack([self.values[p] for p in found])

    def grad(self, path: str) -> Tensor:
        """The gradient at ``path`` after ``backward()``; needs ``Record(..., grad=True)``."""
        value = self[path]
        if not self._grad:
            raise SiteError(f"{path!r} was recorded without its gradient: use Record({path!r}, grad=True).")
        whole = self._whole.get(path, value)
        if whole.grad is None:
            raise SiteError(f"No gradient has reached {path!r}: call backward() on something computed from it, outside torch.no_grad().")
        heads = self._wanted(path)[1]
        return whole.grad if heads is None else _pick(path, whole.grad, heads)

    @property
    def bytes(self) -> int:
        """Bytes held by the recorded values (each storage counted once)."""
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in self.values.values()}
        return sum(storages.values())

    def clear(self) -> None:
        """Forget the values, keep the patterns."""
        self.values.clear()
        self._whole.clear()


class Edit(Tap):
    """Replace the value at the sites that ``pattern`` meets by ``fn(value)``.

    With heads picked (``"blocks.5.attn.z[2]"``) ``fn`` gets and gives those heads only. Returning
    None leaves the value as it is. ``fn`` makes a new tensor and does not write into the one it is given:
    that one may be recorded already, and may be needed for gradients. Raises :class:`SiteError` if the shape changes.
    """

    def __init__(self, pattern: str, fn: Callable[[Tensor], Tensor | None]):
        self.pattern, self.fn = Pattern.read(pattern), fn
        if not callable(fn):
            raise SiteError(f"Edit({pattern!r}, {fn!r}): the second is a function of the value, such as lambda x: 0 * x, but {described(type(fn))} was given.")

    def visit(self, path: str, x: Tensor) -> Tensor:
        if not self.pattern.meets(path):
            return x
        if self.pattern.heads is None:
            return self._apply(path, x)
        index = torch.tensor(self.pattern.heads, device=x.device)
        return x.index_copy(HEAD_AXIS[path.rsplit(".", 1)[-1]], index, self._apply(path, _pick(path, x, self.pattern.heads)))

    def _apply(self, path: str, x: Tensor) -> Tensor:
        new = self.fn(x)
        if new is None:
            return x
        if not isinstance(new, Tensor):
            raise SiteError(f"The edit at {path!r} returned {described(type(new))}, but the value is a tensor: return one of the same shape, or None.")
        if new.shape != x.shape:
            raise SiteError(f"The edit at {path!r} returned shape {tuple(new.shape)}, but the value has shape {tuple(x.shape)}: keep the shape.")
        return new

    def edits(self, path: str) -> bool:
        return self.pattern.meets(path)

    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)


class Chain(Tap):
    """Several taps, applied left to right (made by ``a | b``)."""

    def __init__(self, *taps: Tap):
        self.taps: tuple[Tap, ...] = tuple(t for tap in taps for t in (tap.taps if isinstance(tap, Chain) else (tap,)))

    def begin(self, path: str, index: Tensor, lengths: Tensor | None) -> None:
        for tap in self.taps:
            tap.begin(path, index, lengths)

    def visit(self, path: str, x: Tensor) -> Tensor:
        for tap in self.taps:
            x = tap.visit(path, x)
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        for tap in self.taps:
            tap.offer(path, compute)

    def edits(self, path: str) -> bool:
        return any(tap.edits(path) for tap in self.taps)

    def differentiates(self) -> bool:
        return any(tap.differentiates() for tap in self.taps)

    def patterns(self) -> tuple[Pattern, ...]:
        return tuple(p for tap in self.taps for p in tap.patterns())


Asked = tuple[tuple[tuple[str, ...], tuple[int, ...] | None], ...]
"""Patterns as plain data: the segments and the heads of each."""


def _decide(asked: Asked, path: str) -> tuple[bool, tuple[int, ...] | None]:
    """Whether one of the patterns meets the path, and the heads wanted there: None means all; several patterns add up."""
    found = False
    wanted: list[int] = []
    for segments, heads in asked:
        if _meets(segments, path):
            if heads is None:
                return True, None
            found = True
            wanted += [h for h in heads if h not in wanted]
    return found, tuple(wanted)


# Small models are called more often than they compute: over all records of equal patterns, each path is decided once.
_decide_once = lru_cache(maxsize=100_000)(_decide)


SPARE = 1.05  # how much more memory than its own a kept value may hold


def _compact(x: Tensor) -> Tensor:
    """The value in memory of its own size: queries are a view of what holds keys and values too, and to keep the one would be to keep all three."""
    if torch.compiler.is_compiling():  # there a graph decides what lies where
        return x
    return x.clone(memory_format=torch.contiguous_format) if x.untyped_storage().nbytes() > SPARE * x.nbytes else x


def _pick(path: str, x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of a value; :class:`SiteError` for a head that it does not have."""
    axis = HEAD_AXIS[path.rsplit(".", 1)[-1]]
    check_heads(heads, x.shape[axis], path)
    return x.index_select(axis, torch.tensor(heads, device=x.device))


def check_heads(heads: tuple[int, ...] | None, n: int, where: str) -> None:
    """Raise :class:`SiteError` for a head beyond ``n``."""
    if heads and max(heads) >= n:
        raise SiteError(f"Head {max(heads)} was asked for at {where}, which has {n} heads, counted from 0.")


# Patterns

LONGEST = 12  # segments of a pattern
MOST = 100_000  # a number in one


class Pattern:
    """A path pattern (see the head of this file): ``text``, its ``segments`` and the ``heads`` it picks."""

    def __init__(self, text: str, segments: tuple[str, ...], heads: tuple[int, ...] | None):
        self.text, self.segments, self.heads = text, segments, heads

    @staticmethod
    def read(text: str) -> Pattern:
        """Parse a pattern; raises :class:`SiteError` with what is wrong."""
        if not isinstance(text, str):
            raise SiteError(f"A site is named by a text, such as 'blocks.3.attn.pattern', but {described(type(text))} was given.")
        body, heads = text, None
        if text.endswith("]") and "[" in text:
            body, _, inside = text[:-1].rpartition("[")
            heads = tuple(_numbers(inside, text))
            if body.rsplit(".", 1)[-1] not in HEAD_AXIS:
                raise SiteError(f"{text!r} picks heads, but {body.rsplit('.', 1)[-1]!r} has no head axis. These have one: {', '.join(HEAD_AXIS)}.")
        segments = tuple(body.split("."))
        if len(segments) > LONGEST:
            raise SiteError(f"{text[:60]!r}... has {len(segments)} segments, but no site's path has more than {LONGEST}.")
        if not all(segments):
            raise SiteError(f"{text!r} has an empty segment: write names joined by single dots.")
        for s in segments:
            if s.startswith("{"):
                _numbers(s.strip("{}"), text)
        return Pattern(text, segments, heads)

    def meets(self, path: str) -> bool:
        """Whether the pattern meets the path (with or without its ``step.{n}`` beginning)."""
        return _meets(self.segments, path) if torch.compiler.is_compiling() else _meets_cached(self.segments, path)

    def may_meet(self, path: str) -> bool:
        """Whether the pattern meets the path, or will in some step of a generation."""
        inside = self.segments[2:] if self.segments[0] == "step" else ()
        return self.meets(path) or (bool(inside) and not path.startswith("step.") and _segments_meet(inside, tuple(path.split("."))))


def _meets(pattern: tuple[str, ...], path: str) -> bool:
    names = tuple(path.split("."))
    if _segments_meet(pattern, names):
        return True
    if names[0] == "step" and pattern[0] != "step":
        return _segments_meet(pattern, names[2:])
    return False


_meets_cached = lru_cache(maxsize=100_000)(_meets)


def _segments_meet(pattern: tuple[str, ...], names: tuple[str, ...]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_segments_meet(pattern[1:], names[i:]) for i in range(len(names) + 1))
    return bool(names) and _segment_meets(pattern[0], names[0]) and _segments_meet(pattern[1:], names[1:])


def _segment_meets(pattern: str, name: str) -> bool:
    if pattern == "*" or pattern == name:
        return True
    return pattern.startswith("{") and name.isdigit() and int(name) in _numbers(pattern.strip("{}"), pattern)


def _numbers(text: str, where: str) -> list[int]:
    numbers: list[int] = []
    for piece in text.split(","):
        ends = piece.strip().split("-")
        if not all(e.isascii() and e.isdigit() for e in ends) or len(ends) > 2:
            raise SiteError(f"{where!r}: {piece!r} is neither a number nor a range such as 3-5.")
        if len(ends[-1]) > 6 or int(ends[-1]) > MOST or len(ends[0]) > 6 or int(ends[0]) > int(ends[-1]):
            raise SiteError(f"{where!r}: {piece!r} is no number up to {MOST:,}, nor a range from a smaller to a larger one.")
        numbers += range(int(ends[0]), int(ends[-1]) + 1)
    return numbers


def _generic(path: str) -> str:
    return ".".join("*" if s.isdigit() else s for s in path.split("."))

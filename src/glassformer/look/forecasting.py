"""What a capture will hold and take, before it begins.

    print(forecast(model, ["blocks.*.attn.pattern"], batch=4, t=256))       bytes per site and in all, and where they will be put

A copy of the model without numbers (on torch's meta device) runs the very pass that is asked for, with the same :class:`Record`: every tensor
has its shape and type there and none has memory. What would be held is added up storage by storage, as :attr:`Record.bytes` does, and what would
be alive at the same time is followed from operation to operation.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.numerics import dtype_named
from glassformer.core.sites import SiteInfo
from glassformer.core.tap import Record
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.models.transformer import TransformerModel
from glassformer.weights.own import Loaded

from .figure import Theme, bars
from .result import Grid, Result
from .stacks import most_positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.5
"""Of the memory that is available, what a capture may take unless a budget says otherwise."""
UNKNOWN = 2 << 30  # bytes, where a machine does not say what is available
PROBE = 128  # positions of a timed pass


@dataclass(frozen=True)
class SiteBytes:
    """One site: its axes, shape, type, and the bytes of its value (values that share memory are counted at the first)."""

    path: str
    axes: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Forecast(Result):
    """``bytes``: held by all sites. ``peak``: the most that the pass needs at one time beside them, weights not counted (what a kernel
    takes for itself inside one operation is not in it). ``budget``: what may be taken. ``seconds``: of the pass, if it was measured."""

    batch: int
    t: int
    sites: tuple[SiteBytes, ...]
    bytes: int
    peak: int
    budget: int
    seconds: float | None = None

    @property
    def fits(self) -> bool:
        """Whether all of it fits into memory at once."""
        return self.bytes + self.peak <= self.budget

    @property
    def place(self) -> str:
        """``"memory"`` or ``"disk"``: where a capture will put it."""
        return "memory" if self.fits else "disk"

    @property
    def title(self) -> str:
        took = "" if self.seconds is None else f", about {self.seconds:.2g} s"
        return (
            f"{self.batch} x {self.t} tokens: {said(self.bytes)} to be held {'in memory' if self.fits else 'on disk'}, "
            f"{said(self.peak)} beside it while it runs{took}; "
            f"the budget is {said(self.budget)}"
        )

    def grid(self) -> Grid:
        rows = sorted(self.sites, key=lambda s: -s.bytes)
        note = "A site without bytes of its own is the same tensor as one above it in the order of computation." if any(not s.bytes for s in rows) else ""
        return Grid(("site", "axes", "shape", "type", "bytes"), tuple((s.path, s.axes, " x ".join(map(str, s.shape)), s.dtype, s.bytes) for s in rows), note)

    def draw(self, figure: Figure, theme: Theme) -> None:
        kinds: dict[str, int] = {}
        for s in self.sites:
            name = ".".join("*" if n.isdigit() else n for n in s.path.split("."))
            kinds[name] = kinds.get(name, 0) + s.bytes
        best = sorted(kinds.items(), key=lambda kv: -kv[1])[:20]
        axes = figure.add_subplot()
        bars(axes, theme, [k for k, _ in best], [v / 1e6 for _, v in best], title=f"{said(self.bytes)} to be held", x="MB")

    def size(self) -> tuple[float, float]:
        return (8.0, 1.4 + 0.24 * min(20, len({tuple(n for n in s.path.split(".") if not n.isdigit()) for s in self.sites})))


def forecast(
    model: Any,
    sites: str | Sequence[str],
    batch: int = 1,
    t: int = 256,
    *,
    source_t: int | None = None,
    dtype: torch.dtype | str | None = None,
    budget: int | None = None,
    measure: bool = False,
) -> Forecast:
    """What recording ``sites`` (patterns) of ``batch`` rows of ``t`` tokens holds and takes; nothing of the model runs.

    ``source_t``: tokens of an encoder-decoder's source (None: ``t``). ``dtype``: as if the model were of that type. ``budget``: bytes
    (None: half of what is available where the model lies). ``measure=True`` times one pass of ``min(t, 128)`` positions and scales it by the operations.
    ``bytes`` is what :attr:`Record.bytes` is afterwards, to the byte. Raises :class:`InputError` for sizes that cannot be, :class:`SiteError`
    for a pattern that meets nothing.
    """
    model = model_of(model)
    check_sizes(model, batch, t)
    if source_t is not None:
        if not isinstance(model, EncoderDecoderModel):
            raise InputError(
                f"source_t={source_t!r} is the length of what an encoder reads, but this {type(model.spec).__name__} reads one text: leave it out."
            )
        check_sizes(model.encoder, batch, source_t, "source_t")
    record = Record(*patterns_of(sites))
    held, peak, infos = dry_run(model, record, batch, t, source_t, None if dtype is None else dtype_named(dtype))
    seen: set[int] = set()
    rows: list[SiteBytes] = []
    for path, x in held.items():
        key = x.untyped_storage()._cdata
        rows.append(SiteBytes(path, infos[path].axes, tuple(x.shape), str(x.dtype).removeprefix("torch."), 0 if key in seen else x.untyped_storage().nbytes()))
        seen.add(key)
    total = sum(r.bytes for r in rows)
    seconds = _timed(model, record, batch, t, source_t or t) if measure else None
    return Forecast(
        batch, t, tuple(rows), total, max(0, peak - total), available(next(model.parameters()).device) if budget is None else check_budget(budget), seconds
    )


# The pass without numbers


def dry_run(
    model: Any, tap: Record, batch: int, t: int, source_t: int | None = None, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], int, dict[str, SiteInfo]]:
    """What ``tap`` would hold, the most bytes alive at one time (what is held included), and the sites by path."""
    ghost = ghost_of(model, dtype)
    infos = {s.path: s for s in ghost.sites()}
    tap.check(infos)
    tokens = torch.zeros(batch, t, dtype=torch.long, device="meta")
    source = (torch.zeros(batch, source_t or t, dtype=torch.long, device="meta"),) if isinstance(model, EncoderDecoderModel) else ()
    alive = _Alive()
    with torch.no_grad(), evaluating(ghost), alive, _Fused():
        ghost(*source, tokens, tap=tap)
    held = dict(tap.values)
    tap.clear()
    return held, alive.most, infos


def ghost_of(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model's shapes and types without its numbers."""
    ghost = model.spec.build(device="meta")
    own = dict(model.named_parameters())
    usual = dtype or next((p.dtype for p in own.values() if p.is_floating_point()), torch.float32)
    ghost = ghost.to(usual)
    for name, p in ghost.named_parameters():
        if dtype is None and name in own and own[name].is_floating_point() and own[name].dtype != p.dtype:
            p.data = p.data.to(own[name].dtype)
    return ghost.eval()


class _Fused(TorchFunctionMode):
    """Attention as the fused kernel does it, which never holds the scores: without numbers torch would take the long way."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, v = args[0], args[2]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that were made under it and are still alive; ``most`` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in _tensors(args):
            self._known.add(x.untyped_storage()._cdata) if x.device.type != "meta" else None
        before = {x.untyped_storage()._cdata for x in _tensors((args, kwargs or {}))}
        for x in _tensors(out):
            storage = x.untyped_storage()
            key = storage._cdata
            if key in before or key in self._known:
                continue
            self._known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


# Time


def _timed(model: Any, tap: Record, batch: int, t: int, source_t: int) -> float:
    """Seconds of the whole pass, from one of fewer positions; scaled by the operations per token, which count attention's growth."""
    short, device = min(t, PROBE), next(model.parameters()).device
    tokens = torch.zeros(1, short, dtype=torch.long, device=device)
    inputs = (tokens, tokens) if isinstance(model, EncoderDecoderModel) else (tokens,)
    best = float("inf")
    with torch.no_grad(), evaluating(model):
        for _ in range(2):  # the first also wakes the machine up
            begin = time.perf_counter()
            model(*inputs, tap=tap)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - begin)
            tap.clear()
    longest = max(t, source_t)
    return best * batch * longest / short * model.flops_per_token(longest) / model.flops_per_token(short)


# Sizes and budgets


def model_of(model: Any) -> Any:
    """The model itself. Raises :class:`InputError` for what is none of ours."""
    model = model.model if isinstance(model, Loaded) else model
    if not isinstance(model, TransformerModel | EncoderDecoderModel):
        raise InputError(
            f"The sizes of a model of glassformer can be told before it runs, but those of {type(model).__name__} cannot: open it with gf.load(folder)."
        )
    if isinstance(model, TransformerModel) and any(b.cross is not None for b in model.spec.blocks):
        raise InputError("This decoder also reads what an encoder makes, so it does not run by itself: give the whole encoder-decoder.")
    return model


def patterns_of(sites: Any) -> tuple[str, ...]:
    """One pattern, or several. Raises :class:`InputError` for what is neither."""
    if isinstance(sites, str):
        return (sites,)
    if not isinstance(sites, Iterable):
        raise InputError(f"Sites are named by a pattern such as 'blocks.*.resid_post', or several, but {described(type(sites))} was given.")
    return tuple(sites)


def check_sizes(model: Any, batch: int, t: int, word: str = "t") -> None:
    """Raise :class:`InputError` for a batch or length (``word``: its name) below 1, and for more positions than the model has."""
    for name, value in (("batch", batch), (word, t)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is a whole number of at least 1, but {value!r} was given.")
    limit = most_positions(model)
    if limit is not None and t > limit:
        raise InputError(f"{word}={t} was given, but this model has positions for {limit}: ask for at most {limit}.")


def check_budget(budget: Any) -> int:
    """The budget in bytes; raises :class:`InputError` for what is none."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 1 <= budget < math.inf:
        raise InputError(f"budget is a number of bytes, such as 2 * 10**9, but {budget!r} was given.")
    return int(budget)


def rows_within(one: int, all_rows: int, rows: int, budget: int) -> int:
    """How many of ``rows`` a pass may have, when one takes ``one`` bytes and all take ``all_rows``: the rest of a pass does not grow with its rows."""
    if all_rows <= budget or rows == 1:
        return rows
    return max(1, 1 + (rows - 1) * (budget - one) // (all_rows - one))


def available(device: torch.device | str = "cpu") -> int:
    """Bytes that a capture may take without being told: half of what is left on the ``device``, or in the machine (and the group of processes
    this one is in).
    """
    if torch.device(device).type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most.isdigit():
            found.append(max(0, int(most) - int((group / "memory.current").read_text(encoding="ascii"))))
    except (OSError, ValueError):
        pass  # another system
    return int(SHARE * min(found)) if found else UNKNOWN


def said(n: float) -> str:
    """Bytes for reading: ``12.3 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:,.0f} bytes"


__all__ = ["Forecast", "SiteBytes", "available", "dry_run", "forecast", "ghost_of", "said"]

"""The engine of all interventions: many variants of one forward pass that differ in a few values each.

    base run, once:   tokens ──► streams that enter every block, keys and values, logits

    variants of layer 3, together:

      stream that enters block 3 ──► block 3 up to the patched site      one row: nothing there differs yet
                                       └──► [n ..] n rows, each with its own value ──► … ──► read-out of the positions that count

Of a subject with a tap of its own (edits that hold in every run) nothing is left out: the tap sees every variant whole, from its first site on.

What is the same is computed once: everything before the patched site, and in a causal model every position before the first patched one
(its keys and values are the base run's). In the last block only the position that is read out goes on after attention. What comes out is,
to the rounding of the products, what one full forward pass per variant gives.

    sweep = Sweep(read(model, "The old man"))
    new = sweep.run([Patch("blocks.1.attn.z", torch.zeros(()), head=h) for h in range(4)], lambda logits: target.of(logits[:, 0]))
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glassformer.core.cache import Cache, Clock, Once, Slot
from glassformer.core.errors import InputError
from glassformer.core.modes import evaluating
from glassformer.core.tap import Record, Tap
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.models.transformer import TransformerModel
from glassformer.parts.latent import LatentAttentionLayer
from glassformer.parts.wiring import SequentialBlock

from .subject import Subject

MEMORY = 512 * 2**20
"""Bytes that a sweep's rows may hold at once, unless said otherwise."""
FULL = 512
"""Tokens in a batch from which on a larger one is hardly faster: from here on, batches end where a longer common beginning can be left out."""
MOST = 4096
"""Tokens in a batch beyond which it only takes more memory."""

_MATES = ("q", "k", "v", "q_rot", "k_rot")


@dataclass(frozen=True, eq=False)
class Patch:
    """One value in place of another: ``x[positions, head, unit] = value`` at a site of the stack (path without prefix, ``x`` one row).

    ``positions``: along ``t`` (of k and v: ``s``), None for all. ``head``: along ``h`` or ``g``. ``unit``: along the last axis.
    ``value`` fits what is selected, or spreads over it. ``base``: the path of an earlier site whose value in the same run is added to it.
    """

    site: str
    value: Tensor
    positions: tuple[int, ...] | None = None
    head: int | None = None
    unit: int | None = None
    base: str | None = None

    @property
    def first(self) -> int:
        """The first position that is touched."""
        return 0 if self.positions is None else min(self.positions)


Variant = Patch | Sequence[Patch]
"""What is different in one row: one patch, or several at once."""


def layer_of(site: str, layers: int) -> int:
    """The block in which a site stands: -1 before the first, ``layers`` after the last."""
    if site.startswith("blocks."):
        return int(site.split(".")[1])
    return -1 if site.startswith(("embed", "pos_embed")) else layers


class Sweep:
    """A base run of a subject, and the variants of it.

    ``keep``: sites whose values of the base run are wanted (``sweep.base``). ``tap``: edits that hold in every run, before the first block
    (noise on the embedding). ``memory``: bytes that the rows of one batch may hold. ``progress``: a bar on the terminal; None: if there is one.
    """

    def __init__(self, subject: Subject, keep: Sequence[str] = (), *, tap: Tap | None = None, memory: int | None = None, progress: bool | None = None):
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | float) or not 1 <= memory < math.inf):
            raise InputError(f"memory={memory!r}: it is the number of bytes that a batch may hold, at least 1.")
        self.subject, self.tap, self.memory = subject, tap, MEMORY if memory is None else int(memory)
        self.progress = sys.stderr.isatty() if progress is None else progress
        self.own = isinstance(subject.stack, TransformerModel) and subject.tap is None
        """Whether a pass can begin inside: of a foreign model, and under a tap that must see every site of a pass once, it cannot."""
        if subject.tap is not None:
            self.tap = subject.tap if tap is None else subject.tap | tap
        self.axes = {s.path.removeprefix(subject.prefix): s.axes for s in subject.model.sites() if s.path.startswith(subject.prefix)}
        self.encoded: Tensor | None = None
        self._begin(keep)

    def _begin(self, keep: Sequence[str]) -> None:
        """The base run: streams, keys and values, what is wanted, logits."""
        s, prefix = self.subject, self.subject.prefix
        record = (
            Record(*dict.fromkeys([*(s.path(site) for site in keep), *(s.path(f"blocks.*.{n}") for n in ("resid_pre", "resid_post") if self.own)]))
            if (self.own or keep)
            else None
        )
        tap = record if self.tap is None else self.tap if record is None else self.tap | record
        self._held: Cache | None = None
        with torch.no_grad(), evaluating(s.model):
            if not self.own:
                logits = s.model(*s.inputs, tap=tap)
            else:
                if isinstance(s.model, EncoderDecoderModel):
                    self.encoded = s.model.encode(s.inputs[0])
                if s.causal:
                    self._held = s.stack.cache(1, len(s), rewind=len(s))
                logits = s.stack(s.tokens, memory=self.encoded, cache=self._held, tap=tap, path=prefix.rstrip("."))
        self.base: dict[str, Tensor] = {} if record is None else {p.removeprefix(prefix): v for p, v in record.values.items()}
        self.logits: Tensor = logits[0]
        """The base run's logits [t v]."""

    # Running

    def run(self, variants: Sequence[Variant], score: Callable[[Tensor], Tensor], at: Sequence[int] = (-1,), what: str = "patches") -> Tensor:
        """``score(logits [n k v])`` of every variant, in their order: [len(variants) ..]; ``k`` counts the positions ``at`` that are read out."""
        t, rows = len(self.subject), [(v,) if isinstance(v, Patch) else tuple(v) for v in variants]
        read = sorted({i % t for i in at})
        order = [read.index(i % t) for i in at]
        out: list[Tensor | None] = [None] * len(rows)
        with torch.no_grad(), evaluating(self.subject.model), _bar(len(rows), what, self.progress) as done:
            for layer, skip, chunk in self._chunks(rows, read):
                logits = self._logits([rows[i] for i in chunk], layer, skip, read)
                made = score(logits[:, order])
                for i, value in zip(chunk, made.detach().cpu(), strict=True):
                    out[i] = value
                done(len(chunk))
        return torch.stack([o for o in out if o is not None]) if out else torch.zeros(0)

    def streams(self, variant: Variant) -> Tensor:
        """The stream [1 t d] that leaves the last block with one variant's patches in place."""
        last = f"blocks.{self.subject.layers - 1}.resid_post"
        if layer_of(last, self.subject.layers) < 0 or not self.own:
            raise InputError("The stream after the last block is known only of a model that has blocks here.")
        rows = [(variant,) if isinstance(variant, Patch) else tuple(variant)]
        swap, record = Swap(self, rows, 0), Record(self.subject.path(last))
        tap = swap | record
        tap._checked_by = id(self.subject.stack)  # type: ignore[attr-defined]
        options: dict[str, Any] = {"memory": self.encoded, "tap": tap, "path": self.subject.prefix.rstrip(".")}
        with torch.no_grad(), evaluating(self.subject.model):
            self.subject.stack(self.subject.tokens, keep=1, **options)
        return record[self.subject.prefix + last]

    def _chunks(self, rows: Sequence[tuple[Patch, ...]], read: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
        """Batches of rows with the block where they begin and the number of positions that they leave out."""
        n = self.subject.layers
        keys = []
        for i, row in enumerate(rows):
            for patch in row:
                self._check(patch)
            layer = min((layer_of(p.site, n) for p in row), default=n)
            keys.append((layer if self.own else -1, self._first(row, read) if self.own and layer >= 0 else 0, i))
        keys.sort()
        chunk: list[int] = []
        for j, (layer, skip, i) in enumerate(keys):
            start = keys[j - len(chunk)] if chunk else keys[j]
            tokens = len(chunk) * (len(self.subject) - start[1])
            full = len(chunk) >= self._most(rows[i], len(self.subject) - start[1], len(read))
            # Later blocks' rows join the same batch when the pass gets there: large products are faster.
            apart = layer != start[0] and not (self.own and start[0] >= 0 and layer < n and skip == start[1])
            if chunk and (apart or full or (tokens >= FULL and skip > start[1])):
                yield start[0], start[1], chunk
                chunk = []
            chunk.append(i)
        if chunk:
            start = keys[len(keys) - len(chunk)]
            yield start[0], start[1], chunk

    def _check(self, patch: Patch) -> None:
        if patch.site not in self.axes:
            self.subject.path(patch.site)  # raises with the nearest names
        late = patch.site == "logits" or patch.site.startswith("readout.")
        if late or not self.axes[patch.site].startswith("b"):
            why = "it belongs to the read-out" if late else "its value has no rows"
            raise InputError(f"A sweep changes values on the way to the scores, but {patch.site!r} was named and {why}: patch 'embed' or a block's site.")

    def _first(self, row: tuple[Patch, ...], read: Sequence[int]) -> int:
        """The first position at which a row can differ from the base run (and that is computed)."""
        if self._held is None:
            return 0
        if any(".cross." in p.site and p.site.rsplit(".", 1)[-1] in ("k", "v", "k_rot") for p in row):
            return 0  # their positions are the source's, and their slot must stay empty to be seen
        return min([*(p.first for p in row), *read])

    def _most(self, row: tuple[Patch, ...], t: int, reads: int) -> int:
        """Rows in a batch: within the memory, and no more than make it faster."""
        spec = getattr(self.subject.stack, "spec", None)
        reads = reads if self.own else t
        d = int(getattr(spec, "d_model", 1024))
        inner = max((v for v in (self._width(b) for b in spec.blocks)), default=4 * d) if self.own and spec is not None else 8 * d
        size = self.logits.element_size()
        heads = max((b.attention.n_heads for b in spec.blocks), default=1) if self.own and spec is not None else 16
        # Streams, queries, keys, values and their mixes; the hidden units before and after the bend; scores and weights if they are formed.
        per_row = t * size * (10 * d + 2 * inner + 3 * heads * len(self.subject)) + 3 * reads * self.logits.shape[-1] * size
        return max(1, min(self.memory // per_row, MOST // t))

    @staticmethod
    def _width(block: Any) -> int:
        ffn = block.feedforward
        one = int(getattr(ffn, "d_ff", 0) or getattr(getattr(ffn, "expert", None), "d_ff", 0))
        return one * (1 if hasattr(ffn, "d_ff") else int(getattr(ffn, "top_k", 1)) + 1)

    def _logits(self, rows: Sequence[tuple[Patch, ...]], layer: int, skip: int, read: Sequence[int]) -> Tensor:
        """Logits [n k v] at the positions ``read``."""
        s, stack = self.subject, self.subject.stack
        swap = Swap(self, rows, skip, layer if self.own else None)
        tap = swap if self.tap is None or layer >= 0 else self.tap | swap
        tap._checked_by = id(stack)  # type: ignore[attr-defined]  # its paths are the model's own
        if not self.own:
            whole: Tensor = s.model(*(x.expand(len(rows), -1) for x in s.inputs), tap=tap)
            return whole[:, list(read)]
        wanted = [i - skip for i in read]
        swap.narrow = self._narrow(rows, wanted) if layer < s.layers else ()
        keep = None if swap.narrow or len(wanted) > 1 else torch.full((len(rows),), wanted[0], device=s.device)
        options: dict[str, Any] = {"memory": self.encoded, "tap": tap, "path": s.prefix.rstrip(".")}
        if layer < 0:
            logits = stack(s.tokens, keep=keep, **options)
        else:
            stream = self.base[f"blocks.{layer}.resid_pre"] if layer < s.layers else self.base[f"blocks.{s.layers - 1}.resid_post"]
            if not swap.at:  # nothing differs: rows of the base run
                stream = stream.expand(len(rows), -1, -1)
            logits = stack.resume(stream[:, skip:], layer, keep=keep, cache=self._beginning(skip, swap), **options)
        if keep is None and not swap.narrow:
            logits = logits[:, wanted]
        return logits if logits.shape[0] == len(rows) else logits.expand(len(rows), -1, -1)

    def _narrow(self, rows: Sequence[tuple[Patch, ...]], wanted: list[int]) -> tuple[int, ...]:
        """The positions that go on after the last block's attention: those read out, if nothing is patched later."""
        n = self.subject.layers
        block = self.subject.stack.blocks[-1] if n else None
        if not isinstance(block, SequentialBlock) or "cross" in block.order:
            return ()
        early = ("resid_pre", *(f"attn.{x}" for x in ("in", *_MATES, "latent", "q_latent", "scores", "pattern", "z")))
        late = [p for row in rows for p in row if layer_of(p.site, n) >= n - 1 and p.site.split(".", 2)[-1] not in early]
        return () if late or any(p.base for row in rows for p in row) else tuple(wanted)

    def _beginning(self, skip: int, swap: Swap) -> Cache | None:
        """A cache that holds the base run's first ``skip`` tokens, whatever the number of rows."""
        if not skip or self._held is None:
            return None
        clock = Clock(1)
        clock.lengths = [skip]
        layers: list[dict[str, Slot]] = []
        for slots in self._held.layers:
            made: dict[str, Slot] = {}
            for name, slot in slots.items():
                held = slot.tensors()
                made[name] = _Common(held["keys"], held["values"], skip) if name == "attn" else _CommonOnce(held["keys"], held["values"], swap)
            layers.append(made)
        return Cache(clock, layers, None)


class _Common(Slot):
    """Keys and values of the first tokens, the same in every row; nothing is kept of what comes after."""

    layout = "common"

    def __init__(self, keys: Tensor, values: Tensor, n: int):
        self.keys, self.values = keys[:, :, :n], values[:, :, :n]

    def update(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b = k.shape[0]
        keys = torch.cat([self.keys.expand(b, -1, -1, -1), k.transpose(1, 2)], 2)
        values = torch.cat([self.values.expand(v.shape[0], -1, -1, -1), v.transpose(1, 2)], 2)
        return keys, values, torch.arange(keys.shape[2], device=k.device)


class _CommonOnce(Once):
    """An encoder's keys and values, for as many rows as the pass has by then."""

    def __init__(self, keys: Tensor, values: Tensor, swap: Swap):
        super().__init__()
        self._keys, self._values, self._swap = keys, values, swap

    def once(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        keys, values = super().once(make)
        n = self._swap.rows if self._swap.live else 1
        return keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1)


class Swap(Tap):
    """The patches of a batch: where the first stands, one row becomes as many as there are variants."""

    def __init__(self, sweep: Sweep, rows: Sequence[tuple[Patch, ...]], skip: int, first: int | None = None):
        self.sweep, self.rows, self.skip = sweep, len(rows), skip
        starts = [min((layer_of(p.site, sweep.subject.layers) for p in row), default=sweep.subject.layers) for row in rows]
        self.join = {n: starts.count(n) for n in set(starts) if first is not None and 0 <= first < n}
        self.rows = len(rows) - sum(self.join.values())
        self.prefix, self.layers = sweep.subject.prefix, sweep.subject.layers
        self.live = False
        self.narrow: tuple[int, ...] = ()
        self.at: dict[str, list[tuple[int, Patch]]] = {}
        self.bases: dict[str, Tensor] = {}
        self.wide: set[str] = set()
        """Attention layers and routers whose inside is as wide as the batch from its beginning."""
        for i, row in enumerate(rows):
            for patch in row:
                self.at.setdefault(patch.site, []).append((i, patch))
                if patch.base is not None:
                    self.bases[patch.base] = torch.empty(0)
                part, name = patch.site.rpartition(".")[::2]
                if name in (*_MATES, "latent", "q_latent", "router", "chosen") or part.rsplit(".", 1)[-1] in ("q_norm", "k_norm", "kv_norm"):
                    self.wide.add(part if name != "scale" else part.rpartition(".")[0])

    def edits(self, path: str) -> bool:
        return path.removeprefix(self.prefix) in self.at

    def visit(self, path: str, x: Tensor) -> Tensor:
        if not path.startswith(self.prefix):
            return x
        site = path[len(self.prefix) :]
        part, name = site.rpartition(".")[::2]
        if name == "resid_pre" and (n := int(part.split(".")[1])) in self.join:
            x = torch.cat([x.expand(self.rows, -1, -1), self.sweep.base[site][:, self.skip :].expand(self.join[n], -1, -1)])
            self.rows += self.join.pop(n)
            self.live = True
        if x.shape[0] == 1 and self.rows > 1 and (site in self.at or self._spread(part, name)):
            x = x.expand(self.rows, *x.shape[1:])
        if site in self.bases:
            self.bases[site] = x
        if site in self.at:
            x = x.clone(memory_format=torch.contiguous_format)
            for i, patch in self.at[site]:
                self._put(x[i], i, patch)
            self.live = True
        elif self.rows > 1 and x.shape[0] == self.rows:
            self.live = True
        # In the last block only what is read out goes on: first through the output projection (one position spreads over the sum), then in the stream.
        if self.narrow and part.startswith(f"blocks.{self.layers - 1}") and (name == "resid_mid" or (name == "z" and len(self.narrow) == 1)):
            x = x[:, list(self.narrow)]
        return x

    def _spread(self, part: str, name: str) -> bool:
        """Whether a value of one row must be as wide as the batch before anything in it differs."""
        if part in self.wide:
            if name in _MATES and part.rsplit(".", 1)[-1] in ("attn", "cross"):
                return not self._latent(part)
            return name == "in" and (self._latent(part) or not part.endswith(("attn", "cross")))
        return self.live and name in ("q_rot", "k_rot", "v") and part.rsplit(".", 1)[-1] in ("attn", "cross")

    def _latent(self, part: str) -> bool:
        stack = self.sweep.subject.stack
        return isinstance(stack, TransformerModel) and isinstance(
            getattr(stack.blocks[int(part.split(".")[1])], part.rsplit(".", 1)[-1], None), LatentAttentionLayer
        )

    def _put(self, row: Tensor, i: int, patch: Patch) -> None:
        """Write a patch into its row."""
        axes = self.sweep.axes[patch.site].split()[1:]
        index: list[Any] = [slice(None)] * row.ndim
        place = next((axes.index(a) for a in ("t", "s") if a in axes), None)
        if patch.positions is not None and place is not None:
            index[place] = torch.tensor([p - self.skip for p in patch.positions], device=row.device)
        if patch.head is not None:
            index[next(axes.index(a) for a in ("h", "g") if a in axes)] = patch.head
        if patch.unit is not None:
            index[row.ndim - 1] = patch.unit
        value = patch.value.to(row)
        if patch.base is not None:
            under = self.bases[patch.base]
            value = value + under[i if under.shape[0] > 1 else 0][tuple(index)]
        row[tuple(index)] = value


@contextmanager
def _bar(total: int, what: str, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, or nothing."""
    if not wanted or total < 2:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)

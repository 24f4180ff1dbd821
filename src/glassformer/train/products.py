"""Products of a compiled step on a CPU, in blocks of rows where the library would compute them on one core.

For some shapes the matrix library's bfloat16 product gives all of its work to one thread: [1024 768] x [768 768] takes
twice as long as two products of 512 rows. Which shapes these are is the library's secret, so it is measured, once per
shape, when a step is compiled:

    graph of the step ──► each product [m k] x [k n] ──► timed whole, and in one block of rows per thread
                                                  └──► the blocks take its place where they save 15 % of the time or more

Blocks may sum in another order, so a choice must last. It is settled once for every run on this machine, in a table
beside the compiler's own cache (whose graphs hang on the table's id), and copied into a run's record, so that a
resumed run computes with the same products, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import unset_fake_temporarily

from glassformer.core.errors import CheckpointError

from .checkpoint import write_json

SMALLEST = 2 * 512 * 512 * 512  # operations; below, a product's time is not the library's
PAYS = 0.85  # share of the whole product's time that the blocks may take at most
SECONDS = 1.0  # of timing per shape, about


class SplitProducts(CustomGraphPass):
    """A pass over the graph of a compiled step; ``table`` maps each product's description to its number of row blocks.

    ``record``: the table of a run that is resumed. Where this machine's own contradicts it, the record alone counts, and
    products that it does not name stay whole; otherwise the machine learns it.
    """

    def __init__(self, record: dict[str, int] | None = None):
        self._file = Path(cache_dir()) / f"glassformer-products-{torch.__version__}-{torch.get_num_threads()}.json"
        self._id = uuid.uuid4().hex
        self._stale = False
        self.table: dict[str, int] = {}
        with self._shared():
            self._fixed = any(self.table.get(name, blocks) != blocks for name, blocks in (record or {}).items())
            if not self._fixed:
                self.table |= record or {}
        if self._fixed:
            self.table = dict(record or {})
        self._stale = not self._fixed

    def uuid(self) -> Any:
        """What the compiler's cached graphs depend on: this file, and the table they were made by."""
        table = json.dumps(self.table, sort_keys=True) if self._fixed else self._id
        return hashlib.sha256(Path(__file__).read_bytes() + table.encode()).hexdigest()

    def __call__(self, graph: fx.Graph) -> None:
        """Replace what pays in ``graph``."""
        with contextlib.nullcontext() if self._fixed else self._shared():
            for target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                for node in graph.find_nodes(op="call_function", target=target):
                    blocks = self._blocks(node)
                    if blocks > 1:
                        _split(graph, node, blocks)
        self._stale = not self._fixed

    def recorded(self) -> dict[str, int]:
        """The table for a run's record; after a compilation with what it added, also where cached graphs were used."""
        if self._stale:
            with self._shared():
                pass
            self._stale = False
        return dict(self.table)

    @contextlib.contextmanager
    def _shared(self) -> Iterator[None]:
        """``table`` is the machine's, and nobody else changes it meanwhile; what is added is there for everyone afterwards.

        Where the cache's folder cannot be written, the table is this process's own, and so is its id.
        """
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            lock = self._file.with_suffix(".lock").open("w")
        except OSError:
            yield
            return
        with lock:
            with contextlib.suppress(ImportError, OSError):  # a system without such locks
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._read()
            yield
            if self.table != before:
                with contextlib.suppress(CheckpointError):
                    write_json(self._file, {"id": self._id, "products": self.table})

    def _read(self) -> dict[str, int] | None:
        """Take over the machine's table, if there is one."""
        try:
            found = json.loads(self._file.read_text())
            name, products = str(found["id"]), {str(name): int(blocks) for name, blocks in found["products"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        self._id, self.table = name, products
        return dict(products)

    def _blocks(self, node: fx.Node) -> int:
        a, b = (x.meta["val"] for x in _factors(node))
        if any(x.meta["val"].ndim != 1 for x in _inputs(node)[:-2]):  # a matrix is added: its rows would have to be split too
            return 1
        if not (a.dtype == b.dtype == torch.bfloat16 and a.device.type == "cpu" and all(isinstance(n, int) for n in (*a.shape, *b.shape))):
            return 1
        threads = torch.get_num_threads()
        if threads == 1 or a.shape[0] % threads or 2 * a.shape[0] * a.shape[1] * b.shape[1] < SMALLEST:
            return 1
        name = f"{'x'.join(map(str, (*a.shape, b.shape[1])))} {_layout(a)}{_layout(b)}{' bias' if len(_inputs(node)) == 3 else ''}"
        if name not in self.table and not self._fixed:
            self.table[name] = threads if faster_in_blocks(a, b, threads) else 1
        return self.table.get(name, 1)


def faster_in_blocks(a: Tensor, b: Tensor, blocks: int) -> bool:
    """Time the product of matrices of these shapes and strides, whole and in blocks of rows, in turns; medians are compared."""
    with unset_fake_temporarily(), torch.no_grad():
        x, y = (torch.randn(m.shape[0] * m.shape[1]).to(m.dtype).as_strided(m.shape, _dense(m)) for m in (a, b))
        whole, split = (statistics.median(taken[1:]) for taken in _timed(lambda: x @ y, lambda: torch.cat([part @ y for part in x.chunk(blocks)])))
    return split < PAYS * whole


def _timed(*ways: Callable[[], Tensor]) -> list[list[float]]:
    """Seconds of each way, taking turns; the first of each pays for its memory."""
    seconds: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + SECONDS
    while len(seconds[0]) < 5 or (len(seconds[0]) < 25 and time.perf_counter() < end):
        for way, taken in zip(ways, seconds, strict=True):
            begin = time.perf_counter()
            way()
            taken.append(time.perf_counter() - begin)
    return seconds


def _split(graph: fx.Graph, node: fx.Node, blocks: int) -> None:
    aten = torch.ops.aten
    a, b = _factors(node)
    value, rows = node.meta["val"], a.meta["val"].shape[0] // blocks
    pieces = []
    with graph.inserting_before(node):
        for i in range(blocks):
            part = graph.call_function(aten.slice.Tensor, (a, 0, i * rows, (i + 1) * rows))
            part.meta["val"] = a.meta["val"][i * rows : (i + 1) * rows]
            piece = graph.call_function(node.target, (*_inputs(node)[:-2], part, b), dict(node.kwargs))  # type: ignore[arg-type]
            piece.meta["val"] = value[:rows]
            pieces.append(piece)
        whole = graph.call_function(aten.cat.default, (pieces, 0))
        whole.meta.update(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(x for x in node.args if isinstance(x, fx.Node))


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    a, b = _inputs(node)[-2:]
    return a, b


def _layout(m: Tensor) -> str:
    """``r`` for rows one after another, ``c`` for columns."""
    return "r" if m.stride(1) == 1 else "c"


def _dense(m: Tensor) -> tuple[int, int]:
    return (m.shape[1], 1) if _layout(m) == "r" else (1, m.shape[0])

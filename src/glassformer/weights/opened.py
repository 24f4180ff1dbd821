"""Opening a checkpoint: what it is, without reading it; then the model, when it is asked for.

opened = weights.open(path)            a folder, a .gguf file, hf://owner/name: headers only
print(opened)                          family, sizes, types, how many tensors
opened.spec                            the Spec of the model: change it before it is loaded, if you like
model, report = opened.load(dtype=torch.bfloat16)

path ─► source ─► config ─► family ─► Spec ─► model without memory ─► plan ─► load: parameter by parameter
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glassformer.core.errors import WeightsError
from glassformer.core.fields import typed
from glassformer.core.numerics import device_named, dtype_named
from glassformer.models.anatomy import bytes_of

from . import assign, holding, own, sentence
from .assign import Filling, Plan
from .family import Family, family_of
from .quantise import check as check_quantise, dtype_for, quantisable, quantise as quantise_all, quantise_layer
from .source import Found, find, read_json
from .stored import Stored

if TYPE_CHECKING:
    from glassformer.text import Tokenizer

SETTINGS = "generation_config.json"
READERS = 2  # threads that read tensors: more only wait for each other (docs/log.md)


@dataclass(frozen=True)
class Report:
    """What loading did: every tensor used, repeated, or left over and why; nothing is missing, or there would be no report."""

    source: Path
    family: str
    used: dict[str, tuple[str, ...]]
    """Their tensors by our parameter."""
    tied: dict[str, str]
    """Tensors that repeat another one."""
    left: dict[str, str]
    """Tensors that were not used, and why that is no harm."""
    dtype: str
    bytes: int
    seconds: float
    assumed: tuple[str, ...] = ()
    """What a GGUF file has no word for, and what is taken for granted in its place."""

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.family}",
            f"  {sum(map(len, self.used.values())):,} tensors fill {len(self.used):,} parameters, {self.bytes / 1e6:,.1f} MB in {self.dtype}, "
            f"{self.seconds:.2f} s ({self.bytes / 1e9 / max(self.seconds, 1e-9):.2f} GB/s)",
            "  missing: none",
        ]
        lines += [f"  assumed: {sentence}" for sentence in self.assumed]
        lines += [f"  repeats another: {copy} = {original}" for copy, original in self.tied.items()]
        for why in dict.fromkeys(self.left.values()):
            names = [n for n, w in self.left.items() if w == why]
            lines.append(f"  left over, {why}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if names[4:] else ''}")
        return "\n".join(lines)


@typed(WeightsError)
def open(path: str | os.PathLike[str], ignore: Sequence[str] = ()) -> Opened:
    """Open a checkpoint: its headers are read and settled, its tensors are not.

    ``path``: a folder in the Hugging Face format or our own, a .gguf file, or ``hf://owner/name@revision``. ``ignore``: fields of config.json that
    are not understood here and that you know to change nothing. Raises :class:`WeightsError` saying what does not fit.
    """
    found = find(path)
    if found.kind == "own":
        return Opened(found, None, own.spec_of(own.find(found.path)), tuple(ignore))
    if found.kind == "gguf":
        from .families import gguf_names

        found.config = {**gguf_names.config(found.metadata, found.tensors, found.path), **_special_ids(found.metadata)}
    family = family_of(found.config, found.config_file)
    spec = family.read(found.config, found.config_file, ignore)
    if found.kind == "hf":
        spec = sentence.with_modules(spec, found.path)
    if found.kind == "gguf":
        family, spec = gguf_names.dialect(family, spec, found.tensors)
    return Opened(found, family, spec, tuple(ignore))


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a GGUF file names, in the words of a config.json; a chat model may end a text and a turn by different ones."""
    ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    found: dict[str, Any] = {
        f"{ours}_token_id": ids[theirs] for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")) if type(ids[theirs]) is int
    }
    if type(ids["eot"]) is int and ids["eot"] != ids["eos"]:
        found["eos_token_id"] = [i for i in (ids["eos"], ids["eot"]) if type(i) is int]
    return found


@dataclass
class Opened:
    """A checkpoint whose tensors are still in its files. ``spec`` may be replaced before loading, as long as the parameters stay the same."""

    found: Found
    family: Family | None
    spec: Any
    ignore: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``"hf"``, ``"gguf"`` or ``"own"``."""
        return self.found.kind

    @property
    def path(self) -> Path:
        """The folder or file."""
        return self.found.path

    @property
    def config(self) -> dict[str, Any]:
        """The fields of config.json (of a GGUF file: its metadata in their words)."""
        return self.found.config

    @property
    def tensors(self) -> dict[str, Stored]:
        """Every tensor by its name in the file; nothing is read."""
        return self.found.tensors

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that comes with it, or None."""
        if self.kind == "gguf":
            from glassformer.text.from_gguf import tokenizer_from_gguf

            return None if self.found.metadata.get("tokenizer.ggml.model", "none") == "none" else tokenizer_from_gguf(self.found.metadata)
        from glassformer.text.folder import tokenizer_of_folder

        return tokenizer_of_folder(own.find(self.path) if self.kind == "own" else self.path)

    @cached_property
    def generation(self) -> dict[str, Any]:
        """The generation settings that come with it (``generation_config.json``)."""
        file = self.path / SETTINGS
        return read_json(file) if self.kind != "gguf" and file.exists() else {}

    @cached_property
    def assumed(self) -> tuple[str, ...]:
        """What a GGUF file has no word for, and what is taken for granted in its place; nothing of other formats."""
        if self.kind != "gguf":
            return ()
        from .families import gguf_names

        return gguf_names.assumed(self.found.metadata, self.found.tensors, self.found.path)

    @property
    def plan(self) -> Plan:
        """Which tensor fills which parameter."""
        return self._settled()[1]

    def _settled(self) -> tuple[Any, Plan]:
        """The model without memory, and its plan. Made anew for each model: a plan names places in it."""
        if self.family is None:
            raise WeightsError("A checkpoint in glassformer's own format has no family: its tensors bear the names of the parameters.")
        model = assign.skeleton(self.spec, self.tensors, self.path)
        return model, assign.plan(model, self.family, self.tensors, self.path)

    @typed(WeightsError)
    def load(
        self, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None, packed: bool = False, quantise: str | None = None
    ) -> tuple[Any, Report]:
        """The model in evaluation mode, and the report of every tensor.

        ``dtype`` None keeps the file's own type (float16 and quantised numbers become float32 on a CPU, which computes in neither).
        ``packed``: quantised matrices stay packed in memory and are unpacked at each use. ``quantise``: the matrices of the blocks become ``"int8"`` or
        ``"int4"`` (all else then bfloat16, if no type is asked for) as they are read (see :func:`glassformer.weights.quantise`).
        """
        start = time.perf_counter()
        where = device_named("cpu" if device is None else device)
        if packed and quantise is not None:
            raise WeightsError("packed=True keeps the file's own quantised matrices, quantise makes new ones: leave one of them out.")
        if packed and not any(s.quantised for s in self.tensors.values()):
            raise WeightsError(f"{self.path} holds no quantised tensors that could stay packed: leave packed out, or open a .gguf file.")
        if self.family is None:
            return self._load_own(dtype, where, start, quantise)
        model, plan = self._settled()
        kind = self._usual_dtype(where) if dtype is None else dtype_named(dtype)
        if not kind.is_floating_point:
            raise WeightsError(f"A model computes in a floating type, but {kind} was asked for: quantise='int8' keeps its matrices in 8 bits.")
        if quantise is not None:
            kind = dtype_for(quantise, kind) if dtype is None else kind
            check_quantise(quantise, where, kind)
        layers = {} if quantise is None else {f"{path}.weight": (path, layer) for path, layer in quantisable(model).items()}
        _check_tied(plan, self.tensors)
        kept: set[str] = set()
        if packed:
            from . import packing

            kept = packing.keep(model, plan, kind, where)
        model.to(kind)  # on the meta device: says the type of each parameter, which a part may keep wider than the rest
        for filling, x in _read_all([f for f in plan.fillings if f.path not in kept], model, where):
            own.assign(model, filling.path, x)
            if quantise is not None and filling.path in layers:  # at once, so that the model is never held in both types
                quantise_layer(*layers[filling.path], quantise)
        if hasattr(model, "tie"):
            model.tie()
        used = {f.path: tuple(s.name for s in f.stored) for f in plan.fillings}
        size = sum(bytes_of(x) for x in (*model.parameters(), *model.buffers()))
        name = str(kind).removeprefix("torch.") + (", quantised matrices packed" if packed else "") + _blocks_in(quantise)
        model.origin = own.origin({"config": self.config, "generation": self.generation})
        return model.eval(), Report(self.path, self.family.name, used, plan.tied, plan.left, name, size, time.perf_counter() - start, self.assumed)

    def _load_own(self, dtype: str | torch.dtype | None, device: torch.device, start: float, quantise: str | None) -> tuple[Any, Report]:
        if quantise == "int4" and dtype is None:
            dtype = torch.bfloat16
        model = own.load(self.path, device, dtype).model
        if quantise is not None:
            quantise_all(model, quantise)
        used: dict[str, tuple[str, ...]] = {name: (name,) for name, _ in model.named_parameters()}
        size = sum(bytes_of(x) for x in model.parameters())
        kind = str(next(model.parameters()).dtype).removeprefix("torch.") + _blocks_in(quantise)
        return model, Report(self.path, "glassformer's own format", used, {}, {}, kind, size, time.perf_counter() - start)

    def _usual_dtype(self, device: torch.device) -> torch.dtype:
        most = self.stored_dtype
        return torch.float32 if most == torch.float16 and device.type == "cpu" else most

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type that most numbers have in the file (float32 where they are quantised)."""
        sizes: dict[torch.dtype, int] = {}
        for s in self.tensors.values():
            if s.dtype.is_floating_point:
                sizes[s.dtype] = sizes.get(s.dtype, 0) + s.nbytes
        most = max(sizes, key=lambda t: sizes[t], default=torch.float32)
        return torch.float32 if most.itemsize == 1 else most

    def __repr__(self) -> str:
        if self.family is None:
            return f"{self.path}: glassformer's own format"
        types: dict[str, int] = {}
        for s in self.tensors.values():
            types[s.type] = types.get(s.type, 0) + s.nbytes
        stored = ", ".join(f"{n / 1e6:,.1f} MB {t}" for t, n in sorted(types.items(), key=lambda i: -i[1]))
        what = "GGUF file" if self.kind == "gguf" else "Hugging Face folder"
        return f"{self.path}: {self.family.name}, {what}, {len(self.tensors):,} tensors ({stored}), unread"


def _hold(loaded: own.Loaded, weights: str) -> own.Loaded:
    model, report = loaded.model, loaded.report
    if weights in holding.BLOCKS:
        holding.hold(model, weights)
    elif weights == "auto":
        model.to(holding.faster(model, next(model.parameters()).dtype))
    if report is None or weights not in (*holding.BLOCKS, "auto"):
        return loaded
    kind = str(next(model.parameters()).dtype).removeprefix("torch.") + (f", matrices in {weights} blocks" if weights in holding.BLOCKS else "")
    size = sum(bytes_of(x) for x in (*model.parameters(), *model.buffers()))
    return loaded._replace(report=replace(report, dtype=kind, bytes=size))


def _blocks_in(quantise: str | None) -> str:
    return "" if quantise is None else f", the blocks' matrices in {quantise}"


def _read_all(fillings: Sequence[Filling], model: Any, device: torch.device) -> Iterator[tuple[Filling, torch.Tensor]]:
    """Each parameter's values in turn. A few are read ahead: reading waits for the disk or copies memory, both without Python's lock."""

    def read(f: Filling) -> torch.Tensor:
        return _filled(f, like[f.path], device)

    like = {name: x.detach() for name, x in model.named_parameters()}
    with ThreadPoolExecutor(READERS) as readers:
        ahead: deque[tuple[Filling, Future[torch.Tensor]]] = deque()
        for filling in fillings:
            ahead.append((filling, readers.submit(read, filling)))
            if len(ahead) > READERS:
                done, x = ahead.popleft()
                yield done, x.result()
        for done, x in ahead:
            yield done, x.result()


def _filled(filling: Filling, like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter's values, read straight into its own memory where the form allows."""
    out = torch.empty_like(like, device="cpu")
    filling.form.fill(out, filling.stored, filling.place)
    if out.dtype == torch.float16 and any(s.type != "F16" for s in filling.stored) and not torch.isfinite(out).all():
        raise WeightsError(f"{filling.path} holds numbers that float16 cannot (above 65,504): load it as bfloat16 or float32.")
    return out.to(device)


def _check_tied(plan: Plan, tensors: dict[str, Stored]) -> None:
    """Raise :class:`WeightsError` if what the config calls one matrix is stored as two different ones."""
    for copy, original in plan.tied.items():
        a, b = tensors[copy], tensors[original]
        if a.shape != b.shape or not torch.equal(a.read(), b.read()):
            raise WeightsError(
                f"{a.file}: {copy!r} and {original!r} are one matrix by the config (tie_word_embeddings), but the file holds two different ones: "
                "set tie_word_embeddings to false in config.json if the model was trained so."
            )


@typed(WeightsError)
def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    packed: bool = False,
    quantise: str | None = None,
    weights: str | None = None,
) -> own.Loaded:
    """The model at ``path``, its tokenizer and settings: our own format, a Hugging Face folder, a .gguf file, or ``hf://owner/name``.

    In one word :func:`open` and :meth:`Opened.load`; of a foreign checkpoint ``extra`` holds its ``config`` and ``generation`` settings.
    ``weights``: how the matrices are held in memory, ``"float32"``, ``"bfloat16"``, ``"int8"``, ``"int4"`` or ``"auto"`` (see weights/holding.py); None: as
    ``dtype`` says.
    """
    if weights is not None:
        holding.check(weights, dtype, packed, quantise)
        return _hold(load(path, device, holding.dtype_for(weights, dtype)), weights)
    opened = open(path)
    if opened.family is None and not packed:
        loaded = own.load(opened.path, device, dtype)
        return loaded if quantise is None else loaded._replace(model=quantise_all(loaded.model, quantise))
    model, report = opened.load(dtype, device, packed=packed, quantise=quantise)
    return own.Loaded(model, opened.tokenizer, dict(model.origin), report)

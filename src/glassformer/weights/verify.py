"""Verifying a checkpoint: the same tokens through this library and through transformers, site by site.

    folder ──┬─► weights.open ──► model ───── tap ───► blocks.3.attn.q_rot, … ─┐
             │                                                                 ├─► largest error of each site, in the order
             └─► transformers ──► reference ─ hooks ─► outputs of its modules ─┘    of computation; where the first one arises

No family has a map of its own: the plan that loaded the model says which of their modules is the counterpart of which layer of ours
(``counterparts``). Streams and patterns come from the reference's own ``hidden_states`` and ``attentions``, queries and keys after
rotation from the arguments of its attention function.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, WeightsError
from glassformer.core.fields import typed
from glassformer.core.numerics import dtype_named
from glassformer.core.tap import Tap
from glassformer.models import Decoder

from .assign import Plan
from .counterparts import Seen, Sources
from .opened import Opened, open as open_checkpoint

ROWS, PLACES, TARGET = 2, 19, 13  # of the random tokens; odd, so that few models have as many heads


@dataclass(frozen=True)
class Compared:
    """One site of both models. ``relative``: ``error`` over the largest number that the reference has there."""

    site: str
    shape: tuple[int, ...]
    error: float
    relative: float


TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative errors that rounding alone makes, where it is not 1e-4: a few times the step of the type, over tens of layers."""


@dataclass(frozen=True)
class Verification:
    """What was compared, in the order of computation; ``alone`` are sites of ours without a counterpart in the reference."""

    source: str
    family: str
    reference: str
    dtype: str
    tolerance: float
    compared: tuple[Compared, ...]
    alone: tuple[str, ...] = field(repr=False)

    @property
    def first(self) -> Compared | None:
        """The first site whose relative error is beyond the tolerance."""
        return next((c for c in self.compared if not c.relative <= self.tolerance), None)

    @property
    def agrees(self) -> bool:
        """Whether no site differs by more than the tolerance, the model's output among those compared."""
        return self.first is None and any(c.site.endswith(("logits", "resid_final")) for c in self.compared)

    @property
    def verdict(self) -> str:
        """One sentence: that both agree, or where they part."""
        if (first := self.first) is None and not self.agrees:
            return "undecided: the sites that could be compared agree, but the model's output has no counterpart in the reference"
        if first is None:
            worst = max(self.compared, key=lambda c: c.relative)
            return f"agrees: {len(self.compared)} sites, largest relative error {worst.relative:.1e} ({worst.site})"
        at = self.compared.index(first)
        before = f"everything before agrees to {max(c.relative for c in self.compared[:at]):.1e}" if at else "nothing is computed before it"
        return f"first difference: {first.site}, absolute {first.error:.1e}, relative {first.relative:.1e}; {before}"

    @property
    def counts(self) -> str:
        """How much of the model was compared."""
        kinds = dict.fromkeys(_generic(s) for s in self.alone)
        without = f"; without a counterpart in it: {', '.join(kinds)}" if kinds else ""
        return f"{len(self.compared)} of {len(self.compared) + len(self.alone)} sites compared with {self.reference}{without}"

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        sites = [{"site": c.site, "shape": list(c.shape), "absolute": c.error, "relative": c.relative} for c in self.compared]
        head = {"source": self.source, "family": self.family, "reference": self.reference, "dtype": self.dtype, "tolerance": self.tolerance}
        return head | {"agrees": self.agrees, "first": None if self.first is None else self.first.site, "sites": sites, "alone": list(self.alone)}

    def __str__(self) -> str:
        width = max(len("site"), *(len(c.site) for c in self.compared))
        lines = [f"{'site':{width}}  {'max abs':>8}  {'max rel':>8}"]
        lines += [f"{c.site:{width}}  {c.error:8.1e}  {c.relative:8.1e}{'' if c.relative <= self.tolerance else '  differs'}" for c in self.compared]
        return "\n".join([*lines, "", self.counts, self.verdict])


@typed(WeightsError)
def verify(
    source: str | os.PathLike[str] | Opened, text: str | None = None, dtype: str | torch.dtype = "float32", tolerance: float | None = None
) -> Verification:
    """Run the same tokens through the checkpoint at ``source`` here and in transformers, and compare every site that both have.

    ``source``: a Hugging Face folder, or one that is opened (its ``spec`` may be changed). ``text``: what to run, by the checkpoint's own tokenizer;
    None runs fixed random tokens. ``dtype``: in which both compute. ``tolerance``: of the largest error at a site, relative to its largest number;
    None goes by the type: 1e-4 in float32, 1e-2 in float16, 5e-2 in bfloat16, whose roundings add up (and may send a token to other experts).
    Both models are held in memory. Raises :class:`WeightsError` if transformers is missing or cannot open the folder.
    """
    kind = dtype_named(dtype)
    tolerance = TOLERANCES.get(kind, 1e-4) if tolerance is None else tolerance
    if not tolerance > 0:
        raise WeightsError(f"tolerance={tolerance} would let nothing agree: give a number above 0, such as 1e-4.")
    opened = source if isinstance(source, Opened) else open_checkpoint(source)
    if opened.kind != "hf":
        what = "a GGUF file" if opened.kind == "gguf" else "glassformer's own format"
        raise WeightsError(f"{opened.path} is {what}, which transformers cannot be asked about: verify needs the Hugging Face folder that it was made from.")
    transformers = _transformers()
    model, _ = opened.load(dtype=kind)
    inputs = _tokens(opened, model, text)
    with _quiet(transformers):
        reference = _reference(transformers, opened, kind)
        seen = Seen(reference, _names_in_memory(reference, opened.plan))
        sources = Sources(model, opened.plan, seen)
        with seen.watching(), torch.no_grad():
            seen.output = reference(**_theirs_called(reference, inputs))
    tap = _Kept()
    with torch.no_grad():
        model(*inputs, tap=tap)
        compared, alone = _compare(tap.values, sources)
    return Verification(
        str(opened.path), getattr(opened.family, "name", ""), type(reference).__name__, str(kind).removeprefix("torch."), tolerance, compared, alone
    )


def _compare(values: dict[str, Tensor], sources: Sources) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
    """Each of our values beside the reference's, in the order of computation; and the sites that it does not have."""
    compared, alone = [], []
    for path, ours in values.items():
        theirs = _fit(sources.of[path](), ours) if path in sources.of else None
        if theirs is None:
            if not path.endswith((".result", ".scale")):  # made from what stands beside them, for observers only
                alone.append(path)
        else:
            compared.append(_difference(path, ours, theirs))
        for name, made, asked in sources.after.get(path, ()):
            y = made(ours)
            if y.ndim == 4 and y.shape[1] == y.shape[2]:  # as many heads as positions: which axis is which cannot be told
                continue
            if (theirs := _fit(asked(), y)) is not None:
                compared.append(_difference(name, y, theirs))
    if not compared:
        raise WeightsError("No module of the reference bears the names of this folder's tensors, so there is nothing to compare.")
    return tuple(compared), tuple(alone)


def _difference(site: str, ours: Tensor, theirs: Tensor) -> Compared:
    a, b = ours.double(), theirs.double()
    error, largest = float((a - b).abs().max()), float(b.abs().max())
    return Compared(site, tuple(ours.shape), error, error / largest if largest else error)


def _fit(theirs: Tensor | None, ours: Tensor) -> Tensor | None:
    """Their value in the shape of ours: rows in a line or heads joined are cut again, heads before positions change places; None if it has another."""
    if theirs is None:
        return None
    if theirs.shape == ours.shape:
        return theirs
    if theirs.ndim == 4 and ours.ndim == 4 and theirs.transpose(1, 2).shape == ours.shape:
        return theirs.transpose(1, 2)
    if theirs.ndim == ours.ndim + 1 and theirs.shape[1:] == ours.shape:  # [b t d] of what is [t d] here: all rows are alike
        return theirs[0]
    same = theirs.numel() == ours.numel() and theirs.ndim != 4
    return theirs.reshape(ours.shape) if same else None


class _Kept(Tap):
    """Keeps every value that a pass computes, in order; of the costly ones made for observers only the patterns."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def visit(self, path: str, x: Tensor) -> Tensor:
        self.values[path] = x
        return x

    def offer(self, path: str, compute: Callable[[tuple[int, ...] | None], Tensor]) -> None:
        if path.endswith((".pattern", ".k")):
            self.values[path] = compute(None)


# The reference


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise WeightsError("verify compares with the transformers library, which is not installed: pip install transformers.") from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the reference library's warnings and progress bars."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reference(transformers: Any, opened: Opened, dtype: torch.dtype) -> Any:
    """The folder as transformers opens it, with attention in plain arithmetic."""
    names = opened.config.get("architectures") or []
    maker = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if maker is None:
        maker = transformers.AutoModelForCausalLM if isinstance(opened.spec, Decoder) else transformers.AutoModel
    try:
        return maker.from_pretrained(opened.path, dtype=dtype, attn_implementation="eager", local_files_only=True, use_safetensors=True).eval()
    except Exception as error:
        raise WeightsError(f"{opened.path} cannot be opened by transformers {transformers.__version__}: {str(error).strip().splitlines()[0]}") from error


def _theirs_called(reference: Any, inputs: Sequence[Tensor]) -> dict[str, Any]:
    ids = {"input_ids": inputs[0], "attention_mask": torch.ones_like(inputs[0])}
    if len(inputs) > 1:
        ids["decoder_input_ids"] = inputs[1]
    options: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True, "return_dict": True}
    if hasattr(reference.config, "use_cache"):
        options["use_cache"] = False
    return ids | options


def _tokens(opened: Opened, model: Any, text: str | None) -> tuple[Tensor, ...]:
    """The tokens to run: [b t], and of an encoder-decoder a target too."""
    both = hasattr(model, "encoder")
    spec: Any = model.encoder.spec if both else model.spec
    if text is not None:
        if opened.tokenizer is None:
            raise InputError(f"{opened.path} has no tokenizer, so a text means nothing to its model: leave the text out to run random tokens.")
        ids = torch.tensor([opened.tokenizer.encode(text)])
        if not ids.numel():
            raise InputError("The text is empty: give at least one token, or leave it out to run random ones.")
        return (ids, ids) if both else (ids,)
    special = {v for k, v in opened.config.items() if k.endswith("_token_id") and isinstance(v, int)}
    ordinary = torch.tensor([i for i in range(spec.vocab_size) if i not in special])
    most = getattr(spec.position, "max_positions", PLACES)
    chosen = ordinary[torch.randint(len(ordinary), (ROWS, min(PLACES, most)), generator=torch.Generator().manual_seed(0))]
    return (chosen, chosen.flip(1)[:, :TARGET].contiguous()) if both else (chosen,)


def _names_in_memory(reference: Any, plan: Plan) -> dict[str, tuple[str, ...]]:
    """Of each of our parameters: the tensors that fill it, by the names that they have in the reference once it is loaded.

    These differ from the names in the file where the library has renamed or merged modules since the file was written.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(reference)
    renamings = [c for c in changes if isinstance(c, WeightRenaming)]
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    state = reference.state_dict()

    def renamed(name: str) -> str:
        return rename_source_key(name.split("[")[0], renamings, converters, reference.base_model_prefix, state)[0]

    return {f.path: tuple(dict.fromkeys(renamed(s.name) for s in f.stored)) for f in plan.fillings}


def _generic(path: str) -> str:
    return ".".join("*" if s.isdigit() else s for s in path.split("."))

"""Verifying a checkpoint: the same tokens through this library and through transformers, site by site.

    folder ──┬─► weights.open ──► model ───── tap ───► blocks.3.attn.q_rot, … ─┐
             │                                                                 ├─► largest error of each site, in the order
             └─► transformers ──► reference ─ hooks ─► outputs of its modules ─┘    of computation; where the first one arises

No family has a map of its own. The plan that loaded the model says which tensors fill which parameter, so the module that
owns ``model.layers.3.self_attn.o_proj.weight`` makes what the layer ``blocks.3.attn.out`` makes (its output) from what that
one reads (its input), and the form between the tensors says in which order the outputs of several modules are ours.
What a site is to a layer is a property of the part (``PARTS``). Streams and patterns come from the reference's own
``hidden_states`` and ``attentions``, queries and keys after rotation from the arguments of its attention function.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.errors import InputError, WeightsError
from glassformer.core.fields import typed
from glassformer.core.flow import Pass
from glassformer.core.numerics import dtype_named
from glassformer.core.tap import Tap
from glassformer.models import Decoder
from glassformer.models.transformer import TransformerModel
from glassformer.parts.attention import AttentionLayer, CrossAttentionLayer, _Attention
from glassformer.parts.embed import NoLift, Unit
from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.feedforward import GatedLayer, PlainLayer
from glassformer.parts.latent import LatentAttentionLayer
from glassformer.parts.norm import NoNormLayer
from glassformer.parts.wiring import SequentialBlock

from .assign import Plan
from .opened import Opened, open as open_checkpoint
from .rules import Place

PARTS: tuple[tuple[type, dict[str, tuple[str, tuple[str, ...]]]], ...] = (
    (AttentionLayer, {"qkv": ("in", ("q", "k", "v")), "out": ("z", ("out",))}),
    (CrossAttentionLayer, {"q": ("in", ("q",)), "kv": ("", ("k", "v")), "out": ("z", ("out",))}),
    (
        LatentAttentionLayer,
        {"q": ("in", ("q",)), "q_down": ("in", ()), "kv_down": ("in", ()), "q_up": ("q_latent", ("q",)), "kv_up": ("latent", ()), "out": ("z", ("out",))},
    ),
    (PlainLayer, {"up": ("in", ("pre",)), "down": ("post", ("out",))}),
    (GatedLayer, {"gate_up": ("in", ("gate", "pre")), "down": ("post", ("out",))}),
)
"""Of each part: its linear layers, the site that each reads, and the sites that its output is cut into."""

ROWS, PLACES, TARGET = 2, 19, 13  # of the random tokens; odd, so that few models have as many heads


@dataclass(frozen=True)
class Compared:
    """One site of both models. ``relative``: ``error`` over the largest number that the reference has there."""

    site: str
    shape: tuple[int, ...]
    error: float
    relative: float


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
        """Whether no site differs by more than the tolerance."""
        return self.first is None

    @property
    def verdict(self) -> str:
        """One sentence: that both agree, or where they part."""
        if (first := self.first) is None:
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
    source: str | os.PathLike[str] | Opened, text: str | None = None, dtype: str | torch.dtype = "float32", tolerance: float = 1e-4
) -> Verification:
    """Run the same tokens through the checkpoint at ``source`` here and in transformers, and compare every site that both have.

    ``source``: a Hugging Face folder, or one that is opened (its ``spec`` may be changed). ``text``: what to run, by the checkpoint's own tokenizer;
    None runs fixed random tokens. ``dtype``: in which both compute. ``tolerance``: of the largest error at a site, relative to its largest number.
    Both models are held in memory. Raises :class:`WeightsError` if transformers is missing or cannot open the folder.
    """
    if not tolerance > 0:
        raise WeightsError(f"tolerance={tolerance} would let nothing agree: give a number above 0, such as 1e-4.")
    kind = dtype_named(dtype)
    opened = source if isinstance(source, Opened) else open_checkpoint(source)
    if opened.kind != "hf":
        what = "a GGUF file" if opened.kind == "gguf" else "glassformer's own format"
        raise WeightsError(f"{opened.path} is {what}, which transformers cannot be asked about: verify needs the Hugging Face folder that it was made from.")
    transformers = _transformers()
    model, _ = opened.load(dtype=kind)
    inputs = _tokens(opened, model, text)
    with _quiet(transformers):
        reference = _reference(transformers, opened, kind)
        seen = _Seen(reference, _names_in_memory(reference, opened.plan))
        sources = _Sources(model, opened.plan, seen)
        with seen.watching(), torch.no_grad():
            seen.output = reference(**_theirs_called(reference, inputs))
    tap = _Kept()
    with torch.no_grad():
        model(*inputs, tap=tap)
        compared, alone = _compare(tap.values, sources)
    return Verification(
        str(opened.path), getattr(opened.family, "name", ""), type(reference).__name__, str(kind).removeprefix("torch."), tolerance, compared, alone
    )


def _compare(values: dict[str, Tensor], sources: _Sources) -> tuple[tuple[Compared, ...], tuple[str, ...]]:
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


@dataclass
class _Call:
    """One call of a module: the first tensor that it was given, the first that it gave."""

    given: Tensor
    made: Tensor


class _Seen:
    """What the reference computes: calls of its modules, arguments of its attention function, its output."""

    def __init__(self, reference: Any, names: dict[str, tuple[str, ...]]):
        self.reference, self.names = reference, names
        self.modules = dict(reference.named_modules(remove_duplicate=False))
        self.wanted: dict[int, nn.Module] = {}
        self.calls: dict[int, list[_Call]] = {}
        self.attention: dict[int, list[tuple[Tensor, Tensor, Tensor, float]]] = {}
        self.output: Any = None

    def owners(self, parameter: str) -> tuple[str, ...]:
        """The modules whose weights fill one of our parameters; none where it is filled by something else."""
        found = tuple(n.rpartition(".")[0] for n in self.names.get(parameter, ()) if n.endswith((".weight", ".bias")))
        return found if found and len(found) == len(self.names[parameter]) and all(f in self.modules for f in found) else ()

    def want(self, name: str) -> nn.Module:
        """A module that is to be watched."""
        module = self.modules[name]
        self.wanted[id(module)] = module
        return module

    def call(self, module: nn.Module, number: int) -> _Call | None:
        """What one call of a watched module read and made."""
        calls = self.calls.get(id(module), [])
        return calls[number] if number < len(calls) else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the reference runs: hooks on the wanted modules, a listener at its attention function."""
        hooks = [m.register_forward_hook(self._keep, with_kwargs=True) for m in self.wanted.values()]
        name = "eager_attention_forward"
        files = {type(m).__module__: sys.modules[type(m).__module__] for m in self.reference.modules()}
        replaced = {file: getattr(file, name) for file in files.values() if hasattr(file, name)}
        for file, function in replaced.items():
            setattr(file, name, self._listening(function))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for file, function in replaced.items():
                setattr(file, name, function)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        given = next((x for x in (*args, *options.values()) if isinstance(x, Tensor)), None)
        made = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and isinstance(output[0], Tensor) else None
        if given is not None and made is not None:  # copies: the reference may add to its values in place
            self.calls.setdefault(id(module), []).append(_Call(given.clone(), made.clone()))

    def _listening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            # A third positional argument after the mask is the scale; some functions have their own, the usual one.
            scale = args[1] if len(args) > 1 and isinstance(args[1], float) else options.get("scaling")
            self.attention.setdefault(id(module), []).append((query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale)))
            return function(module, query, key, value, *args, **options)

        return attend


# Who is whose counterpart


class _Sources:
    """``of``: of our sites, what gives the reference's value; ``after``: values of ours that are no sites, made from one, and theirs."""

    def __init__(self, model: Any, plan: Plan, seen: _Seen):
        self.of: dict[str, Callable[[], Tensor | None]] = {}
        self.after: dict[str, list[tuple[str, Callable[[Tensor], Tensor], Callable[[], Tensor | None]]]] = {}
        self.seen, self.forms = seen, {f.path: f for f in plan.fillings}
        self._turns: dict[tuple[str, ...], int] = {}
        for root, half, kind in (("encoder.", model.encoder, "encoder_"), ("decoder.", model.decoder, "decoder_")) if hasattr(model, "encoder") else (
            ("", model, ""),
        ):
            self._stack(root, half, kind)

    def _stack(self, root: str, model: TransformerModel, kind: str) -> None:
        """A decoder or encoder: embedding, blocks, final norm, logits."""
        e = model.spec.embedding
        table = self.seen.owners(f"{root}embed.weight")
        scaled = isinstance(e.scale, Unit) or (table and hasattr(self.seen.modules[table[0]], "embed_scale"))  # else it is scaled by whoever asked it
        if scaled and isinstance(e.lift, NoLift) and not e.n_types:
            self._made(f"{root}embed", f"{root}embed.weight")
        self._made(f"{root}pos_embed", f"{root}position.table")
        streams = lambda i: self._part_of(f"{kind}hidden_states", i, len(model.blocks) + 1)
        patterns = lambda i: self._part_of(f"{kind}attentions", i, len(model.blocks))
        across = lambda i: self._part_of("cross_attentions", i, len(model.blocks))
        for i, block in enumerate(model.blocks):
            path = f"{root}blocks.{i}"
            self._block(path, block)
            self.of[f"{path}.resid_pre"] = lambda i=i: streams(i)
            self.of[f"{path}.attn.pattern"] = lambda i=i: patterns(i)
            self.of[f"{path}.cross.pattern"] = lambda i=i: across(i)
            if i + 1 < len(model.blocks):
                self.of[f"{path}.resid_post"] = lambda i=i: streams(i + 1)
        last = f"{root}blocks.{len(model.blocks) - 1}.resid_post"
        if isinstance(model.final_norm, NoNormLayer):
            self.of[last] = self.of[f"{root}resid_final"] = lambda: streams(len(model.blocks))
        else:
            self._made(f"{root}resid_final", f"{root}final_norm.weight", given=last)
            self.of.setdefault(f"{root}resid_final", lambda: streams(len(model.blocks)))
        self.of[f"{root}logits"] = lambda: getattr(self.seen.output, "logits", None)

    def _block(self, path: str, block: Any) -> None:
        """Sublayers and norms of one block."""
        for name in block.order:
            part = getattr(block, name)
            if isinstance(part, ExpertsLayer):
                self._experts(f"{path}.{name}", part)
            else:
                self._part(f"{path}.{name}", part)
        if isinstance(block, SequentialBlock):
            read = ""  # the stream that a sublayer's norm reads; the first one's is the block's own
            for name, before, out, after in block.steps:
                stream = {"attn": "resid_mid", "cross": "resid_mid_cross"}.get(name, "resid_post")
                if before:
                    self._made(f"{path}.{name}.in", f"{path}.{before}.weight", given=read and f"{path}.{read}")
                read = stream
                if out:
                    self._recomputed(f"{path}.{name}.out", f"{path}.{out}", getattr(block, out))
                if after:
                    self._made(f"{path}.{stream}", f"{path}.{after}.weight")
        else:
            for name, before in block.steps:
                self._made(f"{path}.{name}.in", f"{path}.{before}.weight", turn=0)

    def _part(self, path: str, part: Any) -> None:
        """The linear layers of one part: what they read, and what they make, cut into its sites."""
        linears = next((table for kind, table in PARTS if isinstance(part, kind)), {})
        for name, (given, made) in linears.items():
            owners = self.seen.owners(f"{path}.{name}.weight") if hasattr(part, name) else ()
            if not owners:
                continue
            calls = self._calls(owners)
            if given:
                self.of[f"{path}.{given}"] = lambda calls=calls: None if (c := calls()) is None else c[0].given
            order = self._order(f"{path}.{name}.weight", calls_of=len(owners))
            widths = Place(part, name).widths if len(made) > 1 else (-1,)
            for j, site in enumerate(made):
                self.of[f"{path}.{site}"] = lambda calls=calls, order=order, widths=widths, j=j: _cut(calls(), order, widths, j)
        if isinstance(part, _Attention):
            self._rotated(path, part, next(iter(linears)))

    def _rotated(self, path: str, part: Any, first: str) -> None:
        """Norms of queries and keys, and both as they meet: the reference's attention function is asked by the module around its projections."""
        for own, site in (("q_norm", "q"), ("k_norm", "k")) if not isinstance(part, LatentAttentionLayer) else ():
            norm = getattr(part, own)
            if not isinstance(norm, NoNormLayer):
                leaf = "norm.weight" if hasattr(norm, "norm") else "weight"
                self._recomputed(f"{path}.{site}", f"{path}.{own}", norm, f"{path}.{own}.{leaf}")
        if isinstance(part, LatentAttentionLayer):
            self._made(f"{path}.latent", f"{path}.kv_norm.weight")
            if not isinstance(part.q_norm, NoNormLayer):
                self._made(f"{path}.q_latent", f"{path}.q_norm.weight")
            first = first if hasattr(part, first) else "q_down"
        owners = self.seen.owners(f"{path}.{first}.weight")
        if not owners or (isinstance(part, AttentionLayer) and not self._heads_whole(path, part)):
            return
        around = self.seen.modules[owners[0].rpartition(".")[0]]
        turn = self._turn((f"attention of {owners[0].rpartition('.')[0]}",))

        def asked(which: int) -> Tensor | None:
            found = self.seen.attention.get(id(around), [])
            if turn >= len(found):
                return None
            *qkv, scale = found[turn]
            x = qkv[which]
            x = (x[:, :: x.shape[1] // part.n_kv_heads] if which and x.shape[1] > part.n_kv_heads else x).transpose(1, 2)
            if which < 2 and isinstance(part, LatentAttentionLayer):
                plain = self.of[f"{path}.q"]() if f"{path}.q" in self.of else None
                x = None if plain is None else _together(x, qkv[0].transpose(1, 2), plain, part.d_rope)
            return x * (scale / part.scale) if x is not None and which == 0 else x  # the scale may already be in the queries

        self.of[f"{path}.q_rot"], self.of[f"{path}.k_rot"] = lambda: asked(0), lambda: asked(1)
        self.of.setdefault(f"{path}.v", lambda: asked(2))

    def _heads_whole(self, path: str, part: AttentionLayer) -> bool:
        """Whether features keep their order within a head between the reference and us (some families turn pairs that stand elsewhere)."""
        order = self._order(f"{path}.qkv.weight", calls_of=1)
        if order is None:
            return False
        q = order[: part.widths[0]].view(part.n_heads, -1)
        return bool((q.diff(dim=1) == 1).all() and (q[:, 0].diff() > 0).all())

    def _experts(self, path: str, part: ExpertsLayer) -> None:
        """The module around all experts and their router: the innermost that holds all their parameters and no others."""
        if part.shared is not None:
            self._part(f"{path}.shared", part.shared)
        mine = {n for ours, names in self.seen.names.items() if ours.startswith(f"{path}.") for n in names}
        around = _common(mine)
        module = self.seen.modules.get(around)
        if module is None or {f"{around}.{n}" for n, _ in module.named_parameters()} - mine:
            return
        calls = self._calls((around,))
        self.of[f"{path}.in"] = lambda: None if (c := calls()) is None else c[0].given
        self.of[f"{path}.out"] = lambda: None if (c := calls()) is None else c[0].made

    def _made(self, site: str, parameter: str, given: str = "", turn: int | None = None) -> None:
        """A site that is what the owner of a parameter makes (and ``given`` what it reads)."""
        owners = self.seen.owners(parameter)
        if len(owners) == 1:
            calls = self._calls(owners, turn)
            self.of[site] = lambda: None if (c := calls()) is None else c[0].made
            if given:
                self.of[given] = lambda: None if (c := calls()) is None else c[0].given

    def _recomputed(self, site: str, name: str, norm: Any, parameter: str | None = None) -> None:
        """A norm whose output is no site: ours is made again from the site that it reads."""
        owners = self.seen.owners(parameter or f"{name}.weight")
        if len(owners) == 1:
            calls = self._calls(owners)
            index = torch.arange(1)
            made = lambda x: norm(x, Pass(positions=index, index=index))
            self.after.setdefault(site, []).append((name, made, lambda: None if (c := calls()) is None else c[0].made))

    def _calls(self, owners: tuple[str, ...], turn: int | None = None) -> Callable[[], list[_Call] | None]:
        """The calls of their modules that belong to one layer of ours: where several of ours share a module, each has its turn."""
        modules = [self.seen.want(o) for o in owners]
        number = self._turn(owners) if turn is None else turn

        def calls() -> list[_Call] | None:
            found = [self.seen.call(m, number) for m in modules]
            return None if any(c is None for c in found) else [c for c in found if c is not None]

        return calls

    def _turn(self, owners: tuple[str, ...]) -> int:
        number = self._turns.get(owners, 0)
        self._turns[owners] = number + 1
        return number

    def _order(self, parameter: str, calls_of: int) -> Tensor | None:
        """Which of their outputs, one after another, each of ours is: the form applied to their numbers; None if it does more than move rows."""
        filling = self.forms[parameter]
        linear = self.seen.reference.get_submodule(self.seen.owners(parameter)[0])
        rows = [s.shape[0] if not _transposed(linear) else s.shape[-1] for s in filling.stored]
        starts = [sum(rows[:i]) for i in range(len(rows))]
        numbers = [torch.arange(n, dtype=torch.float64) + at for n, at in zip(rows, starts, strict=True)]
        try:
            ours = filling.form.ours(numbers, filling.place).flatten().long()
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        return ours if torch.equal(ours.sort().values, torch.arange(sum(rows))) else None

    def _part_of(self, name: str, i: int, n: int) -> Tensor | None:
        """Element ``i`` of one of the output's lists, if it has one for each of ``n``."""
        found = getattr(self.seen.output, name, None)
        return found[i] if found is not None and len(found) == n else None


def _cut(calls: list[_Call] | None, order: Tensor | None, widths: tuple[int, ...], j: int) -> Tensor | None:
    """Site ``j`` of what a layer makes: the outputs of their modules, in our order, cut by our widths."""
    if calls is None or order is None:
        return None
    joined = torch.cat([c.made for c in calls], -1)
    if joined.shape[-1] != len(order):
        return None
    joined = joined[..., order]
    return joined if widths == (-1,) else joined.split(widths, -1)[j]


def _together(x: Tensor, q: Tensor, plain: Tensor, d_rope: int) -> Tensor | None:
    """``x`` [b t h k] with the pairs that turn together side by side, as they are projected; some references pull them apart as they turn them.

    Told from their own queries at the first position, where nothing has turned: ``q`` after and ``plain`` before (up to a factor, as YaRN has).
    """
    before = plain.reshape(q.shape)[:, 0, :, -d_rope:].double()
    after, pulled = q[:, 0, :, -d_rope:].double(), torch.cat([before[..., ::2], before[..., 1::2]], -1)
    for order, kept in ((slice(None), before), (torch.arange(d_rope).view(2, -1).T.flatten(), pulled)):
        factor = (after * kept).sum() / (kept * kept).sum()
        if torch.allclose(after, factor * kept, rtol=1e-2, atol=1e-2 * float(after.abs().max())):
            return torch.cat([x[..., :-d_rope], x[..., -d_rope:][..., order]], -1)
    return None


def _transposed(linear: nn.Module) -> bool:
    """Whether their layer holds its matrix input by output."""
    return type(linear).__name__ == "Conv1D"


def _common(names: set[str]) -> str:
    """The innermost module that all of these parameters lie in."""
    split = [n.split(".")[:-1] for n in names]
    shared = []
    for pieces in zip(*split, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared)


def _generic(path: str) -> str:
    return ".".join("*" if s.isdigit() else s for s in path.split("."))

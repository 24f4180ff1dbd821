"""Counterparts: which value of a reference model each site of ours has beside it.

    plan ── names of tensors ──► modules of the reference ── hooks ──► what each of their calls read and made (Seen)
                                                                         │
    model ── parts, wiring ──► sites ──────────────────────── Sources ───┴──► the reference's value of a site

The module that owns the tensor ``o_proj.weight`` makes what the layer filled by it makes: its output is ``attn.out`` and its input ``attn.z``.
What a layer's input and output are called is a property of the part (``PARTS``); where several modules fill one layer (queries, keys, values),
the form between their tensors and ours says in which order their outputs are ours. Nothing here knows a family.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.flow import Pass
from glassformer.models.transformer import TransformerModel
from glassformer.parts.attention import AttentionLayer, CrossAttentionLayer, _Attention
from glassformer.parts.embed import NoLift, Unit
from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.feedforward import GatedLayer, PlainLayer
from glassformer.parts.latent import LatentAttentionLayer
from glassformer.parts.norm import NoNormLayer
from glassformer.parts.wiring import SequentialBlock

from .assign import Plan
from .rules import Place

Source = Callable[[], Tensor | None]
"""Asked once the reference has run: its value, or None if it has none."""

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


@dataclass
class Call:
    """One call of a module: the first tensor that it was given, the first that it gave."""

    given: Tensor
    made: Tensor


Calls = Callable[[], list[Call] | None]
"""The calls of the modules that fill one layer, in the order of its tensors."""


class Seen:
    """What the reference computes: calls of its modules, arguments of its attention function, its output."""

    def __init__(self, reference: Any, names: dict[str, tuple[str, ...]]):
        self.reference, self.names = reference, names
        self.modules = dict(reference.named_modules(remove_duplicate=False))
        self.wanted: dict[int, nn.Module] = {}
        self.calls: dict[int, list[Call]] = {}
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

    def call(self, module: nn.Module, number: int) -> Call | None:
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
            self.calls.setdefault(id(module), []).append(Call(given.clone(), made.clone()))

    def _listening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
            # A third positional argument after the mask is the scale; some functions have their own, the usual one.
            scale = args[1] if len(args) > 1 and isinstance(args[1], float) else options.get("scaling")
            self.attention.setdefault(id(module), []).append((query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale)))
            return function(module, query, key, value, *args, **options)

        return attend


# Who is whose counterpart


class Sources:
    """``of``: of our sites, what gives the reference's value; ``after``: values of ours that are no sites, made from one, and theirs."""

    def __init__(self, model: Any, plan: Plan, seen: Seen):
        self.of: dict[str, Source] = {}
        self.after: dict[str, list[tuple[str, Callable[[Tensor], Tensor], Source]]] = {}
        self.seen, self.forms = seen, {f.path: f for f in plan.fillings}
        self._turns: dict[tuple[str, ...], int] = {}
        if hasattr(model, "encoder"):
            self._stack("encoder.", model.encoder, "encoder_")
            self._stack("decoder.", model.decoder, "decoder_")
        else:
            self._stack("", model, "")

    def _stack(self, root: str, model: TransformerModel, kind: str) -> None:
        """A decoder or encoder: embedding, blocks, final norm, logits."""
        e = model.spec.embedding
        table = self.seen.owners(f"{root}embed.weight")
        scaled = isinstance(e.scale, Unit) or (table and hasattr(self.seen.modules[table[0]], "embed_scale"))  # else it is scaled by whoever asked it
        if scaled and isinstance(e.lift, NoLift) and not e.n_types:
            self._made(f"{root}embed", f"{root}embed.weight")
        self._made(f"{root}pos_embed", f"{root}position.table")
        n = len(model.blocks)
        for i, block in enumerate(model.blocks):
            path = f"{root}blocks.{i}"
            self._block(path, block)
            self.of[f"{path}.resid_pre"] = self._listed(f"{kind}hidden_states", i, n + 1)
            self.of[f"{path}.attn.pattern"] = self._listed(f"{kind}attentions", i, n)
            self.of[f"{path}.cross.pattern"] = self._listed("cross_attentions", i, n)
            if i + 1 < n:
                self.of[f"{path}.resid_post"] = self._listed(f"{kind}hidden_states", i + 1, n + 1)
        last, final = f"{root}blocks.{n - 1}.resid_post", f"{root}resid_final"
        self.of[final] = self._listed(f"{kind}hidden_states", n, n + 1)
        if isinstance(model.final_norm, NoNormLayer):
            self.of[last] = self.of[final]
        else:
            self._made(final, f"{root}final_norm.weight", given=last)
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
                elif read and f"{path}.{name}.in" in self.of:  # the sublayer reads the stream itself
                    self.of.setdefault(f"{path}.{read}", self.of[f"{path}.{name}.in"])
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
                self.of[f"{path}.{given}"] = _given(calls)
            order = self._order(f"{path}.{name}.weight")
            widths = Place(part, name).widths if len(made) > 1 else (-1,)
            for j, site in enumerate(made):
                self.of[f"{path}.{site}"] = _cut(calls, order, widths, j)
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
            if which == 0:
                x: Tensor | None = qkv[0].transpose(1, 2) * (scale / part.scale)  # the scale may already be in the queries
            else:  # some references repeat keys and values for every query head
                x = qkv[which][:, :: max(1, qkv[which].shape[1] // part.n_kv_heads)].transpose(1, 2)
            if which < 2 and isinstance(part, LatentAttentionLayer):
                plain = self.of[f"{path}.q"]() if f"{path}.q" in self.of else None
                return None if x is None or plain is None else _together(x, qkv[0].transpose(1, 2), plain, part.d_rope)
            return x

        self.of[f"{path}.q_rot"], self.of[f"{path}.k_rot"] = lambda: asked(0), lambda: asked(1)
        self.of.setdefault(f"{path}.v", lambda: asked(2))

    def _heads_whole(self, path: str, part: AttentionLayer) -> bool:
        """Whether features keep their order within a head between the reference and us (some families turn pairs that stand elsewhere)."""
        order = self._order(f"{path}.qkv.weight")
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
        self.of[f"{path}.in"], self.of[f"{path}.out"] = _given(calls), _made(calls)

    def _made(self, site: str, parameter: str, given: str = "", turn: int | None = None) -> None:
        """A site that is what the owner of a parameter makes (and ``given`` what it reads)."""
        owners = self.seen.owners(parameter)
        if len(owners) == 1:
            calls = self._calls(owners, turn)
            self.of[site] = _made(calls)
            if given:
                self.of[given] = _given(calls)

    def _recomputed(self, site: str, name: str, norm: Any, parameter: str | None = None) -> None:
        """A norm whose output is no site: ours is made again from the site that it reads."""
        owners = self.seen.owners(parameter or f"{name}.weight")
        if len(owners) == 1:
            calls = self._calls(owners)
            index = torch.arange(1)
            made = lambda x: norm(x, Pass(positions=index, index=index))
            self.after.setdefault(site, []).append((name, made, _made(calls)))

    def _calls(self, owners: tuple[str, ...], turn: int | None = None) -> Calls:
        """The calls of their modules that belong to one layer of ours: where several of ours share a module, each has its turn."""
        modules = [self.seen.want(o) for o in owners]
        number = self._turn(owners) if turn is None else turn

        def calls() -> list[Call] | None:
            found = [self.seen.call(m, number) for m in modules]
            return None if any(c is None for c in found) else [c for c in found if c is not None]

        return calls

    def _turn(self, owners: tuple[str, ...]) -> int:
        number = self._turns.get(owners, 0)
        self._turns[owners] = number + 1
        return number

    def _order(self, parameter: str) -> Tensor | None:
        """Which of their outputs, one after another, each of ours is: the form applied to their numbers; None if it does more than move rows."""
        filling = self.forms[parameter]
        linear = self.seen.reference.get_submodule(self.seen.owners(parameter)[0])
        rows = [s.shape[0] if not _transposed(linear) else s.shape[-1] for s in filling.stored]
        starts = [sum(rows[:i]) for i in range(len(rows))]
        numbers = [torch.arange(n, dtype=torch.float64) + at for n, at in zip(rows, starts, strict=True)]
        try:
            ours = filling.form.ours(numbers, filling.place).flatten()
        except (RuntimeError, ValueError, IndexError, TypeError):
            return None
        return ours.long() if torch.equal(ours.sort().values, torch.arange(sum(rows), dtype=ours.dtype)) else None

    def _listed(self, name: str, i: int, n: int) -> Source:
        """Element ``i`` of one of the output's lists, if it has ``n`` of them."""

        def asked() -> Tensor | None:
            found = getattr(self.seen.output, name, None)
            return found[i] if found is not None and len(found) == n else None

        return asked


def _given(calls: Calls) -> Source:
    """What the first module of a layer read."""
    return lambda: None if (c := calls()) is None else c[0].given


def _made(calls: Calls) -> Source:
    """What it made."""
    return lambda: None if (c := calls()) is None else c[0].made


def _cut(calls: Calls, order: Tensor | None, widths: tuple[int, ...], j: int) -> Source:
    """Site ``j`` of what a layer makes: the outputs of their modules, in our order, cut by our widths."""

    def asked() -> Tensor | None:
        found = calls()
        if found is None or order is None:
            return None
        joined = torch.cat([c.made for c in found], -1)
        if joined.shape[-1] != len(order):
            return None
        joined = joined[..., order]
        return joined if widths == (-1,) else joined.split(widths, -1)[j]

    return asked


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

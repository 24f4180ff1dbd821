"""The transformer: embedding, a stack of blocks, a norm, a read-out.

    tokens ──► embed (+ position) ──► block 0 ──► … ──► block n-1 ──► final norm ──► read-out ──► logits
                                        ▲                  ▲
                                   cache slot         cache slot

A decoder and an encoder are the same but for one word: a decoder's mask is ``Causal``, an
encoder's is ``Everything``. Training, prefill and decoding are this one path with another cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core import sites
from glassformer.core.cache import NO_CACHE, Cache, Clock, Dense, Growing, Once, Ring, Slot
from glassformer.core.eager import eagerly
from glassformer.core.errors import CacheError, InputError, SpecError
from glassformer.core.fields import described, typed
from glassformer.core.flow import Ledger, Pass
from glassformer.core.mask import And, Causal, Everything, Mask, Padding, Window
from glassformer.core.numerics import device_named, dtype_named
from glassformer.core.sites import Site, SiteInfo
from glassformer.core.spec import Spec, part
from glassformer.core.tap import Tap
from glassformer.parts.attention import CrossAttentionLayer, _Attention
from glassformer.parts.embed import Embedding, check_positions
from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.norm import Norm, NormLayer, RMSNorm
from glassformer.parts.position import NoPosition, Position
from glassformer.parts.readout import LanguageModel, ReadOut

from . import program
from .anatomy import Anatomy
from .block import Block
from .init import GPT2_INIT, Init
from .speaking import Speaking


class Transformer(Spec):
    """What decoders and encoders have in common (see :class:`Decoder`)."""

    vocab_size: int
    d_model: int
    blocks: tuple[Block, ...]
    final_norm: Norm
    tied: bool
    embedding: Embedding
    position: Position
    readout: ReadOut
    init: Init

    @property
    def mask(self) -> Mask:
        """Who may see whom, before windows, documents and padding."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise :class:`SpecError` for sizes that cannot be built."""
        for name in ("vocab_size", "d_model"):
            if getattr(self, name) < 1:
                raise SpecError(f"{type(self).__name__} has {name}={getattr(self, name)}; it is at least 1.")
        if self.position.rotates:
            raise SpecError("Rotary turns queries and keys: give it to Attention(position=...), not to the model.")

    @typed(SpecError)
    def build(
        self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None, seed: int | None = None, d_memory: int | None = None
    ) -> TransformerModel:
        """The model. ``device="meta"`` makes shapes without memory; ``seed`` None draws one from torch's generator."""
        with torch.device("meta"):
            model = TransformerModel(self, d_memory)
        made: TransformerModel = finish(model, lambda s: self.init.apply(model, len(self.blocks), s), device, dtype, seed)
        return made


def finish(model: Any, fill: Callable[[int], None], device: str | torch.device | None, dtype: str | torch.dtype | None, seed: int | None) -> Any:
    """Give a model built on the meta device its type, its memory and its first values (``fill(seed)``)."""
    if dtype is not None:
        model = model.to(dtype_named(dtype))
    if device is not None and str(device) == "meta":
        return model
    model = model.to_empty(device=device_named("cpu" if device is None else device))
    fill(int(torch.randint(2**31, ())) if seed is None else seed)
    return model


@part
class Decoder(Transformer):
    """A causal language model: each position sees itself and what came before.

    ``tied``: read-out and embedding share one matrix (arXiv 1608.05859). ``position``: added to the
    embedding, or a bias shared by all layers; rotary positions belong to ``Attention``.
    """

    vocab_size: int
    d_model: int
    blocks: tuple[Block, ...]
    final_norm: Norm = RMSNorm()
    tied: bool = False
    embedding: Embedding = Embedding()
    position: Position = NoPosition()
    readout: ReadOut = LanguageModel()
    init: Init = GPT2_INIT

    def __post_init__(self) -> None:
        self.check()

    @property
    def mask(self) -> Mask:
        return Causal()


@part
class Encoder(Transformer):
    """A bidirectional model: every position sees every other. Fields as in :class:`Decoder`."""

    vocab_size: int
    d_model: int
    blocks: tuple[Block, ...]
    final_norm: Norm = RMSNorm()
    tied: bool = False
    embedding: Embedding = Embedding()
    position: Position = NoPosition()
    readout: ReadOut = LanguageModel()
    init: Init = GPT2_INIT

    def __post_init__(self) -> None:
        self.check()

    @property
    def mask(self) -> Mask:
        return Everything()


class TransformerModel(Anatomy, Speaking, nn.Module):
    """A built :class:`Decoder` or :class:`Encoder`; ``spec`` is what it was built from."""

    def __init__(self, spec: Transformer, d_memory: int | None = None):
        super().__init__()
        self.spec = spec
        d = spec.d_model
        heads = spec.blocks[0].attention.n_heads if spec.blocks else 1
        counts = sorted({b.attention.n_heads for b in spec.blocks})
        if spec.position.biases and len(counts) > 1:
            raise SpecError(
                f"{type(spec.position).__name__} biases every head of every block alike, but the blocks have {' and '.join(map(str, counts))} heads: "
                "give them equally many, or give each its own bias by Attention(position=...)."
            )
        self.embed = spec.embedding.build(spec.vocab_size, d)
        self.position = spec.position.build(self.embed.d_sum, heads, d // heads)
        self.blocks = nn.ModuleList(b.build(d, d_memory) for b in spec.blocks)
        self.final_norm = spec.final_norm.build(d)
        self.readout = spec.readout.build(d, self.embed, spec.tied)
        self.has_experts = any(isinstance(m, ExpertsLayer) for m in self.modules())

    # Running

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        types: Tensor | None = None,
        cache: Cache | None = None,
        keep: int | Tensor | None = None,
        memory: Tensor | None = None,
        memory_lengths: Sequence[int] | Tensor | None = None,
        tap: Tap | None = None,
        aux: Ledger | None = None,
        path: str = "",
    ) -> Tensor:
        """Logits [b t v] (or what the read-out makes) of ``tokens`` [b t].

        ``inputs_embeds`` [b t d] stand in for tokens (as wide as the embedding's table). ``lengths`` [b]: rows are padded on the right and
        hold so many real tokens. ``types`` [b t]: token types. ``mask``: who may see whom, beyond the
        model's own mask. ``keep``: read out only the last ``n`` positions (int) or one position per row
        ([b]). ``memory`` [b s d]: an encoder's output. ``tap``: who looks. ``aux``: a ledger for side losses.
        Raises :class:`InputError`, :class:`CacheError`, :class:`SiteError`.
        """
        _check_kinds(tokens=tokens, inputs_embeds=inputs_embeds, positions=positions, lengths=lengths, types=types, mask=mask, cache=cache, tap=tap)
        self._check_pooled(keep, lengths)
        run = self._run_eagerly if tap is not None and tap.differentiates() else self._run
        h, p = run(tokens, inputs_embeds, positions, mask, lengths, types, cache, memory, memory_lengths, tap, aux, path)
        y: Tensor = self.readout(kept(h, keep), p)
        return y

    _plain_forward = forward  # a class that has another one goes its own way (program.decode)

    def states(self, tokens: Tensor | None = None, **options: Any) -> Tensor:
        """The stream after the final norm [b t d]: what the read-out reads. Options as in :meth:`forward`, without ``keep``."""
        names = ("inputs_embeds", "positions", "mask", "lengths", "types", "cache", "memory", "memory_lengths", "tap", "aux", "path")
        unknown = [o for o in options if o not in names]
        if unknown:
            raise InputError(f"states() takes no option {unknown[0]!r}; it takes {', '.join(names)}.")
        filled: dict[str, Any] = dict.fromkeys(names) | {"path": ""} | options
        h, _ = self._run(tokens, **filled)
        return h

    def read(self, h: Tensor, normed: bool = True) -> Tensor:
        """What the read-out makes of a stream ``h`` [b t d]: of :meth:`states` or the site ``resid_final`` as it is,
        of a block's output (``blocks.3.resid_post``) with ``normed=False``, which applies the final norm first.
        """
        if h.ndim < 2 or h.shape[-1] != self.spec.d_model:
            raise InputError(f"The stream has shape {tuple(h.shape)}, but this model's read-out reads [batch, position, d_model={self.spec.d_model}].")
        index = torch.arange(h.shape[-2], device=h.device)
        p = Pass(positions=index, index=index)
        y: Tensor = self.readout(h if normed else self.final_norm(h, p), p)
        return y

    def resume(self, x: Tensor, layer: int, *, keep: int | Tensor | None = None, tap: Tap | None = None, path: str = "", **options: Any) -> Tensor:
        """Logits from the stream ``x`` [b t d] that enters block ``layer`` (the site ``blocks.{layer}.resid_pre``): what is left of a forward pass.

        ``layer`` equal to the number of blocks leaves final norm and read-out. Options as in :meth:`forward`; a cache goes on from the tokens that
        it holds, in the blocks that run. ``model(tokens) == model.resume(resid_pre, layer)`` to the bit, for every layer.
        Raises :class:`InputError` for a stream or a layer that this model has not.
        """
        names = ("positions", "mask", "lengths", "cache", "memory", "memory_lengths", "aux")
        if unknown := [o for o in options if o not in names]:
            raise InputError(f"resume() takes no option {unknown[0]!r}; it takes keep, tap, path, {', '.join(names)}.")
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= len(self.blocks):
            raise InputError(f"This model has {len(self.blocks)} blocks, so a pass goes on at block 0 to {len(self.blocks)}; {layer!r} was given.")
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.spec.d_model:
            shape = tuple(x.shape) if isinstance(x, Tensor) else described(type(x))
            raise InputError(f"The stream is {shape}, but this model's blocks read [batch, position, d_model={self.spec.d_model}].")
        if not x.is_floating_point():
            raise InputError(f"The stream is {x.dtype}, but a stream holds vectors, not ids: model(tokens) reads ids.")
        _check_kinds(**{n: options.get(n) for n in ("positions", "mask", "lengths", "cache")}, tap=tap)
        self._check_pooled(keep, options.get("lengths"))
        filled: dict[str, Any] = dict.fromkeys(names) | options
        p = self._pass(x, **filled, tap=tap, path=path)
        h = self._blocks(x, p, layer)
        y: Tensor = self.readout(kept(h, keep), p)
        return y

    def _check_pooled(self, keep: int | Tensor | None, lengths: Sequence[int] | Tensor | None) -> None:
        """Raise :class:`InputError` for positions chosen, or empty rows, where a whole row becomes one vector."""
        if self.readout.pooled:
            kind = type(self.spec.readout).__name__
            if keep is not None:
                raise InputError(f"keep chooses positions to read out, but {kind} makes one vector of a whole row: leave keep out.")
            if lengths is not None and any(int(n) < 1 for n in lengths):
                raise InputError(f"{kind} makes one vector of a row, but row {[int(n) < 1 for n in lengths].index(True)} has length 0: leave empty rows out.")

    def _run(
        self,
        tokens: Tensor | None,
        inputs_embeds: Tensor | None,
        positions: Tensor | None,
        mask: Mask | None,
        lengths: Sequence[int] | Tensor | None,
        types: Tensor | None,
        cache: Cache | None,
        memory: Tensor | None,
        memory_lengths: Sequence[int] | Tensor | None,
        tap: Tap | None,
        aux: Ledger | None,
        path: str,
    ) -> tuple[Tensor, Pass]:
        given = inputs_embeds if tokens is None else tokens
        if given is None:
            raise InputError("Neither tokens nor inputs_embeds were given: a model reads one of them.")
        if tokens is not None and inputs_embeds is not None:
            raise InputError("Both tokens and inputs_embeds were given: a model reads one of them.")
        if tokens is not None and tokens.ndim != 2:
            raise InputError(f"Tokens have shape {tuple(tokens.shape)}, but a model reads [batch, position]: for one row use tokens[None].")
        if tokens is not None and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
            raise InputError(f"Tokens are {tokens.dtype}, but token ids are integers: use tokens.long(), or give vectors as inputs_embeds.")
        if inputs_embeds is not None and (inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.embed.width):
            width = f"{'d_model' if self.embed.width == self.spec.d_model else 'width of its table'}={self.embed.width}"
            raise InputError(f"inputs_embeds have shape {tuple(inputs_embeds.shape)}, but this model reads [batch, position, {width}].")
        p = self._pass(given, positions, mask, lengths, cache, memory, memory_lengths, tap, aux, path)
        return self._blocks(self.embed(tokens, inputs_embeds, types, self.position, p), p), p

    def _pass(
        self,
        given: Tensor,
        positions: Tensor | None,
        mask: Mask | None,
        lengths: Sequence[int] | Tensor | None,
        cache: Cache | None,
        memory: Tensor | None,
        memory_lengths: Sequence[int] | Tensor | None,
        tap: Tap | None,
        aux: Ledger | None,
        path: str,
    ) -> Pass:
        """The side inputs of a call on ``given`` [b t ..]."""
        b, t, device = given.shape[0], given.shape[1], given.device
        if t == 0:
            raise InputError("The rows hold no tokens: a model needs at least one position.")
        if tap is not None and not torch.compiler.is_compiling():
            self._check_tap(tap, path)
        counts = None if lengths is None else [int(n) for n in lengths]
        if counts is not None and (len(counts) != b or not all(0 <= n <= t for n in counts)):
            raise InputError(f"lengths={counts} do not fit tokens of shape ({b}, {t}): one length per row, none above {t}.")
        start = 0 if cache is None else cache.length
        index = torch.arange(t, device=device) if cache is None else cache.open(b, t, counts, device)
        if positions is not None and (positions.shape[-1] != t or positions.ndim > 2):
            raise InputError(f"positions have shape {tuple(positions.shape)}, but the tokens have {t} places: one position for each, [t] or [b t].")
        check_positions(self.position, start + t - 1 if positions is None else positions)
        rule = self.spec.mask if mask is None else self.spec.mask & mask
        real = None if counts is None else torch.as_tensor(counts, device=device)
        if real is not None and not isinstance(self.spec.mask, Causal):
            rule = rule & Padding(real)
        if tap is not None:
            tap.begin(path, index, real)
        return Pass(
            positions=index if positions is None else positions,
            index=index,
            mask=rule,
            cache=cache,
            slots={},  # named here although they are the defaults: torch.compile cannot trace a dataclass's default objects
            slot=NO_CACHE,
            lengths=real,
            memory=memory,
            memory_mask=Everything() if memory_lengths is None else Padding.of(memory_lengths, device),
            tap=tap,
            aux=aux,
            path=path,
            shared=self._shared(index, cache),
        )

    def _blocks(self, x: Tensor, p: Pass, first: int = 0) -> Tensor:
        """From the stream that enters block ``first`` to the stream after the final norm."""
        if p.cache is not None and first == 0 and (planned := program.step(self, x, p)) is not None:
            p.cache.close()
            return planned
        for i, block in enumerate(self.blocks):
            if i >= first:
                x = block(x, p.layer(i))
        x = p.see(sites.RESID_FINAL, self.final_norm(x, p.at("final_norm")))
        if p.cache is not None:
            p.cache.close()
        return x

    def _shared(self, index: Tensor, cache: Cache | None) -> dict[str, Any]:
        """What all layers have in common from the start: a bias of the model's own."""
        if not self.spec.position.biases:
            return {}
        # Without a cache the bias is made here and not by the first layer that needs it: a layer that is
        # computed again in the backward pass (activation checkpointing) must find what it found before.
        made = {} if cache is not None else {f"bias:model:{NO_CACHE.layout}": self.position.bias(index, index)}
        return {"position": self.position, **made}

    @eagerly
    def _run_eagerly(self, *inputs: Any) -> tuple[Tensor, Pass]:
        return self._run(*inputs)

    def _check_tap(self, tap: Tap, path: str) -> None:
        # Within an encoder-decoder the whole model has checked the patterns against all of its sites.
        inside = path.split(".")[2:] if path.startswith("step.") else path
        if not inside and getattr(tap, "_checked_by", None) != id(self):
            tap.check([s.path for s in self.sites()])
            tap._checked_by = id(self)  # type: ignore[attr-defined]

    # The cache

    @typed(CacheError)
    def cache(self, batch: int = 1, capacity: int | None = 512, rewind: int = 0) -> Cache:
        """An empty cache for ``batch`` rows of up to ``capacity`` tokens (None: it grows, and gradients flow through it).

        Layers with a window keep only the window and ``rewind`` more places. Raises :class:`CacheError` for an encoder.
        """
        if not isinstance(self.spec.mask, Causal):
            raise CacheError("An encoder sees the whole text at once, so it has nothing to cache: call it without a cache.")
        clock = Clock(batch)
        if batch < 1 or (capacity is not None and capacity < 1) or rewind < 0:
            raise CacheError(f"A cache has rows and room for tokens: batch={batch}, capacity={capacity} and rewind={rewind} were given.")
        layers: list[dict[str, Slot]] = []
        for block in self.spec.blocks:
            slots: dict[str, Slot] = {"attn": _slot(clock, block.attention.mask, capacity, rewind)}
            if block.cross is not None:
                slots["cross"] = Once()
            layers.append(slots)
        return Cache(clock, layers, capacity)

    # Looking

    def sites(self, path: str = "") -> list[SiteInfo]:
        """Every observable value: path, axes, meaning. Nothing runs."""
        return list(_sites(self, path))


KINDS: dict[str, type] = {"mask": Mask, "cache": Cache, "tap": Tap}  # all else are tensors


def _check_kinds(**given: object) -> None:
    """Raise :class:`InputError` for a text, a list or an array where a tensor is needed, a name where a tap is needed, and the like."""
    for name, value in given.items():
        kind = KINDS.get(name, Tensor)
        if value is None or isinstance(value, kind) or (name in ("lengths", "positions") and hasattr(value, "__array__")):
            continue
        if name == "lengths" and isinstance(value, Sequence) and not isinstance(value, str):
            continue
        todo = "use torch.tensor(...)"
        if name == "tap":
            todo = f"tap = Record({value if isinstance(value, str) else 'blocks.0.attn.pattern'!r}), then model(tokens, tap=tap); several are joined by |"
        elif isinstance(value, str):
            todo = "generate(model, text, tokenizer=...) reads text, tokenizer.encode(text) gives its ids"
        elif kind is not Tensor:
            todo = {"mask": "Window(8), for example", "cache": "cache = model.cache(batch)"}[name]
        elif name == "lengths":
            todo = "lengths=[5, 3], one per row"
        raise InputError(f"{name} is {described(type(value))}, but {'a list' if name == 'lengths' else described(kind)} is needed: {todo}.")


def kept(h: Tensor, keep: int | Tensor | None) -> Tensor:
    """The positions that are read out: all, the last ``keep``, or one per row."""
    if keep is None:
        return h
    if isinstance(keep, int):
        if keep < 1:
            raise InputError(f"keep={keep} reads out nothing: give the number of last positions, at least 1, or None for all.")
        return h[:, -keep:]
    if not isinstance(keep, Tensor):
        raise InputError(f"keep is {described(type(keep))}, but it is a number of last positions, or a tensor with one position per row.")
    return h[torch.arange(h.shape[0], device=h.device), keep.to(h.device)][:, None]


def _slot(clock: Clock, mask: Mask, capacity: int | None, rewind: int) -> Slot:
    if capacity is None:
        return Growing(clock)
    terms = mask.terms if isinstance(mask, And) else (mask,)
    windows = [m.size for m in terms if isinstance(m, Window)]
    if windows and min(windows) + rewind < capacity:
        return Ring(clock, min(windows), rewind)
    return Dense(clock, capacity)


def _sites(model: TransformerModel, root: str) -> Iterator[SiteInfo]:
    def info(path: str, site: Site, axes: str | None = None) -> SiteInfo:
        return SiteInfo(".".join(x for x in (root, path, site.name) if x), axes or site.axes, site.meaning)

    def norms(path: str, module: nn.Module, axes: str) -> Iterator[SiteInfo]:
        for site in getattr(module, "SITES", ()):
            yield info(path, site, axes)

    narrow = model.embed.d_sum != model.spec.d_model  # a factorised embedding that is lifted last
    yield info("", sites.EMBED, "b t w" if narrow else None)
    if model.spec.position.adds:
        yield info("", sites.POS_EMBED, "t w" if narrow else None)
    yield from norms("embed.norm", model.embed.norm, "b t 1")
    for i, block in enumerate(model.blocks):
        for name, module in (("", block), *block.named_children()):
            path = f"blocks.{i}.{name}".rstrip(".")
            if isinstance(module, NormLayer):
                yield from norms(path, module, "b t 1")
                continue
            declared: tuple[Site, ...] = getattr(module, "SITES", ())
            for site in declared:
                yield info(path, site)
            if isinstance(module, _Attention):
                for own, rows in module.NORMS:
                    norm = getattr(module, own)
                    yield from norms(f"{path}.{own}", norm, norm.axes(rows))
            if isinstance(module, ExpertsLayer):
                for site in getattr(module.shared, "SITES", ()):
                    yield info(f"{path}.shared", site)
    yield from norms("final_norm", model.final_norm, "b t 1")
    yield info("", sites.RESID_FINAL)
    transform = getattr(model.readout, "transform", None)
    if transform is not None:
        yield from norms("readout.transform.norm", transform.norm, "b t 1" if model.readout.SITES[0] is sites.LOGITS else "b 1")
    for site in model.readout.SITES:
        yield info("", site)


__all__ = ["NO_CACHE", "CrossAttentionLayer", "Decoder", "Encoder", "Transformer", "TransformerModel", "finish", "kept"]

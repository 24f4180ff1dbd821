"""A model of ``transformers`` looked into where it stands, as far as the borders of its modules allow.

    theirs = foreign(AutoModelForCausalLM.from_pretrained(folder), tokenizer)
    logits = theirs(tokens, tap=Record("blocks.*.resid_post"))        the same paths, the same taps

    their module ──► forward hook, for the length of one call ──► tap.visit("blocks.3.attn.out", value) ──► their next module

What a module receives and returns can be read and changed. What happens inside one of theirs cannot: rotated queries, scores, the parts of a norm.
Such a site is named as unreachable, with the remedy; ``gf.load(folder)`` opens the same checkpoint with every site. Parts are found by the names that
modules have in the families of that library, never by the model's own name; a part that is not found is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glassformer.core import sites
from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.sites import Site, SiteInfo
from glassformer.core.tap import Tap
from glassformer.text import Tokenizer

# Where the families of transformers keep a part, inside a block; the first that is there counts.
OUT = (
    *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "self_attention.dense", "attn.c_proj", "attn.out_proj", "attn.Wo", "attention.dense"),
    *("attention.output.dense", "attention.out_lin", "attn.attention.out_proj", "attention.o_proj"),
)
QUERY = ("self_attn.q_proj", "attention.self.query", "attention.q_lin", "attn.q_proj", "attn.attention.q_proj", "attention.q_proj")
KEY = ("self_attn.k_proj", "attention.self.key", "attention.k_lin", "attn.k_proj", "attn.attention.k_proj", "attention.k_proj")
VALUE = ("self_attn.v_proj", "attention.self.value", "attention.v_lin", "attn.v_proj", "attn.attention.v_proj", "attention.v_proj")
JOINED = ("attn.c_attn", "self_attn.qkv_proj")  # queries, then keys, then values; others mix them head by head
UP = ("mlp.up_proj", "mlp.c_fc", "mlp.fc1", "fc1", "intermediate.dense", "mlp.dense_h_to_4h", "mlp.fc_in", "ffn.lin1", "feed_forward.w3")
GATE = ("mlp.gate_proj", "feed_forward.w1")
DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2", "output.dense", "mlp.fc_out", "ffn.lin2", "feed_forward.w2")
EXPERTS = ("block_sparse_moe", "mlp.experts")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FINAL_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "final_norm", "decoder.final_layer_norm")

UNREACHABLE = (sites.Q_ROT, sites.K_ROT, sites.SCORES, sites.RESULT, sites.RESID_MID)


class Place(NamedTuple):
    """A site at the border of one of their modules: on which side, which part of its last axis, cut into how many heads."""

    site: Site
    module: nn.Module
    after: bool
    """What it returns (True) or what it receives."""
    part: tuple[int, int] | None = None
    heads: int | None = None


def foreign(model: Any, tokenizer: Any = None) -> Foreign:
    """A model of ``transformers`` that the functions of this room take, under the same site paths.

    ``tokenizer``: one of theirs or of ours (None: give token ids). Raises :class:`InputError` for anything that is no decoder or encoder of theirs.
    """
    return Foreign(model, tokenizer)


class Foreign(nn.Module):
    """Somebody else's model with our doors: ``model(tokens, tap=...)``, ``model.sites()``, ``model.read(stream)``. Made by :func:`foreign`."""

    def __init__(self, model: Any, tokenizer: Any = None):
        super().__init__()
        config = getattr(model, "config", None)
        if not isinstance(model, nn.Module) or config is None or not hasattr(config, "hidden_size"):
            raise InputError(f"foreign(model) opens a model of transformers, but {described(type(model))} was given.")
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(
                f"A {type(model).__name__} reads two texts, which is not followed from outside: give its encoder, or open its checkpoint with gf.load."
            )
        self.model, self.config, self.tokenizer = model, config, _tokenizer(tokenizer)
        self.name = type(model).__name__
        self.base: nn.Module = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
        self.blocks_theirs = _blocks(self.base, self.name)
        self.n_layers = len(self.blocks_theirs)
        if (n := int(getattr(config, "num_hidden_layers", self.n_layers))) != self.n_layers:
            raise InputError(
                f"This {self.name} has {n} layers made of {self.n_layers} blocks that are run again and again, which is not told apart from outside: "
                "open its checkpoint with gf.load."
            )
        self.d_model = int(config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        self.head = next((m for n, m in model.named_children() if m is not self.base and n in ("lm_head", "cls", "embed_out", "vocab_projector")), None)
        self.reads_tokens = self.head is not None
        self.final_norm = next((m for n in FINAL_NORMS if (m := _find(self.base, n)) is not None), None)
        self.causal = bool(getattr(config, "is_decoder", False)) or "CausalLM" in self.name or any("CausalLM" in str(a) for a in config.architectures or ())
        self.causal = self.causal or type(self.base).__name__.startswith("GPT") or any(getattr(m, "is_causal", False) for m in self.blocks_theirs[0].modules())
        self.max_positions = _max_positions(self.base, config)
        self.places = dict(self._places())
        self._read_checked = False

    # What it is

    def feedforward(self, layer: int) -> str:
        """The name of a layer's feed-forward sublayer: ``"ffn"`` or ``"experts"``."""
        return "experts" if f"blocks.{layer}.experts.out" in self.places else "ffn"

    def norm_behind(self, layer: int, kind: str) -> nn.Module | None:
        """The norm that a sublayer's output passes before it is added to the stream (a sandwich's second, a reordered block's only one)."""
        block = self.blocks_theirs[layer]
        # "post_attention_layernorm" stands before the feed-forward in most families, and behind attention only beside one behind the feed-forward.
        pairs = (("post_attention_layernorm", "post_feedforward_layernorm"), ("post_self_attn_layernorm", "post_mlp_layernorm"))
        for names in pairs:
            if all(_find(block, n) is not None for n in names):
                return _find(block, names[kind != "attn"])
        return None

    def n_heads(self, layer: int) -> int:
        """Query heads of a layer."""
        return int(self.config.num_attention_heads)

    def sites(self) -> list[SiteInfo]:
        """Every value that can be reached from outside: path, axes, meaning."""
        found = [SiteInfo(path, p.site.axes, p.site.meaning) for path, p in self.places.items()]
        if self._shows_patterns():
            found += [SiteInfo(f"blocks.{i}.attn.pattern", sites.PATTERN.axes, sites.PATTERN.meaning) for i in range(self.n_layers)]
        return found

    def _shows_patterns(self) -> bool:
        return getattr(self.config, "_attn_implementation", None) == "eager"

    def _places(self) -> Iterator[tuple[str, Place]]:
        table: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        yield "embed", Place(sites.EMBED, table, True)
        h = self.n_heads(0)
        g = int(getattr(self.config, "num_key_value_heads", None) or h)
        k = int(getattr(self.config, "head_dim", None) or self.d_model // h)
        for i, block in enumerate(self.blocks_theirs):
            found: list[tuple[str, Place | None]] = [
                ("resid_pre", Place(sites.RESID_PRE, block, False)),
                ("attn.in", _place(block, sites.ATTN_IN, (*QUERY, *JOINED), False)),
                ("attn.q", _place(block, sites.Q, QUERY, True, heads=h)),
                ("attn.k", _place(block, sites.K, KEY, True, heads=g)),
                ("attn.v", _place(block, sites.V, VALUE, True, heads=g)),
                *([] if hasattr(self.config, "multi_query") else _joined(block, h, g, k)),  # GPTBigCode cuts the same projection in other ways
                ("attn.z", _place(block, sites.Z, OUT, False, heads=h)),
                ("attn.out", _place(block, sites.ATTN_OUT, OUT, True)),
            ]
            experts = next((m for n in EXPERTS if (m := _find(block, n)) is not None), None)
            if experts is not None:
                whole = _find(block, "mlp") or experts
                found.append(("experts.out", Place(sites.EXPERTS_OUT, whole, True)))
            else:
                found += [
                    ("ffn.in", _place(block, sites.FFN_IN, UP, False)),
                    ("ffn.pre", _place(block, sites.FFN_PRE, UP, True)),
                    ("ffn.gate", _place(block, sites.FFN_GATE, GATE, True)),
                    ("ffn.post", _place(block, sites.FFN_POST, DOWN, False)),
                    ("ffn.out", _place(block, sites.FFN_OUT, DOWN, True)),
                ]
            found.append(("resid_post", Place(sites.RESID_POST, block, True)))
            for name, place in found:
                if place is not None:
                    yield f"blocks.{i}.{name}", place
        if self.head is not None:
            yield "resid_final", Place(sites.RESID_FINAL, self.head, False)

    # Running

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        keep: int | None = None,
        tap: Tap | None = None,
        path: str = "",
    ) -> Tensor:
        """Logits [b t v] (the last stream, where there is no read-out over tokens), as their own call gives them."""
        given = tokens if tokens is not None else inputs_embeds
        if given is None or (tokens is not None and inputs_embeds is not None):
            which = "Neither tokens nor" if given is None else "Both tokens and"
            raise InputError(f"{which} inputs_embeds were given: a model reads one of them.")
        if not isinstance(given, Tensor) or given.ndim != (2 if tokens is not None else 3):
            shape = f"has shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"is {described(type(given))}"
            raise InputError(f"What is read {shape}, but a model reads tokens [batch, position], or inputs_embeds [batch, position, d_model].")
        if self.max_positions is not None and given.shape[1] > self.max_positions:
            raise InputError(f"The text has {given.shape[1]} tokens, but this {self.name} has positions for {self.max_positions}: give a shorter one.")
        options: dict[str, Any] = {"use_cache": False} if self.causal else {}
        if lengths is not None:
            real = torch.as_tensor(lengths, device=given.device)
            options["attention_mask"] = (torch.arange(given.shape[1], device=given.device)[None] < real[:, None]).long()
        with ExitStack() as hooks:
            if tap is not None:
                self.check(tap)
                tap.begin(path, torch.arange(given.shape[1], device=given.device), None if lengths is None else torch.as_tensor(lengths))
                self._watch(tap, path, tuple(given.shape[:2]), hooks)
                if self._wants_patterns(tap):
                    options["output_attentions"] = True
            # A head that is none over tokens (classes, say) is left out: what is looked at is the last stream.
            out = (self.model if self.reads_tokens else self.base)(input_ids=tokens, inputs_embeds=inputs_embeds, **options)
        if tap is not None and options.get("output_attentions"):
            for i, pattern in enumerate(out.attentions):
                tap.offer(_at(path, f"blocks.{i}.attn.pattern"), lambda heads, a=pattern: a if heads is None else a[:, list(heads)])  # type: ignore[misc]
        y: Tensor = out.logits if self.reads_tokens else out.last_hidden_state
        if tap is not None and self.reads_tokens:
            y = tap.visit(_at(path, "logits"), y)
        return y if keep is None else y[:, -keep:]

    @torch.no_grad()
    def read(self, h: Tensor, normed: bool = True) -> Tensor:
        """What their read-out makes of a stream [b t d]; ``normed=False`` applies their final norm first.

        Raises :class:`InputError` if their read-out is more than that (a check on three tokens finds it).
        """
        if self.head is None:
            raise InputError(f"This {self.name} has no read-out over tokens: load it with one (AutoModelForCausalLM, AutoModelForMaskedLM).")
        if not self._read_checked:
            self._check_read()
        return self._read(h, normed)

    def _read(self, h: Tensor, normed: bool) -> Tensor:
        assert self.head is not None
        stream = h if normed or self.final_norm is None else self.final_norm(h)
        logits: Tensor = self.head(stream)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _check_read(self) -> None:
        from glassformer.core.tap import Record

        last = f"blocks.{self.n_layers - 1}.resid_post"
        record = Record(last)
        with evaluating(self):
            logits = self(torch.arange(3, device=next(self.parameters()).device)[None] % self.vocab_size, tap=record)
            again = self._read(record[last], False)
        if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise InputError(f"The read-out of this {self.name} does more than a final norm and its head, so no stream but the last can be read: use gf.load.")
        self._read_checked = True

    # Taps at the borders

    def check(self, tap: Tap) -> None:
        """Raise :class:`SiteError` for a pattern that meets nothing that can be reached, saying why and what to do."""
        known = [s.path for s in self.sites()]
        if "logits" not in known and self.reads_tokens:
            known.append("logits")
        for pattern in tap.patterns():
            if any(pattern.may_meet(p) for p in known):
                continue
            last = pattern.text.split("[")[0].rsplit(".", 1)[-1]
            if last == sites.PATTERN.name:
                raise SiteError(
                    f"{pattern.text!r}: attention weights are not formed by this {self.name}'s kernel ({getattr(self.config, '_attn_implementation', None)}): "
                    "load it with attn_implementation='eager', or open its checkpoint with gf.load, where they are computed beside any kernel."
                )
            if last in {s.name for s in (*UNREACHABLE, *(s for t in sites.TABLE.values() for s in t))}:
                raise SiteError(
                    f"{pattern.text!r} cannot be reached in this {self.name}: the value does not cross a border of its modules. "
                    "Open its checkpoint with gf.load(folder) to see every site; .sites() lists what is reachable here."
                )
        tap.check(known)

    def _wants_patterns(self, tap: Tap) -> bool:
        paths = [f"blocks.{i}.attn.pattern" for i in range(self.n_layers)]
        if any(tap.edits(p) for p in paths):
            raise SiteError(f"Attention weights of this {self.name} can be read, but not changed, from outside: open its checkpoint with gf.load(folder).")
        return self._shows_patterns() and any(p.may_meet(path) for p in tap.patterns() for path in paths)

    def _watch(self, tap: Tap, root: str, rows: tuple[int, ...], hooks: ExitStack) -> None:
        """A hook at every border that a pattern of the tap meets, for the length of one call."""
        patterns = tap.patterns()
        for path, place in self.places.items():
            if patterns and not any(p.may_meet(path) for p in patterns):
                continue
            see = _seer(tap, _at(root, path), place, rows)
            if place.after:
                handle = place.module.register_forward_hook(_after(see))
            else:
                handle = place.module.register_forward_pre_hook(_before(see), with_kwargs=True)
            hooks.callback(handle.remove)


def _at(root: str, path: str) -> str:
    return f"{root}.{path}" if root else path


def _seer(tap: Tap, path: str, place: Place, rows: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """What a tap makes of the whole value at a border, of which the site may be a part. ``rows``: (b, t)."""

    def see(x: Tensor) -> Tensor:
        value = x if place.part is None else x[..., place.part[0] : place.part[1]]
        # Some families hand all rows to their feed-forward as one (OPT); a copy is seen, for some add to a value in its place later (Falcon).
        split = (value.unflatten(0, rows) if value.ndim == 2 and len(value) == rows[0] * rows[1] else value).clone()
        split = split if place.heads is None else split.unflatten(-1, (place.heads, -1))
        new = tap.visit(path, split)
        if new is split:
            return x
        new = (new if place.heads is None else new.flatten(-2)).reshape(value.shape)
        return new if place.part is None else torch.cat([x[..., : place.part[0]], new, x[..., place.part[1] :]], -1)

    return see


def _after(see: Callable[[Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, given: Any, out: Any) -> Any:
        return (see(out[0]), *out[1:]) if isinstance(out, tuple) else see(out)

    return hook


def _before(see: Callable[[Tensor], Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (see(args[0]), *args[1:]), kwargs
        name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
        return args, kwargs | {name: see(kwargs[name])}

    return hook


# Finding their parts


def _blocks(base: nn.Module, name: str) -> list[nn.Module]:
    """The longest list of modules that each hold an attention."""
    lists = [list(m) for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) and all(any(_find(b, a) is not None for a in ATTENTION) for b in m)]
    if not lists:
        raise InputError(f"No stack of blocks with attention was found in this {name}: it is no decoder or encoder whose parts are known by name.")
    return max(lists, key=len)


def _find(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return None
        module = child
    return module


def _max_positions(base: nn.Module, config: Any) -> int | None:
    """How many positions a model can tell apart, None for any number. RoBERTa's family counts from behind the row of its padding, so some are no place."""
    most = getattr(config, "n_positions", None) or (None if hasattr(config, "rope_parameters") else getattr(config, "max_position_embeddings", None))
    tables = [m for n, m in base.named_modules() if isinstance(m, nn.Embedding) and n.rsplit(".", 1)[-1].startswith("position") and m.num_embeddings == most]
    first = max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)
    return None if most is None else int(most) - first


def _place(block: nn.Module, site: Site, names: Sequence[str], after: bool, heads: int | None = None) -> Place | None:
    module = next((m for n in names if (m := _find(block, n)) is not None), None)
    return None if module is None else Place(site, module, after, None, heads)


def _joined(block: nn.Module, h: int, g: int, k: int) -> list[tuple[str, Place | None]]:
    """Queries, keys and values of one projection that gives them one after the other."""
    module = next((m for n in JOINED if (m := _find(block, n)) is not None), None)
    if module is None:
        return []
    q, kv = h * k, g * k
    return [
        ("attn.q", Place(sites.Q, module, True, (0, q), h)),
        ("attn.k", Place(sites.K, module, True, (q, q + kv), g)),
        ("attn.v", Place(sites.V, module, True, (q + kv, q + 2 * kv), g)),
    ]


def _tokenizer(given: Any) -> Tokenizer | None:
    if given is None or isinstance(given, Tokenizer):
        return given
    backend = getattr(given, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"A tokenizer is one of glassformer or a fast one of transformers, but {described(type(given))} was given.")
    roles = {r: getattr(given, f"{r}_token") for r in ("bos", "eos", "pad", "unk", "mask", "cls", "sep") if getattr(given, f"{r}_token", None)}
    return Tokenizer(backend, roles)


__all__ = ["Foreign", "foreign"]

"""HookedTransformer: a model of glassformer under TransformerLens' names.

    model = HookedTransformer.from_pretrained("runs/books")
    logits, cache = model.run_with_cache("The old man")       cache["pattern", 5]
    model.run_with_hooks(tokens, fwd_hooks=[("blocks.5.attn.hook_z", ablate)])

The wrapper holds the hooks and hands them to each call as a tap: the model itself is never touched, two wrappers of one model do not see each other's hooks.
"""

# ruff: noqa: N802  (matrices are named as the field names them)

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.numerics import device_named
from glassformer.infer.session import position_limit
from glassformer.models.transformer import TransformerModel
from glassformer.weights.own import Loaded

from ..factored import FactoredMatrix
from ..matrices import Weights, exact_folds, weights
from ..subject import check_reads_tokens
from .cache import ActivationCache
from .config import config_of
from .hook_points import Hook, HookPoint, Hooks, NamesFilter, Stop, chosen, none_of_them
from .names import names_of
from .parts import block_of, vectors
from .tokens import TokenizerView, Tokens, as_ids
from .utils import lm_cross_entropy_loss

FwdHooks = Sequence[tuple[Any, Callable[..., Any]]]


def refuse(given: dict[str, Any], call: str, known: str) -> None:
    """Raise :class:`InputError` for an option that would be left undone."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise InputError(f"{call}() takes no {name}={value!r} here; it takes {known}.")


class HookedTransformer(Tokens):
    """A decoder or encoder of glassformer with TransformerLens' calls.

    ``model``: a built model, or what ``gf.load`` gives. Nothing is folded here; :meth:`from_pretrained` folds what is exact.
    Raises :class:`InputError` for an encoder-decoder and for a model without scores over its vocabulary.
    """

    def __init__(self, model: Any, tokenizer: Any = None, default_prepend_bos: bool | None = None):
        if isinstance(model, Loaded):
            model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
        if not isinstance(model, TransformerModel):
            raise InputError(
                f"HookedTransformer wraps a decoder or an encoder of glassformer, but {described(type(model))} was given: gf.load(folder) gives one."
            )
        check_reads_tokens(model, "HookedTransformer")
        self.model, self.gf_tokenizer = model, tokenizer
        self.tokenizer = None if tokenizer is None else TokenizerView(tokenizer)
        self.paths = names_of(model)
        self.hook_dict = {n: HookPoint(n, owner=self) for n in self.paths}
        self.cfg = config_of(model, position_limit(model), tokenizer, default_prepend_bos)
        self._hooks: list[Hook] = []

    @classmethod
    def from_pretrained(
        cls,
        model_name: str,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        device: Any = None,
        dtype: Any = None,
        default_prepend_bos: bool | None = None,
        **others: Any,
    ) -> HookedTransformer:
        """What ``gf.load`` opens (a folder, a .gguf file, ``hf://owner/name``), with its matrices folded and centred as far as that is exact.

        ``cfg.processed`` says what was done; where nothing can be, the model is as it is.
        """
        import glassformer as gf

        refuse(others, "from_pretrained", "fold_ln, center_writing_weights, center_unembed, fold_value_biases, device, dtype, default_prepend_bos")
        given = {n: v for n, v in (("device", device), ("dtype", dtype)) if v is not None}
        loaded = gf.load(str(model_name), **given)
        asked = {"fold_norms": fold_ln, "centre_writing": center_writing_weights, "centre_readout": center_unembed, "fold_value_bias": fold_value_biases}
        if not isinstance(loaded.model, TransformerModel):
            return cls(loaded)
        possible = exact_folds(loaded.model)
        switches = {n: True for n, wanted in asked.items() if wanted and possible[n]}
        made = cls(weights(loaded.model, **switches).model().requires_grad_(True), loaded.tokenizer, default_prepend_bos)
        made.cfg.processed = tuple(switches)
        made.cfg.model_name = str(model_name)
        return made

    @classmethod
    def from_pretrained_no_processing(cls, model_name: str, **options: Any) -> HookedTransformer:
        """The model as its file has it."""
        off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
        return cls.from_pretrained(model_name, **(options | off))

    # Running

    def __call__(self, input: Any, return_type: str | None = "logits", **options: Any) -> Any:
        return self.forward(input, return_type, **options)

    def forward(
        self,
        input: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        tokens: Tensor | None = None,
        _tap: Hooks | None = None,
        **unknown: Any,
    ) -> Any:
        """Logits [b t v], the loss, both, or None of a text, texts or ids; ``stop_at_layer``: the stream [b t d] that enters that layer.

        With ``start_at_layer`` the input is the stream that enters it (and ``tokens`` are needed for a loss).
        """
        refuse(
            {n: v for n, v in unknown.items() if n != "padding_side"},
            "forward",
            "return_type, loss_per_token, prepend_bos, start_at_layer, stop_at_layer, tokens",
        )
        if return_type not in ("logits", "loss", "both", None):
            raise InputError(f"return_type={return_type!r} is none of 'logits', 'loss', 'both' and None.")
        for name, given in (("start_at_layer", start_at_layer), ("stop_at_layer", stop_at_layer)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
                raise InputError(f"{name}={given!r}: a layer is a whole number.")
        if start_at_layer is not None and not isinstance(input, Tensor):
            raise InputError(f"With start_at_layer the input is the stream [b t d] that enters that layer, but {described(type(input))} was given.")
        x, tokens = (input, tokens) if start_at_layer is not None else (None, self._ids(input, prepend_bos))
        tap = _tap or Hooks(self._hooks, self.hook_dict, self.paths)
        tap.rows = (tokens if x is None else x).shape[0]  # type: ignore[union-attr]
        n = self.cfg.n_layers
        if stop_at_layer is not None:
            stop = stop_at_layer + n if stop_at_layer < 0 else stop_at_layer
            if not 0 <= stop <= n:
                raise InputError(f"stop_at_layer={stop_at_layer}, but the model has {n} layers: 0 to {n}, or from the end with -1.")
            tap.stop_at = f"blocks.{stop}.resid_pre" if stop < n else f"blocks.{n - 1}.resid_post"
        elif return_type is None:
            tap.stop_at = "resid_final"
        used = tap if tap.calls or tap.kept or tap.stop_at else None
        try:
            with evaluating(self.model):
                if x is None:
                    logits = self.model(tokens, tap=used)
                else:
                    first = start_at_layer or 0
                    first = first + n if first < 0 else first
                    logits = self.model.resume(x, first, tap=used)
        except Stop as stopped:
            return stopped.value if stop_at_layer is not None else None
        if return_type == "logits":
            return logits
        if tokens is None:
            raise InputError("A loss needs the tokens, but only the stream was given: add tokens=.")
        loss = self.loss_fn(logits, tokens, loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def loss_fn(self, logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
        """Mean of ``-ln p`` of each next token."""
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), per_token=per_token)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: Any = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        return_cache_object: bool = True,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """What a call gives, and an :class:`ActivationCache` of the names that the filter means (None: all but ``hook_result``, unless
        ``cfg.use_attn_result``). ``incl_bwd``: what is returned (a loss) is differentiated, and ``name + "_grad"`` kept as well.
        """
        usual = frozenset(n for n in self.paths if self.cfg.use_attn_result or not n.endswith("hook_result"))
        kept: dict[str, Tensor] = {}
        tap = Hooks(self._hooks, self.hook_dict, self.paths, kept, chosen(names_filter, self.paths, usual))
        tap.device = device
        tap.gradients = {} if incl_bwd else None
        out = self.forward(*model_args, **(model_kwargs | {"_tap": tap}))
        if incl_bwd:
            if not isinstance(out, Tensor) or out.ndim:
                raise InputError("incl_bwd differentiates what the call returns, which must be one number: add return_type='loss'.")
            out.backward()
            kept |= tap.gradients or {}
        order = {n: i for i, n in enumerate(self.paths)}
        kept = dict(sorted(kept.items(), key=lambda item: order.get(item[0], len(order))))
        cache = ActivationCache(kept, self)
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache if return_cache_object else cache.cache_dict

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: FwdHooks = (),
        bwd_hooks: FwdHooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """A call with these hooks besides those that were added: ``(name or filter, fn)``, ``fn(value, hook)`` gives the new value or None."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(*model_args, **model_kwargs)

    @contextmanager
    def hooks(
        self, fwd_hooks: FwdHooks = (), bwd_hooks: FwdHooks = (), reset_hooks_end: bool = True, clear_contexts: bool = False
    ) -> Iterator[HookedTransformer]:
        """These hooks for the length of a ``with``."""
        before, fwd_hooks, bwd_hooks = list(self._hooks), fwd_hooks or (), bwd_hooks or ()
        for pair in (*fwd_hooks, *bwd_hooks):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputError(f"Hooks are pairs of a name (or a filter) and a function, but {pair!r:.60} was given.")
        made = [self._made(name, fn, d) for d, hooks in (("fwd", fwd_hooks), ("bwd", bwd_hooks)) for name, fn in hooks]
        self._hooks = [*before, *made]
        try:
            yield self
        finally:
            if reset_hooks_end:
                self._hooks = [h for h in self._hooks if h not in made]
            if clear_contexts:
                self.clear_contexts()

    def _made(self, name: Any, fn: Callable[..., Any], direction: str, permanent: bool = False) -> Hook:
        name = list(name) if isinstance(name, tuple | set | frozenset) else name
        if not callable(fn):
            raise InputError(f"A hook is a function of (value, hook), but {described(type(fn))} was given.")
        wanted = chosen(name, self.paths)
        if not wanted:
            raise SiteError(none_of_them(list(self.paths), name, self.paths))
        if direction not in ("fwd", "bwd"):
            raise InputError(f"dir={direction!r}: a hook runs forward ('fwd') or backward ('bwd').")
        return Hook(wanted, fn, direction, permanent)

    def add_hook(
        self, name: Any, hook: Callable[..., Any], dir: str = "fwd", is_permanent: bool = False, level: int | None = None, prepend: bool = False
    ) -> None:
        """Keep a hook for all calls of this wrapper, until :meth:`reset_hooks`."""
        made = self._made(name, hook, dir, is_permanent)
        self._hooks = [made, *self._hooks] if prepend else [*self._hooks, made]

    def add_perma_hook(self, name: Any, hook: Callable[..., Any], dir: str = "fwd") -> None:
        """A hook that :meth:`reset_hooks` leaves unless told otherwise."""
        self.add_hook(name, hook, dir, True)

    def reset_hooks(self, clear_contexts: bool = True, direction: str = "both", including_permanent: bool = False, level: int | None = None) -> None:
        """Forget the hooks that were added."""
        self._hooks = [h for h in self._hooks if (h.permanent and not including_permanent) or direction not in ("both", h.direction)]
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Forget what hooks keep in ``hook.ctx``."""
        for point in self.hook_dict.values():
            point.clear_context()

    def hook_points(self) -> list[HookPoint]:
        """All places."""
        return list(self.hook_dict.values())

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether :meth:`run_with_cache` keeps every head's own output by default."""
        self.cfg.use_attn_result = use_attn_result

    def generate(
        self,
        input: Any = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        prepend_bos: bool | None = None,
        freq_penalty: float = 0.0,
        return_type: str = "input",
        seed: int | None = None,
        use_past_kv_cache: bool = True,
        verbose: bool = True,
        **others: Any,
    ) -> Any:
        """A text (or ids, as the input was) with up to ``max_new_tokens`` more; hooks that were added hold in every step."""
        from glassformer.infer import generate

        refuse(others, "generate", "max_new_tokens, stop_at_eos, do_sample, top_k, top_p, temperature, freq_penalty, prepend_bos, return_type, seed")
        single = isinstance(input, str)
        ids = self._ids(input, prepend_bos)
        tap = Hooks(self._hooks, self.hook_dict, self.paths)
        tap.rows = 1
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature if do_sample else 0, "seed": seed}
        options |= {n: v for n, v in (("top_k", top_k), ("top_p", top_p), ("frequency_penalty", freq_penalty)) if v and do_sample}
        options["cache"] = None if use_past_kv_cache else False
        eos = self.tokenizer.eos_token_id if self.tokenizer is not None and stop_at_eos else None
        options["eos_id"] = eos if eos is not None else ()
        rows = [generate(self.model, row.tolist(), tap=tap if tap.calls else None, **options) for row in ids]
        whole = [row.prompt_ids + row.ids for row in rows]
        as_text = return_type == "str" or (return_type == "input" and (single or (isinstance(input, list) and isinstance(input[0], str))))
        if as_text:
            bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
            texts = [self.to_string(w[int(bos and not isinstance(input, Tensor)) :]) for w in whole]
            return texts[0] if single else texts
        longest = max(map(len, whole))
        return torch.tensor([w + [eos or 0] * (longest - len(w)) for w in whole])

    # Weights

    @property
    def weights(self) -> Weights:
        """The matrices by name (:func:`glassformer.look.weights`)."""
        return weights(self.model)

    def __getattr__(self, name: str) -> Any:
        if name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_out"):
            if name == "W_gate" and not self.cfg.gated_mlp:
                return None
            return getattr(self.weights, name).stack()
        if name in ("W_E", "W_U", "b_U", "W_pos"):
            return getattr(self.weights, name)
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    @property
    def W_E_pos(self) -> Tensor:
        """Embedding and positions, one below the other."""
        return torch.cat([self.W_E, self.W_pos])

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q W_K^T`` of all heads: factored [l h d d] (before rotation)."""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V W_O`` of all heads: factored [l h d d]."""
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def blocks(self) -> Any:
        """``blocks[3].attn.W_Q``, ``blocks[3].mlp.W_out``, ``blocks[3].attn.hook_pattern``."""
        return [block_of(self, i) for i in range(self.cfg.n_layers)]

    @property
    def embed(self) -> Any:
        """``embed.W_E``."""
        return SimpleNamespace(W_E=self.W_E)

    @property
    def pos_embed(self) -> Any:
        """``pos_embed.W_pos``."""
        return SimpleNamespace(W_pos=self.W_pos)

    @property
    def unembed(self) -> Any:
        """``unembed.W_U``, ``unembed.b_U``."""
        return SimpleNamespace(W_U=self.W_U, b_U=self.b_U)

    @property
    def ln_final(self) -> Any:
        """``ln_final.w``, ``ln_final.b``; called, it norms a stream."""
        return vectors(self.model, self.model.final_norm, {n: p for n, p in self.hook_dict.items() if n.startswith("ln_final.")})

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Columns of ``W_U`` for tokens: [.. d]."""
        if isinstance(tokens, list | tuple) and any(isinstance(token, str) for token in tokens):
            tokens = [self.to_single_token(token) if isinstance(token, str) else token for token in tokens]
        ids = as_ids(self.to_single_token(tokens) if isinstance(tokens, str) else tokens).to(self.cfg.device)
        if ids.is_floating_point() or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.cfg.d_vocab):
            raise InputError(f"Token ids are whole numbers from 0 to {self.cfg.d_vocab - 1}, but {ids.flatten().tolist()[:8]} were given.")
        return self.W_U.T[ids[0] if ids.ndim == 1 and len(ids) == 1 else ids]

    def accumulated_bias(self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True) -> Tensor:
        """The sum [d] of the biases that layers before ``layer`` add to the stream."""
        total = torch.zeros(self.cfg.d_model, device=self.cfg.device)
        for i in range(layer + int(mlp_input)):
            total = total + self.weights.b_O[i]
            if include_mlp_biases and i < layer:
                total = total + self.weights.b_out[i]
        return total

    def all_head_labels(self) -> list[str]:
        """``["L0H0", "L0H1", ...]``."""
        return [f"L{i}H{h}" for i in range(self.cfg.n_layers) for h in range(self.cfg.n_heads)]

    def all_composition_scores(self, mode: str) -> Tensor:
        """``||W1 W2|| / (||W1|| ||W2||)`` of ``"Q"``, ``"K"`` or ``"V"`` [l h l h], 0 where the second is not in a later layer; nothing is subtracted."""
        from ..circuits import composition_scores

        if not isinstance(mode, str):
            raise InputError(f"mode={mode!r} is none of 'Q', 'K' and 'V'.")
        found = composition_scores(self.model, fold=False)
        n, h = self.cfg.n_layers, self.cfg.n_heads
        return (found[mode.lower()] + found.baseline).nan_to_num(0.0).view(n, h, n, h)

    # Modes

    def eval(self) -> HookedTransformer:
        """Every call runs in evaluation mode anyway."""
        self.model.eval()
        return self

    def to(self, device: Any) -> HookedTransformer:
        """Move the model."""
        self.model.to(device if isinstance(device, torch.dtype) else device_named(device))
        self.cfg.device = next(self.model.parameters()).device
        return self

    def cpu(self) -> HookedTransformer:
        """Move the model to the processor."""
        return self.to("cpu")

    def cuda(self) -> HookedTransformer:
        """Move the model to the accelerator."""
        return self.to("cuda")

    def parameters(self) -> Any:
        """The model's own parameters."""
        return self.model.parameters()

    def named_parameters(self) -> Any:
        """The model's own parameters, under glassformer's names."""
        return self.model.named_parameters()

    def zero_grad(self) -> None:
        """Forget gradients."""
        self.model.zero_grad()

"""What a run kept, by their names, and the sums that are made of it."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError, SiteError, did_you_mean

from ..subject import choose
from .names import get_act_name
from .utils import Slice


class ActivationCache:
    """Activations by name: ``cache["pattern", 5]``, ``cache["blocks.5.attn.hook_pattern"]``, ``cache["resid_post", -1]``, ``cache["embed"]``."""

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True):
        self.cache_dict, self.model, self.has_batch_dim = cache_dict, model, has_batch_dim
        self.has_embed, self.has_pos_embed = "hook_embed" in cache_dict, "hook_pos_embed" in cache_dict

    def __getitem__(self, key: Any) -> Tensor:
        name = self.name(key)
        if name not in self.cache_dict:
            known = name in self.model.paths
            todo = " It was not asked for: widen names_filter." if known else did_you_mean(name, self.cache_dict)
            raise SiteError(f"{name!r} is not in the cache of {len(self.cache_dict)} activations.{todo}")
        return self.cache_dict[name]

    def name(self, key: Any) -> str:
        """The full name that a key means."""
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        if not isinstance(key, tuple | list) or not key:
            raise InputError(f"An activation is named by a text or by a tuple such as ('pattern', 5), but {key!r} was given.")
        parts = list(key)
        if len(parts) > 1 and isinstance(parts[1], int) and parts[1] < 0:
            parts[1] += self.model.cfg.n_layers
        return get_act_name(*parts)

    def __contains__(self, key: Any) -> bool:
        return self.name(key) in self.cache_dict

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache of {len(self)} activations: {', '.join(list(self.cache_dict)[:4])}, …"

    def keys(self) -> KeysView[str]:
        """All names."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """All activations."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Names with activations."""
        return self.cache_dict.items()

    def to(self, device: Any, move_model: bool = False) -> ActivationCache:
        """The cache moved to a device."""
        self.cache_dict = {n: x.to(device) for n, x in self.cache_dict.items()}
        if move_model:
            self.model.to(device)
        return self

    def remove_batch_dim(self) -> ActivationCache:
        """Take the batch axis away, which must have size one."""
        if self.has_batch_dim:
            for name, x in self.cache_dict.items():
                if x.shape[0] != 1:
                    raise InputError(f"The batch axis of {name} has size {x.shape[0]}, and only one of size 1 can be taken away.")
                self.cache_dict[name] = x[0]
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> ActivationCache:
        """A cache of some rows."""
        if not self.has_batch_dim:
            raise InputError("This cache has no batch axis any more: slice before remove_batch_dim().")
        chosen = Slice(batch_slice)
        return ActivationCache({n: chosen.apply(x) for n, x in self.cache_dict.items()}, self.model, chosen.mode != "int")

    # Sums

    def _until(self, layer: int | None) -> int:
        n: int = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= n:
            raise InputError(f"Layer {layer!r} was asked for, but the model has {n}: 0 to {n}, where {n} (or -1) is what the read-out reads.")
        return layer

    def _whole(self) -> None:
        if self.model.cfg.post_norm:
            raise InputError("In post-norm wiring every sublayer's output is normed together with the stream, so that the stream is no sum of outputs.")

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: Any = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The stream as it enters every layer up to ``layer`` (-1: what the read-out reads), stacked: [n b t d]."""
        layer, cut = self._until(layer), Slice(pos_slice)
        found, labels = [], []
        for i in range(layer + 1):
            if i == self.model.cfg.n_layers:
                found.append(self["resid_post", i - 1])
                labels.append("final_post")
                continue
            found.append(self["resid_pre", i])
            labels.append(f"{i}_pre")
            if (incl_mid and i < layer) or (mlp_input and i == layer):
                found.append(self["resid_mid", i])
                labels.append(f"{i}_mid")
        return self._stacked([cut.apply(x, -2) for x in found], labels, layer, mlp_input, apply_ln, cut, return_labels)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What makes up the stream that enters ``layer``: embeddings, every attention and feed-forward output, [n b t d]; their sum is the stream."""
        self._whole()
        choose(mode, ("all", "attn", "mlp"), "mode of decompose_resid()")
        layer, cut = self._until(layer), Slice(pos_slice)
        found, labels = [], []
        if incl_embeds:
            for name, here in (("embed", self.has_embed), ("pos_embed", self.has_pos_embed)):
                if here:
                    found.append(self[name])
                    labels.append(name)
        for i in range(layer):
            found += [self[f"{kind}_out", i] for kind in ("attn", "mlp") if mode in ("all", kind)]
            labels += [f"{i}_{kind}_out" for kind in ("attn", "mlp") if mode in ("all", kind)]
        if mlp_input and mode != "mlp":
            found.append(self["attn_out", layer])
            labels.append(f"{layer}_attn_out")
        return self._stacked([cut.apply(x, -2) for x in found], labels, layer, mlp_input, apply_ln, cut, return_labels)

    def compute_head_results(self) -> None:
        """Put every head's output into the cache, from ``z`` and ``W_O``."""
        for i in range(self.model.cfg.n_layers):
            if ("result", i) not in self:
                z, w = self["z", i], self.model.blocks[i].attn.W_O
                self.cache_dict[get_act_name("result", i)] = (z.transpose(-3, -2) @ w).transpose(-3, -2)

    def stack_head_results(
        self, layer: int | None = -1, return_labels: bool = False, incl_remainder: bool = False, pos_slice: Any = None, apply_ln: bool = False
    ) -> Any:
        """Every head's output before ``layer``, [(l h) b t d]; ``incl_remainder``: and what is left of the stream."""
        if self.model.cfg.post_norm:
            self._whole()
        layer, cut = self._until(layer), Slice(pos_slice)
        found, labels = [], []
        for i in range(layer):
            name = get_act_name("result", i)
            if name not in self.cache_dict:
                z, w = cut.apply(self["z", i], -3), self.model.blocks[i].attn.W_O
                each = (z.unsqueeze(-2) @ w)[..., 0, :]  # [.. h d]
            else:
                each = cut.apply(self.cache_dict[name], -3)
            found += list(each.unbind(-2))
            labels += [f"L{i}H{h}" for h in range(each.shape[-2])]
        self._rest(found, labels, layer, cut, incl_remainder)
        return self._stacked(found, labels, layer, False, apply_ln, cut, return_labels)

    def _rest(self, found: list[Tensor], labels: list[str], layer: int, cut: Slice, wanted: bool) -> None:
        if wanted:
            stream = cut.apply(self["resid_post", layer - 1] if layer else self["resid_pre", 0], -2)
            found.append(stream - sum(found[1:], found[0]) if found else stream)
            labels.append("remainder")

    def stack_activation(self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None) -> Tensor:
        """One activation of every layer before ``layer``, stacked."""
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(self._until(layer))])

    def get_neuron_results(self, layer: int, neuron_slice: Any = None, pos_slice: Any = None) -> Tensor:
        """What each neuron of a layer adds to the stream: [b t f d]."""
        cut, pick = Slice(pos_slice), Slice(neuron_slice)
        acts, w = cut.apply(self["post", layer], -2), self.model.blocks[layer].mlp.W_out
        return pick.apply(acts, -1)[..., None] * pick.apply(w, 0)

    def stack_neuron_results(
        self,
        layer: int | None,
        pos_slice: Any = None,
        neuron_slice: Any = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
    ) -> Any:
        """What each neuron before ``layer`` adds to the stream, [(l f) b t d]: large, so slice."""
        self._whole()
        layer, cut, pick = self._until(layer), Slice(pos_slice), Slice(neuron_slice)
        found, labels = [], []
        for i in range(layer):
            each = self.get_neuron_results(i, pick, cut)
            each = each.unsqueeze(-2) if pick.mode == "int" else each
            numbers = pick.apply(torch.arange(self.model.cfg.d_mlp)).reshape(-1).tolist()
            found += list(each.unbind(-2))
            labels += [f"L{i}N{n}" for n in numbers]
        self._rest(found, labels, layer, cut, incl_remainder)
        return self._stacked(found, labels, layer, False, apply_ln, cut, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: Any = None,
        return_labels: bool = False,
    ) -> Any:
        """The stream that enters ``layer`` as heads, neurons (or feed-forward outputs), embeddings and the biases."""
        self._whole()
        layer, cut = self._until(layer), Slice(pos_slice)
        heads, labels = self.stack_head_results(layer + int(mlp_input), return_labels=True, pos_slice=cut)
        found = list(heads)
        if layer and expand_neurons:
            rest, names = self.stack_neuron_results(layer, pos_slice=cut, return_labels=True)
        elif layer:
            rest, names = self.decompose_resid(layer, mode="mlp", incl_embeds=False, pos_slice=cut, return_labels=True)
        else:
            rest, names = [], []
        found, labels = found + list(rest), labels + names
        for name, here in (("embed", self.has_embed), ("pos_embed", self.has_pos_embed)):
            if here:
                found.append(cut.apply(self[name], -2))
                labels.append(name)
        bias = self.model.accumulated_bias(layer, mlp_input, include_mlp_biases=expand_neurons)
        found.append(bias.expand_as(found[0]))
        labels.append("bias")
        return self._stacked(found, labels, layer, mlp_input, apply_ln, cut, return_labels)

    def _stacked(self, found: list[Tensor], labels: list[str], layer: int, mlp_input: bool, apply_ln: bool, cut: Slice, return_labels: bool) -> Any:
        if found:
            made = torch.stack(list(torch.broadcast_tensors(*found)))
        else:
            made = cut.apply(self["resid_pre", 0], -2)[None][:0]
        if apply_ln:
            made = self.apply_ln_to_stack(made, layer, mlp_input=mlp_input, pos_slice=cut)
        return (made, labels) if return_labels else made

    # Read out

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """Parts of the stream as the norm of ``layer`` (-1: the final one) scales them: centred in a LayerNorm, divided by what the whole was divided by.

        The norm's weight is not applied (a folded model has none); :meth:`logit_attrs` does.
        """
        if self.model.cfg.normalization_type not in ("LN", "LNPre", "RMS", "RMSPre"):
            return residual_stack
        layer, cut, rows = self._until(layer), Slice(pos_slice), Slice(batch_slice)
        if has_batch_dim:
            residual_stack = rows.apply(residual_stack, 1)
        if self.model.cfg.normalization_type.startswith("LN"):
            residual_stack = residual_stack - residual_stack.mean(-1, keepdim=True)
        name = "ln_final.hook_scale" if layer == self.model.cfg.n_layers else f"blocks.{layer}.ln{2 if mlp_input else 1}.hook_scale"
        scale = cut.apply(self[name], -2)
        return residual_stack / (rows.apply(scale) if self.has_batch_dim else scale)

    def logit_attrs(
        self, residual_stack: Tensor, tokens: Any, incorrect_tokens: Any = None, pos_slice: Any = None, batch_slice: Any = None, has_batch_dim: bool = True
    ) -> Tensor:
        """What each part of the stream adds to the logit of ``tokens`` (less that of ``incorrect_tokens``): of all parts they sum to the logit without biases.

        The final norm's weight counts also where it is not folded into ``W_U``.
        """
        direction = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            wrong = self.model.tokens_to_residual_directions(incorrect_tokens)
            if wrong.shape != direction.shape:
                raise InputError(
                    f"tokens have shape {tuple(direction.shape[:-1])} and incorrect_tokens {tuple(wrong.shape[:-1])}: give one wrong token for each right one."
                )
            direction = direction - wrong
        scaled = self.apply_ln_to_stack(residual_stack, -1, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim)
        return (scaled * (direction * self.model.ln_final.w)).sum(-1)

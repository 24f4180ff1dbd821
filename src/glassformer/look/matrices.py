"""Weights by the names of the field, alike for every architecture, and views of them that change nothing.

    w = weights(model)                     as the model has them
    w.W_Q[3, 1]                            [d k]: queries of head 3.1 are  x W_Q + b_Q  (x is a row)
    w.W_Q.stack()                          [l h d k]
    w.folded.W_Q[3, 1]                     the same head with its norm's weight multiplied in
    w.folded.logits(tokens)                what the folded matrices compute: log-probabilities equal those of the model

Every matrix acts on rows: ``W_E [v d]``, ``W_pos [p d]``, ``W_Q W_K W_V [d k]``, ``W_O [k d]``, ``W_in W_gate [d f]``, ``W_out [f d]``, ``W_U [d v]``.
"""

# ruff: noqa: N802  (matrices are named as the field names them)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.models.transformer import TransformerModel
from glassformer.parts.attention import matrix_of
from glassformer.parts.embed import LiftTokens
from glassformer.parts.experts import ExpertsLayer
from glassformer.parts.norm import NoNormLayer
from glassformer.parts.position import LearnedLayer
from glassformer.parts.readout import LanguageModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .folded import exact, fold
from .layer_matrices import bias_of, entry_of, gated_of, projection, projection_bias, rows_of
from .subject import check_layer, n_heads, with_weights


class PerLayer:
    """One tensor of every layer, made when it is asked for: ``w[3]``, ``w[3, 1]``, ``w[-1]``, ``w[1:3]``, or all by :meth:`stack`."""

    def __init__(self, name: str, axes: str, count: int, make: Callable[[int], Tensor]):
        self.name, self.axes, self.count, self._make = name, axes, count, make

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        return (self._make(i) for i in range(self.count))

    def __getitem__(self, index: Any) -> Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if isinstance(first, int) and not isinstance(first, bool):
            if not -self.count <= first < self.count:
                raise InputError(f"{self.name}[{first}] was asked for, but the model has {self.count} layers, 0 to {self.count - 1}.")
            return self._of(self._make(first % self.count), tuple(rest), index)
        stacked = self.stack(range(self.count)[first] if isinstance(first, slice) else None)
        return self._of(stacked, (slice(None) if isinstance(first, slice) else first, *rest), index)

    def _of(self, made: Tensor, rest: tuple[Any, ...], index: Any) -> Tensor:
        try:
            return made[rest] if rest else made
        except (IndexError, TypeError, RuntimeError) as error:
            raise InputError(f"{self.name}[{index!r}] does not fit: its axes are l {self.axes}, of one layer {tuple(self._make(0).shape)}.") from error

    def stack(self, layers: Any = None) -> Tensor:
        """All layers on a new first axis. Raises :class:`InputError` if their shapes differ."""
        each = [self._make(i) for i in (range(self.count) if layers is None else layers)]
        if not each:
            raise InputError(f"{self.name}: no layer was asked for, so there is nothing to stack.")
        shapes = list(dict.fromkeys(tuple(x.shape) for x in each))
        if len(shapes) > 1:
            raise InputError(f"{self.name} has layers of shapes {' and '.join(map(str, shapes))}, which cannot be stacked: take one, as {self.name}[0].")
        return torch.stack(each)

    @property
    def shape(self) -> torch.Size:
        """Of the stack."""
        return self.stack().shape

    def __repr__(self) -> str:
        return f"{self.name}[l {self.axes}], {self.count} layers"


@dataclass(frozen=True, eq=False)
class Weights:
    """The matrices of a model. ``origin``: the model that was given. The four switches say what this view has done to them (:func:`weights`)."""

    origin: Any
    fold_norms: bool = False
    centre_writing: bool = False
    centre_readout: bool = False
    fold_value_bias: bool = False
    made: Any = field(default=None, repr=False)
    kind: str = "attn"
    tokenizer: Tokenizer | None = field(default=None, repr=False)
    """Of what ``gf.load`` gave: names tokens in what is read off the view."""

    def __repr__(self) -> str:
        spec = self._stack.spec
        heads = sorted({n_heads(self._stack, i) for i in range(self.n_layers)})
        count = "–".join(str(n) for n in (heads[0], heads[-1])[: len(heads)]) if heads else "0"
        done = [n for n in SWITCHES if getattr(self, n)] or ["as the model has them"]
        of = " cross-attention" if self.kind == "cross" else ""
        return (
            f"Weights of a {type(spec).__name__}{of}: {self.n_layers} layers of {count} heads, d_model {spec.d_model}, "
            f"{spec.vocab_size:,} tokens ({', '.join(done)})"
        )

    # Views

    @property
    def plain(self) -> Weights:
        """As the model has them."""
        return self.view(**dict.fromkeys(SWITCHES, False))

    @property
    def folded(self) -> Weights:
        """With the norms' weights and biases multiplied into the matrices that read them."""
        return self.view(fold_norms=True)

    @property
    def cross(self) -> Weights:
        """The same names for the cross-attention of a decoder that reads an encoder."""
        if not hasattr(self._stack.blocks[0], "cross"):
            raise InputError("This model has no cross-attention: only the decoder of an encoder-decoder has one.")
        return replace(self, kind="cross")

    def view(self, **switches: bool) -> Weights:
        """Another view of the same model: ``w.view(centre_readout=True)`` keeps the switches that it does not name."""
        now = {n: getattr(self, n) for n in SWITCHES}
        if unknown := [n for n in switches if n not in now]:
            raise InputError(f"There is no switch {unknown[0]!r} for a view of weights; there are {', '.join(SWITCHES)}.")
        return replace(weights(self.origin, **(now | switches)), kind=self.kind, tokenizer=self.tokenizer)

    def model(self) -> Any:
        """A model that has these matrices and computes the same function; tensors that did not change are the first model's own (do not train it)."""
        return self.origin if self.made is None else self.made

    def logits(self, *tokens: Tensor) -> Tensor:
        """What these matrices compute of tokens [b t] (an encoder-decoder: source and target): [b t v]."""
        model = self.model()
        with torch.no_grad(), evaluating(model):
            made: Tensor = model(*tokens)
        return made

    @property
    def _stack(self) -> TransformerModel:
        return stack_of(self.model())

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self._stack.blocks)

    # Embedding and read-out

    @property
    def W_E(self) -> Tensor:
        """[v d]: row ``i`` is what token ``i`` brings to the site ``embed`` (scaled and lifted; without token types)."""
        embed = self._stack.embed
        table = embed.weight.detach() * embed.factor if embed.factor != 1.0 else embed.weight.detach()
        if isinstance(embed.spec.lift, LiftTokens):
            lift: Any = embed.lift_tokens
            return (table @ lift.weight.T + (0 if lift.bias is None else lift.bias)).detach()
        return table

    @property
    def W_pos(self) -> Tensor:
        """[p d]: row ``i`` is what position ``i`` adds. Raises :class:`InputError` for a model without a table of positions."""
        position = self._stack.position
        if not isinstance(position, LearnedLayer):
            inside = sorted({type(b.attention.position).__name__ for b in self._stack.spec.blocks if hasattr(b.attention, "position")})
            raise InputError(
                f"W_pos is a learned table of positions, but this model has {type(self._stack.spec.position).__name__} (its attention: {', '.join(inside)})."
            )
        return position.table.detach()[position.spec.offset :]

    @property
    def W_U(self) -> Tensor:
        """[d v]: ``logits = resid_final W_U + b_U`` (before a cap; with a transform, of what that returns)."""
        readout: Any = self._readout()
        w: Tensor = readout.weight.detach().T
        return w if readout.factor == 1.0 else w * readout.factor

    @property
    def b_U(self) -> Tensor:
        """[v]; zeros where there is none."""
        readout: Any = self._readout()
        return torch.zeros_like(readout.weight[:, 0]).detach() if readout.bias is None else readout.bias.detach()

    def _readout(self) -> Any:
        if not isinstance(self._stack.spec.readout, LanguageModel):
            raise InputError(f"W_U is the read-out over a vocabulary, but this model ends in {type(self._stack.spec.readout).__name__}.")
        return self._stack.readout

    # Attention

    @property
    def W_Q(self) -> PerLayer:
        """[h d k] in a layer."""
        return self._attention("W_Q", "h d k", lambda a: projection(a, 0))

    @property
    def W_K(self) -> PerLayer:
        """[h d k] in a layer: one for every query head, so that ``W_Q[l, h]`` meets ``W_K[l, h]`` (grouped keys are repeated)."""
        return self._attention("W_K", "h d k", lambda a: projection(a, 1))

    @property
    def W_V(self) -> PerLayer:
        """[h d k] in a layer, one for every query head (grouped values are repeated)."""
        return self._attention("W_V", "h d k", lambda a: projection(a, 2))

    @property
    def W_O(self) -> PerLayer:
        """[h k d] in a layer."""
        return self._attention("W_O", "h k d", lambda a: matrix_of(a.out).detach().view(a.d, a.n_heads, a.d_value).permute(1, 2, 0))

    @property
    def b_Q(self) -> PerLayer:
        """[h k] in a layer; zeros where there is none. So are all biases."""
        return self._attention("b_Q", "h k", lambda a: projection_bias(a, 0))

    @property
    def b_K(self) -> PerLayer:
        """[h k] in a layer."""
        return self._attention("b_K", "h k", lambda a: projection_bias(a, 1))

    @property
    def b_V(self) -> PerLayer:
        """[h k] in a layer."""
        return self._attention("b_V", "h k", lambda a: projection_bias(a, 2))

    @property
    def b_O(self) -> PerLayer:
        """[d] in a layer."""
        return self._attention("b_O", "d", lambda a: bias_of(a.out, a.d))

    def _attention(self, name: str, axes: str, take: Callable[[Any], Tensor]) -> PerLayer:
        stack, kind = self._stack, self.kind
        return PerLayer(name, axes, len(stack.blocks), lambda i: take(getattr(stack.blocks[i], kind)))

    # Feed-forward

    @property
    def W_in(self) -> PerLayer:
        """[d f] in a layer ([e d f] of a mixture of experts)."""
        return self._feedforward("W_in", "d f", lambda f: rows_of(f, "in").T)

    @property
    def W_gate(self) -> PerLayer:
        """[d f] in a layer whose feed-forward is gated; :class:`InputError` in another."""
        return self._feedforward("W_gate", "d f", lambda f: rows_of(f, "gate").T)

    @property
    def W_out(self) -> PerLayer:
        """[f d] in a layer ([e f d] of a mixture of experts)."""
        return self._feedforward("W_out", "f d", lambda f: matrix_of(f.down).detach().T)

    @property
    def b_in(self) -> PerLayer:
        """[f] in a layer."""
        return self._feedforward("b_in", "f", lambda f: bias_of(entry_of(f), entry_of(f).out_features)[-f.spec.d_ff :])

    @property
    def b_gate(self) -> PerLayer:
        """[f] in a gated layer."""
        return self._feedforward("b_gate", "f", lambda f: bias_of(gated_of(f).gate_up, 2 * f.spec.d_ff)[: f.spec.d_ff])

    @property
    def b_out(self) -> PerLayer:
        """[d] in a layer."""
        return self._feedforward("b_out", "d", lambda f: bias_of(f.down, f.down.out_features))

    def _feedforward(self, name: str, axes: str, take: Callable[[Any], Tensor]) -> PerLayer:
        stack = self._stack

        def make(i: int) -> Tensor:
            block: Any = stack.blocks[i]
            layer = getattr(block, block.order[-1])
            if isinstance(layer, ExpertsLayer):
                return torch.stack([take(e) for e in layer.experts])
            return take(layer)

        return PerLayer(name, axes, len(stack.blocks), make)

    # Norms

    def norm(self, layer: int, name: str = "norm1") -> tuple[Tensor, Tensor]:
        """Weight and bias [d] of a norm of a layer (``norm1``, ``norm2``, ...), as what is normed is multiplied by and added to."""
        check_layer(self._stack, layer)
        return norm_of(getattr(self._stack.blocks[layer], name, None), self._stack.spec.d_model)

    @property
    def final_norm(self) -> tuple[Tensor, Tensor]:
        """Weight and bias [d] of the final norm."""
        return norm_of(self._stack.final_norm, self._stack.spec.d_model)


SWITCHES = ("fold_norms", "centre_writing", "centre_readout", "fold_value_bias")


def weights(model: Any, *, fold_norms: bool = False, centre_writing: bool = False, centre_readout: bool = False, fold_value_bias: bool = False) -> Weights:
    """The matrices of a model by name (an encoder-decoder: of its decoder; give ``model.encoder`` for the other half).

    fold_norms        ``W <- diag(w) W``, ``b <- b + b_norm W`` where a norm's output is read by matrices alone; of a LayerNorm the mean of
                      each column is taken out too, which the normed stream cannot see. Norms behind a sublayer (sandwich) and of queries
                      and keys stay. Exact in pre-norm, parallel and sandwich wiring.
    centre_writing    the mean over the stream's features is taken out of all that writes to it: LayerNorms remove it anyway.
    centre_readout    the mean over the vocabulary is taken out of ``W_U`` and ``b_U``: all logits of a position shift alike.
    fold_value_bias   ``b_O <- b_O + sum_h b_V W_O``, ``b_V <- 0``, since attention weights sum to 1.

    The model is never changed, and every view computes the same log-probabilities up to rounding. Raises :class:`InputError` where a step
    would not be exact (post-norm, a cap on logits, weights in few bits).
    """
    tokenizer = model.tokenizer if isinstance(model, Loaded) else None
    model = _model_of(model)
    made = None
    if fold_norms or centre_writing or centre_readout or fold_value_bias:
        made = fold(model, norms=fold_norms, writing=centre_writing, readout=centre_readout, value_bias=fold_value_bias)
    return Weights(model, fold_norms, centre_writing, centre_readout, fold_value_bias, made, tokenizer=tokenizer)


def exact_folds(model: Any) -> dict[str, bool]:
    """Which of the switches of :func:`weights` are exact in this model."""
    return exact(stack_of(_model_of(model)))


def stack_of(model: Any) -> TransformerModel:
    """The blocks whose weights are meant: the model's own, or an encoder-decoder's decoder."""
    stack: TransformerModel = model.decoder if isinstance(model, EncoderDecoderModel) else model
    return stack


def _model_of(given: Any) -> Any:
    """The model itself of what ``gf.load`` gave. Raises :class:`InputError` for what is none, or has no numbers."""
    model = given.model if isinstance(given, Loaded) else given
    if not hasattr(model, "sites"):
        raise InputError(f"A view of weights is one of a model of glassformer, but {described(type(model))} was given: gf.load(folder) gives one.")
    stack = with_weights(stack_of(model), "A view of weights")
    if next(stack.parameters()).device.type == "meta":
        raise InputError("This model stands on the meta device, where matrices have shapes but no numbers: build it without device='meta', or load one.")
    return model


def norm_of(norm: Any, d: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm as vectors [d]. Raises :class:`InputError` if there is no norm."""
    if norm is None or isinstance(norm, NoNormLayer) or not hasattr(norm, "weight"):
        raise InputError("There is no norm with a weight at that place of this model.")
    weight = norm.weight.detach() + getattr(norm, "offset", 0.0)
    bias = getattr(norm, "bias", None)
    return weight, torch.zeros_like(weight) if bias is None else bias.detach()

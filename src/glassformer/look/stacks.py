"""What a stack of blocks is made of, asked in one way of our own models and of foreign ones; and the checks of what is asked about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from glassformer.core.errors import InputError, SiteError, TokenizerError, did_you_mean
from glassformer.infer.session import position_limit
from glassformer.models.transformer import Decoder, TransformerModel
from glassformer.parts.readout import LanguageModel
from glassformer.text import Tokenizer
from glassformer.text.shown import shown


def n_layers(stack: Any) -> int:
    """Number of blocks."""
    return len(stack.blocks) if isinstance(stack, TransformerModel) else int(stack.n_layers)


def n_heads(stack: Any, layer: int, kind: str = "attn") -> int:
    """Number of query heads of a layer (``kind``: ``"attn"`` or ``"cross"``)."""
    block: Any = stack.blocks[layer] if isinstance(stack, TransformerModel) else None
    return int(getattr(block, kind).n_heads) if isinstance(stack, TransformerModel) else int(stack.n_heads(layer))


def feedforward_of(stack: Any, layer: int) -> str:
    """The name of a layer's feed-forward sublayer: ``"ffn"`` or ``"experts"``."""
    block: Any = stack.blocks[layer] if isinstance(stack, TransformerModel) else None
    return str(block.order[-1]) if isinstance(stack, TransformerModel) else str(stack.feedforward(layer))


def vocabulary(stack: Any) -> int:
    """Number of token ids."""
    return int(stack.spec.vocab_size) if isinstance(stack, TransformerModel) else int(stack.vocab_size)


def is_causal(stack: Any) -> bool:
    """Whether positions see only what came before."""
    return isinstance(stack.spec, Decoder) if isinstance(stack, TransformerModel) else bool(stack.causal)


def most_positions(model: Any) -> int | None:
    """How many positions a model can tell apart, None for any number."""
    found: int | None = model.max_positions if hasattr(model, "max_positions") else position_limit(model)  # a foreign model says it itself
    return found


def reads_tokens(stack: Any) -> bool:
    """Whether the model ends in scores over its vocabulary."""
    return isinstance(stack.spec.readout, LanguageModel) if isinstance(stack, TransformerModel) else bool(stack.reads_tokens)


def check_reads_tokens(stack: Any, what: str) -> None:
    """Raise :class:`InputError` if the model predicts no tokens."""
    if not reads_tokens(stack):
        if not isinstance(stack, TransformerModel):
            raise InputError(
                f"{what} asks for scores over the vocabulary, but no read-out over tokens is found in this {stack.name} from outside: "
                "load it with one (AutoModelForCausalLM, AutoModelForMaskedLM), or open its checkpoint with gf.load."
            )
        ends = type(stack.spec.readout).__name__
        raise InputError(f"{what} asks for scores over the vocabulary, but this model ends in {ends}: give one with readout=LanguageModel().")


def with_weights(stack: Any, what: str) -> TransformerModel:
    """The stack itself, whose parameters are known by name. Raises :class:`InputError` for a model that only lends its activations."""
    if not isinstance(stack, TransformerModel):
        raise InputError(f"{what} reads the model's matrices, which a foreign model keeps under names of its own: open its checkpoint with gf.load(folder).")
    return stack


_HEAD = re.compile(r"(?:L\s*)?(\d+)\s*(?:[.,/]|\s*H)\s*(\d+)", re.IGNORECASE)


def read_head(stack: Any, given: str | tuple[int, int]) -> tuple[int, int]:
    """``(layer, head)`` of ``"5.1"``, ``"L5H1"`` or ``(5, 1)``. Raises :class:`SiteError` for one that the model has not."""
    last = f"{n_layers(stack) - 1}.{n_heads(stack, n_layers(stack) - 1) - 1}" if n_layers(stack) else "0.0"
    if isinstance(given, str):
        found = _HEAD.fullmatch(given.strip())
        if not found:
            other = f"L{last.replace('.', 'H')}"
            raise SiteError(f"{given!r} names no head: write layer and head, both counted from 0, such as '{last}' or '{other}', the last one.")
        layer, head = int(found[1]), int(found[2])
    elif isinstance(given, tuple) and len(given) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        layer, head = given
    else:
        raise SiteError(f"{given!r} names no head: give (layer, head), or a text such as '{last}', the last one.")
    check_layer(stack, layer)
    n = n_heads(stack, layer)
    if not 0 <= head < n:
        raise SiteError(f"Head {layer}.{head} was asked for, but layer {layer} has {n} heads, 0 to {n - 1}.")
    return layer, head


def check_layer(stack: Any, layer: int) -> int:
    """The layer itself; raises :class:`SiteError` for one that the model has not."""
    n = n_layers(stack)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n:
        raise SiteError(f"Layer {layer!r} was asked for, but the model has {n} layers, 0 to {n - 1}.")
    return layer


def check_whole(least: int, /, **given: Any) -> None:
    """Raise :class:`InputError` for an argument that is no whole number of at least ``least``: ``check_whole(1, top=top, count=count)``."""
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{name}={value!r}: a whole number of at least {least} is needed.")


def choose(given: str, known: Sequence[str], what: str) -> str:
    """One of the ``known`` words; raises :class:`InputError` naming the nearest."""
    if given not in known:
        raise InputError(f"{given!r} is no {what}.{did_you_mean(str(given), known)} Known: {', '.join(known)}.")
    return given


def piece_of(tokenizer: Tokenizer | None, i: int) -> str:
    """Display form of a token id: every character visible; a number in angle quotes where there is no text for it."""
    if tokenizer is None:
        return f"‹{i}›"
    try:
        return shown(tokenizer.piece(i))
    except TokenizerError:
        return f"‹{i}›"


def shorten(text: str, most: int = 60) -> str:
    """A text that fits into a message."""
    return text if len(text) <= most else text[: most - 1] + "…"

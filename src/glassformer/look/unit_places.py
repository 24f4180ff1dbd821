"""Where the hidden units of feed-forward layers stand: their sites, and the modules behind them."""

from __future__ import annotations

from typing import Any

from glassformer.core.errors import InputError
from glassformer.models.transformer import TransformerModel

from .subject import check_layer, feedforward_of
from .windows import Reading


def unit_site(stack: Any, layer: int, what: str = "Its units") -> str:
    """The site of a layer's hidden units. Raises :class:`InputError` for a mixture of experts that has no expert for every token."""
    kind = feedforward_of(stack, layer)
    if kind == "ffn":
        return f"blocks.{layer}.ffn.post"
    block: Any = stack.blocks[layer]
    if block.experts.shared is not None:
        return f"blocks.{layer}.experts.shared.post"
    raise InputError(
        f"Layer {layer} is a mixture of experts: each expert sees only the tokens that chose it, so its hidden units are no site. {what} can be looked at "
        "in layers with a plain feed-forward layer or a shared expert; look at the router's choices with the site "
        f"'blocks.{layer}.experts.chosen' instead."
    )


def feedforward_layer(stack: TransformerModel, layer: int) -> Any:
    """The module behind :func:`unit_site`."""
    block: Any = stack.blocks[layer]
    return block.ffn if feedforward_of(stack, layer) == "ffn" else block.experts.shared


def unit_sites(reading: Reading, layer: int | None) -> dict[str, int]:
    """The layers that are looked at, by the full paths of their units."""
    stack = reading.stack
    if layer is not None:
        return {reading.subject.path(unit_site(stack, check_layer(stack, layer))): layer}
    found: dict[str, int] = {}
    trouble: InputError | None = None
    for i in range(reading.subject.layers):
        try:
            found[reading.subject.path(unit_site(stack, i))] = i
        except InputError as error:
            trouble = error
    if not found and trouble is not None:
        raise trouble
    return found

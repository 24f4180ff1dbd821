"""SmolLM3: Llama in which every few layers know no positions (arXiv 2501.18795), so that order comes from the others alone."""

from __future__ import annotations

from typing import Any

from glassformer.core.errors import WeightsError
from glassformer.models import Block, Decoder
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm
from glassformer.parts.position import NoPosition
from glassformer.parts.rotary import Rotary

from ..config import Config, rotary, rotary_config
from ..family import Family
from .llama import IGNORED, RULES, TIED, act_named, attention, common, decoder, layers, window_fields, windows


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm, n, interval = RMSNorm(eps=c.number("rms_norm_eps", 1e-6)), layers(c), c.whole("no_rope_layer_interval", 4)
    turned = c("no_rope_layers", None) or [int((i + 1) % interval != 0) for i in range(n)]  # despite its name, 1 is a layer that has positions
    if len(turned) < n:
        raise WeightsError(f"{c.file}: no_rope_layers names {len(turned)} layers, but num_hidden_layers is {n}.")
    size = c("sliding_window", None) if c.flag("use_sliding_window", False) else None
    kinds = c("layer_types", None) or ["sliding_attention" if size and not turned[i] else "full_attention" for i in range(n)]
    c.ignore("sliding_window", "max_window_layers")
    biased = c.flag("attention_bias", False)
    block = Block(
        attention(c, rotary(c, base=2_000_000.0), qkv_bias=biased, out_bias=biased),
        Gated(c.whole("intermediate_size"), act=act_named(c, "hidden_act", "silu"), bias=c.flag("mlp_bias", False)),
        norm=norm,
    )
    blocks = [block.at("attention.mask").set(mask) for mask in windows(c, kinds, size)]
    blocks = [b if has else b.at("attention.position").set(NoPosition()) for b, has in zip(blocks, turned, strict=False)]
    return decoder(c, blocks, final_norm=norm, tied=True)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    attentions: list[Any] = [b.attention for b in spec.blocks]
    position = next((a.position for a in attentions if isinstance(a.position, Rotary)), Rotary(base=2_000_000.0))
    fields = window_fields(spec)
    feedforward: Any = spec.blocks[0].feedforward
    return {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        **common(spec),
        "rope_parameters": rotary_config(position),
        "no_rope_layers": [int(isinstance(a.position, Rotary)) for a in attentions],
        "attention_bias": attentions[0].qkv_bias,
        "mlp_bias": feedforward.bias,
        "use_sliding_window": fields["sliding_window"] is not None,
        **fields,
    }


SMOLLM3 = Family("SmolLM3", ("smollm3",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")

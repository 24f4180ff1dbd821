"""GPT-OSS (arXiv 2508.10925): learned sinks, every other layer a window, and clamped experts that all lie in one tensor.

    gate_up_proj [e d 2f]                      ─► expert e: [d 2f] ─► turned ─► gate and up, which take turns, each for itself ─► gate_up [2f d]
    gate_up_proj_blocks, _scales  (MXFP4)      ─► expert e: 4 bits ─► [2f d] ──────────────────────┘

The published files keep the experts in MXFP4: blocks of 32 numbers of 4 bits (E2M1: a sign, two bits of exponent, one of mantissa) that
share a power of two (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from glassformer.core.errors import WeightsError
from glassformer.models import Block, Decoder
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import ClampedGated
from glassformer.parts.kernels import SoftmaxSink
from glassformer.parts.norm import RMSNorm
from glassformer.parts.routing import SoftmaxRouting

from ..config import Config, packed, rotary
from ..family import Family
from ..rules import Form, Place, Rule, Transposed
from .llama import ATTENTION, EMBEDDING, IGNORED, LAYER, NORMS, TIED, attention, common, decoder, layers, window_fields, windows


def gates_first(x: Tensor) -> Tensor:
    """Rows gate, up, gate, up, … as all gates, then all ups."""
    return torch.cat([x[::2], x[1::2]])


class TakingTurns(Form):
    """Columns (of a bias: entries) take turns in the checkpoint, gate and up; here rows are all gates, then all ups."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return gates_first(theirs[0].mT if theirs[0].ndim > 1 else theirs[0])

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        x = torch.stack(ours.chunk(2), 1).flatten(0, 1)
        return (x.mT if x.ndim > 1 else x,)


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower three bits of a 4-bit number say; the fourth is its sign."""


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """``blocks`` [r n 16] of two numbers a byte (the lower bits first) times ``2^(scales - 127)`` [r n], as float32 [r (n 32)]."""
    values = torch.tensor((*FP4, *(-x for x in FP4)), device=blocks.device)
    pairs = torch.stack([values[(blocks & 15).int()], values[(blocks >> 4).int()]], -1).flatten(-2)  # [r n 32]
    return torch.ldexp(pairs, scales.int()[..., None] - 127).flatten(-2)


class FromMXFP4(Form):
    """Blocks and scales of one expert as a matrix, rows as they lie."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return from_mxfp4(*theirs)

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        raise WeightsError("MXFP4 is read and not written: these experts are given back in the model's own type.")


class TakingTurnsInMXFP4(FromMXFP4):
    """The same where gate and up take turns."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return gates_first(from_mxfp4(*theirs))


ONE, ALL = "blocks.{i}.experts.experts.{e}", f"{LAYER}.mlp.experts"
RULES = (
    *EMBEDDING,
    *ATTENTION,
    *NORMS,
    Rule("blocks.{i}.attn.normaliser.sinks", f"{LAYER}.self_attn.sinks"),
    Rule("blocks.{i}.experts.router.{w}", f"{LAYER}.mlp.router.{{w}}"),
    Rule(f"{ONE}.gate_up.weight", f"{ALL}.gate_up_proj", form=TakingTurns()),
    Rule(f"{ONE}.gate_up.weight", f"{ALL}.gate_up_proj_blocks", f"{ALL}.gate_up_proj_scales", form=TakingTurnsInMXFP4()),
    Rule(f"{ONE}.gate_up.bias", f"{ALL}.gate_up_proj_bias", form=TakingTurns()),
    Rule(f"{ONE}.down.weight", f"{ALL}.down_proj", form=Transposed()),
    Rule(f"{ONE}.down.weight", f"{ALL}.down_proj_blocks", f"{ALL}.down_proj_scales", form=FromMXFP4()),
    Rule(f"{ONE}.down.bias", f"{ALL}.down_proj_bias"),
)


def spec(c: Config) -> Decoder:
    """From config.json."""
    norm, biased = RMSNorm(eps=c.number("rms_norm_eps", 1e-5), cast="late"), c.flag("attention_bias", True)
    c.only("hidden_act", "silu")
    c.ignore("initial_context_length", "experts_per_token")  # the original code's names of fields that are there as well
    if c.values.get("quantization_config"):
        held = c.inner("quantization_config")
        if held("quant_method", None) != "mxfp4":
            raise packed(c.file, "quantization_config", held.values)
        held.ignore("modules_to_not_convert", "dequantize")  # the files say by their tensors which ones are packed
        held.finish()
    n = layers(c)
    kinds = c("layer_types", ["full_attention" if i % 2 else "sliding_attention" for i in range(n)])
    masks = windows(c, kinds, c.whole("sliding_window", None))
    unit = ClampedGated(c.whole("intermediate_size"), limit=c.number("swiglu_limit", 7.0), alpha=c.number("swiglu_alpha", 1.702))
    count = c.whole("num_local_experts", None) or c.whole("num_experts", 128)
    experts = Experts(count, c.whole("num_experts_per_tok", 4), unit, routing=SoftmaxRouting(bias=True))
    heads = attention(c, rotary(c, base=150_000.0), normaliser=SoftmaxSink(), qkv_bias=biased, out_bias=biased)
    blocks = [Block(heads.replace(mask=mask), experts, norm=norm) for mask in masks]
    return decoder(c, blocks, final_norm=norm)


def config(spec: Decoder) -> dict[str, Any]:
    """To config.json."""
    block: Any = spec.blocks[0]
    experts: Any = block.feedforward
    fields = window_fields(spec)
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **common(spec),
        **fields,
        "hidden_act": "silu",
        "attention_bias": block.attention.qkv_bias,
        "intermediate_size": experts.expert.d_ff,
        "swiglu_limit": experts.expert.limit,
        "swiglu_alpha": experts.expert.alpha,
        "num_local_experts": experts.n_experts,
        "num_experts_per_tok": experts.top_k,
    }


GPT_OSS = Family("GPT-OSS", ("gpt_oss",), spec, config, RULES, tied=TIED, ignored=IGNORED, prefix="model.")

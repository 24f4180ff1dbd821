"""GGUF's names of tensors: one table for all architectures, and what some of them do otherwise.

    blocks.{i}.attn.qkv.weight   ◄─►  blk.{i}.attn_q.weight, blk.{i}.attn_k.weight, blk.{i}.attn_v.weight

llama.cpp has one vocabulary for all models, so one table names the parameters of every family here; the family's own table
is for the folders of the hub. What the converter changes has a form: queries and keys of Llama are stored for pairs of
neighbours (2i, 2i + 1) instead of halves, Gemma's norms with their one added, the two maps out of a latent apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Family
from ..rules import Form, Place, Rule
from ..stored import Stored
from .gguf_fields import ARCHITECTURES, architecture_of, assumed, config, metadata


class Paired(Form):
    """Queries, keys, values one below the other; in the file the rows of each query and key head go 0, k/2, 1, k/2 + 1, …: those which turn together."""

    def moved(self, rows: Sequence[Tensor], place: Place) -> list[Tensor]:
        """Rows of queries, keys and values in our order; whatever a row holds (numbers or packed bytes)."""
        q, k, v = rows
        return [_apart(q, place.part.n_heads), _apart(k, place.part.n_kv_heads), v]

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return torch.cat(self.moved(theirs, place))

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        q, k, v = ours.split(place.widths)
        return _together(q, place.part.n_heads), _together(k, place.part.n_kv_heads), v


def _apart(x: Tensor, heads: int) -> Tensor:
    """Per head: first of all pairs, then second of all pairs."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _together(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


class PlusOne(Form):
    """A norm's weight, stored with the one that it is the difference to (Gemma)."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        return theirs[0] - 1

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        return (ours + 1,)


class OutOfLatent(Form):
    """Keys and values out of the latent: stored apart, [h r k] (transposed) and [h k r]; here one matrix, per head its key's rows, then its value's."""

    def ours(self, theirs: Sequence[Tensor], place: Place) -> Tensor:
        k, v = theirs
        return torch.cat((k.mT, v), 1).flatten(0, 1)

    def theirs(self, ours: Tensor, place: Place) -> Sequence[Tensor]:
        part = place.part
        k, v = ours.unflatten(0, (part.n_heads, -1)).split((part.d_nope, part.d_value), 1)
        return k.mT, v


B = "blk.{i}"
EMBEDDING = (
    Rule("embed.weight", "token_embd.weight"),
    Rule("embed.types", "token_types.weight"),
    Rule("embed.norm.{w}", "token_embd_norm.{w}"),
    Rule("position.table", "position_embd.weight"),
    Rule("final_norm.{w}", "output_norm.{w}"),
    Rule("readout.matrix", "output.weight"),
    Rule("readout.bias", "output.bias"),
)
NORMS = (
    Rule("blocks.{i}.norm1.{w}", f"{B}.attn_norm.{{w}}"),
    Rule("blocks.{i}.norm2.{w}", f"{B}.ffn_norm.{{w}}"),
    Rule("blocks.{i}.norm1_post.{w}", f"{B}.post_attention_norm.{{w}}"),
    Rule("blocks.{i}.norm2_post.{w}", f"{B}.post_ffw_norm.{{w}}"),
    Rule("blocks.{i}.attn.q_norm.{w}", f"{B}.attn_q_norm.{{w}}"),
    Rule("blocks.{i}.attn.k_norm.{w}", f"{B}.attn_k_norm.{{w}}"),
    Rule("blocks.{i}.attn.q_norm.norm.{w}", f"{B}.attn_q_norm.{{w}}"),  # one norm over all heads
    Rule("blocks.{i}.attn.k_norm.norm.{w}", f"{B}.attn_k_norm.{{w}}"),
)
QKV = ("blocks.{i}.attn.qkv.{w}", f"{B}.attn_q.{{w}}", f"{B}.attn_k.{{w}}", f"{B}.attn_v.{{w}}")
ATTENTION = (
    Rule(*QKV),
    Rule("blocks.{i}.attn.qkv.{w}", f"{B}.attn_qkv.{{w}}"),
    Rule("blocks.{i}.attn.out.{w}", f"{B}.attn_output.{{w}}"),
    Rule("blocks.{i}.attn.normaliser.sinks", f"{B}.attn_sinks.weight"),
)
FEEDFORWARD = (
    Rule("blocks.{i}.ffn.gate_up.{w}", f"{B}.ffn_gate.{{w}}", f"{B}.ffn_up.{{w}}"),
    Rule("blocks.{i}.ffn.up.{w}", f"{B}.ffn_up.{{w}}"),
    Rule("blocks.{i}.ffn.down.{w}", f"{B}.ffn_down.{{w}}"),
)
E, S = "blocks.{i}.experts.experts.{e}", "blocks.{i}.experts.shared"
EXPERTS = (
    Rule("blocks.{i}.experts.router.{w}", f"{B}.ffn_gate_inp.{{w}}"),
    Rule("blocks.{i}.experts.routing.correction", f"{B}.exp_probs_b.bias"),
    Rule(f"{E}.gate_up.{{w}}", f"{B}.ffn_gate_exps.{{w}}", f"{B}.ffn_up_exps.{{w}}"),
    Rule(f"{E}.gate_up.{{w}}", f"{B}.ffn_gate.{{e}}.{{w}}", f"{B}.ffn_up.{{e}}.{{w}}"),  # files of the first months had a tensor per expert
    Rule(f"{E}.down.{{w}}", f"{B}.ffn_down_exps.{{w}}"),
    Rule(f"{E}.down.{{w}}", f"{B}.ffn_down.{{e}}.{{w}}"),
    Rule(f"{S}.gate_up.{{w}}", f"{B}.ffn_gate_shexp.{{w}}", f"{B}.ffn_up_shexp.{{w}}"),
    Rule(f"{S}.down.{{w}}", f"{B}.ffn_down_shexp.{{w}}"),
)
LATENT = (
    Rule("blocks.{i}.attn.q.weight", f"{B}.attn_q.weight"),
    Rule("blocks.{i}.attn.q_down.weight", f"{B}.attn_q_a.weight"),
    Rule("blocks.{i}.attn.q_norm.weight", f"{B}.attn_q_a_norm.weight"),
    Rule("blocks.{i}.attn.q_up.weight", f"{B}.attn_q_b.weight"),
    Rule("blocks.{i}.attn.kv_down.weight", f"{B}.attn_kv_a_mqa.weight"),
    Rule("blocks.{i}.attn.kv_norm.weight", f"{B}.attn_kv_a_norm.weight"),
    Rule("blocks.{i}.attn.kv_up.weight", f"{B}.attn_k_b.weight", f"{B}.attn_v_b.weight", form=OutOfLatent()),
    Rule("blocks.{i}.attn.kv_up.weight", f"{B}.attn_kv_b.weight"),
)
TABLE = (*EMBEDDING, *NORMS, *ATTENTION, *FEEDFORWARD, *EXPERTS)


def _half(ours: str, theirs: str) -> tuple[Rule, ...]:
    """One half of an encoder-decoder."""
    o, b = f"{ours}.blocks.{{i}}", f"{theirs}.blk.{{i}}"
    return (
        Rule(f"{ours}.final_norm.{{w}}", f"{theirs}.output_norm.{{w}}"),
        Rule(f"{ours}.position.table", f"{theirs}.blk.0.attn_rel_b.weight"),
        Rule(f"{o}.norm1.{{w}}", f"{b}.attn_norm.{{w}}"),
        Rule(f"{o}.norm_cross.{{w}}", f"{b}.cross_attn_norm.{{w}}"),
        Rule(f"{o}.norm2.{{w}}", f"{b}.ffn_norm.{{w}}"),
        Rule(f"{o}.attn.qkv.{{w}}", *(f"{b}.attn_{n}.{{w}}" for n in "qkv")),
        Rule(f"{o}.attn.out.{{w}}", f"{b}.attn_o.{{w}}"),
        Rule(f"{o}.cross.q.{{w}}", f"{b}.cross_attn_q.{{w}}"),
        Rule(f"{o}.cross.kv.{{w}}", *(f"{b}.cross_attn_{n}.{{w}}" for n in "kv")),
        Rule(f"{o}.cross.out.{{w}}", f"{b}.cross_attn_o.{{w}}"),
        Rule(f"{o}.ffn.gate_up.{{w}}", f"{b}.ffn_gate.{{w}}", f"{b}.ffn_up.{{w}}"),
        Rule(f"{o}.ffn.up.{{w}}", f"{b}.ffn_up.{{w}}"),
        Rule(f"{o}.ffn.down.{{w}}", f"{b}.ffn_down.{{w}}"),
    )


FUSED = (Rule("blocks.{i}.attn.qkv.{w}", f"{B}.attn_qkv.{{w}}"),)
PAIRED = (Rule(*QKV, form=Paired()),)
GEMMA = tuple(Rule(r.ours, *r.theirs, form=PlusOne()) for r in (*EMBEDDING, *NORMS) if "norm" in r.ours)
OTHERWISE: dict[str, tuple[Rule, ...]] = {
    "llama": PAIRED,
    "smollm3": PAIRED,
    "gpt2": FUSED,
    "gptneox": FUSED,
    "phi3": (*FUSED, Rule("blocks.{i}.ffn.gate_up.{w}", f"{B}.ffn_up.{{w}}")),
    "bert": (Rule("blocks.{i}.norm1.{w}", f"{B}.attn_output_norm.{{w}}"), Rule("blocks.{i}.norm2.{w}", f"{B}.layer_output_norm.{{w}}")),
    "t5": (
        Rule("encoder.embed.weight", "token_embd.weight"),
        Rule("decoder.readout.matrix", "output.weight"),
        *_half("encoder", "enc"),
        *_half("decoder", "dec"),
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "deepseek2": LATENT,
    "gpt-oss": (Rule("blocks.{i}.norm2.{w}", f"{B}.post_attention_norm.{{w}}"),),
}
"""What an architecture calls or stores otherwise; asked before the table."""

FREQUENCIES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", f"{B}.attn_rot_embd.weight")
"""Tensors that say what the Spec says: no parameters."""


def rules(arch: str) -> tuple[Rule, ...]:
    """The table of one architecture."""
    return (*OTHERWISE.get(arch, ()), *TABLE)


def dialect(family: Family, spec: Any, tensors: Mapping[str, Stored]) -> tuple[Family, Any]:
    """A family as GGUF writes it: the same Spec, other names."""
    arch = architecture_of(family.model_types).name
    tied = {"output.weight": "token_embd.weight"}
    return replace(family, rules=rules(arch), tied=tied, ignored=FREQUENCIES, unused=(), prefix="", strips=(), by_spec=None), spec


__all__ = ["ARCHITECTURES", "OTHERWISE", "TABLE", "OutOfLatent", "Paired", "PlusOne", "assumed", "config", "dialect", "metadata", "rules"]

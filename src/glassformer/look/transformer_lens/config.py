"""``model.cfg``: the sizes and choices of a model under TransformerLens' names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from glassformer.parts.feedforward import GatedLayer, PlainLayer
from glassformer.parts.norm import LayerNorm, RMSNorm
from glassformer.parts.wiring import Parallel, PostNorm


def config_of(model: Any, limit: int | None, tokenizer: Any, default_prepend_bos: bool | None) -> SimpleNamespace:
    """Read off a model; where layers differ, the first one's. ``n_ctx`` is 2048 for a model without an end."""
    spec = model.spec
    first: Any = model.blocks[0]
    attn, ff = first.attn, getattr(first, first.order[-1])
    ff = ff if isinstance(ff, PlainLayer | GatedLayer) else next(iter(ff.experts))
    norm = spec.blocks[0].norm
    inside = getattr(spec.blocks[0].attention, "position", None)
    position = (
        "rotary"
        if inside is not None and inside.rotates
        else "alibi"
        if type(inside).__name__ == "ALiBi" or type(spec.position).__name__ == "ALiBi"
        else "standard"
    )
    bos = None if tokenizer is None else tokenizer.bos_id
    if bos is None and tokenizer is not None:
        bos = tokenizer.eos_id  # GPT-2 begins and ends texts with one token
    parameter = next(model.parameters())
    return SimpleNamespace(
        n_layers=len(model.blocks),
        n_heads=attn.n_heads,
        n_key_value_heads=attn.n_kv_heads if attn.n_kv_heads != attn.n_heads else None,
        d_model=spec.d_model,
        d_head=attn.d_head,
        d_mlp=ff.spec.d_ff,
        d_vocab=spec.vocab_size,
        d_vocab_out=spec.vocab_size,
        n_ctx=2048 if limit is None else limit,
        act_fn=ff.spec.act,
        gated_mlp=isinstance(ff, GatedLayer),
        attn_only=False,
        eps=getattr(norm, "eps", None),
        normalization_type="LN" if isinstance(norm, LayerNorm) else "RMS" if isinstance(norm, RMSNorm) else None,
        final_rms=isinstance(spec.final_norm, RMSNorm),
        positional_embedding_type=position,
        parallel_attn_mlp=isinstance(spec.blocks[0].wiring, Parallel),
        post_norm=any(isinstance(b.wiring, PostNorm) for b in spec.blocks),
        num_experts=len(getattr(getattr(first, first.order[-1]), "experts", ())) or None,
        attention_dir="causal" if type(spec).__name__ == "Decoder" else "bidirectional",
        use_attn_scale=True,
        attn_scale=1.0 / attn.scale,
        use_attn_result=False,
        use_hook_mlp_in=False,
        use_split_qkv_input=False,
        default_prepend_bos=bos is not None if default_prepend_bos is None else default_prepend_bos,
        bos_id=bos,
        tokenizer_prepends_bos=False,
        device=parameter.device,
        dtype=parameter.dtype,
        model_name=type(spec).__name__,
        original_architecture=type(spec).__name__,
        seed=None,
        processed=(),
        spec=spec,
    )

"""BERT with its masked-token head against the reference library: token types, rows of different lengths."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from glassformer.core.tap import Record
from glassformer.models.presets import preset
from parity.reference import VOCAB, close, fill, hold_together, joined, lively, tokens

LAYERS, D, HEADS, FF = 2, 32, 4, 48


def bert_pair() -> tuple[Any, Any]:
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FF,
        max_position_embeddings=40,
        attn_implementation="eager",
    )
    ref = lively(transformers.BertForMaskedLM(config))
    s = ref.state_dict()
    e, c = "bert.embeddings", "cls.predictions"
    w = {
        "embed.weight": s[f"{e}.word_embeddings.weight"],
        "embed.types": s[f"{e}.token_type_embeddings.weight"],
        "position.table": s[f"{e}.position_embeddings.weight"],
        "readout.bias": s[f"{c}.bias"],
    }
    for n in ("weight", "bias"):
        w |= {f"embed.norm.{n}": s[f"{e}.LayerNorm.{n}"]}
        w |= {f"readout.transform.linear.{n}": s[f"{c}.transform.dense.{n}"], f"readout.transform.norm.{n}": s[f"{c}.transform.LayerNorm.{n}"]}
        for i in range(LAYERS):
            a, b = f"bert.encoder.layer.{i}", f"blocks.{i}"
            w[f"{b}.attn.qkv.{n}"] = joined(s, *(f"{a}.attention.self.{m}.{n}" for m in ("query", "key", "value")))
            w |= {f"{b}.attn.out.{n}": s[f"{a}.attention.output.dense.{n}"], f"{b}.norm1.{n}": s[f"{a}.attention.output.LayerNorm.{n}"]}
            w |= {f"{b}.ffn.up.{n}": s[f"{a}.intermediate.dense.{n}"], f"{b}.ffn.down.{n}": s[f"{a}.output.dense.{n}"]}
            w |= {f"{b}.norm2.{n}": s[f"{a}.output.LayerNorm.{n}"]}
    spec = preset("bert-base")
    block = spec.blocks[0].at("attention.n_heads").set(HEADS).at("feedforward.d_ff").set(FF)
    spec = spec.replace(vocab_size=VOCAB, d_model=D, blocks=(block,) * LAYERS).at("position.max_positions").set(40)
    return fill(spec.build(), w), ref


def test_bert_equals_the_reference():
    model, ref = bert_pair()
    hold_together(model, ref, tokens(3, 15), LAYERS)


def test_bert_with_types_and_rows_of_different_lengths_equals_the_reference():
    model, ref = bert_pair()
    ids, lengths = tokens(3, 15), torch.tensor([15, 4, 9])
    real = torch.arange(15)[None] < lengths[:, None]
    types = (torch.arange(15)[None] > torch.tensor([7, 2, 3])[:, None]).long()
    options = {"attention_mask": real.long(), "token_type_ids": types}
    hold_together(model, ref, ids, LAYERS, options=options, real=real, lengths=lengths, types=types)


def test_bert_embeddings_and_streams_within_a_layer_equal_the_reference():
    model, ref = bert_pair()
    seen: dict[str, torch.Tensor] = {}
    layer = ref.bert.encoder.layer[1]
    hooks = [
        layer.attention.output.register_forward_hook(lambda m, a, y: seen.update(mid=y)),
        layer.attention.output.dense.register_forward_hook(lambda m, a, y: seen.update(out=y)),
        layer.intermediate.register_forward_hook(lambda m, a, y: seen.update(post=y)),
        ref.bert.embeddings.register_forward_hook(lambda m, a, y: seen.update(start=y)),
    ]
    tap, ids = Record("**"), tokens(2, 11)
    with torch.no_grad():
        ref(input_ids=ids)
        model(ids, tap=tap)
    for h in hooks:
        h.remove()
    for site, name in {"blocks.0.resid_pre": "start", "blocks.1.resid_mid": "mid", "blocks.1.attn.out": "out", "blocks.1.ffn.post": "post"}.items():
        close(tap[site], seen[name], site)

"""T5 against the reference library: version 1.0 (ReLU, tied) and 1.1 (gated GELU, read-out of its own)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from glassformer.core.tap import Record
from glassformer.models.presets import preset
from glassformer.parts.feedforward import Gated
from glassformer.parts.readout import LanguageModel
from parity.reference import VOCAB, close, fill, joined, lively, tokens

LAYERS, D, HEADS, FF, HEAD = 2, 32, 4, 48, 6


def t5_pair(gated: bool) -> tuple[Any, Any]:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=D,
        d_kv=HEAD,
        d_ff=FF,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        eos_token_id=None,
        attn_implementation="eager",
    )
    ref = lively(transformers.T5ForConditionalGeneration(config))
    s = ref.state_dict()
    w = {"encoder.embed.weight": s["shared.weight"]}
    if gated:
        w["decoder.readout.matrix"] = s["lm_head.weight"]
    for half in ("encoder", "decoder"):
        w[f"{half}.position.table"] = s[f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        w[f"{half}.final_norm.weight"] = s[f"{half}.final_layer_norm.weight"]
        for i in range(LAYERS):
            a, b = f"{half}.block.{i}.layer", f"{half}.blocks.{i}"
            w[f"{b}.attn.qkv.weight"] = joined(s, *(f"{a}.0.SelfAttention.{n}.weight" for n in "qkv"))
            w |= {f"{b}.attn.out.weight": s[f"{a}.0.SelfAttention.o.weight"], f"{b}.norm1.weight": s[f"{a}.0.layer_norm.weight"]}
            last = 1
            if half == "decoder":
                w |= {f"{b}.cross.q.weight": s[f"{a}.1.EncDecAttention.q.weight"], f"{b}.cross.out.weight": s[f"{a}.1.EncDecAttention.o.weight"]}
                w[f"{b}.cross.kv.weight"] = joined(s, *(f"{a}.1.EncDecAttention.{n}.weight" for n in "kv"))
                w[f"{b}.norm_cross.weight"] = s[f"{a}.1.layer_norm.weight"]
                last = 2
            f = f"{a}.{last}.DenseReluDense"
            if gated:
                w[f"{b}.ffn.gate_up.weight"] = joined(s, f"{f}.wi_0.weight", f"{f}.wi_1.weight")
            else:
                w[f"{b}.ffn.up.weight"] = s[f"{f}.wi.weight"]
            w |= {f"{b}.ffn.down.weight": s[f"{f}.wo.weight"], f"{b}.norm2.weight": s[f"{a}.{last}.layer_norm.weight"]}
    spec = preset("t5-small")
    for half in ("encoder", "decoder"):
        spec = spec.at(f"{half}.blocks").update(lambda blocks: blocks[:LAYERS]).at(f"{half}.tied").set(not gated)
        spec = spec.at(f"{half}.blocks.*.attention.n_heads").set(HEADS).at(f"{half}.blocks.*.attention.d_head").set(HEAD)
        spec = spec.at(f"{half}.position.buckets").set(8).at(f"{half}.position.max_distance").set(12)
        spec = spec.at(f"{half}.blocks.*.feedforward").set(Gated(FF, act="gelu_tanh") if gated else spec.encoder.blocks[0].feedforward.replace(d_ff=FF))
    spec = spec.at("decoder.blocks.*.cross.n_heads").set(HEADS).at("decoder.blocks.*.cross.d_head").set(HEAD)
    if gated:
        spec = spec.at("decoder.readout").set(LanguageModel())
    sizes = {"vocab_size": VOCAB, "d_model": D}
    spec = spec.replace(encoder=spec.encoder.replace(**sizes), decoder=spec.decoder.replace(**sizes))
    return fill(spec.build(), w), ref


@pytest.mark.parametrize("gated", [False, True], ids=["v1.0", "v1.1"])
def test_t5_equals_the_reference(gated):
    model, ref = t5_pair(gated)
    source, target = tokens(3, 19), tokens(3, 15, seed=2)
    lengths = torch.tensor([19, 5, 12])
    real = torch.arange(19)[None] < lengths[:, None]
    tap = Record("**")
    with torch.no_grad():
        theirs = ref(input_ids=source, attention_mask=real.long(), decoder_input_ids=target, output_hidden_states=True, output_attentions=True)
        logits = model(source, target, source_lengths=lengths, tap=tap)
    for i in range(LAYERS):
        close(tap[f"encoder.blocks.{i}.resid_pre"][real], theirs.encoder_hidden_states[i][real], f"encoder stream {i}")
        close(tap[f"encoder.blocks.{i}.attn.pattern"].movedim(1, 2)[real], theirs.encoder_attentions[i].movedim(1, 2)[real], f"encoder pattern {i}")
        close(tap[f"decoder.blocks.{i}.resid_pre"], theirs.decoder_hidden_states[i], f"decoder stream {i}")
        close(tap[f"decoder.blocks.{i}.attn.pattern"], theirs.decoder_attentions[i], f"decoder pattern {i}")
        close(tap[f"decoder.blocks.{i}.cross.pattern"], theirs.cross_attentions[i], f"cross pattern {i}")
    close(tap["encoder.resid_final"][real], theirs.encoder_last_hidden_state[real], "memory")
    close(tap["decoder.resid_final"], theirs.decoder_hidden_states[LAYERS], "decoder's last stream")
    close(logits, theirs.logits, "logits")


@pytest.mark.parametrize("gated", [False, True], ids=["v1.0", "v1.1"])
def test_t5_generates_what_the_reference_generates(gated):
    model, ref = t5_pair(gated)
    source, lengths, n = tokens(2, 11), [11, 6], 20
    real = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    theirs = ref.generate(
        input_ids=source, attention_mask=real.long(), max_new_tokens=n, min_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    cache = model.cache(batch=2, capacity=n + 1)
    feed = torch.zeros(2, 1, dtype=torch.long)
    ids = feed
    with torch.no_grad():
        memory = model.encode(source, lengths)
        for step in range(n):
            logits = model.decode(feed, memory if step == 0 else None, source_lengths=lengths, cache=cache)[:, -1]
            close(logits, theirs.logits[step], f"logits of step {step}")
            feed = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, feed], 1)
    assert torch.equal(ids, theirs.sequences)

"""What a model says about itself before it runs: parameters, dimensions, operations, bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glassformer.core.mask import Window
from glassformer.core.tap import Record
from glassformer.models import Block, Decoder, Encoder
from glassformer.models.presets import names, preset
from glassformer.parts.attention import Attention
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated, Plain
from shapes import check_shapes
from tools import ALL, VOCAB, D, built, call, each, tokens

# Published totals, tied weights once.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "bert-base": 109_514_298,
    "t5-small": 60_506_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert preset(name).build(device="meta").params().total == PUBLISHED[name]


@pytest.mark.parametrize("name", names())
def test_every_preset_has_the_shapes_that_its_sites_declare(name):
    """All layers of a large model are alike, so two of them (on the meta device) are enough."""
    spec = preset(name)
    paths = ("encoder.blocks", "decoder.blocks") if hasattr(spec, "encoder") else ("blocks",)
    for path in paths:
        assert len(set(spec.at(path).get()[0])) == 1
        spec = spec.at(path).update(lambda blocks: blocks[:2])
    check_shapes(spec.build(device="meta").eval(), torch.zeros(2, 5, dtype=torch.long, device="meta"))


@each(ALL)
def test_the_rows_add_up_to_the_exact_total(name):
    model = built(name)
    params = model.params()
    assert params.total == sum(r.size for r in params.rows) == sum(x.numel() for x in {id(x): x for x in model.parameters()}.values())
    lines = str(params).splitlines()
    last = next(line for line in lines if line.startswith("total"))
    assert last.split()[-1] == f"{params.total:,}"
    shown = [int(line.split()[-1].replace(",", "")) for line in lines[2:] if line and line[0] not in "-t"]
    assert (
        sum(shown) + sum(int(line.split()[-1].replace(",", "")) for line in lines[2:] if line.startswith("t") and not line.startswith(("total", "tied")))
        == params.total
    )


def test_tied_weights_are_counted_once_and_named():
    tied, untied = (Decoder(VOCAB, D, (Block(Attention(4)),), tied=t).build(device="meta").params() for t in (True, False))
    assert untied.total - tied.total == VOCAB * D
    assert tied.tied == ("readout.weight is the embedding's table",) and untied.tied == ()
    assert str(tied).endswith("tied, counted once: readout.weight is the embedding's table")
    pair = preset("t5-small").build(device="meta").params()
    assert "decoder.embed.weight is encoder.embed.weight" in pair.tied


def test_equal_layers_share_a_line():
    text = str(preset("gpt2").build(device="meta").params())
    assert "blocks.{0-11}.attn.qkv.weight" in text and len(text.splitlines()) < 30
    line = next(x for x in text.splitlines() if "attn.qkv.weight" in x)
    assert line.split() == ["blocks.{0-11}.attn.qkv.weight", "2304", "x", "768", "1,769,472", "12", "21,233,664"]


# Dimensions


def test_dimensions_of_a_text():
    model = preset("gpt2").build(device="meta")
    facts = model.dimensions("The car is red")
    rows = {r.path: r for r in facts.rows}
    assert facts.tokens == 14 and facts.text == "'The car is red': 14 bytes, one token each (give a tokenizer for its own pieces)"
    assert rows["embed"].shape == (1, 14, 768) and rows["blocks.7.attn.pattern"].shape == (1, 12, 14, 14)
    assert rows["blocks.0.attn.q"].shape == (1, 14, 12, 64) and rows["logits"].shape == (1, 14, 50_257)
    assert rows["blocks.0.ffn.post"].shape == (1, 14, 3_072) and rows["blocks.0.norm1.scale"].shape == (1, 14, 1)
    assert set(rows) == {s.path for s in model.sites()}
    text = str(facts)
    assert "blocks.{0-11}.attn.pattern" in text and "b=1 h=12 t=14 s=14" in text and len(text.splitlines()) < 40
    assert next(iter(rows)) == "embed" and list(rows)[-1] == "logits"


def test_dimensions_of_tokens_a_number_and_a_tokenizer():
    class Words:
        def encode(self, text: str) -> list[int]:
            return list(range(len(text.split())))

    model = built("llama")
    assert model.dimensions([5, 3, 1]).tokens == 3 and model.dimensions(7).text == "7 tokens"
    facts = model.dimensions("The car is red", Words())
    assert facts.tokens == 4 and facts.text == "'The car is red': 4 tokens"


@each(ALL)
def test_dimensions_name_every_site_of_a_variant(name):
    model = built(name)
    facts = model.dimensions(5)
    assert {r.path for r in facts.rows} == {s.path for s in model.sites()}
    tap = Record("**")
    with torch.no_grad():
        ids = tokens(1, 5)
        (model(ids, ids, tap=tap) if hasattr(model, "encoder") else model(ids, tap=tap))
    assert {r.path: r.shape for r in facts.rows} == {p: tuple(tap[p].shape) for p in tap.paths}


def test_layers_that_differ_are_shown_apart():
    local, wide = Block(Attention(4, mask=Window(3)), Gated(32)), Block(Attention(4), Gated(64))
    text = str(Decoder(VOCAB, D, (local, local, wide, wide, local)).build(device="meta").dimensions(4))
    assert all(f"blocks.{x}.ffn.pre" in text for x in ("{0-1}", "{2-3}", "4"))


# Operations


@pytest.mark.parametrize("name", ["gpt2", "llama", "mqa", "qk-norm", "bert", "unordered", "gemma2", "neox", "halves", "tagger", "t5-of-model"])
def test_operations_equal_those_that_torch_counts(name):
    """Matrices are counted alike; torch's counter sees full attention where ours counts only visible keys, so ours is given its due."""
    model, t = built(name), 16
    ids = tokens(1, t)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        call(model, ids)
    attention = 0
    for module in model.modules():
        if hasattr(module, "d_value"):
            full = 2 * t * module.n_heads * (module.d_head + module.d_value)
            size = min([t, *(m.size for m in (module.spec.mask,) if hasattr(m, "size"))])
            causal = type(model.spec).__name__ == "Decoder"
            seen = sum(min(i + 1, size) for i in range(t)) / t if causal else t
            attention += full - int(full * seen / t)
    assert model.flops_per_token(t) + attention == pytest.approx(counter.get_total_flops() / t, rel=1e-3)


def test_operations_of_experts_are_those_of_the_chosen():
    make = lambda ff: Decoder(VOCAB, D, (Block(Attention(4), ff),)).build(device="meta").flops_per_token(8)
    router = 2 * D * 4
    assert make(Experts(4, 2, Gated(16))) == make(Gated(32)) + router
    assert make(Experts(4, 1, Plain(16))) == make(Plain(16)) + router


def test_operations_by_hand():
    model = preset("gpt2").build(device="meta")
    matrices = 2 * (12 * (768 * 2304 + 768 * 768 + 2 * 768 * 3072) + 768 * 50_257)
    assert model.flops_per_token(1) == matrices + 12 * 4 * 768
    assert model.flops_per_token(1024) == matrices + int(12 * 4 * 768 * 512.5)
    windowed = model.spec.at("blocks.*.attention.mask").set(Window(128)).build(device="meta")
    seen = (128 * 129 / 2 + (1024 - 128) * 128) / 1024
    assert windowed.flops_per_token(1024) == matrices + 12 * int(4 * 768 * seen)
    encoder = Encoder(VOCAB, D, (Block(Attention(4), Gated(32)),)).build(device="meta")
    assert encoder.flops_per_token(10) - encoder.flops_per_token(1) == 9 * 4 * D


def test_operations_of_an_encoder_decoder_count_both_halves():
    model = preset("t5-small").build(device="meta")
    enc = 6 * (4 * 512 * 512 + 2 * 512 * 2048)
    dec = 6 * (8 * 512 * 512 + 2 * 512 * 2048) + 512 * 32_128
    attention = lambda seen: 6 * 4 * 512 * seen
    assert model.flops_per_token(10) == 2 * (enc + dec) + int(attention(10) + attention(5.5) + attention(10))


# Bytes


def test_bytes_of_weights_and_cache():
    model = built("llama")
    size = model.bytes()
    assert size.weights == 4 * model.params().total
    assert size.cache_per_token == 2 * 2 * 2 * 6 * 4  # layers, k and v, groups, head size, float32
    assert str(size) == f"weights {size.weights:,} bytes; cache 192 bytes per token"
    half = ALL["llama"].build(device="meta", dtype="bf16").bytes()
    assert (half.weights, half.cache_per_token) == (size.weights // 2, 96)
    assert built("bert").bytes().cache_per_token == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "qk-norm", "t5", "unlike-halves", "mqa"])
def test_the_cache_is_as_large_as_announced(name):
    """Of an encoder-decoder only the decoder's own keys and values grow with its tokens."""
    model = built(name)
    cache = model.cache(batch=2, capacity=None)
    with torch.no_grad():
        call(model, tokens(2, 9), cache=cache)
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer["attn"].tensors().values())
    assert held == 2 * 9 * model.bytes().cache_per_token


def test_causality_follows_the_mask_and_not_the_name():
    class Reader(Encoder):
        pass

    block = Block(Attention(4))
    model = Encoder(VOCAB, D, (block,)).build(seed=0)
    said = model.flops_per_token(8), model.bytes()
    model.spec = Reader(VOCAB, D, (block,))
    assert (model.flops_per_token(8), model.bytes()) == said

"""Matrices in 8 and 4 bits: errors within half a step, the same model as its slow twin, every site open, sizes truthful."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import warm
from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.core.tap import Edit, Record
from glassformer.models import Block, Decoder, Encoder, EncoderDecoder
from glassformer.models.anatomy import bytes_of
from glassformer.parts import latent
from glassformer.parts.attention import Attention, matrix_of
from glassformer.parts.experts import Experts
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.latent import LatentAttention
from glassformer.parts.rotary import Rotary
from glassformer.weights.quantise import GROUPS, quantisable
from weights.families.harness import COMMON, saved

pytest.importorskip("torchao")
D, V = 64, 61
GROUPED = Attention(4, n_kv_heads=2, d_head=32, position=Rotary(), qkv_bias=True, out_bias=True)
LATENT = LatentAttention(2, kv_lora_rank=32, d_nope=16, d_rope=16, d_value=32)
SPECS: dict[str, Any] = {
    "decoder": Decoder(V, D, (Block(GROUPED, Gated(96, bias=True)),) * 2, tied=True),
    "latent": Decoder(V, D, (Block(LATENT, Plain(32)),)),
    "experts": Decoder(V, D, (Block(GROUPED, Experts(4, 2, Gated(32))),)),
    "encoder": Encoder(V, D, (Block(Attention(4), Plain(128, bias=True)),)),
    "encoder-decoder": EncoderDecoder(Encoder(V, D, (Block(Attention(4), Plain(96)),)), Decoder(V, D, (Block(Attention(4), Plain(96), cross=Attention(4)),))),
}
KINDS = ("int8", "int4")


def inputs(model: Any) -> tuple[Tensor, ...]:
    ids = torch.randint(1, V, (2, 9), generator=torch.Generator().manual_seed(3))
    return (ids, ids[:, :7]) if hasattr(model, "encoder") else (ids,)


def pair(name: str, kind: str) -> tuple[Any, Any]:
    """The model in float32, and quantised."""
    return SPECS[name].build(seed=0).eval(), weights.quantise(SPECS[name].build(seed=0), kind)


def steps(w: Tensor, kind: str) -> Tensor:
    """What one step of each number's own row or group is worth, [out in], by the definition of the type."""
    if kind == "int8":
        return (w.abs().amax(1, keepdim=True) / 127.5).expand_as(w)
    group = next(g for g in GROUPS if w.shape[1] % g == 0)
    x = w.view(w.shape[0], -1, group)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)  # the range always holds 0
    return ((high - low) / 15).expand_as(x).reshape(w.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_every_number_is_within_half_a_step(name, kind):
    dense, model = pair(name, kind)
    layers = quantisable(dense)
    assert layers
    g = torch.Generator().manual_seed(0)
    for path, layer in layers.items():
        w, step, quantised = layer.weight.detach(), steps(layer.weight.detach(), kind), model.get_submodule(path)
        # Half a step, and what float32 rounds in start + step * q (numbers up to the largest of the matrix).
        room = 0.5 * step + 8 * torch.finfo(torch.float32).eps * w.abs().max()
        assert ((matrix_of(quantised) - w).abs() <= room).all(), path
        x = torch.randn(5, w.shape[1], generator=g)
        bound = x.abs() @ room.T + 1e-6 * (x.abs() @ w.abs().T)  # the triangle inequality, and rounding of the sum
        assert ((quantised(x) - layer(x)).abs() <= bound).all(), path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_a_quantised_model_is_the_float_model_with_its_numbers(name, kind):
    """The slow twin: the same numbers, unpacked, in a model of float32."""
    dense, model = pair(name, kind)
    for path, layer in quantisable(dense).items():
        layer.weight = nn.Parameter(matrix_of(model.get_submodule(path)))
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(model)), dense(*inputs(dense)), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_every_site_is_open(name, kind):
    _, model = pair(name, kind)
    with torch.no_grad():
        plain, tap = model(*inputs(model)), Record("**")
        assert torch.equal(model(*inputs(model), tap=tap), plain)
        sites = {s.path for s in model.sites()}
        assert sites == set(tap.paths)
        for path in tap.find("**.result"):
            out = model.get_submodule(path.removesuffix(".result")).out
            total = tap[path].sum(2) if out.bias is None else tap[path].sum(2) + out.bias
            torch.testing.assert_close(total, tap[path.replace("result", "out")], atol=1e-5, rtol=1e-5)
        one = tap.find("**.result")[0]
        same = model(*inputs(model), tap=Edit(one, lambda x: x.clone()))
        torch.testing.assert_close(same, plain, atol=2e-5, rtol=1e-5)
        other = model(*inputs(model), tap=Edit(one + "[1]", lambda x: 0 * x))
        assert (other - plain).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_cache_as_without(kind):
    for name in ("decoder", "latent", "experts"):
        _, model = pair(name, kind)
        (ids,) = inputs(model)
        cache = model.cache(batch=2, capacity=9)
        with torch.no_grad():
            parts = [model(x, cache=cache) for x in ids.split((4, 1, 1, 3), 1)]
            torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_truthful(kind):
    dense, model = pair("decoder", kind)
    layers = quantisable(dense)
    n = sum(x.weight.numel() for x in layers.values())
    rows = sum(x.weight.shape[0] for x in layers.values())
    groups = sum(x.weight.numel() // next(g for g in GROUPS if x.in_features % g == 0) for x in layers.values())
    held = n + rows * 4 + rows if kind == "int8" else n // 2 + groups * 8  # int8: a float step and an int8 zero a row; int4: two floats a group
    assert model.bytes().weights == dense.bytes().weights - 4 * n + held
    assert model.bytes().cache_per_token == dense.bytes().cache_per_token
    assert str(model.params().total) == str(dense.params().total)
    assert model.embed.weight.dtype == torch.float32 and type(model.embed.weight) is nn.Parameter


def test_routers_embeddings_and_read_outs_keep_their_type():
    _, model = pair("experts", "int8")
    left = {name for name, x in model.named_parameters() if not hasattr(x, "tensor_data_names")}
    assert {"embed.weight", "readout.matrix", "blocks.0.experts.router.weight"} <= left
    assert "blocks.0.experts.experts.3.down.weight" not in left


def test_the_way_out_of_a_latent_keeps_its_type(monkeypatch):
    """While decoding it is used as a matrix, once a layer and token: few bits would be unpacked each time."""
    _, model = pair("latent", "int8")
    layers = quantisable(SPECS["latent"].build(seed=0))
    assert "blocks.0.attn.kv_down" in layers and "blocks.0.attn.kv_up" not in layers
    assert type(model.blocks[0].attn.kv_up.weight) is nn.Parameter
    asked: list[nn.Module] = []
    monkeypatch.setattr(latent, "matrix_of", lambda layer: (asked.append(layer), matrix_of(layer))[1])
    (ids,) = inputs(model)
    cache = model.cache(batch=2, capacity=9)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        model(ids[:, 4:5], cache=cache)
    assert asked == [model.blocks[0].attn.kv_up]


# Loading


def llama(tmp_path: Any) -> Any:
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, **COMMON)
    saved(config, tmp_path / "theirs")
    return weights.open(tmp_path / "theirs")


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_in_few_bits_is_loaded_and_then_quantised(kind, tmp_path):
    opened = llama(tmp_path)
    model, report = opened.load(quantise=kind)
    usual = {"int8": "float32", "int4": "bfloat16"}[kind]  # the 4-bit products are made for bfloat16
    twin = weights.quantise(opened.load(dtype=usual)[0], kind)
    ids = inputs(model)[0]
    with torch.no_grad():
        assert torch.equal(model(ids), twin(ids))
    assert f"{usual}, the blocks' matrices in {kind}" in str(report)
    assert report.bytes == sum(bytes_of(x) for x in (*model.parameters(), *model.buffers())) < opened.load()[1].bytes / 2
    weights.save(opened.load()[0], tmp_path / "own")
    own, own_report = weights.open(tmp_path / "own").load(quantise=kind)
    with torch.no_grad():
        assert torch.equal(own(ids), model(ids))
    assert kind in own_report.dtype


def test_bfloat16_computes_in_bfloat16(tmp_path):
    for kind in KINDS:
        model, _ = llama(tmp_path).load(dtype="bfloat16", quantise=kind)
        with torch.no_grad():
            logits = model(inputs(model)[0])
        assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


# What goes wrong


def test_errors(tmp_path, monkeypatch):
    model = SPECS["decoder"].build(seed=0)
    with pytest.raises(WeightsError, match=r"quantise='int6' is no kind of quantisation. Did you mean 'int8', 'int4'\? Known: int8, int4."):
        weights.quantise(model, "int6")
    odd = SPECS["decoder"].replace(d_model=48).build(seed=0)
    with pytest.raises(WeightsError, match="blocks.0.attn.qkv reads 48 numbers, which is no multiple of 32: .* Use int8, which fits every shape."):
        weights.quantise(odd, "int4")
    assert not any(hasattr(x, "tensor_data_names") for x in odd.parameters())
    odd = Decoder(V, D, (Block(Attention(4), Plain(32)),)).at("blocks.*.feedforward").set(Plain(40)).build(seed=0)
    with pytest.raises(WeightsError, match="blocks.0.ffn.up has 40 rows, but the int4 product of cpu takes multiples of 16: use int8"):
        weights.quantise(odd, "int4")
    weights.quantise(model, "int8")
    with pytest.raises(WeightsError, match=r"blocks.0.attn.out is quantised already \(Int8Tensor\): load the model anew"):
        weights.quantise(model, "int4")
    opened = llama(tmp_path)
    with pytest.raises(WeightsError, match="packed=True keeps the file's own quantised matrices, quantise makes new ones: leave one of them out."):
        opened.load(packed=True, quantise="int8")
    with pytest.raises(WeightsError, match="quantise='four' is no kind of quantisation"):
        opened.load(quantise="four")


def test_without_torchao_the_remedy_is_named():
    code = (
        "import sys; sys.modules['torchao'] = None\n"
        "from glassformer import Decoder, Block, Attention, weights\n"
        "from glassformer.core.errors import WeightsError\n"
        "model = Decoder(61, 64, (Block(Attention(4)),)).build(seed=0)\n"
        "try: weights.quantise(model, 'int8')\n"
        "except WeightsError as error: print(error)\n"
    )
    out, err = warm.Program(["-c", code]).communicate()
    assert out.startswith("Quantisation needs torchao") and "pip install 'glassformer[quantise]'." in out, err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the 4-bit product of GPUs")
def test_on_a_gpu():
    ids = inputs(None)[0].cuda()
    for kind in KINDS:
        dense = SPECS["decoder"].build(seed=0, dtype="bfloat16", device="cuda").eval()
        model = weights.quantise(SPECS["decoder"].build(seed=0, dtype="bfloat16", device="cuda"), kind)
        for path, layer in quantisable(dense).items():
            layer.weight = nn.Parameter(matrix_of(model.get_submodule(path)))
        with torch.no_grad():
            torch.testing.assert_close(model(ids), dense(ids), atol=0.05, rtol=0.05)
    with pytest.raises(WeightsError, match="On a GPU int4 is multiplied in bfloat16, but the model is in float32: load it with dtype='bfloat16'."):
        weights.quantise(SPECS["decoder"].build(seed=0, device="cuda"), "int4")

"""Packed layers: the same numbers as unpacked ones, in less memory; gradients go through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glassformer.core.blocks import dequantise
from glassformer.core.errors import InputError, WeightsError
from glassformer.core.tap import Edit, Record
from glassformer.models import Block, Decoder
from glassformer.models.presets import preset
from glassformer.parts import packed
from glassformer.parts.embed import EmbeddingLayer
from glassformer.parts.latent import LatentAttention
from glassformer.parts.packed import PackedEmbedding, PackedLinear, PackedReadOut, Piece, pack, packable, unpack
from glassformer.parts.readout import LanguageModelLayer
from glassformer.weights.quants import quantise


def pieces(x: torch.Tensor, *types: str) -> list[Piece]:
    """Rows of ``x`` shared out among types."""
    parts = x.tensor_split(len(types))
    return [Piece(quantise(part, type), type) for part, type in zip(parts, types, strict=True)]


def numbers(made: list[Piece]) -> torch.Tensor:
    return torch.cat([dequantise(p.raw, p.type) for p in made])


def spec(tied: bool = False) -> Decoder:
    made: Any = preset("tiny", vocab_size=65, tied=tied)
    return made


def pair(tied: bool = False) -> tuple[Any, Any]:
    """A packed model, and an ordinary one with the same numbers."""
    model, dense = spec(tied).build(seed=0).eval(), spec(tied).build(seed=0).eval()
    made = {name: pieces(x, "Q8_0", "Q4_0") for name, x in model.named_parameters() if x.ndim == 2}
    with torch.no_grad():
        for name, x in dense.named_parameters():
            if name in made:
                x.copy_(numbers(made[name]))
    pack(model, made)
    return model, dense


def tokens() -> torch.Tensor:
    return torch.randint(0, 65, (2, 9), generator=torch.Generator().manual_seed(0))


def test_a_packed_linear_is_a_linear_of_what_its_blocks_say() -> None:
    made, bias = pieces(torch.randn(10, 64), "Q4_0", "Q8_0", "F16"), nn.Parameter(torch.randn(10))
    layer, x = PackedLinear(made, bias), torch.randn(2, 3, 64)
    assert (layer.out_features, layer.in_features) == (10, 64)
    assert torch.equal(layer.weight, numbers(made))
    torch.testing.assert_close(layer(x), F.linear(x, numbers(made), bias))
    assert layer.packed_bytes == sum(p.raw.numel() for p in made)
    assert dict(layer.named_parameters()).keys() == {"bias"}
    assert "10 x 64 of Q4_0, Q8_0, F16" in repr(layer)


def test_gradients_flow_to_what_goes_in_and_not_to_the_blocks() -> None:
    made = pieces(torch.randn(8, 32), "Q8_0", "Q4_0")
    layer, w = PackedLinear(made), numbers(made).double()
    x = torch.randn(3, 32, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close(got.double(), g.double() @ w, rtol=1e-6, atol=1e-5)
    assert all(not b.requires_grad for b in layer.buffers())


def test_the_way_back_keeps_no_unpacked_matrix() -> None:
    layer, kept = PackedLinear(pieces(torch.randn(64, 64), "Q8_0")), []
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x).sum().backward()
    assert torch.Size((64, 64)) not in kept


def test_large_matrices_are_used_by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pieces(torch.randn(50, 32), "Q8_0", "Q4_0")
    layer, x = PackedLinear(made), torch.randn(4, 32, requires_grad=True)
    whole = layer(x)
    (grad,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(packed, "AT_ONCE", 7 * 32)
    assert [len(w) for w in layer.strips(torch.float32)] == [7, 7, 7, 4, 7, 7, 7, 4]
    torch.testing.assert_close(layer(x), whole)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], grad)


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_computes_the_same(tied: bool) -> None:
    model, dense = pair(tied)
    x = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x))
    a, b = Record("blocks.*.attn.result"), Record("blocks.*.attn.result")
    model(x, tap=a), dense(x, tap=b)
    torch.testing.assert_close(a.stack("blocks.*.attn.result"), b.stack("blocks.*.attn.result"))
    edit = Edit("blocks.1.attn.result", lambda r: r * 0.5)
    torch.testing.assert_close(model(x, tap=edit), dense(x, tap=edit))
    cache = model.cache(batch=2, capacity=16)
    with torch.no_grad():
        y = torch.cat([model(x[:, :4], cache=cache)] + [model(x[:, i : i + 1], cache=cache) for i in range(4, 9)], 1)
        torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-5)


def test_attribution_goes_through_a_packed_model() -> None:
    model, dense = pair()
    grads = []
    for m in (model, dense):
        e = dense.embed.weight[tokens()].detach().requires_grad_()
        m(inputs_embeds=e).logsumexp(-1).sum().backward()
        grads.append(e.grad)
    torch.testing.assert_close(*grads)


def test_an_embedding_unpacks_only_the_rows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = pair()
    seen: list[int] = []
    real = packed.dequantise
    monkeypatch.setattr(packed, "dequantise", lambda raw, *more: seen.append(raw[..., 0].numel()) or real(raw, *more))
    ids = torch.tensor([[0, 64, 3], [33, 32, 0]])
    assert torch.equal(model.embed.look_up(ids), dense.embed.look_up(ids))
    assert seen == [6, 6]  # once for each of the two pieces
    with pytest.raises(InputError, match="Token id 65 is outside this model's vocabulary of 65"):
        model.embed.look_up(torch.tensor([[65]]))


@pytest.mark.parametrize("tied", [False, True])
def test_its_anatomy_is_truthful(tied: bool) -> None:
    model, dense = pair(tied)
    assert model.params().total == dense.params().total
    assert model.params().tied == dense.params().tied
    assert "384 x 128 Q8_0+Q4_0" in str(model.params())
    assert model.flops_per_token(9) == dense.flops_per_token(9)
    held = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    assert model.bytes().weights == held
    assert model.bytes().cache_per_token == dense.bytes().cache_per_token
    assert held < 0.3 * dense.bytes().weights


def test_it_moves_and_changes_its_type_as_a_whole() -> None:
    model, dense = pair(tied=True)
    assert model.to(torch.bfloat16)(tokens()).dtype == torch.bfloat16
    assert model.embed.weight.dtype == torch.bfloat16
    assert model.embed.table.raws[0].dtype == torch.uint8
    model.float()
    with torch.no_grad():
        norms = [n for n, _ in dense.named_parameters() if "norm" in n]
        for n in norms:  # those were rounded on the way
            model.get_parameter(n).copy_(dense.get_parameter(n))
        torch.testing.assert_close(model(tokens()), dense(tokens()))
    assert model.to("meta")(tokens().to("meta")).shape == (2, 9, 65)


def test_it_compiles_whole() -> None:
    model, dense = pair()
    x = tokens()
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, dense(x))


@pytest.mark.parametrize("tied", [False, True])
def test_unpacking_gives_an_ordinary_model_that_learns(tied: bool) -> None:
    model, dense = pair(tied)
    again = unpack(model)
    assert again is model
    assert not any(isinstance(m, packed.Packed) for m in again.modules())
    assert type(again.embed) is EmbeddingLayer
    assert type(again.readout) is LanguageModelLayer
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for x, y in zip(again.parameters(), dense.parameters(), strict=True):
        assert torch.equal(x, y)
    again(tokens()).sum().backward()
    assert all(x.grad is not None for x in again.parameters())


def test_packing_a_model_without_memory() -> None:
    model = spec().build(device="meta")
    raw = torch.zeros(384, 4 * 34, dtype=torch.uint8)
    pack(model, {"blocks.0.attn.qkv.weight": [Piece(raw, "Q8_0")]})
    assert isinstance(model.blocks[0].attn.qkv, PackedLinear)
    assert model.blocks[0].attn.qkv.piece0.device.type == "cpu"


def test_what_kinds_of_parts_take_the_places() -> None:
    model, _ = pair()
    kinds = {type(m) for m in model.modules()}
    assert {PackedLinear, PackedEmbedding, PackedReadOut} <= kinds
    assert nn.Linear not in kinds


def test_errors_say_what_does_not_fit() -> None:
    model = spec().build(device="meta")
    block = Piece(torch.zeros(4, 34, dtype=torch.uint8), "Q8_0")
    with pytest.raises(WeightsError, match="The parameter 'final_norm.weight' cannot stay packed"):
        pack(model, {"final_norm.weight": [block]})
    with pytest.raises(WeightsError, match=r"packed pieces of 'blocks.0.ffn.down.weight' make a matrix of shape \(4, 32\), but the model needs \(128, 512\)"):
        pack(model, {"blocks.0.ffn.down.weight": [block]})
    with pytest.raises(WeightsError, match="rows of 32 and 64 numbers: rows of one matrix are equally long"):
        PackedLinear([block, Piece(torch.zeros(4, 68, dtype=torch.uint8), "Q8_0")])


def test_the_way_out_of_a_latent_is_not_packed() -> None:
    """It is taken apart as a matrix for every token while decoding."""
    attention = LatentAttention(2, kv_lora_rank=32, d_nope=16, d_rope=16)
    model = Decoder(61, 64, (Block(attention),)).build(seed=0)
    assert packable(model, "blocks.0.attn.kv_down.weight") and not packable(model, "blocks.0.attn.kv_up.weight")
    with pytest.raises(WeightsError, match=r"'blocks\.0\.attn\.kv_up\.weight' cannot stay packed"):
        pack(model, {"blocks.0.attn.kv_up.weight": pieces(torch.randn(64, 32), "Q8_0")})

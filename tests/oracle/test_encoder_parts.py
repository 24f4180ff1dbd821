"""What encoders and encoder-decoders add, against the papers in float64: factorised embeddings, heads, sinusoids by halves, and side inputs of both halves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from glassformer.core.errors import InputError, SpecError
from glassformer.core.tap import Record
from glassformer.models import Encoder
from glassformer.parts.embed import Embedding, LiftSum, LiftTokens, NoLift, SqrtWidth
from glassformer.parts.norm import LayerNorm
from glassformer.parts.position import Learned, Sinusoidal
from glassformer.parts.readout import Dense, LanguageModel, States, Tagger
from oracle import papers
from oracle.test_parts import close, here, randomise
from tools import ALL, VOCAB, D, built, draw, fresh, same, tokens

F64 = torch.float64


def arrays(module: Any) -> dict[str, Any]:
    return {n: y.detach().numpy() for n, y in module.named_parameters()}


# Factorised embeddings (arXiv 1909.11942, section 3.1: V x E and E x H in place of V x H)


@pytest.mark.parametrize("bias", [True, False])
def test_a_sum_is_lifted_after_types_positions_and_norm(bias):
    layer = randomise(Embedding(scale=SqrtWidth(), n_types=2, norm=LayerNorm(eps=1e-6), lift=LiftSum(4, bias=bias)).build(7, 9))
    position = randomise(Learned(8).build(4, 1, 9), 20)
    ids, types, w = torch.tensor([[1, 6, 0]]), torch.tensor([[0, 1, 1]]), arrays(layer)
    summed = 2.0 * w["weight"][ids.numpy()] + w["types"][types.numpy()] + position.table.detach().numpy()[:3]
    narrow = papers.layer_norm(summed, w["norm.weight"], w["norm.bias"], 1e-6)
    close(layer(ids, None, types, position, here(3)), narrow @ w["lift_sum.weight"].T + (w["lift_sum.bias"] if bias else 0.0))
    assert ("lift_sum.bias" in w) is bias and w["weight"].shape == (7, 4) and w["types"].shape == (2, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_tokens_are_lifted_before_types_positions_and_norm(bias):
    layer = randomise(Embedding(n_types=2, norm=LayerNorm(eps=1e-6), lift=LiftTokens(4, bias=bias)).build(7, 9))
    position = randomise(Learned(8, offset=2).build(9, 1, 9), 20)
    ids, w = torch.tensor([[1, 6, 0]]), arrays(layer)
    lifted = w["weight"][ids.numpy()] @ w["lift_tokens.weight"].T + (w["lift_tokens.bias"] if bias else 0.0)
    summed = lifted + w["types"][0] + position.table.detach().numpy()[2:5]
    close(layer(ids, None, None, position, here(3)), papers.layer_norm(summed, w["norm.weight"], w["norm.bias"], 1e-6))
    assert w["weight"].shape == (7, 4) and w["types"].shape == (2, 9)


def test_a_lift_by_the_identity_changes_nothing():
    """The fast path (no lift) and its slow twin: a table as wide as the stream, lifted by the identity matrix."""
    plain = randomise(Embedding(norm=LayerNorm()).build(7, 6))
    position, ids = Learned(8).build(6, 1, 6).double(), tokens(2, 5) % 7
    torch.nn.init.zeros_(position.table)
    for lift, name in ((LiftTokens(6), "lift_tokens"), (LiftSum(6, bias=False), "lift_sum")):
        lifted = Embedding(norm=LayerNorm(), lift=lift).build(7, 6).double()
        lifted.load_state_dict(plain.state_dict() | {f"{name}.weight": torch.eye(6, dtype=F64)})
        same(lifted(ids, None, None, position, here(5)), plain(ids, None, None, position, here(5)))
    assert NoLift().widths(6) == (6, 6) and LiftTokens(4).widths(6) == (4, 6) and LiftSum(4).widths(6) == (4, 4)


def test_vectors_in_place_of_tokens_are_as_wide_as_the_table():
    for name in ("electra", "opt-narrow"):
        model, ids = built(name), tokens()
        with torch.no_grad():
            assert torch.equal(model(ids), model(inputs_embeds=model.embed.weight[ids]))
        with pytest.raises(InputError, match=rf"inputs_embeds have shape \(2, 9, {D}\), but this model reads \[batch, position, width of its table=10\]\."):
            model(inputs_embeds=torch.zeros(2, 9, D))


def test_the_sites_of_a_narrow_embedding_have_its_axis():
    axes = {s.path: s.axes for s in built("electra").sites()}
    assert (axes["embed"], axes["pos_embed"], axes["blocks.0.resid_pre"]) == ("b t w", "t w", "b t d")
    assert {s.path: s.axes for s in built("opt-narrow").sites()}["embed"] == "b t d"
    tap = Record("embed", "pos_embed")
    built("electra")(tokens(), tap=tap)
    assert tap["embed"].shape == (2, 9, 10) and tap["pos_embed"].shape == (9, 10)


def test_a_table_has_a_width():
    for lift in (LiftTokens, LiftSum):
        with pytest.raises(SpecError, match=rf"{lift.__name__}\(width=0\): a table is at least 1 wide\."):
            lift(0)


# Read-outs


def test_a_tied_read_out_narrows_to_the_table():
    embed = randomise(Embedding(lift=LiftSum(4)).build(7, 9))
    layer = randomise(LanguageModel(bias=True, transform=Dense("gelu", LayerNorm(eps=1e-6), width=4)).build(9, embed, True), 30)
    h, w = draw((1, 3, 9), 8), arrays(layer)
    x = papers.ACTIVATIONS["gelu"](h.numpy() @ w["transform.linear.weight"].T + w["transform.linear.bias"])
    x = papers.layer_norm(x, w["transform.norm.weight"], w["transform.norm.bias"], 1e-6)
    close(layer(h, here(3)), x @ embed.weight.detach().numpy().T + w["bias"])
    untied = LanguageModel(transform=Dense("identity", bias=False, width=5)).build(9, embed, False)
    assert untied.matrix.shape == (7, 5) and untied.transform.linear.bias is None


def test_a_tied_read_out_of_another_width_than_the_table_is_refused():
    spec: Any = ALL["electra"]
    with pytest.raises(SpecError, match=rf"The tied table is 10 wide, but the read-out multiplies it by vectors of width {D}: use .*Dense\(\.\.\., width=10\)"):
        spec.replace(readout=LanguageModel()).build(device="meta")
    with pytest.raises(SpecError, match=r"The tied table is 10 wide, but the read-out multiplies it by vectors of width 12"):
        spec.replace(readout=LanguageModel(transform=Dense(width=12))).build(device="meta")
    with pytest.raises(SpecError, match=r"Dense\(width=0\): a map has at least 1 output"):
        Dense(width=0)
    with pytest.raises(SpecError, match="'gellu'"):
        Dense("gellu")


@pytest.mark.parametrize("bias", [True, False])
def test_a_tagger_with_a_transform(bias):
    """ELECTRA's discriminator (arXiv 2003.10555, section 2, with the hidden layer of the authors' code): one logit per token."""
    layer = randomise(Tagger(1, transform=Dense("gelu", LayerNorm(eps=1e-6, bias=bias), bias=bias)).build(9, Embedding().build(7, 9), False))
    h, w = draw((2, 3, 9), 8), arrays(layer)
    x = papers.ACTIVATIONS["gelu"](h.numpy() @ w["transform.linear.weight"].T + w.get("transform.linear.bias", 0.0))
    x = papers.layer_norm(x, w["transform.norm.weight"], w.get("transform.norm.bias", 0.0), 1e-6)
    close(layer(h, here(3)), x @ w["linear.weight"].T + w["linear.bias"])
    assert ("transform.linear.bias" in w) is bias and ("transform.norm.bias" in w) is bias


def test_states_are_what_the_read_out_would_read():
    spec: Any = ALL["electra"]
    model, bare = built("electra"), fresh(spec.replace(readout=States(), tied=False))
    bare.load_state_dict({n: x for n, x in model.state_dict().items() if not n.startswith("readout.")})
    with torch.no_grad():
        assert torch.equal(bare(tokens()), model.states(tokens()))


# Encoder-decoders


@pytest.mark.parametrize("d", [8, 9])
def test_sinusoids_by_halves_are_the_papers_in_another_order(d):
    """Marian: all sines, then all cosines; an odd width has one sine more."""
    ours = Sinusoidal(layout="halves").build(d, 1, d).add(torch.arange(600), torch.zeros(1, dtype=torch.float32))
    want = np.stack([papers.sinusoid(p, d) for p in range(600)])
    close(ours.double(), np.concatenate([want[:, 0::2], want[:, 1::2]], 1), atol=6e-8)  # what is given is float32


def test_learned_positions_begin_after_their_offset():
    position = randomise(Learned(8, offset=2).build(6, 1, 6))
    close(position.add(torch.arange(8), torch.zeros(1)), position.table.detach().numpy()[2:])
    assert position.table.shape == (10, 6)


def test_the_bias_on_the_logits_and_the_scale_of_the_embedding():
    model = built("bart", F64)
    source, target, tap = tokens(2, 7, seed=5), tokens(), Record("**.embed", "decoder.resid_final")
    with torch.no_grad():
        logits = model(source, target, tap=tap)
    w = arrays(model)
    close(tap["encoder.embed"], math.sqrt(D) * w["encoder.embed.weight"][source.numpy()])
    close(tap["decoder.embed"], math.sqrt(D) * w["encoder.embed.weight"][target.numpy()])
    close(logits, tap["decoder.resid_final"].numpy() @ w["encoder.embed.weight"].T + w["decoder.readout.bias"])
    assert len(model.encoder.blocks) == 1 and len(model.decoder.blocks) == 2
    assert model.encoder.blocks[0].ffn.up.out_features == 32 and model.decoder.blocks[0].ffn.up.out_features == 20


def test_both_halves_read_vectors_in_place_of_tokens():
    model, source, target = built("bart"), tokens(2, 7, seed=5), tokens()
    table = model.encoder.embed.weight
    with torch.no_grad():
        want = model(source, target, source_lengths=[7, 4])
        assert torch.equal(model(source_embeds=table[source], target=target, source_lengths=[7, 4]), want)
        assert torch.equal(model(source, inputs_embeds=table[target], source_lengths=[7, 4]), want)
    with pytest.raises(InputError, match="Both tokens and inputs_embeds were given"):
        model(source, target, inputs_embeds=table[target])
    with pytest.raises(InputError, match="Neither tokens nor inputs_embeds were given"):
        model(target=target)
    with pytest.raises(InputError, match="only the source was given: a target begins with the token 2"):
        model(source)


def test_both_halves_take_positions():
    """Rows with positions of their own: shifted ones read other rows of the table, those that count from 0 are the default."""
    model, source, target = built("bart"), tokens(2, 7, seed=5), tokens()
    at, late = torch.arange(9), torch.stack([torch.arange(9), torch.arange(9) + 3])
    with torch.no_grad():
        want = model(source, target)
        assert torch.equal(model(source, target, positions=at, source_positions=torch.arange(7)), want)
        moved = model(source, target, positions=late)
        assert torch.equal(moved[0], want[0]) and not torch.allclose(moved[1], want[1], atol=1e-3)
        moved = model(source, target, source_positions=torch.arange(7) + 3)
        assert torch.equal(moved, model.decode(target, model.encode(source, positions=torch.arange(7) + 3))) and not torch.allclose(moved, want, atol=1e-3)


def test_halves_that_share_a_table_have_it_equally_wide():
    spec: Any = ALL["bart"]
    narrow = spec.encoder.at("embedding.lift").set(LiftTokens(10))
    with pytest.raises(SpecError, match=rf"A shared embedding is one table, but the encoder's is 10 wide and the decoder's {D}: give both the same"):
        spec.replace(encoder=narrow)
    both = spec.at("encoder.embedding.lift").set(NoLift()).replace(shared=False, encoder=narrow).build(seed=0)
    assert both.encoder.embed.weight.shape == (VOCAB, 10) and both.decoder.embed.weight.shape == (VOCAB, D)


def test_an_encoder_with_a_narrow_table_counts_its_parameters():
    spec: Any = ALL["electra"]
    wide = spec.replace(embedding=spec.embedding.replace(lift=NoLift()), readout=States(), tied=False).build(device="meta").params().total
    narrow = spec.replace(readout=States(), tied=False).build(device="meta").params().total
    # tokens, types, positions and the norm lose D - 10 columns each; the lift is 10 x D and a bias
    assert wide - narrow == (VOCAB + 2 + 24 + 2) * (D - 10) - (10 * D + D)
    assert isinstance(spec, Encoder)

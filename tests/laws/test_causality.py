"""A decoder's past does not depend on its future; what a mask hides has no influence."""

from __future__ import annotations

import pytest
import torch

from glassformer.core.mask import Causal, Padding, SameDocument, Visible, Window
from glassformer.core.tap import Record
from glassformer.models import Block, Decoder, Encoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Gated
from glassformer.parts.rotary import Rotary
from tools import CAUSAL, DECODERS, VOCAB, D, T, a_pass, built, call, each, fresh, same, source, tokens

F64 = torch.float64
# Load balancing aside, experts see all tokens of a call at once but each by itself: they are causal like any other part.


@each(CAUSAL)
def test_later_tokens_leave_earlier_logits_unchanged(name):
    model, ids = built(name, F64), tokens()
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1 + tokens(seed=3)[:, 5:] % (VOCAB - 2)) % VOCAB
    with torch.no_grad():
        a, b = call(model, ids), call(model, other)
    same(a[:, :5], b[:, :5])
    assert (a[:, 5:] - b[:, 5:]).abs().max() > 1e-3


@each(CAUSAL)
def test_no_gradient_flows_from_the_future(name):
    model, ids = built(name, F64), tokens(1)
    tap = Record("**.embed", grad=True)
    logits = call(model, ids, tap=tap)
    logits[0, 3].square().sum().backward()
    path = "decoder.embed" if "decoder.embed" in tap else "embed"
    g = tap.grad(path)[0]
    model.zero_grad()
    assert g[4:].abs().max() == 0
    assert g[3].abs().max() > 1e-8


@each([n for n in DECODERS if "window" not in n])
def test_every_earlier_token_can_matter(name):
    """The opposite of the law above: two layers of a causal model see everything before (windows see less)."""
    model, ids = built(name, F64), tokens(1)
    tap = Record("embed", grad=True)
    call(model, ids, tap=tap)[0, -1].square().sum().backward()
    reach = tap.grad("embed")[0].abs().amax(-1)
    model.zero_grad()
    # "holes" sees distances 0-2 and from 6: two layers of it miss a distance of 5.
    assert (reach > 0).tolist() == [name != "holes" or i != T - 6 for i in range(T)]


def test_the_unseen_has_exactly_no_weight():
    model = built("llama", F64)
    tap = Record("**.pattern")
    model(tokens(), tap=tap)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for path in tap.paths:
        assert tap[path][..., future].abs().max() == 0
        same(tap[path].sum(-1), torch.ones_like(tap[path].sum(-1)))


@pytest.mark.parametrize("size", [T, T + 1, 100])
def test_a_window_of_the_whole_row_is_causal(size):
    spec = Decoder(VOCAB, D, (Block(Attention(4, position=Rotary()), Gated(32)),) * 2)
    wide, narrow = fresh(spec), fresh(spec.at("blocks.*.attention.mask").set(Window(size)))
    with torch.no_grad():
        assert torch.equal(wide(tokens()), narrow(tokens()))


def test_a_window_of_one_sees_only_itself():
    model = fresh(Decoder(VOCAB, D, (Block(Attention(4, mask=Window(1)), Gated(32)),) * 2), F64)
    ids = tokens()
    with torch.no_grad():
        same(model(ids), torch.cat([model(ids[:, i : i + 1]) for i in range(T)], 1))


# Padding


@each(CAUSAL)
def test_right_padding_is_invisible(name):
    """Rows of different lengths in one batch give what each row gives alone, whatever stands in the padding."""
    model, ids, lengths = built(name, F64), tokens(3), [9, 4, 6]
    padded = ids.clone()
    for i, n in enumerate(lengths):
        padded[i, n:] = (padded[i, n:] + 7) % VOCAB
    with torch.no_grad():
        a, b = call(model, ids, lengths=lengths), call(model, padded, lengths=lengths)
        for i, n in enumerate(lengths):
            same(a[i, :n], b[i, :n], what=f"row {i}")
            if name in DECODERS:
                same(a[i : i + 1, :n], model(ids[i : i + 1, :n]), what=f"row {i} alone")


@each(["bert", "unordered", "causal-encoder", "not-window", "t5-encoder", "tagger", "classifier", "classifier-last", "vector"])
def test_right_padding_is_invisible_to_an_encoder(name):
    model, ids, lengths = built(name, F64), tokens(3), [9, 4, 6]
    with torch.no_grad():
        together = model(ids, lengths=lengths)
        for i, n in enumerate(lengths):
            alone = model(ids[i : i + 1, :n])
            same(together[i : i + 1] if alone.ndim == 2 else together[i : i + 1, :n], alone, what=f"row {i}")


@pytest.mark.parametrize("name", ["t5", "vaswani", "unlike-halves"])
def test_padding_of_the_source_is_invisible(name):
    model, ids = built(name, F64), tokens(3)
    src, lengths = source(3), [7, 4, 6]
    with torch.no_grad():
        together = model(src, ids, source_lengths=lengths)
        for i, n in enumerate(lengths):
            same(together[i : i + 1], model(src[i : i + 1, :n], ids[i : i + 1]), what=f"row {i}")


@each(["llama", "gemma2", "sink", "sigmoid", "window", "neox", "unordered", "t5-of-model", "alibi"])
def test_left_padding_is_invisible(name):
    """Padding before the text, hidden by Visible, with positions that start at the text."""
    model, ids, pad = built(name, F64), tokens(2, 6), 3
    padded = torch.cat([tokens(2, pad, seed=5), ids], 1)
    keys = torch.arange(6 + pad)[None].expand(2, -1) >= pad
    positions = (torch.arange(6 + pad) - pad).clamp(min=0).expand(2, -1)
    with torch.no_grad():
        a = model(padded, mask=Visible(keys), positions=positions)
        assert torch.isfinite(a).all()
        same(a[:, pad:], model(ids))


@each(["llama", "gemma2", "alibi", "t5-of-model", "sink", "plus-one", "sigmoid-bias", "window", "gpt2", "bert"])
def test_packed_documents_are_separate_rows(name):
    model = built(name, F64)
    cuts = [(0, 4), (4, 5), (5, 9)]
    ids = tokens(1)
    documents = torch.tensor([[0, 0, 0, 0, 1, 2, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3]])
    with torch.no_grad():
        packed = model(ids, mask=SameDocument(documents), positions=positions)
        for a, b in cuts:
            same(packed[:, a:b], model(ids[:, a:b]))


@pytest.mark.parametrize("name", ["llama", "bare", "sink", "plus-one", "sigmoid", "gemma2", "alibi", "unordered"])
def test_a_query_that_sees_nothing_gets_zeros_and_harms_no_gradient(name):
    model, ids = fresh(name, F64), tokens()
    keys = torch.ones(2, T, dtype=torch.bool)
    keys[0, :3] = False  # in a decoder the first three queries of row 0 see no key at all
    if name == "unordered":
        keys[0] = False
    blind = slice(0, 3)
    tap = Record("**.z", "**.pattern")
    out = model(ids, mask=Visible(keys), tap=tap)
    assert torch.isfinite(out).all()
    for path in tap.find("**.z"):
        assert tap[path][0, blind].abs().max() == 0, path
        assert tap[path][1].abs().max() > 0, path
    for path in tap.find("**.pattern"):
        assert tap[path][0, :, blind].abs().max() == 0, path
    out.square().sum().backward()
    for path, x in model.named_parameters():
        assert torch.isfinite(x.grad).all(), path
    model.zero_grad()
    seen = Record("**.pattern", grad=True)  # the explicit path
    out2 = model(ids, mask=Visible(keys), tap=seen)
    same(out2.detach(), out.detach())
    out2.square().sum().backward()
    for path, x in model.named_parameters():
        assert torch.isfinite(x.grad).all(), path


def test_a_row_without_a_token_is_finite():
    model = built("bert", F64)
    with torch.no_grad():
        assert torch.isfinite(model(tokens(2), lengths=[9, 0])).all()


# Batches


@each(CAUSAL | {"bert": None, "vector": None, "t5-encoder": None})
def test_a_batch_gives_what_its_rows_give_alone(name):
    model, ids = built(name), tokens(3)
    with torch.no_grad():
        together = call(model, ids)
        for i in range(3):
            if name in DECODERS or name in ("bert", "vector", "t5-encoder"):
                same(together[i : i + 1], model(ids[i : i + 1]), what=f"row {i}")
            else:
                src = source(3)[i : i + 1, : (7, 4, 6)[i]]
                same(together[i : i + 1], model(src, ids[i : i + 1]), what=f"row {i}")


# Symmetries


def test_an_encoder_without_positions_is_permutation_equivariant():
    model, ids = built("unordered", F64), tokens()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        same(model(ids)[:, order], model(ids[:, order]))


def test_an_encoder_with_positions_is_not():
    ids, order = tokens(), torch.arange(T).flip(0)
    with torch.no_grad():
        for name in ("bert", "t5-encoder"):
            model = built(name, F64)
            assert (model(ids)[:, order] - model(ids[:, order])).abs().max() > 1e-3


@each(["llama", "gptj", "neox", "alibi", "t5-of-model", "window", "yarn", "llama3"])
def test_relative_positions_are_relative(name):
    """Moving all positions by a constant changes nothing but rounding: rotary tables are made in float32
    (the angle of position 40 is rounded to 2e-6), so float64 weights do not make this exact; the law for exact tables is in the oracle."""
    model, ids = built(name, F64), tokens()
    with torch.no_grad():
        a, b = model(ids), model(ids, positions=torch.arange(T) + 31)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_absolute_positions_are_absolute():
    model, ids = built("gpt2"), tokens()
    with torch.no_grad():
        assert (model(ids) - model(ids, positions=torch.arange(T) + 5)).abs().max() > 1e-2


@each([*DECODERS, "bert", "t5-encoder"])
def test_embeddings_may_stand_in_for_tokens(name):
    model, ids = built(name), tokens()
    with torch.no_grad():
        assert torch.equal(model(ids), model(inputs_embeds=model.embed.weight[ids]))


@each(DECODERS)
def test_keep_reads_out_some_positions(name):
    model, ids = built(name), tokens()
    with torch.no_grad():
        full = model(ids)
        same(model(ids, keep=1), full[:, -1:])
        same(model(ids, keep=3), full[:, -3:])
        same(model(ids, keep=torch.tensor([2, 5])), torch.stack([full[0, 2], full[1, 5]])[:, None])
        same(model.readout(model.states(ids), a_pass()), full)


def test_grouped_queries_with_as_many_groups_as_heads_are_multi_head_attention():
    spec = Decoder(VOCAB, D, (Block(Attention(4, position=Rotary()), Gated(32)),) * 2)
    grouped = spec.at("blocks.*.attention.n_kv_heads").set(4)
    with torch.no_grad():
        assert torch.equal(fresh(spec)(tokens()), fresh(grouped)(tokens()))


def test_grouped_queries_are_multi_head_attention_with_repeated_keys_and_values():
    grouped = fresh(Decoder(VOCAB, D, (Block(Attention(4, n_kv_heads=2, position=Rotary()), Gated(32)),)), F64)
    full = fresh(grouped.spec.at("blocks.0.attention.n_kv_heads").set(None), F64)
    full.load_state_dict({n: x for n, x in grouped.state_dict().items() if "qkv" not in n}, strict=False)
    q, k, v = grouped.blocks[0].attn.qkv.weight.detach().split((24, 12, 12))
    k, v = (x.view(2, 6, D).repeat_interleave(2, 0).reshape(24, D) for x in (k, v))
    with torch.no_grad():
        full.blocks[0].attn.qkv.weight.copy_(torch.cat([q, k, v]))
        same(grouped(tokens()), full(tokens()))


def test_an_encoder_with_a_causal_mask_is_a_decoder():
    block = Block(Attention(4, position=Rotary()), Gated(32))
    decoder, encoder = Decoder(VOCAB, D, (block,) * 2), Encoder(VOCAB, D, (block.at("attention.mask").set(Causal()),) * 2)
    with torch.no_grad():
        assert torch.equal(fresh(decoder)(tokens()), fresh(encoder)(tokens()))


def test_an_extra_mask_joins_the_model_s_own():
    model = built("llama", F64)
    ids, lengths = tokens(), torch.tensor([9, 4])
    with torch.no_grad():
        same(model(ids, mask=Padding(lengths)), model(ids, mask=Padding.of([9, 4])))
        same(model(ids, mask=Padding(lengths))[1, :4], model(ids)[1, :4])
        assert (model(ids, mask=Padding(lengths))[1, 5:] - model(ids)[1, 5:]).abs().max() > 1e-3

"""Generation on real models: cached = uncached, batch = single, fork and rewind, taps, limits, encoder-decoders."""

from __future__ import annotations

import pytest
import torch

from glassformer.core.errors import CacheError, InputError, SamplerError, SiteError
from glassformer.core.mask import Window
from glassformer.core.tap import Edit, Record
from glassformer.infer import Draw, Greedy, Penalties, Session, Temperature, TopK, TopP, generate, stream
from glassformer.models.block import Block
from glassformer.models.encoder_decoder import EncoderDecoder
from glassformer.models.transformer import Decoder, Encoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.norm import LayerNorm, RMSNorm
from glassformer.parts.position import ALiBi, Learned, T5Buckets
from glassformer.parts.readout import Classifier, States, Tagger, Vector
from glassformer.parts.rotary import Rotary
from glassformer.weights.own import Loaded
from infer.fake import Pieces

torch.set_num_threads(1)

V, D, H = 29, 32, 4


def decoder(name: str) -> Decoder:
    plain, gated = Plain(48), Gated(48)
    blocks = {
        "rotary": Block(Attention(H, n_kv_heads=2, position=Rotary()), gated, RMSNorm()),
        "learned": Block(Attention(H, qkv_bias=True), plain, LayerNorm()),
        "alibi": Block(Attention(H, position=ALiBi()), plain, RMSNorm()),
        "window": Block(Attention(H, position=Rotary(), mask=Window(4)), plain, RMSNorm()),
        "dropout": Block(Attention(H, position=Rotary(), dropout=0.5), plain, RMSNorm(), dropout=0.5),
    }
    wide = Block(Attention(H, position=Rotary()), plain, RMSNorm())
    layers = (blocks[name],) * 2 if name != "window" else (blocks["window"], wide, blocks["window"])
    return Decoder(V, D, layers, final_norm=RMSNorm(), position=Learned(64)) if name == "learned" else Decoder(V, D, layers)


def loud(model):
    """Weights larger than at the start of training, so that what comes next depends on what came before."""
    with torch.no_grad():
        for n, p in sorted(model.named_parameters()):
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n) + p.numel())) * (1.0 if "embed" in n else 2.0 / p.shape[1] ** 0.5))
    return model.eval()


DECODERS = ["rotary", "learned", "alibi", "window"]


@pytest.fixture(scope="module", params=DECODERS)
def model(request):
    return loud(decoder(request.param).build(seed=0))


@pytest.fixture(scope="module")
def rotary():
    return loud(decoder("rotary").build(seed=0))


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11], [12, 13, 14, 15, 16]]
SAMPLERS = [Greedy(), Penalties(1.2, window=6) | TopK(12) | TopP(0.95) | Temperature(1.1) | Draw(3)]


def same(a, b):
    assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    for x, y in zip(a.top, b.top, strict=True):
        assert [c.id for c in x] == [c.id for c in y]
        assert [c.logprob for c in x] == pytest.approx([c.logprob for c in y], abs=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS], ids=["single", "ragged"])
def test_cached_is_uncached(model, sampler, prompt):
    options = {"max_new_tokens": 14, "sampler": sampler, "logprobs": 3, "seed": 5}
    cached, plain = generate(model, prompt, **options), generate(model, prompt, cache=False, **options)
    for a, b in zip(cached, plain, strict=True) if isinstance(prompt[0], list) else [(cached, plain)]:
        same(a, b)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "drawn"])
def test_batch_is_single(model, sampler):
    options = {"max_new_tokens": 14, "sampler": sampler, "logprobs": 3, "seed": 5, "eos_id": [0, 17, 20, 21]}
    together = generate(model, PROMPTS, **options)
    for prompt, one in zip(PROMPTS, together, strict=True):
        same(generate(model, prompt, **options), one)


def test_logits_of_every_step_are_those_of_one_uncached_pass(model):
    """Teacher forcing: the log-probabilities that came out step by step, all at once."""
    out = generate(model, PROMPTS, max_new_tokens=10, temperature=1.0, seed=1)
    for one in out:
        ids = torch.tensor([one.prompt_ids + one.ids])
        lp = model(ids).log_softmax(-1)[0, len(one.prompt_ids) - 1 : -1]
        assert one.logprobs == pytest.approx(lp.gather(1, torch.tensor(one.ids)[:, None])[:, 0].tolist(), abs=1e-5)


def test_the_tokens_are_not_all_alike(model):
    """Guards the tests above: with a model that repeats itself they would show nothing."""
    out = generate(model, PROMPTS, max_new_tokens=14, temperature=1.0, seed=5)
    assert all(len(set(o.ids)) > 4 for o in out)


# Fork and rewind


@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0]]], ids=["ragged", "single"])
def test_forked_and_rewound_sessions_go_on_the_same_way(model, prompts):
    cache = model.cache(batch=len(prompts), capacity=64, rewind=8)
    session = Session(model, prompts, Penalties(1.1) | Draw(7), room=30, cache=cache)
    drawn = [session.step() for _ in range(4)]
    twins = session.fork(2)
    drawn += [session.step() for _ in range(6)]
    for n in range(6):
        doubled = twins.step()
        assert doubled.ids == [t for t in drawn[4 + n].ids for _ in range(2)]
        assert doubled.logprobs == pytest.approx([p for p in drawn[4 + n].logprobs for _ in range(2)], abs=1e-5)
    session.rewind(6)
    for n in range(6):
        again = session.step()
        assert again.ids == drawn[4 + n].ids
        assert again.logprobs == pytest.approx(drawn[4 + n].logprobs, abs=1e-5)


def test_a_ring_of_yours_cannot_be_wound_back_beyond_what_it_holds():
    model = loud(decoder("window").build(seed=0))
    session = Session(model, [[1, 2, 3]], Greedy(), room=40, cache=model.cache(batch=1, capacity=60))
    for _ in range(20):
        session.step()
    before = session.ids
    with pytest.raises(CacheError, match="can no longer be forgotten"):
        session.rewind(9)
    assert session.ids == before
    assert session.state.steps == [20]


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5]]], ids=["one", "ragged"])
def test_a_session_winds_back_beyond_its_windows_and_goes_on_the_same_way(prompts):
    model = loud(decoder("window").build(seed=0))
    session = Session(model, prompts, Penalties(1.1) | Draw(7), room=40)
    drawn = [session.step() for _ in range(20)]
    twin = session.fork(1)
    session.rewind(9)
    for want in drawn[11:]:
        again = session.step()
        assert again.ids == want.ids
        assert again.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    assert twin.step().ids == session.step().ids


def test_a_ring_stays_small():
    model = loud(decoder("window").build(seed=0))
    cache = model.cache(batch=1, capacity=60)
    generate(model, [1, 2, 3], max_new_tokens=50, cache=cache)
    assert [cache.slot(i).keys.shape[2] for i in range(3)] == [4, 52, 4]


def test_a_conversation_goes_on_in_its_cache(rotary):
    """Feeding the rest of a text into the cache is the same as reading the whole text."""
    cache = rotary.cache(batch=1, capacity=64)
    first = generate(rotary, PROMPTS[0], max_new_tokens=5, cache=cache)
    assert cache.lengths == [len(PROMPTS[0]) + 4]
    second = generate(rotary, [first.ids[-1], 3, 4], max_new_tokens=6, cache=cache, logprobs=2)
    whole = generate(rotary, [*PROMPTS[0], *first.ids, 3, 4], max_new_tokens=6, logprobs=2)
    same(second, whole)


def test_a_cache_of_yours_works_for_rows_that_end_at_different_steps(rotary):
    options = {"max_new_tokens": 12, "temperature": 1.3, "seed": 2, "eos_id": list(range(0, 29, 3)), "logprobs": 1}
    cache = rotary.cache(batch=4, capacity=40)
    mine, own = generate(rotary, PROMPTS, cache=cache, **options), generate(rotary, PROMPTS, **options)
    for a, b in zip(mine, own, strict=True):
        same(a, b)
    assert len({len(o.ids) for o in mine}) > 1
    assert cache.lengths == [len(p) + len(o.ids) - 1 for p, o in zip(PROMPTS, mine, strict=True)]


# Looking and changing


def test_a_record_holds_every_step(rotary):
    tap = Record("blocks.*.attn.pattern", "logits")
    out = generate(rotary, PROMPTS[0], max_new_tokens=5, tap=tap)
    same(out, generate(rotary, PROMPTS[0], max_new_tokens=5))
    assert tap["step.0.blocks.0.attn.pattern"].shape == (1, H, 7, 7)
    pattern = tap["step.3.blocks.0.attn.pattern"]
    assert pattern.shape == (1, H, 1, 10)
    ids = torch.tensor([PROMPTS[0] + out.ids])
    whole = Record("blocks.0.attn.pattern")
    rotary(ids, tap=whole)
    assert torch.allclose(pattern[:, :, 0], whole["blocks.0.attn.pattern"][:, :, 9, :10], atol=1e-5)
    assert "step.5.logits" not in tap and tap["step.4.logits"].argmax().item() == out.ids[4]


def test_a_pattern_may_name_one_step(rotary):
    tap = Record("step.2.blocks.1.attn.pattern")
    generate(rotary, PROMPTS[0], max_new_tokens=5, tap=tap)
    assert tap.paths == ["step.2.blocks.1.attn.pattern"]
    with pytest.raises(SiteError, match="blocks.1.attn.patern"):
        generate(rotary, PROMPTS[0], max_new_tokens=5, tap=Record("blocks.1.attn.patern"))


@pytest.mark.parametrize("site", ["blocks.0.attn.z", "blocks.0.resid_post", "blocks.1.attn.pattern"])
def test_an_edit_holds_in_every_step_cached_or_not(rotary, site):
    def edit():
        return Edit(site, lambda x: x * 0.25)

    options = {"max_new_tokens": 8, "logprobs": 2}
    cached = generate(rotary, PROMPTS[0], tap=edit(), **options)
    same(cached, generate(rotary, PROMPTS[0], tap=edit(), cache=False, **options))
    assert cached.logprobs != pytest.approx(generate(rotary, PROMPTS[0], **options).logprobs, abs=1e-3)


def test_generation_leaves_modes_and_gradients_as_they_were():
    model = loud(decoder("dropout").build(seed=0)).train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    a, b = (generate(model, PROMPTS[0], max_new_tokens=8) for _ in range(2))
    same(a, b)
    same(a, generate(model.eval(), PROMPTS[0], max_new_tokens=8))
    model.train()
    model.blocks[0].eval()
    assert [m.training for m in model.modules()] == modes
    model.eval()
    model.blocks[0].train()
    modes = [m.training for m in model.modules()]
    same(a, generate(model, PROMPTS[0], max_new_tokens=8))
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


# Limits


def test_learned_positions_end_before_the_start():
    model = loud(decoder("learned").build(seed=0))
    for cache in (None, False):
        assert len(generate(model, [1] * 60, max_new_tokens=5, cache=cache).ids) == 5
        assert len(generate(model, [1] * 64, max_new_tokens=1, cache=cache).ids) == 1
        with pytest.raises(InputError, match=r"64 learned positions, but 60 tokens of prompt and 6 new ones need 65.*at most 5 new"):
            generate(model, [1] * 60, max_new_tokens=6, cache=cache)
        with pytest.raises(InputError, match=r"65 tokens of prompt and 1 new ones need 65.*at most 0 new"):
            generate(model, [1] * 65, max_new_tokens=1, cache=cache)
    cache = model.cache(1, 100)
    generate(model, [1] * 30, max_new_tokens=11, cache=cache)
    with pytest.raises(InputError, match=r"but 50 tokens of prompt and 16 new ones need 65.*at most 15 new"):
        generate(model, [1] * 10, max_new_tokens=16, cache=cache)
    assert len(generate(model, [1] * 10, max_new_tokens=15, cache=cache).ids) == 15
    assert cache.length == 64


def test_rows_of_different_lengths_reach_the_last_learned_position():
    model = loud(decoder("learned").build(seed=0))
    rows = [[1] * 60, [2] * 3, [3] * 58]
    for row, one in zip(rows, generate(model, rows, max_new_tokens=5, logprobs=1), strict=True):
        same(one, generate(model, row, max_new_tokens=5, logprobs=1))


def test_a_fixed_cache_is_filled_to_its_last_place(model):
    cache = model.cache(1, 12)
    full = generate(model, [1] * 8, max_new_tokens=5, cache=cache, logprobs=1)
    same(full, generate(model, [1] * 8, max_new_tokens=5, cache=False, logprobs=1))
    assert cache.length == 12
    with pytest.raises(CacheError, match="a prompt of 8 and 6 new tokens need 13"):
        generate(model, [1] * 8, max_new_tokens=6, cache=model.cache(1, 12))


@pytest.mark.parametrize("readout", [States(), Tagger(3), Classifier(3), Vector()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("cache", [None, False])
def test_models_that_predict_no_tokens_are_refused(translator, readout, cache):
    blocks = decoder("rotary").blocks
    for spec in (
        Decoder(V, D, blocks, readout=readout),
        Encoder(V, D, blocks, readout=readout),
        EncoderDecoder(translator.spec.encoder, translator.spec.decoder.replace(readout=readout), start=3),
    ):
        with pytest.raises(InputError, match=f"the model's read-out is {type(readout).__name__}"):
            generate(spec.build(seed=0), [1, 2], max_new_tokens=2, cache=cache)


def test_models_without_learned_positions_have_no_limit(rotary):
    assert len(generate(rotary, [1] * 60, max_new_tokens=20).ids) == 20


def test_ids_outside_the_vocabulary_and_encoders_are_refused(rotary):
    with pytest.raises(InputError, match="29"):
        generate(rotary, [1, 29], max_new_tokens=2)
    with pytest.raises(InputError, match=r"this Encoder has the mask Everything\(\) and sees the whole text at once: give a Decoder"):
        generate(Encoder(V, D, decoder("rotary").blocks).build(seed=0), [1, 2], max_new_tokens=2)


# Encoder-decoder


@pytest.fixture(scope="module")
def translator():
    attention = Attention(H)
    block = Block(attention, Plain(48), RMSNorm())
    encoder = Encoder(V, D, (block,) * 2, position=T5Buckets())
    target = Decoder(V, D, (block.replace(cross=attention),) * 2, position=T5Buckets(bidirectional=False))
    return loud(EncoderDecoder(encoder, target, start=3).build(seed=0))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["greedy", "drawn"])
def test_an_encoder_decoder_generates_alike_cached_uncached_batched_and_alone(translator, sampler):
    options = {"max_new_tokens": 10, "sampler": sampler, "logprobs": 3, "seed": 4, "eos_id": [0, 1, 2, 4]}
    together = generate(translator, PROMPTS, **options)
    plain = generate(translator, PROMPTS, cache=False, **options)
    for source, one, other in zip(PROMPTS, together, plain, strict=True):
        same(one, other)
        same(one, generate(translator, source, **options))
        assert one.prompt_ids == source
    assert len({tuple(o.ids) for o in together}) == 4


def test_the_target_begins_with_the_models_start_or_yours(translator):
    options = {"max_new_tokens": 4, "logprobs": 1}
    source = torch.tensor([PROMPTS[0]])
    for start, given in ((3, {}), (9, {"decoder_start": 9}), (9, {"decoder_start": [9]})):
        out = generate(translator, PROMPTS[0], **options, **given)
        lp = translator(source, torch.tensor([[start, *out.ids[:-1]]])).log_softmax(-1)[0]
        assert out.ids == lp.argmax(-1).tolist()
        assert out.logprobs == pytest.approx(lp.amax(-1).tolist(), abs=1e-5)


def test_the_source_is_encoded_once_and_the_cross_slot_filled_once(translator):
    tap = Record("encoder.blocks.*.resid_post", "decoder.blocks.*.cross.pattern")
    cache = translator.cache(batch=1, capacity=20)
    generate(translator, PROMPTS[0], max_new_tokens=4, tap=tap, cache=cache)
    encoded = [p for p in tap.paths if "encoder.blocks" in p]
    assert encoded == ["step.0.encoder.blocks.0.resid_post", "step.0.encoder.blocks.1.resid_post"]
    assert tap["step.3.decoder.blocks.1.cross.pattern"].shape == (1, H, 1, 7)
    assert cache.slot(0, "cross").keys.shape == (1, H, 7, D // H)


def test_a_model_speaks_by_itself_and_what_load_gives_brings_its_tokenizer(model, tmp_path):
    """``model.generate`` and ``generate`` are one; of a checkpoint the tokenizer and the end of a text hold where no others are said."""
    assert model.generate([1, 2, 3], max_new_tokens=4, top_k=5, seed=7) == generate(model, [1, 2, 3], max_new_tokens=4, top_k=5, seed=7)
    assert str(model.generation(temperature=0.5, top_k=5, seed=7, order="llama.cpp")) == "TopK(k=5) | Temperature(t=0.5) | Draw(seed=7)"
    with pytest.raises(SamplerError, match=r"There is no option 'temperatur'\. Did you mean 'temperature'"):
        model.generate([1], temperatur=1)

    words = Pieces(*map(chr, range(97, 97 + V)))
    want = generate(model, "abc", tokenizer=words, max_new_tokens=4)
    loaded = Loaded(model, words, {"generation": {"eos_token_id": want.ids[1]}})  # type: ignore[arg-type]
    assert generate(loaded, "abc", max_new_tokens=4, eos_id=()) == loaded.generate("abc", max_new_tokens=4, eos_id=()) == want
    assert str(loaded.generation(min_new_tokens=2)) == f"MinNewTokens(n=2, eos=({want.ids[1]},)) | Greedy()"
    short = generate(loaded, "abc", max_new_tokens=4)
    assert (short.ids, short.finish_reason) == (want.ids[: want.ids.index(want.ids[1]) + 1], "eos")
    assert "".join(token.text for token in stream(loaded, "abc", max_new_tokens=4, eos_id=())) == want.text

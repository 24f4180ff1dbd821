"""Combined models: each rule in NumPy, parity with transformers, and the laws that hold for any model in a session."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import glassformer as gf
from glassformer.core.errors import CacheError, InputError, SamplerError
from glassformer.core.mask import Window
from glassformer.core.tap import Edit, Record
from glassformer.infer import Draw, Greedy, Penalties, Session, Temperature, TopK, generate
from glassformer.infer.contrastive import Contrast
from glassformer.infer.contrastive_search import ContrastiveSearch
from glassformer.infer.dola import DoLa, divergence
from glassformer.infer.guidance import Guidance
from glassformer.parts.feedforward import Gated
from look import zoo

from .fake import Bigram, Pieces

torch.set_num_threads(1)

PROMPTS = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]]
WINDOWED = gf.Decoder(
    zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary(), mask=Window(4)), feedforward=Gated(24)), zoo.block(attention=gf.Attention(4)))
)
KINDS = {
    "guided": lambda m, other: Guidance(1.7).over(m),
    "negative": lambda m, other: Guidance(2.5, [3, 4, 5, 6, 7, 8, 9]).over(m),
    "contrasted": lambda m, other: Contrast().over(m, other),
    "dola": lambda m, other: DoLa("low").over(m),
    "search": lambda m, other: ContrastiveSearch(0.6, 5).over(m),
    "original": lambda m, other: Contrast(beta=None, temperature=0.5).over(m, other),
}


def loud(spec, seed=0):
    zoo.SPECS["made here"] = spec
    try:
        return zoo.model("made here", seed)
    finally:
        del zoo.SPECS["made here"]


def pair(name):
    return (loud(WINDOWED), loud(WINDOWED, 3)) if name == "windowed" else (zoo.model(name), zoo.model(name, 3))


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# The rules, in NumPy and float64


def ln_p(logits):
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def close(got, want):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want)
    assert (np.isneginf(got) == np.isneginf(want)).all()
    kept = np.isfinite(want)
    np.testing.assert_allclose(got[kept], want[kept], rtol=1e-4, atol=1e-4)


def last(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), keep=1)[0, -1].numpy()


@pytest.mark.parametrize("negative", [None, [9, 8, 7]])
def test_guidance_is_its_formula(negative):
    model = zoo.model("llama")
    got = Guidance(2.5, negative).over(model)(torch.tensor([[1, 2, 3, 11, 12]]), keep=1, drawn=2).detach()[0, -1]
    c, u = ln_p(last(model, [1, 2, 3, 11, 12])), ln_p(last(model, [*(negative or [3]), 11, 12]))
    close(got, u + 2.5 * (c - u))


@pytest.mark.parametrize("beta", [0.5, None])
def test_contrast_is_its_formula(beta):
    expert, amateur = pair("gpt2")
    got = Contrast(0.2, beta, 0.5).over(expert, amateur)(torch.tensor([[1, 2, 3]]), keep=1).detach()[0, -1]
    e, a = ln_p(last(expert, [1, 2, 3])), ln_p(last(amateur, [1, 2, 3]) / 0.5)
    want = e - a if beta is None else (1 + beta) * e - beta * a
    close(got, np.where(np.exp(e) >= 0.2 * np.exp(e).max(), want, -np.inf))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "sandwich", "parallel"])
def test_dola_is_its_formula(name, norm):
    model, tap = zoo.model(name), Record("blocks.*.resid_post", "blocks.0.resid_pre")
    tokens, layers = torch.tensor([[1, 2, 3, 4]]), list(range(len(model.blocks)))
    q = ln_p(model(tokens, tap=tap).detach()[0])
    streams = [tap["blocks.0.resid_pre"], *(tap[f"blocks.{i}.resid_post"] for i in layers[:-1])]
    early = np.stack([ln_p(model.read(h, normed=not norm).detach()[0]) for h in streams])
    m = np.log((np.exp(q) + np.exp(early)) / 2)
    far = (np.exp(q) * (q - m) + np.exp(early) * (early - m)).sum(-1) / 2  # [l t]
    chosen = early[far.argmax(0), np.arange(4)]
    want = np.where(np.exp(q) >= 0.1 * np.exp(q).max(-1, keepdims=True), q - chosen, -np.inf)
    close(DoLa(layers, norm=norm).over(model)(tokens).detach()[0], want)


def test_a_divergence_of_two_certain_tokens_is_ln_2_and_of_equals_0():
    sure = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0], [0.0, -torch.inf]])
    assert divergence(sure[:2], sure[1:]).flatten().tolist() == pytest.approx([np.log(2)] * 2)
    assert divergence(sure, sure).flatten().tolist() == [0.0] * 3


def test_dola_with_one_layer_is_the_program_of_its_authors():
    # Their relative_top_filter and the difference of the two soft-maxes, on the streams as they are.
    model, tap = zoo.model("llama"), Record("blocks.0.resid_post")
    tokens = torch.tensor([[5, 6, 7]])
    final = model(tokens, tap=tap).detach()[0, -1].log_softmax(-1)
    base = model.read(tap["blocks.0.resid_post"]).detach()[0, -1].log_softmax(-1)
    threshold = torch.minimum(final.sort(descending=True).values[0], final.max() + np.log(0.1))
    base[final < threshold], final[final < threshold] = -1e-3, -float("inf")
    close(DoLa([1], norm=False).over(model)(tokens, keep=1).detach()[0, -1], (final - base).numpy())


def test_dola_s_layers_by_name_are_those_of_transformers():
    low, high = DoLa("low"), DoLa("high")
    assert low.candidates(12, tied=False) == (0, 2, 4) and high.candidates(12, tied=False) == (6, 8, 10)
    assert low.candidates(12, tied=True) == (2, 4) and low.candidates(2, tied=True) == (1,) and low.candidates(1, tied=True) == (0,)
    assert low.candidates(48, tied=False) == tuple(range(0, 20, 2)) and high.candidates(48, tied=True) == tuple(range(28, 48, 2))
    assert DoLa([3, 1, 3]).candidates(4, tied=True) == (1, 3)


def test_contrastive_search_is_its_formula():
    model, ids = zoo.model("llama"), [1, 2, 3, 4, 5]
    states = lambda ids: model.states(torch.tensor([ids])).detach()[0].double().numpy()
    p = np.exp(ln_p(last(model, ids)))
    want = np.full(zoo.V, -np.inf)
    for v in np.argsort(-p)[:6]:
        h = states([*ids, int(v)])
        h /= np.linalg.norm(h, axis=-1, keepdims=True)
        want[v] = 0.4 * p[v] - 0.6 * (h[:-1] @ h[-1]).max()
    close(ContrastiveSearch(0.6, 6).over(model)(torch.tensor([ids]), keep=1).detach()[0, -1], want)


@pytest.mark.parametrize("negative", [None, [7, 3, 9, 1, 2, 4, 8]])
@pytest.mark.parametrize("scale", [1.5, 3.0, 0.0])
def test_guided_tokens_are_those_of_transformers(negative, scale, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=53, n_layer=2, n_embd=32, n_head=4, n_positions=64, initializer_range=0.3, eos_token_id=None, bos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = gf.weights.load(tmp_path, dtype="float32").model.eval()
    prompt = [5, 6, 7, 8]
    told = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative])}
    processor = transformers.generation.logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, theirs, told.get("negative_prompt_ids"))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(20):
            scores = processor(ids, theirs(ids).logits[:, -1])
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    got = generate(ours, prompt, max_new_tokens=20, guidance_scale=scale, negative_prompt_ids=negative, logprobs=3)
    assert got.ids == ids[0, 4:].tolist()
    assert [c.logprob for c in got.top[-1]] == pytest.approx(scores.log_softmax(-1).topk(3).values[0].tolist(), abs=1e-4)


# The laws


@pytest.mark.parametrize("name", ["gpt2", "llama", "experts", "sigmoid", "windowed"])
def test_cached_is_uncached_and_a_batch_is_its_rows(name, kind):
    model = KINDS[kind](*pair(name))
    sampler = Greedy() if kind == "search" else Penalties(1.1) | TopK(9) | Temperature(1.2) | Draw(3)
    options = {"max_new_tokens": 7, "sampler": sampler, "logprobs": 2, "seed": [5, 6, 7]}
    batch = generate(model, PROMPTS, **options)
    plain = generate(model, PROMPTS, cache=False, **options)
    for row, (a, b) in enumerate(zip(batch, plain, strict=True)):
        alone = generate(model, PROMPTS[row], **(options | {"seed": [5 + row]}))
        assert a.ids == b.ids == alone.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "experts"])
def test_forking_and_winding_back_is_as_if_never_done(name, kind):
    model = KINDS[kind](*pair(name))
    chain = Greedy() if kind == "search" else Penalties(1.1) | TopK(9) | Draw(3)
    straight = Session(model, PROMPTS, chain, seed=1)
    for _ in range(7):
        straight.step()
    session = Session(model, PROMPTS, chain, seed=1)
    for _ in range(4):
        session.step()
    twins = session.fork(2)
    session.rewind(3)
    while session.drawn < 7:
        session.step()
        if twins.drawn < 7:
            twins.step()
    assert session.ids == straight.ids
    assert twins.ids == [row for row in straight.ids for _ in range(2)]
    session.rewind(7)  # to the prompt; a row of one token has then read nothing
    for _ in range(7):
        session.step()
    assert session.ids == straight.ids


def test_rewinding_a_prompt_of_one_token_begins_anew():
    session = Session(Guidance(2.0, [3, 4, 5]).over(zoo.model("llama")), [[5], [6]], Greedy())
    first = [session.step().ids for _ in range(3)]
    assert session.cache.parts[1].lengths == [5, 5] and session.cache.lengths == [3, 3]
    session.rewind(3)
    assert session.cache.parts[1].lengths == [0, 0] and not session.cache.begun
    assert [session.step().ids for _ in range(3)] == first


def test_a_negative_branch_is_wound_back_to_its_prompt_at_most():
    guided = Guidance(2.0, [3, 4, 5]).over(zoo.model("llama"))
    cache = guided.cache(1)
    guided(torch.tensor([[1, 2, 6, 7, 8]]), cache=cache, drawn=1)
    assert cache.lengths == [5] and cache.parts[1].lengths == [4]
    cache.rewind(2)
    assert cache.parts[1].lengths == [2]
    again = guided(torch.tensor([[7]]), cache=cache).detach()
    assert torch.allclose(again, guided(torch.tensor([[1, 2, 6, 7]]), keep=1).detach(), atol=1e-5)
    with pytest.raises(CacheError, match="Cannot forget 2 tokens: a branch that began with another text"):
        cache.rewind(2)
    assert cache.lengths == [4] and cache.parts[1].lengths == [3]


def test_long_rope_is_read_anew_when_either_branch_outgrows_its_angles():
    scaling = gf.LongRope(short=(1.0, 1.0), long=(1.5, 3.0), factor=2.0, original_context=8)
    model = loud(gf.Decoder(zoo.V, zoo.D, (zoo.block(attention=gf.Attention(4, position=gf.Rotary(scaling=scaling))),) * 2))
    for guidance in (Guidance(2.0), Guidance(2.0, [3, 4, 5, 6])):
        guided = guidance.over(model)
        cached, plain = (generate(guided, [1, 2], max_new_tokens=14, cache=cache, logprobs=2) for cache in (None, False))
        assert cached.ids == plain.ids and cached.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
        session = Session(guided, [[1, 2]], Greedy())
        for _ in range(14):
            session.step()
        session.rewind(11)
        for _ in range(11):
            session.step()
        assert session.ids[0][2:] == cached.ids


@pytest.mark.parametrize("drawn", [0, 2])
def test_what_is_kept_does_not_change_what_is_said(drawn):
    guided = Guidance(2.0, [3, 4]).over(zoo.model("llama"))
    tokens, lengths = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]), [5, 3]
    with torch.no_grad():
        whole = guided(tokens, lengths=lengths, drawn=drawn)
        own = guided(tokens, lengths=lengths, keep=torch.tensor([4, 2]), drawn=drawn)
        tail = guided(tokens, lengths=lengths, keep=2, drawn=drawn)
        plain = guided.model(tokens, lengths=lengths)
    assert torch.allclose(own[:, 0], whole[[0, 1], [4, 2]], atol=1e-5) and torch.allclose(tail, whole[:, -2:], atol=1e-5)
    before = 5 - 1 - drawn
    assert torch.equal(whole[0, :before], plain[0, :before]) and not torch.allclose(whole[0, before:], plain[0, before:], atol=1e-3)
    several = guided(tokens, lengths=lengths, drawn=[drawn, 0], keep=torch.tensor([4, 2])).detach()
    assert torch.allclose(several[0], own[0], atol=1e-5)


def test_off_is_the_plain_model_bit_for_bit():
    model, other = pair("llama")
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        for made in (Guidance(1).over(model), Contrast(alpha=0, beta=0).over(model, other)):
            assert torch.equal(made(tokens, keep=1, cache=made.cache(2)), model(tokens, keep=1)) and len(made.cache(2).parts) == 1
    plain = generate(model, PROMPTS, max_new_tokens=5)
    assert [r.ids for r in generate(model, PROMPTS, max_new_tokens=5, guidance_scale=1, penalty_alpha=0)] == [r.ids for r in plain]
    assert [r.ids for r in generate(model, PROMPTS, max_new_tokens=5, penalty_alpha=1e-9, top_k=3)] == [r.ids for r in plain]


def test_finished_rows_stand_still():
    model, other = pair("llama")
    for made in (Guidance(1.5).over(model), Contrast().over(model, other), ContrastiveSearch().over(model)):
        free = generate(made, PROMPTS, max_new_tokens=8)
        stop = free[0].ids[2]
        whole = [row.ids[: row.ids.index(stop) + 1] if stop in row.ids else row.ids for row in free]
        for options in ({}, {"cache": made.cache(3, 40)}, {"tap": Record("logits")}):  # rows leave the batch, or stay and are fed nothing
            assert [row.ids for row in generate(made, PROMPTS, max_new_tokens=8, eos_id=stop, **options)] == whole


# Encoder-decoders


@pytest.mark.parametrize("negative", [None, [9, 8, 7, 6]])
def test_an_encoder_decoder_is_guided_by_its_source(negative):
    model = zoo.model("t5")
    guided = Guidance(2.0, negative).over(model)
    sources = [[1, 2, 3, 4, 5], [6, 7]]
    batch = generate(guided, sources, max_new_tokens=6, logprobs=1)
    for source, got in zip(sources, batch, strict=True):
        target = [model.spec.start]
        with torch.no_grad():
            for token, p in zip(got.ids, got.logprobs, strict=True):
                c, u = (ln_p(model(torch.tensor([s]), torch.tensor([target]), keep=1)[0, -1].numpy()) for s in (source, negative or source[-1:]))
                want = ln_p(u + 2.0 * (c - u))
                assert token == want.argmax() and p == pytest.approx(want[token], abs=1e-4)
                target.append(token)
    assert [r.ids for r in generate(guided, sources, max_new_tokens=6, cache=False)] == [r.ids for r in batch]
    assert [r.ids for r in generate(Guidance(1).over(model), sources, max_new_tokens=6)] == [r.ids for r in generate(model, sources, max_new_tokens=6)]
    with pytest.raises(InputError, match="no single forward pass"):
        guided(torch.tensor([[1]]))


# Names, taps, traces


def test_names_make_the_models():
    model, other = pair("llama")
    same = lambda made, **options: generate(made, PROMPTS[0], max_new_tokens=6).ids == generate(model, PROMPTS[0], max_new_tokens=6, **options).ids
    assert same(Guidance(2.0, [3, 4]).over(model), guidance_scale=2, negative_prompt=[3, 4])
    assert same(Contrast(0.2, 1.0).over(model, other), contrast=other, contrast_alpha=0.2, contrast_beta=1.0)
    with pytest.raises(InputError):
        generate(model, PROMPTS[0], max_new_tokens=2, contrast=Guidance(2.0).over(other))  # a combined model is not taken for its first branch
    assert same(DoLa("low").over(model), dola_layers="low") and same(DoLa([1]).over(model), dola_layers=[1])
    assert same(ContrastiveSearch(0.5, 3).over(model), penalty_alpha=0.5, top_k=3)


def test_a_negative_prompt_may_be_a_text():
    table = torch.zeros(3, 3)
    table[0], table[1] = torch.tensor([0.0, 1.0, 0.9]), torch.tensor([0.0, 9.0, 0.0])
    model, pieces = Bigram(table), Pieces("a", "b", "c")
    assert generate(model, "a", tokenizer=pieces, max_new_tokens=1).text == "b"
    assert generate(model, "a", tokenizer=pieces, max_new_tokens=1, guidance_scale=2, negative_prompt="b").text == "c"


def test_a_tap_sees_the_pass_of_the_first_branch_only(kind):
    model, other = pair("llama")
    made, tap, plain = KINDS[kind](model, other), Record("logits"), Record("logits")
    generate(made, PROMPTS[0], max_new_tokens=2, tap=tap)
    session = Session(model, PROMPTS[:1], Greedy(), tap=plain)
    session.step()
    assert torch.equal(tap["step.0.logits"], plain["step.0.logits"]) and tap.paths == ["step.0.logits", "step.1.logits"]
    silent = Edit("blocks.1.resid_post", lambda x: 0 * x)
    assert generate(made, PROMPTS[0], max_new_tokens=2, tap=silent, logprobs=1).logprobs != generate(made, PROMPTS[0], max_new_tokens=2, logprobs=1).logprobs
    assert {site.path for site in made.sites()} == {site.path for site in model.sites()}


def test_a_trace_begins_with_the_combined_distribution():
    model = zoo.model("llama")
    got = generate(model, PROMPTS[0], max_new_tokens=1, guidance_scale=3, top_k=5, seed=1, trace=True)
    with torch.no_grad():
        p = Guidance(3.0).over(model)(torch.tensor(PROMPTS[:1]), keep=1)[0, -1].softmax(-1)
    assert got.trace[0].stages[0].candidates[0].p == pytest.approx(float(p.max()), abs=1e-5)


# What is said when it cannot be


def test_settings_that_make_no_sense():
    model, other = pair("llama")
    small = gf.Decoder(7, 16, (zoo.block(),)).build(seed=0)
    for make, error, words in (
        (lambda: Guidance(float("nan")), SamplerError, "finite number, but nan was given. Use 1 for none"),
        (lambda: Guidance(2, ()), SamplerError, r"one token id or more, each 0 or more, but \[\] was given"),
        (lambda: Guidance(2, [99]).over(model), SamplerError, "holds token 99, but the vocabulary has 31"),
        (lambda: Guidance(2).over("gpt2"), InputError, "made of models, but .* was given: spec.build"),
        (lambda: Guidance(2).over(DoLa().over(model)), InputError, "made of plain models, but LayersContrasted is one itself"),
        (lambda: Contrast(alpha=2), SamplerError, "fraction from 0 to 1, but alpha=2"),
        (lambda: Contrast(beta=-1.0), SamplerError, "0 or more, but beta=-1.0"),
        (lambda: Contrast(temperature=0.0), SamplerError, "above 0, but 0.0"),
        (lambda: Contrast().over(model, small), InputError, "expert has 31 tokens and the amateur 7"),
        (lambda: Contrast().over(zoo.model("t5"), other), InputError, "but an encoder-decoder was given: use guidance"),
        (lambda: Contrast().over(model, zoo.model("bert")), InputError, "sees the whole text at once"),
        (lambda: Contrast().over(model, other.to("meta")), InputError, "different devices, cpu and meta"),
        (lambda: DoLa("hihg"), SamplerError, "no layers named 'hihg'. Did you mean.*high"),
        (lambda: DoLa([]), SamplerError, "the list is empty"),
        (lambda: DoLa(relative_top=2.0), SamplerError, "from 0 to 1, but 2.0"),
        (lambda: DoLa([3]).over(model), InputError, "layers 0 to 2 .* of 3 blocks, but layer 3 was given"),
        (lambda: DoLa().candidates(0, False), InputError, "has no blocks"),
        (lambda: DoLa().over(zoo.model("t5")), InputError, "DoLa reads the layers .* encoder-decoder"),
        (lambda: DoLa().over(Bigram.random()), InputError, "but Bigram has none to read"),
        (lambda: ContrastiveSearch(2.0), SamplerError, "weight from 0 to 1, but alpha=2.0"),
        (lambda: ContrastiveSearch(0.5, 0), SamplerError, "1 candidate or more, but k=0"),
        (lambda: ContrastiveSearch().over(zoo.model("t5")), InputError, "states of one text, but an encoder-decoder"),
        (lambda: ContrastiveSearch().over(Bigram.random()), InputError, "states of a Decoder, but Bigram has none"),
        (lambda: ContrastiveSearch().over(model)(torch.tensor([[1, 2]])), InputError, "keep=None asks for more places: use keep=1"),
        (lambda: Guidance(2).over(model)(torch.tensor([[1, 2]]), drawn=2), InputError, r"rows of \[2\] tokens drawn=2"),
    ):
        with pytest.raises(error, match=words):
            make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"negative_prompt": [1]}, "negative_prompt was given without guidance_scale"),
        ({"contrast_beta": 1.0}, "contrast_beta was given without contrast"),
        ({"penalty_alpha": 0.5, "dola_layers": "low"}, "dola_layers and penalty_alpha each combine"),
        ({"penalty_alpha": 0.5, "do_sample": True}, "so it does not draw: leave do_sample"),
        ({"guidance_scale": 2, "negative_prompt": "no"}, "without a tokenizer it cannot be read"),
        ({"guidance_scale": 2, "negative_prompt": [[1], [2]]}, "the same for every row"),
        ({"guidance_scale": 2, "negative_prompt": [1], "negative_prompt_ids": [2]}, "two names of one thing"),
        ({"guidance": 2}, "no option 'guidance'. Did you mean 'guidance_scale'"),
    ],
)
def test_options_that_disagree(options, words):
    with pytest.raises(SamplerError, match=words):
        generate(zoo.model("llama"), PROMPTS[0], **options)


def test_positions_of_the_longer_branch_are_counted_before_anything_runs():
    model = zoo.model("gpt2")  # 64 learned positions
    assert len(generate(model, [1], max_new_tokens=20, guidance_scale=2, negative_prompt=[1] * 45).ids) == 20
    with pytest.raises(InputError, match="64 learned positions, but 46 tokens of prompt and 20 new ones need 65"):
        generate(model, [1], max_new_tokens=20, guidance_scale=2, negative_prompt=[1] * 46)


def test_caches_belong_to_their_models():
    model, other = pair("llama")
    made = Contrast().over(model, other)
    tokens = torch.tensor([[1, 2, 3]])
    with pytest.raises(CacheError, match="one cache for each, but .*Cache was given: use its own"):
        made(tokens, cache=model.cache(1))
    with pytest.raises(CacheError, match="branches of a combined model, and a single model was given it"):
        model(tokens, cache=made.cache(1))
    cache = made.cache(1)
    made(tokens, cache=cache)
    assert cache.bytes == sum(p.bytes for p in cache.parts) and repr(cache).startswith("JointCache(Cache(1 rows") and cache.fork(2).lengths == [3, 3]
    with pytest.raises(CacheError, match="Cannot forget 4 tokens"):
        cache.rewind(4)
    assert [p.lengths for p in cache.parts] == [[3], [3]]
    made.amateur = None  # breaks the second branch in the middle of a call
    with pytest.raises(TypeError):
        made(tokens, cache=cache)
    with pytest.raises(CacheError, match="failed after its first branch had read: make a new cache"):
        cache.select([0])


def test_a_rewind_that_one_branch_cannot_do_is_done_by_none():
    """Of a cache of yours; a session's own is read anew, in both branches."""
    guided = Guidance(2.0).over(loud(WINDOWED))
    yours = Session(guided, [[1, 2, 3]], Greedy(), room=20, cache=guided.cache(batch=1, capacity=40))
    own = Session(guided, [[1, 2, 3]], Greedy(), room=20)
    drawn = [(yours.step().ids, own.step().ids) for _ in range(9)]
    held = [part.lengths for part in yours.cache.parts]
    with pytest.raises(CacheError, match="ring"):
        yours.rewind(5)
    assert [part.lengths for part in yours.cache.parts] == held
    own.rewind(5)
    assert [own.step().ids for _ in range(5)] == [ids for _, ids in drawn[4:]]

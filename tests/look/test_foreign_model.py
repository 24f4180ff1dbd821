"""A model of transformers looked into from outside: the same numbers under the same paths as the same checkpoint opened by us."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer import look
from glassformer.core.errors import GlassformerWarning, InputError, SiteError
from glassformer.look import foreign
from glassformer.look.subject import read
from glassformer.look.windows import Reading

transformers = pytest.importorskip("transformers")

V = 61
SMALL: dict[str, Any] = {"vocab_size": V, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 44}
MADE: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_layer=2, n_embd=32, n_head=4, n_positions=24)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, layer_types=["full_attention"] * 2)
    ),
}
TOKENS = torch.tensor([[3, 7, 7, 20, 5, 3]])


@pytest.fixture(scope="module", params=MADE)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """(name, theirs, ours) of one random checkpoint."""
    torch.manual_seed(0)
    theirs = MADE[request.param]().eval()
    theirs.set_attn_implementation("eager")
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return request.param, theirs, gf.weights.load(folder).model.eval()


def record(model: Any, *sites: str) -> tuple[gf.Record, torch.Tensor]:
    tap = gf.Record(*sites)
    with torch.no_grad():
        return tap, model(TOKENS, tap=tap)


def test_every_reachable_value_is_ours(both: tuple[str, Any, Any]) -> None:
    name, theirs, ours = both
    f = foreign(theirs)
    mine = {s.path for s in ours.sites()}
    shared = [s.path for s in f.sites() if s.path in mine]
    assert len(shared) >= (15 if name == "mixtral" else 23), "fewer sites are reachable than the modules' borders allow"
    (a, logits), (b, expected) = record(f, *shared), record(ours, *shared)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    different = [p for p in shared if a[p].shape != b[p].shape or not torch.allclose(a[p], b[p], atol=1e-5, rtol=1e-4)]
    # Their embeddings are seen before a scale (Gemma), token types (BERT); Gemma's norm after attention stands outside the attention.
    assert different in ([], ["embed"])


def test_an_edit_has_the_same_effect(both: tuple[str, Any, Any]) -> None:
    _, theirs, ours = both
    off = gf.Edit("blocks.1.attn.z[2]", lambda z: 0 * z)
    with torch.no_grad():
        plain, edited = foreign(theirs)(TOKENS), foreign(theirs)(TOKENS, tap=off)
        torch.testing.assert_close(edited, ours(TOKENS, tap=off), atol=1e-5, rtol=1e-4)
        assert (edited - plain).abs().max() > 1e-4
        assert torch.equal(theirs(TOKENS).logits, plain), "a hook was left behind"


def test_streams_are_read_out(both: tuple[str, Any, Any]) -> None:
    _, theirs, _ = both
    f = foreign(theirs)
    tap, logits = record(f, "blocks.1.resid_post")
    torch.testing.assert_close(f.read(tap["blocks.1.resid_post"], normed=False), logits, atol=1e-5, rtol=1e-4)


def test_gradients_reach_their_values(both: tuple[str, Any, Any]) -> None:
    _, theirs, _ = both
    tap = gf.Record("blocks.0.resid_post", grad=True)
    foreign(theirs)(TOKENS, tap=tap)[0, -1].max().backward()
    assert tap.grad("blocks.0.resid_post").abs().sum() > 0


def test_a_subject_takes_it(both: tuple[str, Any, Any]) -> None:
    name, theirs, _ = both
    s = read(foreign(theirs), TOKENS[0])
    assert (s.layers, s.causal) == (2, name != "bert")
    _, logits = s.run("blocks.*.resid_post")
    assert logits.shape == (6, V)


def test_what_cannot_be_reached_says_so() -> None:
    torch.manual_seed(0)
    theirs = MADE["gpt2"]().eval()
    theirs.set_attn_implementation("sdpa")
    f = foreign(theirs)
    unformed = r"attention weights are not formed by this GPT2LMHeadModel's kernel \(sdpa\): load it with attn_implementation='eager'"
    with pytest.raises(SiteError, match=unformed):
        f(TOKENS, tap=gf.Record("blocks.0.attn.pattern"))
    with pytest.raises(SiteError, match="cannot be reached in this GPT2LMHeadModel: the value does not cross a border of its modules"):
        f(TOKENS, tap=gf.Record("blocks.0.attn.scores"))
    with pytest.raises(SiteError, match=r"'blocks.0.attn.zz' meets no site of this model. Did you mean"):
        f(TOKENS, tap=gf.Record("blocks.0.attn.zz"))
    theirs.set_attn_implementation("eager")
    with pytest.raises(SiteError, match="can be read, but not changed, from outside"):
        f(TOKENS, tap=gf.Edit("blocks.0.attn.pattern", lambda a: a))
    with pytest.raises(InputError, match="The text has 30 tokens, but this GPT2LMHeadModel has positions for 24"):
        f(torch.zeros(1, 30, dtype=torch.long))
    with pytest.raises(InputError, match="The text has 30 tokens, but this model has positions for 24: give a shorter one, such as its first 24 tokens"):
        read(f, [1] * 30)
    with pytest.raises(InputError, match=r"Windows of 30 tokens were asked for, but this model has positions for 24: give context=24 or fewer"):
        Reading(f, [[1] * 30], context=30)
    assert Reading(f, [[1] * 30]).context == 24


def test_a_text_beyond_their_configs_positions_is_noted() -> None:
    """A rotary model computes beyond the positions that its config names; the note comes with the question."""
    theirs = foreign(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, max_position_embeddings=8)))
    with pytest.warns(GlassformerWarning, match="The text has 9 tokens, but this model names 8 positions in its config") as told:
        read(theirs, [1] * 9)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(theirs, [1] * 8)


@pytest.mark.parametrize(("kind", "most"), [("Roberta", 18), ("Bert", 20), ("Camembert", 16)])
def test_positions_are_those_that_their_model_has(kind: str, most: int) -> None:
    """RoBERTa's family counts positions from behind the padding's row, so a table of 20 (its published ones: 514) holds 18 (512)."""
    padding = {"pad_token_id": 3} if kind == "Camembert" else {}
    config = getattr(transformers, f"{kind}Config")(**SMALL, max_position_embeddings=20, **padding)
    theirs = getattr(transformers, f"{kind}ForMaskedLM")(config).eval()
    f = foreign(theirs)
    assert f.max_positions == most
    tokens = 5 + torch.arange(most)[None]
    with torch.no_grad():
        torch.testing.assert_close(f(tokens), theirs(tokens).logits)
        with pytest.raises((IndexError, RuntimeError)):
            theirs(5 + torch.arange(most + 1)[None])
    with pytest.raises(InputError, match=f"The text has {most + 1} tokens, but this {kind}ForMaskedLM has positions for {most}: give a shorter one"):
        f(5 + torch.arange(most + 1)[None])


def test_errors() -> None:
    with pytest.raises(InputError, match="foreign\\(model\\) opens a model of transformers, but"):
        foreign(torch.nn.Linear(2, 2))
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(InputError, match="reads two texts, which is not followed from outside"):
        foreign(t5)
    with pytest.raises(InputError, match="has no read-out over tokens"):
        foreign(transformers.GPT2Model(transformers.GPT2Config(vocab_size=V, n_layer=1, n_embd=16, n_head=2))).read(torch.zeros(1, 1, 16))
    with pytest.raises(InputError, match="A tokenizer is one of glassformer or a fast one of transformers"):
        foreign(MADE["gpt2"](), "no tokenizer")


def test_their_tokenizer_is_read(tmp_path: Path) -> None:
    ours = gf.text.train("bpe", texts=["the old man and the sea"] * 3, vocab_size=270, special=("<|end|>",))
    ours.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    f = foreign(transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=270, n_layer=1, n_embd=16, n_head=2)), theirs)
    assert read(f, "the sea").ids == tuple(ours.encode("the sea"))


def test_edits_know_their_positions(both: tuple[str, Any, Any]) -> None:
    _, theirs, ours = both
    edit = look.Intervention("late", (look.Zero("blocks.0.attn.z[1]", positions="3:"),))
    f = foreign(theirs)
    with torch.no_grad():
        torch.testing.assert_close(f(TOKENS, tap=edit.tap(f)), ours(TOKENS, tap=edit.tap(ours)), atol=1e-5, rtol=1e-4)


def test_what_is_asked_from_outside_is_what_is_asked_of_ours(both: tuple[str, Any, Any]) -> None:
    """Candidates, comparison and lens of their model are those of the same checkpoint opened by us: a sandwich's norms and a mixture's experts too."""
    _, theirs, ours = both
    f, ids, other = foreign(theirs), TOKENS[0].tolist(), [4, 7, 7, 20, 9, 3]
    near = {"atol": 1e-4, "rtol": 1e-3}
    a, b = look.candidates(f, ids, k=5), look.candidates(ours, ids, k=5)
    assert torch.equal(a.ids, b.ids)
    torch.testing.assert_close(a.p, b.p, **near)
    one, two = look.compare(f, ids, other, target=(3, 5)), look.compare(ours, ids, other, target=(3, 5))
    torch.testing.assert_close((one.p, one.distance, one.aligned, one.lens_js), (two.p, two.distance, two.aligned, two.lens_js), **near)
    assert one.change == pytest.approx(two.change, abs=1e-4) and one.heads is None and "Logit of" in str(one)
    for of in ("resid_post", "attn", "ffn"):
        seen, own = (look.logit_lens(m, ids, of=of, words=[3], keep_logits=True) for m in (f, ours))
        assert seen.rows == own.rows and seen.logits is not None and own.logits is not None
        torch.testing.assert_close(seen.logits, own.logits, **near)
        torch.testing.assert_close(seen.probability(3), own.probability(3), **near)
    with pytest.raises(SiteError, match="'blocks...resid_mid' cannot be reached in this"):
        look.logit_lens(f, ids, of="resid_mid")


def test_roles_of_heads_from_outside_are_those_of_ours(both: tuple[str, Any, Any]) -> None:
    name, theirs, ours = both
    outside, inside = (look.head_roles(m, TOKENS[0].tolist(), repeats=2, length=8) for m in (foreign(theirs), ours))
    assert outside.repeats.shape == inside.repeats.shape and not outside.texts.isnan().all() and not outside.repeats.isnan().all(), name
    torch.testing.assert_close(outside.texts, inside.texts, atol=1e-4, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(outside.repeats, inside.repeats, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_what_sublayers_give_sums_to_the_stream() -> None:
    """OPT hands all rows to its feed-forward as one; Falcon adds attention into what its feed-forward has given; Olmo 2 norms what is added."""
    more = {"num_key_value_heads": 2}
    for theirs in (
        transformers.OPTForCausalLM(
            transformers.OPTConfig(vocab_size=V, num_hidden_layers=2, hidden_size=32, num_attention_heads=4, ffn_dim=44, word_embed_proj_dim=32)
        ),
        transformers.FalconForCausalLM(transformers.FalconConfig(vocab_size=V, num_hidden_layers=2, hidden_size=32, num_attention_heads=4)),
        transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SMALL, **more)),
    ):
        f = foreign(theirs.eval())
        tap, _ = record(f, "blocks.*.resid_pre", "blocks.*.resid_post", "blocks.*.attn.out", "blocks.*.ffn.*")
        assert tap["blocks.0.ffn.post"].shape[:2] == TOKENS.shape
        for i in range(2):
            given = [tap[f"blocks.{i}.{part}.out"] for part in ("attn", "ffn")]
            with torch.no_grad():
                given = [g if (norm := f.norm_behind(i, part)) is None else norm(g) for g, part in zip(given, ("attn", "ffn"), strict=True)]
            torch.testing.assert_close(tap[f"blocks.{i}.resid_pre"] + given[0] + given[1], tap[f"blocks.{i}.resid_post"], atol=1e-5, rtol=1e-4)


def test_what_would_be_misread_is_not_offered() -> None:
    with pytest.raises(InputError, match="AlbertForMaskedLM has 2 layers made of 1 blocks that are run again and again"):
        foreign(transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SMALL, embedding_size=16)))
    cut = foreign(transformers.GPTBigCodeForCausalLM(transformers.GPTBigCodeConfig(vocab_size=V, n_layer=1, n_embd=32, n_head=4)).eval())
    assert "blocks.0.attn.q" not in cut.places and "blocks.0.attn.z" in cut.places
    bare = foreign(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)).eval())
    assert bare.causal and not foreign(transformers.BertModel(transformers.BertConfig(**SMALL))).causal
    assert bare(TOKENS).shape == (1, 6, 32)
    classes = foreign(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)).eval())
    assert classes(TOKENS).shape == (1, 6, 32)
    with pytest.raises(InputError, match="no read-out over tokens is found in this BertForSequenceClassification from outside: load it with one"):
        look.candidates(classes, TOKENS[0])
    for given, message in (
        ({"tokens": [1, 2]}, "What is read is a list, but a model reads tokens"),
        ({"tokens": TOKENS[0]}, r"What is read has shape \(6,\), but a model reads tokens"),
        ({}, "Neither tokens nor inputs_embeds"),
        ({"tokens": TOKENS, "inputs_embeds": torch.zeros(1, 6, 32)}, "Both tokens and inputs_embeds"),
    ):
        with pytest.raises(InputError, match=message):
            bare(**given)  # type: ignore[arg-type]

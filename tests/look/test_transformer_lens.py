"""TransformerLens' names: the calls of its main demo, with one import changed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import GlassformerError, InputError, SiteError
from glassformer.look.transformer_lens import ActivationCache, FactoredMatrix, HookedTransformer, HookPoint, patching, utils
from look import zoo

NAMES = [n for n in zoo.SPECS if n != "t5"]


def tokens(t: int = 9, b: int = 2) -> torch.Tensor:
    return torch.tensor([zoo.ids(t, seed) for seed in range(b)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of GPT-2's kind with a tokenizer of words, as a folder."""
    tokenizer = zoo.words()
    model = zoo.model("gpt2")
    spec = model.spec.replace(vocab_size=len(tokenizer))
    where = tmp_path_factory.mktemp("models") / "m"
    gf.save(spec.build(seed=0), where, tokenizer=tokenizer)
    return where


@pytest.fixture
def hooked(folder: Path) -> HookedTransformer:
    return HookedTransformer.from_pretrained(str(folder))


# The main demo


def test_the_main_demo(hooked: HookedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    model = hooked
    assert utils.get_device().type in ("cpu", "cuda", "mps")

    # Loss, and a cache without the batch axis
    text = "the old man saw a red fox and the dog ran home"
    loss = model(text, return_type="loss")
    logits, both = model(text, return_type="both")
    assert loss.ndim == 0 and torch.allclose(loss, both)
    ids = model.to_tokens(text)
    gpt2_logits, gpt2_cache = model.run_with_cache(ids, remove_batch_dim=True)
    attention = gpt2_cache["pattern", 0, "attn"]
    assert attention.shape == (4, ids.shape[1], ids.shape[1]) and len(model.to_str_tokens(text)) == ids.shape[1]
    assert torch.allclose(gpt2_logits, logits)

    # A head is ablated
    def head_ablation_hook(value: Any, hook: HookPoint) -> Any:
        assert value.shape[2] == 4 and hook.name == "blocks.0.attn.hook_v" and hook.layer() == 0
        value[:, :, 3, :] = 0.0
        return value

    ablated = model.run_with_hooks(ids, return_type="loss", fwd_hooks=[(utils.get_act_name("v", 0), head_ablation_hook)])
    by_edit = model.model(ids, tap=gf.Edit("blocks.0.attn.v[3]", lambda v: 0 * v))
    assert torch.allclose(ablated, utils.lm_cross_entropy_loss(by_edit, ids)) and not torch.allclose(ablated, loss)

    # Activation patching by layer and position
    clean, corrupted = model.to_tokens("when Mary saw John the"), model.to_tokens("when Tom saw John the")
    right, wrong = model.to_single_token(" Mary"), model.to_single_token(" John")

    def logits_to_logit_diff(logits: Any) -> Any:
        return logits[0, -1, right] - logits[0, -1, wrong]

    _, clean_cache = model.run_with_cache(clean)

    def residual_stream_patching_hook(resid_pre: Any, hook: HookPoint, position: int) -> Any:
        resid_pre[:, position, :] = clean_cache[hook.name][:, position, :]
        return resid_pre

    by_hand = torch.zeros(model.cfg.n_layers, clean.shape[1])
    for layer in range(model.cfg.n_layers):
        for position in range(clean.shape[1]):
            hook_fn = partial(residual_stream_patching_hook, position=position)
            patched = model.run_with_hooks(corrupted, fwd_hooks=[(utils.get_act_name("resid_pre", layer), hook_fn)])
            by_hand[layer, position] = logits_to_logit_diff(patched).item()
    assert torch.allclose(patching.get_act_patch_resid_pre(model, corrupted, clean_cache, logits_to_logit_diff), by_hand, atol=1e-5)
    changed = (clean != corrupted)[0].nonzero()[0].item()
    assert torch.allclose(by_hand[0, changed], logits_to_logit_diff(model(clean)), atol=1e-5)

    # Induction heads, by a hook on every pattern
    repeated = torch.randint(1, 20, (2, 8)).repeat(1, 2)
    scores = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def induction_score_hook(pattern: Any, hook: HookPoint) -> None:
        stripe = pattern.diagonal(dim1=-2, dim2=-1, offset=1 - 8)
        scores[hook.layer(), :] = stripe.mean(dim=(0, -1))

    model.run_with_hooks(repeated, return_type=None, fwd_hooks=[(lambda name: name.endswith("pattern"), induction_score_hook)])
    tap = gf.Record("blocks.*.attn.pattern")
    model.model(repeated, tap=tap)
    assert torch.allclose(scores, tap.stack("blocks.*.attn.pattern").diagonal(dim1=-2, dim2=-1, offset=-7).mean((1, -1)), atol=1e-6)

    # Factored matrices
    full = model.embed.W_E @ model.OV @ model.unembed.W_U
    assert isinstance(full, FactoredMatrix) and full.shape == (3, 4, model.cfg.d_vocab, model.cfg.d_vocab)
    copying = full.eigenvalues.sum(-1).real / full.eigenvalues.abs().sum(-1)
    assert copying.shape == (3, 4) and copying.abs().max() <= 1

    # Generation, prompts, tokens
    assert model.generate("the old man", max_new_tokens=3, temperature=0.7, stop_at_eos=False, verbose=False).startswith("the old man")
    utils.test_prompt("the old man saw a red", "fox", model)
    assert "Rank" in capsys.readouterr().out


def test_logit_attribution_sums_to_the_logit(hooked: HookedTransformer) -> None:
    ids = tokens(6) % hooked.cfg.d_vocab
    for model in (hooked, HookedTransformer(zoo.model("gpt2")), HookedTransformer(zoo.model("llama")), HookedTransformer(zoo.model("parallel"))):
        logits, cache = model.run_with_cache(ids)
        right, wrong = torch.tensor([3, 4]), torch.tensor([5, 6])
        parts, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
        made = cache.logit_attrs(parts, right, wrong, pos_slice=-1)
        rows = torch.arange(2)
        bias = model.ln_final.b @ model.W_U if not isinstance(model.ln_final.b, float) else 0 * model.b_U
        bias = bias + model.b_U
        whole = logits[rows, -1, right] - logits[rows, -1, wrong]
        assert made.shape == (len(labels), 2) and torch.allclose(made.sum(0) + bias[right] - bias[wrong], whole, atol=1e-4)


# Names


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_kept_and_can_be_changed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.SPECS, name, zoo.SPECS[name].replace(blocks=zoo.SPECS[name].blocks[:2]))  # a first and a last layer: every name is a run
    model = HookedTransformer(zoo.model(name))
    model.set_use_attn_result(True)
    x = tokens(5)
    plain, cache = model.run_with_cache(x)
    assert set(cache.keys()) == set(model.hook_dict) and torch.equal(plain, model.model(x))
    for full in model.hook_dict:
        seen: list[torch.Tensor] = []

        def change(value: Any, hook: HookPoint, seen: list[torch.Tensor] = seen, full: str = full) -> Any:
            assert hook.name == full
            seen.append(value.clone())
            return value * (torch.linspace(0.5, 1.5, value.shape[-1]) if value.shape[-1] > 1 else 0.7)

        changed = model.run_with_hooks(x, fwd_hooks=[(full, change)])
        assert seen[0].shape == cache[full].shape and torch.allclose(seen[0], cache[full], atol=1e-5), full
        assert not torch.allclose(changed, plain, atol=1e-6), full
    assert torch.equal(model(x), plain)


def test_names_meet_our_sites() -> None:
    model = HookedTransformer(zoo.model("llama"))
    x = tokens()
    _, cache = model.run_with_cache(x)
    tap = gf.Record("**")
    model.model(x, tap=tap)
    for theirs, ours in {
        "hook_embed": "embed",
        "blocks.1.hook_resid_mid": "blocks.1.resid_mid",
        "blocks.1.attn.hook_k": "blocks.1.attn.k",
        "blocks.1.attn.hook_rot_q": "blocks.1.attn.q_rot",
        "blocks.1.attn.hook_attn_scores": "blocks.1.attn.scores",
        "blocks.2.mlp.hook_pre": "blocks.2.ffn.gate",
        "blocks.2.mlp.hook_pre_linear": "blocks.2.ffn.pre",
        "blocks.2.hook_mlp_out": "blocks.2.ffn.out",
        "blocks.0.ln2.hook_scale": "blocks.0.norm2.scale",
        "ln_final.hook_normalized": "resid_final",
    }.items():
        assert torch.equal(cache[theirs], tap[ours])
    assert cache["pattern", -1] is cache["blocks.2.attn.hook_pattern"] and cache["k1"] is cache["k", 1] and ("z", 0) in cache
    assert "blocks.0.mlp.hook_pre" not in HookedTransformer(zoo.model("experts")).hook_dict


@pytest.mark.parametrize(
    ("given", "full"),
    [
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("embed",), "hook_embed"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("attn", 3), "blocks.3.attn.hook_pattern"),
        (("scale",), "ln_final.hook_scale"),
        (("blocks.1.hook_resid_pre",), "blocks.1.hook_resid_pre"),
    ],
)
def test_act_names(given: tuple[Any, ...], full: str) -> None:
    assert utils.get_act_name(*given) == full


# Hooks


def test_hooks_that_write_in_place_corrupt_nothing() -> None:
    model = HookedTransformer(zoo.model("gpt2"))
    x = tokens()
    plain, before = model.run_with_cache(x)

    def in_place(value: Any, hook: HookPoint) -> None:
        value[:, 2] = 0

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_q", in_place)]):
        changed, after = model.run_with_cache(x)
    assert not torch.allclose(changed, plain) and not after["q", 1][:, 2].any()
    assert torch.equal(after["k", 1], before["k", 1]) and before["q", 1][:, 2].any()  # queries and keys come out of one projection
    assert torch.equal(changed, model.model(x, tap=gf.Edit("blocks.1.attn.q", lambda q: torch.cat([q[:, :2], 0 * q[:, 2:3], q[:, 3:]], 1))))
    assert torch.equal(model(x), plain)


def test_hooks_are_the_wrappers_own() -> None:
    own = zoo.model("gpt2")
    one, other = HookedTransformer(own), HookedTransformer(own)
    x = tokens()
    plain = one(x)
    one.add_hook("blocks.0.hook_mlp_out", lambda v, hook: 0 * v)
    one.add_perma_hook("blocks.1.hook_mlp_out", lambda v, hook: 0 * v)
    assert not torch.allclose(one(x), plain) and torch.equal(other(x), plain) and torch.equal(own(x), plain)
    one.reset_hooks()
    assert torch.allclose(one(x), own(x, tap=gf.Edit("blocks.1.ffn.out", lambda v: 0 * v)))
    one.reset_hooks(including_permanent=True)
    assert torch.equal(one(x), plain)
    one.blocks[0].attn.hook_z.add_hook(lambda z, hook: 0 * z)
    assert not torch.allclose(one(x), plain)
    assert one.hook_dict["blocks.0.attn.hook_z"].layer() == 0 and len(one.hook_points()) == len(one.hook_dict)


def test_gradients() -> None:
    model = HookedTransformer(zoo.model("gpt2"))
    x, seen = tokens(), {}
    loss = model.run_with_hooks(x, return_type="loss", bwd_hooks=[("blocks.1.attn.hook_pattern", lambda g, hook: seen.update({hook.name: g}))])
    loss.backward()
    tap = gf.Record("blocks.1.attn.pattern", "blocks.1.attn.z", grad=True)
    utils.lm_cross_entropy_loss(model.model(x, tap=tap), x).backward()
    assert torch.allclose(seen["blocks.1.attn.hook_pattern"], tap.grad("blocks.1.attn.pattern"), atol=1e-6)
    _, cache = model.run_with_cache(x, return_type="loss", incl_bwd=True)
    assert torch.allclose(cache["blocks.1.attn.hook_z_grad"], tap.grad("blocks.1.attn.z"), atol=1e-6)
    with pytest.raises(InputError, match="return_type='loss'"):
        model.run_with_cache(x, incl_bwd=True)


def test_hooks_hold_while_generating(hooked: HookedTransformer) -> None:
    calls: list[int] = []
    hooked.add_hook("blocks.0.attn.hook_z", lambda z, hook: calls.append(z.shape[1]))
    hooked.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, stop_at_eos=False)
    assert calls[0] == 3 and calls[1:] == [1, 1]


# Runs


def test_stopping_starting_and_filters() -> None:
    model = HookedTransformer(zoo.model("gpt2"))
    x = tokens()
    logits, cache = model.run_with_cache(x)
    assert torch.equal(model(x, stop_at_layer=1), cache["resid_pre", 1]) and torch.equal(model(x, stop_at_layer=-1), cache["resid_pre", 2])
    assert torch.equal(model(x, stop_at_layer=3), cache["resid_post", 2]) and model(x, return_type=None) is None
    assert torch.equal(model(cache["resid_pre", 1], start_at_layer=1), logits)
    _, some = model.run_with_cache(x, names_filter=["blocks.0.attn.hook_pattern", "hook_embed"])
    assert list(some.keys()) == ["hook_embed", "blocks.0.attn.hook_pattern"]
    _, part = model.run_with_cache(x, stop_at_layer=1, names_filter=lambda n: "resid_post" in n)
    assert list(part) == ["blocks.0.hook_resid_post"]
    assert model(x, return_type="loss", loss_per_token=True).shape == (2, 8) and cache["hook_pos_embed"].shape == (2, 9, 16)
    assert isinstance(cache.apply_slice_to_batch_dim(0), ActivationCache) and cache.apply_slice_to_batch_dim(0)["embed"].ndim == 2


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bert"])
def test_the_parts_of_the_stream_add_up(name: str) -> None:
    model = HookedTransformer(zoo.model(name).double())
    _, cache = model.run_with_cache(tokens())
    n = model.cfg.n_layers
    final = cache["resid_post", -1]
    assert torch.allclose(cache.decompose_resid().sum(0), final) and torch.allclose(cache.decompose_resid(1).sum(0), cache["resid_pre", 1])
    assert torch.allclose(cache.accumulated_resid()[-1], final)
    heads, labels = cache.stack_head_results(incl_remainder=True, return_labels=True)
    assert torch.allclose(heads.sum(0), final) and labels == [*model.all_head_labels(), "remainder"]
    cache.compute_head_results()
    assert torch.allclose(cache.stack_head_results(), heads[:-1]) and cache.stack_activation("z").shape[0] == n
    if name not in ("experts", "sandwich", "reordered"):
        assert torch.allclose(cache.get_full_resid_decomposition().sum(0), final)
        normed = cache.get_full_resid_decomposition(expand_neurons=False, apply_ln=True, pos_slice=-1)
        assert torch.allclose(normed.sum(0), cache.apply_ln_to_stack(final[None])[0][:, -1])


def test_sweeps_equal_whole_runs() -> None:
    model = HookedTransformer(zoo.model("llama"))
    clean, corrupted = tokens(5, 1), (tokens(5, 1) + 3) % zoo.V
    _, cache = model.run_with_cache(clean)

    def metric(logits: Any) -> Any:
        return logits[0, -1, 3]

    found = patching.get_act_patch_attn_head_out_all_pos(model, corrupted, cache, metric)
    for layer, head in ((0, 1), (2, 3)):
        kept = cache["z", layer]
        whole = model.model(corrupted, tap=gf.Edit(f"blocks.{layer}.attn.z[{head}]", lambda z, c=kept, h=head: c[:, :, h : h + 1]))
        assert found[layer, head].item() == pytest.approx(metric(whole).item(), abs=1e-5)
    other = HookedTransformer(zoo.model("gpt2"))
    assert patching.get_act_patch_attn_head_all_pos_every(other, corrupted, other.run_with_cache(clean)[1], metric).shape == (5, 3, 4)
    assert patching.get_act_patch_block_every(model, corrupted, cache, metric).shape == (3, 3, 5)
    with pytest.raises(InputError, match="begins with 'layer'"):
        patching.generic_activation_patch(model, corrupted, cache, metric, patching.layer_pos_patch_setter, "z", ["pos"])


# Tokens, sizes, matrices


def test_tokens(hooked: HookedTransformer) -> None:
    text = "the old man"
    own = hooked.gf_tokenizer
    assert hooked.to_tokens(text, prepend_bos=False)[0].tolist() == own.encode(text)
    assert hooked.to_string(hooked.to_tokens(text, prepend_bos=False)[0]).strip() == text
    assert hooked.to_tokens([text, "the old"], prepend_bos=False).shape == (2, 3)
    assert [len(r) for r in hooked.to_str_tokens([text, "the old"], prepend_bos=False)] == [3, 2]
    man = hooked.to_single_token(" man")
    assert hooked.to_single_str_token(man).strip() == "man" and hooked.get_token_position(" man", text, prepend_bos=False) == 2
    with pytest.raises(InputError, match="is 2 tokens"):
        hooked.to_single_token(" old man")
    with pytest.raises(InputError, match="does not stand among"):
        hooked.get_token_position(" Rome", text, prepend_bos=False)
    with pytest.raises(InputError, match="needs a tokenizer"):
        HookedTransformer(zoo.model("gpt2"))("the old man")
    assert hooked.tokenizer.eos_token_id == own.eos_id and len(hooked.tokenizer) == len(own)


def test_sizes_and_matrices(folder: Path) -> None:
    model = HookedTransformer.from_pretrained_no_processing(str(folder))
    cfg = model.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head, cfg.d_mlp, cfg.n_ctx, cfg.act_fn) == (3, 4, 16, 4, 24, 64, "gelu_tanh")
    assert cfg.normalization_type == "LN" and cfg.positional_embedding_type == "standard" and not cfg.gated_mlp and cfg.processed == ()
    assert model.W_Q.shape == (3, 4, 16, 4) and model.W_O.shape == (3, 4, 4, 16) and model.W_in.shape == (3, 16, 24) and model.W_pos.shape == (64, 16)
    assert torch.equal(model.blocks[1].attn.W_Q, model.W_Q[1]) and torch.equal(model.blocks[1].mlp.W_out, model.W_out[1]) and model.W_gate is None
    assert torch.allclose(model.QK.AB[1, 2], model.W_Q[1, 2] @ model.W_K[1, 2].T) and model.W_E_pos.shape == (cfg.d_vocab + 64, 16)
    assert model.all_composition_scores("V").shape == (3, 4, 3, 4)
    folded = HookedTransformer.from_pretrained(str(folder))
    assert set(folded.cfg.processed) == {"fold_norms", "centre_writing", "centre_readout", "fold_value_bias"}
    x = tokens() % cfg.d_vocab
    assert torch.allclose(folded(x).log_softmax(-1), model(x).log_softmax(-1), atol=1e-5)
    assert HookedTransformer(zoo.model("llama")).cfg.n_key_value_heads == 2 and HookedTransformer(zoo.model("llama")).cfg.gated_mlp


def test_small_functions() -> None:
    assert utils.to_numpy(torch.ones(2, dtype=torch.bfloat16)).tolist() == [1, 1] and utils.is_lower_triangular(torch.eye(3))
    x = torch.arange(6).view(2, 3)
    assert (
        utils.Slice(1).apply(x, 1).tolist() == [1, 4] and utils.Slice((0, 2)).apply(x, 1).shape == (2, 2) and utils.Slice([0, 2]).apply(x, -1).shape == (2, 2)
    )
    assert utils.get_corner(x, 1).tolist() == [[0]] and utils.remove_batch_dim(x[None]).shape == (2, 3)
    assert utils.lm_accuracy(torch.eye(3)[None], torch.tensor([[0, 0, 1]])) == 1.0


# Mistakes


def test_what_is_refused() -> None:
    model = HookedTransformer(zoo.model("gpt2"))
    x = tokens()
    with pytest.raises(SiteError, match=r"'blocks.0.attn.hook_patern' is no hook.*hook_pattern"):
        model.run_with_hooks(x, fwd_hooks=[("blocks.0.attn.hook_patern", lambda v, hook: v)])
    with pytest.raises(SiteError, match="meets none of this model's"):
        model.add_hook(lambda n: False, lambda v, hook: v)
    with pytest.raises(SiteError, match="keep the shape"):
        model.run_with_hooks(x, fwd_hooks=[("hook_embed", lambda v, hook: v[:, :1])])
    with pytest.raises(SiteError, match="returned a number"):
        model.run_with_hooks(x, fwd_hooks=[("hook_embed", lambda v, hook: 0.0)])
    with pytest.raises(SiteError, match="was not asked for"):
        _ = model.run_with_cache(x, names_filter="hook_embed")[1]["pattern", 1]
    with pytest.raises(InputError, match="return_type='logit'"):
        model(x, return_type="logit")
    with pytest.raises(InputError, match="from_pretrained.. takes no checkpoint_index=3 here"):
        HookedTransformer.from_pretrained("m", checkpoint_index=3)
    with pytest.raises(InputError, match="generate.. takes no num_beams=2"):
        model.generate(x, num_beams=2)
    with pytest.raises(InputError, match="forward.. takes no past_kv_cache="):
        model(x, past_kv_cache=object())
    with pytest.raises(InputError, match="return_index_df is not made here"):
        patching.get_act_patch_resid_pre(model, x, {}, lambda logits: 0.0, return_index_df=True)
    with pytest.raises(InputError, match="stop_at_layer=9"):
        model(x, stop_at_layer=9)
    with pytest.raises(InputError, match="size 2"):
        model.run_with_cache(x, remove_batch_dim=True)
    with pytest.raises(InputError, match="a decoder or an encoder"):
        HookedTransformer(zoo.model("t5"))
    with pytest.raises(InputError, match="stream is no sum"):
        HookedTransformer(zoo.model("bert")).run_with_cache(x)[1].decompose_resid()
    _, cache = model.run_with_cache(x)
    for call, said in (
        (lambda: model({"a": 1}), "but a dict was given"),
        (lambda: model(x, stop_at_layer=1.5), "stop_at_layer=1.5: a layer is a whole number"),
        (lambda: model([1], start_at_layer=1), "the input is the stream"),
        (lambda: model.to_str_tokens({"a": 1}), "Token ids are a tensor"),
        (lambda: cache[5], r"such as \('pattern', 5\), but 5 was given"),
        (lambda: cache[3, "pattern"], "An activation is named by a text"),
        (lambda: cache.decompose_resid(mode="x"), "'x' is no mode of decompose_resid"),
        (lambda: cache.accumulated_resid("x"), "Layer 'x' was asked for"),
        (lambda: cache.decompose_resid(pos_slice=99), "99 was asked for of an axis of size 9"),
        (lambda: cache.logit_attrs(cache.decompose_resid(), 9999), r"from 0 to 30, but \[9999\]"),
        (lambda: model.run_with_cache(x, names_filter=3), "Hooks are chosen by a name"),
        (lambda: model.run_with_hooks(x, fwd_hooks=["hook_embed"]), "Hooks are pairs"),
        (lambda: model.run_with_hooks(x, fwd_hooks=[("hook_embed", None)]), "A hook is a function"),
        (lambda: model.run_with_hooks(x, fwd_hooks=[("hook_embed", lambda v, hook: v.double())]), "returned torch.float64"),
        (lambda: model.all_composition_scores(None), "mode=None is none of"),
        (lambda: model.to("zz"), "no device 'zz'"),
        (lambda: patching.get_act_patch_resid_pre(model, x, {}, lambda logits: 0.0), "clean cache holds no 'blocks.0.hook_resid_pre'"),
        (lambda: patching.get_act_patch_resid_pre(model, x[:, :3], cache, lambda logits: 0.0), "use texts of equal length"),
        (lambda: patching.get_act_patch_resid_pre(model, x, cache, lambda logits: logits), "one number for each run"),
    ):
        with pytest.raises(GlassformerError, match=said):
            call()
    tokenized = HookedTransformer(zoo.model("gpt2"), zoo.words())
    with pytest.raises(InputError, match="to_tokens reads a text or a list of texts, but a whole number was given"):
        tokenized.to_tokens(3)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="no layer"):
        model.hook_dict["hook_embed"].layer()
    with pytest.raises(AttributeError, match="W_X"):
        _ = model.W_X

"""Opening and loading: what is said of a checkpoint, the types it is loaded in, our own format among the others."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import glassformer as gf
from glassformer import weights
from glassformer.core.errors import TokenizerError, WeightsError
from glassformer.models.presets import llama
from glassformer.parts.rotary import Rotary

SPEC = llama(61, 32, 2, 4, 2, 44, Rotary())


@pytest.fixture
def folder(tmp_path):
    weights.export_hf(SPEC.build(seed=0), tmp_path / "m", config={"model_type": "llama", "max_position_embeddings": 99, "eos_token_id": 7})
    return tmp_path / "m"


def change(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_an_opened_folder_says_what_it_is(folder):
    opened = weights.open(folder)
    assert opened.kind == "hf" and opened.family.name == "Llama" and opened.path == folder
    assert len(opened.tensors) == 21 and repr(opened) == f"{folder}: Llama, Hugging Face folder, 21 tensors (0.1 MB F32), unread"
    assert opened.tensors["model.embed_tokens.weight"].shape == (61, 32)
    assert opened.config["max_position_embeddings"] == 99  # what changes nothing travels along
    assert opened.tokenizer is None and opened.generation == {}
    qkv = next(f for f in opened.plan.fillings if f.path == "blocks.1.attn.qkv.weight")
    assert [s.name for s in qkv.stored] == [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"]


def test_the_report_names_every_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, folder / "model.safetensors")
    model, report = weights.open(folder).load()
    assert {n for names in report.used.values() for n in names} == set(tensors)
    assert report.used.keys() == dict(model.named_parameters()).keys()
    assert report.left == {"model.layers.0.self_attn.rotary_emb.inv_freq": "holds nothing learnt"} and report.tied == {}
    text = str(report)
    assert f"{len(tensors)} tensors fill {len(report.used)} parameters" in text and "missing: none" in text
    assert "left over, holds nothing learnt: model.layers.0.self_attn.rotary_emb.inv_freq" in text
    assert report.bytes == 4 * model.params().total and report.dtype == "float32" and not model.training


@pytest.mark.parametrize(
    ("stored", "asked", "made"), [("bf16", None, "bfloat16"), ("fp16", None, "float32"), ("fp16", "fp16", "float16"), ("fp32", "bf16", "bfloat16")]
)
def test_types(tmp_path, stored, asked, made):
    model = SPEC.build(seed=0, dtype=stored)
    weights.export_hf(model, tmp_path)
    again, report = weights.open(tmp_path).load(dtype=asked)
    assert report.dtype == made
    for x, y in zip(model.parameters(), again.parameters(), strict=True):
        assert y.dtype == getattr(torch, made) and torch.equal(x.to(y.dtype), y)


def test_a_type_that_does_not_exist_is_named(folder):
    with pytest.raises(gf.SpecError, match="No data type is named 'int3'"):
        weights.open(folder).load(dtype="int3")


def test_one_matrix_by_the_config_but_two_in_the_file(tmp_path):
    weights.export_hf(SPEC.build(seed=0), tmp_path)
    change(tmp_path, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match="'lm_head.weight' and 'model.embed_tokens.weight' are one matrix by the config .* two different ones"):
        weights.open(tmp_path).load()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors")
    model, report = weights.open(tmp_path).load()
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"} and model.spec.tied
    assert "repeats another: lm_head.weight = model.embed_tokens.weight" in str(report)


def test_a_field_that_is_not_understood_is_an_error_unless_it_is_known_to_be_harmless(folder):
    change(folder, residual_multiplier=0.22)
    with pytest.raises(WeightsError, match=r"residual_multiplier is 0.22.*not understood.*ignore=\['residual_multiplier'\]"):
        weights.open(folder)
    assert weights.open(folder, ignore=["residual_multiplier"]).spec == weights.open(folder, ignore=["residual_multiplier", "x"]).spec


def test_load_opens_everything(folder, tmp_path):
    loaded = gf.load(folder)
    assert loaded.extra["config"]["eos_token_id"] == 7 and loaded.eos_ids == (7,) and loaded.report.family == "Llama"
    gf.save(loaded.model, tmp_path / "own", extra=loaded.extra)
    own = gf.load(tmp_path / "own")
    assert own.extra == loaded.extra and own.report is None and own.model.spec == loaded.model.spec
    opened = weights.open(tmp_path / "own")
    model, report = opened.load(dtype="bf16")
    assert (
        opened.kind == "own"
        and model.spec == loaded.model.spec
        and report.dtype == "bfloat16"
        and repr(opened) == f"{tmp_path / 'own'}: glassformer's own format"
    )
    weights.export_hf(own.model, tmp_path / "back", config=own.extra["config"])
    back = gf.load(tmp_path / "back")
    assert back.eos_ids == (7,)
    for x, y in zip(loaded.model.parameters(), back.model.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_conversation_needs_a_tokenizer(folder):
    with pytest.raises(TokenizerError, match="no tokenizer, so a conversation means nothing"):
        gf.load(folder).chat([{"role": "user", "content": "Hello"}])


def test_several_tokens_may_end_a_text(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert gf.load(folder).eos_ids == (3, 4)


def test_an_opened_spec_may_be_changed_before_it_is_loaded(folder):
    opened = weights.open(folder)
    opened.spec = opened.spec.at("blocks.*.attention.position").set(gf.NoPosition())
    model, _ = opened.load()
    plain = gf.load(folder).model
    ids = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert not torch.allclose(model(ids), plain(ids), atol=1e-6) and model.spec == opened.spec


@pytest.mark.parametrize("write", [lambda m, at: gf.save(m, at), lambda m, at: weights.export_hf(m, at), lambda m, at: weights.export_gguf(m, at / "m.gguf")])
def test_what_is_held_in_few_bits_is_not_written_and_says_so(tmp_path, write):
    pytest.importorskip("torchao")
    weights.export_gguf(SPEC.build(seed=0), tmp_path / "m.gguf", type="Q8_0")
    packed, _ = weights.open(tmp_path / "m.gguf").load(packed=True)
    with pytest.raises(WeightsError, match="packed matrices.*load it without packed=True"):
        write(packed, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"quantised by torchao.*save the model before quantise\(\)"):
        write(weights.quantise(SPEC.build(seed=0), "int8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What travels along


def test_what_a_checkpoint_says_stays_with_its_model(tmp_path):
    config = {"model_type": "llama", "max_position_embeddings": 99, "eos_token_id": 7}
    weights.export_hf(SPEC.build(seed=0), tmp_path / "a", config=config, generation={"eos_token_id": [7, 9], "temperature": 0.3})
    loaded = gf.load(tmp_path / "a")
    weights.export_hf(loaded.model, tmp_path / "b")  # nothing is handed on, nothing is lost
    gf.save(loaded.model, tmp_path / "own")
    weights.export_hf(gf.load(tmp_path / "own").model, tmp_path / "c")
    for name in ("b", "c"):
        again = gf.load(tmp_path / name)
        assert again.eos_ids == (7, 9) and again.extra["config"]["max_position_embeddings"] == 99 and again.extra["generation"]["temperature"] == 0.3
    assert gf.load(tmp_path / "own").eos_ids == (7, 9)


def bpe():
    return gf.text.train("bpe", texts=["the cat sat on the mat "] * 50, vocab_size=270)


def test_a_gguf_file_names_the_tokens_that_end_a_text_and_a_turn(tmp_path):
    tokenizer = bpe()
    model = llama(tokenizer.vocab_size, 32, 2, 4, 2, 44, Rotary()).build(seed=0)
    model.origin = {"config": {"eos_token_id": 3, "bos_token_id": 4, "max_position_embeddings": 77}, "generation": {"eos_token_id": [5, 6]}}
    weights.export_gguf(model, tmp_path / "m.gguf", type="f32", tokenizer=tokenizer)
    loaded = gf.load(tmp_path / "m.gguf")
    assert loaded.eos_ids == (5, 6) and loaded.extra["config"]["bos_token_id"] == 4 and loaded.extra["config"]["max_position_embeddings"] == 77
    weights.export_hf(loaded.model, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [5, 6]


def test_special_tokens_that_nobody_names_are_the_tokenizer_s_or_none(tmp_path):
    weights.export_hf(SPEC.build(seed=0), tmp_path / "none")
    assert json.loads((tmp_path / "none" / "config.json").read_text())["eos_token_id"] is None  # a missing field would be another model's default
    tokenizer = gf.Tokenizer(bpe().library, roles={"eos": "t"})
    weights.export_hf(llama(tokenizer.vocab_size, 32, 1, 4, 2, 44, Rotary()).build(seed=0), tmp_path / "some", tokenizer=tokenizer)
    assert json.loads((tmp_path / "some" / "config.json").read_text())["eos_token_id"] == tokenizer.encode("t")[0]


def test_nothing_of_an_earlier_model_is_left_beside_the_new_one(tmp_path):
    tokenizer = gf.Tokenizer(bpe().library, chat_template="x")
    weights.export_hf(llama(300, 32, 1, 4, 2, 44, Rotary()).build(seed=0), tmp_path, tokenizer=tokenizer, generation={"top_k": 3})
    assert (tmp_path / "chat_template.jinja").exists()
    weights.export_hf(SPEC.build(seed=0), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("ids", ["x", [2, "a"], -1, 1.5, True])
def test_ends_that_are_no_ids_are_named(folder, ids):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    loaded = gf.load(folder)
    with pytest.raises(WeightsError, match="settings say eos_token_id=.*ids are whole numbers"):
        _ = loaded.eos_ids


def test_numbers_that_float16_cannot_hold_are_an_error_and_not_infinite(tmp_path):
    model = SPEC.build(seed=0)
    with torch.no_grad():
        model.embed.weight[3, 3] = 1e6
    weights.export_hf(model, tmp_path / "m")
    with pytest.raises(WeightsError, match="embed.weight holds numbers that float16 cannot.*bfloat16 or float32"):
        weights.open(tmp_path / "m").load(dtype="fp16")
    for kind in ("F16", "Q8_0"):
        with pytest.raises(WeightsError, match=rf"holds 1e\+06, and {kind} ends at 65,504: write the file with type BF16 or F32"):
            weights.export_gguf(model, tmp_path / "m.gguf", type=kind)
    weights.export_gguf(model, tmp_path / "m.gguf", type="BF16")
    assert list(tmp_path.glob(".*")) == []


def test_a_model_without_numbers_is_not_written(tmp_path):
    with pytest.raises(WeightsError, match="meta device, where tensors have shapes but no numbers"):
        weights.export_hf(SPEC.build(device="meta"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_type_that_is_no_floating_one_is_refused(folder):
    with pytest.raises(WeightsError, match=r"floating type, but torch.int8 was asked for: quantise='int8'"):
        weights.open(folder).load(dtype=torch.int8)


def test_a_gguf_file_without_a_tokenizer_opens(tmp_path):
    weights.export_gguf(SPEC.build(seed=0), tmp_path / "m.gguf")
    assert gf.load(tmp_path / "m.gguf").tokenizer is None


def test_what_gguf_has_no_place_for_is_said(tmp_path):
    bert = gf.preset("bert-base")
    block = bert.blocks[0].at("attention.n_heads").set(2).at("feedforward.d_ff").set(16)
    small = bert.replace(vocab_size=50, d_model=8, blocks=(block,))
    with pytest.raises(WeightsError, match="GGUF has no place for the parameter 'readout.bias' of this BERT model|GGUF has no place for the parameter"):
        weights.export_gguf(small.build(seed=0), tmp_path / "m.gguf")


def test_one_whole_file_goes_before_an_index_of_others(folder):
    other = {k: torch.zeros_like(v) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "consolidated.safetensors")
    index = {"weight_map": dict.fromkeys(other, "consolidated.safetensors")}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    assert gf.load(folder).model.embed.weight.abs().sum() > 0


def test_our_own_folder_is_quantised_and_refuses_packed_whatever_lies_beside_it(folder, tmp_path):
    pytest.importorskip("torchao")
    gf.save(SPEC.build(seed=0), tmp_path / "own")
    (tmp_path / "own" / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert any(hasattr(x, "tensor_data_names") for x in gf.load(tmp_path / "own", quantise="int8").model.parameters())
    with pytest.raises(WeightsError, match="no quantised tensors that could stay packed"):
        gf.load(tmp_path / "own", packed=True)
    with pytest.raises(WeightsError, match="no quantised tensors that could stay packed"):
        weights.open(tmp_path / "own").load(packed=True)


def test_few_bits_do_not_learn(tmp_path):
    weights.export_gguf(SPEC.build(seed=0), tmp_path / "m.gguf", type="Q8_0")
    model, _ = weights.open(tmp_path / "m.gguf").load(packed=True)
    data = gf.TokenData.from_text("the cat sat on the mat " * 20, gf.text.train("characters", texts=["the cat sat on the mat "]))
    with pytest.raises(gf.TrainingError, match="held in few bits and cannot learn: load it without packed and quantise"):
        gf.Trainer(model, gf.NextToken(), data, steps=1, batch=1, context=8)


def test_a_name_of_the_hub_is_recognised():
    with pytest.raises(WeightsError, match=r"nothing at 'owner/name' \(is it meant to be hf://owner/name\?\)"):
        weights.open("owner/name")


def test_what_is_opened_can_be_printed(folder):
    opened, loaded = weights.open(folder), gf.load(folder)
    assert repr(opened.family) == "Family(Llama: llama)"
    assert "blocks.0.attn.out.weight = Same(model.layers.0.self_attn.o_proj.weight)" in repr(opened.plan)
    assert repr(loaded) == f"Loaded(Decoder of {loaded.model.params().total:,} parameters, no tokenizer, from {folder})"


@pytest.mark.parametrize("head", ["LlamaForSequenceClassification", "LlamaModel"])
def test_another_head_than_a_language_model_s_is_named(folder, head):
    change(folder, architectures=[head])
    with pytest.raises(WeightsError, match=f"{head} is not a language model: of decoders only"):
        weights.open(folder)


def test_what_a_gguf_file_has_no_word_for_is_said(tmp_path):
    norm = gf.RMSNorm(eps=1e-6, offset=1.0, cast="late")
    attention = gf.Attention(2, d_head=8, position=gf.Rotary(), cap=50.0, scale=8**-0.5)
    block = gf.Block(attention, gf.Gated(16, act="gelu_tanh"), norm=norm, wiring=gf.Sandwich())
    local = block.at("attention.mask").set(gf.Window(4))
    spec = gf.Decoder(61, 16, (local, block), final_norm=norm, tied=True, embedding=gf.Embedding(scale=gf.SqrtWidth()), readout=gf.LanguageModel(cap=30.0))
    weights.export_gguf(spec.build(seed=0), tmp_path / "m.gguf", type="F32")
    opened = weights.open(tmp_path / "m.gguf")
    assert opened.assumed and "assumed: " + opened.assumed[0] in str(opened.load()[1])
    weights.export_gguf(SPEC.build(seed=0), tmp_path / "llama.gguf", type="F32")
    assert weights.open(tmp_path / "llama.gguf").assumed == ()

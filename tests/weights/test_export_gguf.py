"""Giving back as GGUF: what the file holds, what is refused, and llama.cpp's own logits on the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from glassformer import weights
from glassformer.core.errors import WeightsError
from glassformer.models.presets import preset
from glassformer.text import train
from glassformer.weights.export_gguf import export_gguf
from glassformer.weights.quants import dequantise, quantise
from weights.ggufs import CONFIGS, V, made, written


def test_the_reference_reads_what_was_written(tmp_path: Path) -> None:
    model, file = written("llama", tmp_path, "F16")
    reader = gguf.GGUFReader(file)
    assert reader.get_field("general.architecture").contents() == "llama"
    assert reader.get_field("general.file_type").contents() == 1
    assert reader.get_field("llama.attention.head_count_kv").contents() == 2
    assert reader.get_field("llama.rope.dimension_count").contents() == 32
    found = {t.name: t for t in reader.tensors}
    assert found["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert found["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_array_equal(found["blk.2.ffn_down.weight"].data, model.blocks[2].ffn.down.weight.detach().half().numpy())


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_matrices_take_the_type_and_vectors_stay(type: str, tmp_path: Path) -> None:
    model, file = written("llama-odd", tmp_path, type)
    opened = weights.open(file)
    for name, stored in opened.tensors.items():
        small = "norm" in name or name.endswith(".bias") or name == "rope_freqs.weight"
        assert stored.type == ("F32" if small else type), name
    again, _ = opened.load(dtype=torch.float32)
    w = model.blocks[1].ffn.down.weight
    assert torch.equal(again.blocks[1].ffn.down.weight, dequantise(quantise(w, type), type))


def test_rows_that_blocks_do_not_fill_are_f16(tmp_path: Path) -> None:
    spec: Any = preset("llama3.2-1b", vocab_size=40)
    small = spec.replace(d_model=64, blocks=spec.blocks[:1]).at("blocks.*.feedforward.d_ff").set(40).at("blocks.*.attention.n_kv_heads").set(2)
    small = small.at("blocks.*.attention.n_heads").set(4)
    file = export_gguf(small.build(seed=0), tmp_path / "m.gguf", "Q8_0")
    found = weights.open(file).tensors
    assert found["blk.0.ffn_down.weight"].type == "F16"  # 40 columns
    assert found["blk.0.ffn_up.weight"].type == "Q8_0"


def test_settings_travel_along(tmp_path: Path) -> None:
    settings = {"general.name": "mine", "max_position_embeddings": 777, "temperature": 0.3}
    file = export_gguf(made("llama"), tmp_path / "m.gguf", settings=settings)
    metadata = weights.source.find(file).metadata
    assert metadata["general.name"] == "mine"
    assert metadata["llama.context_length"] == 777


def test_the_tokenizer_travels_along(tmp_path: Path) -> None:
    tokenizer = train("bpe", texts=["The car is red. The cat is not."] * 20, vocab_size=300)
    spec: Any = preset("gpt2", vocab_size=tokenizer.vocab_size)
    small = spec.replace(d_model=32, blocks=spec.blocks[:1]).at("blocks.*.attention.n_heads").set(2).at("blocks.*.feedforward.d_ff").set(64)
    file = export_gguf(small.build(seed=0), tmp_path / "m.gguf", tokenizer=tokenizer)
    again = weights.open(file).tokenizer
    assert again is not None
    assert again.encode("The car is not red.") == tokenizer.encode("The car is not red.")


def test_what_was_there_stays_if_the_export_fails(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"before")
    with pytest.raises(WeightsError, match="A GGUF file cannot say all of this model"):
        export_gguf(without_steps("smollm3"), file)
    assert file.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def without_steps(name: str) -> Any:
    """A model whose layers without positions are others than llama.cpp takes them to be."""
    from glassformer.weights.family import families

    return families()["smollm3"].read(CONFIGS[name] | {"no_rope_layers": [0, 1, 1, 1, 1]}).build(seed=0)


def test_errors_say_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="A GGUF file is written in F32, F16, BF16, Q8_0, Q4_0, but 'Q8' was asked for.*Did you mean 'Q8_0'"):
        export_gguf(made("llama"), tmp_path / "m.gguf", "Q8")
    with pytest.raises(WeightsError, match="A model that was built from a Spec can be exported"):
        export_gguf(torch.nn.Linear(2, 2), tmp_path / "m.gguf")
    with pytest.raises(WeightsError, match="No published family computes"):
        export_gguf(preset("tiny").build(seed=0), tmp_path / "m.gguf")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(WeightsError, match="could not be written"):
        export_gguf(made("llama"), blocked / "m.gguf")


def test_packed_matrices_are_not_quantised_twice(tmp_path: Path) -> None:
    _, file = written("llama", tmp_path, "Q8_0")
    model, _ = weights.open(file).load(packed=True)
    with pytest.raises(WeightsError, match="holds packed matrices, which cannot be written as they are"):
        export_gguf(model, tmp_path / "again.gguf")


def test_a_type_without_an_architecture_is_refused(tmp_path: Path) -> None:
    from glassformer.weights.families import gguf_fields

    with pytest.raises(WeightsError, match="of the type 'opt', for which GGUF has no architecture that is written here"):
        gguf_fields.metadata({"model_type": "opt"})


# llama.cpp itself


QUIET: list[Any] = []


def llama_cpp_logits(file: Path, tokens: list[int], source: list[int] | None = None, states: bool = False) -> torch.Tensor:
    """Logits (or ``states``) of every position by llama.cpp, with a cache in float32 and the plain attention; ``source``: what an encoder reads first."""
    cpp = pytest.importorskip("llama_cpp")
    if not QUIET:  # kept for as long as the process runs: the library goes on calling it
        QUIET.append(cpp.llama_log_callback(lambda level, text, data: None))
        cpp.llama_log_set(QUIET[0], None)
    cpp.llama_backend_init()
    settings = cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # the plain code for every type: not every machine that says it has AMX tiles lets them be used
    model = cpp.llama_model_load_from_file(str(file).encode(), settings)
    assert model, f"llama.cpp does not load {file}"
    options = cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.type_k = options.type_v = options.flash_attn_type = 0
    options.n_threads = options.n_threads_batch = 1
    options.embeddings, options.pooling_type = states, 0
    context = cpp.llama_init_from_model(model, options)

    def batch_of(row: list[int]) -> Any:
        batch = cpp.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for i, token in enumerate(row):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        return batch

    if source is not None:
        assert cpp.llama_encode(context, batch_of(source)) == 0
    assert (cpp.llama_encode if states else cpp.llama_decode)(context, batch_of(tokens)) == 0
    made = cpp.llama_get_embeddings(context) if states else cpp.llama_get_logits(context)
    width = cpp.llama_model_n_embd(model) if states else V
    numbers = np.ctypeslib.as_array(made, shape=(len(tokens) * width,)).copy()
    cpp.llama_free(context)
    cpp.llama_model_free(model)
    return torch.from_numpy(numbers).view(len(tokens), width)


# Float32 sums in another order: a few units of the last bit of logits of about 2.
EXACT = 1e-5
# ggml looks GELU up in a table of float16 numbers, whose last bit is 2^-11 of a hidden unit.
BY_TABLE = 3e-3
# llama.cpp rounds the two ends of YaRN's blend to whole frequencies; GPT-OSS was trained without (its config says truncate: false).
ROUNDED_BLEND = 5e-3
TOLERANCES = {"gemma": BY_TABLE, "gemma2": BY_TABLE, "gemma3": BY_TABLE, "gpt2": BY_TABLE, "gpt_neox": BY_TABLE, "gpt_oss-yarn": ROUNDED_BLEND}
OTHERWISE = ("bert", "t5", "mistral")  # no logits of a decoder (below); a window that llama.cpp leaves out


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in OTHERWISE])
def test_llama_cpp_computes_the_same_logits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    _, file = written(name, tmp_path)
    x = torch.randint(0, V, (1, 24), generator=torch.Generator().manual_seed(0))
    model, _ = weights.open(file).load()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], llama_cpp_logits(file, x[0].tolist()), rtol=0, atol=TOLERANCES.get(name, EXACT))


def test_llama_cpp_computes_the_same_states(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, file = written("bert", tmp_path)
    x = torch.randint(0, V, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], llama_cpp_logits(file, x[0].tolist(), states=True), rtol=0, atol=BY_TABLE)


def test_llama_cpp_computes_the_same_from_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    # As many layers in both halves, and a read-out of its own: llama.cpp knows no others (it leaves out the scale of a tied one).
    monkeypatch.setitem(CONFIGS, "t5", CONFIGS["t5"] | {"num_decoder_layers": 2, "tie_word_embeddings": False})
    model, file = written("t5", tmp_path)
    x = torch.randint(0, V, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(x[:1], x[1:, :7])[0]
    torch.testing.assert_close(ours, llama_cpp_logits(file, x[1, :7].tolist(), source=x[0].tolist()), rtol=0, atol=BY_TABLE)


# llama.cpp multiplies F16 matrices by activations rounded to F16, quantised ones by activations in 8 bits: ours are the exact products.
@pytest.mark.parametrize(("type", "atol"), [("F32", EXACT), ("F16", 5e-3), ("BF16", 4e-2), ("Q8_0", 6e-2), ("Q4_0", 6e-2)])
def test_llama_cpp_runs_every_type_that_is_written(type: str, atol: float, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    _, file = written("llama-odd", tmp_path, type)
    x = torch.randint(0, V, (1, 24), generator=torch.Generator().manual_seed(0))
    model, _ = weights.open(file).load(dtype=torch.float32)
    packed = weights.open(file).load(dtype=torch.float32, packed=True)[0] if type.startswith("Q") else model
    theirs = llama_cpp_logits(file, x[0].tolist())
    with torch.no_grad():
        for ours in (model(x)[0], packed(x)[0]):
            print(type, float((ours - theirs).abs().max()))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
            assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.999

"""Files that mean harm: whatever bytes they hold, they open, or an error of ours says why not; nothing hangs, nothing is allocated that is not there.

Bytes are turned, cut, doubled; lengths, counts and places become enormous; headers and configs hold whatever JSON can say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from glassformer import weights
from glassformer.core.errors import GlassformerError
from weights.made import CONFIG, gguf_file, llama

HUGE = [0, 1, 2, 7, 8, 31, 33, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**47, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]

# An edit of bytes: what is done, where (as a fraction of the part that is aimed at), and with what.
EDIT = st.tuples(
    st.sampled_from(["flip", "u64", "u32", "u8", "cut", "double", "insert", "remove", "swap"]), st.floats(0, 1), st.floats(0, 1), st.sampled_from(HUGE)
)
EDITS = st.lists(EDIT, min_size=1, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.sampled_from(HUGE) | st.floats() | st.text(max_size=6) | st.sampled_from([10**30, -(10**400), 1e308]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def edited(data: bytes, edits: list[tuple[str, float, float, int]], aim: int) -> bytes:
    """The bytes after the edits, which fall on the first ``aim`` of them (a cut anywhere)."""
    now = bytearray(data)
    for what, where, other, value in edits:
        at, to = int(where * min(aim, max(len(now) - 1, 0))), int(other * min(aim, max(len(now) - 1, 0)))
        if what == "flip" and now:
            now[at] ^= 1 << value % 8
        elif what in ("u64", "u32", "u8"):
            n = int(what[1:]) // 8
            now[at : at + n] = (value % (1 << (8 * n))).to_bytes(n, "little")
        elif what == "cut":
            del now[int(where * len(now)) :]
        elif what == "double":
            now[at:at] = now[at : at + 64]
        elif what == "insert":
            now[at:at] = bytes(value % 67)
        elif what == "remove":
            del now[at : at + 1 + value % 67]
        elif what == "swap":
            now[at : at + 8], now[to : to + 8] = now[to : to + 8], now[at : at + 8]
    return bytes(now)


def held(path: Path) -> str:
    """Opened and loaded; or the error, which is one of ours, of a bearable length. Anything else is raised."""
    said = ""
    try:
        opened = weights.open(path)
        repr(opened)
        model, report = opened.load()
        assert str(report)
        assert not any(x.is_meta for x in model.parameters())
    except GlassformerError as error:
        said = str(error)
    assert len(said) < 20_000
    return said


# Function-scoped folders would be one for all examples: that is what is wanted here.
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return llama(tmp_path_factory.mktemp("hostile") / "model")


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("gguf")
    return {kind: gguf_file(at / f"{kind}.gguf", kind) for kind in ("F32", "Q8_0", "Q4_0")}


@pytest.fixture
def whole(folder) -> Iterator[Path]:
    """The folder, put right again afterwards."""
    kept = {p: p.read_bytes() for p in folder.iterdir()}
    yield folder
    for p in [*folder.iterdir()]:
        p.unlink()
    for p, data in kept.items():
        p.write_bytes(data)


def test_what_the_edits_start_from_is_whole(folder, ggufs):
    assert held(folder) == ""
    for kind, file in ggufs.items():
        assert held(file) == "", kind
        tokenizer = weights.open(file).tokenizer
        assert tokenizer is not None and tokenizer.vocab_size == 40


# safetensors


def turned_safetensors(folder: Path, edits: list[Any]) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    try:
        file.write_bytes(edited(data, edits, 8 + int.from_bytes(data[:8], "little")))
        held(folder)
    finally:
        file.write_bytes(data)


@settings(max_examples=60, **FUZZ)
@given(edits=EDITS)
def test_turned_bytes_of_a_safetensors_file(folder, edits):
    turned_safetensors(folder, edits)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": JSON | st.sampled_from(["F32", "BF16", "F8_E4M3", "BOOL", "I64", "Q4_0"]),
        "shape": JSON | st.lists(st.sampled_from([*HUGE, -1, 0.5, None]), max_size=9),
        "data_offsets": JSON | st.lists(st.sampled_from([*HUGE, -1]), min_size=2, max_size=2),
    },
)


def changed_header(folder: Path, changes: list[tuple[int, Any]], renamed: list[tuple[int, str]], twice: bool) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    names = sorted(header)
    for i, change in changes:
        name = names[i % len(names)]
        header[name] = header[name] | change if isinstance(change, dict) and isinstance(header.get(name), dict) else change
    for i, name in renamed:
        if (old := names[i % len(names)]) in header:
            header[name] = header.pop(old)
    text = json.dumps(header)
    if twice:
        text = text[:-1] + "," + text[1:]
    try:
        made = text.encode("utf-8", "surrogatepass")
        file.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + n :])
        held(folder)
    finally:
        file.write_bytes(data)


NAMES = st.text(max_size=8) | st.sampled_from(
    ["model.norm.weight", "norm.weight", "lm_head.weight", "model.layers.7.mlp.up_proj.weight", "__metadata__", "a" * 10_000]
)
CHANGES = st.lists(st.tuples(st.integers(0, 30), ENTRY | JSON), max_size=2)


@settings(max_examples=80, **FUZZ)
@given(changes=CHANGES, renamed=st.lists(st.tuples(st.integers(0, 30), NAMES), max_size=2), twice=st.booleans())
@example(changes=[(0, {"dtype": ["F32"]})], renamed=[], twice=False)
@example(changes=[(0, {"shape": [10**4_000] * 8})], renamed=[], twice=False)
@example(changes=[(0, {"shape": [2**47, 2**47, 0], "data_offsets": [0, 0]})], renamed=[], twice=False)
def test_any_header_of_a_safetensors_file(folder, changes, renamed, twice):
    changed_header(folder, changes, renamed, twice)


@pytest.mark.parametrize("depth", [10, 300, 900, 990, 5_000, 200_000])
@pytest.mark.parametrize("where", ["header", "entry", "shape", "config", "index"])
def test_deep_json(depth, where, whole):
    deep = b"[" * depth + b"]" * depth
    text = {"header": deep, "entry": b'{"a":' + deep + b"}", "shape": b'{"a":{"dtype":"F32","shape":' + deep + b',"data_offsets":[0,4]}}'}
    if where in text:
        (whole / "model.safetensors").write_bytes(len(text[where]).to_bytes(8, "little") + text[where] + bytes(4))
    elif where == "index":
        (whole / "model.safetensors").unlink()  # an index beside one whole file is not asked
        (whole / "model.safetensors.index.json").write_bytes(b'{"weight_map": ' + deep + b"}")
    else:
        (whole / "config.json").write_bytes(b'{"model_type": "llama", "hidden_size": ' + deep + b"}")
    assert str(whole) in held(whole)


# config.json and the index


def changed_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    text = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(text) | changes), errors="surrogatepass")
        held(folder)
    finally:
        file.write_text(text)


FIELD = st.sampled_from([*CONFIG, "rope_scaling", "layer_types", "sliding_window", "attention_bias", "hidden_act", "eos_token_id", "max_position_embeddings"])


@settings(max_examples=80, **FUZZ)
@given(changes=st.dictionaries(FIELD | st.text(max_size=4), JSON, max_size=2))
@example(changes={"num_hidden_layers": 2_000})
@example(changes={"hidden_size": 10**12, "vocab_size": 10**12})
@example(changes={"hidden_size": 2**40, "num_attention_heads": 2**40, "head_dim": 2**40})
@example(changes={"head_dim": 3})
@example(changes={"rms_norm_eps": float("nan")})
def test_any_config(folder, changes):
    changed_config(folder, changes)


@settings(max_examples=40, **FUZZ)
@given(
    where=st.dictionaries(NAMES, st.text(max_size=6) | st.sampled_from(["model.safetensors", "../model.safetensors", "x\0.safetensors"]) | JSON, max_size=4)
    | JSON
)
def test_any_index(folder, where):
    file = folder / "model.safetensors.index.json"
    try:
        file.write_text(json.dumps({"weight_map": where}), errors="surrogatepass")
        held(folder)
    finally:
        file.unlink()


def test_a_few_bytes_do_not_ask_for_a_million_modules(whole):
    """Experts are counted before any is made."""
    config = CONFIG | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4096, "num_experts_per_tok": 2}
    config = {k: v for k, v in config.items() if "bias" not in k} | {"num_hidden_layers": 10}
    (whole / "config.json").write_text(json.dumps(config))
    begun = time.process_time()
    assert "40960 experts, but there are no more than 21 tensors and slices of tensors in all" in held(whole)
    assert time.process_time() - begun < 5


# GGUF


@settings(max_examples=80, **FUZZ)
@given(kind=st.sampled_from(["F32", "Q8_0", "Q4_0"]), edits=EDITS)
def test_turned_bytes_of_a_gguf_file(ggufs, tmp_path, kind, edits):
    (tmp_path / "x.gguf").write_bytes(edited(ggufs[kind].read_bytes(), edits, 2_600))
    held(tmp_path / "x.gguf")


@settings(max_examples=60, **FUZZ)
@given(edits=EDITS)
def test_turned_bytes_of_a_gguf_tokenizer(ggufs, tmp_path, edits):
    (tmp_path / "x.gguf").write_bytes(edited(ggufs["F32"].read_bytes(), edits, 1_900))
    try:
        tokenizer = weights.open(tmp_path / "x.gguf").tokenizer
    except GlassformerError:
        return
    assert tokenizer is None or tokenizer.decode(tokenizer.encode("a b")) is not None


# Much more of the same


@pytest.mark.slow
@settings(max_examples=600, **FUZZ)
@given(edits=EDITS)
def test_many_turned_bytes_of_a_safetensors_file(folder, edits):
    turned_safetensors(folder, edits)


@pytest.mark.slow
@settings(max_examples=500, **FUZZ)
@given(changes=CHANGES, renamed=st.lists(st.tuples(st.integers(0, 30), NAMES), max_size=2), twice=st.booleans())
def test_many_headers_of_a_safetensors_file(folder, changes, renamed, twice):
    changed_header(folder, changes, renamed, twice)


@pytest.mark.slow
@settings(max_examples=500, **FUZZ)
@given(changes=st.dictionaries(FIELD | st.text(max_size=4), JSON, max_size=3))
def test_many_configs(folder, changes):
    changed_config(folder, changes)


@pytest.mark.slow
@settings(max_examples=1_000, **FUZZ)
@given(kind=st.sampled_from(["F32", "Q8_0", "Q4_0"]), edits=EDITS)
def test_many_turned_bytes_of_a_gguf_file(ggufs, tmp_path, kind, edits):
    (tmp_path / "x.gguf").write_bytes(edited(ggufs[kind].read_bytes(), edits, 2_600))
    held(tmp_path / "x.gguf")

"""Small checkpoints for the tests of the weights room: a valid one, and files written byte by byte that no library would write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from glassformer.models import Block, Decoder
from glassformer.parts.attention import Attention
from glassformer.parts.feedforward import Gated
from glassformer.parts.norm import RMSNorm
from glassformer.parts.rotary import Rotary

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}


def spec(layers: int = 2, d: int = 8, f: int = 12, vocab: int = 13, tied: bool = False) -> Decoder:
    block = Block(Attention(2, n_kv_heads=1, d_head=d // 2, position=Rotary(base=100.0)), Gated(f), norm=RMSNorm(eps=1e-6))
    return Decoder(vocab, d, (block,) * layers, final_norm=block.norm, tied=tied)


def model(**sizes: Any) -> Any:
    torch.manual_seed(0)
    return spec(**sizes).build().eval()


def llama(folder: Path, *, shard: int | None = None, tied: bool = False, **config: Any) -> Path:
    """A valid tiny checkpoint, ``shard`` bytes in a file, and on it the fields of config.json that the test changes (None removes one)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = published(model(tied=tied))
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, x in state.items():
        if shard is not None and sum(map(nbytes, shards[-1].values())) + nbytes(x) > shard:
            shards.append({})
        shards[-1][name] = x
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, part in zip(names, shards, strict=True):
        save_file(part, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, part in zip(names, shards, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": tied}))
    return configured(folder, **config)


def published(made: Any) -> dict[str, torch.Tensor]:
    """The parameters of :func:`model` by the names of the published format, written out by hand."""
    found: dict[str, torch.Tensor] = {}
    for path, x in made.named_parameters():
        x = x.detach()
        if path.startswith("blocks."):
            _, i, rest = path.split(".", 2)
            heads = (8, 4, 4) if rest.startswith("attn.qkv") else (12, 12)
            for name, part in zip(NAMES[rest], x.split(heads) if len(NAMES[rest]) > 1 else (x,), strict=True):
                found[f"model.layers.{i}.{name}.weight"] = part.clone()
        else:
            found[NAMES[path][0]] = x.clone()
    return found


NAMES = {
    "embed.weight": ("model.embed_tokens.weight",),
    "final_norm.weight": ("model.norm.weight",),
    "readout.matrix": ("lm_head.weight",),
    "norm1.weight": ("input_layernorm",),
    "norm2.weight": ("post_attention_layernorm",),
    "attn.qkv.weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out.weight": ("self_attn.o_proj",),
    "ffn.gate_up.weight": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down.weight": ("mlp.down_proj",),
}


def nbytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def configured(folder: Path, **changes: Any) -> Path:
    """The fields of config.json changed; None removes one."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def raw(file: Path, header: Any, data: bytes = b"", promised: int | None = None) -> Path:
    """A safetensors file of this header (JSON, or the bytes themselves) and data; ``promised`` is what it says the header's length to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if promised is None else promised).to_bytes(8, "little") + text + data)
    return file


def entry(shape: list[int], start: int = 0, dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    n = size
    for side in shape:
        n *= side
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + n]}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewritten(folder: Path, changed: Mapping[str, torch.Tensor | None]) -> Path:
    """Tensors changed, added, or (None) removed."""
    now = tensors(folder) | dict(changed)
    save_file({n: x.clone() for n, x in now.items() if x is not None}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gguf_file(file: Path, kind: str = "F32") -> Path:
    """A valid tiny model as the gguf library writes it, with a vocabulary; the matrices in the type ``kind`` (``Q8_0`` needs rows of 32)."""
    d, f, vocab = 32, 64, 40
    writer = gguf.GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, d),
        (writer.add_feed_forward_length, f),
        (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_freq_base, 100.0),
        (writer.add_rope_dimension_count, d // 2),
        (writer.add_vocab_size, vocab),
        (writer.add_tokenizer_model, "llama"),
        (writer.add_token_list, ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(vocab - 3))]),
        (writer.add_token_scores, [-float(i) for i in range(vocab)]),
        (writer.add_token_types, [2, 3, 3, *([6] * (vocab - 3))]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
    ):
        add(value)
    shapes = {"token_embd": (vocab, d), "output_norm": (d,), "output": (vocab, d), "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,)}
    shapes |= {"blk.0.attn_q": (d, d), "blk.0.attn_k": (d // 2, d), "blk.0.attn_v": (d // 2, d), "blk.0.attn_output": (d, d)}
    shapes |= {"blk.0.ffn_gate": (f, d), "blk.0.ffn_up": (f, d), "blk.0.ffn_down": (d, f)}
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        x = numbers.standard_normal(shape).astype(np.float32)
        if kind != "F32" and len(shape) == 2:
            quantised = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(x, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(f"{name}.weight", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file

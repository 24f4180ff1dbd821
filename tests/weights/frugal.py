"""How much memory the weights room takes, measured in a process of its own: ``python frugal.py FOLDER`` prints a table as JSON.

The files are sparse: a header, then a hole of the right size, so that fourteen gigabytes take no room on the disk.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL = {"hidden_size": 1_024, "intermediate_size": 4_096, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 8_192}
LARGE = {"hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32_000}


def shapes(c: dict[str, int]) -> Iterator[tuple[str, list[int]]]:
    d, f = c["hidden_size"], c["intermediate_size"]
    yield "model.embed_tokens.weight", [c["vocab_size"], d]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        yield from ((f"{at}.self_attn.{name}_proj.weight", [d, d]) for name in "qkvo")
        yield from ((f"{at}.mlp.{name}_proj.weight", [f, d]) for name in ("gate", "up"))
        yield f"{at}.mlp.down_proj.weight", [d, f]
        yield from ((f"{at}.{name}_layernorm.weight", [d]) for name in ("input", "post_attention"))
    yield "model.norm.weight", [d]
    yield "lm_head.weight", [c["vocab_size"], d]


def sparse(folder: Path, c: dict[str, int], dtype: str, shards: int = 1) -> int:
    """A checkpoint of zeros that takes no room; its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-6, **c}))
    named, total, where = list(shapes(c)), 0, {}
    for i in range(shards):
        file, at, header = folder / (f"model-{i}.safetensors" if shards > 1 else "model.safetensors"), 0, {}
        for name, shape in named[i::shards]:
            n = {"BF16": 2, "F32": 4}[dtype]
            for side in shape:
                n *= side
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
            at, where[name] = at + n, file.name
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + at)
        total += at
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total


def now() -> int:
    """Bytes in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """The most bytes that this process had in memory so far (``getrusage`` would carry over the highest of the process that started it)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1_024


def hostile(folder: Path, n: int) -> dict[str, int]:
    """``n`` damaged copies of small files, opened under a limit of half a gigabyte more than there is: how many opened, and how many were refused."""
    from glassformer import weights
    from glassformer.core.errors import GlassformerError
    from weights.made import gguf_file, llama

    files = [llama(folder / "hostile") / "model.safetensors", gguf_file(folder / "x.gguf")]
    whole = {file: file.read_bytes() for file in files}
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    numbers, counts = random.Random(0), {"opened": 0, "refused": 0}
    for i in range(n):
        file = files[i % 2]
        data = bytearray(whole[file])
        for _ in range(numbers.randint(1, 3)):
            at, width = numbers.randrange(2_400), numbers.choice([1, 4, 8])
            data[at : at + width] = numbers.choice([2**7, 2**20, 2**31, 2**40, 2**62, 2**64 - 1]).to_bytes(8, "little")[:width]
        file.write_bytes(data)
        try:
            weights.open(file.parent if file.suffix == ".safetensors" else file).load()
            counts["opened"] += 1
        except GlassformerError:
            counts["refused"] += 1
        file.write_bytes(whole[file])
    return counts


def main(folder: Path) -> dict[str, Any]:
    import torch

    from glassformer import weights

    warm = folder / "warm"
    sparse(warm, SMALL | {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}, "F32")
    model, _ = weights.open(warm).load()
    weights.export_hf(model, folder / "warm-out")
    said: dict[str, Any] = {}

    before = peak()
    for shards in (1, 5):
        total = sparse(folder / f"large-{shards}", LARGE, "BF16", shards)
        opened = weights.open(folder / f"large-{shards}")
        assert len(opened.plan.fillings) == len(dict(opened.spec.build(device="meta").named_parameters()))
        said[f"open-{shards}"] = {"bytes": total, "grew": peak() - before}

    total = sparse(folder / "small", SMALL, "F32")
    before = now()
    model, _ = weights.open(folder / "small").load()
    said["load"] = {"bytes": total, "grew": peak() - before}

    shard = 40_000_000
    before = now()
    weights.export_hf(model, folder / "out", shard=shard)
    said["export"] = {"bytes": total, "shard": shard, "grew": peak() - before, "files": len(list((folder / "out").glob("*.safetensors")))}

    del model
    before = now()
    model, _ = weights.open(folder / "small").load(dtype=torch.bfloat16)
    said["half"] = {"bytes": total // 2, "now": now() - before}
    del model
    said["hostile"] = hostile(folder, 150)
    return said


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(json.dumps(main(Path(sys.argv[1]))))

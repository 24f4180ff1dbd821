"""What the family tests found, kept when asked: figures for docs/families.md, and goldens for a suite without the reference library.

GLASSFORMER_FAMILIES=build/families.jsonl pytest tests/weights/families     then: python scripts/families_page.py build/families.jsonl
GLASSFORMER_GOLDENS=tests/weights/goldens pytest tests/weights/families
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from glassformer import weights
from glassformer.core.errors import WeightsError

MOST = 400_000  # bytes of tensors in a golden


def keep(model: Any, reference: Any, folder: Path, ids: Tensor, target: Tensor) -> None:
    """Note the largest error of the outputs, and keep the first variant of each family as a golden."""
    results, goldens = os.environ.get("GLASSFORMER_FAMILIES"), os.environ.get("GLASSFORMER_GOLDENS")
    if not results and not goldens:
        return
    with torch.no_grad():
        if hasattr(model, "encoder"):
            theirs, ours = reference(input_ids=ids, decoder_input_ids=target)[0], model(ids, target)
        else:
            theirs, ours = reference(input_ids=ids)[0], model(ids)
    opened = weights.open(folder)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0].split("::")[-1]
    if results:
        Path(results).parent.mkdir(parents=True, exist_ok=True)
        line = {
            "family": opened.family.name,
            "model_type": opened.config["model_type"],
            "architecture": type(reference).__name__,
            "test": test,
            "error": float((ours - theirs).abs().max()),
            "largest": float(theirs.abs().max()),
            "sites": len(model.sites()),
            "kinds": sorted({p.path.split(".", 2)[-1] if p.path.startswith("blocks.") else p.path for p in model.sites()}),
            "exported": True,  # given_back has asserted it before this is called
            "gguf": through_gguf(model, folder.parent / "through.gguf", ids, target, ours),
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
        }
        with Path(results).open("a") as f:
            f.write(json.dumps(line) + "\n")
    if goldens and not (at := Path(goldens) / opened.config["model_type"]).exists():
        size = sum(s.nbytes for s in opened.tensors.values())
        assert size < MOST, f"{test}: {size} bytes are too many for a golden"
        at.mkdir(parents=True)
        for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.safetensors")):
            shutil.copyfile(file, at / file.name)
        save_file({"ids": ids, "target": target, "output": theirs.contiguous()}, at / "expected.golden")


def through_gguf(model: Any, file: Path, ids: Tensor, target: Tensor, before: Tensor) -> float | None:
    """The largest difference of the outputs after a way through a GGUF file in F32, or None if the format has no such architecture."""
    try:
        weights.export_gguf(model, file, type="F32")
    except WeightsError:
        return None
    again, _ = weights.open(file).load()
    with torch.no_grad():
        after = again(ids, target) if hasattr(again, "encoder") else again(ids)
    return float((after - before).abs().max())

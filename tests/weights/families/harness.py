"""Held to the reference: a tiny odd model of the reference library, saved, opened by us, compared, given back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from glassformer import weights
from glassformer.core.tap import Record
from parity.reference import close, greedy_together, hold_together, lively
from weights.families import results

VOCAB = 61
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def ids(b: int = 2, t: int = 15, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def saved(config: Any, folder: Path, auto: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """A lively random model of the reference library in ``folder``, and the model."""
    reference = lively(auto.from_config(config, attn_implementation="eager"))
    reference.generation_config = transformers.GenerationConfig(pad_token_id=0)
    reference.save_pretrained(folder, **options)
    return reference


def opened(folder: Path, **options: Any) -> Any:
    model, report = weights.open(folder, **options).load()
    assert report.used.keys() == dict(model.named_parameters()).keys()
    return model


def hold_decoder(config: Any, tmp_path: Path, *, layers: int, t: int = 15, n: int = 32, positions: bool = True) -> tuple[Any, Any]:
    """Logits, streams, patterns; 32 greedy tokens with the cache; exported and reloaded by the reference: equal."""
    reference = saved(config, tmp_path / "theirs")
    model = opened(tmp_path / "theirs")
    hold_together(model, reference, ids(2, t), layers)
    if n:
        greedy_together(model, reference, ids(2, 5, seed=2), n)
    given_back(model, reference, tmp_path, type(reference))
    again = type(reference).from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    with torch.no_grad():
        close(model(ids(2, t)), again(ids(2, t)).logits, "logits of what was given back")
    return model, reference


def given_back(model: Any, reference: Any, tmp_path: Path, auto: Any, config: Mapping[str, Any] | None = None) -> None:
    """Exported, opened by the reference library and by us: every tensor to the bit."""
    values = config if config is not None else weights.open(tmp_path / "theirs").config
    weights.export_hf(model, tmp_path / "back", config=values)
    again, info = auto.from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    theirs = reference.state_dict()
    back = again.state_dict()
    assert back.keys() == theirs.keys()
    for name, x in theirs.items():
        assert torch.equal(back[name], x), name
    bare, _ = weights.open(tmp_path / "back").load()
    assert bare.spec == model.spec
    for (name, x), (other, y) in zip(model.named_parameters(), bare.named_parameters(), strict=True):
        assert name == other and torch.equal(x, y), name
    results.keep(model, reference, tmp_path / "theirs", ids(2, 11), ids(2, 7, seed=2))


__all__ = ["COMMON", "VOCAB", "Record", "close", "given_back", "hold_decoder", "ids", "opened", "saved"]

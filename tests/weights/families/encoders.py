"""Encoders held to the reference: rows of different lengths, every stream and pattern, the head's own output; given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassformer import weights
from glassformer.core.tap import Record
from glassformer.parts.readout import Tagger
from parity.reference import lively
from weights.families import results
from weights.families.harness import VOCAB, close, ids, opened

LENGTHS = (15, 4, 9)


def hold_encoder(
    reference: Any, tmp_path: Path, *, layers: int, types: int = 0, missing: tuple[str, ...] = (), unread: tuple[str, ...] = ()
) -> tuple[Any, Any]:
    """Saved, opened by us, compared with and without padding, exported, opened by the reference: equal.

    ``missing``: heads that we do not keep. ``unread``: parameters that the reference holds and never computes with.
    """
    reference = lively(reference)
    reference.save_pretrained(tmp_path / "theirs")
    model = opened(tmp_path / "theirs")
    same_values(model, reference, layers, None, types)
    same_values(model, reference, layers, torch.tensor(LENGTHS), types)
    given_back(model, reference, tmp_path, missing, unread)
    return model, reference


def same_values(model: Any, reference: Any, layers: int, lengths: Tensor | None, types: int) -> None:
    x = ids(3, max(LENGTHS))
    real = torch.ones_like(x, dtype=torch.bool) if lengths is None else torch.arange(x.shape[1])[None] < lengths[:, None]
    pad = reference.config.pad_token_id
    x = torch.where(real, torch.where(x == pad, VOCAB - 1, x), pad)  # padding within a text would be counted as no position by RoBERTa
    kinds = {"types": torch.randint(0, types, x.shape, generator=torch.Generator().manual_seed(3))} if types else {}
    options = {"token_type_ids": kinds["types"]} if types else {}
    tap = Record("**")
    with torch.no_grad():
        theirs = reference(input_ids=x, attention_mask=real.long(), output_hidden_states=True, output_attentions=True, **options)
        out = model(x, lengths=lengths, tap=tap, **kinds)
    for i in range(layers):
        close(tap[f"blocks.{i}.resid_pre"][real], theirs.hidden_states[i][real], f"stream into layer {i}")
        close(tap[f"blocks.{i}.attn.pattern"].movedim(1, 2)[real], theirs.attentions[i].movedim(1, 2)[real], f"pattern of layer {i}")
    final = getattr(theirs, "last_hidden_state", theirs.hidden_states[-1])
    close(tap["resid_final"][real], final[real], "final stream")
    if (want := getattr(theirs, "logits", None)) is None:
        close(out[real], theirs.last_hidden_state[real], "states")
    elif out.ndim == 2:
        close(out, want, "scores of classes")
    else:
        close(out[real], want.reshape(out.shape)[real], "scores of positions")


def given_back(model: Any, reference: Any, tmp_path: Path, missing: tuple[str, ...], unread: tuple[str, ...] = ()) -> None:
    weights.export_hf(model, tmp_path / "back", config=weights.open(tmp_path / "theirs").config)
    again, info = type(reference).from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
    assert set(info["missing_keys"]) == set(missing) and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for name, x in reference.state_dict().items():
        assert name in missing or name in unread or torch.equal(again.state_dict()[name], x), name
    bare, report = weights.open(tmp_path / "back").load()
    assert bare.spec == model.spec and not report.left
    for (name, x), (other, y) in zip(model.named_parameters(), bare.named_parameters(), strict=True):
        assert name == other and torch.equal(x, y), name
    if model.spec.readout != Tagger(1, transform=getattr(model.spec.readout, "transform", None)):  # whose logits lack the last axis there
        x = ids(2, 11)
        results.keep(model, reference, tmp_path / "theirs", torch.where(x == reference.config.pad_token_id, VOCAB - 1, x), x)


__all__ = ["VOCAB", "hold_encoder", "same_values"]

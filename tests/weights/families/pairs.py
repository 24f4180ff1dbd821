"""Encoder-decoders held to the reference: states and patterns of both halves, cross patterns, 32 cached tokens; given back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from glassformer import weights
from glassformer.core.tap import Record
from parity.reference import lively
from weights.families import results
from weights.families.harness import close, ids, opened

LENGTHS = (15, 4, 9)


def hold_pair(reference: Any, tmp_path: Path, *, n: int = 32, unread: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Saved, opened by us, compared with rows of different lengths, written with a cache, exported, opened by the reference: equal."""
    reference = lively(reference)
    if hasattr(reference, "final_logits_bias"):  # a buffer, which is not random
        reference.final_logits_bias.copy_(torch.randn(reference.final_logits_bias.shape, generator=torch.Generator().manual_seed(9)))
    for part in reference.modules():
        if hasattr(part, "create_weight"):  # Marian's sinusoids, which are not learnt
            part.weight.data.copy_(part.create_weight())
    start = reference.config.decoder_start_token_id
    reference.generation_config = transformers.GenerationConfig(pad_token_id=reference.config.pad_token_id, decoder_start_token_id=start)
    reference.save_pretrained(tmp_path / "theirs")
    model = opened(tmp_path / "theirs")
    assert model.spec.start == start
    same_values(model, reference)
    if n:
        same_tokens(model, reference, n)
    given_back(model, reference, tmp_path, unread)
    return model, reference


def same_values(model: Any, reference: Any) -> None:
    source, target, lengths = ids(3, 15), ids(3, 12, seed=2), torch.tensor(LENGTHS)
    real = torch.arange(15)[None] < lengths[:, None]
    source = torch.where(real, source, reference.config.pad_token_id)
    tap = Record("**")
    with torch.no_grad():
        theirs = reference(input_ids=source, attention_mask=real.long(), decoder_input_ids=target, output_hidden_states=True, output_attentions=True)
        out = model(source, target, source_lengths=lengths, tap=tap)
    for i in range(len(model.encoder.blocks)):
        close(tap[f"encoder.blocks.{i}.resid_pre"][real], theirs.encoder_hidden_states[i][real], f"encoder's stream into layer {i}")
        ours = tap[f"encoder.blocks.{i}.attn.pattern"].movedim(1, 2)
        close(ours[real], theirs.encoder_attentions[i].movedim(1, 2)[real], f"encoder's pattern of layer {i}")
    for i in range(len(model.decoder.blocks)):
        close(tap[f"decoder.blocks.{i}.resid_pre"], theirs.decoder_hidden_states[i], f"decoder's stream into layer {i}")
        close(tap[f"decoder.blocks.{i}.attn.pattern"], theirs.decoder_attentions[i], f"decoder's pattern of layer {i}")
        close(tap[f"decoder.blocks.{i}.cross.pattern"], theirs.cross_attentions[i], f"cross pattern of layer {i}")
    close(tap["encoder.resid_final"][real], theirs.encoder_last_hidden_state[real], "memory")
    close(tap["decoder.resid_final"], theirs.decoder_hidden_states[-1], "decoder's final stream")
    close(out, theirs.logits if hasattr(theirs, "logits") else theirs.last_hidden_state, "logits")


def same_tokens(model: Any, reference: Any, n: int) -> None:
    source, lengths = ids(2, 11, seed=3), [11, 6]
    real = torch.arange(11)[None] < torch.tensor(lengths)[:, None]
    source = torch.where(real, source, reference.config.pad_token_id)
    options: dict[str, Any] = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "num_beams": 1}
    theirs = reference.generate(input_ids=source, attention_mask=real.long(), return_dict_in_generate=True, output_logits=True, **options)
    cache = model.cache(batch=2, capacity=n + 1)
    said = feed = torch.full((2, 1), model.spec.start)
    with torch.no_grad():
        memory = model.encode(source, lengths)
        for step in range(n):
            logits = model.decode(feed, memory if step == 0 else None, source_lengths=lengths, cache=cache)[:, -1]
            close(logits, theirs.logits[step], f"logits of step {step}")
            feed = logits.argmax(-1, keepdim=True)
            said = torch.cat([said, feed], 1)
    assert torch.equal(said, theirs.sequences)


def given_back(model: Any, reference: Any, tmp_path: Path, unread: tuple[str, ...]) -> None:
    weights.export_hf(model, tmp_path / "back", config=weights.open(tmp_path / "theirs").config)
    again, info = type(reference).from_pretrained(tmp_path / "back", attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    for name, x in reference.state_dict().items():
        assert name in unread or torch.equal(again.state_dict()[name], x), name
    source, target = ids(2, 7), ids(2, 5, seed=4)
    with torch.no_grad():
        a, b = (m.eval()(input_ids=source, decoder_input_ids=target)[0] for m in (again, reference))
    assert torch.equal(a, b)
    bare, _ = weights.open(tmp_path / "back").load()
    assert bare.spec == model.spec
    for (name, x), (other, y) in zip(model.named_parameters(), bare.named_parameters(), strict=True):
        assert name == other and torch.equal(x, y), name
    results.keep(model, reference, tmp_path / "theirs", ids(2, 11), ids(2, 7, seed=2))


__all__ = ["hold_pair"]

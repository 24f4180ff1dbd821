"""Phi-3: fused projections, a part of each head turned, LongRoPE on both sides of its boundary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from glassformer.infer import Greedy, Session, generate
from glassformer.parts.rotary import LongRope
from glassformer.weights.family import families
from parity.reference import close, greedy_together
from weights.families.harness import COMMON, hold_decoder, ids

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4, **COMMON}
LISTS = {"rope_type": "longrope", "rope_theta": 1_000.0, "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.5, 2.0, 6.0, 9.0]}
VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"num_key_value_heads": 1, "sliding_window": 5, "max_position_embeddings": 64, "tie_word_embeddings": True},
    "partial": {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "longrope-short": {"max_position_embeddings": 128, "original_max_position_embeddings": 64, "rope_parameters": LISTS},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_phi3_is_the_reference(variant, tmp_path):
    hold_decoder(transformers.Phi3Config(**SIZES, **VARIANTS[variant]), tmp_path, layers=3)


@pytest.mark.parametrize("attention_factor", [None, 1.3])
def test_beyond_the_context_the_long_divisors_are_the_reference_s(attention_factor, tmp_path):
    lists = {**LISTS, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0]}
    lists |= {} if attention_factor is None else {"attention_factor": attention_factor}
    config = transformers.Phi3Config(**SIZES, max_position_embeddings=40, original_max_position_embeddings=10, rope_parameters=lists)
    # A prompt of 5 crosses the boundary within its 32 tokens, where the reference's loop begins anew with an empty cache: below, each side by itself.
    model, reference = hold_decoder(config, tmp_path, layers=3, n=0)
    greedy_together(model, reference, ids(2, 3, seed=2), 8)
    greedy_together(model, reference, ids(2, 11, seed=2), 21)
    with torch.no_grad():  # its model alone, given keys of a short text, mixes them with long ones: so does ours
        cache, theirs = model.cache(batch=2, capacity=16), reference(ids(2, 10), use_cache=True)
        model(ids(2, 10), cache=cache)
        one = ids(2, 1, seed=5)
        close(model(one, cache=cache), reference(one, past_key_values=theirs.past_key_values).logits, "across the boundary")


def test_generation_across_the_boundary_is_the_reference_s(tmp_path):
    lists = {**LISTS, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.2], "long_factor": [1.5, 4.0]}
    config = transformers.Phi3Config(**SIZES, max_position_embeddings=40, original_max_position_embeddings=10, rope_parameters=lists)
    model, reference = hold_decoder(config, tmp_path, layers=3, n=0)
    prompts = ids(2, 5, seed=2)
    theirs = reference.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0)
    ours = generate(model, prompts.tolist(), max_new_tokens=20, do_sample=False)
    assert [g.ids for g in ours] == theirs[:, 5:].tolist()
    ragged = [prompts[0].tolist(), prompts[1, :3].tolist()]  # rows that cross at different steps
    cached, anew = (generate(model, ragged, max_new_tokens=20, do_sample=False, cache=c) for c in (None, False))
    assert [g.ids for g in cached] == [g.ids for g in anew]
    session = Session(model, prompts.tolist(), Greedy(), room=20)
    for _ in range(12):
        session.step()
    session.rewind(9)  # back to the near side: the keys that were turned for the far one do not fit there
    again = Session(model, session.ids, Greedy(), room=12, cache=False)
    assert [session.step().ids for _ in range(9)] == [again.step().ids for _ in range(9)]


def test_older_files_say_the_same():
    """``su`` and ``rope_scaling`` beside the contexts whose ratio is the factor."""
    values = {"vocab_size": 9, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8, "rope_theta": 1_000.0}
    values |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    lists = {"short_factor": LISTS["short_factor"], "long_factor": LISTS["long_factor"]}
    for kind in ("su", "yarn", "longrope"):
        read = families()["phi3"].read(values | {"rope_scaling": {"type": kind, **lists}})
        assert read.blocks[0].attention.position.scaling == LongRope(tuple(lists["short_factor"]), tuple(lists["long_factor"]), 16, factor=4.0)

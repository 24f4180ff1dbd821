"""Beam search against transformers' own on the same random models: token for token, score for score."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glassformer.infer import generate

transformers = pytest.importorskip("transformers")

from glassformer import weights  # noqa: E402
from parity.reference import VOCAB, lively  # noqa: E402
from weights.families.test_pairs import bart, t5  # noqa: E402

N = 9


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    tf = transformers
    gpt2 = tf.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    made = {}
    for name, cls, config in [
        ("gpt2", tf.GPT2LMHeadModel, gpt2),
        ("bart", tf.BartForConditionalGeneration, bart()),
        ("t5", tf.T5ForConditionalGeneration, t5()),
    ]:
        folder = tmp_path_factory.mktemp(name)
        config._attn_implementation = "eager"
        reference = lively(cls(config), seed=3)
        reference.generation_config = tf.GenerationConfig(pad_token_id=0, decoder_start_token_id=getattr(config, "decoder_start_token_id", None))
        reference.save_pretrained(folder)
        made[name] = (weights.open(folder).load()[0], reference)
    return made


CASES: list[dict[str, Any]] = [
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 4, "length_penalty": -0.5, "early_stopping": True},
    {"num_beams": 5, "length_penalty": 0.8, "early_stopping": True, "min_new_tokens": 4},
    {"num_beams": 2, "num_return_sequences": 1},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.0},
    {"num_beams": 6, "num_return_sequences": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"num_beams": 1, "num_return_sequences": 1},
    {"num_beams": 70, "num_return_sequences": 12, "length_penalty": 3.0, "early_stopping": "never"},  # more than there are tokens
    {"num_beams": 7, "length_penalty": -2.0, "early_stopping": "never", "min_new_tokens": 3},
]


@pytest.mark.parametrize("name", ["gpt2", "bart", "t5"])
@pytest.mark.parametrize(("case", "eos"), [(i, eos) for i in range(len(CASES)) for eos in (17, [5, 17, 30, 44])] + [(0, None), (1, None)])
def test_the_n_best_are_those_of_transformers(pairs, name, case, eos):
    ours, reference = pairs[name]
    options = dict(CASES[case])
    prompts = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(case))
    n = options.get("num_return_sequences", options["num_beams"])
    theirs = reference.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        **options | {"num_return_sequences": n},
        max_new_tokens=N,
        eos_token_id=eos,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    begin = prompts.shape[1] if name == "gpt2" else 1
    found = generate(ours, prompts, **options, max_new_tokens=N, eos_token_id=eos if eos is not None else ())
    beams = [b for one in found for b in (one.beams or (one,))]
    assert len(beams) == 3 * n
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    for i, beam in enumerate(beams):
        want = theirs.sequences[i, begin:].tolist()
        stop = next((j + 1 for j, t in enumerate(want) if t in ends), len(want))
        assert beam.ids == want[:stop], (i, beam.ids, want)
        assert beam.finish_reason == ("eos" if beam.ids[-1] in ends else "length")
        if options["num_beams"] > 1:
            assert beam.score == pytest.approx(theirs.sequences_scores[i].item(), abs=1e-5, rel=1e-6)


def test_the_cases_do_end_by_end_of_sequence(pairs):
    """Guards the test above: where nothing ever ends early it would show nothing about ending."""
    reasons = [
        b.finish_reason
        for name, (ours, _) in pairs.items()
        for one in generate(
            ours, torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(0)), num_beams=4, max_new_tokens=N, eos_id=[5, 17, 30, 44]
        )
        for b in one.beams
    ]
    assert reasons.count("eos") > 5, reasons


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_ragged_sources_are_masked_as_theirs(pairs, name):
    ours, reference = pairs[name]
    prompts = [[7, 9, 30, 4, 5, 12], [40, 6], [3, 8, 21, 33]]
    padded = torch.tensor([p + [0] * (6 - len(p)) for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (6 - len(p)) for p in prompts])
    theirs = reference.generate(
        padded, attention_mask=mask, num_beams=4, max_new_tokens=N, eos_token_id=17, pad_token_id=0, return_dict_in_generate=True, output_scores=True
    )
    for i, one in enumerate(generate(ours, prompts, num_beams=4, max_new_tokens=N, eos_id=17)):
        assert one.ids == theirs.sequences[i, 1 : 1 + len(one.ids)].tolist()
        assert one.score == pytest.approx(theirs.sequences_scores[i].item(), abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("eos", [None, 17, [5, 17, 30, 44]], ids=["none", "one", "four"])
@pytest.mark.parametrize("early", [True, False, "never"])
def test_a_prompt_padded_on_the_left_is_ours_without_padding(pairs, eos, early):
    ours, reference = pairs["gpt2"]
    prompts = [[7, 9, 30, 4, 5, 12], [40, 6], [3, 8, 21, 33]]
    padded = torch.tensor([[0] * (6 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (6 - len(p)) + [1] * len(p) for p in prompts])
    options = {"num_beams": 4, "length_penalty": 1.5, "early_stopping": early, "max_new_tokens": N}
    theirs = reference.generate(padded, attention_mask=mask, **options, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    for i, one in enumerate(generate(ours, prompts, **options, eos_id=() if eos is None else eos)):
        want = theirs.sequences[i, 6:].tolist()
        assert one.ids == want[: len(one.ids)] and not any(want[len(one.ids) :])
        assert one.score == pytest.approx(theirs.sequences_scores[i].item(), abs=1e-5, rel=1e-6)


def test_forced_tokens_as_bart_forces_them(pairs):
    ours, reference = pairs["bart"]
    prompts = torch.randint(1, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    options = {"num_beams": 4, "forced_bos_token_id": 8, "forced_eos_token_id": 17, "max_new_tokens": 6}
    theirs = reference.generate(prompts, **options, eos_token_id=17, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    for i, one in enumerate(generate(ours, prompts, **options, eos_id=17)):
        assert one.ids == theirs.sequences[i, 1 : 1 + len(one.ids)].tolist()
        assert one.ids[0] == 8 and one.ids[-1] == 17
        assert one.score == pytest.approx(theirs.sequences_scores[i].item(), abs=1e-5, rel=1e-6)

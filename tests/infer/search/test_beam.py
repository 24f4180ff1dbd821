"""Laws of the search: exhaustive where it can be, greedy with one beam, the same cached and not, alone and in a batch."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.cache import Cache
from glassformer.core.errors import InputError, SamplerError
from glassformer.core.tap import Record
from glassformer.infer import BeamSearch, Draw, Final, Greedy, Session, generate, stream
from glassformer.infer.search import BeamRun, Endings, Phrases
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.latent import LatentAttention
from infer.fake import Bigram, Bytes, Pieces
from infer.test_models import decoder, loud
from look import zoo

torch.set_num_threads(1)

PROMPTS = [zoo.ids(9), zoo.ids(3, 4), zoo.ids(6, 5), [7]]
KINDS: dict[str, Any] = {name: zoo.model(name) for name in zoo.DECODERS}
KINDS |= {"window": loud(decoder("window").build(seed=0)), "alibi": loud(decoder("alibi").build(seed=0))}
LATENT = LatentAttention(4, kv_lora_rank=8, d_nope=8, d_rope=4, d_value=8)
KINDS["latent"] = loud(gf.Decoder(31, 32, (gf.Block(LATENT, Gated(24), gf.RMSNorm()),) * 2).build(seed=0))
T5 = zoo.model("t5")
LONG = gf.LongRope(short=(1.0, 1.0, 1.2, 1.4), long=(1.5, 3.0, 4.0, 5.0), factor=2.0, original_context=13)
"""From the fifth new token of the longest prompt on, all rows are read anew."""
GROWN = loud(gf.Decoder(31, 32, (gf.Block(gf.Attention(4, position=gf.Rotary(scaling=LONG)), Plain(16), gf.RMSNorm()),) * 2).build(seed=0))


def tiny(v: int = 4, seed: int = 0) -> Any:
    spec = gf.Decoder(v, 16, (gf.Block(gf.Attention(2, position=gf.Rotary()), Plain(16), gf.RMSNorm()),) * 2)
    return loud(spec.build(seed=seed))


def texts(v: int, steps: int, eos: int | None):
    """Every text that can come out."""
    for n in range(1, steps + 1):
        for ids in itertools.product(range(v), repeat=n):
            if eos not in ids[:-1] and (n == steps or ids[-1] == eos):
                yield list(ids)


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], texts: list[list[int]]) -> dict[tuple[int, ...], float]:
    """Σ ln p of every text, those of one length in one pass."""
    found = {}
    for n in {len(ids) for ids in texts}:
        ids = torch.tensor([ids for ids in texts if len(ids) == n])
        lp = model(torch.cat([torch.tensor([prompt]).expand(len(ids), -1), ids], dim=1)).double().log_softmax(-1)[:, len(prompt) - 1 : -1]
        totals = lp.gather(2, ids[:, :, None]).sum(dim=(1, 2)).tolist()
        found |= {tuple(row): total for row, total in zip(ids.tolist(), totals, strict=True)}
    return found


def same(a: Any, b: Any) -> None:
    assert len(a.beams) == len(b.beams)
    for x, y in zip(a.beams, b.beams, strict=True):
        assert (x.ids, x.finish_reason) == (y.ids, y.finish_reason)
        assert x.score == pytest.approx(y.score, abs=1e-4)
        assert x.logprobs == pytest.approx(y.logprobs, abs=1e-4)


# Against everything there is


@pytest.mark.parametrize("power", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("eos", [None, 2])
def test_with_enough_beams_the_search_is_exhaustive(power, eos):
    for seed in range(3):
        model = tiny(seed=seed)
        scores = {ids: total / len(ids) ** power for ids, total in logprobs(model, [1, 3], list(texts(4, 4, eos))).items()}
        best = sorted(scores, key=lambda ids: -scores[ids])[:5]
        out = generate(model, [1, 3], num_beams=256, max_new_tokens=4, eos_id=() if eos is None else eos, length_penalty=power, early_stopping="never")
        assert [tuple(b.ids) for b in out.beams[:5]] == best
        assert [b.score for b in out.beams[:5]] == pytest.approx([scores[ids] for ids in best], abs=1e-4)


def contains(ids: list[int], phrase: list[int]) -> bool:
    return any(ids[i : i + len(phrase)] == phrase for i in range(len(ids)))


@pytest.mark.parametrize("phrases", [[[[3, 3]]], [[[0], [1, 1]]], [[[3]], [[1, 0]]]], ids=["one", "either", "two"])
def test_with_enough_beams_phrases_come_in_the_best_text_that_has_them(phrases):
    for seed in range(3):
        model = tiny(seed=seed)
        held = [ids for ids in texts(4, 4, 2) if all(any(contains(ids, a) for a in p) for p in phrases)]
        scores = {ids: total / len(ids) for ids, total in logprobs(model, [1, 3], held).items()}
        best = sorted(scores, key=lambda ids: -scores[ids])[:3]
        out = generate(model, [1, 3], num_beams=256, max_new_tokens=4, eos_id=2, early_stopping="never", force_words=phrases)
        assert [tuple(b.ids) for b in out.beams[:3]] == best
        assert [b.score for b in out.beams[:3]] == pytest.approx([scores[ids] for ids in best], abs=1e-4)


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_phrases_come_with_any_number_of_beams(beams):
    for seed in range(4):
        ids = zoo.ids(6, 20 + seed)
        phrases = [[ids[:2]], [[ids[2]], ids[3:6]]]
        for n in (3, 4, 10):
            out = generate(KINDS["llama"], [zoo.ids(5, seed), [3]], num_beams=beams, max_new_tokens=n, eos_id=9, force_words=phrases)
            for one in out:
                for beam in one.beams:
                    assert contains(beam.ids, ids[:2]) and (ids[2] in beam.ids or contains(beam.ids, ids[3:6])), beam.ids


@pytest.mark.parametrize("kind", KINDS)
def test_one_beam_is_greedy(kind):
    for eos in ((), (4, 17, 20, 26)):
        options = {"max_new_tokens": 12, "eos_id": eos}
        alone = generate(KINDS[kind], PROMPTS, **options, num_beams=1, early_stopping=True, beam_tree=True)
        for a, b in zip(generate(KINDS[kind], PROMPTS, **options), alone, strict=True):
            assert (a.ids, a.finish_reason) == (b.ids, b.finish_reason)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert b.score == pytest.approx(sum(a.logprobs) / len(a.ids), abs=1e-4)


# How it is computed does not matter


@pytest.mark.parametrize("kind", KINDS)
def test_cached_is_uncached_and_a_batch_is_each_alone(kind):
    options = {"max_new_tokens": 11, "num_beams": 3, "eos_id": (4, 17), "logprobs": 2}
    together = generate(KINDS[kind], PROMPTS, **options)
    for one, slow, prompt in zip(together, generate(KINDS[kind], PROMPTS, **options, cache=False), PROMPTS, strict=True):
        same(one, slow)
        same(one, generate(KINDS[kind], prompt, **options))


def test_the_same_for_encoder_decoders():
    options = {"max_new_tokens": 9, "num_beams": 3, "eos_id": (5, 19), "coverage_penalty": 0.3}
    together = generate(T5, PROMPTS, **options)
    for one, slow, prompt in zip(together, generate(T5, PROMPTS, **options, cache=False), PROMPTS, strict=True):
        same(one, slow)
        same(one, generate(T5, prompt, **options))


def test_links_see_each_beam_s_own_past():
    options = {"max_new_tokens": 9, "num_beams": 4, "eos_id": (4,), "no_repeat_ngram_size": 1, "min_new_tokens": 5}
    for one in generate(KINDS["gpt2"], PROMPTS, **options):
        for beam in one.beams:
            assert len(set(beam.ids)) == len(beam.ids) and (4 not in beam.ids[:5])


def test_a_prompt_is_read_once():
    model = Bigram.random()
    generate(model, [[1, 2, 3], [4, 5, 6]], num_beams=5, max_new_tokens=3)
    assert [shape for shape, _ in model.calls] == [(2, 3), (10, 1), (10, 1)]


def test_a_finished_prompt_leaves_the_batch():
    table = torch.full((4, 4), -9.0)
    table[0, 3] = table[1, 2] = table[2, 1] = table[3, 3] = 9.0
    model = Bigram(table)
    out = generate(model, [[0], [1]], num_beams=1, max_new_tokens=5, eos_id=3, early_stopping=True, beam_tree=True)
    assert out[0].ids == [3] and out[1].ids == [2, 1, 2, 1, 2]
    assert [shape for shape, _ in model.calls] == [(2, 1)] + [(1, 1)] * 4


def test_recorded_sites_hold_a_hypothesis_s_row():
    record = Record("logits")
    out = generate(KINDS["gpt2"], zoo.ids(5), num_beams=3, max_new_tokens=5, eos_id=4, beam_tree=True, tap=record)
    for h in out.tree:
        logits = record[f"step.{h.step}.logits"][h.row, -1]
        assert h.logprob == pytest.approx(float(logits.log_softmax(-1)[h.token]), abs=1e-5)


def test_top_candidates_stand_beside_each_token():
    out = generate(KINDS["gpt2"], zoo.ids(5), num_beams=3, max_new_tokens=5, eos_id=(), logprobs=4)
    for beam in out.beams:
        ids = torch.tensor([beam.prompt_ids + beam.ids])
        lp = KINDS["gpt2"](ids).log_softmax(-1)[0, len(beam.prompt_ids) - 1 : -1]
        for at, top in zip(lp, beam.top, strict=True):
            assert [c.id for c in top] == at.topk(4).indices.tolist()


# Diversity


def by_hand(table: torch.Tensor, start: int, steps: int, groups: int, width: int, penalty: float) -> list[list[tuple[list[int], float]]]:
    """Diverse beam search over a bigram table, as plainly as it can be written."""
    lp, beams = table.double().log_softmax(-1), [[([start], 0.0)] for _ in range(groups)]
    for _ in range(steps):
        chosen: Counter[int] = Counter()
        for g in range(groups):
            grown = [([*ids, t], s + float(lp[ids[-1], t]) - penalty * chosen[t]) for ids, s in beams[g] for t in range(len(table))]
            beams[g] = sorted(grown, key=lambda x: -x[1])[:width]
            chosen.update(ids[-1] for ids, _ in beams[g])
    return beams


@pytest.mark.parametrize("penalty", [0.0, 0.4, 3.0])
def test_groups_are_searched_one_after_the_other(penalty):
    for seed in range(5):
        model = Bigram.random(9, seed)
        out = generate(model, [2], num_beams=6, num_beam_groups=3, diversity_penalty=penalty, max_new_tokens=4, eos_id=(), length_penalty=0.0, beam_tree=True)
        want = by_hand(model.table.detach(), 2, 4, 3, 2, penalty)
        assert Counter((2, *beam.ids) for beam in out.beams) == Counter(tuple(ids) for group in want for ids, _ in group)  # at the last step too
        for g in range(3):
            kept = sorted((h for h in out.tree.steps[3] if h.group == g and h.fate == "finished"), key=lambda h: h.rank)
            assert [[2, *out.tree.ids(h)] for h in kept] == [ids for ids, _ in want[g]]
            assert [h.sum - h.diversity for h in kept] == pytest.approx([s for _, s in want[g]], abs=1e-5)


def test_groups_without_a_penalty_are_each_the_narrow_search():
    out = generate(KINDS["llama"], PROMPTS[0], num_beams=6, num_beam_groups=3, diversity_penalty=0.0, max_new_tokens=6, eos_id=4)
    alone = generate(KINDS["llama"], PROMPTS[0], num_beams=2, max_new_tokens=6, eos_id=4)
    assert Counter(tuple(b.ids) for b in out.beams) == Counter({tuple(b.ids): 3 for b in alone.beams})


def test_a_penalty_makes_texts_differ():
    plain = generate(KINDS["llama"], PROMPTS[0], num_beams=4, max_new_tokens=8, eos_id=())
    diverse = generate(KINDS["llama"], PROMPTS[0], num_beams=4, num_beam_groups=4, diversity_penalty=4.0, max_new_tokens=8, eos_id=(), beam_tree=True)
    assert len({b.ids[0] for b in diverse.beams}) == 4 > len({b.ids[0] for b in plain.beams})
    assert any(h.fate == "diversity" for h in diverse.tree)


# Coverage


def test_coverage_is_what_the_decoder_attended_to():
    out = generate(T5, PROMPTS[:2], num_beams=3, max_new_tokens=7, eos_id=(5, 19), coverage_penalty=0.4, length_penalty=0.6)
    for one in out:
        for beam in one.beams:
            tap = Record("decoder.blocks.*.cross.pattern")
            target = [T5.spec.start, *beam.ids]
            lp = T5(torch.tensor([beam.prompt_ids]), torch.tensor([target]), tap=tap).log_softmax(-1)[0]
            attended = tap.stack("decoder.blocks.*.cross.pattern").double().mean(dim=(0, 2))[0, : len(beam.ids)].sum(dim=0)  # the last token is never read
            coverage = 0.4 * float(attended.detach().clamp(max=1.0).log().sum())
            total = float(lp.detach()[torch.arange(len(beam.ids)), beam.ids].sum())
            assert beam.score == pytest.approx(total / len(beam.ids) ** 0.6 + coverage, abs=1e-4)


# Drawn beams


def test_drawn_beams_have_the_probabilities_of_drawing_without_putting_back():
    """One step, two beams of five tokens: the first two that are drawn are the texts."""
    model = Bigram(Bigram.random(5, 3).table.detach() * 0.4)  # none so improbable that the test of counts fails by a single one
    p = model.table[1].detach().double().softmax(-1)
    seen: Counter[frozenset[int]] = Counter()
    n = 2000
    for out in generate(model, [[1]] * n, num_beams=2, max_new_tokens=1, temperature=1.0, seed=5, eos_id=()):
        seen[frozenset(b.ids[0] for b in out.beams)] += 1
    chi = 0.0
    for a, b in itertools.combinations(range(5), 2):
        q = float(p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]))
        chi += (seen[frozenset((a, b))] - n * q) ** 2 / (n * q)
    assert chi < 27.9  # 9 degrees of freedom, p = 0.001


def test_drawn_beams_are_those_of_the_seed_whatever_the_batch():
    options = {"num_beams": 3, "max_new_tokens": 7, "eos_id": 4, "temperature": 1.3, "top_k": 12, "seed": 11}
    together = generate(KINDS["gpt2"], PROMPTS, **options)
    for one, prompt in zip(together, PROMPTS, strict=True):
        same(one, generate(KINDS["gpt2"], prompt, **options))
    other = generate(KINDS["gpt2"], PROMPTS, **options | {"seed": 12})
    assert [o.ids for o in other] != [o.ids for o in together]


def test_filters_leave_a_token_to_go_on_with():
    """As transformers does: with one end-of-sequence token a filter leaves two."""
    out = generate(KINDS["gpt2"], PROMPTS[0], num_beams=2, max_new_tokens=3, eos_id=4, top_k=1, seed=0, beam_tree=True)
    assert all(len({h.token for h in out.tree.steps[s] if h.row == row}) <= 2 for s in range(3) for row in range(2))
    assert len(out.tree.steps[0]) == 2


# Text


def test_texts_end_before_a_stop_string():
    pieces = Pieces("a", "b", "END", "E", "N", "D")
    table = torch.full((6, 6), -3.0)
    for now, then in [(0, 1), (1, 3), (3, 4), (4, 5), (5, 0)]:  # a b E N D a …
        table[now, then] = 3.0
    out = generate(Bigram(table), "a", tokenizer=pieces, num_beams=3, max_new_tokens=9, stop="END", beam_tree=True)
    assert (out.text, out.finish_reason, out.ids) == ("b", "stop", [1, 3, 4, 5])
    assert out.tree.best[0].ending == "stop"
    assert all("END" not in b.text for b in out.beams)


def test_bytes_of_a_character_come_together():
    out = generate(Bigram.cycle([*"é!".encode()], 257), "é!", tokenizer=Bytes(), num_beams=2, max_new_tokens=6, eos_id=())
    assert out.text == "é!é!" and out.beams[0].text == out.text


class Sized(Pieces):
    """A vocabulary that says its size."""

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)


def test_a_rule_that_is_met_ends_the_text():
    pieces = Sized("0", "1", "2", "x")
    out = generate(Bigram.random(4, 5), [0], tokenizer=pieces, num_beams=3, max_new_tokens=8, regex="[012]{2}x|1", beam_tree=True)
    assert out.text in ("1", "00x", "01x", "02x", "10x", "11x", "12x", "20x", "21x", "22x")
    assert len({b.text for b in out.beams}) == 3 and all(b.finish_reason == "stop" and b.text[-1] in "1x" for b in out.beams)
    assert [out.tree.ids(h) for h in out.tree.best] == [b.ids for b in out.beams]
    free = generate(Bigram.random(4, 5), [0], tokenizer=pieces, num_beams=3, max_new_tokens=8, allowed=lambda ids: [1, 2])
    assert set(free.ids) <= {1, 2}


def test_a_rule_that_is_met_before_the_phrases_is_no_text():
    with pytest.raises(SamplerError, match="before its phrases had come"):
        generate(Bigram.random(4, 5), [0], tokenizer=Sized("0", "1", "2", "x"), num_beams=3, max_new_tokens=8, regex="00", force_words=[[3]])


def test_forced_words_as_text():
    pieces = Pieces("a", "b", "c", " ", " c")
    out = generate(Bigram.random(5, 2), "ab", tokenizer=pieces, num_beams=3, max_new_tokens=4, force_words="c")
    assert all("c" in b.text for b in out.beams)
    assert generate(Bigram.random(5, 2), "ab", tokenizer=pieces, num_beams=3, max_new_tokens=4, force_words_ids=[[2]]).ids


# What does not go


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 0}, "at least 1 beginning"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3"),
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "does not divide"),
        ({"num_beams": 4, "num_beam_groups": 2}, "without diversity_penalty"),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "there is one group"),
        ({"length_penalty": 0.5}, "length_penalty is about a search"),
        ({"beam_tree": True}, "beam_tree is about a search"),
        ({"num_beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
        ({"num_beams": 2, "length_penalty": 4000.0}, "take a number nearer to 1"),
        ({"num_beams": 2, "coverage_penalty": -1.0}, "0 \\(off\\) or more"),
        ({"num_beams": 2, "coverage_penalty": 1.0}, "is for encoder-decoders"),
        ({"num_beams": 2, "early_stopping": "always"}, "early_stopping"),
        ({"num_beams": 2, "trace": True}, "beam_tree=True"),
        ({"num_beams": 2, "mirostat": 2}, "steers by the single token"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "temperature": 0.5}, "but the sampler draws"),
        ({"num_beams": 2, "force_words": [[3]], "top_k": 5}, "but the sampler draws"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "force_words": [[3]]}, "both divide the beams"),
        ({"num_beams": 2, "force_words": [[3, 4, 5], [6]], "max_new_tokens": 3}, "take 4 tokens one after another, but max_new_tokens is 3"),
        ({"num_beams": 2, "force_words": [[3, 4]], "eos_id": 4}, "which is end-of-sequence"),
        ({"num_beams": 2, "force_words": [[99]]}, "the vocabulary has 31 tokens"),
        ({"num_beams": 2, "force_words": [3]}, r"write \[\[3\]\]"),
        ({"num_beams": 2, "force_words": [[]]}, "is no phrase"),
        ({"num_beams": 2, "force_words": ["home"]}, "without a tokenizer"),
        ({"num_beams": 2, "force_words": [[3]], "suppress": [3], "max_new_tokens": 2}, "ended without a text"),
        ({"num_beams": 2, "suppress": list(range(31))}, "no token is left"),
        ({"num_beams": 2, "draft": KINDS["gpt2"]}, "draft does not go with num_beams"),
        ({"num_beam": 2}, "Did you mean 'num_beams'"),
    ],
)
def test_what_does_not_go_together_is_said(options, says):
    with pytest.raises(SamplerError, match=says):
        generate(KINDS["gpt2"], [5, 6], **{"max_new_tokens": 5} | options)


def test_a_search_does_not_stream_and_keeps_its_own_cache():
    with pytest.raises(SamplerError, match="only at the end"):
        stream(KINDS["gpt2"], [5], num_beams=2, max_new_tokens=4)
    with pytest.raises(SamplerError, match="only at the end"):
        generate(KINDS["gpt2"], [5], num_beams=2, max_new_tokens=4, stream=print)
    with pytest.raises(SamplerError, match="makes its own"):
        generate(KINDS["gpt2"], [5], num_beams=2, cache=KINDS["gpt2"].cache())
    with pytest.raises(InputError, match="64 learned positions"):
        generate(KINDS["gpt2"], [5], num_beams=2, max_new_tokens=70)


def test_nan_is_named():
    table = torch.zeros(5, 5)
    table[2] = math.nan
    with pytest.raises(SamplerError, match="gave NaN at step 0"):
        generate(Bigram(table), [2], num_beams=2)


@gf.part
class PickLast(Final):
    """The token with the highest id."""

    def choose(self, logits, state=None):
        return torch.full(logits.shape[:1], logits.shape[1] - 1)


def test_chains_must_end_in_a_choice():
    assert generate(KINDS["gpt2"], [5], num_beams=2, max_new_tokens=2, sampler=Greedy()).beams
    assert generate(KINDS["gpt2"], [5], num_beams=2, max_new_tokens=2, sampler=Draw(3)).beams
    with pytest.raises(SamplerError, match="ends with Greedy"):
        generate(KINDS["gpt2"], [5], num_beams=2, max_new_tokens=2, sampler=PickLast())


def test_the_parts_can_be_used_alone():
    session = Session(KINDS["gpt2"], [[5, 6], [7]], Greedy(), room=4)
    found = BeamRun(session, BeamSearch(3), Endings(frozenset({4}), 4), Phrases([[(9,)]]), record=True).run()
    assert all(9 in [n.token for n in best.path()] for one in found for best in one.best)
    assert all(one.nodes for one in found)


@pytest.mark.parametrize("kind", [*KINDS, "t5", "longrope"])
@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.7}], ids=["one", "groups"])
def test_rows_that_are_moved_in_place_change_no_bit(kind, options, monkeypatch):
    model = {"t5": T5, "longrope": GROWN, **KINDS}[kind]
    asked: dict[str, Any] = {"max_new_tokens": 12, "eos_id": (4, 17), "logprobs": 2, **options}
    moved: list[bool] = []
    reorder = Cache.reorder

    def watched(cache: Cache, rows: Any, shared: Any = None) -> Cache:
        made = reorder(cache, rows, shared)
        moved.append(made is cache and max(shared) > 1)
        return made

    monkeypatch.setattr(Cache, "reorder", watched)
    quick = generate(model, PROMPTS, **asked)
    assert any(moved)
    monkeypatch.setattr(Cache, "reorder", lambda cache, rows, shared=None: cache.select(rows))
    for a, b in zip(quick, generate(model, PROMPTS, **asked), strict=True):
        assert [(x.ids, x.score, x.logprobs, x.top) for x in a.beams] == [(x.ids, x.score, x.logprobs, x.top) for x in b.beams]

"""Steering vectors: what they are, and that an addition holds in forward passes, cached and uncached generation, and ragged batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from glassformer.core.errors import InputError, SiteError, WeightsError
from glassformer.core.tap import Edit, Record
from glassformer.infer.generate import generate
from glassformer.look.edits import load_edits
from glassformer.look.steering import SteeringVector, steer, steering_vector
from glassformer.look.subject import read
from look import zoo

TEXT = zoo.ids(6)


def made(name: str = "llama", size: float = 3.0, layer: int = 1) -> tuple[Any, SteeringVector]:
    model = zoo.model(name)
    return model, SteeringVector(size * torch.randn(zoo.D, generator=torch.Generator().manual_seed(0)), layer)


def test_the_vector_is_the_difference_of_means() -> None:
    model = zoo.model("llama").double()
    good, bad = [zoo.ids(5, 1), zoo.ids(7, 2)], [zoo.ids(4, 3)]
    found = steering_vector(model, good, bad, 2)
    values = [read(model, t).run("blocks.2.resid_pre")[0]["blocks.2.resid_pre"][0, -1] for t in (*good, *bad)]
    torch.testing.assert_close(found.vector, ((values[0] + values[1]) / 2 - values[2]).float())
    mean = steering_vector(model, good[0], bad[0], 2, None)
    values = [read(model, t).run("blocks.2.resid_pre")[0]["blocks.2.resid_pre"][0].mean(0) for t in (good[0], bad[0])]
    torch.testing.assert_close(mean.vector, (values[0] - values[1]).float())
    assert found.path == "blocks.2.resid_pre" and found.layer == 2 and found.norm > 0
    assert steering_vector(model, good, bad, 1, unit=True).vector.norm() == pytest.approx(1.0)
    each = steering_vector(model, good[0], bad[0], 1, "each")  # activation addition: one vector per position
    assert each.vector.shape == (5, zoo.D)
    assert steering_vector(model, good, bad, 1, site="ffn.out").path == "blocks.1.ffn.out"


def test_an_addition_is_an_edit() -> None:
    model, vector = made()
    tokens = torch.tensor([TEXT])
    add = 2 * vector.vector

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[:, 3:] += add
        return y

    with torch.no_grad():
        torch.testing.assert_close(model(tokens, tap=vector.tap(2, 3)), model(tokens, tap=Edit("blocks.1.resid_pre", by_hand)))
        torch.testing.assert_close(model(tokens, tap=vector.tap(2, 3)), model(tokens, tap=vector.tap(2, slice(3, None))))
        torch.testing.assert_close(model(tokens, tap=vector.tap(2, [3, 4, 5])), model(tokens, tap=vector.tap(2, 3)))
        rows = SteeringVector(torch.stack([vector.vector, 0 * vector.vector, vector.vector]), 1)
        torch.testing.assert_close(model(tokens, tap=rows.tap(1, 2)), model(tokens, tap=vector.tap(1, [2, 4])))


def test_a_vector_says_what_it_is() -> None:
    model = zoo.model("llama")
    vector = steering_vector(model, "the old man", ["a red fox", "a big dog"], 1, tokenizer=zoo.words())
    said = repr(vector)
    assert said == (
        f"SteeringVector: a vector of 16 numbers at blocks.1.resid_pre, length {float(vector.vector.norm()):.4g}, "
        f"from 'the old man' − 'a red fox' and 1 more; what it was made from has length {vector.norm:.4g}"
    )
    assert "tensor" not in said and "9 vectors of 16 numbers" in repr(SteeringVector(torch.ones(9, 16), 1))


def test_a_vector_is_kept_as_a_file(tmp_path: Path) -> None:
    for name in ("llama", "t5"):
        model = zoo.model(name)
        source = {"source": zoo.ids(5)} if name == "t5" else {}
        vector = 2 * steering_vector(model, zoo.ids(4, 1), zoo.ids(4, 2), 1, site="ffn.out", **source)
        again = SteeringVector.load(vector.save(tmp_path / "v.safetensors"), model)
        assert torch.equal(again.vector, vector.vector) and repr(again) == repr(vector) and again.path == vector.path and again.norm == vector.norm
    rows = SteeringVector(torch.randn(5, zoo.D), 1)
    assert torch.equal(SteeringVector.load(rows.save(tmp_path / "r.safetensors"), zoo.model("llama")).vector, rows.vector)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    model, (_, vector) = zoo.model("llama"), made()
    file = vector.save(tmp_path / "v.safetensors")
    wrong = SteeringVector(torch.ones(5), 1).save(tmp_path / "narrow.safetensors")
    late = SteeringVector(torch.ones(zoo.D), 7).save(tmp_path / "late.safetensors")
    about = {"version": 1, "layer": 1, "site": "resid_pre", "label": "", "norm": 0.0, "prefix": ""}
    plain = {
        "plain": None,
        "other": about | {"version": 2},
        "minus": about | {"layer": -1},
        "word": about | {"norm": "x"},
        "far": about | {"norm": float("inf")},
        "five": about | {"label": 5},
    }
    for name, text in plain.items():
        save_file({"vector": torch.ones(16)}, tmp_path / f"{name}.safetensors", metadata=None if text is None else {"glassformer.steering": json.dumps(text)})
    save_file({"vector": torch.full((16,), torch.nan)}, tmp_path / "holes.safetensors", metadata={"glassformer.steering": json.dumps(about)})
    for unfit, says in (
        (SteeringVector(torch.full((16,), torch.inf), 1), "w.safetensors: the vector holds inf, but finite numbers are needed"),
        (SteeringVector(torch.ones(16), 1, norm=float("nan")), "w.safetensors: norm is nan, but a finite number is needed"),
    ):
        with pytest.raises(InputError, match=says):
            unfit.save(tmp_path / "w.safetensors")
        assert not (tmp_path / "w.safetensors").exists()
    for path, says in (
        (wrong, r"vector has shape \[5\], but at 'blocks.1.resid_pre' it must be \[16\]"),
        (late, "'blocks.7.resid_pre' meets no site of this model"),
        (tmp_path / "none.safetensors", "There is no steering vector at"),
        (tmp_path / "plain.safetensors", "plain.safetensors holds no steering vector: SteeringVector.save writes one"),
        (tmp_path / "other.safetensors", "version 2 was given, and version 1 is read here"),
        (tmp_path / "minus.safetensors", "layer is -1, but a whole number of at least 0 is needed"),
        (tmp_path / "word.safetensors", "norm is 'x', but a finite number is needed: make the vector again"),
        (tmp_path / "far.safetensors", "far.safetensors: norm is inf, but a finite number is needed: make the vector again"),
        (tmp_path / "five.safetensors", "five.safetensors: label is 5, but a text is needed: make the vector again"),
        (tmp_path / "holes.safetensors", "holes.safetensors: the vector holds nan, but finite numbers are needed: make the vector again"),
        (5, "A file is named by its path, but a whole number was given"),
    ):
        with pytest.raises((InputError, SiteError), match=says):
            SteeringVector.load(path, model)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(WeightsError, match="v.safetensors"):
        SteeringVector.load(file)
    with pytest.raises(InputError, match="ends in '.json', but a steering vector is saved as .safetensors"):
        vector.save(tmp_path / "v.json")
    with pytest.raises(InputError, match="cannot be written"):
        vector.save(tmp_path / "none" / "v.safetensors")
    with pytest.raises(InputError, match=r"vector has shape \[5\]"):
        steer(model, TEXT, SteeringVector(torch.ones(5), 1), max_new_tokens=1)


@pytest.mark.parametrize("positions", [None, 2, slice(1, 4), [0, 3]])
def test_a_vector_is_an_edit_too(positions: Any, tmp_path: Path) -> None:
    model, vector = made()
    tokens = torch.tensor([TEXT])
    saved = load_edits(vector.intervention(1.5, positions, "push").save(tmp_path / "push.json"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, tap=saved.tap(model)), model(tokens, tap=vector.tap(1.5, positions)))
        if positions in (None, 2):
            rows = SteeringVector(torch.randn(3, zoo.D), 1)
            torch.testing.assert_close(model(tokens, tap=rows.intervention(2, positions).tap(model)), model(tokens, tap=rows.tap(2, positions)))
    with pytest.raises(InputError, match="runs without gaps"):
        vector.intervention(1, slice(0, 6, 2))


@pytest.mark.parametrize("positions", [None, 7, 2, slice(5, 9), [6, 8], 3])
def test_places_hold_in_cached_generation(positions: Any) -> None:
    """Counted in the whole row: the cached run gives what the uncached one gives, and the streams are changed exactly there."""
    model, vector = made()
    tap = vector.tap(1.5, positions)
    cached = generate(model, TEXT, max_new_tokens=8, tap=tap, eos_id=())
    plain = generate(model, TEXT, max_new_tokens=8, tap=tap, cache=False, eos_id=())
    assert cached.ids == plain.ids
    torch.testing.assert_close(torch.tensor(cached.logprobs), torch.tensor(plain.logprobs), atol=1e-4, rtol=1e-4)
    whole = torch.tensor([TEXT + cached.ids])
    before, after = Record("blocks.1.resid_pre"), Record("blocks.1.resid_pre")
    with torch.no_grad():
        model(whole, tap=before | tap | after)
    moved = (after["blocks.1.resid_pre"] - before["blocks.1.resid_pre"])[0].norm(dim=-1) > 0
    want = {None: range(14), 7: range(7, 14), 2: range(2, 14), 3: range(3, 14)}.get(positions if not isinstance(positions, slice | list) else "", positions)
    assert moved.nonzero().flatten().tolist() == (list(range(14))[want] if isinstance(want, slice) else list(want))


def test_only_the_running_pass_is_kept() -> None:
    """One entry whatever the number of steps; the two halves of an encoder-decoder have one each."""
    model, vector = made()
    tap = vector.tap(1.5, 7)
    generate(model, TEXT, max_new_tokens=12, tap=tap, eos_id=())
    assert len(tap._index) == 1
    both = SteeringVector(vector.vector, 1, prefix="decoder.").tap(1.0)
    generate(zoo.model("t5"), zoo.ids(5), max_new_tokens=4, tap=both | Record("encoder.blocks.0.resid_pre"), eos_id=())
    assert set(both._index) == {"encoder", "decoder"}


def test_ragged_rows_count_their_own_places() -> None:
    model, vector = made()
    prompts = [TEXT, TEXT[:3]]
    both = generate(model, prompts, max_new_tokens=6, tap=vector.tap(1.5, 5), eos_id=())
    alone = [generate(model, p, max_new_tokens=6, tap=vector.tap(1.5, 5), eos_id=()) for p in prompts]
    assert [o.ids for o in both] == [o.ids for o in alone]


def test_an_encoder_decoder_is_steered_while_it_writes() -> None:
    model = zoo.model("t5")
    vector = steering_vector(model, zoo.ids(4, 1), zoo.ids(4, 2), 1, source=zoo.ids(5))
    assert vector.path == "decoder.blocks.1.resid_pre"
    steered = generate(model, zoo.ids(5), max_new_tokens=5, tap=vector.tap(20.0, 1), eos_id=())
    plain = generate(model, zoo.ids(5), max_new_tokens=5, tap=vector.tap(20.0, 1), cache=False, eos_id=())
    assert steered.ids == plain.ids
    with pytest.raises(InputError, match="this model continues no text"):
        steer(model, zoo.ids(4), vector, source=zoo.ids(5))


def test_steer_shows_them_side_by_side() -> None:
    model, vector = made(size=20)
    found = steer(model, TEXT, vector, [1.0, 5.0], max_new_tokens=5, eos_id=())
    lines = replace(found, texts=("one\ntwo", *found.texts[1:]))
    assert lines.grid().rows[0][1] == "one⏎two" and lines.texts[0] == "one\ntwo"
    assert found.strengths == (0.0, 1.0, 5.0) and [len(i) for i in found.ids] == [5, 5, 5]
    assert found.ids[0] == tuple(generate(model, TEXT, max_new_tokens=5, eos_id=()).ids)
    assert found.kl[0] == 0 and found.kl[2] > 0 and found.logprob[0] > found.logprob[2]
    assert "continuation" in str(found) and found.plot() is not None and found.plot(dark=True) is not None
    assert len(steer(model, TEXT, 2 * vector, 1, max_new_tokens=2, eos_id=()).ids) == 2


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: steering_vector(m, zoo.ids(4), zoo.ids(4), 1), InputError, "give the same mean there"),
        (lambda m: steering_vector(m, [], zoo.ids(4), 1), InputError, "No positive text was given"),
        (lambda m: steering_vector(m, zoo.ids(4), zoo.ids(4, 1), 9), SiteError, "Layer 9 was asked for"),
        (lambda m: steering_vector(m, zoo.ids(4), zoo.ids(4, 1), 1, "first"), InputError, "position='first': a number, None"),
        (lambda m: steering_vector(m, [zoo.ids(4)] * 2, zoo.ids(4, 1), 1, "each"), InputError, "is the difference of two texts, but 2 and 1"),
        (lambda m: steering_vector(m, zoo.ids(4), zoo.ids(4, 1), 1, site="attn.z"), InputError, "a direction of the stream is added"),
        (lambda m: SteeringVector(torch.ones(zoo.D), 1).tap(1, -1), InputError, "counted from 0, not from the end"),
        (lambda m: m(torch.tensor([TEXT]), tap=SteeringVector(torch.ones(5), 1).tap()), InputError, "The vector has 5 numbers, but the value at"),
        (lambda m: SteeringVector(torch.ones(1, 2, 3), 1).tap(), InputError, "one direction .d. is added"),
    ],
)
def test_what_cannot_steer_is_said(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(zoo.model("llama"))

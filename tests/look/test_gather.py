"""What :func:`gather` keeps is what the model computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from glassformer.core.errors import InputError
from glassformer.core.tap import Edit, Record
from glassformer.look import gather, head_figures
from glassformer.models.presets import preset
from look.made import Letters, induction
from tools import DECODERS, ENCODERS, built, each, fresh

TEXT = "hello, hello world"


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    """As the page runs the model: a forward pass that could be differentiated picks other kernels and rounds differently."""
    with torch.no_grad():
        yield


def ids_of(text: str, around: bool = False) -> torch.Tensor:
    return torch.tensor([Letters().encode(text, add_special=around)])


@each([*DECODERS, *ENCODERS])
def test_patterns_and_output_are_the_recorded_ones_for_every_architecture(name: str) -> None:
    model = built(name)
    inside = gather(model, Letters(), TEXT)
    tokens = ids_of(TEXT, around=name in ENCODERS)
    record = Record("blocks.*.attn.pattern")
    logits = model(tokens, tap=record)
    assert inside.ids == tuple(tokens[0].tolist())
    assert len(inside.patterns) == len(model.spec.blocks) == inside.card.layers
    for i, pattern in enumerate(inside.patterns):
        np.testing.assert_array_equal(pattern, record[f"blocks.{i}.attn.pattern"][0].numpy())
    if inside.lens is not None:
        np.testing.assert_allclose(inside.lens.p[-1], logits[0].softmax(-1).topk(5).values.numpy(), rtol=1e-5)
        np.testing.assert_array_equal(inside.lens.ids[-1], logits[0].topk(5).indices.numpy())
    assert (inside.lens is None) == (name in {"tagger", "discriminator", "classifier", "classifier-last", "vector"})
    assert inside.card.kind == ("encoder" if name in ENCODERS else "decoder")
    assert inside.causal == (name in DECODERS or name == "causal-encoder")


def test_a_lens_row_is_the_final_norm_and_the_read_out_on_that_stream() -> None:
    model = built("gpt2")
    inside = gather(model, Letters(), TEXT)
    record = Record("blocks.1.resid_pre")
    model(ids_of(TEXT), tap=record)
    stream = record["blocks.1.resid_pre"]
    # Written out: layer norm by hand, then the tied matrix.
    norm = model.final_norm
    z = (stream - stream.mean(-1, keepdim=True)) / (stream.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    p = ((z * norm.weight + norm.bias) @ model.embed.weight.T).softmax(-1)[0]
    assert inside.lens is not None
    assert inside.lens.rows == ("embedding", "block 0", "output")
    np.testing.assert_allclose(inside.lens.p[1], p.topk(5).values.numpy(), rtol=1e-4)
    np.testing.assert_allclose(inside.lens.entropy[1], -(p * p.log2()).sum(-1).numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox", "bert", "vaswani-decoder", "tanh", "experts"])
def test_a_lens_row_is_what_the_model_would_say_if_it_stopped_there(name: str) -> None:
    """The last block hands on what it got: the model then reads out the stream before it, which is the lens row."""
    model = built(name)
    inside = gather(model, Letters(), TEXT)
    tokens, last = torch.tensor([inside.ids]), f"blocks.{len(model.spec.blocks) - 1}"
    entered = Record(f"{last}.resid_pre")
    model(tokens, tap=entered)
    stopped = model(tokens, tap=Edit(f"{last}.resid_post", lambda _: entered[f"{last}.resid_pre"]))
    assert inside.lens is not None
    np.testing.assert_allclose(inside.lens.p[-2], stopped[0].softmax(-1).topk(5).values.numpy(), rtol=1e-4)


def test_the_lens_follows_the_final_choice_and_the_next_token() -> None:
    inside = gather(built("llama"), Letters(), TEXT)
    lens = inside.lens
    assert lens is not None
    np.testing.assert_array_equal(lens.choice_rank[-1], 1)
    np.testing.assert_allclose(lens.choice_p[-1], lens.p[-1, :, 0])
    assert np.isnan(lens.next_p[:, -1]).all()  # nothing follows the last token
    assert (lens.next_rank[:, -1] == 0).all()
    p = built("llama")(ids_of(TEXT))[0].softmax(-1)
    following = torch.tensor(inside.ids[1:])
    np.testing.assert_allclose(lens.next_p[-1, :-1], p[torch.arange(len(following)), following].numpy(), rtol=1e-5)
    ranks = [(row > row[i]).sum().item() + 1 for row, i in zip(p, following, strict=False)]
    assert lens.next_rank[-1, :-1].tolist() == ranks


def test_an_encoder_is_asked_about_the_token_in_its_place_with_what_stands_around_texts() -> None:
    inside = gather(built("bert"), Letters(), "hello")
    assert inside.pieces == ("[", "h", "e", "l", "l", "o", "]")
    lens = inside.lens
    assert lens is not None
    p = built("bert")(torch.tensor([inside.ids]))[0].softmax(-1)
    np.testing.assert_allclose(lens.next_p[-1], p[torch.arange(7), torch.tensor(inside.ids)].numpy(), rtol=1e-5)


@pytest.mark.parametrize(("name", "adds"), [("llama", True), ("gptj", True), ("experts", True), ("gemma2", False), ("bert", False)])
def test_norms_are_the_lengths_of_what_the_layers_return(name: str, adds: bool) -> None:
    model = built(name)
    inside = gather(model, Letters(), TEXT)
    record = Record("blocks.*.attn.out", "blocks.*.resid_pre", "resid_final")
    model(torch.tensor([inside.ids]), tap=record)
    np.testing.assert_allclose(inside.norms.attn[1], record["blocks.1.attn.out"][0].norm(dim=-1).numpy(), rtol=1e-5)
    np.testing.assert_allclose(inside.norms.stream[0], record["blocks.0.resid_pre"][0].norm(dim=-1).numpy(), rtol=1e-5)
    assert inside.norms.ffn.min() > 0
    assert inside.norms.stream.shape == (3, len(inside.ids))
    assert inside.norms.adds is adds


@pytest.mark.parametrize(("name", "one"), [("llama", True), ("sigmoid", False), ("plus-one", False), ("sink", False)])
def test_rows_sum_to_one_only_under_softmax(name: str, one: bool) -> None:
    low, high = gather(built(name), Letters(), TEXT).row_sums
    assert (abs(low - 1) < 1e-5 and abs(high - 1) < 1e-5) is one


@pytest.mark.parametrize(("name", "size"), [("window", 4), ("sigmoid-bias", 5), ("gemma2", 4)])
def test_masked_is_what_the_mask_forbids(name: str, size: int) -> None:
    inside = gather(built(name), Letters(), TEXT)
    q, s = np.indices((len(inside.ids),) * 2)
    np.testing.assert_array_equal(inside.masked[0], (s > q) | (s <= q - size))
    assert inside.causal
    assert not gather(built("bert"), Letters(), TEXT).masked[0].any()


def test_a_weight_of_zero_is_not_taken_for_a_mask() -> None:
    """Soft-max in float32 underflows where scores differ by more than about 100."""
    model = fresh("bare")
    for block in model.blocks:
        block.attn.qkv.weight.mul_(30)
    inside = gather(model, Letters(), TEXT)
    assert (np.tril(inside.patterns[0][0] == 0)).any()
    np.testing.assert_array_equal(inside.masked[0], np.triu(np.ones_like(inside.masked[0]), 1))


def test_the_model_is_left_as_it_was() -> None:
    model = fresh("halves").train()  # has dropout
    a, b = gather(model, Letters(), TEXT), gather(model, Letters(), TEXT)
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    np.testing.assert_array_equal(a.patterns[0], b.patterns[0])  # no dropout while looking


def test_every_part_is_run_in_evaluation_mode_and_is_left_in_its_own() -> None:
    model = built("gpt2")
    for root, part in ((True, False), (False, True)):
        model.train(root).blocks[0].train(part)
        modes = [m.training for m in model.modules()]
        seen: list[bool] = []
        watch = model.blocks[0].register_forward_pre_hook(lambda module, _, seen=seen: seen.append(module.training))
        gather(model, Letters(), TEXT)
        watch.remove()
        assert seen == [False]
        assert [m.training for m in model.modules()] == modes


def test_bf16_models_can_be_looked_into() -> None:
    inside = gather(preset("tiny", vocab_size=31).build(seed=0, dtype="bf16"), Letters(), TEXT)
    assert inside.norms.adds
    assert all(p.dtype == np.float32 for p in inside.patterns)


def test_head_figures_of_known_patterns() -> None:
    ids = (1, 2, 3, 1, 2, 3)
    t = len(ids)
    uniform = np.tril(np.ones((t, t))) / np.arange(1, t + 1)[:, None]
    previous = np.eye(t)[np.maximum(np.arange(t) - 1, 0)]
    first = np.eye(t)[np.zeros(t, int)]
    itself = np.eye(t)
    found = head_figures(np.stack([uniform, previous, first, itself, induction(ids)]).astype(np.float32), ids)
    entropy, distance, own, before, start, copy = found.T
    np.testing.assert_allclose(entropy, [np.log2(np.arange(1, 7)).mean(), 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(distance[:4], [np.mean([q / 2 for q in range(6)]), 5 / 6, 15 / 6, 0])
    assert (own[3], before[1], start[2], copy[4]) == (1, 1, 1, 1)
    assert copy[0] == pytest.approx(np.mean([1 / 4, 1 / 5, 1 / 6]), rel=1e-6)
    assert (copy[1], copy[3]) == (0, 0)
    assert np.isnan(head_figures(itself[None, :3, :3].astype(np.float32), (1, 2, 3))[0, 5])  # no token occurs twice
    alone = head_figures(np.ones((1, 1, 1), np.float32), (1,))[0]
    assert np.isnan(alone[3:]).all()
    assert alone[:3].tolist() == [0, 0, 1]


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match="The text '' has 0 tokens, but a page needs at least 1: give some text."):
        gather(built("gpt2"), Letters(), "")


def test_a_long_text_is_refused_with_what_to_do() -> None:
    with pytest.raises(InputError, match=r"The text has 513 tokens, but a page shows at most 512 .*: give a shorter text, such as its first 512 tokens"):
        gather(built("llama"), Letters(), "a" * 513)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    class Foreign(Letters):
        def encode(self, text: str, *, add_special: bool = False) -> list[int]:
            return [3, 31]

    with pytest.raises(InputError, match="token id 31, but the model's vocabulary ends at 30: use the tokenizer that was saved with this model"):
        gather(built("gpt2"), Foreign(), "ab")


@pytest.mark.parametrize(
    ("half", "said"),
    [
        ("", "this model is an EncoderDecoder, which reads two texts: give its encoder"),
        ("decoder", "has cross-attention .* give a model without cross-attention"),
    ],
)
def test_a_model_that_reads_two_texts_is_refused(half: str, said: str) -> None:
    model: Any = built("t5")
    with pytest.raises(InputError, match=said):
        gather(getattr(model, half) if half else model, Letters(), TEXT)


def test_the_encoder_of_a_pair_has_patterns_and_no_lens() -> None:
    inside = gather(built("t5").encoder, Letters(), TEXT)
    assert inside.lens is None
    assert not inside.causal

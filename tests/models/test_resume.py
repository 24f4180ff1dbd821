"""A pass that goes on from a stream gives what the whole pass gives, to the bit; with a cache, from the tokens that it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer.core.errors import InputError
from look import zoo

STACKS = [name for name in zoo.SPECS if name != "t5"]


@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_it_is_the_rest_of_the_pass(name: str) -> None:
    model, tokens = zoo.model(name), torch.tensor([zoo.ids(), zoo.ids(seed=1)])
    record = gf.Record("blocks.*.resid_pre", "blocks.*.resid_post", "blocks.*.attn.pattern")
    logits = model(tokens, tap=record)
    streams = [record[f"blocks.{i}.resid_pre"] for i in range(len(model.blocks))] + [record[f"blocks.{len(model.blocks) - 1}.resid_post"]]
    for layer, stream in enumerate(streams):
        again = gf.Record("**.resid_final")
        assert torch.equal(model.resume(stream, layer, tap=again), logits)
        assert again.paths == ["resid_final"]
    last = gf.Record("blocks.1.attn.pattern")
    torch.testing.assert_close(model.resume(streams[1], 1, keep=1, tap=last), logits[:, -1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(last["blocks.1.attn.pattern"], record["blocks.1.attn.pattern"]), "sites keep their numbers of layers"


@torch.no_grad()
def test_with_lengths_a_mask_and_a_cache() -> None:
    model, tokens = zoo.model("llama"), torch.tensor([zoo.ids(8), zoo.ids(8, seed=1)])
    record = gf.Record("blocks.1.resid_pre")
    whole = model(tokens, mask=gf.Window(3), lengths=[8, 5], tap=record)
    assert torch.equal(model.resume(record["blocks.1.resid_pre"], 1, mask=gf.Window(3), lengths=[8, 5]), whole)
    cache = model.cache(2, 16)
    model(tokens[:, :5], cache=cache)
    plain = gf.Record("blocks.2.resid_pre")
    logits = model(tokens, tap=plain)
    rest = model.resume(plain["blocks.2.resid_pre"][:, 5:], 2, cache=cache)
    torch.testing.assert_close(rest, logits[:, 5:], atol=1e-5, rtol=1e-5)
    assert cache.lengths == [8, 8]


@torch.no_grad()
def test_a_decoder_goes_on_with_its_memory() -> None:
    model = zoo.model("t5")
    source, target = torch.tensor([zoo.ids(6)]), torch.tensor([zoo.ids(5)])
    record = gf.Record("decoder.blocks.1.resid_pre")
    logits = model(source, target, tap=record)
    memory = model.encode(source)
    assert torch.equal(model.decoder.resume(record["decoder.blocks.1.resid_pre"], 1, memory=memory), logits)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.resume(torch.zeros(1, 2, 16), 4), "This model has 3 blocks, so a pass goes on at block 0 to 3; 4 was given."),
        (lambda m: m.resume(torch.zeros(1, 2, 16), "1"), "a pass goes on at block 0 to 3; '1' was given"),
        (lambda m: m.resume(torch.zeros(2, 16), 1), r"The stream is \(2, 16\), but this model's blocks read \[batch, position, d_model=16\]."),
        (lambda m: m.resume([1], 1), "The stream is a list, but this model's blocks read"),
        (lambda m: m.resume(torch.zeros(1, 2, 16), 1, tokens=1), "resume\\(\\) takes no option 'tokens'; it takes keep, tap, path, positions"),
    ],
)
def test_errors(call: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call(zoo.model("gpt2"))

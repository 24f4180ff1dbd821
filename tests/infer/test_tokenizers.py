"""Streaming with real tokenizers of every kind: the pieces put together are the text."""

from __future__ import annotations

import pytest
import torch

from glassformer.infer import generate, stream
from glassformer.text import train
from infer.fake import Bigram

TEXT = "The quick brown fox — naïve, 日本 🙂 — jumps over; don't stop. "


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram", "bytes", "characters", "words"])
def tokenizer(request):
    return train(request.param, texts=[TEXT * 30], vocab_size={"bpe": 320, "bytes": None}.get(request.param, 90), special=["<eos>"])


def says(ids, v):
    table = torch.full((v, v), -50.0)
    model = Bigram(table)
    model.forward = lambda tokens, *, keep=None, **_: by_place(tokens, ids, v)
    return model


def by_place(tokens, ids, v):
    """A model that recites ``ids`` whatever it reads (used without a cache, so it sees its own place)."""
    logits = torch.full((1, 1, v), -50.0)
    logits[0, 0, ids[tokens.shape[1] % len(ids)]] = 50.0
    return logits


def test_the_pieces_of_a_stream_are_the_text(tokenizer):
    ids = tokenizer.encode(TEXT * 3)
    model = says(ids, tokenizer.vocab_size)
    events = list(stream(model, ids[:5], tokenizer=tokenizer, max_new_tokens=len(ids) - 5, cache=False, eos_id=()))
    assert [e.id for e in events] == ids[5:]
    assert tokenizer.decode(ids[:5]) + "".join(e.text for e in events) == tokenizer.decode(ids)
    assert not any("\ufffd" in e.text for e in events)


def test_a_stop_string_ends_the_text_of_every_kind(tokenizer):
    ids = tokenizer.encode(TEXT * 3)
    model = says(ids, tokenizer.vocab_size)
    whole = generate(model, ids[:2], tokenizer=tokenizer, max_new_tokens=len(ids), cache=False, eos_id=())
    stop = tokenizer.decode(tokenizer.encode("jumps over"))
    out = generate(model, ids[:2], tokenizer=tokenizer, max_new_tokens=len(ids), cache=False, stop=stop)
    assert out.finish_reason == "stop"
    assert out.text == whole.text.partition(stop)[0]


def test_an_empty_text_starts_from_the_token_between_texts(tokenizer):
    assert tokenizer.bos_id is None
    out = generate(Bigram.random(tokenizer.vocab_size), "", tokenizer=tokenizer, max_new_tokens=2)
    assert out.prompt_ids == [tokenizer.eos_id]

"""Models and requests for the tests of the engine: what an engine gives is held against what generate gives alone."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch

import glassformer as gf
from glassformer.parts.feedforward import Gated, Plain

V, D = 31, 16


def _block(**changes: Any) -> gf.Block:
    base: dict[str, Any] = {"attention": gf.Attention(4, position=gf.Rotary()), "feedforward": Gated(24), "norm": gf.RMSNorm()}
    return gf.Block(**(base | changes))


def _decoder(*blocks: gf.Block, **changes: Any) -> gf.Decoder:
    return gf.Decoder(V, D, blocks, final_norm=gf.RMSNorm(), **changes)


LONG = gf.LongRope(short=(1.0, 1.0), long=(3.0, 5.0), original_context=24)
SPECS: dict[str, Any] = {
    "learned": _decoder(*(_block(attention=gf.Attention(4, qkv_bias=True), feedforward=Plain(24), norm=gf.LayerNorm()),) * 2, position=gf.Learned(96)),
    "grouped": _decoder(*(_block(attention=gf.Attention(4, n_kv_heads=2, position=gf.Rotary())),) * 2),
    "alibi": _decoder(_block(attention=gf.Attention(4, position=gf.ALiBi())), _block(attention=gf.Attention(4, position=gf.ALiBi()))),
    "window": _decoder(_block(attention=gf.Attention(4, position=gf.Rotary(), mask=gf.Window(8))), _block()),
    "latent": _decoder(*(_block(attention=gf.LatentAttention(4, kv_lora_rank=8, d_nope=4, d_rope=4)),) * 2),
    "experts": _decoder(*(_block(feedforward=gf.Experts(4, 2, Gated(12))),) * 2),
    "longrope": _decoder(*(_block(attention=gf.Attention(4, position=gf.Rotary(scaling=LONG))),) * 2),
    "t5": gf.EncoderDecoder(
        gf.Encoder(V, D, (_block(attention=gf.Attention(4)),) * 2, final_norm=gf.RMSNorm(), position=gf.T5Buckets()),
        gf.Decoder(V, D, (_block(attention=gf.Attention(4), cross=gf.Attention(4)),) * 2, final_norm=gf.RMSNorm(), position=gf.T5Buckets()),
    ),
}


@cache
def model(name: str) -> Any:
    """One of them, its weights large enough that the next token depends on all before."""
    made = SPECS[name].build(seed=1).eval()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(0)
        for path, p in made.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=draw) * (1.5 / p.shape[-1] ** 0.5))
            elif "norm" in path:
                p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return made


def ids(n: int, seed: int = 0) -> list[int]:
    return torch.randint(1, V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


CHAINS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9},
    {"temperature": 1.2, "top_k": 6, "repetition_penalty": 1.3},
    {"mirostat": 2, "mirostat_tau": 2.0},
    {"temperature": 0.8, "min_p": 0.05, "dry_multiplier": 0.8},
    {"sampler": gf.TopK(5) | gf.Draw(seed=3)},
]


def asked(rng: random.Random, longest: int = 40, new: int = 16) -> tuple[list[int], dict[str, Any]]:
    """A prompt and options, drawn at random."""
    options: dict[str, Any] = {"max_new_tokens": rng.randint(1, new)} | rng.choice(CHAINS)
    if "sampler" not in options and len(options) > 1:
        options["seed"] = rng.randrange(1000)
    if rng.random() < 0.3:
        options["eos_id"] = rng.randrange(V)
    if rng.random() < 0.2:
        options["logprobs"] = rng.randint(1, 4)
    if rng.random() < 0.2:
        options["trace"] = 3
    return ids(rng.randint(1, longest), rng.randrange(10**6)), options


def same(one: gf.Generated, other: gf.Generated) -> None:
    """Equal in tokens, close in what they weigh."""
    assert (one.ids, one.finish_reason, one.text, one.prompt_ids) == (other.ids, other.finish_reason, other.text, other.prompt_ids)
    torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=2e-4, rtol=1e-3)
    assert [[c.id for c in top] for top in one.top] == [[c.id for c in top] for top in other.top]
    assert (one.trace is None) == (other.trace is None)
    if one.trace is not None and other.trace is not None:
        assert [c.id for c in one.trace] == [c.id for c in other.trace]
        assert [c.links for c in one.trace] == [c.links for c in other.trace]


def run(engine: gf.Engine, most: int = 10_000) -> int:
    steps = 0
    while engine.step():
        steps += 1
        assert steps < most
    return steps


def empty(engine: gf.Engine) -> None:
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.submitted == stats.finished + stats.cancelled + stats.failed


class Letters:
    """A tokenizer of one letter per id."""

    eos_id = None
    alphabet = " abcdefghijklmnopqrstuvwxyz.,;:!"

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.alphabet[i] for i in ids)

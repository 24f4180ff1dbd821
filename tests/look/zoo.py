"""Small models of every kind that the room of looking must hold for, and a tokenizer of words for texts in tests."""

from __future__ import annotations

from typing import Any

import torch

import glassformer as gf
from glassformer.parts.feedforward import Gated, Plain

V, D = 31, 16
WORDS = [
    "the",
    "old",
    "man",
    "saw",
    "a",
    "red",
    "fox",
    "and",
    "the",
    "dog",
    "ran",
    "home",
    "to",
    "Rome",
    "or",
    "Paris",
    "when",
    "it",
    "rained",
    ",",
    "said",
    "Mary",
    ".",
    "John",
    "gave",
    "Tom",
    "one",
    "big",
]


def words() -> Any:
    """A tokenizer whose tokens are words with their space (28 or so ids, fewer than ``V``)."""
    from glassformer import text

    return text.train("words", texts=[" ".join(WORDS)] * 3, vocab_size=V)


def block(**changes: Any) -> gf.Block:
    base: dict[str, Any] = {"attention": gf.Attention(n_heads=4), "feedforward": Plain(d_ff=24), "norm": gf.LayerNorm()}
    return gf.Block(**(base | changes))


SPECS: dict[str, Any] = {
    "gpt2": gf.Decoder(
        V,
        D,
        (block(attention=gf.Attention(4, qkv_bias=True, out_bias=True), feedforward=Plain(24, "gelu_tanh", bias=True)),) * 3,
        final_norm=gf.LayerNorm(),
        position=gf.Learned(64),
    ),
    "llama": gf.Decoder(
        V,
        D,
        (block(attention=gf.Attention(4, n_kv_heads=2, position=gf.Rotary()), feedforward=Gated(24), norm=gf.RMSNorm()),) * 3,
        final_norm=gf.RMSNorm(),
        tied=False,
    ),
    "sandwich": gf.Decoder(
        V,
        D,
        (block(attention=gf.Attention(4, position=gf.Rotary(), cap=20.0), feedforward=Gated(24), norm=gf.RMSNorm(), wiring=gf.Sandwich()),) * 2,
        final_norm=gf.RMSNorm(),
        readout=gf.LanguageModel(cap=30.0),
    ),
    "reordered": gf.Decoder(V, D, (block(attention=gf.Attention(4, position=gf.Rotary()), norm=gf.RMSNorm(), wiring=gf.ReorderedNorm()),) * 2),
    "parallel": gf.Decoder(
        V, D, (block(attention=gf.Attention(4, position=gf.Rotary(), out_bias=True), wiring=gf.Parallel()),) * 3, final_norm=gf.LayerNorm(), tied=False
    ),
    "experts": gf.Decoder(
        V, D, (block(attention=gf.Attention(4, position=gf.Rotary()), feedforward=gf.Experts(4, 2, Gated(12)), norm=gf.RMSNorm()),) * 2, final_norm=gf.RMSNorm()
    ),
    "sigmoid": gf.Decoder(V, D, (block(attention=gf.Attention(4, position=gf.ALiBi(), normaliser=gf.Sigmoid())),) * 2, final_norm=gf.LayerNorm()),
    "bert": gf.Encoder(
        V,
        D,
        (block(attention=gf.Attention(4, qkv_bias=True, out_bias=True), feedforward=Plain(24, bias=True), wiring=gf.PostNorm()),) * 3,
        final_norm=gf.NoNorm(),
        position=gf.Learned(64),
        embedding=gf.Embedding(norm=gf.LayerNorm()),
        readout=gf.LanguageModel(bias=True, transform=gf.Dense("gelu", gf.LayerNorm())),
    ),
    "t5": gf.EncoderDecoder(
        gf.Encoder(V, D, (block(norm=gf.RMSNorm()),) * 2, final_norm=gf.RMSNorm(), position=gf.T5Buckets()),
        gf.Decoder(V, D, (block(norm=gf.RMSNorm(), cross=gf.Attention(4)),) * 2, final_norm=gf.RMSNorm(), position=gf.T5Buckets()),
    ),
}
DECODERS = [name for name, spec in SPECS.items() if isinstance(spec, gf.Decoder)]


def model(name: str, seed: int = 0, wide: bool = True) -> Any:
    """One of them, in evaluation mode, its weights large enough that patterns are far from even (``wide``)."""
    made = SPECS[name].build(seed=seed).eval()
    if wide:
        with torch.no_grad():
            draw = torch.Generator().manual_seed(seed)
            for path, p in made.named_parameters():
                if p.ndim > 1:
                    p.copy_(torch.randn(p.shape, generator=draw) * (1.5 / p.shape[-1] ** 0.5))
                elif "norm" in path or path.endswith("bias"):
                    p.add_(0.2 * torch.randn(p.shape, generator=draw))
    return made


def ids(t: int = 9, seed: int = 0) -> list[int]:
    """Token ids, with repetitions."""
    return torch.randint(1, V, (t,), generator=torch.Generator().manual_seed(seed)).tolist()


def texts(name: str, t: int = 9, seed: int = 0) -> dict[str, Any]:
    """The text arguments that a function of this room takes for that model."""
    return {"text": ids(t, seed)} | ({"source": ids(6, seed + 1)} if name == "t5" else {})

"""Presets: published shapes by name, and two sizes for a small machine.

preset("gpt2")                    GPT-2 small, 124M
preset("tiny", vocab_size=65)     any field can be overridden
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glassformer.core.errors import SpecError, did_you_mean
from glassformer.core.fields import typed
from glassformer.parts.attention import Attention
from glassformer.parts.embed import Embedding, InverseSqrtWidth, SqrtWidth
from glassformer.parts.feedforward import Gated, Plain
from glassformer.parts.norm import LayerNorm, NoNorm, RMSNorm
from glassformer.parts.position import Learned, Sinusoidal, T5Buckets
from glassformer.parts.readout import Dense, LanguageModel
from glassformer.parts.rotary import Llama3Scaling, Rotary
from glassformer.parts.wiring import PostNorm

from .block import Block
from .encoder_decoder import EncoderDecoder
from .init import BERT_INIT, XAVIER_INIT
from .transformer import Decoder, Encoder

AnySpec = Decoder | Encoder | EncoderDecoder


def gpt2(layers: int, d: int, heads: int) -> Decoder:
    """GPT-2 (Radford et al. 2019): pre-norm, learned positions, GELU by tanh, tied."""
    block = Block(
        attention=Attention(heads, qkv_bias=True, out_bias=True),
        feedforward=Plain(4 * d, act="gelu_tanh", bias=True),
        norm=LayerNorm(),
    )
    return Decoder(50_257, d, (block,) * layers, final_norm=LayerNorm(), tied=True, position=Learned(1_024))


def llama(vocab: int, d: int, layers: int, heads: int, kv_heads: int, d_ff: int, rotary: Rotary, tied: bool = False) -> Decoder:
    """Llama (arXiv 2302.13971, 2307.09288, 2407.21783): pre-RMSNorm, rotary, SwiGLU, grouped queries."""
    block = Block(
        attention=Attention(heads, n_kv_heads=kv_heads, position=rotary),
        feedforward=Gated(d_ff, act="silu"),
        norm=RMSNorm(eps=1e-5),
    )
    return Decoder(vocab, d, (block,) * layers, final_norm=RMSNorm(eps=1e-5), tied=tied)


def bert_base() -> Encoder:
    """BERT base, uncased (arXiv 1810.04805): post-norm, learned positions, two token types, masked-token read-out."""
    norm = LayerNorm(eps=1e-12)
    block = Block(attention=Attention(12, qkv_bias=True, out_bias=True), feedforward=Plain(3_072, bias=True), norm=norm, wiring=PostNorm())
    return Encoder(
        30_522,
        768,
        (block,) * 12,
        final_norm=NoNorm(),
        tied=True,
        embedding=Embedding(n_types=2, norm=norm),
        position=Learned(512),
        readout=LanguageModel(bias=True, transform=Dense("gelu", norm)),
        init=BERT_INIT,
    )


def t5_small() -> EncoderDecoder:
    """T5 small (arXiv 1910.10683): RMSNorm, unscaled scores, shared buckets of distance as the only positions."""
    norm = RMSNorm(eps=1e-6)
    attention = Attention(8, d_head=64, scale=1.0)
    block = Block(attention=attention, feedforward=Plain(2_048, act="relu"), norm=norm)
    encoder = Encoder(32_128, 512, (block,) * 6, final_norm=norm, tied=True, position=T5Buckets())
    decoder = Decoder(
        32_128,
        512,
        (block.replace(cross=attention),) * 6,
        final_norm=norm,
        tied=True,
        position=T5Buckets(bidirectional=False),
        readout=LanguageModel(scale=InverseSqrtWidth()),
    )
    return EncoderDecoder(encoder, decoder, shared=True, start=0)


def transformer_base() -> EncoderDecoder:
    """The 2017 transformer, base (arXiv 1706.03762): post-norm, sinusoids, embeddings times sqrt(d), all three tables shared."""
    attention = Attention(8)
    block = Block(attention=attention, feedforward=Plain(2_048, act="relu", bias=True), norm=LayerNorm(), wiring=PostNorm(), dropout=0.1)
    embedding = Embedding(scale=SqrtWidth(), dropout=0.1)
    common: dict[str, Any] = {"final_norm": NoNorm(), "tied": True, "embedding": embedding, "position": Sinusoidal(), "init": XAVIER_INIT}
    encoder = Encoder(37_000, 512, (block,) * 6, **common)
    decoder = Decoder(37_000, 512, (block.replace(cross=attention),) * 6, **common)
    return EncoderDecoder(encoder, decoder, shared=True)


def small_machine(layers: int, d: int, heads: int) -> Decoder:
    """A modern small decoder: pre-RMSNorm, rotary, squared ReLU, untied."""
    block = Block(attention=Attention(heads, position=Rotary()), feedforward=Plain(4 * d, act="relu2"), norm=RMSNorm())
    return Decoder(256, d, (block,) * layers)


_LLAMA31 = Rotary(base=500_000.0, scaling=Llama3Scaling())

PRESETS: dict[str, Callable[[], AnySpec]] = {
    "tiny": lambda: small_machine(4, 128, 4),
    "small": lambda: small_machine(6, 384, 6),
    "transformer-base": transformer_base,
    "gpt2": lambda: gpt2(12, 768, 12),
    "gpt2-medium": lambda: gpt2(24, 1_024, 16),
    "gpt2-large": lambda: gpt2(36, 1_280, 20),
    "gpt2-xl": lambda: gpt2(48, 1_600, 25),
    "llama2-7b": lambda: llama(32_000, 4_096, 32, 32, 32, 11_008, Rotary()),
    "llama2-13b": lambda: llama(32_000, 5_120, 40, 40, 40, 13_824, Rotary()),
    "llama2-70b": lambda: llama(32_000, 8_192, 80, 64, 8, 28_672, Rotary()),
    "llama3-8b": lambda: llama(128_256, 4_096, 32, 32, 8, 14_336, Rotary(base=500_000.0)),
    "llama3-70b": lambda: llama(128_256, 8_192, 80, 64, 8, 28_672, Rotary(base=500_000.0)),
    "llama3.1-8b": lambda: llama(128_256, 4_096, 32, 32, 8, 14_336, _LLAMA31),
    "llama3.2-1b": lambda: llama(128_256, 2_048, 16, 32, 8, 8_192, Rotary(base=500_000.0, scaling=Llama3Scaling(factor=32.0)), tied=True),
    "bert-base": bert_base,
    "t5-small": t5_small,
}


def names() -> list[str]:
    """The names of all presets."""
    return list(PRESETS)


@typed(SpecError)
def preset(name: str, **changes: Any) -> AnySpec:
    """The Spec of that name, with fields replaced by ``changes``; raises :class:`SpecError` for an unknown name."""
    if name not in PRESETS:
        raise SpecError(f"No preset is named {name!r}.{did_you_mean(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    return PRESETS[name]().replace(**changes) if changes else PRESETS[name]()

"""A character model of Shakespeare, in under two minutes on a laptop.

Four layers and 0.8 million parameters learn to spell, to punctuate and to lay out a play; they do not learn to mean.
The demo (``make demo``) is this recipe. To make your own, copy this file, change it, and run
``glassformer train path/to/copy.py``.
"""

from __future__ import annotations

from glassformer import AdamW, Attention, Block, Cosine, Decoder, LayerNorm, Muon, Plain, Recipe, Rotary, TrainTokenizer


def recipe() -> Recipe:
    norm = LayerNorm(bias=False)
    block = Block(attention=Attention(n_heads=4, position=Rotary(), qk_norm=norm), feedforward=Plain(d_ff=512, act="relu2"), norm=norm)
    return Recipe(
        model=Decoder(vocab_size=65, d_model=128, blocks=(block,) * 4),
        data="tinyshakespeare",
        tokenizer=TrainTokenizer("characters"),
        optimizer=Muon(lr=2e-2, rest=AdamW(lr=8e-3)),  # high rates and small batches: the run is short (docs/log.md)
        schedule=Cosine(),
        seconds=100,
        batch=8,
        context=256,
        evaluate_windows=80,
        sample="ROMEO:",
    )

"""A small decoder of English prose, to look inside: four layers, two and a half million parameters, thirty-six minutes on one core.

    glassformer train books --data books/ --out runs/books

It is given a text of some tens of millions of characters (novels will do); on less it begins to learn by heart. Rotary positions on half of
each head and RMSNorm without biases, as large models have them, so that every method of the ``look`` room meets here what it meets there.
Three of four rows say a passage twice (``repeats``): within minutes heads form that look back for what followed last time (induction, arXiv 2209.11895).
Novels seldom say a thing twice within 256 tokens: a first version, without ``repeats``, had no such head after 20 million tokens (docs/log.md).
"""

from __future__ import annotations

from glassformer import AdamW, Attention, Block, Cosine, Decoder, Gated, Muon, Recipe, RMSNorm, Rotary, TrainTokenizer


def recipe() -> Recipe:
    norm = RMSNorm()
    block = Block(attention=Attention(n_heads=6, position=Rotary(fraction=0.5), qk_norm=norm), feedforward=Gated(d_ff=512), norm=norm)
    return Recipe(
        model=Decoder(vocab_size=2_048, d_model=192, blocks=(block,) * 4, final_norm=norm),
        data="tinyshakespeare",  # so that it runs as it is; --data gives it more
        tokenizer=TrainTokenizer("bpe", vocab_size=2_048),
        optimizer=Muon(lr=1e-2, rest=AdamW(lr=3e-3)),
        schedule=Cosine(),
        seconds=2_160,
        batch=8,
        context=256,
        repeats=0.75,
        validation=0.02,
        evaluate_windows=100,
        sample="The old man looked at",
    )

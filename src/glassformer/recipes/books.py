"""A small decoder of English prose, to look inside: four layers, two million parameters, an hour or so on two cores.

    glassformer train books --data books/ --out runs/books

It is given a text of some tens of millions of characters (novels will do); on less it begins to learn by heart. Rotary positions and
RMSNorm without biases, as large models have them, so that every method of the ``look`` room meets here what it meets there.
"""

from __future__ import annotations

from glassformer import AdamW, Attention, Block, Cosine, Decoder, Gated, Muon, Recipe, RMSNorm, Rotary, TrainTokenizer


def recipe() -> Recipe:
    block = Block(attention=Attention(n_heads=6, position=Rotary()), feedforward=Gated(d_ff=512), norm=RMSNorm())
    return Recipe(
        model=Decoder(vocab_size=2_048, d_model=192, blocks=(block,) * 4, final_norm=RMSNorm()),
        data="tinyshakespeare",  # so that it runs as it is; --data gives it more
        tokenizer=TrainTokenizer("bpe", vocab_size=2_048),
        optimizer=Muon(lr=2e-2, rest=AdamW(lr=6e-3)),
        schedule=Cosine(),
        seconds=4_200,
        batch=8,
        context=256,
        validation=0.02,
        evaluate_windows=100,
        sample="The old man looked at",
    )

"""Character-level Shakespeare on this machine: so many seconds of training, then the loss over the whole validation split.

    python benchmarks/shakespeare.py                   180 s, the settings that did best (docs/log.md)
    python benchmarks/shakespeare.py --layers 6 --d 192 --context 128

Data and split are nanoGPT's: the first 90 % of the characters train, the last 10 % validate. The seconds count everything
from the first step on, compilation included; the loss is the mean over consecutive windows of the training context.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path

import torch

import glassformer as gf
from glassformer.train.recipe import find_text
from glassformer.train.texts import read_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--ff", type=int, default=4, help="feed-forward width, times d")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-2, help="Muon's, for the matrices")
    parser.add_argument("--rest", type=float, default=8e-3, help="AdamW's, for everything else")
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--final", type=float, default=0.0, help="share of the learning rate at the end")
    parser.add_argument("--warmup", type=float, default=0.02)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--qk-norm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--norm", choices=["layer", "rms"], default="layer")
    parser.add_argument("--dropout", type=float, default=0.0, help="of what attention and feed-forward add")
    parser.add_argument("--act", default="relu2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()

    text = read_texts(find_text("tinyshakespeare"))[0]
    tokenizer = gf.text.train("characters", texts=[text])
    train, validation = gf.TokenData.from_text(text, tokenizer).split(0.1)
    norm = gf.LayerNorm(bias=False) if a.norm == "layer" else gf.RMSNorm()
    block = gf.Block(
        attention=gf.Attention(n_heads=a.heads, position=gf.Rotary(), qk_norm=norm if a.qk_norm else gf.NoNorm()),
        feedforward=gf.Plain(d_ff=a.ff * a.d, act=a.act),
        norm=norm,
        dropout=a.dropout,
    )
    model = gf.Decoder(vocab_size=tokenizer.vocab_size, d_model=a.d, blocks=(block,) * a.layers).build(seed=a.seed)
    compiled = {"auto": "auto", "yes": True, "no": False}[a.compile]
    trainer = gf.Trainer(
        model,
        gf.NextToken(),
        train,
        optimizer=gf.Muon(lr=a.lr, weight_decay=a.decay, rest=gf.AdamW(lr=a.rest, weight_decay=a.decay)),
        schedule=gf.Cosine(warmup=a.warmup, final=a.final),
        seconds=a.seconds,
        batch=a.batch,
        context=a.context,
        dtype=a.dtype,
        compile=compiled,
        seed=a.seed,
        progress=False,
    )
    began = time.perf_counter()
    for step in trainer:
        if step.every(100):
            print(f"{step.number:6} {step.elapsed:6.1f} s  loss {step.loss:.3f}  {step.tokens_per_second:,.0f} tokens/s", flush=True)
    spent = time.perf_counter() - began
    result = gf.evaluate(model, gf.NextToken(), validation, batch=32, context=a.context)
    print(f"\n{datetime.date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{vars(a)}")
    print(f"{model.params().total:,} parameters, {trainer.number} steps, {trainer.tokens:,} tokens in {spent:.1f} s: validation {result}")
    if a.out:
        a.out.write_text(json.dumps({"loss": result.loss, "error": result.error, "tokens": trainer.tokens, "seconds": spent}) + "\n")


if __name__ == "__main__":
    main()

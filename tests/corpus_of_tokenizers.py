"""Small texts that several test files here train on."""

from __future__ import annotations

import lzma
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

import glassformer
from glassformer.text import Tokenizer, train

END = "<|endoftext|>"

MIXED = (
    "The quick brown fox doesn't jump over 12 lazy dogs, does it? We'll see in 2024!\n\n"
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\r\n"
    "Съешь же ещё этих мягких французских булок, да выпей чаю.\n日本語の文章です。中文也可以。 한국어도 있어요.\n"
    "\tif x == y:\n\t\treturn x**2  # naïve café 👩‍💻🇩🇪\n"
)

ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
"""Any string that is text: every code point but the surrogates."""

TRICKY_TEXT = st.lists(
    st.sampled_from(
        [
            " ",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "'s",
            "'LL",
            "the",
            "The",
            "1",
            "12345",
            "é",
            "e\u0301",
            "日本",
            "👩‍💻",
            "ſ",
            "İ",
            "_",
            "!!",
            "\u00a0",
            "\u2028",
            END,
            "a" * 30,
            "\x00",
        ]
    ),
    max_size=25,
).map("".join)


@cache
def shakespeare() -> str:
    path = Path(glassformer.__file__).parent / "data" / "tinyshakespeare" / "input.txt.xz"
    return lzma.decompress(path.read_bytes()).decode("utf-8")


@cache
def trained(kind: str, pattern: str = "gpt2") -> Tokenizer:
    """One of each kind, trained on a little of everything."""
    size = {"bpe": 700, "wordpiece": 500, "unigram": 400}.get(kind)
    special = [END] if kind in ("bpe", "bytes") else [END, "<unk>"]
    return train(kind, texts=[shakespeare()[:60_000], MIXED * 3], vocab_size=size, special=special, pattern=pattern)

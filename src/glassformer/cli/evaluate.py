"""``glassformer evaluate``: how well a model predicts a text."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer

from .look.common import Edits, edits_of


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    data: Annotated[list[str], typer.Option("--data", metavar="FILE_OR_FOLDER", help="The text to predict. Repeatable.")],
    context: Annotated[
        int, typer.Option("--context", min=1, help="Tokens in a window; what remains at the end of the text and does not fill one is left out.")
    ] = 256,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Windows at a time.")] = 16,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="At most so many windows, at even distances; by default all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
    edits: Edits = None,
) -> None:
    """Loss, perplexity and bits per byte of a model on a text, with standard errors."""
    from ..tasks import NextToken
    from ..train.data import TokenData
    from ..train.evaluate import evaluate as measure
    from ..train.recipe import find_text
    from ..train.texts import read_texts
    from .models import open_model, tokenizer_of

    loaded = open_model(model, device, dtype, packed)
    NextToken().check(loaded.model)
    tokens = TokenData.from_text(read_texts([find_text(name) for name in data]), tokenizer_of(loaded, model))
    found = measure(loaded.model, NextToken(), tokens, batch=batch, context=context, most=windows, tap=edits_of(edits, loaded))
    bits = found.bits_per_byte
    share = found.error / found.loss  # bits per byte is the loss in another unit
    if as_json:
        sure = None if math.isnan(found.error) else found.error
        print(json.dumps({"loss": found.loss, "standard_error": sure, "perplexity": found.perplexity, "bits_per_byte": bits, "tokens": found.tokens}))
        return
    unsure = math.isnan(found.error)  # of one window

    def shown(value: float, error: float, digits: int) -> str:
        return f"{value:.{digits}f}" + ("" if unsure else f" ± {error:.{digits}f}")

    print(f"loss           {shown(found.loss, found.error, 4)} nats per token")
    print(f"perplexity     {shown(found.perplexity, found.perplexity * found.error, 3)}")
    if bits is not None:
        print(f"bits per byte  {shown(bits, bits * share, 4)}")
    if unsure:
        print(f"on {found.tokens:,} tokens in one window: too little text to say how sure this is")
        return
    print(f"on {found.tokens:,} tokens in {found.windows:,} windows of {context}; ± is one standard error")

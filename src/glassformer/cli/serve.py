"""``glassformer serve``: a model behind HTTP, as OpenAI's clients expect it."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import InputError
from . import sampling

if TYPE_CHECKING:
    from ..weights.own import Loaded

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained model: its folder (ours, or from the hub), a .gguf file, or hf://owner/name.")],
    host: Annotated[str, typer.Option("--host", help="Where to listen; 0.0.0.0 is everywhere: give a key then.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What requests call the model; by default its folder's name.")] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="GLASSFORMER_API_KEY", show_envvar=False, help="What callers have to send; or $GLASSFORMER_API_KEY.")
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Answers at work at once.")] = 16,
    capacity: Annotated[int, typer.Option("--capacity", min=1, help="Tokens of one conversation, prompt and answer together.")] = 2048,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Requests that may wait for a slot; more are refused with 429.")] = 64,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="For the cache ('2 GB'), which may mean fewer slots.")] = None,
    cache_dtype: Annotated[
        str | None, typer.Option("--cache-dtype", help="Keep keys and values as bfloat16 or int8; by default as the model makes them.")
    ] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits for a request whatever else is at work; slower.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, ...; by default the file's (float16 becomes float32 on a CPU).")] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Keep the quantised matrices of a .gguf file packed in memory.")] = False,
    quantise: Annotated[str | None, typer.Option("--quantise", metavar="KIND", help="int8 or int4: quantise while loading, by torchao.")] = None,
    weights: sampling.Weights = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda or mps; by default the best there is.")] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="This server runs on one; for more it says how to go on.")] = 1,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", metavar="ORIGIN", help="A web page's origin that may ask: https://example.org. Repeatable.")
    ] = None,
    edits: Annotated[bool, typer.Option("--edits/--no-edits", help="Whether a request may edit what the model computes for it.")] = True,
    sites: Annotated[bool, typer.Option("--sites/--no-sites", help="Whether a request may ask for values of the inside.")] = True,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Seconds for one answer.")] = 600.0,
    drain: Annotated[float, typer.Option("--drain", min=0.1, help="Seconds that running answers have to finish after SIGTERM.")] = 120.0,
    body_limit: Annotated[float, typer.Option("--body-limit", min=0.001, help="Megabytes of one request.")] = 8.0,
    log: Annotated[bool, typer.Option("--log", help="A line for every request, on standard error.")] = False,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/embeddings, and the inside on request. Its page at / shows how to ask."""
    _check_one_device(model, device, devices)
    check_extra()
    from ..web import Limits, Served, create_app, serve
    from ..web.gate import LOOPBACK
    from .models import open_model

    loaded = open_model(model, device, dtype, packed, quantise, weights)
    engine = engine_of(loaded, slots=slots, capacity=capacity, queue=queue, memory=memory, cache_dtype=cache_dtype, deterministic=deterministic)
    limits = Limits(answer_seconds=time_limit, drain_seconds=drain, body_bytes=int(body_limit * 1e6))
    served = Served(loaded, name or _name(model), engine, limits, edits, sites)
    app = create_app(served, key=api_key, cors=cors or (), host=host)
    if host not in LOOPBACK and not api_key:
        print(f"note: everybody who can reach {host} may use this model: give --api-key, or GLASSFORMER_API_KEY.", file=sys.stderr)
    serve(app, host=host, port=port, log="info" if log else "warning", said=lambda url: _said(served, url))


def check_extra() -> None:
    """Raise :class:`InputError` if what a server is made of is not installed."""
    from importlib.util import find_spec

    lacks = [name for name in NEEDED if find_spec(name) is None]
    if lacks:
        raise InputError(f"The server needs {', '.join(lacks)}: pip install 'glassformer[serve]'.")


def engine_of(loaded: Loaded, **sizes: Any) -> Any:
    """The engine for a model that predicts tokens, or None. An encoder has vectors to give and nothing to continue."""
    from ..infer.engine import Engine
    from ..parts.readout import LanguageModel

    spec = loaded.model.spec
    decoder = getattr(spec, "decoder", spec)
    if not isinstance(getattr(decoder, "readout", None), LanguageModel) or type(decoder).__name__ == "Encoder":
        return None
    return Engine(loaded.model, loaded.tokenizer, eos_id=loaded.eos_ids, **sizes)


def _check_one_device(model: str, device: str | None, devices: int) -> None:
    """Raise :class:`InputError`, with the command that goes on from here, if more than one device is asked for."""
    named = [d.strip() for d in (device or "").split(",") if d.strip()]
    n = max(devices, len(named))
    if n == 1:
        return
    hub = model.startswith("hf://") or _is_of_the_hub(model, n)
    target = Path(model.removeprefix("hf://")).name + "-hf"
    folder = shlex.quote(model.removeprefix("hf://") if hub else target)
    written = "" if hub else f"glassformer convert {shlex.quote(model)} {shlex.quote(target)} --to hf && "
    raise InputError(
        f"The built-in server runs on one device, and {n} were asked for. vLLM serves the same model on many, from a folder in the hub's format: "
        f"{written}vllm serve {folder} --tensor-parallel-size {n}"
    )


def _is_of_the_hub(model: str, n: int) -> bool:
    """Whether vLLM can read the folder as it is. Raises :class:`InputError` if no other server can run this model."""
    from ..core.errors import WeightsError
    from ..weights import open
    from ..weights.family import family_for

    opened = open(model)
    if opened.family is not None:
        return opened.path.is_dir()
    try:
        family_for(opened.spec)
    except WeightsError as error:
        why = str(error).partition(",")[0]
        raise InputError(f"The built-in server runs on one device, and {n} were asked for; no other server runs this model either: {why}.") from None
    return False


def _name(model: str) -> str:
    path = Path(model.removeprefix("hf://")).expanduser()
    return (path if model.startswith("hf://") else path.resolve()).name.removesuffix(".gguf") or "model"


def _said(served: Any, url: str) -> None:
    if served.engine is None:
        what = "vectors of texts"
    else:
        size = f"{served.engine.bytes / 1e6:,.0f} MB of cache"
        many = f"{served.engine.slots} answers at once" if served.engine.slots > 1 else "one answer at a time"
        what = f"{many}, of up to {served.context:,} tokens, {size}"
    reached = re.sub(r"//(0\.0\.0\.0|\[::\])(?=:)", "//NAME-OF-THIS-MACHINE", url)
    print(f"{served.name} at {url} ({what}); the client's base_url is {reached}/v1. Ctrl-C ends it.", file=sys.stderr, flush=True)
    if os.environ.get("GLASSFORMER_DEBUG"):
        print(served.model.spec, file=sys.stderr)

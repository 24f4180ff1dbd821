"""Sentence encoders: a folder whose modules.json says what is done with the states of the encoder beside it.

    modules.json   Transformer (the folder itself) ─► Pooling (1_Pooling/config.json) ─► Normalize
    ours           encoder with the read-out         Vector(pool=Mean(), normalise=True)

A module that is not one of these three changes the vectors, so it is an error, as is a way of pooling that is not supported here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glassformer.core import files
from glassformer.core.errors import WeightsError
from glassformer.models import Encoder
from glassformer.parts.readout import First, Last, Mean, Pool, States, Vector

from .config import Config
from .source import read_json
from .stored import shown

MODULES, POOLING = "modules.json", "1_Pooling"
POOLS: dict[str, Pool] = {"cls": First(), "mean": Mean(), "lasttoken": Last()}
SWITCHES = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}  # older files have a switch for each way
SWITCHES |= {"max": "max_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "weightedmean": "weightedmean_tokens"}
MOST_MODULES = 1 << 20  # bytes of a modules.json that are read
WRITER = "sentence_transformers.models."


def with_modules(spec: Any, folder: Path) -> Any:
    """``spec`` with the read-out that the folder's modules.json asks for; as it is where there is none. Raises :class:`WeightsError`."""
    file = folder / MODULES
    if not file.exists():
        return spec
    if not isinstance(spec, Encoder) or not isinstance(spec.readout, States):
        raise WeightsError(f"{file} pools the states of a bare encoder, but config.json describes {type(spec).__name__} with {type(spec.readout).__name__}.")
    kinds = [(str(m.get("type")).rsplit(".", 1)[-1], str(m.get("path", ""))) for m in _modules(file)]
    names = [kind for kind, _ in kinds]
    if names[:2] != ["Transformer", "Pooling"] or names[2:] not in ([], ["Normalize"]) or kinds[0][1]:
        raise WeightsError(
            f"{file} asks for {' then '.join(map(_short, names[:8])) or 'nothing'}, but only Transformer then Pooling, and Normalize after them, are "
            "supported: another module would change the vectors. To have the encoder's states, remove modules.json."
        )
    return spec.replace(readout=Vector(pool=_pool(folder, kinds[1][1], spec.d_model), normalise=names[2:] == ["Normalize"]))


def _short(name: str) -> str:
    return name if len(name) < 60 else shown(name)


def _modules(file: Path) -> list[dict[str, Any]]:
    try:
        if file.stat().st_size > MOST_MODULES:
            raise WeightsError(f"{file} has {file.stat().st_size:,} bytes, and a list of modules a few hundred: it is another file.")
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read as JSON ({error}): copy it again from where it came.") from error
    if not isinstance(modules, list) or not all(isinstance(m, dict) for m in modules):
        raise WeightsError(f"{file} is JSON, but no list of modules: is it the right file?")
    return modules


def _pool(folder: Path, path: str, d: int) -> Pool:
    if Path(path).name != path or path in ("", ".", ".."):  # whoever wrote it does not decide what is read on this machine
        raise WeightsError(f"{folder / MODULES} names the folder {shown(path)} for its Pooling, but only folders beside it are opened.")
    file = folder / path / "config.json"
    c = Config(read_json(file), file)
    width = c.whole("embedding_dimension", c.whole("word_embedding_dimension", d))
    if width != d:
        raise WeightsError(f"{file} pools vectors of width {width}, but the encoder's states are {d} wide: the two belong to different models.")
    c.only("include_prompt", True)
    switched = [mode for mode, key in SWITCHES.items() if c(f"pooling_mode_{key}", False)]
    named = c("pooling_mode", switched or ["mean"])
    asked = [named] if isinstance(named, str) else list(named)
    c.finish(frozenset())
    if len(asked) != 1 or asked[0] not in POOLS:
        raise WeightsError(f"{file} pools by {' and '.join(map(str, asked))}, but only one of {', '.join(POOLS)} is supported.")
    return POOLS[asked[0]]


def bare(spec: Any) -> Any:
    """The encoder under a sentence encoder: what its config.json describes. Any other Spec as it is."""
    if isinstance(spec, Encoder) and isinstance(spec.readout, Vector) and spec.readout.transform is None:
        return spec.replace(readout=States())
    return spec


def write_modules(spec: Any, folder: Path) -> None:
    """modules.json and the pooling's config beside the tensors of a sentence encoder; of any other model, none (an earlier model's is removed)."""
    if bare(spec) is spec:
        (folder / MODULES).unlink(missing_ok=True)
        return
    readout: Any = spec.readout
    mode = next(mode for mode, pool in POOLS.items() if pool == readout.pool)
    switches = {f"pooling_mode_{key}": mode == name for name, key in SWITCHES.items()}
    (folder / POOLING).mkdir(exist_ok=True)
    _write(folder / POOLING / "config.json", {"word_embedding_dimension": spec.d_model, **switches})
    kinds = [("Transformer", ""), ("Pooling", POOLING), *([("Normalize", "2_Normalize")] if readout.normalise else [])]
    _write(folder / MODULES, [{"idx": i, "name": str(i), "path": path, "type": WRITER + kind} for i, (kind, path) in enumerate(kinds)])


def _write(file: Path, values: Any) -> None:
    files.replace(file, json.dumps(values, indent=2) + "\n")

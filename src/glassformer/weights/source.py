"""Sources: what lies at a path, told by its content and not by its name.

folder with model.json           our own format
folder with config.json          the Hugging Face format: config.json, *.safetensors, tokenizer, generation settings
folder with one .gguf file       that file
file that starts with GGUF       llama.cpp's format
hf://owner/name@revision         fetched to the hub's own cache first (or found there without a network)
pickle (.bin, .pt, .pth, .ckpt)  refused: opening one runs whatever program its writer put there

path ──► find() ──► Folder or GGUF file: names, shapes and places of all tensors; nothing is read
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glassformer.core.errors import WeightsError

from . import safetensors_file
from .stored import Stored, shown

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MOST_JSON = 64 << 20  # bytes of a JSON file that are read; the largest index of a published model has 10 million
UNPICKLE = "python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{0}').save_pretrained('{0}-safe')\""


@dataclass
class Found:
    """What a source holds before any tensor is read.

    ``kind`` is ``"hf"``, ``"gguf"`` or ``"own"``; ``config`` the fields of its config.json (or what a GGUF file says in their words).
    """

    kind: str
    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_file: Path | None = None
    tensors: dict[str, Stored] = field(default_factory=dict)
    metadata: Any = None


def find(path: str | os.PathLike[str]) -> Found:
    """What lies at ``path``. Raises :class:`WeightsError` with the remedy for anything that is no checkpoint."""
    if str(path).startswith("hf://"):
        path = fetched(str(path))
    at = Path(path).expanduser()
    if os.path.isdir(at):  # not at.is_dir(), which fails for a name that no file can have
        return _folder(at)
    if not os.path.isfile(at):
        hub = f" (is it meant to be hf://{path}?)" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        raise WeightsError(
            f"There is nothing at {str(path)!r}{hub}: give a folder that glassformer wrote, one with config.json and safetensors files, a .gguf file, or hf://owner/name."
        )
    start = _first_bytes(at)
    if start.startswith(b"GGUF"):
        return _gguf(at)
    tensors = start[8:9] == b"{"  # what follows the length of a safetensors header
    if not tensors and (at.suffix in PICKLES or start.startswith((b"PK\x03\x04", *(b"\x80" + bytes((protocol,)) for protocol in range(2, 6))))):
        raise _pickle(at, at.parent)
    if tensors or at.suffix == ".safetensors":
        raise WeightsError(f"{at} holds tensors, but not what they mean: give the folder that it lies in, with config.json beside it.")
    raise WeightsError(f"{at} is no checkpoint that is known here: give a folder with config.json and safetensors files, or a .gguf file.")


def _folder(folder: Path) -> Found:
    if (folder / "model.json").exists() or any(folder.glob("checkpoints/step-*")):
        return Found("own", folder)
    if (folder / "config.json").exists() and (any(folder.glob("*.safetensors*")) or not any(folder.glob("*.gguf"))):
        return Found("hf", folder, read_json(folder / "config.json"), folder / "config.json", _safetensors(folder))
    files = sorted(p for p in folder.glob("*.gguf"))
    firsts = [p for p in files if "-of-" not in p.stem or "-00001-of-" in p.stem]
    if len(firsts) == 1:
        return _gguf(firsts[0])
    if firsts:
        raise WeightsError(f"{folder} holds {len(firsts)} GGUF files: give one of them: {', '.join(p.name for p in firsts[:8])}.")
    if pickles := _pickles(folder):
        raise _pickle(pickles[0], folder)
    below = [p.name for p in sorted(folder.iterdir()) if (p / "model.json").exists() or (p / "config.json").exists()][:8]
    todo = f"Folders in it do: give one of them ({', '.join(below)})" if below else "Give a folder that holds one of these, or the file itself"
    raise WeightsError(f"{folder} holds no model: neither model.json (glassformer's own), nor config.json (Hugging Face), nor a .gguf file. {todo}.")


def _gguf(file: Path) -> Found:
    from . import gguf_file

    opened = gguf_file.read(file)
    return Found("gguf", file, {}, file, opened.tensors, opened.metadata)


# The tensors of a folder


def _safetensors(folder: Path) -> dict[str, Stored]:
    index = folder / INDEX
    if not index.exists():
        index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), index)
    if index.exists() and not (folder / "model.safetensors").exists():  # an index beside one whole file is of other files, or of an earlier model
        return _sharded(folder, index)
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        if pickles := _pickles(folder):
            raise _pickle(pickles[0], folder)
        raise WeightsError(f"{folder} has a config.json but no .safetensors file: fetch the model's weights into it as well.")
    return _together([safetensors_file.header(file) for file in files])


def _together(headers: Iterable[Mapping[str, Stored]]) -> dict[str, Stored]:
    """The tensors of several files as one table; a name must not come twice, or nobody could say which of the two is meant."""
    found: dict[str, Stored] = {}
    for header in headers:
        for name, stored in header.items():
            if name in found:
                raise WeightsError(
                    f"{shown(name)} is in {found[name].file} and in {stored.file.name}: the files belong to different models, so keep those of one only."
                )
            found[name] = stored
    return found


def _pickles(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if p.suffix in PICKLES and p.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]


def _sharded(folder: Path, index: Path) -> dict[str, Stored]:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
        raise WeightsError(f"{index} has no weight_map that names a file for each tensor: fetch it again.")
    headers: dict[str, dict[str, Stored]] = {}
    for shard in sorted(set(where.values())):
        # A name in an index may not lead out of the folder: whoever wrote it does not decide what is read on this machine.
        if shard != os.path.basename(shard) or shard in ("", ".", "..") or "\\" in shard or not shard.endswith(".safetensors"):
            raise WeightsError(f"{index} names the file {shown(shard)}, but only .safetensors files in the same folder are opened.")
        if not os.path.isfile(folder / shard):
            raise WeightsError(
                f"{index} names {shown(shard)}, which is not in {folder}: {sum(f == shard for f in where.values())} tensors are missing. Fetch that file too."
            )
        headers[shard] = safetensors_file.header(folder / shard)
    for name, shard in where.items():
        if name not in headers[shard]:
            raise WeightsError(f"{index} says that {shown(name)} is in {shard}, but it is not there: index and shards belong to different models.")
    return _together(headers.values())


def _pickle(file: Path, folder: Path) -> WeightsError:
    return WeightsError(
        f"{file} is a pickle, and opening one runs whatever program its writer put in it: it is not opened. "
        f"If you trust it, convert it once: {UNPICKLE.format(folder)}"
    )


# The hub


def fetched(name: str) -> Path:
    """The local folder of ``hf://owner/name@revision``, fetched if there is a network. Raises :class:`WeightsError` otherwise."""
    repo, _, revision = name.removeprefix("hf://").partition("@")
    if repo.count("/") > 1 or not repo.strip("/"):
        raise WeightsError(f"{name!r} names no model on the hub: write hf://owner/name, or hf://owner/name@revision.")
    hub: Any = importlib.import_module("huggingface_hub")
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.spm"]
    unwanted = ["consolidated*", "original/*"]  # the same weights once more, as their makers' own programs have them
    options = {"repo_id": repo, "revision": revision or None, "allow_patterns": wanted, "ignore_patterns": unwanted}
    try:
        folder = Path(hub.snapshot_download(**options))
    except Exception as error:  # the hub's library has two dozen classes for 'no network', 'no such model' and 'not allowed'
        try:
            folder = Path(hub.snapshot_download(**options, local_files_only=True))
        except Exception:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise WeightsError(
                f"{name} could not be fetched ({type(error).__name__}: {said[0][:200]}) and is not in the local cache. Without a network, copy its folder here "
                "and give that path; for a private or gated model, log in with 'hf auth login' first."
            ) from error
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"{name} has no .safetensors file. Where a model is published as a pickle only, opening it runs whatever program its writer put in it; "
            f"if you trust it, convert it once: {UNPICKLE.format(repo)}"
        )
    return folder


# Small files


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a table. Raises :class:`WeightsError` for anything else."""
    try:
        if file.stat().st_size > MOST_JSON:
            raise WeightsError(f"{file} has {file.stat().st_size} bytes, and more than {MOST_JSON} are not believed of such a file.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file} cannot be read as JSON ({error}): copy it again from where it came.") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} is JSON, but no table of fields: is it the right file?")
    return values


def _first_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as f:
            return f.read(9)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror}): check that it is yours to read.") from error

"""Our own format: a folder of three files, nothing pickled.

    model.json          the Spec, the version of the format, anything the caller adds
    model.safetensors   every parameter once, under its own name
    tokenizer.json      if the model has a tokenizer

Loading is total: a tensor that no parameter claims, or a parameter that no tensor fills, is an
error that names both. Tensors are memory-mapped and read when the model is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glassformer.core import files
from glassformer.core.errors import SpecError, TokenizerError, WeightsError, did_you_mean
from glassformer.core.fields import described, typed
from glassformer.core.numerics import device_named, dtype_named
from glassformer.core.spec import Spec
from glassformer.models import EncoderDecoder, Transformer
from glassformer.models.speaking import Speaking
from glassformer.parts.packed import Packed

if TYPE_CHECKING:
    from glassformer.text import Tokenizer

ALIGNED = 64  # bytes: where torch itself puts a tensor
FORMAT = 1
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ORIGIN = ("config", "generation", "training")
RUN = "run.json"


class Loaded(NamedTuple):
    """What a checkpoint holds: the model (in evaluation mode), its tokenizer if there is one, what the writer added.

    ``report``: of a foreign checkpoint, what became of each of its tensors.
    """

    model: Any
    tokenizer: Tokenizer | None
    extra: dict[str, Any]
    report: Any = None

    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt: ``gf.generate(loaded, prompt, **options)``, with the checkpoint's tokenizer and ends of a text if no others are said."""
        return Speaking.generate(self, prompt, **options)  # type: ignore[arg-type]

    def generation(self, **options: Any) -> Any:
        """The chain that :meth:`generate` builds from these options."""
        return Speaking.generation(self, **options)  # type: ignore[arg-type]

    @property
    def eos_ids(self) -> tuple[int, ...] | None:
        """The ids that end a text, by the generation settings or the config (a chat model may have several); None leaves it to the tokenizer."""
        for settings in (self.extra.get("generation", {}), self.extra.get("config", {})):
            ids = settings.get("eos_token_id") if isinstance(settings, dict) else None
            if ids is not None:
                found = tuple(ids) if isinstance(ids, list) else (ids,)
                if not all(type(i) is int and i >= 0 for i in found):
                    raise WeightsError(f"The checkpoint's settings say eos_token_id={ids!r}, but ids are whole numbers from 0 on: give eos_id=... yourself.")
                return found
        return None

    def __repr__(self) -> str:
        spec = getattr(self.model, "spec", None)
        source = "" if self.report is None else f", from {self.report.source}"
        return f"Loaded({type(spec).__name__} of {self.model.params().total:,} parameters, {self.tokenizer or 'no tokenizer'}{source})"

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """The ids of a conversation by the checkpoint's own chat template, ready to be answered; options as in :meth:`Tokenizer.chat`.

        ``messages``: ``[{"role": "user", "content": "Hello"}]``. Raises :class:`TokenizerError` if there is no tokenizer, or no template.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                "This checkpoint has no tokenizer, so a conversation means nothing to its model: put the one that it was trained with beside it."
            )
        return self.tokenizer.chat(messages, **options)


@typed(WeightsError)
def save(model: Any, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None, extra: dict[str, Any] | None = None) -> Path:
    """Write a model to ``folder`` (made if needed): all files are written under other names first, then take their places.

    A model that was opened from a published checkpoint takes its ``config`` and ``generation`` settings along in ``extra``.
    Without a tokenizer, one that an earlier model left in the folder is removed. Raises :class:`WeightsError` if the folder cannot be written.
    """
    path = Path(folder)
    if getattr(model, "spec", None) is None:
        raise WeightsError(f"A model that was built from a Spec can be saved, but {described(type(model))} was given.")
    size = getattr(model.spec, "vocab_size", None)
    if tokenizer is not None and size is not None and getattr(tokenizer, "vocab_size", 0) > size:
        raise WeightsError(f"The tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary has {size}: it is another model's.")
    check_plain(model)
    staging: Path | None = None
    try:
        path.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=path, prefix=".writing."))
        tensors = {name: x.detach().to("cpu").contiguous() for name, x in model.named_parameters()}
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})
        about = {"format": FORMAT, "spec": model.spec.to_dict(), "extra": {**getattr(model, "origin", {}), **(extra or {})}}
        if tokenizer is not None and hasattr(tokenizer, "vocabulary_hash"):
            about["tokenizer"] = {"vocab_size": tokenizer.vocab_size, "vocabulary": tokenizer.vocabulary_hash()}
        (staging / "model.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        if tokenizer is not None:
            if (path / TOKENIZER[1]).exists():  # what else it says stays
                shutil.copyfile(path / TOKENIZER[1], staging / TOKENIZER[1])
            tokenizer.save(staging / TOKENIZER[0])
        written = files.take_places(staging, path, last="model.json")
        for name in TOKENIZER:  # an old one that nothing replaces
            if name not in written:
                (path / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason, todo = files.trouble(error)
        raise WeightsError(f"The model could not be written to {path}: {reason}. {todo}; what was there before is untouched.") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return path


@typed(WeightsError)
def load(folder: str | os.PathLike[str], device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Loaded:
    """Open a folder written by :func:`save` (or a training run's folder). Raises :class:`WeightsError` saying what is missing or wrong."""
    path = find(Path(folder))
    about = _read_json(path / "model.json")
    model = _spec(about, path).build(device="meta")
    _fill(model, path / "model.safetensors", device_named("cpu" if device is None else device), None if dtype is None else dtype_named(dtype))
    if hasattr(model, "tie"):
        model.tie()
    tokenizer = None
    if (path / "tokenizer.json").exists():
        from glassformer.text import Tokenizer

        tokenizer = Tokenizer.load(path / "tokenizer.json")
        _check_tokenizer(tokenizer, about.get("tokenizer"), path)
    extra = about.get("extra", {})
    if training := _training(path):  # the newest run says it, whatever the model that it began with has brought along
        extra = {**extra, "training": training}
    model.origin = origin(extra)
    return Loaded(model.eval(), tokenizer, extra)


def origin(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's extra data belongs to the model wherever it goes."""
    return {k: dict(extra[k]) for k in ORIGIN if isinstance(extra.get(k), Mapping) and extra[k]}


def _training(path: Path) -> dict[str, int]:
    """How a run made the model in its folder, or in one of its checkpoints: ``context``, the tokens of a window. Empty if no run is there, or says none."""
    path = path.absolute()
    for folder in (path, path.parent.parent) if path.parent.name == "checkpoints" else (path,):
        try:
            settings = json.loads((folder / RUN).read_text(encoding="utf-8"))["settings"]
            if settings["data"] is not None and type(settings["context"]) is int:  # a run on batches of one's own has no windows
                return {"context": settings["context"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def spec_of(path: Path) -> Any:
    """The Spec of the model in a folder; no tensor is read."""
    return _spec(_read_json(path / "model.json"), path)


def _spec(about: dict[str, Any], path: Path) -> Any:
    kind = about["spec"].get("type", "") if isinstance(about["spec"], dict) else ""
    base: type[Spec] = EncoderDecoder if kind == "EncoderDecoder" else Transformer
    try:
        return base.from_dict(about["spec"])
    except (SpecError, KeyError) as error:
        raise WeightsError(f"{path / 'model.json'} describes no model that this version can build: {error}") from error


def find(path: Path) -> Path:
    """The folder that holds the model: ``path`` itself, or the newest checkpoint of a run in progress."""
    if (path / "model.json").exists():
        return path
    steps = sorted(p for p in path.glob("checkpoints/step-*") if (p / "model.json").exists() and (p / "model.safetensors").exists())
    if steps:
        return steps[-1]
    if not path.exists():
        raise WeightsError(f"There is no folder {path}: give the folder that 'glassformer train' wrote.")
    raise WeightsError(f"{path} holds no glassformer model: model.json is missing. Give the folder that 'glassformer train' wrote.")


def _check_tokenizer(found: Tokenizer, wanted: Any, path: Path) -> None:
    """Raise :class:`WeightsError` if the model was saved with a tokenizer whose ids mean something else; more pieces than it had are no harm."""
    if isinstance(wanted, dict) and found.vocabulary_hash(wanted.get("vocab_size")) != wanted.get("vocabulary"):
        raise WeightsError(
            f"{path / TOKENIZER[0]} is not the tokenizer that the model was saved with ({found.vocab_size} tokens there, {wanted.get('vocab_size')} in the "
            "model's own, or others): its ids mean other pieces. Put the model's own back, or remove this one and work with ids."
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{file} cannot be read as JSON ({error}): copy it again from where it came.") from error
    if not isinstance(about, dict) or "spec" not in about:
        raise WeightsError(f"{file} is JSON, but describes no model ('spec' is missing): is it the right file?")
    version = about.get("format", 0)
    if not isinstance(version, int) or version > FORMAT:
        raise WeightsError(f"{file} has format {version!r}, but this version reads up to {FORMAT}: update glassformer.")
    return about


def _fill(model: Any, file: Path, device: torch.device, dtype: torch.dtype | None) -> None:
    """Give every parameter its tensor; shapes and names must agree exactly."""
    if dtype is not None:
        model.to(dtype)  # on the meta device: says the type of each parameter, which a part may keep wider than the rest
    parameters = dict(model.named_parameters())
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            names = set(tensors.keys())
            missing, left = sorted(parameters.keys() - names), sorted(names - parameters.keys())
            if missing or left:
                said = (
                    f"the parameter {missing[0]!r} has no tensor.{did_you_mean(missing[0], left)}"
                    if missing
                    else f"the tensor {left[0]!r} has no parameter.{did_you_mean(left[0], parameters)}"
                )
                raise WeightsError(f"{file} does not fit its model.json ({len(missing)} missing, {len(left)} left over): {said}")
            for name, parameter in parameters.items():
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    raise WeightsError(
                        f"{file}: {name!r} has shape {shape}, but the model needs {tuple(parameter.shape)}: the two files belong to different models."
                    )
                x = tensors.get_tensor(name)
                if x.device.type == "cpu" and x.data_ptr() % ALIGNED:  # some matrix libraries sum in another order from such a place
                    x = x.clone()
                assign(model, name, x if dtype is None else x.to(parameter.dtype))
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing: the folder holds a description but no parameters.") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is damaged or cut short ({error}): copy it again, or go back to an earlier checkpoint.") from error


def check_plain(model: Any) -> None:
    """Raise :class:`WeightsError` if ``model`` has no numbers, or holds matrices in blocks of few bits, which no writer here can say."""
    if any(x.is_meta for x in model.parameters()):
        raise WeightsError("The model stands on the meta device, where tensors have shapes but no numbers: build it without device='meta', or load one.")
    if any(isinstance(m, Packed) for m in model.modules()):
        raise WeightsError("The model holds packed matrices, which cannot be written as they are: load it without packed=True, or call unpack(model) first.")
    if any(hasattr(x, "tensor_data_names") for x in model.parameters()):
        raise WeightsError("The model's matrices were quantised by torchao, which cannot be written: save the model before quantise(), or load it without.")


def assign(model: Any, name: str, x: torch.Tensor) -> None:
    """Put ``x`` in the place of a parameter of that name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, leaf, torch.nn.Parameter(x, requires_grad=getattr(module, leaf).requires_grad and x.is_floating_point()))

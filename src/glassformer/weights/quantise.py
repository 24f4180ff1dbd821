"""Weight-only quantisation through torchao: the matrices of the blocks in 8 or 4 bits, all else as it was.

    W [out in] ──► int8: one step per row              q in -128 … 127, W ≈ step * q
               └─► int4: a step and a start per group   q in 0 … 15,     W ≈ start + step * q      (32, 64 or 128 numbers of a row)

    y = x W^T + b  with W made again inside the product

Products, sites and parameters keep their names, so a quantised model is looked into like any other. Embeddings, read-out,
norms, biases and the routers of experts (small, and decisive) keep their type, and so does the way out of a latent (``kv_up``): while decoding
it is used as a matrix and not as a layer, and few bits would be unpacked for every token. On CUDA int4 is multiplied in bfloat16 only; on a
CPU torch's 4-bit product takes float32 too, but is many times slower in it.

torchao is no requirement of this package: ``pip install 'glassformer[quantise]'``.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from torch import nn

from glassformer.core.errors import WeightsError, did_you_mean
from glassformer.core.fields import typed
from glassformer.parts.linear import Linear

KINDS = ("int8", "int4")
GROUPS = (128, 64, 32)
"""How many numbers of a row share a step in int4: the largest that divides the row."""
ROWS = {"cpu": 16, "cuda": 1}
"""Of how many rows the 4-bit product takes a multiple."""


@typed(WeightsError)
def quantise(model: nn.Module, kind: str) -> Any:
    """Hold the matrices of ``model``'s blocks in ``"int8"`` or ``"int4"``, in place; gives the model back.

    Raises :class:`WeightsError` if torchao is missing, or naming the first matrix that does not fit.
    """
    check(kind, next(model.parameters()).device, next(model.parameters()).dtype)
    layers = quantisable(model)
    if not layers:
        raise WeightsError("This model has no dense matrices to quantise: its blocks hold none, or they are packed already (load it without packed=True).")
    for path, layer in layers.items():
        _check_shape(path, layer, kind)
    for path, layer in layers.items():
        quantise_layer(path, layer, kind)
    return model.eval()


def quantisable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are quantised, by path: those of the blocks but for routers, and those that their part uses as matrices (``MATRICES``)."""
    left = {f"{path}.{name}" for path, m in model.named_modules() for name in getattr(type(m), "MATRICES", ())}
    found = {
        path: m
        for path, m in model.named_modules()
        if type(m) in (nn.Linear, Linear) and "blocks" in path.split(".") and not path.endswith(".router") and path not in left
    }
    for path, layer in found.items():
        if hasattr(layer.weight, "tensor_data_names"):
            raise WeightsError(f"{path} is quantised already ({type(layer.weight).__name__}): load the model anew to choose another kind.")
    return found


def quantise_layer(path: str, layer: nn.Linear, kind: str) -> None:
    """Hold one layer's matrix in ``kind``."""
    _check_shape(path, layer, kind)
    _torchao("torchao.quantization").quantize_(layer, _config(layer, kind), filter_fn=lambda module, _: module is layer)
    if not hasattr(layer.weight, "tensor_data_names"):  # torchao passes over what it cannot do
        raise WeightsError(f"torchao left {path} {tuple(layer.weight.shape)} as it was: it knows no {kind} for this shape on {layer.weight.device}.")


def check(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise :class:`WeightsError` if ``kind`` is no kind, torchao is missing, or the device has no product for it."""
    if kind not in KINDS:
        raise WeightsError(f"quantise={kind!r} is no kind of quantisation.{did_you_mean(kind, KINDS)} Known: {', '.join(KINDS)}.")
    _torchao("torchao.quantization")
    if kind == "int4" and device.type not in ROWS:
        raise WeightsError(f"There is no int4 product for {device.type}: use int8, or another device ({', '.join(ROWS)}).")
    if kind == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise WeightsError(f"On a GPU int4 is multiplied in bfloat16, but the model is in {str(dtype).removeprefix('torch.')}: load it with dtype='bfloat16'.")


def dtype_for(kind: str, usual: torch.dtype) -> torch.dtype:
    """The type in which a model is loaded that is to be quantised, if nobody asked for another."""
    return torch.bfloat16 if kind == "int4" else usual


def _check_shape(path: str, layer: nn.Linear, kind: str) -> None:
    if kind != "int4":
        return
    if _group(layer) is None:
        raise WeightsError(
            f"{path} reads {layer.in_features} numbers, which is no multiple of {GROUPS[-1]}: int4 needs rows of groups of {', '.join(map(str, GROUPS))}. "
            "Use int8, which fits every shape."
        )
    rows = ROWS[layer.weight.device.type]
    if layer.out_features % rows:
        raise WeightsError(
            f"{path} has {layer.out_features} rows, but the int4 product of {layer.weight.device.type} takes multiples of {rows}: "
            "use int8, which fits every shape."
        )


def _group(layer: nn.Linear) -> int | None:
    return next((g for g in GROUPS if layer.in_features % g == 0), None)


def _config(layer: nn.Linear, kind: str) -> Any:
    """torchao's own settings; none may change the compiler's for the whole process."""
    if kind == "int8":
        return _torchao("torchao.quantization").Int8WeightOnlyConfig(set_inductor_config=False)
    if layer.weight.device.type == "cpu":
        return _torchao("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=_group(layer), set_inductor_config=False)
    return _torchao("torchao.quantization").Int4WeightOnlyConfig(group_size=_group(layer), int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


def _torchao(name: str) -> Any:
    """A module of torchao; what it says of kernels for other machines while it is imported stays unsaid."""
    said = [logging.getLogger(n) for n in ("torchao", "torch.utils._pytree")]
    levels = [s.level for s in said]
    for s in said:
        s.setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise WeightsError(f"Quantisation needs torchao ({name} cannot be imported: {error}): pip install 'glassformer[quantise]'.") from error
    finally:
        for s, level in zip(said, levels, strict=True):
            s.setLevel(level)

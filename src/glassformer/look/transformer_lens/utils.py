"""The small functions that notebooks import as ``utils``."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassformer.core.errors import InputError
from glassformer.core.fields import described

from .names import get_act_name

SliceInput = int | tuple[int, ...] | list[int] | Tensor | None


class Slice:
    """A choice along one axis: an int takes it away, ``(first, end)`` or ``(first, end, step)`` cut, a list picks, None takes all."""

    slice: Any

    def __init__(self, given: Any = None):
        if isinstance(given, Slice):
            given = given.slice
        if isinstance(given, tuple):
            given = builtins.slice(*given)
        if isinstance(given, int) and not isinstance(given, bool):
            self.mode = "int"
        elif isinstance(given, builtins.slice):
            self.mode = "slice"
        elif given is None:
            given, self.mode = builtins.slice(None), "identity"
        elif isinstance(given, list | Tensor | np.ndarray):
            given, self.mode = torch.as_tensor(given), "array"
        else:
            raise InputError(f"A slice is an int, a tuple, a list of positions or None, but {described(type(given))} was given.")
        self.slice = given

    def apply(self, x: Tensor, dim: int = 0) -> Tensor:
        """The choice from an axis of ``x``."""
        index: list[Any] = [builtins.slice(None)] * x.ndim
        index[dim] = self.slice
        try:
            return x[tuple(index)]
        except IndexError as error:
            raise InputError(f"{self.slice!r} was asked for of an axis of size {x.shape[dim]}.") from error

    def __repr__(self) -> str:
        return f"Slice({self.slice})"


def to_numpy(x: Any) -> Any:
    """Numbers of any kind as an array."""
    if isinstance(x, Tensor):
        return x.detach().float().cpu().numpy() if x.dtype == torch.bfloat16 else x.detach().cpu().numpy()
    return np.asarray(x)


def get_corner(x: Any, n: int = 3) -> Any:
    """The first ``n`` of every axis."""
    if not isinstance(x, Tensor):
        return x.get_corner(n)
    return x[tuple(slice(n) for _ in range(x.ndim))]


def get_device() -> torch.device:
    """The best device there is."""
    name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


def lm_cross_entropy_loss(logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False) -> Tensor:
    """Mean of ``-ln p`` of each next token; ``per_token``: [b t-1]. ``attention_mask`` [b t]: 0 where a token is padding."""
    losses = -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    if attention_mask is not None:
        real = (attention_mask[:, :-1] * attention_mask[:, 1:]).to(losses.dtype)
        return losses * real if per_token else (losses * real).sum() / real.sum()
    return losses if per_token else losses.mean()


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """Share of next tokens that were the most probable one."""
    hits = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    return hits if per_token else hits.float().mean()


def remove_batch_dim(x: Tensor) -> Tensor:
    """[1 ..] as [..]."""
    return x[0] if x.shape[0] == 1 else x


def transpose(x: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return x.mT


def is_square(x: Tensor) -> bool:
    """Whether it is a square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether it is square and nothing stands above the diagonal."""
    return is_square(x) and bool(torch.equal(x, x.tril()))


def answer_after(
    prompt: str,
    answer: str | list[str],
    model: Any,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> None:
    """Print rank, logit and probability of an answer after a prompt (of several answers: of the first token of each), and what came first instead."""
    answers = [answer] if isinstance(answer, str) else list(answer)
    answers = [" " + a if prepend_space_to_answer and not a.startswith(" ") else a for a in answers]
    begin = model.to_tokens(prompt, prepend_bos=prepend_bos)[0]
    print("Tokenized prompt:", model.to_str_tokens(begin))
    ranks: list[Any] = []
    for text in answers:
        ids = model.to_tokens(text, prepend_bos=False)[0]
        ids = ids[:1] if len(answers) > 1 else ids
        print("Tokenized answer:", model.to_str_tokens(ids))
        with torch.no_grad():
            logits = model(torch.cat([begin, ids])[None])[0]
        for i, token in enumerate(ids.tolist()):
            row = logits[len(begin) + i - 1]
            p = row.softmax(-1)
            rank = int((row > row[token]).sum())
            ranks.append((model.to_string([token]), rank))
            if print_details:
                print(f"Performance on answer token:\nRank: {rank: <8} Logit: {row[token]:5.2f} Prob: {p[token]:6.2%} Token: |{model.to_string([token])}|")
                for place, j in enumerate(row.topk(min(top_k, len(row))).indices.tolist()):
                    print(f"Top {place}th token. Logit: {row[j]:5.2f} Prob: {p[j]:6.2%} Token: |{model.to_string([j])}|")
    print("Ranks of the answer tokens:", ranks)


answer_after.__test__ = False  # type: ignore[attr-defined]
test_prompt = answer_after  # the name that notebooks know, which pytest would take for a test

__all__ = [
    "Slice",
    "SliceInput",
    "get_act_name",
    "get_corner",
    "get_device",
    "is_lower_triangular",
    "is_square",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "remove_batch_dim",
    "test_prompt",
    "to_numpy",
    "transpose",
]

"""How a tiny random model of the reference library becomes ours, and how the two are held together, site by site."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from glassformer.core.tap import Record

VOCAB = 61
ATOL = 1e-5  # the figure, in float32
# A step's products of few rows are summed lane by lane by compiled code, and in blocks by the reference: two orders of float32, neither of which is exact.
# They were up to 1.13e-5 apart (DeepSeek-V2 with groups, step 9); the tokens must be the same.
STEP_ATOL = 2e-5


def lively(reference: Any, seed: int = 0) -> Any:
    """Random weights large enough that every part matters (a fresh model's 0.02 leaves attention flat and layers linear)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, x in sorted(dict(reference.named_parameters()).items()):
            noise = torch.randn(x.shape, generator=g)
            if x.ndim == 1:
                x.copy_(0.1 * noise + x.mean().round())  # around what it starts from: 1, or 0 for biases and for weights stored less 1
            else:
                x.copy_(noise / math.sqrt(x.shape[-1]))
    return reference.eval()


def tokens(b: int, t: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (b, t), generator=torch.Generator().manual_seed(seed))


def joined(state: dict[str, Tensor], *names: str) -> Tensor:
    return torch.cat([state[n] for n in names])


def fill(model: Any, weights: dict[str, Tensor]) -> Any:
    """Give our model the weights; every parameter must be named and no weight left over (strict)."""
    own = dict(model.named_parameters())
    assert own.keys() == weights.keys(), (sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys()))
    with torch.no_grad():
        for name, x in own.items():
            assert x.shape == weights[name].shape, (name, x.shape, weights[name].shape)
            x.copy_(weights[name])
    return model.eval()


def close(ours: Tensor, theirs: Tensor, what: str, atol: float = ATOL) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5, msg=lambda m: f"{what}: {m}")


def hold_together(
    model: Any, reference: Any, ids: Tensor, layers: int, *, options: dict[str, Any] | None = None, real: Tensor | None = None, **ours: Any
) -> None:
    """Logits, the stream after every layer and every attention pattern of both models agree (at ``real`` positions [b t])."""
    with torch.no_grad():
        theirs = reference(input_ids=ids, output_hidden_states=True, output_attentions=True, **(options or {}))
        tap = Record("**")
        logits = model(ids, tap=tap, **ours)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    for i in range(layers):
        close(tap[f"blocks.{i}.resid_pre"][real], theirs.hidden_states[i][real], f"stream into layer {i}")
        pattern = tap[f"blocks.{i}.attn.pattern"].movedim(1, 2)
        close(pattern[real], theirs.attentions[i].movedim(1, 2)[real], f"pattern of layer {i}")
    close(tap["resid_final"][real], theirs.hidden_states[layers][real], "final stream")
    close(logits[real], theirs.logits[real], "logits")


def greedy_together(model: Any, reference: Any, prompt: Tensor, n: int = 20) -> None:
    """Cached greedy generation gives the reference's tokens, and its logits at every step."""
    theirs = reference.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    cache, ids, feed = model.cache(batch=prompt.shape[0], capacity=prompt.shape[1] + n), prompt, prompt
    with torch.no_grad():
        for step in range(n):
            logits = model(feed, cache=cache, keep=1)[:, -1]
            close(logits, theirs.logits[step], f"logits of step {step}", STEP_ATOL)
            feed = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, feed], 1)
    assert torch.equal(ids, theirs.sequences)

"""The loss of windows of text with some heads switched off, and its slope by every head's gate.

A gate multiplies a head's ``z``: 1 leaves it, 0 is the same as zeroing its rows of the output projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glassformer.core.modes import evaluating
from glassformer.core.tap import Tap
from glassformer.models.encoder_decoder import EncoderDecoderModel

from .patterns import head_names
from .subject import Subject, n_heads, read, reads_tokens, vocabulary
from .windows import Reading, Window

DIRECTIONS = 8
"""Random directions of the output along which gradients are taken, where there is no loss over tokens."""
AT_ONCE = 8192
"""Tokens of a batch of ablations."""
NUMBERS = 2**24
"""Numbers that are held at once: scores over the vocabulary of a batch of ablations, and what all heads write at a batch's chosen queries."""
NEXT, HIDDEN, IN_PLACE = "cross-entropy of the next token", "cross-entropy of hidden tokens", "cross-entropy of tokens that are read in place"
DRIFT = "drift of the output (1 - cosine with the whole model's)"


class Gates(Tap):
    """Multiplies every head's ``z`` by a gate, [b n]."""

    def __init__(self, gates: Tensor, first: dict[str, tuple[int, int]]):
        self.gates, self.first = gates, first

    def visit(self, path: str, x: Tensor) -> Tensor:
        if path not in self.first:
            return x
        start, stop = self.first[path]
        return x * self.gates[:, None, start:stop, None].to(x.dtype)

    def edits(self, path: str) -> bool:
        return path in self.first


class Loss:
    """The loss of windows under gates."""

    def __init__(self, reading: Reading, draw: torch.Generator):
        self.reading, self.draw = reading, draw
        stack, self.model = reading.stack, reading.model
        self.n = len(head_names(stack))
        begin, self.first = 0, dict[str, tuple[int, int]]()
        for layer, path in enumerate(reading.sites("blocks.*.attn.z")):
            self.first[path] = (begin, begin + n_heads(stack, layer))
            begin += n_heads(stack, layer)
        self.scores = reads_tokens(stack)
        self.mask = None if reading.subject.causal or reading.tokenizer is None else reading.tokenizer.mask_id
        self.name = DRIFT if not self.scores else NEXT if reading.subject.causal else HIDDEN if self.mask is not None else IN_PLACE
        self.hidden: dict[Window, list[int]] = {}
        self.whole: dict[Window, Tensor] = {}
        self.subjects: dict[Window, Subject] = {}

    def out(self, window: Window, gates: Tensor) -> Tensor:
        """What the model makes of a window, once for every row of ``gates`` [b n]."""
        s = self._subject(window)
        inputs = [x.expand(len(gates), -1) for x in s.inputs]
        y: Tensor = self.model(*inputs, tap=Gates(gates.to(s.device), self.first))
        return y

    def _subject(self, window: Window) -> Subject:
        """What the model reads of a window: its tokens, some of them hidden where hidden ones are predicted."""
        if window not in self.subjects:
            hidden = self._hidden(window) if self.mask is not None and self.scores else ()
            ids = [t if self.mask is None or i not in hidden else self.mask for i, t in enumerate(window.ids)]
            self.subjects[window] = read(self.model, ids, self.reading.tokenizer, source=self._source(window), note=False)
        return self.subjects[window]

    def _source(self, window: Window) -> Any:
        return self.reading.source(window.text) if isinstance(self.model, EncoderDecoderModel) else None

    def _hidden(self, window: Window) -> list[int]:
        """The places that are hidden or read in place: one in seven of the text's own, at least one."""
        if window not in self.hidden:
            own = torch.arange(window.before, len(window.ids) - window.after)
            self.hidden[window] = own[torch.randperm(len(own), generator=self.draw)[: max(1, len(own) // 7)]].tolist()
        return self.hidden[window]

    def of(self, window: Window, gates: Tensor) -> Tensor:
        """The loss [b] of a window for every row of gates."""
        y = self.out(window, gates)
        if not self.scores:
            return 1 - F.cosine_similarity(y.flatten(1).double(), self._whole(window).double(), -1).cpu()
        ids = torch.tensor(window.ids, device=y.device)
        at = torch.arange(len(ids) - 1) if self.name == NEXT else torch.tensor(self._hidden(window))
        targets = ids[at + 1] if self.name == NEXT else ids[at]
        chosen = y[:, at].double().log_softmax(-1)
        return -chosen.gather(-1, targets.expand(len(gates), -1)[..., None])[..., 0].mean(-1).cpu()

    def _whole(self, window: Window) -> Tensor:
        if window not in self.whole:
            self.whole[window] = self.out(window, torch.ones(1, self.n)).flatten(1).detach()
        return self.whole[window]

    def taylor(self, windows: Sequence[Window]) -> Tensor:
        """Importance [n]: the mean over windows of the absolute slope of the loss by each gate."""
        total = torch.zeros(self.n, dtype=torch.float64)
        with evaluating(self.model), torch.enable_grad():
            for w in windows:
                gates = torch.ones(1, self.n, requires_grad=True)
                if self.scores:
                    total += torch.autograd.grad(self.of(w, gates).sum(), gates)[0][0].double().abs()
                else:
                    total += self._lengths(w, gates)
        return total / len(windows)

    def _lengths(self, w: Window, gates: Tensor) -> Tensor:
        """The length of the derivative of the output (as a unit vector) by each gate, by random directions: ``E (u . dy/dg)^2 = |dy/dg|^2``."""
        y = F.normalize(self.out(w, gates).flatten().double(), dim=0)
        squares = torch.zeros(self.n, dtype=torch.float64)
        for i in range(DIRECTIONS):
            u = torch.randn(y.shape, generator=self.draw, dtype=torch.float64).to(y.device)
            squares += torch.autograd.grad((u * y).sum(), gates, retain_graph=i + 1 < DIRECTIONS)[0][0].double() ** 2
        return (squares / DIRECTIONS).sqrt()

    @torch.no_grad()
    def with_off(self, sets: Sequence[Tensor], windows: Sequence[Window]) -> Tensor:
        """Mean loss over windows with each of these sets of heads off, [len(sets)]; equal windows weigh equally."""
        gates = torch.ones(len(sets), self.n)
        for row, off in enumerate(sets):
            gates[row, off] = 0
        total = torch.zeros(len(sets), dtype=torch.float64)
        wide = vocabulary(self.reading.stack) if self.scores else 1
        with evaluating(self.model):
            for w in windows:
                step = max(1, min(AT_ONCE // len(w.ids), NUMBERS // (len(w.ids) * wide)))
                total += torch.cat([self.of(w, gates[i : i + step]) for i in range(0, len(sets), step)])
        return total / len(windows)

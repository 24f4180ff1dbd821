"""The tuned lens: one affine map per depth, trained so that the model's read-out finds there what it will find at the end.

    h_r ──► h_r + A_r h_r + b_r ──► final norm ──► read-out ──► as near as can be to the model's own distribution

A logit lens that reads nonsense at some depth may read it because the layers after it turn the stream, not because nothing is there yet; the map takes
such a turn out (Belrose et al., arXiv 2303.08112). The model itself does not change: only A and b are trained.

    texts ──► streams [r n d] ──► least squares towards the last stream ──► Adam on KL(output || lens), whitened ──► held-out KL before and after
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import InputError, WeightsError
from glassformer.core.fields import described
from glassformer.core.numerics import wide
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.weights.own import Loaded

from .distributions import kl
from .figure import Theme, lines
from .lens_reading import stream_sites
from .result import SUFFIXES, Grid, Result
from .subject import Subject, Text, check_reads_tokens, most_positions, note_length, read, with_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from glassformer.text import Tokenizer

FILES = ("tuned_lens.safetensors", "tuned_lens.json")
FORMAT = 1
LEAST_TOKENS = 64
RIDGE = 0.02
"""Part of the mean variance that is added to all: what the text does not show stays as it is."""


@dataclass(frozen=True, eq=False)
class TunedLens(Result):
    """An affine map for the stream that enters block 0 and for the one after each block but the last, and what the maps gain on held-out text.

    ``rows``: names of the depths (r). ``before``, ``after`` [r]: mean KL(model's output || read-out there) on held-out text in bits, without and with the
    map. ``fingerprint``: of the model that it was trained for.
    """

    rows: tuple[str, ...]
    weight: Tensor = field(repr=False)
    """[r d d] A: the map is ``h + A h + b``."""
    bias: Tensor = field(repr=False)
    """[r d]"""
    before: Tensor
    after: Tensor
    trained_on: int
    """Tokens."""
    held_out: int
    fingerprint: str

    @property
    def title(self) -> str:
        return f"Tuned lens: {len(self.rows)} maps trained on {self.trained_on:,} tokens, measured on {self.held_out:,} others"

    def grid(self) -> Grid:
        rows = tuple((name, float(a), float(b), float(b / a) if a > 0 else None) for name, a, b in zip(self.rows, self.before, self.after, strict=True))
        return Grid(
            ("depth", "KL before (bits)", "KL after (bits)", "ratio"),
            rows,
            "KL(model's output || read-out at that depth) per token, on text that was held out.",
        )

    def draw(self, figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        named = {"logit lens": self.before, "tuned lens": self.after}
        lines(axes, theme, range(len(self.rows)), named, title=self.title, y_name="KL to the output, bits per token")
        axes.set_xticks(range(len(self.rows)), self.rows, rotation=0 if len(self.rows) < 8 else 45)
        axes.set_ylim(bottom=0)

    def map(self, h: Tensor, row: int) -> Tensor:
        """``h + A h + b`` of the streams [.. d] at a depth."""
        a, b = self.weight[row].to(h.device), self.bias[row].to(h.device)
        x = wide(h)
        return (x + x @ a.T.to(x.dtype) + b.to(x.dtype)).to(h.dtype)

    def check(self, model: Any) -> None:
        """Raise :class:`WeightsError` if the lens was trained for another model."""
        if (own := fingerprint(model)) != self.fingerprint:
            raise WeightsError(
                f"This tuned lens was trained for another model (its fingerprint is {self.fingerprint}, the given model's is {own}): "
                "train one for this model with tuned_lens(model, texts)."
            )

    def save(self, path: str | os.PathLike[str], dark: bool = False) -> Path:
        """Write the maps into a folder (that of the model, say) as ``tuned_lens.safetensors`` and ``tuned_lens.json``; with one of the suffixes of
        :meth:`Result.save`, write the report. Raises :class:`WeightsError` if the folder cannot be written.
        """
        folder = Path(path)
        if not folder.is_dir() and folder.suffix.lower() in SUFFIXES:
            return super().save(path, dark)
        staging: Path | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=folder, prefix=".writing."))
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, staging / FILES[0], metadata={"fingerprint": self.fingerprint})
            about = {"format": FORMAT, **{k: v for k, v in self.to_dict().items() if k not in ("kind", "title")}}
            (staging / FILES[1]).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            files.take_places(staging, folder, last=FILES[1])
        except (OSError, SafetensorError) as error:
            reason, todo = files.trouble(error)
            raise WeightsError(f"The tuned lens could not be written to {folder}: {reason}. {todo}.") from error
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)
        return folder


def load_tuned_lens(folder: str | os.PathLike[str], model: Any = None) -> TunedLens:
    """Open what :meth:`TunedLens.save` wrote. With a ``model``, raises :class:`WeightsError` if the lens was trained for another; also for damaged files."""
    if not isinstance(folder, str | os.PathLike):
        raise WeightsError(f"A tuned lens is opened by the folder that it was saved in, but {described(type(folder))} was given.")
    path = Path(folder)
    if not (path / FILES[1]).exists():
        raise WeightsError(f"There is no tuned lens in {path} ({FILES[1]} is missing): train one with tuned_lens(model, texts) and save it there.")
    try:
        about = json.loads((path / FILES[1]).read_text(encoding="utf-8"))
        tensors = load_file(path / FILES[0])
        n, d = len(about["rows"]), tensors["weight"].shape[-1]
        if tensors["weight"].shape != (n, d, d) or tensors["bias"].shape != (n, d) or about["format"] > FORMAT:
            raise ValueError(f"{n} depths and format {about['format']} are described, the maps are {tuple(tensors['weight'].shape)}")
        report = {name: torch.tensor([math.nan if x is None else x for x in about[name]]) for name in ("before", "after")}
        trained_on, held_out, of_model = int(about["trained_on"]), int(about["held_out"]), str(about["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise WeightsError(f"The tuned lens in {path} cannot be read ({error}): train it again.") from error
    lens = TunedLens(tuple(about["rows"]), tensors["weight"], tensors["bias"], report["before"], report["after"], trained_on, held_out, of_model)
    if model is not None:
        lens.check(getattr(model, "model", model))
    return lens


def fingerprint(model: Any) -> str:
    """A short hash of a model's parameters: names, shapes, and up to 512 values of each to the precision of bfloat16, so that it is the same in float32."""
    seen = hashlib.sha256()
    for name, x in sorted(model.named_parameters()):
        flat = x.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // 512)][:512].float().bfloat16().cpu().view(torch.int16)
        seen.update(f"{name} {tuple(x.shape)}".encode() + some.numpy().tobytes())
    return seen.hexdigest()[:16]


def tuned_lens(
    model: Any,
    texts: Text | Sequence[Any],
    *,
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 8192,
    context: int = 128,
    steps: int = 60,
    batch: int = 512,
    seed: int = 0,
) -> TunedLens:
    """Train a map ``h + A_r h + b_r`` for every depth but the last, by ``KL(softmax(logits) || softmax(readout(final_norm(h + A_r h + b_r))))``.

    ``texts``: a text, ids, or several of either (of an encoder-decoder: pairs of source and text), of which the first ``max_tokens`` tokens are read in
    windows of ``context``; the last eighth of them is held out. The start is the least-squares map to the last stream, or the identity where that reads
    better; then ``steps`` steps of Adam on ``batch`` positions, in coordinates in which the streams are white. The same seed gives the same lens.
    An encoder is read on its unmasked text.

    Raises :class:`InputError` for fewer than 64 tokens, and for a model without scores over tokens. Source: Belrose et al., arXiv 2303.08112.
    """
    for name, value, least in (("max_tokens", max_tokens, 1), ("context", context, 1), ("batch", batch, 1), ("steps", steps, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            more = " (0: least squares only)" if name == "steps" else ""
            raise InputError(f"tuned_lens({name}={value!r}): it is a whole number, at least {least}{more}.")
    rows = _windows(model, texts, tokenizer, max_tokens, context)
    stack = with_weights(rows[0].stack, "tuned_lens()")
    check_reads_tokens(stack, "A tuned lens")
    names, sites = stream_sites(rows[0])
    held = max(1, len(rows) // 8)
    train, test = _gather(rows[:-held], sites), _gather(rows[-held:], sites)
    maps = [_Map(train[r], train[-1], stack) for r in range(len(names) - 1)]
    _descend(maps, train, stack, steps, batch, seed)
    weight, bias = (torch.stack(x) for x in zip(*(m.folded() for m in maps), strict=True))
    zero = TunedLens(names[:-1], torch.zeros_like(weight), torch.zeros_like(bias), torch.empty(0), torch.empty(0), 0, 0, "")
    made = TunedLens(names[:-1], weight, bias, torch.empty(0), torch.empty(0), 0, 0, "")
    before, after = (_distance(lens, test, stack) for lens in (zero, made))
    return TunedLens(names[:-1], weight.cpu(), bias.cpu(), before, after, train.shape[1], test.shape[1], fingerprint(rows[0].model))


# The text


def _windows(model: Any, texts: Any, tokenizer: Tokenizer | None, most: int, context: int) -> list[Subject]:
    """The rows that are run, at least two."""
    inner = model.model if isinstance(model, Loaded) else model  # a foreign model holds one under that name too
    if not isinstance(texts, str | Tensor) and not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise InputError(f"texts is a text, token ids, or a list of either, but {described(type(texts))} was given.")
    if isinstance(inner, EncoderDecoderModel):
        if isinstance(texts, str) or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in texts):
            raise InputError("An encoder-decoder reads two texts, so its lens is trained on pairs: [(source, text), ...].")
        rows, left = [], most
        for source, text in texts:
            rows.append(read(model, text, tokenizer, source=source, note=False))
            left -= len(rows[-1])
            if left <= 0:
                break
        total = sum(map(len, rows))
    else:
        one = isinstance(texts, str | Tensor) or (len(texts) > 0 and isinstance(texts[0], int))
        ids, around = _ids(model, [texts] if one else list(texts), tokenizer, most)
        limit = most_positions(getattr(inner, "decoder", inner)) if hasattr(inner, "sites") else None
        room = max(1, min(context, context if limit is None else limit - len(around[0]) - len(around[1]), len(ids) // 8))
        # A short last window would be a test on a beginning only.
        starts = range(0, max(1, len(ids) - room + 1), room) if ids else ()
        rows = [read(model, [*around[0], *ids[i : i + room], *around[1]], tokenizer, note=False) for i in starts]
        total = len(ids)
    if total < LEAST_TOKENS or len(rows) < 2:
        raise InputError(f"The text has {total} tokens in {len(rows)} rows, but a lens is trained on at least {LEAST_TOKENS} in 2: give more text.")
    note_length(rows[0].model, max(map(len, rows)))
    return rows


def _ids(model: Any, texts: list[Any], tokenizer: Tokenizer | None, most: int) -> tuple[list[int], tuple[list[int], list[int]]]:
    """The first ``most`` ids of the texts, and what the tokenizer puts before and after a text."""
    tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
    ids: list[int] = []
    around: tuple[list[int], list[int]] = ([], [])
    for text in texts:
        if not isinstance(text, str):
            ids += [int(i) for i in (text.flatten() if isinstance(text, Tensor) else text)]
        elif tokenizer is None:
            raise InputError("The texts are text, but there is no tokenizer to read them: give tokenizer=, what gf.load gave in place of the model, or ids.")
        else:
            piece = text[: 12 * most]  # more is seldom read, and encoding a whole book takes longer than the training
            plain, marked = list(tokenizer.encode(piece)), list(tokenizer.prompt(piece))
            ids += plain
            extra = len(marked) - len(plain)
            lead = next((i for i in range(extra + 1) if marked[i : i + len(plain)] == plain), None)
            around = ([], []) if lead is None else (marked[:lead], marked[lead + len(plain) :])
        if len(ids) >= most:
            break
    return ids[:most], around


def _gather(rows: Sequence[Subject], sites: Sequence[str]) -> Tensor:
    """The streams of all rows, [r n d]."""
    kept = []
    for s in rows:
        record, _ = s.run(*sites)
        kept.append(torch.stack([wide(record[s.path(site)][0]) for site in sites]))
    return torch.cat(kept, 1)


# The training


class _Map:
    """The map of one depth in white coordinates: ``h + M W (h - mean) + c`` with ``W = (cov + ridge)^(-1/2)``."""

    def __init__(self, h: Tensor, last: Tensor, stack: Any):
        n, d = h.shape
        x, y = h.double(), (last - h).double()
        self.mean = x.mean(0)
        x = x - self.mean
        cov = x.T @ x / n
        values, vectors = torch.linalg.eigh(cov)
        values = values.clamp_min(0) + RIDGE * values.clamp_min(0).mean() + 1e-12
        self.white = (vectors * values.rsqrt()) @ vectors.T
        m, c = (y - y.mean(0)).T @ x @ self.white / n, y.mean(0)
        # Parameters in units of the last stream, so that one step size serves all models.
        self.unit = float(last.double().pow(2).mean().sqrt()) / math.sqrt(d) or 1.0
        dtype = h.dtype
        self.x = (x @ self.white).to(dtype)
        self.m, self.c = (m / self.unit).to(dtype), (c / self.unit).to(dtype)
        some = torch.arange(0, n, max(1, n // 1024), device=h.device)
        with torch.no_grad():
            final = _logp(stack, last[some])
            fitted, plain = (float(kl(final, _logp(stack, g)).mean()) for g in (self(h, some), h[some]))
        if not fitted < plain:
            self.m, self.c = torch.zeros_like(self.m), torch.zeros_like(self.c)
        self.m.requires_grad_()
        self.c.requires_grad_()

    def __call__(self, h: Tensor, some: Tensor) -> Tensor:
        return h[some] + self.unit * (self.x[some] @ self.m.T + self.c)

    def folded(self) -> tuple[Tensor, Tensor]:
        """A and b of ``h + A h + b``, in float32."""
        a = self.unit * self.m.detach().double() @ self.white
        return a.float(), (self.unit * self.c.detach().double() - a @ self.mean).float()


def _descend(maps: list[_Map], streams: Tensor, stack: Any, steps: int, batch: int, seed: int) -> None:
    """Adam on the divergence, the step falling linearly to zero; all depths see the same positions, whose final distribution is computed once."""
    if not steps:
        return
    draw = torch.Generator().manual_seed(seed)
    n = streams.shape[1]
    order = torch.empty(0, dtype=torch.long)
    adam = torch.optim.Adam([p for m in maps for p in (m.m, m.c)], lr=STEP, betas=(0.9, 0.98))
    for i in range(steps):
        if len(order) < min(batch, n):
            order = torch.cat([order, torch.randperm(n, generator=draw)])
        some, order = order[: min(batch, n)].to(streams.device), order[min(batch, n) :]
        adam.param_groups[0]["lr"] = STEP * (1 - i / steps)
        with torch.no_grad():
            final = _logp(stack, streams[-1][some])
        for m, h in zip(maps, streams, strict=False):
            with torch.enable_grad():
                loss = kl(final, _logp(stack, m(h, some))).mean()
                m.m.grad, m.c.grad = torch.autograd.grad(loss, (m.m, m.c))
        adam.step()


STEP = 0.02


def _logp(stack: Any, h: Tensor) -> Tensor:
    """[n d] -> [n v] What the read-out makes of streams."""
    dtype = next(stack.parameters()).dtype
    return wide(stack.read(h.to(dtype)[None], normed=False)[0]).log_softmax(-1)


@torch.no_grad()
def _distance(lens: TunedLens, streams: Tensor, stack: Any, chunk: int = 1024) -> Tensor:
    """[r] Mean divergence of the lens from the output."""
    total = torch.zeros(len(lens.rows), dtype=torch.float64)
    for part in streams.split(chunk, 1):
        final = _logp(stack, part[-1])
        for r in range(len(lens.rows)):
            total[r] += float(kl(final, _logp(stack, lens.map(part[r], r))).sum())
    return (total / streams.shape[1]).float()


__all__ = ["TunedLens", "fingerprint", "load_tuned_lens", "tuned_lens"]

"""What is looked at: a model and one text, read once and checked.

    read(model, text) ──► Subject ──► .run("blocks.*.attn.pattern") ──► Record, logits
                             ├── .positions("Paris")     which positions are meant
                             ├── .target((" Paris", " Rome"))   which logit, or difference of two, is asked about
                             └── .path("blocks.3.attn.z")       where a site stands in this model

Every function of this room begins with :func:`read`, so that all take the same things: a model (or what ``gf.load`` gives, which has
its tokenizer), a text or token ids, positions counted from 0 (below zero from the end), and targets as ids or as texts of one token.
"""

from __future__ import annotations

import sys
import warnings
from collections import abc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glassformer.core.errors import GlassformerWarning, InputError, SiteError
from glassformer.core.fields import described
from glassformer.core.modes import evaluating
from glassformer.core.tap import Pattern, Record, Tap
from glassformer.models.encoder_decoder import EncoderDecoderModel
from glassformer.text import Tokenizer
from glassformer.weights.own import Loaded

from .stacks import (
    check_layer,
    check_reads_tokens,
    check_whole,
    choose,
    feedforward_of,
    is_causal,
    most_positions,
    n_heads,
    n_layers,
    piece_of,
    read_head,
    reads_tokens,
    shorten,
    vocabulary,
    with_weights,
)

Text = str | Sequence[int] | Tensor
"""A text, or its token ids."""
Positions = int | str | slice | Sequence[int] | None
"""One position, the positions where a piece of text stands, several, or None for the function's own choice."""
TargetLike = "int | str | tuple[int | str, int | str] | Target | None"
"""A token (id, or text of one token), a pair (the difference of their logits), or None for the model's own choice."""


@dataclass(frozen=True)
class Target:
    """The number that is asked about: the logit of ``token``, less that of ``against`` where there is one."""

    token: int
    against: int | None
    label: str

    def of(self, logits: Tensor) -> Tensor:
        """The number at every place of ``logits`` [.. v]: [..]."""
        own = logits[..., self.token]
        return own if self.against is None else own - logits[..., self.against]

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens that it names."""
        return (self.token,) if self.against is None else (self.token, self.against)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and one text. ``source_ids``: what an encoder-decoder's encoder reads (then ``ids`` are the decoder's)."""

    model: Any
    tokenizer: Tokenizer | None
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    """Display form of every token."""
    source_ids: tuple[int, ...] = ()
    source_pieces: tuple[str, ...] = ()
    tap: Tap | None = None
    """What sees or edits every :meth:`run`, before all else."""

    # The model

    @property
    def stack(self) -> Any:
        """The blocks that are looked at: the model itself, or an encoder-decoder's decoder."""
        return self.model.decoder if isinstance(self.model, EncoderDecoderModel) else self.model

    @property
    def prefix(self) -> str:
        """What the paths of :attr:`stack` begin with."""
        return "decoder." if isinstance(self.model, EncoderDecoderModel) else ""

    @property
    def causal(self) -> bool:
        """Whether positions see only what came before."""
        return is_causal(self.stack)

    @property
    def device(self) -> torch.device:
        """Where the model's numbers lie."""
        return next(self.model.parameters()).device

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return n_layers(self.stack)

    def path(self, site: str) -> str:
        """The full path (or pattern) of a site of :attr:`stack`, checked; raises :class:`SiteError` with the nearest names."""
        full = self.prefix + site
        record = Record(full)
        if hasattr(self.model, "check"):  # a foreign model says itself what cannot be reached
            self.model.check(record)
        else:
            record.check([s.path for s in self.model.sites()])
        return full

    def has(self, site: str) -> bool:
        """Whether a site (or pattern) exists in :attr:`stack`."""
        if not hasattr(self.model, "check"):  # asked often: without looking for the nearest names on each miss
            pattern = Pattern.read(self.prefix + site)
            return any(pattern.may_meet(s.path) for s in self.model.sites())
        try:
            self.path(site)
        except SiteError:
            return False
        return True

    # Running

    @property
    def tokens(self) -> Tensor:
        """[1 t]."""
        return torch.tensor([self.ids], device=self.device)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the model is called with: tokens, or source and target."""
        source = (torch.tensor([self.source_ids], device=self.device),) if self.source_ids else ()
        return (*source, self.tokens)

    def run(self, *sites: str, tap: Tap | None = None, grad: bool = False) -> tuple[Record, Tensor]:
        """One forward pass in evaluation mode: what was recorded at ``sites`` (of :attr:`stack`, without prefix), and the logits [t v].

        Without ``sites`` nothing is recorded. ``tap`` comes before the record: what it edits is recorded as edited. ``grad=True`` keeps the graph.
        """
        tap = self.tap if tap is None else tap if self.tap is None else self.tap | tap
        record = Record(*(self.path(s) for s in sites), grad=grad) if sites else Record("**")
        whole = tap if not sites else record if tap is None else tap | record
        with torch.set_grad_enabled(grad), evaluating(self.model):
            logits: Tensor = self.model(*self.inputs, tap=whole)
        return record, logits[0]

    # What is asked about

    def labels(self, positions: Iterable[int] | None = None) -> list[str]:
        """The pieces at these positions (None: all), each with its number where it stands more than once."""
        chosen = range(len(self)) if positions is None else list(positions)
        return [p if self.pieces.count(p) == 1 else f"{p} {i}" for i in chosen for p in (self.pieces[i],)]

    def positions(self, given: Positions, default: Positions = None) -> list[int]:
        """Which positions are meant (None: ``default``, and if that is None all). Raises :class:`InputError` for one that the text has not."""
        given = default if given is None else given
        n = len(self)
        if given is None:
            return list(range(n))
        if isinstance(given, str):
            return self._where(given)
        if isinstance(given, slice):
            found = list(range(n))[given]
            if not found:
                raise InputError(f"{given} holds none of the text's {n} positions.")
            return found
        if not isinstance(given, int) and not hasattr(given, "__iter__"):
            raise InputError(f"A position is a whole number, a word of the text, or a list of numbers, but {described(type(given))} was given.")
        wanted = [given] if isinstance(given, int) else list(given)
        for i in wanted:
            if isinstance(i, bool) or not isinstance(i, int):
                raise InputError(f"A position is a whole number, but {described(type(i))} was given: count from 0, or from the end with -1.")
            if not -n <= i < n:
                raise InputError(f"Position {i} was asked for, but the text has {n} tokens: positions are 0 to {n - 1} (or -1 to {-n}, from the end).")
        if not wanted:
            raise InputError("No position was given: name at least one, or leave it out for all.")
        return [i % n for i in wanted]

    def _where(self, word: str) -> list[int]:
        """The positions of the tokens that a word or piece of the text is made of (its first occurrence)."""
        plain = ["".join(c for c in p if c not in "·⏎⇥␍") for p in self.pieces]  # tokenizers of words keep no spaces, so none counts
        plain = [p.removeprefix("##") if i and len(p) > 2 else p for i, p in enumerate(plain)]
        sought = "".join(word.split())
        begins = [0]
        for p in plain:
            begins.append(begins[-1] + len(p))
        at = "".join(plain).find(sought)
        if at < 0 or not sought:
            raise InputError(f"{word!r} does not stand in the text {shorten(' '.join(self.pieces))!r}: give a word of it, or positions as numbers.")
        return [i for i in range(len(self)) if begins[i] < at + len(sought) and begins[i + 1] > at]

    def position(self, given: Positions) -> int:
        """One position (None: the last; in an encoder with a mask token in the text, that one)."""
        if given is None and not self.causal and self.tokenizer is not None and self.tokenizer.mask_id in self.ids:
            return self.ids.index(self.tokenizer.mask_id)
        found = self.positions(given, -1)
        if len(found) > 1 and not isinstance(given, str):
            raise InputError(f"One position is needed, but {len(found)} were given: {found}.")
        return found[-1]

    def target(self, given: Any, logits: Tensor) -> Target:
        """The number that is asked about; None is the most probable token of ``logits`` [v]. Raises :class:`InputError` for what is no token."""
        if isinstance(given, Target):
            return given
        if given is None:
            best = int(logits.argmax())
            return Target(best, None, self.piece(best))
        if isinstance(given, tuple | list):
            if len(given) != 2:
                raise InputError(f"A target is one token or a pair of two, whose logits are subtracted; {len(given)} were given: {given!r}.")
            a, b = (self.token(g) for g in given)
            if a == b:
                first, second = (repr(g) for g in given)
                same = f"both are {first}" if first == second else f"{first} and {second} are both {self.piece(a)!r}"
                raise InputError(f"A pair of a target is two tokens, whose logits are subtracted, but {same} (id {a}): give another token, or one alone.")
            return Target(a, b, f"{self.piece(a)} − {self.piece(b)}")
        one = self.token(given)
        return Target(one, None, self.piece(one))

    def token(self, given: int | str) -> int:
        """The id of one token. Raises :class:`InputError` for a text of several, and an id beyond the vocabulary."""
        v = vocabulary(self.stack)
        if isinstance(given, bool) or not isinstance(given, int | str):
            raise InputError(f"A token is named by its id or its text, but {described(type(given))} was given.")
        if isinstance(given, int):
            if not 0 <= given < v:
                raise InputError(f"Token id {given} was asked about, but the vocabulary has {v} tokens, 0 to {v - 1}.")
            return given
        if self.tokenizer is None:
            raise InputError(f"{given!r} is a text, but there is no tokenizer to read it: give token ids, or tokenizer=.")
        ids = self.tokenizer.encode(given)
        if len(ids) != 1:
            parts = ", ".join(repr(piece_of(self.tokenizer, i)) for i in ids) or "none"
            # Words within a sentence begin with their space in most vocabularies.
            spaced = self.tokenizer.encode(" " + given) if given[:1] != " " else []
            hint = f" {' ' + given!r} (with its space) is one." if len(spaced) == 1 else ""
            raise InputError(f"{given!r} is {len(ids)} tokens ({parts}), but a target is one:{hint or ' give one of them, or its id.'}")
        return ids[0]

    def piece(self, i: int) -> str:
        """Display form of a token id."""
        return piece_of(self.tokenizer, i)


def read(
    model: Any,
    text: Text,
    tokenizer: Tokenizer | None = None,
    *,
    source: Text | None = None,
    most: int | None = None,
    tap: Tap | None = None,
    note: bool = True,
) -> Subject:
    """The subject of a question: ``model`` (or what ``gf.load`` gave) on ``text``.

    ``text``: a text, which the tokenizer reads with what its file prescribes around it ([CLS], a beginning); or ids, taken as they are.
    ``source``: what an encoder-decoder's encoder reads. ``most``: refuse more tokens than that. ``tap``: what sees or edits every
    :meth:`Subject.run`; only functions that ask the model by it alone may take one. ``note``: warn of a text longer than those the model was made for
    (:func:`note_length`); who reads several texts warns once, of the longest.
    Raises :class:`InputError` for an empty text, one too long, ids beyond the vocabulary, and a text without a tokenizer.
    """
    if tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None)  # a foreign model may have one
    if isinstance(model, Loaded):
        model, tokenizer = model.model, model.tokenizer if tokenizer is None else tokenizer
    if tokenizer is not None and not (hasattr(tokenizer, "prompt") and hasattr(tokenizer, "piece")):
        raise InputError(f"tokenizer= is a tokenizer of glassformer, but {described(type(tokenizer))} was given: Tokenizer.load(path) opens one.")
    if not isinstance(model, nn.Module) or not hasattr(model, "sites"):
        remedy = "look.foreign(model) opens a model of transformers" if isinstance(model, nn.Module) else "gf.load(folder) gives one, spec.build() another"
        raise InputError(f"A model of glassformer is looked into, but {described(type(model))} was given: {remedy}.")
    if next(model.parameters()).device.type == "meta":
        raise InputError("This model stands on the meta device, where tensors have shapes but no numbers: build it without device='meta', or load one.")
    halves = isinstance(model, EncoderDecoderModel)
    begin = (int(model.spec.start),) if isinstance(model, EncoderDecoderModel) and isinstance(text, str) else ()  # a target begins with it
    if halves and source is None:
        raise InputError("An encoder-decoder reads two texts, but one was given: text is the decoder's, source= the encoder's.")
    if not halves and source is not None:
        raise InputError(f"source= is what an encoder reads, but this {type(model.spec).__name__} reads one text only: leave source out.")
    ids = _ids(text, tokenizer, "text", getattr(model, "decoder", model), most, begin)
    source_ids = () if source is None else _ids(source, tokenizer, "source", model.encoder, most)
    if tap is not None and not isinstance(tap, Tap):
        raise InputError(f"tap= sees or edits a pass, but {described(type(tap))} was given: Intervention(...).tap(model) makes one, Edit(...) another.")
    if note:
        note_length(model, len(ids))
    return Subject(model, tokenizer, ids, tuple(piece_of(tokenizer, i) for i in ids), source_ids, tuple(piece_of(tokenizer, i) for i in source_ids), tap)


def note_length(model: Any, tokens: int) -> None:
    """Warn (:class:`GlassformerWarning`) of a text of more tokens than the model was made for, if that is known.

    Known it is of a run's model, which was trained on windows of so many tokens, and of a published one whose config names its positions. Beyond them a
    model computes, but nothing has fitted it to what it meets there. A text beyond learned positions is an error of :func:`read`. The warning stands at
    the line that asked: the first one outside this package.
    """
    known = {} if isinstance(model, EncoderDecoderModel) else getattr(model, "origin", {})  # windows of a pair of texts count neither of them
    trained, named = (known.get(part, {}).get(key) for part, key in (("training", "context"), ("config", "max_position_embeddings")))
    named = getattr(getattr(model, "config", None), "max_position_embeddings", None) if named is None else named  # of a foreign model
    if isinstance(trained, int) and tokens > trained:
        what, todo = f"was trained on windows of {trained}", f"give its first {trained} tokens to stay within them"
    elif trained is None and isinstance(named, int) and tokens > named > 0:
        what, todo = f"names {named} positions in its config", f"give its first {named} tokens to stay within them"
    else:
        return
    frame, level = sys._getframe(1), 2
    ours = (__name__.split(".")[0], "torch")  # torch: what its decorators put between
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ours:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"The text has {tokens} tokens, but this model {what}: beyond them its numbers are untried; {todo}.", GlassformerWarning, level)


def read_pair(model: Any, clean: Text, corrupted: Text, tokenizer: Tokenizer | None = None, **rest: Any) -> tuple[Subject, Subject]:
    """Two texts of equally many tokens. Raises :class:`InputError` with both counts (and the pieces) otherwise."""
    a, b = (read(model, text, tokenizer, note=False, **rest) for text in (clean, corrupted))
    note_length(a.model, max(len(a), len(b)))
    if len(a) != len(b):
        raise InputError(
            f"The texts are compared position by position, but the first has {len(a)} tokens ({' '.join(a.pieces[:12])}) and the second {len(b)} "
            f"({' '.join(b.pieces[:12])}): choose words of equally many tokens."
        )
    return a, b


def _ids(text: Text, tokenizer: Tokenizer | None, name: str, stack: Any, most: int | None, start: tuple[int, ...] = ()) -> tuple[int, ...]:
    if isinstance(text, str):
        if tokenizer is None:
            raise InputError(f"{name} is a text, but there is no tokenizer to read it: give tokenizer=, what gf.load gave in place of the model, or token ids.")
        ids = [*start, *(tokenizer.prompt(text) if not start else tokenizer.encode(text))]
    elif isinstance(text, Tensor):
        if text.is_floating_point() or text.ndim > 2 or (text.ndim == 2 and text.shape[0] != 1):
            raise InputError(f"{name} is a tensor of {text.dtype} and shape {tuple(text.shape)}, but one row of token ids is read: [t] or [1 t].")
        ids = [int(i) for i in text.flatten()]
    else:
        given: Any = text  # a list, or an array of NumPy's
        if not isinstance(given, abc.Sequence) and not hasattr(given, "__array__"):
            raise InputError(f"{name} is {described(type(given))}, but a text or token ids are read.")
        if wrong := [i for i in given if isinstance(i, bool) or not hasattr(i, "__index__")]:
            raise InputError(f"{name} is a list that holds {wrong[0]!r}, but one text is read at a time: a text, or a list of token ids.")
        ids = [int(i) for i in given]
    if not ids:
        raise InputError(f"The {name} has 0 tokens, but at least 1 is looked at: give some text.")
    v, limit = vocabulary(stack), most_positions(stack)
    if max(ids) >= v or min(ids) < 0:
        wrong_id = max(ids) if max(ids) >= v else min(ids)
        raise InputError(f"{name} holds the token id {wrong_id}, but the model's vocabulary is 0 to {v - 1}: use the tokenizer that was saved with this model.")
    if limit is not None and len(ids) > limit:
        raise InputError(f"The {name} has {len(ids)} tokens, but this model has positions for {limit}: give a shorter one, such as its first {limit} tokens.")
    if most is not None and len(ids) > most:
        raise InputError(f"The {name} has {len(ids)} tokens, but at most {most} are shown here: give a shorter one.")
    return tuple(ids)


__all__ = [
    "Positions",
    "Subject",
    "Target",
    "TargetLike",
    "Text",
    "check_layer",
    "check_reads_tokens",
    "check_whole",
    "choose",
    "feedforward_of",
    "is_causal",
    "most_positions",
    "n_heads",
    "n_layers",
    "note_length",
    "piece_of",
    "read",
    "read_head",
    "read_pair",
    "reads_tokens",
    "shorten",
    "vocabulary",
    "with_weights",
]

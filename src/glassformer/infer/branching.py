"""The tree of all continuations that were tried.

    tree = Branches(model, "Once upon a time", tokenizer=tok, temperature=0.8, seed=7)
    first = tree.grow(20)                          # twenty tokens behind the prompt, as generate() draws them
    others = first.branch(at=3, n=2)               # the two next most probable tokens in the place of its token 3
    others[0].grow(20)                             # and how it goes on there
    first.branch(at=0, tokens=[" There"])          # what if it had begun so
    first.branch(at=3, n=5, draw=True)             # drawn again, with other luck
    print(tree)

    Once upon a time
    ├─ ', there was'   61.2 %
    │  ├─ ' a little girl who lived …'   38.0 %   20 tokens, ln p -24.1
    │  ├─ ' once'   21.5 %   4 tokens, ln p -5.9
    │  └─ ' an'   9.1 %   4 tokens, ln p -6.8
    └─ ' There'   0.3 %   1 token, ln p -5.8

**What is computed.** Every path keeps its session: the cache of its tokens and the sampler's memory. A new path is a ``fork`` of the session that
shares most with it and a ``rewind`` to where they part, so that what they share is not read again. ``keep`` sessions stay in memory, the ones used last;
a path whose session is gone, and which shares nothing with those that are left, is read anew when it grows. Either way it says what a computation
from nothing says.

**Luck.** The first path draws what ``generate`` draws with the same seed. A path with a token put in (``n=``, ``tokens=``) goes on with the random
numbers of the path that it left, so that two of them differ by the token and not by luck; with ``draw=True`` each has numbers of its own, fixed by the
tree's seed and the way to it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from math import exp, fsum
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from glassformer.core import files
from glassformer.core.errors import CacheError, InputError, SamplerError
from glassformer.core.fields import hints

from .combining import combine
from .named import Settings, eos_ids
from .options import Options, _checked, _read_sampler, _read_seed, _read_start, read_prompts
from .sampler import Chain, Passed
from .session import Session, Source, _boundaries, _seeded, opened, position_limit

ROOM, KEEP = 256, 8
SUFFIXES = (".html", ".json", ".txt")
TAKEN = ("tokenizer", "max_new_tokens", "sampler", "seed", "eos_id", "tap", "decoder_start")


class Branch:
    """One path of the tree: all tokens behind the prompt. Made by :meth:`Branches.grow` and :meth:`branch`; it grows in place.

    ``ids`` and ``logprobs``: ln p of each token by the model, before any link of the sampler. ``parent`` and ``at``: which path it left, and before
    which token (None and 0 for the first). ``ended``: end-of-sequence was drawn, or nothing can follow.
    """

    def __init__(self, tree: Branches, seed: int, parent: Branch | None = None, at: int = 0):
        self.tree, self.seed, self.parent, self.at = tree, seed, parent, at
        self.ids: list[int] = [] if parent is None else parent.ids[:at]
        self.logprobs: list[float] = [] if parent is None else parent.logprobs[:at]
        self.ended = False

    @property
    def logprob(self) -> float:
        """ln p of all its tokens together."""
        return fsum(self.logprobs)

    @property
    def text(self) -> str:
        """What it says behind the prompt (ids with spaces between if the tree has no tokenizer)."""
        return self.tree._words((), [i for i in self.ids if i not in self.tree.eos])

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Branch({self.text!r}, {_count(len(self))}, ln p {self.logprob:.2f})"

    def grow(self, n: int = 20) -> Branch:
        """Draw up to ``n`` more tokens; it ends early at the end of the text, and grows no more then. Gives itself back.

        Raises :class:`InputError` where the tree has no room for them.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"grow(n) draws n tokens, 1 or more; {n!r} was given.")
        if self.ended:
            return self
        self.tree._check_room(len(self) + n)
        session = self.tree._session(self)
        for _ in range(n):
            drawn = session.step()
            if self._took(drawn.ids[0], drawn.logprobs[0], session):
                break
        return self

    def branch(self, at: int | None = None, n: int | None = None, tokens: Sequence[Any] | None = None, draw: bool = False) -> list[Branch]:
        """New paths that are this one up to its token ``at`` (None: its end, below 0: from the end) and go on otherwise.

        ``n``: with so many of the most probable tokens that no path of the tree has in that place (3); with ``draw``: with ``n`` tokens drawn, by other random
        numbers; ``tokens``: with each of these, an id, a list of ids or a text. Raises :class:`InputError` for a place that the path does not have.
        """
        place: Any = len(self) if at is None else at + len(self) if isinstance(at, int) and at < 0 else at
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place <= len(self):
            raise InputError(f"This path has {_count(len(self))}, so others leave it at 0 to {len(self)}, its end; at={at!r} was given.")
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise InputError(f"n is how many paths branch off, 1 or more; {n!r} was given.")
        if tokens is not None and (n is not None or draw):
            raise InputError("tokens= says which tokens follow, n= and draw= how many and how they are found: give the one or the others.")
        if self.ended and place == len(self):
            raise InputError("This path has come to the end of the text, and nothing follows it: branch off at an earlier place.")
        self.tree._check_room(place + 1)
        if draw:
            return [self._other(place, i).grow(1) for i in range(3 if n is None else n)]
        if tokens is None:
            chosen = self.tree._most_probable(self, place, 3 if n is None else n)
        else:
            chosen = [self.tree._read(t, self.ids[:place]) for t in tokens]
        return [self._with(place, ids) for ids in chosen]

    def _other(self, at: int, i: int) -> Branch:
        seed = hashlib.blake2b(struct.pack(f"<{at + 3}q", _signed(self.seed), len(self.tree.branches), i, *self.ids[:at]), digest_size=8).digest()
        return self.tree._add(Branch(self.tree, int.from_bytes(seed, "little"), self, at))

    def _with(self, at: int, ids: Sequence[int]) -> Branch:
        self.tree._check_room(at + len(ids))
        new = Branch(self.tree, self.seed, self, at)
        session = self.tree._session(new)
        for token in ids:
            new._took(token, put(session, token), session)
        return self.tree._add(new)

    def _took(self, token: int, logprob: float, session: Session) -> bool:
        """One token more; whether it is the last."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.ended = token in self.tree.eos or session.ended[0]
        return self.ended


class Branches:
    """A tree of continuations of one ``prompt`` (a text or ids; an encoder-decoder's source).

    Options are those of :func:`~glassformer.infer.generate` that say how to choose, and ``tokenizer``, ``eos_id``, ``decoder_start``, ``tap``;
    ``max_new_tokens`` is how long a path may become (256). ``keep``: how many sessions stay in memory. Raises what ``generate`` raises.
    """

    def __init__(self, model: Any, prompt: str | Sequence[int], *, keep: int = KEEP, **options: Unpack[Options]):
        model, theirs = opened(model)
        if keep < 1:
            raise InputError(f"keep is how many sessions stay in memory, 1 or more; {keep} was given.")
        self.model, given = combine(model, _checked(theirs | options))
        known = {name: given.pop(name, None) for name in TAKEN}
        refused = [name for name, value in given.items() if name not in hints(Settings) and value not in (None, (), 0, False)]
        if refused:
            raise SamplerError(f"A tree takes no {refused[0]}: its paths are grown by hand. generate() takes it.")
        self.tokenizer, self.tap, self.keep = known["tokenizer"], known["tap"], keep
        prompts, single = read_prompts(prompt, self.tokenizer)  # type: ignore[arg-type]
        if not single:
            raise InputError(f"A tree grows from one prompt, but {len(prompts)} were given: make one for each.")
        self.prompt_ids = prompts[0]
        self.room = self._room(known["max_new_tokens"])
        self.eos = eos_ids(known["eos_id"], self.tokenizer)
        self.sampler = _read_sampler(known["sampler"], known["seed"], given, self.tokenizer, known["eos_id"], self.room)
        (own,), self.seed = _read_seed(known["seed"], prompts)
        self._source: Source | None = None
        self._start = self.prompt_ids
        if hasattr(self.model, "encode") and hasattr(self.model, "decode"):
            self._start, self._source = _read_start(known["decoder_start"], self.model), Source.read(self.model, prompts, self.tap)
        elif known["decoder_start"] is not None:
            raise InputError("decoder_start is for encoder-decoder models; this one continues the prompt itself.")
        self._sessions: OrderedDict[Branch, Session] = OrderedDict()
        self.trunk = Branch(self, own)
        self.branches: list[Branch] = [self.trunk]
        fresh = self._fresh(self.trunk)
        self.seed = fresh.state.seed  # said, or drawn now: one for the whole tree
        self.chain = str(Chain(_seeded(self.sampler, fresh.state)))
        self._remember(self.trunk, fresh)

    # What is used

    def grow(self, n: int = 20) -> Branch:
        """Let the first path grow (see :meth:`Branch.grow`)."""
        return self.trunk.grow(n)

    def branch(self, at: int | None = None, n: int | None = None, tokens: Sequence[Any] | None = None, draw: bool = False) -> list[Branch]:
        """Let others leave the first path (see :meth:`Branch.branch`)."""
        return self.trunk.branch(at, n, tokens, draw)

    def paths(self) -> list[Branch]:
        """The paths that no other continues, most probable first; of equal ones the first."""
        own = {id(b): tuple(b.ids) for b in self.branches}
        inner = {ids[:k] for ids in own.values() for k in range(len(ids))}
        seen: dict[tuple[int, ...], Branch] = {}
        for b in self.branches:
            if own[id(b)] not in inner and b.ids:
                seen.setdefault(own[id(b)], b)
        return sorted(seen.values(), key=lambda b: -b.logprob)

    @property
    def bytes(self) -> int:
        """Memory that the kept sessions' caches hold."""
        return sum(s.cache.bytes for s in self._sessions.values() if s.cache is not None)

    def __iter__(self) -> Iterator[Branch]:
        return iter(self.branches)

    def __len__(self) -> int:
        return len(self.branches)

    def __str__(self) -> str:
        title = self._words((), self.prompt_ids)
        return "\n".join([title.replace("\n", "\\n"), *_lines(self.nested(), "")])

    def __repr__(self) -> str:
        return f"Branches({len(self.paths())} paths, {_count(len({tuple(b.ids[: k + 1]) for b in self.branches for k in range(len(b))}))})"

    def nested(self) -> list[dict[str, Any]]:
        """The tree as plain data: per piece ``text``, ``ids``, ``logprobs``, ``ended``, and ``children``, the most probable first."""
        return self._nested([b for b in self.branches if b.ids], 0)

    def to_html(self) -> str:
        """A page that needs nothing else, light or dark as the reader's system is: every piece of every path can be opened."""
        from .branching_page import render

        return render(self)

    def to_json(self) -> str:
        """Prompt, chain, seed and :meth:`nested` as JSON."""
        told = {
            "prompt": self._words((), self.prompt_ids),
            "prompt_ids": self.prompt_ids,
            "sampler": self.chain,
            "seed": self.seed,
            "tree": self.nested(),
        }
        return json.dumps(told, ensure_ascii=False, indent=1)

    def save(self, file: str | Path) -> Path:
        """Write the tree; the ending says as what: ``.html`` (a page), ``.json`` (:meth:`to_json`) or ``.txt`` (as it prints).

        Raises :class:`InputError` with the remedy if it cannot.
        """
        path = files.check_place(file, "a tree", SUFFIXES, "tree.html")
        return files.save(path, {".html": self.to_html, ".json": lambda: self.to_json() + "\n", ".txt": lambda: f"{self}\n"}[path.suffix.lower()]())

    # The tree

    def _add(self, branch: Branch) -> Branch:
        self.branches.append(branch)
        return branch

    def _nested(self, branches: Sequence[Branch], at: int) -> list[dict[str, Any]]:
        """The pieces that follow the first ``at`` tokens, which all of these paths share."""
        groups: dict[int, list[Branch]] = {}
        for b in branches:
            if len(b) > at:
                groups.setdefault(b.ids[at], []).append(b)
        made = []
        for group in groups.values():
            one, end = group[0], at + 1
            while all(len(b) > end and b.ids[end] == one.ids[end] for b in group):
                end += 1
            made.append(
                {
                    "text": self._words(one.ids[:at], one.ids[at:end]),
                    "ids": one.ids[at:end],
                    "logprobs": one.logprobs[at:end],
                    "ended": any(b.ended and len(b) == end for b in group),
                    "children": self._nested(group, end),
                }
            )
        return sorted(made, key=lambda piece: -piece["logprobs"][0])

    def _words(self, before: Sequence[int], ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        if not before:
            return str(self.tokenizer.decode(list(ids)))
        head, whole = self.tokenizer.decode(list(before)), self.tokenizer.decode([*before, *ids])
        return str(whole[len(head) :] if whole.startswith(head) else self.tokenizer.decode(list(ids)))

    def _most_probable(self, branch: Branch, at: int, n: int) -> list[list[int]]:
        """The ``n`` best tokens of the model that no path has behind the first ``at`` tokens of this one."""
        front = branch.ids[:at]
        taken = {b.ids[at] for b in self.branches if len(b) > at and b.ids[:at] == front}
        probe = Branch(self, branch.seed, branch, at)
        session = self._session(probe, copy=True)
        logits = session._read(())[0].float()
        order = torch.argsort(logits, descending=True, stable=True).tolist()
        return [[i] for i in order if i not in taken and logits[i] > float("-inf")][:n]

    def _read(self, token: Any, before: Sequence[int]) -> list[int]:
        """The ids of an alternative."""
        if isinstance(token, str):
            if self.tokenizer is None:
                raise InputError(f"The alternative {token!r} is a text, and without a tokenizer it cannot be read: give tokenizer=…, or ids.")
            token = list(self.tokenizer.encode(token))
        ids = [token] if isinstance(token, int) and not isinstance(token, bool) else token
        if not isinstance(ids, (list, tuple)) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise InputError(f"An alternative is a text, an id or a list of ids, but {token!r} was given.")
        spec = getattr(getattr(self.model, "decoder", self.model), "spec", None)
        size = getattr(spec, "vocab_size", None)
        if size is not None and max(ids) >= size:
            raise InputError(f"The alternative holds the id {max(ids)}, but the model's {size:,} tokens are 0 to {size - 1:,}.")
        return list(ids)

    # The sessions

    def _room(self, asked: int | None) -> int:
        if asked is not None and asked < 1:
            raise InputError(f"max_new_tokens is how long a path may become, 1 or more; {asked} was given.")
        most = position_limit(self.model)
        if asked is not None or most is None or hasattr(self.model, "encode"):
            return asked or (ROOM if most is None else min(ROOM, most))
        return max(1, min(ROOM, most - len(self.prompt_ids) + 1))

    def _check_room(self, n: int) -> None:
        if n > self.room:
            raise InputError(f"A path of {n} tokens was asked for, but this tree has room for {self.room} behind its prompt: make it with max_new_tokens={n}.")

    def _session(self, branch: Branch, copy: bool = False) -> Session:
        """A session that stands at the end of this path; ``copy`` leaves none in memory."""
        if branch in self._sessions:
            self._sessions.move_to_end(branch)
            return self._sessions[branch]
        session = self._nearest(branch)
        if session is None:
            session = self._fresh(branch)
        for token in branch.ids[session.drawn :]:
            put(session, token)
        session.state.seeds = [branch.seed]
        if not copy:
            self._remember(branch, session)
        return session

    def _nearest(self, branch: Branch) -> Session | None:
        """A fork of the session that shares most with this path, wound back to where they part; None if that is as much as reading anew."""
        shared, best = max(((_common(other.ids[: s.drawn], branch.ids), other) for other, s in self._sessions.items()), key=lambda x: x[0], default=(0, None))
        if best is None:
            return None
        session = self._sessions[best].fork(1)
        try:
            session.rewind(session.drawn - shared)
        except CacheError:  # a ring has lost what came before
            return None
        return session

    def _fresh(self, branch: Branch) -> Session:
        """A session that has to read all: the path behind the prompt at once, if the sampler remembers nothing of it, else token by token."""
        blank = self.sampler.state(1)
        ahead = [] if any(m is not None for m in blank.memory) else branch.ids
        capacity = len(self._start) + self.room
        cache = self.model.cache(batch=1, capacity=capacity, rewind=capacity)  # layers with a window keep all: any place can be gone back to
        session = Session(
            self.model,
            [[*self._start, *ahead]],
            self.sampler,
            room=self.room - len(ahead),
            cache=cache,
            seed=self.seed,
            seeds=[branch.seed],
            tap=self.tap,
            source=self._source,
        )
        session._boundaries = _boundaries(self.model)  # the cache is ours
        session._prompt, session.state.steps = len(self._start), [len(ahead)]
        return session

    def _remember(self, branch: Branch, session: Session) -> None:
        self._sessions[branch] = session
        while len(self._sessions) > self.keep:
            self._sessions.popitem(last=False)


def put(session: Session, token: int) -> float:
    """Let a session of one row go on with ``token`` as if it had drawn it; ln p of it by the model."""
    logits = session._read(()).float()
    with torch.no_grad():
        chosen = torch.tensor([token], device=logits.device)
        seen: dict[int, Passed] = {}
        history = session._ids[:, : session._width]
        if any(m is not None for m in session.state.memory):
            session.sampler._left(logits, history, session.state, seen)
        session.state.advance(session.sampler._learn(logits, chosen, session.state, seen))
        session._append(chosen)
        own: Tensor = logits.log_softmax(dim=-1)[0, token]
    return float(own)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _lines(pieces: Sequence[dict[str, Any]], indent: str, before: Sequence[float] = ()) -> list[str]:
    """The drawing of a tree, line by line."""
    lines = []
    for i, piece in enumerate(pieces):
        last = i + 1 == len(pieces)
        so_far = [*before, *piece["logprobs"]]
        told = f"{100 * exp(piece['logprobs'][0]):.1f} %"
        if not piece["children"]:
            told += f"   {_count(len(so_far))}, ln p {fsum(so_far):.1f}" + (", at its end" if piece["ended"] else "")
        lines.append(f"{indent}{'└─' if last else '├─'} {piece['text']!r}   {told}")
        lines += _lines(piece["children"], indent + ("   " if last else "│  "), so_far)
    return lines


def _count(n: int) -> str:
    return f"{n} token" if n == 1 else f"{n} tokens"


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63

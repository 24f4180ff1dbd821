"""Beam search over a running generation: all beams of all prompts in one forward pass, and every hypothesis accounted for.

    run = BeamRun(session, BeamSearch(num_beams=4), Endings(eos=frozenset({2}), limit=20))
    for found in run.run():                     one per prompt
        found.best                              finished hypotheses, the best first
        found.nodes                             all that were ever considered, if ``record=True``

    prompt 0 ──► 1 row ──► 4 rows ─┐  read the prompt once, fork when there is something to fork
    prompt 1 ──► 1 row ──► 4 rows ─┤
                                   ▼
    step    read ─► ln p ─► links ─► per row its best tokens ─► per prompt and group: which are kept, ended, dead
             ▲                                                                     │ parents and tokens
             └──────────── Session.select(parents), one token more ◄───────────────┘

With phrases to come (``Phrases``), the beams of a prompt are shared out among banks, one for each number of tokens that are still needed
(Post and Vilar 2018, arXiv 1804.06609): each bank in turn, the furthest first, gives its next best hypothesis until the beams are full. A
hypothesis whose phrases no longer fit into what is left is dropped, and the next tokens of phrases are always among the candidates, so the phrases
come with any number of beams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from glassformer.core.errors import SamplerError
from glassformer.core.tap import Record

from ..links import Draw
from ..session import Session
from ..state import uniform
from .endings import Endings
from .hypothesis import Node, root
from .phrases import Phrases
from .settings import BeamSearch, check_together

CROSS = "decoder.blocks.*.cross.pattern"


@dataclass
class Found:
    """What a search found for one prompt: finished hypotheses, the best first; and all hypotheses, in the order in which they came."""

    best: list[Node]
    nodes: list[Node]


@dataclass
class _Group:
    """The beams of one prompt that compete with each other."""

    prompt: int
    index: int
    alive: list[Node]
    finished: list[Node] = field(default_factory=list)  # the best first
    stuck: str | None = None


class BeamRun:
    """One search. ``session`` has a row per prompt and has drawn nothing yet; ``top``: how many of the most probable tokens to keep beside each.

    Raises :class:`SamplerError` if the settings, the sampler and the model do not go together.
    """

    def __init__(self, session: Session, search: BeamSearch, endings: Endings, phrases: Phrases | None = None, record: bool = False, top: int = 0):
        self.session, self.search, self.endings, self.record, self.top = session, search, endings, record, top
        self.phrases = phrases or Phrases()
        check_together(search, session.sampler, len(self.phrases), session.source is not None)
        _check_phrases(self.phrases, endings)
        self.draws = isinstance(session.sampler.final, Draw)
        self.prompts = len(session.lengths)
        self.nodes: list[list[Node]] = [[] for _ in range(self.prompts)]
        self.groups = [_Group(p, g, [root(g, self.phrases.start(), endings.begin(p))]) for p in range(self.prompts) for g in range(search.num_beam_groups)]
        self.lengths = None if session.source is None else list(session.source.lengths)
        self.standing: list[tuple[int, Node]] = []  # prompt and beam of every row, once the rows are copies that are the search's own
        self.cache, self.since = session.cache, 0  # the cache in use, and how many tokens the beams had when it was made
        self.coverage: Tensor | None = None
        self.cross = Record(CROSS) if search.coverage_penalty else None
        if self.cross is not None:
            session.tap = self.cross if session.tap is None else session.tap | self.cross

    def run(self) -> list[Found]:
        """Search to the end. Raises :class:`SamplerError` if a prompt is left without any text."""
        # At first all groups of a prompt stand on its one row.
        rows = {id(group.alive[0]): group.prompt for group in self.groups}
        for step in range(self.endings.limit):
            live = [group for group in self.groups if group.alive]
            if not live:
                break
            scores, logp = self._read(step)
            covered = self._covered()
            pools = self._drawn(live, scores, rows) if self.draws else self._pools(live, scores, rows)
            self._name(pools, logp)
            for prompt in {group.prompt: None for group in live}:
                chosen: dict[int, int] = {}  # tokens that earlier groups have chosen at this step
                for group in live:
                    if group.prompt == prompt:
                        self._advance(group, pools[id(group)], chosen, covered, step)
            rows = self._go_on(step)
        return [self._found(p) for p in range(self.prompts)]

    # What the model says

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        """ln p of every next token [r v] after the links, and before them."""
        session = self.session
        with torch.no_grad():
            logits = session._read(()).float()
            logp = logits.log_softmax(dim=-1)
            if torch.isnan(logp).any():
                what = "NaN" if torch.isnan(logits).any() else "no finite logit, or infinite ones,"
                raise SamplerError(f"The model gave {what} at step {step} of the search. Record('**') as tap shows at which site they begin.")
            if step == 0:
                self._check_vocabulary(logp.shape[1])
            scores, history = logp, session._ids[:, : session._width]
            for i, link in enumerate(session.sampler.links[:-1]):
                if not link.off:
                    scores = link.apply(scores, history, session.state.own(i, type(link).__name__))
        return scores, logp

    def _check_vocabulary(self, size: int) -> None:
        for token in (token for phrase in self.phrases.alternatives for a in phrase for token in a):
            if not 0 <= token < size:
                raise SamplerError(f"force_words names token {token}, but the vocabulary has {size} tokens: ids go from 0 to {size - 1}.")

    def _covered(self) -> list[float]:
        """β Σ_i ln min(Σ_j a_ij, 1) per row: how much of the source has been attended to, up to the token that is being chosen."""
        if self.cross is None or self.lengths is None:
            return []
        now = torch.stack([pattern[:, :, -1].float().mean(dim=1) for pattern in self.cross.values.values()]).mean(dim=0)  # [r s]
        self.cross.clear()
        self.coverage = now if self.coverage is None else self.coverage + now
        lengths = self.session.source.lengths if self.session.source is not None else self.lengths
        places = torch.arange(now.shape[1], device=now.device)[None] < torch.tensor(lengths, device=now.device)[:, None]
        logs = self.coverage.double().clamp(torch.finfo(torch.float32).tiny, 1.0).log()
        found: list[float] = (self.search.coverage_penalty * torch.where(places, logs, 0.0).sum(dim=1)).tolist()
        return found

    # Candidates

    @property
    def _most(self) -> int:
        """How many candidates of a group are looked at: enough that all its beams can go on if as many as there are end-of-sequence tokens end."""
        return max(2, 1 + len(self.endings.eos)) * self.search.width

    def _pools(self, live: list[_Group], scores: Tensor, rows: dict[int, int]) -> dict[int, list[Node]]:
        """Every group's candidates, before diversity: of each beam its best tokens, and those that its phrases need."""
        spare = self.search.num_beams if self.search.num_beam_groups > 1 else 0  # as many may be penalised
        beams = [(group, parent, rows[id(parent)]) for group in live for parent in group.alive]
        if len(self.phrases):
            open_rows = [row for _, parent, row in beams if not self.phrases.met(parent.progress)]
            scores = scores.clone()
            for eos in self.endings.eos if open_rows else ():
                if eos < scores.shape[1]:
                    scores[open_rows, eos] = -inf
        values, ids = (x.tolist() for x in scores.topk(min(self._most + spare, scores.shape[1]), dim=-1))
        pools: dict[int, list[Node]] = {id(group): [] for group in live}
        for group, parent, row in beams:
            pools[id(group)] += [_child(parent, token, row, gain) for token, gain in zip(ids[row], values[row], strict=True)]
        wanted = [(group, parent, row, t) for group, parent, row in beams for t in self.phrases.next(parent.progress) if t not in ids[row]]
        if wanted:
            gains = scores[[row for *_, row, _ in wanted], [t for *_, t in wanted]].tolist()
            for (group, parent, row, token), gain in zip(wanted, gains, strict=True):
                pools[id(group)].append(_child(parent, token, row, gain))
        return {key: [node for node in pool if node.gain > -inf] for key, pool in pools.items()}

    def _drawn(self, live: list[_Group], scores: Tensor, rows: dict[int, int]) -> dict[int, list[Node]]:
        """Every group's candidates, drawn without putting back from softmax(Σ ln p) over all continuations of its beams, in the order of drawing."""
        state, pools = self.session.state, {}
        for group in live:
            places = [rows[id(parent)] for parent in group.alive]
            gains = scores[places].double()
            weights = (gains + gains.new_tensor([p.total for p in group.alive])[:, None]).flatten().softmax(dim=0)
            pool, row = [], places[0]
            for j in range(self._most):
                cumulative = weights.nan_to_num(0.0).cumsum(dim=0)
                total = float(cumulative[-1])
                if total <= 0:
                    break
                u = uniform(state.seed, state.seeds[row], state.steps[row], f"beam {j}")
                at = min(int(torch.searchsorted(cumulative, u * total, right=True)), int(weights.nonzero()[-1]))
                weights[at] = 0.0
                beam, token = divmod(at, scores.shape[1])
                pool.append(_child(group.alive[beam], token, places[beam], float(gains[beam, token])))
            pools[id(group)] = pool
        return pools

    def _name(self, pools: dict[int, list[Node]], logp: Tensor) -> None:
        """Tell every candidate what the model itself thought of its token, and which it thought most probable."""
        nodes = [node for pool in pools.values() for node in pool]
        if not nodes:
            return
        for node, p in zip(nodes, logp[[n.row for n in nodes], [n.token for n in nodes]].tolist(), strict=True):
            node.logprob = p
        if self.top:
            values, ids = (x.tolist() for x in logp.topk(min(self.top, logp.shape[1]), dim=-1))
            for node in nodes:
                node.top = list(zip(ids[node.row], values[node.row], strict=True))

    # Who goes on

    def _advance(self, group: _Group, pool: list[Node], chosen: dict[int, int], covered: list[float], step: int) -> None:
        """Decide what becomes of a group's candidates."""
        before, most, n = group.alive, self._most, step + 1
        for node in pool:
            node.penalty = self.search.diversity_penalty * chosen.get(node.token, 0)
            node.diversity += node.penalty
            node.score = node.total / self.search.divisor(n)
        if not self.draws:
            pool.sort(key=lambda node: (-node.total, node.row, node.token))
        for rank, node in enumerate(pool, 1):
            node.rank = rank
        ranked, beyond = (pool, []) if len(self.phrases) else (pool[:most], pool[most:])
        going, ended = self._sorted_out(ranked)
        kept = self._share_out(sorted(going, key=lambda node: -node.total))
        longest = [node for node in ended if node.ending == "length"]  # they would go on, were it not for the limit
        for node in (*kept, *longest[: self.search.width - len(kept)]):
            chosen[node.token] = chosen.get(node.token, 0) + 1
        self._end(group, ranked, ended, covered)
        last = min((node.score for node in kept), default=None)
        survivors = {id(node) for node in kept}
        for node in going:
            if id(node) not in survivors:
                self._lay_down(node, last)
        held_back = [node for node in beyond if last is not None and node.penalty and node.score + node.penalty / self.search.divisor(n) > last]
        for node in held_back:
            self._lay_down(node, last)
        group.alive = kept
        worth = {id(node.parent) for node in (*kept, *(node for node in ended if node.fate == "finished"))}
        begun = {id(node.parent) for node in pool}
        for parent in before:
            if parent.step >= 0 and id(parent) not in worth:
                parent.fate, parent.by = ("barren", last) if id(parent) in begun else ("stuck", None)
        if not kept and not ended:
            group.stuck = "no token is left to choose from: every logit is -inf after the links" if not pool else "every beginning was dropped for its phrases"
        if self.record:
            self.nodes[group.prompt] += self._worth_keeping(ranked, kept, ended) + held_back
        self._maybe_stop(group, n)

    def _sorted_out(self, ranked: list[Node]) -> tuple[list[Node], list[Node]]:
        """Who may go on, and who has ended."""
        going: list[Node] = []
        ended: list[Node] = []
        for node in ranked:
            node.ending = self.endings.of(node)
            if len(self.phrases):
                node.progress = self.phrases.push(node.progress, node.token)
                if self.phrases.need(node.progress) > self.endings.limit - node.length:
                    node.fate = "no_room"
                    continue
                if node.ending is not None and not self.phrases.met(node.progress):
                    node.fate = "unmet"
                    continue
            (going if node.ending is None else ended).append(node)
        return going, ended

    def _share_out(self, going: list[Node]) -> list[Node]:
        """The beams of the next step: the best, or with phrases the best of each bank in turn."""
        if not len(self.phrases):
            return going[: self.search.width]
        banks: dict[int, list[Node]] = {}
        for node in going:
            banks.setdefault(self.phrases.need(node.progress), []).append(node)
        turns = sorted(((place, need, node) for need, bank in banks.items() for place, node in enumerate(bank)), key=lambda turn: turn[:2])
        return sorted((node for *_, node in turns[: self.search.width]), key=lambda node: -node.total)

    def _end(self, group: _Group, ranked: list[Node], ended: list[Node], covered: list[float]) -> None:
        """Take those that have ended among the finished ones, if they are good enough: among the best of all candidates that have met their phrases."""
        counted = [node for node in ranked if self.phrases.met(node.progress)][: self.search.width]
        good, least = {id(node) for node in counted}, counted[-1].score if counted else None
        for node in ended:
            if id(node) in good:
                self._finish(group, node, covered[node.row] if covered else 0.0)
            else:
                node.fate, node.by = ("late", None) if self.draws else ("outscored" if node.ending == "length" else "late", least)

    def _finish(self, group: _Group, node: Node, coverage: float) -> None:
        node.coverage, node.fate = coverage, "finished"
        node.score += coverage
        merged = sorted([*group.finished, node], key=lambda n: -n.score)
        group.finished = merged[: self.search.width]
        for out in merged[self.search.width :]:
            out.fate, out.by = "displaced", group.finished[-1].score

    def _lay_down(self, node: Node, last: float | None) -> None:
        node.by = last
        if last is None:
            node.fate = "outscored"
        elif node.penalty and node.score + node.penalty / self.search.divisor(node.length) > last:
            node.fate = "diversity"
        else:
            node.fate = "bank" if len(self.phrases) and node.score > last else "outscored"

    def _worth_keeping(self, ranked: list[Node], kept: list[Node], ended: list[Node]) -> list[Node]:
        """What the tree holds of a step: all candidates, but with phrases of those that were dropped only as many as without."""
        if not len(self.phrases):
            return ranked
        stay = {id(node) for node in (*kept, *(node for node in ended if node.fate in ("finished", "displaced")))}
        return [node for i, node in enumerate(ranked) if i < self._most or id(node) in stay]

    def _maybe_stop(self, group: _Group, n: int) -> None:
        """End the group's search if its beams can no longer, or need no longer, better what is finished."""
        if not group.alive or len(group.finished) < self.search.width:
            return
        worst, how = group.finished[-1].score, self.search.early_stopping
        if how is not True:
            longest = self.endings.limit if how == "never" and self.search.length_penalty > 0 else n
            if group.alive[0].total / self.search.divisor(longest) > worst:
                return
        for node in group.alive:
            node.fate, node.by = "pruned", None if how is True else worst
        group.alive = []

    # The next step's rows

    def _go_on(self, step: int) -> dict[int, int]:
        """Make the session's rows those of the beams that go on, with their tokens; returns the row of each."""
        beams = [(group.prompt, node) for group in self.groups for node in group.alive]
        if not beams or step + 1 == self.endings.limit:
            return {}
        if self.session.cache is not self.cache:
            self.cache, self.since = self.session.cache, step
        self._take(beams, [node.row for _, node in beams])
        session, state = self.session, self.session.state
        device = session._ids.device
        tokens = torch.tensor([node.token for _, node in beams], device=device)
        p = torch.tensor([node.logprob for _, node in beams], device=device).exp()
        links = session.sampler.links
        state.advance([m if m is None or link.observes else link.learn(m, p, tokens) for link, m in zip(links, state.memory, strict=True)])
        session._append(tokens)
        if any(link.ends and not link.off for link in links):
            beams = self._let_end(beams)
        return {id(node): row for row, (_, node) in enumerate(beams)}

    def _take(self, beams: list[tuple[int, Node]], rows: list[int]) -> None:
        """Make the rows ``rows`` those of ``beams``, one after another. The cache moves only what a row does not have yet."""
        before, standing = self.session, self.standing
        if rows != list(range(len(before.lengths))):
            cache, before.cache = (before.cache, None) if standing else (None, before.cache)
            self.session = before.select(rows)
            if cache is not None:
                there = [before.lengths[r] - before.drawn for r in rows]  # of the prompts
                self.session.cache = cache.reorder(rows, [self._shared(a, standing[r], n) for a, r, n in zip(standing, rows, there, strict=False)])
            self.coverage = None if self.coverage is None else self.coverage[torch.tensor(rows, device=self.coverage.device)]
            self.cache, standing = self.session.cache, beams
        self.standing = beams if standing else []

    def _shared(self, one: tuple[int, Node], other: tuple[int, Node], prompt: int) -> int:
        """How many first tokens two rows have as copies of each other: none across prompts, or where each has read them anew (see Session._outgrown)."""
        new = one[1].common(other[1])
        return prompt + new if one[0] == other[0] and new >= self.since else 0

    def _let_end(self, beams: list[tuple[int, Node]]) -> list[tuple[int, Node]]:
        """Finish those of which a link says that nothing can follow; who goes on."""
        nodes = [node for _, node in beams]
        over = {id(node) for node, ended in zip(nodes, self.session.ended, strict=True) if ended}
        if not over:
            return beams
        for group in self.groups:
            done = [node for node in group.alive if id(node) in over]
            group.alive = [node for node in group.alive if id(node) not in over]
            for node in done:
                node.ending = "stop"
                if self.phrases.met(node.progress):
                    coverage = 0.0 if self.coverage is None else self._covered_by(nodes.index(node))
                    self._finish(group, node, coverage)
                else:
                    node.fate = "unmet"
            if done:
                self._maybe_stop(group, done[0].length)
        going = {id(node) for group in self.groups for node in group.alive}
        left = [row for row, node in enumerate(nodes) if id(node) in going]
        rest = [beams[row] for row in left]
        if left:
            self._take(rest, left)
        return rest

    def _covered_by(self, row: int) -> float:
        assert self.coverage is not None
        assert self.session.source is not None
        seen = self.coverage[row, : self.session.source.lengths[row]].double().clamp(torch.finfo(torch.float32).tiny, 1.0)
        return self.search.coverage_penalty * float(seen.log().sum())

    def _found(self, prompt: int) -> Found:
        mine = [group for group in self.groups if group.prompt == prompt]
        best = sorted((node for group in mine for node in group.finished), key=lambda node: -node.score)
        if not best:
            why = next((group.stuck for group in mine if group.stuck), None) or "every beginning came to its end before its phrases had come"
            raise SamplerError(f"The search for prompt {prompt} ended without a text: {why}. Let the sampler keep more, or ask for less.")
        return Found(best, self.nodes[prompt])


def _child(parent: Node, token: int, row: int, gain: float) -> Node:
    return Node(parent, token, parent.step + 1, row, parent.group, 0.0, gain, 0.0, parent.sum + gain, parent.diversity, parent.progress, [])


def _check_phrases(phrases: Phrases, endings: Endings) -> None:
    if phrases.tokens > endings.limit:
        raise SamplerError(
            f"The {len(phrases)} phrases of force_words take {phrases.tokens} tokens one after another, but max_new_tokens is {endings.limit}: "
            "allow more tokens, or ask for fewer phrases."
        )
    for token in (t for phrase in phrases.alternatives for a in phrase for t in a):
        if token in endings.eos:
            raise SamplerError(f"force_words holds token {token}, which is end-of-sequence: a text ends there. Leave it out.")

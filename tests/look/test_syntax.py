"""Syntactic relations: the reader of trees, attention between words, and heads planted to find a relation."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

import glassformer as gf
from glassformer import text as texts
from glassformer.core.errors import InputError
from glassformer.look.conllu import Sentence, read_conllu
from glassformer.look.syntax import FINDS_DEPENDENT, FINDS_HEAD, OFFSETS, _members, syntactic_heads
from look import planted, zoo

TREES = """# sent_id = 1
# text = They don't go, du.
1\tThey\tthey\tPRON\t_\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\t_\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\t_\t_\t4\tadvmod\t_\t_
4\tgo\tgo\tVERB\t_\t_\t0\troot\t_\tSpaceAfter=No
4.1\tgone\tgo\tVERB\t_\t_\t_\t_\t_\t_
5\t,\t,\tPUNCT\t_\t_\t4\tpunct\t_\t_
6-7\tdu\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
6\tde\tde\tADP\t_\t_\t7\tcase\t_\t_
7\tle\tle\tDET\t_\t_\t4\tobl\t_\t_
8\t.\t.\tPUNCT\t_\t_\t4\tpunct\t_\t_

1\tGo\tgo\tVERB\t_\t_\t0\troot\t_\t_
"""


def test_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.conllu").write_text(TREES)
    first, second = read_conllu(tmp_path / "a.conllu")
    assert first.text == "They don't go, du."
    assert [first.text[a:b] for a, b in first.spans] == ["They", "do", "n't", "go", ",", "du", "du", "."]  # "de le" is written "du"
    assert first.words[5:7] == ("de", "le") and first.governors == (3, 3, 3, -1, 3, 6, 3, 3)
    assert first.relations == ("nsubj", "aux", "advmod", "root", "punct", "case", "obl", "punct")
    assert second == Sentence("Go", ("Go",), ((0, 2),), (-1,), ("root",))
    assert first.upos == ("PRON", "AUX", "PART", "VERB", "PUNCT", "ADP", "DET", "PUNCT") and first.column("xpos") == (None,) * 8
    with pytest.raises(InputError, match=r"'upso' is no column\. Did you mean 'upos'"):
        first.column("upso")
    with pytest.raises(InputError, match="The sentence 'a' comes from no file, so it has no column 'upos'"):
        _ = Sentence("a", ("a",), ((0, 1),), (-1,), ("root",)).upos
    # Characters that end a line for str.splitlines, but not in a file: in a comment, and in a word.
    (tmp_path / "b.conllu").write_text("# text = a\u2028b\n1\ta\x85b\t_\tX\t_\t_\t0\troot\t_\t_\n\n1.1\tc\t_\tX\t_\t_\t_\t_\t_\t_\n\n")
    (odd,) = read_conllu(tmp_path / "b.conllu")
    assert odd.words == ("a\x85b",)
    for name, opener in (("a.gz", gzip.open), ("a.xz", lzma.open)):
        with opener(tmp_path / name, "wt") as f:
            f.write(TREES)
        assert list(read_conllu(tmp_path / name)) == [first, second]


def test_what_is_no_conllu(tmp_path: Path) -> None:
    file = tmp_path / "a.conllu"
    file.write_text("1 The the\n")
    with pytest.raises(InputError, match=r"a\.conllu, line 1: a line of CoNLL-U has 10 fields between tabs, but this has 1: '1 The the'"):
        list(read_conllu(file))
    file.write_text("x-y\tThe\t_\t_\t_\t_\t0\troot\t_\t_\n")
    with pytest.raises(InputError, match=r"line 1: a line of CoNLL-U begins with its word's number \(3, 3-4 or 3.1\), but this with 'x-y'"):
        list(read_conllu(file))
    file.write_text(TREES.replace("4\tnsubj", "9\tnsubj"))
    with pytest.raises(InputError, match="the sentence that ends at line 14: words are numbered from 1 and each names its head"):
        list(read_conllu(file))
    with pytest.raises(InputError, match="There is no file"):
        list(read_conllu(tmp_path / "b.conllu"))


def test_tokens_belong_to_the_word_that_they_share_most_with() -> None:
    s = Sentence("They don't", ("They", "do", "n't"), ((0, 4), (5, 7), (7, 10)), (1, -1, 1), ("nsubj", "root", "advmod"))
    to = _members(s, [(0, 4), (4, 8), (8, 9), (9, 10)], 1, 6)  # They, " don", "'", "t", between two special tokens
    assert to.tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]


# Heads that are planted to find a relation

NOUNS, VERBS = ["dog", "cat", "man", "fox"], ["saw", "ate", "hit"]


def grammar(n: int, seed: int = 0) -> list[Sentence]:
    """Sentences ``the (old)* noun verb the (old)* noun``, whose subject hangs on the verb and article on its noun."""
    draw = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (), generator=draw))]

    made = []
    for _ in range(n):
        words, governors, relations = [], [], []
        nouns = []
        for part in range(2):
            begin = len(words)
            olds = int(torch.randint(4, (), generator=draw))
            noun = begin + 1 + olds
            words += ["the", *["old"] * olds, pick(NOUNS)]
            governors += [noun] * (1 + olds) + [-2]
            relations += ["det", *["amod"] * olds, ("nsubj", "obj")[part]]
            nouns.append(noun)
            if not part:
                verb = len(words)
                words.append(pick(VERBS))
                governors.append(-1)
                relations.append("root")
        governors = [verb if g == -2 else g for g in governors]
        spans, at = [], 0
        for w in words:
            spans.append((at, at + len(w)))
            at += len(w) + 1
        made.append(Sentence(" ".join(words), tuple(words), tuple(spans), tuple(governors), tuple(relations)))
    return made


def tokenizer() -> Any:
    return texts.train("words", texts=[" ".join(["the", "old", *NOUNS, *VERBS])] * 3, vocab_size=planted.V)


def finds_verb() -> Any:
    """Head 0.0: nouns look at verbs (which stand before, for objects); 0.1: even; 0.2: the word before; 0.3: verbs look at nouns."""
    made, words = planted.planted([["even", "even", "previous", "even"]]), tokenizer()
    k = max(planted.V, planted.P)
    ids = {w: words.encode(w if w == "the" else " " + w)[0] for w in [*NOUNS, *VERBS]}
    with torch.no_grad():
        w = made.blocks[0].attn.qkv.weight
        for head, asks, answers in ((0, NOUNS, VERBS), (3, VERBS, NOUNS)):
            for a in asks:
                w[head * k, ids[a]] = planted.SHARP
            for b in answers:
                w[4 * k + head * k, ids[b]] = 1.0
    return made


def test_a_planted_head_is_found() -> None:
    found = syntactic_heads(finds_verb(), grammar(120), tokenizer=tokenizer(), least=5)
    row = list(zip(found.relations, found.directions, strict=True)).index(("obj", FINDS_HEAD))
    assert found.best[row] == "0.0" and found.own(row) == 1.0 and float(found.gain[row]) > 0.4
    low, high = found.gain_interval[row].tolist()
    assert 0 < low <= float(found.gain[row]) <= high
    other = list(zip(found.relations, found.directions, strict=True)).index(("nsubj", FINDS_DEPENDENT))
    assert found.offset[other] == -1 and float(found.baseline[other]) == 1.0 and found.best[other] in ("0.2", "0.3") and found.own(other) == 1.0
    seen = set(zip(found.relations, found.directions, strict=True))
    assert ("obj", FINDS_DEPENDENT) not in seen and ("nsubj", FINDS_HEAD) not in seen  # they lead forward, and a decoder does not see that far
    assert found.causal and "edges whose target comes later are left out" in " ".join(str(found).split())


def test_the_choice_is_not_made_where_it_is_judged() -> None:
    """Of heads that know nothing, the best of many stays near the others on the other half."""
    model = zoo.model("bert")
    found = syntactic_heads(model, grammar(200, 3), tokenizer=tokenizer(), least=5, seed=1)
    again = syntactic_heads(model, grammar(200, 3), tokenizer=tokenizer(), least=5, seed=1)
    assert found.best == again.best and torch.equal(found.gain_interval, again.gain_interval)
    assert not found.causal and found.heads[-1] == "2.3" and (found.interval[:, 0] <= found.interval[:, 1]).all()
    judged = [found.own(r) for r in range(len(found.relations))]
    assert all(float(found.interval[r, 0]) - 1e-6 <= j <= float(found.interval[r, 1]) + 1e-6 for r, j in enumerate(judged))


def test_answers_are_those_of_a_loop() -> None:
    model, words = zoo.model("bert"), tokenizer()
    sentences = grammar(30, 5)
    found = syntactic_heads(model, sentences, tokenizer=words, least=1, seed=2)
    chooses = torch.randperm(30, generator=torch.Generator().manual_seed(2))[:15].tolist()
    order = sorted(range(30), key=lambda i: len(sentences[i].words))
    reported = [sentences[order[i]] for i in range(30) if i not in chooses]
    right, fixed, count = torch.zeros(12), torch.zeros(len(OFFSETS)), 0
    for s in reported:
        tap = gf.Record("blocks.*.attn.pattern")
        model(torch.tensor([words.encode(s.text)]), tap=tap)
        patterns = torch.cat(list(tap.stack("blocks.*.attn.pattern")[:, 0])).detach()
        for word, (g, r) in enumerate(zip(s.governors, s.relations, strict=True)):
            if r == "amod":
                rows = patterns[:, word].clone()
                rows[:, word] = -1
                right += rows.argmax(-1) == g
                fixed += torch.tensor([word + o == g for o in OFFSETS])
                count += 1
    row = list(zip(found.relations, found.directions, strict=True)).index(("amod", FINDS_HEAD))
    assert found.counts[row] == count and torch.allclose(found.accuracy[row], right / count)
    assert float(found.baseline[row]) == pytest.approx(float(fixed[OFFSETS.index(found.offset[row])]) / count)


def test_words_of_several_tokens() -> None:
    """Attention to a word is the sum over its tokens, from a word the mean: a tokenizer of characters asks the same questions."""
    model, letters = zoo.model("bert"), texts.train("characters", texts=[" ".join(["the", "old", *NOUNS, *VERBS])], vocab_size=zoo.V)
    found = syntactic_heads(model, grammar(20, 1), tokenizer=letters, least=1)
    whole = syntactic_heads(model, grammar(20, 1), tokenizer=tokenizer(), least=1)
    assert set(zip(found.relations, found.directions, strict=True)) == set(zip(whole.relations, whole.directions, strict=True))
    assert found.unseen == whole.unseen == 0


@pytest.mark.parametrize("name", [n for n in zoo.SPECS if n not in ("bert", "t5")])
def test_every_kind_of_decoder(name: str) -> None:
    found = syntactic_heads(zoo.model(name), grammar(24, 2), tokenizer=tokenizer(), least=2)
    assert found.causal and len(found.relations) >= 2 and not found.accuracy.isnan().any()


def test_mistakes_are_named() -> None:
    t5 = zoo.model("t5")
    with pytest.raises(InputError, match=r"an encoder-decoder has two: give its encoder \(model\.encoder\)"):
        syntactic_heads(t5, grammar(4), tokenizer=tokenizer())
    assert not syntactic_heads(t5.encoder, grammar(12), tokenizer=tokenizer(), least=1).causal
    with pytest.raises(InputError, match="there is no tokenizer to read them"):
        syntactic_heads(zoo.model("bert"), grammar(4))
    with pytest.raises(InputError, match=r"1 sentences can be read, but one half chooses and the other reports"):
        syntactic_heads(zoo.model("bert"), grammar(4), tokenizer=tokenizer(), max_sentences=1)
    bad: list[tuple[Any, str]] = [
        (5, "sentences is a whole number, but a CoNLL-U file or a list of Sentence is read"),
        (["the old dog"], "Sentence 0 is a text, but a Sentence with its tree is needed"),
        ([Sentence("a b", ("a", "b"), ((0, 1),), (-1, 0), ("root", "x"))], "Sentence 0 has 2 words, 1 spans, 2 governors and 2 relations"),
        ([Sentence("a", ("a",), ((0, 1),), (7,), ("root",))], r"Sentence 0 has 1 words, 0 to 0, but a word hangs on 7"),
    ]
    for sentences, said in bad:
        with pytest.raises(InputError, match=said):
            syntactic_heads(zoo.model("bert"), sentences, tokenizer=tokenizer())
    for options, said in (({"least": 0}, "least=0: a whole number of at least 1"), ({"max_sentences": "all"}, "max_sentences='all': a whole number")):
        with pytest.raises(InputError, match=said):
            syntactic_heads(zoo.model("bert"), grammar(4), tokenizer=tokenizer(), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"No relation has 50 questions in both halves of 4 sentences"):
        syntactic_heads(zoo.model("bert"), grammar(4), tokenizer=tokenizer(), least=50)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from glassformer.cli.app import main

    gf.save(zoo.model("bert"), tmp_path / "model")
    tokenizer().save(tmp_path / "model")
    rows = []
    for s in grammar(30):
        rows += [
            "\t".join([str(i + 1), w, "_", "_", "_", "_", str(g + 1), r, "_", "_"])
            for i, (w, g, r) in enumerate(zip(s.words, s.governors, s.relations, strict=True))
        ]
        rows.append("")
    (tmp_path / "trees.conllu").write_text("\n".join(rows))
    assert main(["look", "syntax", str(tmp_path / "trees.conllu"), "-m", str(tmp_path / "model"), "--least", "3", "-o", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "Syntactic relations found by 12 heads on 30 sentences" in out and "nsubj" in out and (tmp_path / "a.png").is_file()
    assert main(["look", "syntax", str(tmp_path / "none.conllu"), "-m", str(tmp_path / "model")]) == 2
    assert "There is no file" in capsys.readouterr().err

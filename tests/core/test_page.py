"""The home of pages: one head, one look, a policy that lets nothing else run, and texts that stay texts; the same for every page that is written."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from glassformer.core import files, page
from glassformer.core.errors import InputError
from glassformer.infer import generate
from glassformer.infer.branching import Branches
from glassformer.look import render
from infer.fake import Pieces
from look import zoo
from look.made import made
from look.test_journey import text_way
from look.test_result import Answer

torch.set_num_threads(1)
HOSTILE = [
    "</script><script>alert(1)</script>",
    "</script><img onerror=alert(1)>",
    "<!--",
    "]]>",
    "{{data}}",
    "\ud800",
    "\u202e\u200f\u2066x",
    "\x00\x1b[31m",
    "\"'&amp;",
]
HOSTILE += ["</title></style>", "שלום", "\n", " ", "", "\u2028"]
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Reader(HTMLParser):
    """The elements of a page, and the text of its scripts and styles as a browser takes them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[tuple[str, str]] = []
        self._open = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self.inside.append((tag, ""))
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[-1] = (self._open, self.inside[-1][1] + data)

    def policy(self) -> str:
        return next(a["content"] or "" for tag, a in self.elements if a.get("http-equiv") == "Content-Security-Policy")


def tokenizer(texts: list[str]) -> Pieces:
    return Pieces(*texts, *(f"w{i}" for i in range(zoo.V - len(texts))))


def branches(texts: list[str]) -> Branches:
    tree = Branches(zoo.model("llama"), [0], tokenizer=tokenizer(texts), seed=0)
    tree.grow(3).branch(at=0, tokens=[[i] for i in range(len(texts))])
    return tree


def options(texts: list[str]) -> dict[str, Any]:
    return {"tokenizer": tokenizer(texts), "max_new_tokens": 4, "eos_id": (), "suppress": list(range(len(texts), zoo.V))}


def answer(texts: list[str]) -> Answer:
    return Answer(torch.arange(len(texts)) / 7, tuple(texts))


def way(texts: list[str]) -> Any:
    found = text_way("llama")
    object.__setattr__(found, "pieces", tuple(texts[: len(found.ids)]))
    return found


PAGES: dict[str, Callable[[list[str]], str]] = {
    "trace": lambda texts: generate(zoo.model("llama"), [0], trace=20, seed=1, **options(texts)).trace.to_html(),
    "beams": lambda texts: generate(zoo.model("llama"), [0], num_beams=4, beam_tree=True, **options(texts)).tree.to_html(),
    "branches": lambda texts: branches(texts).to_html(),
    "inside": lambda texts: render(made(texts)),
    "answer": lambda texts: answer(texts).to_html(),
    "journey": lambda texts: way(texts).to_html(),
    "title": lambda texts: page.scripted("".join(texts), {"texts": texts}, "glassformer.infer", "trace.html", "trace.css", "trace.js"),
    "still": lambda texts: page.still("".join(texts), "".join(f"<p title='{page.escape(t)}'>{page.escape(t)}</p>" for t in texts)),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_one_file_of_one_look_in_which_texts_stay_texts(name: str) -> None:
    content = PAGES[name](HOSTILE)
    content.encode()  # no lone half is left
    assert content.startswith("<!doctype html>") and not UNSEEN.search(content)
    found, plain = Reader(content), Reader(PAGES[name]([f"t{i}" for i in range(len(HOSTILE))]))
    assert {tag for tag, _ in found.elements} == {tag for tag, _ in plain.elements}
    inside = [text for tag, text in found.inside if tag != "title"]
    assert [text for tag, text in found.inside if tag == "style"] == [inside[0]] and inside[0].startswith(page._file("glassformer.core", "page.css"))
    allowed = {f"{kind}-src '{page._hash(text)}'" for kind, text in zip(("style", "script"), [inside[0], *inside[2:]], strict=False)}
    policy = set(found.policy().split("; "))
    assert policy == {"default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'", *allowed}
    if len(inside) == 3:  # with a script
        assert inside[2].startswith(page._file("glassformer.core", "page.js"))
        assert inside[2] == next(text for tag, text in reversed(plain.inside) if tag == "script"), "the script depends on the texts"
        json.loads(inside[1])
    for tag, attributes in found.elements:
        assert not any(n == "style" or n.startswith("on") for n in attributes), (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "form") and (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "data:").startswith("data:")


@pytest.mark.parametrize("name", ["trace", "beams", "branches", "inside"])
def test_every_place_that_a_script_asks_for_is_there(name: str) -> None:
    content = PAGES[name](["a", "b", "c"])
    ids = [a["id"] for _, a in Reader(content).elements if "id" in a]
    assert len(ids) == len(set(ids)) and set(re.findall(r'\$\("([\w-]+)"\)', content)) <= set(ids)
    assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|\beval\(|fetch\(|XMLHttpRequest|@import|url\(", content)
    declared = re.findall(r"^(?:const|let|function) (\w+)", content[content.rindex("<script>") :], re.MULTILINE)
    assert len(declared) == len(set(declared)), "a name is declared twice, which ends a script"


def test_the_policy_is_the_hash_of_what_stands_there() -> None:
    content = page.still("t", "<p>x</p>", "p { color: red; }")
    style = content[content.index("<style>") + 7 : content.index("</style>")]
    assert f"style-src 'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'" in content and style.endswith("p { color: red; }")
    assert "<script" not in content and "script-src" not in content and 'id="theme"' not in content


def test_texts_in_html() -> None:
    assert page.escape("a<b>'\"&\n\tא") == "a&lt;b&gt;&#x27;&quot;&amp;\n\tא"
    assert page.escape("\x00\ud800\u202e\x7f") == "‹U+0000›‹U+D800›‹U+202E›‹U+007F›"
    assert page.printed("<i>\u202e") == '<pre style="line-height:1.3">&lt;i&gt;‹U+202E›</pre>'


@pytest.mark.parametrize(("x", "said"), [(None, None), (float("nan"), None), (-float("inf"), None), (0.0, 0.0), (1 / 3, 0.3333), (123456.0, 123500.0)])
def test_numbers(x: float | None, said: float | None) -> None:
    assert page.short(x) == said and (x != 1 / 3 or page.short(x, 6) == 0.333333)


def test_light_and_dark_are_readable() -> None:
    """The contrast of every text colour with paper and panels is at least 4.5 (WCAG AA), in light and dark."""
    colours = dict(re.findall(r"--([\w-]+): light-dark\((#\w{6}, #\w{6})\)", page._file("glassformer.core", "page.css")))

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for side in (0, 1):
        for paper in ("bg", "soft"):
            for ink in ("ink", "dim", "mark", "link"):
                a, b = (light(colours[name].split(", ")[side]) for name in (ink, paper))
                assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5, (ink, paper, side)


# Saving


def test_the_page_of_branches_holds_the_whole_tree(tmp_path: Any) -> None:
    tree = Branches(zoo.model("llama"), "the old man", tokenizer=zoo.words(), suppress=[27, 28, 29, 30], eos_id=(), seed=1)
    first = tree.grow(6)
    first.branch(at=2, n=2)[0].grow(3)
    first.branch(at=0, tokens=[5])
    content = tree.save(tmp_path / "tree.html").read_text(encoding="utf-8")
    assert content == tree.to_html() and files.save(tmp_path / "x.json", tree.to_json()).is_file()
    held = json.loads(re.search(r'id="data">(.*?)</script>', content, re.DOTALL)[1])  # type: ignore[index]
    nodes = [dict(zip(held["fields"], row, strict=True)) for row in held["nodes"]]
    leaves = []
    for i, node in enumerate(nodes):
        ids, total, at = [], 0.0, i
        while at is not None:
            assert nodes[at]["parent"] is None or nodes[at]["parent"] < at
            ids, total, at = nodes[at]["ids"] + ids, total + sum(nodes[at]["logprobs"]), nodes[at]["parent"]
        if all(other["parent"] != i for other in nodes):
            leaves.append((ids, total))
        assert set(map(str, node["ids"])) <= held["texts"].keys()
    assert sorted(ids for ids, _ in leaves) == sorted(p.ids for p in tree.paths())
    assert {tuple(ids): pytest.approx(total, abs=1e-3) for ids, total in leaves} == {tuple(p.ids): p.logprob for p in tree.paths()}
    assert held["prompt"] == "the old man" and held["seed"] == str(tree.seed)


def test_a_tree_that_has_not_grown_and_one_without_a_tokenizer_are_pages() -> None:
    tree = Branches(zoo.model("llama"), [3, 1], seed=0)
    assert '"nodes":[]' in tree.to_html()
    tree.grow(2)
    assert f'"{tree.trunk.ids[0]}":"#{tree.trunk.ids[0]}"' in tree.to_html() and '"prompt":"3 1"' in tree.to_html()


@pytest.mark.parametrize("ending", ["html", "json", "csv", "txt"])
def test_a_lone_half_of_a_pair_does_not_stop_a_file(ending: str, tmp_path: Any) -> None:
    thing = branches(HOSTILE) if ending == "txt" else answer(HOSTILE)
    path = thing.save(tmp_path / f"a.{ending}")
    text = path.read_text(encoding="utf-8")
    if ending == "json":
        assert json.loads(text)["names"] == HOSTILE
    else:
        assert ("‹U+D800›" if ending == "html" else "\\ud800") in text
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{ending}"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("a.png", r"'a.png' ends in '.png', but the ending says how a thing is written: one of \.html, \.json, \.txt\.$"),
        ("a", "'a' has no ending, but"),
        ("no/a.html", "the folder '.*no' does not exist; create it or choose another"),
        ("folder.html", "it is a folder, and a thing is a file. Name one in it, such as '.*thing.html'; what was there before is untouched"),
        (7, "A thing is written to a file, but a whole number was given: name one, such as 'thing.html'"),
    ],
)
def test_places_that_nothing_can_be_written_to(place: Any, said: str, tmp_path: Any) -> None:
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(InputError, match=said):
        files.check_place(tmp_path / place if isinstance(place, str) else place, "a thing", (".html", ".json", ".txt"), "thing.html")
    assert files.check_place(str(tmp_path / "A.HTML"), "a thing", (".html",), "thing.html") == tmp_path / "A.HTML"


def test_what_the_system_refuses_is_said(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.html").write_text("old")
    monkeypatch.setattr(type(tmp_path), "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(
        InputError, match="'.*a.html' cannot be written: Permission denied. Choose a folder that you may write to; what was there before is untouched"
    ):
        files.save(tmp_path / "a.html", "new")
    assert (tmp_path / "a.html").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.html"]

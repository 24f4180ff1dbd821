"""The page: one file, no network, exact numbers, nothing from the text taken for HTML."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glassformer.core.errors import InputError
from glassformer.look import gather, page, render, write_page
from glassformer.look.pages import data, pack, unpack
from glassformer.models.presets import preset
from glassformer.text import train
from look.made import Letters, made
from tools import built

WORDS = ["The", " cat", " sat", " on", " the", " mat", ".", " The", " cat", " sat"]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "{{data}}",
    "\"'`&amp;\\",
    "\u202e\u2066abc",
    "שלום",
    "👩\u200d🚀",
    "\x00\x1b[31m\x7f\x85",
    "\n\r\t",
    "\u2028\u2029",
    "\u200b",
    "\u0301",
    "",
]


class Reader(HTMLParser):
    """The elements of a page and the text of each script and style."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self._open = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in self.inside:
            self._open = tag
            self.inside[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, text: str) -> None:
        if self._open:
            self.inside[self._open][-1] += text


def embedded(content: str) -> dict[str, Any]:
    return json.loads(Reader(content).inside["script"][0])


def test_numbers_on_the_page_are_the_recorded_ones() -> None:
    model = built("llama")
    inside = gather(model, Letters(), "hello, hello world")
    found = embedded(page(model, Letters(), "hello, hello world"))
    t = len(inside.ids)
    assert found["ids"] == list(inside.ids)
    for half, heads, pattern in zip(found["patterns"]["half"], found["patterns"]["heads"], inside.patterns, strict=True):
        unpacked = unpack(half, heads, t, found["patterns"]["packing"])
        np.testing.assert_allclose(np.nan_to_num(unpacked), pattern, rtol=2**-11, atol=2**-24)
        np.testing.assert_array_equal(np.isnan(unpacked), np.broadcast_to(np.triu(np.ones((t, t), bool), 1), unpacked.shape))
    assert inside.lens is not None
    assert found["lens"]["ids"] == inside.lens.ids.tolist()
    np.testing.assert_allclose(found["lens"]["p"], inside.lens.p, rtol=1e-3)
    assert [row[-1] for row in found["lens"]["next_p"]] == [None] * 3
    np.testing.assert_allclose(found["norms"]["stream"], inside.norms.stream, rtol=1e-3)
    assert found["vocabulary"].keys() >= {str(i) for i in inside.ids}


@pytest.mark.parametrize("causal", [True, False])
def test_packed_patterns_come_back_and_masked_is_not_the_same_as_zero(causal: bool) -> None:
    draw = np.random.default_rng(0)
    masked = np.triu(np.ones((7, 7), bool), 1) if causal else draw.random((7, 7)) < 0.3
    pattern = np.where(masked, 0, 10.0 ** draw.uniform(-12, 0, (3, 7, 7))).astype(np.float32)
    pattern[1, 6, 0], masked[6, 0] = 0, False  # a soft-max that underflowed
    packing = "lower" if causal else "full"
    packed = pack(pattern, masked, packing)
    assert len(base64.b64decode(packed)) == 2 * 3 * (28 if causal else 49)
    back = unpack(packed, 3, 7, packing)
    np.testing.assert_array_equal(np.isnan(back), np.broadcast_to(masked, back.shape))
    np.testing.assert_allclose(np.nan_to_num(back), pattern, rtol=2**-11, atol=2**-24)
    np.testing.assert_array_equal(back == 0, (pattern == 0) & ~masked)
    np.testing.assert_array_equal(unpack(pack(-pattern, masked, packing), 3, 7, packing), -back)


@pytest.mark.parametrize("causal", [True, False])
def test_only_patterns_that_never_look_ahead_are_stored_as_triangles(causal: bool) -> None:
    found = data(made(WORDS, causal=causal))
    assert (found["causal"], found["patterns"]["packing"]) == ((True, "lower") if causal else (False, "full"))


def test_nothing_in_a_text_becomes_html() -> None:
    plain, hostile = Reader(render(made(WORDS))), Reader(render(made(HOSTILE)))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.inside["script"][1:] == plain.inside["script"][1:]
    content = render(made(HOSTILE))
    block = content[content.index('id="data">') :].split("</script>")[0]
    assert not re.search(r"[<>&]|[^\x20-\x7e]", block.removeprefix('id="data">'))
    pieces = embedded(content)["pieces"]
    assert pieces[0] == HOSTILE[0]
    assert pieces[3] == "{{data}}"  # what is filled in is not filled again
    assert pieces[7] == "👩\u200d🚀"
    assert all(not re.search(r"[\x00-\x20\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069]", p) for p in pieces)
    assert "" not in pieces


def test_a_hostile_name_stays_a_name() -> None:
    found = Reader(page(built("gpt2"), Letters(), "abc", title="</title><script>alert(1)</script>\n\u202ex"))
    assert len(found.inside["script"]) == 2
    assert found.inside["title"] == ["Inside </title><script>alert(1)</script>⏎‹U+202E›x"]


@pytest.mark.parametrize("text", ["</script>", "\x00 \x07", "שלום עולם", "👩‍🚀 日本語", "a\nb\tc", "\u202e", "'\"<&>"])
def test_texts_of_every_kind_with_a_real_tokenizer(text: str) -> None:
    tokenizer = train("bytes", texts=["abc"])
    found = embedded(page(preset("tiny", vocab_size=tokenizer.vocab_size).build(seed=0), tokenizer, text))
    assert found["ids"] == tokenizer.encode(text)
    assert all(piece and not re.search(r"[\x00-\x20]", piece) for piece in found["pieces"])


def test_the_page_asks_the_network_for_nothing() -> None:
    content = render(made(WORDS))
    # The name of SVG's namespace is a name, not an address.
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w\S*", re.sub(r"http://www\.w3\.org/2000/svg", "", re.sub(r"^\s*//.*$", "", content, flags=re.M)))
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|importScripts|import\(|\beval\(|innerHTML|insertAdjacentHTML|document\.write", content
    )
    reader = Reader(content)
    for tag, attributes in reader.elements:
        assert tag not in {"iframe", "object", "embed", "base", "img", "form"}
        assert "src" not in attributes
        assert "href" not in attributes or attributes["href"] == "data:,"
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_the_security_policy_lets_nothing_but_the_pages_own_script_and_style_run() -> None:
    reader = Reader(render(made(WORDS)))
    policy = next(a["content"] for tag, a in reader.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    for kind, text in (("script", reader.inside["script"][1]), ("style", reader.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_a_page_of_a_gpt2_sized_model_stays_small() -> None:
    assert len(render(made((WORDS * 7)[:64], 12, 12)).encode()) < 2_000_000


def test_a_page_that_no_browser_opens_well_is_refused() -> None:
    inside = made(WORDS, 1, 1)
    many = np.zeros((1, 512, 512), np.float32)
    object.__setattr__(inside, "ids", (0,) * 512)
    object.__setattr__(inside, "masked", (np.triu(np.ones((512, 512), bool), 1),))
    object.__setattr__(inside, "patterns", (np.broadcast_to(many, (600, 512, 512)),))
    with pytest.raises(InputError, match=r"600 heads on 512 tokens would make a page of 200 MB, but at most 96 MB .*: give a text of at most 354 tokens"):
        data(inside)


def test_every_element_that_the_script_asks_for_is_there() -> None:
    content = render(made(WORDS))
    ids = [a["id"] for _, a in Reader(content).elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', content)) <= set(ids)


def test_every_control_has_a_name() -> None:
    content = render(made(WORDS))
    for tag, attributes in Reader(content).elements:
        if tag == "section":
            assert "aria-label" in attributes or "aria-labelledby" in attributes
        if attributes.get("role") in {"group", "region", "grid"}:
            assert attributes.get("aria-label")
    assert "prefers-reduced-motion" in content
    assert 'name="viewport"' in content


def test_the_page_does_not_say_what_is_false() -> None:
    said = " ".join(render(made(WORDS)).split())
    assert "never later ones" in said
    assert "it reads out its last layer and no other" in said
    assert "an observer’s view" in said
    assert "Soft-max has no threshold" in said
    assert "does not make them sum to 1" in said


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "inside.html"
    assert write_page(target, built("gpt2"), Letters(), "hello") == target
    first = target.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")

    def broken(self: Path, other: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(InputError, match=r"cannot be written to '.*inside\.html': disk full\. Choose another place; what was there before is untouched"):
        write_page(target, built("gpt2"), Letters(), "other")
    assert target.read_text(encoding="utf-8") == first
    assert [p.name for p in tmp_path.iterdir()] == ["inside.html"]


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written to '.*x\.html': the folder '.*nowhere' does not exist; create it or choose another"):
        write_page(tmp_path / "nowhere" / "x.html", built("gpt2"), Letters(), "hello")

"""Text that streams: whole characters only, and nothing of a stop string, wherever the tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from glassformer.core.errors import SamplerError
from glassformer.infer.text import Detokenizer, StopStrings
from infer.fake import Bytes

TEXT = "a é 日本語 🙂👩‍👩‍👧 end"


def cut(data, sizes):
    """``data`` in pieces of the given sizes, then the rest."""
    pieces, at = [], 0
    for n in sizes:
        pieces.append(data[at : at + n])
        at += n
    return [*pieces, data[at:]]


class Chunks:
    """A tokenizer whose tokens are arbitrary byte strings."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_characters_come_whole(size):
    data = TEXT.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    stream, shown = Detokenizer(Chunks(pieces)), []
    for i in range(len(pieces)):
        shown.append(stream.push(i))
        assert TEXT.startswith("".join(shown))
        assert "\ufffd" not in shown[-1]
    assert stream.flush() == ""
    assert "".join(shown) == TEXT


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.lists(st.integers(1, 4), max_size=60), st.integers(0, 12))
def test_any_bytes_come_out_as_the_whole_would_be_decoded(data, sizes, n_context):
    pieces = cut(data, sizes)
    tokenizer = Chunks(pieces)
    stream = Detokenizer(tokenizer)
    shown = "".join([stream.push(i) for i in range(len(pieces))]) + stream.flush()
    assert shown == data.decode(errors="replace")


def test_a_long_text_is_decoded_by_a_window_only():
    class Measured(Bytes):
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer, text = Measured(), "日本語 and some more; " * 40
    stream = Detokenizer(tokenizer)
    assert "".join(map(stream.push, tokenizer.encode(text))) == text
    assert tokenizer.longest <= Detokenizer.WINDOW + 4


def test_a_token_is_written_as_it_is_after_its_context():
    class Spaced:
        """Drops the space in front of a text, as SentencePiece does."""

        def decode(self, ids):
            return "".join(f" {'abc'[i]}" for i in ids).removeprefix(" ")

    assert Detokenizer(Spaced()).push(1) == "b"
    assert Detokenizer(Spaced(), context=[0]).push(1) == " b"
    stream = Detokenizer(Spaced(), context=[0])
    assert "".join(stream.push(i % 3) for i in range(100)) == "".join(f" {'abc'[i % 3]}" for i in range(100))


def test_half_a_character_at_the_end_is_flushed_as_a_replacement():
    stream = Detokenizer(Bytes())
    assert [stream.push(b) for b in "é".encode()[:1]] == [""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


# Stop strings


def feed(stops, pieces):
    stop, shown = StopStrings(stops), []
    for piece in pieces:
        text, met = stop.push(piece)
        shown.append(text)
        if met:
            return shown, True
    return [*shown, stop.flush()], False


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "met"),
    [
        (["END"], ["a", "E", "N", "D", "x"], ["a", "", "", ""], True),
        (["END"], ["aE", "Nb", "END"], ["a", "ENb", ""], True),
        (["END"], ["xENENDy"], ["xEN"], True),
        (["END"], ["a E", "N"], ["a ", "", "EN"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
        (["\n\n", "##"], ["one\n", "\ntwo ##"], ["one", ""], True),
        (["b", "abc"], ["a", "bc"], ["", "a"], True),
        (["abc", "b"], ["ab", "c"], ["a"], True),
        (["b", "ab"], ["xa", "b"], ["x", ""], True),
        ([], ["a", "b"], ["a", "b", ""], False),
    ],
)
def test_stop_strings_across_the_borders_of_pieces(stops, pieces, shown, met):
    assert feed(stops, pieces) == (shown, met)


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 3), max_size=20))
def test_cutting_at_stop_strings_does_not_depend_on_the_pieces(text, stops, sizes):
    shown, met = feed(stops, cut(text, sizes))
    one_by_one, met_too = feed(stops, list(text))
    ends = [text.find(s) for s in stops if s in text]
    assert met == met_too == bool(ends)
    assert "".join(shown) == "".join(one_by_one)
    if ends:
        assert text.startswith("".join(shown))
        assert not any(s in "".join(shown) for s in stops)
    else:
        assert "".join(shown) == text


def test_an_empty_stop_string_is_refused():
    with pytest.raises(SamplerError, match="stop string is empty"):
        StopStrings(["x", ""])

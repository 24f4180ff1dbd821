"""Display forms of tokens: every character visible, none that disturbs its neighbours."""

from __future__ import annotations

import pytest

from glassformer.look.pages import shown_line, shown_text
from glassformer.text.shown import shown


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (" the", "·the"),
        ("\n\t", "⏎⇥"),
        ("\x00\x1b", "␀␛"),
        ("\x7f\x85", "␡‹U+0085›"),
        ("\u202eabc", "‹U+202E›abc"),
        ("\ud83d", "‹U+D83D›"),
        ("\u200d", "‹U+200D›"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("e\u0301", "e\u0301"),
        ("\u0301", "◌\u0301"),
        ("\u3000", "‹U+3000›"),
        ("", "∅"),
        ("⟨F0 9F⟩", "⟨F0·9F⟩"),
    ],
)
def test_forms(text: str, form: str) -> None:
    assert shown(text) == form


def test_a_text_keeps_its_spaces_and_lines() -> None:
    assert shown_text("a  b\nשלום e\u0301 \u202ec\x00") == "a  b\nשלום e\u0301 ‹U+202E›c␀"
    assert shown_line("a  b\nc") == "a b⏎c"

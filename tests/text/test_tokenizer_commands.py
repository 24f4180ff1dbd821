"""``glassformer tokenizer train`` and ``show``."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from corpus_of_tokenizers import END, trained
from glassformer.cli.tokenizer import app, coloured, visible
from glassformer.core.errors import TokenizerError
from glassformer.text import Tokenizer

runner = CliRunner()


def run(*arguments: str, text: str | None = None) -> str:
    done = runner.invoke(app, list(arguments), input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_train_writes_a_tokenizer_that_show_opens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the car is red, the car is fast\n" * 50)
    out = tmp_path / "made"
    shown = run("train", str(tmp_path / "a.txt"), "--vocab-size", "270", "--out", str(out), "--special", END, "--special", "###", "--role", "eos=###")
    tokenizer = Tokenizer.load(out)
    assert tokenizer.vocab_size == 270
    assert tokenizer.eos_id == tokenizer.special["###"]
    assert re.search(r"wrote .*tokenizer\.json: bpe, 270 tokens, 0\.0 MB read, \d+\.\d s", shown)
    lines = run("show", str(out), f"the car{END}").splitlines()
    assert lines[0].endswith(f"|{END}")
    assert "id\tpiece\tstart\tend" in lines
    assert f"{tokenizer.special[END]}\t{END}\t7\t20" in lines
    assert re.fullmatch(r"\d+ tokens, 20 characters, 20 bytes: \d\.\d\d bytes per token|\d+ tokens.*", lines[-1])


def test_train_says_when_the_text_has_too_few_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the car")
    assert "5,000 were asked for" in run("train", str(tmp_path / "a.txt"), "--vocab-size", "5000", "--out", str(tmp_path))


def test_show_prints_ids_only_when_asked(tmp_path: Path) -> None:
    trained("bpe").save(tmp_path)
    text = f"First{END} 😀"
    assert run("show", str(tmp_path), text, "--ids").split() == [str(id) for id in trained("bpe").encode(text)]
    assert run("show", str(tmp_path), text, "--ids", "--no-special").split() == [str(id) for id in trained("bpe").encode(text, allow_special=False)]


def test_show_reads_standard_input_and_files(tmp_path: Path) -> None:
    trained("bytes").save(tmp_path)
    assert run("show", str(tmp_path), "--ids", text="Aé") == "65 195 169\n"
    (tmp_path / "text").write_text("Aé")
    assert run("show", str(tmp_path), "--ids", "--file", str(tmp_path / "text")) == "65 195 169\n"
    assert "⟨C3⟩|⟨A9⟩" in run("show", str(tmp_path), "é")
    assert run("show", str(tmp_path), "").strip().endswith("0 tokens, 0 characters, 0 bytes")


def test_plain_output_has_no_escape_codes_whatever_the_text(tmp_path: Path) -> None:
    trained("bytes").save(tmp_path)
    out = run("show", str(tmp_path), "\x1b[31m\n\t\x07")
    assert "\x1b" not in out
    assert "⟨U+001B⟩" in out
    assert "⏎" in out


def test_pieces_have_colours_and_neighbours_differ() -> None:
    pieces = trained("bpe").offsets(f"First Citizen:\n hear{END}me \x1b[31m")
    text = coloured(pieces, frozenset(trained("bpe").special.values()))
    styles = [str(span.style) for span in text.spans]
    assert len(styles) == len(pieces)
    assert all(a != b for a, b in pairwise(styles))
    assert sum("bold" in style for style in styles) == 1
    console = Console(force_terminal=True, color_system="truecolor", width=100, record=True)
    with console.capture() as capture:
        console.print(text)
    assert "\x1b[30;48;2;" in capture.get()
    assert "\x1b[31m" not in capture.get(), "the text must not command the terminal"


def test_show_on_a_terminal_has_colours_and_a_table_in_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained("bpe").save(tmp_path)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLORTERM": "", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = run("show", str(tmp_path), "First Citizen: speak")
    assert re.match(r"\x1b\[30;46mFirst\x1b\[0m\x1b\[30;43m Ci", shown)
    bare = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert bare[0] == "First Citizen: speak"
    assert re.fullmatch(r" *id +piece +place *", bare[2])
    assert len({line.rstrip().rfind("-") for line in bare[3:-1] if re.search(r" \d-\d ", line)}) <= 1
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("show", str(tmp_path), "First Citizen: speak")


def test_visible_pieces_stay_on_one_line() -> None:
    assert visible("a\n\tb\r\x00\u2028é") == "a⏎⇥b␍⟨U+0000⟩⟨U+2028⟩é"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.txt"], "no file missing.txt"),
        (["train", "{text}", "--role", "eos"], "--role 'eos' is not of the form ROLE=TOKEN"),
        (["train", "{text}", "--kind", "letters"], "no tokenizer of kind 'letters'"),
        (["show", "{tokenizer}", "a", "--file", "b"], "give one of the two"),
        (["show", "{tokenizer}", "--file", "missing.txt"], "no file missing.txt"),
        (["show", "{tokenizer}", "--file", "{binary}"], "is not UTF-8: byte FF at 0"),
        (["show", "nowhere", "a"], "no tokenizer at nowhere"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the car")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    trained("bytes").save(tmp_path / "tokenizer")
    given = [argument.format(text=tmp_path / "text", binary=tmp_path / "binary", tokenizer=tmp_path / "tokenizer") for argument in arguments]
    with pytest.raises(TokenizerError, match=message):
        runner.invoke(app, given, catch_exceptions=False)

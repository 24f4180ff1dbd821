"""Every ```python block of README.md and docs/*.md runs.

The blocks of one page run in order, as one program in an empty folder, at the line numbers that they have on the
page. Pages of docs/look and docs/generate find a small untrained model with the tokenizer of the ``books`` recipe in ``runs/books``, where
readers have a trained one. A block after ``<!-- not run: reason -->`` is only compiled. Lines of the command line are parsed, not run.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

import glassformer as gf
import warm
from glassformer.cli import app as cli
from glassformer.cli.app import app
from glassformer.cli.recipe import read_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: \S.* -->\s*\Z")


def blocks(page: str) -> list[tuple[int, str, bool]]:
    """(first line, code, does it run) of every block."""
    return [(page.count("\n", 0, m.start(1)) + 1, m[1], NOT_RUN.search(page[: m.start()]) is None) for m in FENCE.finditer(page)]


def program(page: str) -> str:
    """The running blocks as one program, every line where it stands on the page."""
    lines: list[str] = []
    for first, code, runs in blocks(page):
        compile(code, "block", "exec")
        if runs:
            lines += [""] * (first - 1 - len(lines)) + code.splitlines()
    return "\n".join(lines)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the recipe's kind, narrower and untrained, with the recipe's own tokenizer."""
    spec = read_recipe("books").model
    small = spec.replace(d_model=48).at("blocks.*.feedforward.d_ff").set(64)
    return gf.save(small.build(seed=0), tmp_path_factory.mktemp("books"), gf.Tokenizer.load(ROOT / "tests" / "data" / "books"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.parent.name in ("look", "generate") else ()) for p in PAGES],  # those draw figures of a real size
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_snippets_run(path: Path, tmp_path: Path, books: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} does not exist")
    if path.parent.name in ("look", "generate"):
        shutil.copytree(books, tmp_path / "runs" / "books")
        (tmp_path / "images").mkdir()
    text = path.read_text(encoding="utf-8")
    file = tmp_path / f"{path.stem}.py"
    file.write_text(program(text), encoding="utf-8")
    process = warm.Program([str(file)], cwd=tmp_path)
    _, err = process.communicate()
    assert process.returncode == 0, f"{path.relative_to(ROOT)} (same line numbers):\n{err[-2000:]}"


def test_blocks_are_found_where_they_stand() -> None:
    page = "a\n```python\nx = 1\n```\n<!-- not run: needs a download -->\n```python\ny = 2\n```\n```bash\nls\n```\n```python\nz = x\n```\n"
    assert blocks(page) == [(3, "x = 1\n", True), (7, "y = 2\n", False), (13, "z = x\n", True)]
    assert program(page).splitlines() == ["", "", "x = 1", *[""] * 9, "z = x"]


def commands(page: str) -> list[tuple[int, str]]:
    """(line, command) of every ``glassformer …`` line in a block without a language; what stands behind two spaces is an explanation."""
    found: list[tuple[int, str]] = []
    fence: str | None = None
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence == "" and line.startswith("glassformer "):
            found.append((number, re.split(r"\s{2,}", line.strip())[0]))
    return found


def parse(line: str) -> dict[str, Any]:
    """What the real command would be called with."""
    command: Any = typer.main.get_command(app)
    _, *words = shlex.split(line, comments=True)
    while hasattr(command, "commands"):
        assert words, f"{line!r} ends before a command"
        if words[0] not in command.commands and hasattr(command, "default"):
            words.insert(0, command.default)
        assert words[0] in command.commands, f"{line!r}: {words[0]!r} is none of {', '.join(command.commands)}"
        command = command.commands[words.pop(0)]
    params: dict[str, Any] = command.make_context(line, words).params
    return params


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_command_lines_are_understood(path: Path) -> None:
    found = commands(path.read_text(encoding="utf-8"))
    assert found or path != ROOT / "README.md"
    for number, line in found:
        try:
            parse(line)
        except Exception as error:
            raise AssertionError(f"{path.relative_to(ROOT)}:{number}: {line}: {error}") from error


def test_command_lines_are_found_and_wrong_ones_refused() -> None:
    page = "glassformer x\n```\nglassformer params tiny   all of them\n```\n```python\nglassformer = 1\n```\n```\nmake\nglassformer look 'a' -m run\n```\n"
    assert commands(page) == [(3, "glassformer params tiny"), (10, "glassformer look 'a' -m run")]
    assert parse("glassformer look 'a b' -m run")["text"] == "a b"
    for wrong in ("tokenizer show 'a b' --tokenizer tok", "params", "params tiny gpt2", "generate run 'a' --top-k many"):
        with pytest.raises(Exception, match=r"(?i)no such option|missing parameter|unexpected extra argument|valid int"):
            parse(f"glassformer {wrong}")
    with pytest.raises(AssertionError, match="'lern' is none of train"):
        parse("glassformer lern it")


WITHOUT = ("README.md", "combined.md")  # of several chains
SAMPLERS = [p for p in PAGES if p.parent.name == "generate" and p.name not in WITHOUT and "look.sampling(" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", SAMPLERS, ids=lambda p: p.stem)
def test_the_command_of_a_sampler_s_page_gives_the_text_of_its_program(path: Path, tmp_path: Path, books: Path, monkeypatch, capsys) -> None:
    """What a command has of its own (a temperature of 0.8, a top-k of 40) is taken back in it."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "books").symlink_to(books)
    monkeypatch.chdir(tmp_path)
    text = path.read_text(encoding="utf-8")
    page = [statement for statement in ast.parse(program(text)).body if "look.sampling" not in ast.unparse(statement) and "found" not in ast.unparse(statement)]
    exec(compile(ast.Module(page, []), path.name, "exec"), {})
    said = capsys.readouterr().out
    (line,) = [line for _, line in commands(text) if line.startswith("glassformer generate")]
    _, name, folder, prompt, *options = shlex.split(line)
    assert cli.main([name, folder, prompt, *options]) == 0
    assert capsys.readouterr().out == prompt + said


def test_links_inside_the_repository_lead_somewhere() -> None:
    pages = [p for p in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] if p.exists()]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken

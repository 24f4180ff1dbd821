"""Every ```python block of README.md and docs/*.md runs.

The blocks of one page run in order, as one program in an empty folder, at the line numbers that they have on the
page. A block after ``<!-- not run: reason -->`` is only compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_snippets_run(path: Path, tmp_path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path.name} does not exist")
    text = path.read_text(encoding="utf-8")
    file = tmp_path / f"{path.stem}.py"
    file.write_text(program(text), encoding="utf-8")
    done = subprocess.run([sys.executable, str(file)], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{path.relative_to(ROOT)} (same line numbers):\n{done.stderr[-2000:]}"


def test_blocks_are_found_where_they_stand() -> None:
    page = "a\n```python\nx = 1\n```\n<!-- not run: needs a download -->\n```python\ny = 2\n```\n```bash\nls\n```\n```python\nz = x\n```\n"
    assert blocks(page) == [(3, "x = 1\n", True), (7, "y = 2\n", False), (13, "z = x\n", True)]
    assert program(page).splitlines() == ["", "", "x = 1", *[""] * 9, "z = x"]


def test_links_inside_the_repository_lead_somewhere() -> None:
    pages = [p for p in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] if p.exists()]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken

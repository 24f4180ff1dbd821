"""Run the code of docs/look with a trained model, and put the figures that it draws into docs/look/images.

glassformer train books --data FOLDER --out runs/books
python scripts/look_pages.py runs/books            every page
python scripts/look_pages.py runs/books lens heads
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PAGES = Path(__file__).resolve().parents[1] / "docs" / "look"
BLOCK = re.compile(r"(<!-- not run: .*? -->\s*)?^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(page: Path, model: Path) -> int:
    """Run a page's blocks as one program beside ``runs/books``; print what it prints, keep what it draws. Gives the exit status."""
    code = "\n".join(m[2] for m in BLOCK.finditer(page.read_text(encoding="utf-8")) if not m[1])
    if not code:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "runs").mkdir()
        (here / "runs" / "books").symlink_to(model.resolve())
        (here / "images").mkdir()
        done = subprocess.run([sys.executable, "-c", code], cwd=here, check=False)
        for image in sorted((here / "images").iterdir()):
            (PAGES / "images").mkdir(exist_ok=True)
            shutil.copyfile(image, PAGES / "images" / image.name)
            print(f"{page.name}: images/{image.name}, {image.stat().st_size / 1e3:.0f} kB", flush=True)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pages", nargs="*", help="names of pages, without .md; none: all")
    given = parser.parse_args()
    pages = [PAGES / f"{name}.md" for name in given.pages] or sorted(PAGES.glob("*.md"))
    failed = [page.name for page in pages if run(page, given.model)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Build the wheel, install it into an empty environment, and use it there from another folder.

What the tests cannot see shows itself here: a file that is missing from the package, a dependency that is
declared nowhere, a path that only exists in the repository. ``python scripts/check_wheel.py --torch torch==2.13.0``

The empty environment is filled by pip, so this needs the network, or pip's cache. The wheel itself is built by the hatchling that stands in
this environment; beside a first ``make test``, which is still installing it, there is none yet, and pip fetches one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "glassformer/py.typed",
    "glassformer/recipes/shakespeare_char.py",
    "glassformer/recipes/shakespeare_quick.yaml",
    "glassformer/data/tinyshakespeare/input.txt.xz",
    "glassformer/data/tinyshakespeare/LICENCE-NOTE",
)
DEMO_SECONDS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="what pip installs first: torch==2.13.0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glassformer-wheel-") as folder:
        place = Path(folder)
        wheel = build(place / "dist")
        contents(wheel)
        command = install(wheel, place / "empty", options.torch)
        use(command, place / "elsewhere")
        say(f"the wheel works: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
    return 0


def build(out: Path) -> Path:
    """The wheel of this repository."""
    # All that building imports, so that one that is just being installed does not count.
    here = subprocess.run([sys.executable, "-c", "import hatchling.build, hatchling.builders.wheel, hatchling.metadata.core"], capture_output=True, check=False)
    how = [] if here.returncode else ["--no-build-isolation", "--check-build-dependencies"]
    say("building the wheel" + (", with a hatchling that pip fetches" if here.returncode else ""))
    run([sys.executable, "-m", "pip", "wheel", "-qq", "--disable-pip-version-check", *how, "--no-deps", "--wheel-dir", str(out), str(ROOT)])
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> None:
    """Everything that a user needs is in it, and nothing that is ours."""
    names = zipfile.ZipFile(wheel).namelist()
    missing = [n for n in NEEDED if n not in names]
    if missing:
        fail(f"the wheel lacks {', '.join(missing)}")
    strange = [n for n in names if not n.startswith(("glassformer/", "glassformer-"))]
    if strange:
        fail(f"the wheel holds files outside the package: {', '.join(strange[:5])}")


def install(wheel: Path, environment: Path, torch: str) -> Path:
    """An empty environment with torch (first, as everywhere) and the wheel; returns the glassformer command in it."""
    say("installing it into an empty environment")
    run([sys.executable, "-m", "venv", str(environment)])
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(scripts / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]  # most of it is never imported
    run([*pip, torch])
    run([*pip, str(wheel)])
    return scripts / "glassformer"


def use(command: Path, folder: Path) -> None:
    """Version, a ten-second run, text from it, and its files."""
    folder.mkdir()
    glassformer = str(command)
    version = run([glassformer, "--version"], folder).strip()
    say(version)
    if not version.startswith("glassformer "):
        fail(f"glassformer --version printed {version!r}")
    say(f"training for {DEMO_SECONDS} seconds")
    print(run([glassformer, "train", "shakespeare_quick", "--seconds", str(DEMO_SECONDS), "--out", "run"], folder))
    for name in ("model.safetensors", "model.json", "tokenizer.json"):
        if not (folder / "run" / name).exists():
            fail(f"glassformer train wrote no {name}")
    text = run([glassformer, "generate", "run", "ROMEO:", "--max-new-tokens", "40", "--seed", "1"], folder)
    if len(text) <= len("ROMEO:"):
        fail(f"glassformer generate printed {text!r}")
    run([glassformer, "look", "To be, or not to be", "--model", "run", "--out", "look.html"], folder)
    if "<html" not in (folder / "look.html").read_text(encoding="utf-8"):
        fail("glassformer look wrote no page")


def run(command: list[str], folder: Path | None = None) -> str:
    """Run a command with none of this repository on its path; its standard output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout)
        fail(f"'{' '.join(command)}' ended with {done.returncode}")
    return done.stdout


START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.1f} s] {text}", flush=True)


def fail(text: str) -> None:
    raise SystemExit(f"check_wheel: {text}")


if __name__ == "__main__":
    raise SystemExit(main())

"""The shapes written in the signatures of ``parts/`` are true: part of the laws once more, checked by jaxtyping and beartype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
CHECKED = """
import sys
from jaxtyping import install_import_hook

install_import_hook("glassformer.parts", "beartype.beartype")
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


def checked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process of its own, in which every call of a function in ``glassformer.parts`` has its shapes checked."""
    command = [sys.executable, "-c", CHECKED, "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=TESTS.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_laws_hold_with_every_shape_checked():
    laws = TESTS / "laws"
    done = checked(
        *(str(x) for x in (TESTS / "oracle" / "test_parts.py", laws / "test_every_part.py", laws / "test_causality.py", laws / "test_cache.py")),
        str(laws / "test_taps.py"),
        "-k",
        "oracle or differentiates or shapes or padding or keep or growing or ragged or bit_and_meets or switched_off",
    )
    assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-1_000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_a_wrong_shape_is_noticed(tmp_path):
    """The check above is awake: a wrongly shaped call is refused."""
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text(
        "import torch\n"
        "from glassformer.core.flow import Pass\n"
        "from glassformer.parts.feedforward import Plain\n"
        "def test_wrong():\n"
        "    i = torch.arange(2)\n"
        "    Plain(4).build(3)(torch.zeros(2, 3), Pass(positions=i, index=i))\n"
    )
    done = checked(str(wrong))
    assert done.returncode == 1 and "TypeCheckError" in done.stdout and "b t d" in done.stdout

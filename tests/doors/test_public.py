"""The public door: ``glassformer.__all__`` is exact, typed, and opens without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import glassformer
from glassformer import look

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "glassformer" / "__init__.py"
DOORS = pytest.mark.parametrize("door", [glassformer, look], ids=["glassformer", "look"])


def modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a statement."""
    program = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())


@DOORS
def test_every_public_name_can_be_fetched_and_is_what_its_room_calls_by_that_name(door: ModuleType) -> None:
    for name in door.__all__:
        value = getattr(door, name)
        assert getattr(value, "__name__", name) == name


@DOORS
def test_no_public_name_is_listed_twice_or_called_like_its_module(door: ModuleType) -> None:
    assert len(door.__all__) == len(set(door.__all__))
    assert not {room.split(".")[0] for room in door._DOOR} & set(door.__all__)


@DOORS
def test_type_checkers_see_the_same_names(door: ModuleType) -> None:
    assert door.__file__ is not None
    seen = [
        (node.module, alias.name, alias.asname)
        for block in ast.parse(Path(door.__file__).read_text()).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert all(name == shown for _, name, shown in seen)  # `import X as X` is what makes a name public to them
    assert sorted((room, name) for room, name, _ in seen) == sorted((room, name) for room, names in door._DOOR.items() for name in names)


def test_nothing_else_is_public() -> None:
    program = "import glassformer; print(*[n for n in vars(glassformer) if not n.startswith('_')])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert set(loaded) <= {"annotations", "importlib", "TYPE_CHECKING", "core"}


def test_every_error_is_public() -> None:
    from glassformer.core import errors

    classes = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.GlassformerError)}
    assert classes <= set(glassformer.__all__)


def test_every_public_function_and_class_says_what_it_is() -> None:
    silent = [n for n in glassformer.__all__ if callable(value := getattr(glassformer, n)) and not (value.__doc__ or "").strip()]
    assert not silent


def test_rooms_are_attributes() -> None:
    assert glassformer.text.Tokenizer is glassformer.Tokenizer
    assert {"text", "weights", "Decoder"} <= set(dir(glassformer))


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"glassformer has no name 'Decodr'\. Did you mean 'Decoder'"):
        glassformer.Decodr  # noqa: B018
    with pytest.raises(AttributeError, match=r"glassformer\.look has no name 'jurney'\. Did you mean 'journey'"):
        look.jurney  # noqa: B018


def test_importing_the_package_imports_no_torch_and_no_library() -> None:
    loaded = modules_after("import glassformer.look")
    assert "glassformer.look" in loaded
    assert not {"torch", "numpy", "tokenizers", "rich", "typer"} & loaded


def test_looking_imports_no_compiler() -> None:
    loaded = modules_after("from glassformer import look; look.logit_lens, look.activation_patch, look.head_roles")
    assert "torch" in loaded
    assert not {"torch._dynamo", "torch._inductor"} & loaded


def test_tokenizers_need_no_torch() -> None:
    loaded = modules_after("import glassformer; glassformer.Tokenizer")
    assert "glassformer.text" in loaded
    assert "torch" not in loaded


def test_the_package_says_that_it_is_typed() -> None:
    assert SOURCE.with_name("py.typed").exists()


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", glassformer.__version__)
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert len(re.findall(r"^__version__ =", SOURCE.read_text(), re.MULTILINE)) == 1

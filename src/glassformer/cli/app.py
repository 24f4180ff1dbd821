"""The door of the command line: the list of commands, and what happens when something goes wrong.

Exit codes: 0 it worked, 1 it failed while running, 2 the command, a recipe or a file was wrong,
130 interrupted with Ctrl-C. When whoever reads the output goes away, it ends silently with 1. A mistake of the user is one
sentence on standard error, with the remedy; ``GLASSFORMER_DEBUG=1`` adds the traceback.

Nothing here imports torch: the commands do, when they run.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .. import __version__
from ..core.errors import CheckpointError, GlassformerError, GlassformerWarning, TrainingError
from . import chat, convert, dimensions, evaluate, generate, inspect, look, params, serve, shorts, spoken, tokenizer, train, verify

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="glassformer",
    help="One transformer that you can build, train, run and look inside.",
    epilog="Start here: glassformer train shakespeare_quick, then glassformer generate runs/shakespeare_quick 'ROMEO:'",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(look.app, name="look")
app.command("inspect")(inspect.inspect)
app.command("convert")(convert.convert)
app.command("dimensions")(dimensions.dimensions)
app.command("params")(params.params)
app.command("verify", cls=shorts.Command)(verify.verify)
app.add_typer(tokenizer.app, name="tokenizer")


def _let_threads_sleep() -> None:
    """How threads wait for each other, unless the user says it: after 10,000 spins asleep. As fast as spinning on a quiet machine, and it does
    not stall beside others as spinning does; asleep at once is slow where waking up is (docs/log.md). The count is GNU's, the policy is for others.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="10000")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glassformer {__version__}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")] = False) -> None:
    pass


@contextmanager
def _notes() -> Iterator[None]:
    """Warnings of this package as lines of their own, each once: ``note: ...``."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", GlassformerWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, GlassformerWarning):
                others(message, category, *rest, **more)
            elif (text := str(message)) not in said:
                said.add(text)
                print(f"note: {text}", file=sys.stderr)

        warnings.showwarning = show
        yield


def _mend_streams() -> None:
    """A stream that the caller has closed is an empty one, and what a terminal's alphabet lacks is a question mark in it."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 : to the end of the process
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif not str(stream.encoding or "utf-8").lower().replace("-", "").startswith("utf") and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``None`` means the arguments of the process."""
    _let_threads_sleep()
    _mend_streams()
    given = list(sys.argv[1:] if args is None else args)
    group = typer.main.get_command(app)
    try:
        with _notes():
            code = group(given or ["--help"], prog_name="glassformer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        return FAILED
    except SystemExit as error:  # typer's own answer to a closed pipe
        return error.code if isinstance(error.code, int) else FAILED
    except GlassformerError as error:
        return _complain(spoken.said(error, group, given), FAILED if isinstance(error, (TrainingError, CheckpointError)) else MISTAKE)
    except OSError as error:
        return _complain(_file_trouble(error), FAILED)
    except Exception as error:
        return _unexpected(error)


def _unexpected(error: Exception) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":  # a group of commands by itself: its list is the answer
        print(str(error.format_message()), file=sys.stderr)  # type: ignore[attr-defined]
        return MISTAKE
    if hasattr(error, "format_message"):  # typer's own: a wrong option, a missing argument
        command = getattr(getattr(error, "ctx", None), "command_path", "glassformer")
        said = error.format_message().rstrip(".")
        number = re.match(r"-\.?[0-9]", str(getattr(error, "option_name", "")))
        text = " A text or number that begins with '-' and is no option's value stands last, behind '--'." if number else ""
        return _complain(f"{said}{'' if said.endswith('?') else '.'}{text} See '{command} --help'.", MISTAKE)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        todo = "in training by --set batch=8 or --set context=128, of a server by --slots or --capacity, of a text by --max-new-tokens"
        return _complain(f"there is not so much memory: make what is asked for smaller ({todo}).", FAILED)
    traceback.print_exception(error)
    print(f"\nThis is a fault in glassformer {__version__}, not a mistake of yours. Please report it with the lines above and the command.", file=sys.stderr)
    return FAILED


def _file_trouble(error: OSError) -> str:
    where = f" {error.filename!r}" if error.filename else ""
    return f"{error.strerror or error}:{where or ' a file'}. Check the path, its permissions and the free space."


def _complain(text: str, code: int) -> int:
    if os.environ.get("GLASSFORMER_DEBUG"):
        traceback.print_exc()
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print(f"\x1b[31merror:\x1b[0m {text}" if colour else f"error: {text}", file=sys.stderr)
    return code

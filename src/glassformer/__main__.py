"""``python -m glassformer`` is ``glassformer``."""

from __future__ import annotations

import sys


def run() -> int:
    """The command of the process; Ctrl-C ends it without a traceback while the libraries are read, too."""
    try:
        from .cli.app import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())

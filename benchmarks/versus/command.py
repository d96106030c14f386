"""What the commands that drive sides share: where results go, and one line for what stops a run."""

import sys

from .side import SideError


class Failure(Exception):
    """What stops the run, in one line."""


def stem(parser, out, name):
    """``--out``, a folder or a path without ending, as a path without ending."""
    out = out / name if out.is_dir() else out.with_suffix("")
    if not out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {out.resolve().parent}")
    return out


def say(name, install, run):
    """Call ``run``; end with one line where something is missing, fails or is stopped."""
    try:
        run()
    except SideError as error:
        hint = f"; in the root of the repository, run: {install}" if error.missing else ""
        sys.exit(f"{name}: {error}{hint}")
    except Failure as failure:
        sys.exit(f"{name}: {failure}")
    except ImportError as error:
        sys.exit(f"{name}: no figure: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped")

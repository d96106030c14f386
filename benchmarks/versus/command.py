"""What the commands that drive sides share: where results go, and one line for what stops a run."""

import sys

from .settings import CHECKED_STEPS, TOLERANCE
from .side import SideError


class Failure(Exception):
    """What stops the run, in one line."""


def check(losses, reference, where, steps=CHECKED_STEPS):
    """The largest distance of any side's loss from that of ``reference`` in the checked steps.

    Raises Failure if they are too far apart, or if no loss falls enough for that to mean much.
    """
    apart = {
        label: max(abs(a - b) for a, b in zip(ours[:steps], losses[reference], strict=False))
        for label, ours in losses.items()
    }
    worst = max(apart, key=apart.get)
    if not all(distance <= TOLERANCE for distance in apart.values()):  # a NaN is no agreement
        raise Failure(f"{where}: {worst} and {reference} are {apart[worst]:.1e} apart: {losses}")
    if not all(a[0] - a[-1] > 100 * TOLERANCE for a in losses.values()):
        raise Failure(f"{where}: the loss fell too little for the check to mean much: {losses}")
    return apart[worst]


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

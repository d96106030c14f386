"""Saves that are all or nothing: a file on the disk is the old one or the new one, never half of it."""

import contextlib
import os
import re
from pathlib import Path

from ..errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed: that is lock enough
    fcntl = None


LITTER = re.compile(r"\..+\.\d+\.minilora")


def write_atomically(path, data: bytes) -> None:
    """Write ``data`` to ``path`` all or not at all, whenever the process or the machine stops.

    The bytes go to a temporary file in the same folder and to the disk, then that file is renamed over the target, and
    the new name goes to the disk. Raises InputError where the disk does not take them; the old file, or the new one, is
    whole then.
    """
    write_together({path: data})


def write_together(files: dict) -> None:
    """write_atomically() for files {path: data} that belong together: none is renamed before all are on the disk."""
    temporary = {path: Path(path).with_name(f".{Path(path).name}.{os.getpid()}.minilora") for path in files}
    try:
        with contextlib.ExitStack() as staged:
            for path, data in files.items():
                staged.callback(os.close, stage(temporary[path], data))
            if os.name == "nt":  # where an open file cannot be renamed
                staged.close()
            for path in files:
                os.replace(temporary[path], path)
        for folder in {Path(path).parent for path in files}:
            sync_folder(folder)
    except OSError as error:
        raise InputError(f'cannot write "{path}": {error.strerror or error}; no file there is half written') from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def stage(path, data: bytes) -> int:
    """Write a file and put its bytes on the disk; the file, left open for its lock, by which sweep_litter() sees that
    it is not litter."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    file = os.open(path, flags, 0o666)
    try:
        lock(file)
        rest = memoryview(data)
        while rest:  # a write may take a part only
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException:
        os.close(file)
        raise
    return file


def sync_folder(folder) -> None:
    """Put a folder's names on the disk: without it, a rename may be lost with the power."""
    if os.name == "nt":  # keeps them itself, and opens no folder
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def lock(file) -> bool:
    """Take the lock of an open file, which the system gives back when its process ends; False where it is taken."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep_litter(folder) -> None:
    """Remove what a process that was killed in a save has left in ``folder``; one that is alive keeps its own."""
    for path in Path(folder).iterdir():
        if LITTER.fullmatch(path.name):
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
                try:
                    dead = lock(file)
                finally:
                    os.close(file)
                if dead:
                    path.unlink()


def writable_folder(path) -> Path:
    """``path`` as a folder that exists, can be written to and holds no litter. Raises InputError where it cannot."""
    folder = Path(path)
    probe = folder / f".probe.{os.getpid()}.minilora"
    try:
        new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in new:
            sync_folder(made.parent)
        probe.touch()
        probe.unlink()
        sweep_litter(folder)
    except OSError as error:
        raise InputError(
            f'cannot write to the folder "{folder}": {error.strerror}; choose another with --out'
        ) from error
    return folder

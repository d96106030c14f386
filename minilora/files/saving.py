"""Saves that are all or nothing: a file on the disk is the old one or the new one, never half of it."""

import contextlib
import os
import time
from pathlib import Path

from ..errors import InputError

SUFFIX = ".minilora"  # of temporary files
STALE = 3600.0  # seconds after which a temporary file belongs to a save that was killed


def write_atomically(path, data: bytes) -> None:
    """Write ``data`` to ``path`` all or not at all, whenever the process or the machine stops.

    The bytes go to a temporary file in the same folder and to the disk, then that file is renamed over the target, and
    the folder's new entry goes to the disk. Of two processes that save the same file at once, the last one wins. Raises
    InputError if the disk does not take the bytes; the old file, or the new one, is whole then.
    """
    write_together({path: data})


def write_together(files: dict) -> None:
    """write_atomically() for files {path: data} that belong together: none is renamed before all are on the disk."""
    temporary = {path: Path(path).with_name(f".{Path(path).name}.{os.getpid()}{SUFFIX}") for path in files}
    try:
        for path, data in files.items():
            put_on_disk(temporary[path], data)
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


def put_on_disk(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has its bytes. Whatever has the name, even a link, is removed first."""
    path.unlink(missing_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        rest = memoryview(data)
        while rest:  # a write may take only a part
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(folder) -> None:
    """Put a folder's entries on the disk: without it, a rename may be lost with the power."""
    if os.name == "nt":  # Windows does so itself, and cannot open a folder
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_stale(folder: Path) -> None:
    """Remove temporary files that a killed save left in ``folder`` an hour ago or earlier; nothing ever reads them."""
    for path in folder.glob(f".*.[0-9]*{SUFFIX}"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > STALE:
                path.unlink()


def writable_folder(path) -> Path:
    """``path`` as a folder that exists and can be written to; stale temporary files go. Raises InputError if not."""
    folder = Path(path)
    probe = folder / f".probe.{os.getpid()}{SUFFIX}"
    try:
        new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in new:
            sync_folder(made.parent)
        probe.touch()
        probe.unlink()
        remove_stale(folder)
    except OSError as error:
        raise InputError(
            f'cannot write to the folder "{folder}": {error.strerror}; choose another with --out'
        ) from error
    return folder

"""Files that are whole or not there, and are found again only if they are what was written.

What is kept is arrays and JSON, so that reading a file executes nothing.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
LOCK = ".lock"


def write(path: Path, content: bytes) -> None:
    """Writes a file that an interruption leaves as it was."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # ENOSPC names no file
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def without_nan(node: Any) -> Any:
    """A tree ready for JSON, which has no NaN: None in its place."""
    if isinstance(node, dict):
        return {name: without_nan(value) for name, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_nan(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def save(path: Path, arrays: Arrays, facts: Any) -> None:
    """Writes arrays, the facts that they depend on, and a checksum of both."""
    payload = io.BytesIO()
    np.savez_compressed(payload, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
    content = payload.getvalue()
    write(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def load(path: Path, facts: Any, warn: Callable[[str], None]) -> Arrays | None:
    """The arrays that were saved with the same facts; a file that is not whole is set aside."""
    if not path.exists():
        return None
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:  # such as a folder of that name
        digest, content = b"", b""
    if digest != hashlib.sha256(content).hexdigest().encode():
        aside = set_aside(path)
        warn(f"{path} is not a whole file of this tool: set aside as {aside.name}, made again")
        return None
    arrays = _arrays(content)
    return arrays if arrays.pop("facts", np.array("")).item() == json.dumps(facts) else None


def _arrays(content: bytes) -> Arrays:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile):
        return {}  # whole, but no arrays: of something else


def set_aside(path: Path) -> Path:
    """Renames a file to a name that is free, and returns it."""
    names = (path.with_name(f"{path.name}.broken{i or ''}") for i in range(10_000))
    aside = next(name for name in names if not name.exists())
    return path.replace(aside)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, and checks first that it can be written to.

    The system takes the lock back when a process ends, however it does. Where it has no such locks,
    temporary names of each process still keep every file whole.

    Raises:
      OSError: if another process is in it, or it can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _lock(file):
            file.seek(0)
            raise BlockingIOError(
                f"{folder} is in use by process {file.read(20).strip() or 'unknown'}: wait until "
                "it ends, or write to another folder"
            )
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for part in folder.rglob(".*.part"):  # of processes that were killed
            part.unlink(missing_ok=True)
        write(folder / ".space", bytes(1 << 16))
        (folder / ".space").unlink()
        yield


def _lock(file: Any) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # not Unix, or a network drive without locks
        pass
    return True

"""Durable file writes: nothing is ever half-written under its final name."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DONE = "DONE"
"""Name of the marker written last into a folder; a folder without it is unfinished."""


def fsync_path(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write_bytes(path: Path | str, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a crash, sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def atomic_write_text(path: Path | str, content: str) -> None:
    """Like `atomic_write_bytes`, UTF-8."""
    atomic_write_bytes(path, content.encode("utf-8"))


@contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that is fsynced and renamed to `path` when the block ends without an error.

    An existing folder at `path` is replaced. On an error the temporary folder is removed and `path` is left alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        for root, _, names in os.walk(temporary):
            for name in names:
                fsync_path(Path(root) / name)
            fsync_path(Path(root))
        if path.exists():
            doomed = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, doomed)
            os.replace(temporary, path)
            shutil.rmtree(doomed)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(path.parent)


def write_done(folder: Path | str, content: str = "") -> None:
    """Mark `folder` as finished; call it after everything else in the folder is on disk."""
    atomic_write_text(Path(folder) / DONE, content)


def is_done(folder: Path | str) -> bool:
    """Whether `folder` carries the DONE marker."""
    return (Path(folder) / DONE).is_file()

"""Removal of what a program left, however it is nested, named or protected."""

import os
import stat
import sys


def empty(path: str) -> None:
    """Remove what lies in the folder `path`: without recursion or long paths, and never following a link.

    What lies in a sub-folder is moved up before the sub-folder goes, so depth costs nothing.
    """
    os.chmod(path, 0o700)
    if not os.listdir(path):
        return
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        serial = 0
        while names := os.listdir(top):
            for name in names:
                if not _is_folder(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                serial = _lift(name, top, serial)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


def _is_folder(name: str, at: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode)


def _lift(name: str, top: int, serial: int) -> int:
    """Move everything in the folder `name` into `top` under free names."""
    os.chmod(name, 0o700, dir_fd=top)
    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
    try:
        for child in os.listdir(inner):
            if _is_folder(child, inner):
                os.chmod(child, 0o700, dir_fd=inner)  # a folder is written when it moves: its parent changes
            serial += 1
            os.rename(child, f".lifted-{serial}-{os.getpid()}", src_dir_fd=inner, dst_dir_fd=top)
    finally:
        os.close(inner)
    return serial


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        empty(argument)
        os.rmdir(argument)

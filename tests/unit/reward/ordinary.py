"""A command run as an ordinary user by a root process, even where the interpreter lies in a folder of root's own."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

NOBODY = 65534
ROOT = Path(__file__).parents[3]
REBIND = """
set -e
stash=$1; blocked=$2; shift 2
mount -t tmpfs tmpfs "$stash"
number=0
for place in $NEEDED; do
    number=$((number + 1)); mkdir "$stash/$number"; mount --bind "$place" "$stash/$number"
done
mount -t tmpfs -o mode=755 tmpfs "$blocked"
number=0
for place in $NEEDED; do
    number=$((number + 1)); mkdir -p "$place"; mount --bind "$stash/$number" "$place"; umount "$stash/$number"
done
umount "$stash"
exec "$@"
"""
"""In a mount namespace of its own: the closed folder is replaced by an open one that holds what is needed."""


def blocked_by(path: Path) -> Path | None:
    """The topmost folder on the way to `path` that other users may not enter."""
    for parent in reversed(path.resolve().parents):
        if not parent.stat().st_mode & stat.S_IXOTH:
            return parent
    return None


def as_nobody(command: list[str], stash: Path) -> tuple[list[str], dict[str, str]] | str:
    """The command line and environment that run `command` as nobody, or why that cannot be done here."""
    if os.getuid() != 0:
        return "only root can become another user; this run is an ordinary user already"
    if shutil.which("setpriv") is None:
        return "setpriv (util-linux) is not installed"
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all", *command]
    environment = {**os.environ, "HOME": "/nonexistent"}
    needed = {Path(p).resolve() for p in (sys.base_prefix, sys.prefix, ROOT)}
    closed = {place: blocked_by(place) for place in needed}
    needed = {place for place in needed if closed[place] and not any(o in place.parents for o in needed)}
    tops = {closed[place] for place in needed}
    if not tops:
        return drop, environment
    if len(tops) > 1:
        return f"several folders are closed to other users: {', '.join(map(str, tops))}"
    shell = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        REBIND,
        "sh",
        str(stash),
        str(tops.pop()),
        *drop,
    ]
    probe = [*shell[: -len(command)], sys.executable, "-c", "pass"]
    environment["NEEDED"] = " ".join(map(str, sorted(needed)))
    done = subprocess.run(probe, capture_output=True, text=True, env=environment, timeout=60, check=False)
    if done.returncode != 0:
        return f"no mount namespace to open the interpreter's folder in: {done.stderr.strip()}"
    return shell, environment

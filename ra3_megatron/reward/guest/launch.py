"""Start of a sandbox's trusted process: `python -S -s -P -B -c "..." CONFIG`, in an environment without secrets.

CONFIG is JSON: `fd` (socket to the pool), `namespaces` (`own`, `bubblewrap`, `none`), `uid` (of programs; null = the
same), `folder` (for work folders), `readable` (what programs may read), `site` (folder with numpy, or null).
"""

import _sitebuiltins
import builtins
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
from typing import Any, NoReturn

from . import jail, kernel, referee, supervise, zygote
from .channel import Channel
from .wire import dumps

PRELOADED = tuple(
    "abc bisect cmath collections collections.abc contextlib copy dataclasses datetime decimal enum "  # noqa: SIM905
    "fractions functools heapq io itertools json math numbers operator os re string struct sys time traceback "
    "types typing".split()
)
"""Imported once here, so that no program pays for them. Not threading and random: they have work done after every
fork, which costs more than all the rest of it."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/full")
TMPFS = "size=64m,nr_inodes=4096,mode=0711"
WORK = "/box"
"""Folder of the work folders in a root of our own."""
TRUSTED_UID_OFFSET = 1000
"""As root, the trusted processes run under a user id this much above the program's."""


_SOCKET_FD = 3


def make_root(paths: list[str]) -> None:
    """Make a root of a few read-only folders and one writable, in memory; this process must own its mounts."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    spot = next(p for p in ("/mnt", "/media", "/srv", "/sys", "/proc") if _free(p, paths))
    kernel.mount("tmpfs", spot, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=0755")
    for path in (*paths, *devices()):
        _bind(path, spot)
    os.mkdir(spot + WORK)
    kernel.mount("tmpfs", spot + WORK, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, TMPFS)
    kernel.mount("none", spot, flags=kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV)
    kernel.pivot_root(spot)


def _free(spot: str, paths: list[str]) -> bool:
    return os.path.isdir(spot) and not any(p == spot or p.startswith(spot + "/") for p in paths)


def _bind(path: str, root: str) -> None:
    target = root + path
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kernel.mount(path, target, flags=kernel.MS_BIND | kernel.MS_REC)
    if path not in DEVICES:
        flags = kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY | kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("none", target, flags=flags | _locked(target))


def _locked(path: str) -> int:
    """Flags of a mount that a user namespace may not take away."""
    given = os.statvfs(path).f_flag
    pairs = ((os.ST_NOEXEC, kernel.MS_NOEXEC), (os.ST_NOATIME, kernel.MS_NOATIME))
    flags = sum(flag for bit, flag in (*pairs, (os.ST_NODIRATIME, kernel.MS_NODIRATIME)) if given & bit)
    return flags | (kernel.MS_RELATIME if given & os.ST_RELATIME else 0)


def enter_namespaces() -> None:
    """New namespaces for everything; an ordinary user gets one of users first. Returns in a child that is process 1.

    Raises:
        OSError: this machine does not allow it.
    """
    user, group = os.getuid(), os.getgid()
    flags = kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
    kernel.unshare(flags | (kernel.CLONE_NEWUSER if user else 0))
    if user:
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(content)
    # Not before: the files of an undumpable process belong to root.
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0, "dumpable")
    pid = os.fork()
    if pid:
        _wait_for(pid)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "parent death signal")


def _wait_for(pid: int) -> NoReturn:
    """Stay as the parent of process 1: when this process is killed, so is everything inside.

    SIGTERM ends process 1 first, so that nothing is left for whoever adopts orphans: in a container that may be nobody.
    """
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGKILL))
    for fd in range(3, 256):
        try:
            os.close(fd)
        except OSError:
            continue
    _, status = os.waitpid(pid, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    raise AssertionError("unreachable")


def _end(link: socket.socket, code: int = 0) -> NoReturn:
    """Hang up on the fork server, which then ends its program and itself; wait for it, and end with `code`.

    Who ends first would leave the fork server to whoever adopts orphans.
    """
    link.close()
    try:
        while True:
            os.wait()
    except ChildProcessError:
        os._exit(code)
    raise AssertionError("unreachable")


def _can_read_as(uid: int, path: str) -> bool:
    """Whether the user `uid` can list the folder `path`."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.listdir(path)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def devices() -> list[str]:
    """The device files there are."""
    return [path for path in DEVICES if os.path.exists(path)]


def _work_folder(folder: str, name: str, owner: int | None) -> str:
    path = os.path.join(folder, name)
    os.mkdir(path, 0o700)
    if owner is not None:
        os.chown(path, owner, owner)
    return path


def _preload(site: str | None) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    # What the site module, which is left out, adds to builtins.
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))
    builtins.help = _sitebuiltins._Helper()
    if site is not None:
        sys.path.append(site)
        importlib.import_module("numpy")
        sys.path.remove(site)


def main(config: dict[str, Any]) -> NoReturn:
    """Build the sandbox, tell the pool what it is made of, serve."""
    # Low, and alone: what a server forks closes its descriptors up to the few that it may have.
    os.dup2(config["fd"], _SOCKET_FD)
    os.closerange(_SOCKET_FD + 1, max(256, config["fd"] + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    sock = socket.socket(fileno=_SOCKET_FD)
    parent = os.getppid()
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "parent death signal")
    if os.getppid() != parent:
        os._exit(1)
    os.umask(0o077)
    _preload(config["site"])
    mode, uid, folder = config["namespaces"], config["uid"], config["folder"]
    paths = config["readable"]
    missing = []
    if mode == "own":
        enter_namespaces()
        os.umask(0o022)
        make_root(paths)
        folder = WORK
        os.umask(0o077)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0, "dumpable")
    if os.getuid() != 0:
        uid = None
    elif uid is not None and not _can_read_as(uid, paths[0]):
        missing.append(f"own user: user id {uid} cannot be taken, or may not read {paths[0]}")
        uid = None
    walls, more = jail.find_walls(uid, uid is not None or mode != "none", paths, devices())
    missing += more
    trusted_uid = None if uid is None else uid + TRUSTED_UID_OFFSET
    folders = [_work_folder(folder, name, owner) for name, owner in (("program", uid), ("trusted", trusted_uid))]
    link = zygote.fork_server(walls, folders[0])
    if mode == "none":
        signal.signal(signal.SIGTERM, lambda *_: _end(link))
    jail.enter(walls, trusted_uid, folders[1])
    judge = referee.Referee(supervise.Link(link, _SOCKET_FD), walls, folders[1])
    hello = {
        "namespaces": mode,
        "landlock": walls.landlock,
        "seccomp": walls.seccomp,
        "uid": os.getuid() if uid is None else uid,
        "missing": missing,
        "possible": judge.probe(),
    }
    Channel(sock.fileno(), 1 << 31).send(dumps(hello))
    gc.collect()
    gc.freeze()  # as in the fork server
    referee.serve(sock, judge, lambda code: _end(link, code))


def start() -> None:
    """Entry of the process."""
    main(json.loads(sys.argv[1]))

"""One sandbox seen from the trainer: a trusted process in an empty environment, with its fork server inside."""

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward import guest
from ra3_megatron.reward.guest import launch
from ra3_megatron.reward.guest.channel import Channel, Closed, Oversized
from ra3_megatron.reward.guest.wire import WireError, dumps, loads

logger = logging.getLogger(__name__)

STOP_S = 20.0
"""Wall seconds within which a sandbox must have ended what is in it; after them it is killed."""
_UIDS_PER_TRAINER = 64
"""User ids between those of the trainers of one machine: threads are counted per user id."""
START_S = 60.0
"""Wall seconds within which a sandbox must have started."""
_GUEST = Path(guest.__file__).parent
_START = (
    f"import sys; sys.path.insert(0, {str(_GUEST.parent)!r}); from guest import launch; del sys.path[0]; launch.start()"
)
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the order of sets of strings, and with it a verdict, is the same everywhere
    "PYTHONUTF8": "1",
    "MALLOC_ARENA_MAX": "2",  # an arena per thread takes 64 MiB of address space
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
"""All that a sandbox, and so a program, finds in its environment."""
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/usr/share/zoneinfo")
_ANSWER_LIMIT = 1 << 20


class SandboxError(Exception):
    """A sandbox could not be started, has died or does not answer; says nothing about the program."""


def interpreter() -> str:
    """The interpreter itself: that of a virtual environment is a link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def numpy_folder() -> str | None:
    """The folder that holds numpy, found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("numpy")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parents[1])


def library_paths(site: str | None) -> list[str]:
    """What a program must be able to read: Python's library, shared libraries, numpy if asked for."""
    base = {"installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment's
    own = {os.path.realpath(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")}
    prefix_lib = os.path.join(sys.base_prefix, "lib")
    shared = [os.path.join(prefix_lib, name) for name in sorted(os.listdir(prefix_lib)) if name.startswith("libpython")]
    numpy = [os.path.join(site, name) for name in ("numpy", "numpy.libs")] if site else []
    return [p for p in (*sorted(own), *shared, *LIBRARIES, *numpy) if os.path.exists(p)]


class Sandbox:
    """A running sandbox; `namespaces` is `own`, `bubblewrap` or `none`. Not thread-safe: one thread, one sandbox.

    Raises:
        SandboxError: it did not start; the message says why.
    """

    def __init__(self, config: JudgeConfig, namespaces: str, number: int) -> None:
        self._way = namespaces
        self._folder: str | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the sandbox
        ours, theirs = socket.socketpair()
        self._socket = ours
        try:
            folder = launch.WORK
            if namespaces == "none":
                self._folder = folder = tempfile.mkdtemp(prefix="ra3-judge-")
                os.chmod(folder, 0o711)
            site = numpy_folder() if config.preload_numpy else None
            settings = {
                "fd": theirs.fileno(),
                "namespaces": namespaces,
                "uid": config.uid + number + _UIDS_PER_TRAINER * int(os.environ.get("LOCAL_RANK", "0")),
                "folder": folder,
                "readable": library_paths(site),
                "site": site,
            }
            command = [interpreter(), "-S", "-s", "-P", "-B", "-c", _START, json.dumps(settings)]
            if namespaces == "bubblewrap":
                command = bubblewrap(site) + command
            self._process = subprocess.Popen(
                command,
                env=_ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            ours.close()
            self._clear()
            raise SandboxError(f"{namespaces}: {error}") from error
        finally:
            theirs.close()
        self._channel = Channel(ours.fileno(), _ANSWER_LIMIT)
        try:
            self.hello = self._receive(START_S)
        except SandboxError:
            self.close()
            raise

    def run(self, job: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """The sandbox's answer to one job.

        Raises:
            SandboxError: there is none; the sandbox must be closed.
        """
        self._socket.settimeout(deadline_s)
        try:
            self._socket.sendall(dumps(job))
        except OSError as error:
            raise SandboxError(f"it takes no job: {error}{self._last_words()}") from error
        answer = self._receive(deadline_s)
        if "broken" in answer:
            raise SandboxError(answer["broken"])
        return answer

    def _receive(self, deadline_s: float) -> dict[str, Any]:
        # A blocking descriptor with a deadline of the socket layer: Channel reads the descriptor itself.
        timeval = int(deadline_s).to_bytes(8, sys.byteorder) + bytes(8)
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        try:
            answer = loads(self._channel.receive())
        except (BlockingIOError, AssertionError) as error:
            raise SandboxError(f"no answer within {deadline_s:.0f} s{self._last_words()}") from error
        except (Closed, Oversized, WireError, OSError) as error:
            raise SandboxError(f"it has died{self._last_words()}") from error
        if not isinstance(answer, dict):
            raise SandboxError("it does not speak the protocol")
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace").strip()
        return f"; its last words: {text[-1500:]}" if text else ""

    def stop(self) -> None:
        """Kill everything in the sandbox; safe from another thread while one waits for an answer."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the trusted process ends by itself when it sees this
        if self._process.poll() is not None:
            return
        # Not killed at once: its child would be left to whoever adopts orphans, and in a container that may be nobody.
        if self._way == "bubblewrap":
            for child in _children(self._process.pid):
                os.kill(child, signal.SIGKILL)
        else:
            self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def close(self) -> None:
        """Kill everything in the sandbox, wait for it and remove its files. Idempotent."""
        self.stop()
        self._process.wait()
        self._socket.close()
        self._clear()

    def _clear(self) -> None:
        self._errors.close()
        if self._folder is not None:
            # In a process of its own: what a program leaves can break whoever removes it.
            command = [interpreter(), "-S", "-s", "-P", "-B", str(_GUEST / "remove.py"), self._folder]
            done = subprocess.run(command, env={}, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode:
                logger.warning("could not remove the work folder %s: %s", self._folder, done.stderr.strip()[-500:])
            self._folder = None


def _children(pid: int) -> list[int]:
    """Process ids of the children of a process; none where it has gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def bubblewrap(site: str | None) -> list[str]:
    """The command line of bubblewrap that a sandbox is started by.

    Raises:
        SandboxError: it is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bubblewrap: the command bwrap is not installed")
    command = [program, "--die-with-parent", "--as-pid-1", "--clearenv", "--chdir", "/"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.getuid() == 0:
        for capability in ("SETUID", "SETGID", "KILL", "CHOWN", "DAC_OVERRIDE", "FOWNER"):
            command += ["--cap-add", f"CAP_{capability}"]
    else:
        command += ["--unshare-user"]
    paths = [*library_paths(site), interpreter(), str(_GUEST)]
    # bubblewrap would give the folders above them the modes they have here, and /root may be closed to others.
    above = {str(folder) for path in (*paths, *launch.devices()) for folder in Path(path).parents}
    for folder in sorted(above - {"/"}):
        if folder not in paths:
            command += ["--perms", "0755", "--dir", folder]
    for path in paths:
        command += ["--ro-bind", path, path]
    for device in launch.devices():
        command += ["--dev-bind", device, device]
    return [*command, "--perms", "0711", "--size", str(64 << 20), "--tmpfs", launch.WORK, "--remount-ro", "/", "--"]

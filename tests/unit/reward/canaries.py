"""Things beside the sandbox that an escape would touch: listeners, files, secrets, a process."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Self

VARIABLE = "RA3_TEST_CANARY"


class Canaries:
    """Set up on entry, gone on exit; `names` fills the attacks' braces, `touched()` says what an attack got at."""

    def __init__(self) -> None:
        self.token = os.urandom(8).hex()
        self.heard: list[str] = []

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ra3-canary-")))
        self.folder.chmod(0o755)
        self.write_dir, self.keep_dir = self.folder / "write", self.folder / "keep"
        for place in (self.write_dir, self.keep_dir):
            place.mkdir()
            place.chmod(0o777)
        answers = " ".join(f"ANSWER-{self.token}-{n}" for n in range(3))
        self.secret = self.folder / "secret"
        self.secret.write_text(answers)
        (self.keep_dir / "kept").write_text("kept")
        os.environ[VARIABLE] = answers
        self._stack.callback(os.environ.pop, VARIABLE)
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)", answers])
        self._stack.callback(self.victim.wait)
        self._stack.callback(self.victim.kill)
        self._sockets: dict[str, socket.socket] = {}
        self._listen("tcp", socket.AF_INET, ("127.0.0.1", 0))
        tcp_port = self._sockets["tcp"].getsockname()[1]
        with contextlib.suppress(OSError):
            self._listen("tcp_v6", socket.AF_INET6, ("::1", tcp_port))
        self._listen("udp", socket.AF_INET, ("127.0.0.1", 0), socket.SOCK_DGRAM)
        abstract = f"ra3-canary-{self.token}"
        self._listen("abstract", socket.AF_UNIX, f"\0{abstract}")
        self._listen("unix", socket.AF_UNIX, str(self.folder / "socket"))
        (self.folder / "socket").chmod(0o777)
        self.names = {
            "token": self.token,
            "tcp_port": str(tcp_port),
            "udp_port": str(self._sockets["udp"].getsockname()[1]),
            "abstract": abstract,
            "socket_path": str(self.folder / "socket"),
            "secret_path": str(self.secret),
            "write_dir": str(self.write_dir),
            "keep_dir": str(self.keep_dir),
            "victim_pid": str(self.victim.pid),
        }
        return self

    def _listen(self, name: str, family: int, address: object, kind: int = socket.SOCK_STREAM) -> None:
        listener = socket.socket(family, kind)
        listener.bind(address)
        if kind == socket.SOCK_STREAM:
            listener.listen()
        self._sockets[name] = listener
        threading.Thread(target=self._hear, args=(name, listener, kind), daemon=True).start()

    def _hear(self, name: str, listener: socket.socket, kind: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                if kind == socket.SOCK_DGRAM:
                    listener.recv(100)
                    self.heard.append(name)
                    continue
                connection, _ = listener.accept()
                self.heard.append(name)
                with connection, contextlib.suppress(OSError):
                    # Closed at once, the other side could find that it had not got through.
                    connection.settimeout(1.0)
                    connection.recv(100)

    def touched(self) -> list[str]:
        """What is not as it was: one line each, nothing when every sandbox held."""
        found = [f"the {name} listener was reached" for name in sorted(set(self.heard))]
        found += [f"{path} was written" for path in sorted(self.write_dir.iterdir())]
        if [p.name for p in self.keep_dir.iterdir()] != ["kept"] or (self.keep_dir / "kept").read_text() != "kept":
            found.append(f"{self.keep_dir} has changed")
        if self.victim.poll() is not None:
            found.append("the process beside the judge was ended")
        return found

    def __exit__(self, *error: object) -> None:
        for listener in self._sockets.values():
            with contextlib.suppress(OSError):
                # A thread in accept() holds the socket; shutting it down wakes the thread.
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._stack.close()

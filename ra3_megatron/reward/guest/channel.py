"""Frames over a file descriptor, blocking or with somebody who waits."""

import os
from collections.abc import Callable


class Closed(Exception):
    """The other side has gone."""


class Oversized(Exception):
    """The other side announces a frame larger than allowed."""


class Channel:
    """Sends and receives whole frames.

    `wait(fd, writing)` returns when `fd` can be read or written; it supervises meanwhile, and may raise. Without it
    `fd` must be blocking, with it non-blocking.
    """

    def __init__(self, fd: int, limit: int, wait: Callable[[int, bool], None] | None = None) -> None:
        self.fd = fd
        self.limit = limit
        self._wait = wait
        self._buffer = bytearray()

    def send(self, frame: bytes) -> None:
        """Write one frame.

        Raises:
            Closed: nobody reads any more.
        """
        rest = memoryview(frame)
        while rest:
            try:
                rest = rest[os.write(self.fd, rest) :]
            except BlockingIOError:
                assert self._wait is not None
                self._wait(self.fd, True)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise Closed from error

    def receive(self) -> bytes:
        """The content of the next frame.

        Raises:
            Closed: no whole frame will come.
            Oversized: it would be larger than the limit.
        """
        length = int.from_bytes(self._exactly(4), "little")
        if length > self.limit:
            raise Oversized(f"a frame of {length} bytes")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        buffer = self._buffer
        while len(buffer) < count:
            try:
                part = os.read(self.fd, max(65536, count - len(buffer)))
            except BlockingIOError:
                assert self._wait is not None
                self._wait(self.fd, False)
                continue
            except ConnectionResetError as error:
                raise Closed from error
            if not part:
                raise Closed
            buffer += part
        content = bytes(buffer[:count])
        del buffer[:count]
        return content
